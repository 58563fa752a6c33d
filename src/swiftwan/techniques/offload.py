"""Weights that rest in host memory until they are needed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from swiftwan.errors import PlanError, did_you_mean
from swiftwan.models.parking import Parked
from swiftwan.models.streaming import Slots, bring, size_of, stream
from swiftwan.techniques.base import ByValue, Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.models.config import KnownModel
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

_REASONS = {
    "auto": "as many blocks stay on the device as the budget holds; the rest streams from host memory",
    "blocks": "blocks stream from host memory, each while the one before computes",
    "experts": "of two experts the one at work is on the device, the other in host memory",
    "model": "each model is on the device only while it is at work, else in host memory",
}
KINDS = tuple(_REASONS)


@dataclass(frozen=True)
class Offload(Technique):
    """``offload:model``: transformers are on the device only while they denoise, the text encoder only while it
    encodes. ``offload:experts``: of two experts the one at work. ``offload:blocks[:resident=N]``: transformer blocks
    stream from pinned host memory, prefetched while the one before computes; the first N stay on the device.
    ``offload:auto:budget=GB``: transformers take so many GB (10^9 bytes) of the device; what does not fit streams."""

    value: str
    resident: int = 0
    budget: float = 0.0

    name = "offload"
    kind = "exact"
    reason = ByValue("the same weights, brought to the device as they are needed", _REASONS)
    slot = Slot.RESIDENCY
    claims = ("transformer",)
    makes = frozenset({"moving weights"})
    refuses = MappingProxyType(
        {
            "scales beside transformer weights": "bitsandbytes keeps them out of reach of a copy; take quantize:int4",
        }
    )

    def __post_init__(self) -> None:
        if self.value not in KINDS:
            raise PlanError(f"offload is '{self.value}'." + did_you_mean(self.value, KINDS))
        if self.resident < 0:
            raise PlanError(f"offload: resident is {self.resident}; it is a number of blocks, 0 or more.")
        if self.resident and self.value != "blocks":
            raise PlanError(f"offload:{self.value} has no resident blocks; that is for offload:blocks.")
        if self.value == "auto" and not 0 < self.budget < math.inf:
            raise PlanError(
                f"offload:auto has a budget of {self.budget:g} GB; say how much of the device's memory the "
                "transformers may take: offload:auto:budget=8."
            )
        if self.budget and self.value != "auto":
            raise PlanError(f"offload:{self.value} has no budget; that is for offload:auto.")

    def fit(self, model: KnownModel) -> list[str]:
        if self.value == "experts" and model.boundary_ratio is None:
            raise PlanError(f"'{model.name}' has one transformer; take offload:model or offload:blocks")
        if self.resident >= model.transformer.num_layers:
            return [f"'{model.name}' has {model.transformer.num_layers} blocks: all stay on the device, none streams"]
        return []

    def apply(self, settings: Settings) -> Settings:
        stay = self._that_stay if self.value in ("auto", "blocks") else None
        return replace(settings, transformers_on_host=True, resident_blocks=stay)

    def cost(self, costs: Costs) -> Costs:
        layers = costs.sizes.num_layers
        if self.value in ("auto", "blocks"):
            experts = 2 if costs.model.boundary_ratio else 1
            resident = self._resident(experts, layers, int(costs.rest_bytes), int(costs.block_bytes / layers))
            return replace(costs, residency="resident" if resident == layers else "streamed", resident_blocks=resident)
        home = "unload" if self.value == "model" and costs.text_home == "gpu" else costs.text_home
        return replace(costs, residency="one at a time", text_home=home)

    def install(self, parts: Parts) -> None:
        if self.value in ("auto", "blocks"):
            self._stream(parts)
        else:
            parts.weights_move = True
            parts.enter = OneAtATime(parts)
            parts.text.stays_loaded = self.value != "model"
        if parts.weights_move:
            for transformer in filter(None, (parts.transformer, parts.transformer_2)):
                # They make room for each other: an opening's (0.8 GB of 14B at 1280x720) counts for more than 1 %.
                transformer.takes_opening = False

    def _stream(self, parts: Parts) -> None:
        transformers = [t for t in (parts.transformer, parts.transformer_2) if t is not None]
        layers = len(parts.transformer.blocks)
        size = max(size_of(block) for transformer in transformers for block in transformer.blocks)
        rest = size_of(parts.transformer) - size_of(parts.transformer.blocks)
        resident = self._resident(len(transformers), layers, rest, size)
        if resident < layers:
            parts.weights_move = True
            slots = Slots(size, parts.device)
            parts.enter = slots.enter
            for transformer in transformers:
                stream(transformer.blocks, resident, slots)
        for transformer in transformers:
            bring(transformer, parts.device)

    def _resident(self, experts: int, layers: int, rest: int, block: int) -> int:
        """As :meth:`_that_stay`.

        Raises:
            PlanError: the budget does not hold what cannot stream.
        """
        stay, least = self._that_stay(experts, layers, rest, block), experts * rest + 2 * block
        if self.value == "auto" and stay < layers and self.budget * 1e9 < least:
            raise PlanError(
                f"offload: budget is {self.budget:g} GB, and the two blocks at work and what is no block take "
                f"{least / 1e9:.2f} GB; give more, or quantize."
            )
        return stay

    def _that_stay(self, experts: int, layers: int, rest: int, block: int) -> int:
        """How many blocks of each transformer stay on the device.

        Args:
            rest, block: bytes of a transformer without its blocks, and of one block.
        """
        if self.value == "blocks":
            return min(self.resident, layers)
        budget, least = int(self.budget * 1e9), experts * rest + 2 * block
        if experts * (rest + layers * block) <= budget:
            return layers
        return min(max(budget - least, 0) // (experts * block), layers - 1)


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
