"""In which number format a run computes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swiftwan.device import parse_dtype
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.techniques.costs import Costs


@dataclass(frozen=True)
class Dtype(Technique):
    """``dtype:bf16``, ``fp16`` or ``fp32`` for all weights; norms and timesteps stay float32, as in diffusers."""

    value: str

    name = "dtype"
    kind = "exact"
    reason = "the same maths in the format named"
    slot = Slot.WEIGHTS
    claims = ("all",)  # a part may have a format of its own

    def __post_init__(self) -> None:
        parse_dtype(self.value)

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, dtype=parse_dtype(self.value))


@dataclass(frozen=True)
class Tf32(Technique):
    """Float32 products on the tensor cores with 10-bit mantissas; bf16 and fp16 runs are not touched."""

    name = "tf32"
    kind = "near"
    reason = "float32 products keep 10 of 23 mantissa bits"
    slot = Slot.LINEAR
    switch = "nothing"
    claims = ()

    def missing_on(self, device: Device) -> str:
        if device.capability is None or device.capability < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or more"
        return ""

    def apply(self, settings: Settings) -> Settings:
        return replace(settings, tf32=True)

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, product="tf32") if costs.product == "fp32" else costs
