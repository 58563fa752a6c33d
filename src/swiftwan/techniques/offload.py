"""Weights that rest in host memory until they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.models.streaming import Slots, size_of, stream
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.weights.build import Parts

KINDS = ("blocks",)


@dataclass(frozen=True)
class Offload(Technique):
    """``offload:blocks[:resident=N]``: transformer blocks stream from pinned host memory, prefetched while the one
    before computes; the first N stay on the device."""

    value: str
    resident: int = 0

    name = "offload"
    kind = "exact"
    reason = "the same weights, brought to the device as they are needed"
    slot = Slot.RESIDENCY
    claims = ("transformer",)
    makes = frozenset({"streamed"})
    refuses = {
        "scales beside weights": "bitsandbytes keeps them out of reach of a copy; take quantize:int4",
    }

    def __post_init__(self) -> None:
        if self.value not in KINDS:
            raise PlanError(f"offload is '{self.value}'." + did_you_mean(self.value, KINDS))
        if self.resident < 0:
            raise PlanError(f"offload: resident is {self.resident}; it is a number of blocks, 0 or more.")

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, transformers_on_host=True)

    def install(self, parts: Parts) -> None:
        transformers = [t for t in (parts.transformer, parts.transformer_2) if t is not None]
        size = max(size_of(block) for transformer in transformers for block in transformer.blocks)
        slots = Slots(size, parts.device)
        for transformer in transformers:
            blocks = transformer.blocks
            stream(blocks, min(self.resident, len(blocks)), slots)
            transformer.to(parts.device)
