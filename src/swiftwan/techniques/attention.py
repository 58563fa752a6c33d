"""Which kernel computes self-attention, 70 % of the work of a 1.3B forward at 832x480x81."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from swiftwan.errors import PlanError, UnavailableError, did_you_mean
from swiftwan.models.dit import Block, each_block
from swiftwan.ops.attention import KERNELS, Kernel, kernel
from swiftwan.ops.fp8 import Fp8Linear
from swiftwan.techniques.base import ByValue, Kind, Settings, Slot, Technique
from swiftwan.techniques.ends import Ends, OtherAtEnds

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.models.config import KnownModel
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts

_NEAR_REASONS = {
    "sage": "q and k in 8 bits, smoothed (SageAttention, arXiv 2410.02367)",
    "fp8": "scores of 8-bit integers, weights and values as 8-bit floats, keys and values smoothed",
    "fp8-plain": "the roundings of attention:fp8 in plain torch, to see what they do: slow, on any device",
}


@dataclass(frozen=True)
class Attention(Technique):
    """``attention:sdpa``, ``cudnn``, ``flash4``, ``flash3``, ``flash2``, or in 8 bits ``fp8``, ``fp8-plain``, ``sage``:
    for self-attention.

    Args:
        keep_steps: with an 8-bit kernel, so many first and last steps stay exact: the first lay out the picture, the
            last draw its details (xDiT's hybrid schedule for fp8 attention).
        keep_layers: so many first and last blocks stay exact.
    """

    value: str
    keep_steps: int = 0
    keep_layers: int = 0

    name = "attention"
    kind = ByValue[Kind]("exact", dict.fromkeys(_NEAR_REASONS, "near"))
    reason = ByValue("the same softmax over all tokens, by another kernel", _NEAR_REASONS)
    slot = Slot.ATTENTION
    switch = "a kernel's first call; FlashAttention-4 compiles for 7 s once"
    values = tuple(known.name for known in KERNELS)

    def __post_init__(self) -> None:
        names = [known.name for known in KERNELS]
        if self.value not in names:
            raise PlanError(f"attention:{self.value} is not known." + did_you_mean(self.value, names))
        for option in ("keep_steps", "keep_layers"):
            count, word = getattr(self, option), option.replace("_", "-")
            if count < 0:
                raise PlanError(f"attention: {word} is {count}; it is 0 or more.")
            if count and not self.is_near:
                raise PlanError(f"attention:{self.value} is exact everywhere; {word} is for kernels in 8 bits.")

    @property
    def is_near(self) -> bool:
        return self.value in _NEAR_REASONS

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        made = {"steps-differ"} if self.keep_steps else set()
        return frozenset(made | {"attention-in-8-bits"} if self.value in ("fp8", "fp8-plain") else made)

    def missing_on(self, device: Device) -> str:
        return kernel(self.value).missing_on(device.capability)

    def fit(self, model: KnownModel) -> list[str]:
        width, chosen = model.transformer.attention_head_dim, kernel(self.value)
        if chosen.widths and width not in chosen.widths:
            raise PlanError(f"'{self.value}' takes heads of {chosen.widths_told}, those of '{model.name}' are {width}")
        return []

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
        chosen = kernel(self.value)
        attend, for_bytes = self._load(chosen.load), self._load(chosen.load_for_bytes or chosen.load)
        for block in each_block(parts.transformer, parts.transformer_2):
            block.attn1.attend = for_bytes if hands_to_bytes(block) else attend
        if not self.keep_steps and not self.keep_layers:
            return
        exact = self._load(fastest_exact(parts.device).load)
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            steps = Ends(self.keep_steps, self.keep_steps)
            transformer.register_forward_pre_hook(steps)
            blocks = list(each_block(transformer))
            for number, block in enumerate(blocks):
                inside = self.keep_layers <= number < len(blocks) - self.keep_layers
                block.attn1.attend = OtherAtEnds(block.attn1.attend, exact, steps) if inside else exact

    def _load(self, load: Callable[[], Any]) -> Any:
        try:
            return load()
        except (ImportError, AttributeError, OSError) as problem:
            told = str(problem).partition("\n")[0]
            raise UnavailableError(
                f"'{self.spec}' is installed but cannot be loaded: {told}; take attention:cudnn or attention:sdpa."
            ) from None


def hands_to_bytes(block: Block) -> bool:
    """Whether what reads self-attention's result is an 8-bit layer."""
    return type(block.attn1.to_out[0]) is Fp8Linear


def fastest_exact(device: torch.device) -> Kernel:
    """Of the exact kernels that run there, the fastest as measured on Hopper; before it, torch's own."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    names = ("flash4", "cudnn") if capability is not None and capability >= (9, 0) else ()
    return next((kernel(name) for name in names if not kernel(name).missing_on(capability)), kernel("sdpa"))
