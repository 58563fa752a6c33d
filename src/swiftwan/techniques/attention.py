"""Which kernel computes self-attention, 70 % of the work of a 1.3B forward at 832x480x81."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from swiftwan.errors import PlanError, UnavailableError, did_you_mean
from swiftwan.models.dit import each_block
from swiftwan.ops.attention import KERNELS, kernel
from swiftwan.techniques.base import Settings, Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class Attention(Technique):
    """``attention:sdpa``, ``cudnn``, ``flash4``, ``flash3``, ``flash2`` or ``sage`` (8 bits) for self-attention."""

    value: str

    name = "attention"
    kind = "exact"
    reason = "the same softmax over all tokens, by another kernel"
    slot = Slot.ATTENTION
    switch = "a kernel's first call; FlashAttention-4 compiles for 7 s once"

    def __post_init__(self) -> None:
        names = [known.name for known in KERNELS]
        if self.value not in names:
            raise PlanError(f"attention:{self.value} is not known." + did_you_mean(self.value, names))
        if self.value == "sage":
            object.__setattr__(self, "kind", "near")
            object.__setattr__(self, "reason", "q and k in 8 bits, smoothed (SageAttention, arXiv 2410.02367)")

    def missing_on(self, device: Device) -> str:
        return kernel(self.value).missing_on(device.capability)

    def apply(self, settings: Settings) -> Settings:
        if kernel(self.value).half and settings.dtype is torch.float32:
            raise PlanError(
                f"'{self.spec}' computes in bf16 or fp16 and this run is in fp32; take dtype:bf16, or attention:sdpa."
            )
        return settings

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, attention=self.value)

    def install(self, parts: Parts) -> None:
        """Raises:
        UnavailableError: the package is there but cannot be imported.
        """
        try:
            attend = kernel(self.value).load()
        except (ImportError, AttributeError, OSError) as problem:
            told = str(problem).partition("\n")[0]
            raise UnavailableError(
                f"'{self.spec}' is installed but cannot be loaded: {told}; take attention:cudnn or attention:sdpa."
            ) from None
        for block in each_block(parts.transformer, parts.transformer_2):
            block.attn1.attend = attend
