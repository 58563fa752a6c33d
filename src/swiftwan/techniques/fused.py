"""What lies between the matrix products of a block, each in one pass over memory."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from torch import nn

from swiftwan.models.dit import GELU, each_block
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class Fused(Technique):
    """Triton kernels for norms, modulation, gates, RoPE and text attention; GELU inside the matrix product."""

    name = "fused"
    kind = "exact"
    reason = "the same maths in fewer passes over memory, rounded less often"
    slot = Slot.BLOCKS
    claims = ("blocks.ops",)

    def missing_on(self, device: Device) -> str:
        if device.capability is None or device.capability < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or more"
        if find_spec("triton") is None:
            return "the package is missing: pip install triton"
        return ""

    def install(self, parts: Parts) -> None:
        from swiftwan.ops.fused import FUSED, linear_gelu

        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.ops = FUSED
        for block in each_block(parts.transformer, parts.transformer_2):
            block.ops = FUSED
            gelu = cast(GELU, block.ffn.net[0])
            # A layer that a technique before this one put there, 8-bit or with a LoRA, has a product of its own.
            if type(gelu.proj) is nn.Linear:
                gelu.linear_gelu = linear_gelu
