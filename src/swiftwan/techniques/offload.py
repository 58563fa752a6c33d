"""Weights that rest in host memory until they are needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.models.parking import Parked
from swiftwan.models.streaming import Slots, bring, size_of, stream
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.models.config import KnownModel
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

KINDS = ("blocks", "experts", "model")


@dataclass(frozen=True)
class Offload(Technique):
    """``offload:model``: transformers are on the device only while they denoise, the text encoder only while it
    encodes. ``offload:experts``: of two experts the one at work. ``offload:blocks[:resident=N]``: transformer blocks
    stream from pinned host memory, prefetched while the one before computes; the first N stay on the device."""

    value: str
    resident: int = 0

    name = "offload"
    kind = "exact"
    reason = "the same weights, brought to the device as they are needed"
    slot = Slot.RESIDENCY
    claims = ("transformer",)
    makes = frozenset({"moving weights"})
    refuses = MappingProxyType(
        {
            "scales beside weights": "bitsandbytes keeps them out of reach of a copy; take quantize:int4",
        }
    )

    def __post_init__(self) -> None:
        if self.value not in KINDS:
            raise PlanError(f"offload is '{self.value}'." + did_you_mean(self.value, KINDS))
        if self.resident < 0:
            raise PlanError(f"offload: resident is {self.resident}; it is a number of blocks, 0 or more.")
        if self.resident and self.value != "blocks":
            raise PlanError(f"offload:{self.value} has no resident blocks; that is for offload:blocks.")

    def unfit_for(self, model: KnownModel) -> str:
        if self.value == "experts" and model.boundary_ratio is None:
            return f"'{model.name}' has one transformer; take offload:model or offload:blocks"
        return ""

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, transformers_on_host=True)

    def cost(self, costs: Costs) -> Costs:
        if self.value == "blocks":
            return replace(costs, residency="streamed", resident_blocks=min(self.resident, costs.sizes.num_layers))
        home = "unload" if self.value == "model" and costs.text_home == "gpu" else costs.text_home
        return replace(costs, residency="one at a time", text_home=home)

    def install(self, parts: Parts) -> None:
        parts.weights_move = True
        if self.value == "blocks":
            _stream_blocks(parts, self.resident)
        else:
            parts.enter = OneAtATime(parts)
            parts.text.stays_loaded = self.value != "model"


def _stream_blocks(parts: Parts, resident: int) -> None:
    transformers = [t for t in (parts.transformer, parts.transformer_2) if t is not None]
    size = max(size_of(block) for transformer in transformers for block in transformer.blocks)
    slots = Slots(size, parts.device)
    for transformer in transformers:
        blocks = transformer.blocks
        stream(blocks, min(resident, len(blocks)), slots)
        bring(transformer, parts.device)


class OneAtATime:
    """Brings a transformer to the device when its turn comes, and lets it go when another component's does."""

    def __init__(self, parts: Parts) -> None:
        self.parked = {"transformer": Parked(parts.transformer, parts.device)}
        if parts.transformer_2 is not None:
            self.parked["transformer_2"] = Parked(parts.transformer_2, parts.device)

    def __call__(self, component: str) -> None:
        for name, parked in self.parked.items():
            if name != component:
                parked.leave()
        if component in self.parked:
            self.parked[component].come()
