"""Self-attention a few queries at a time."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from swiftwan.errors import PlanError
from swiftwan.models.dit import each_block
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.ops.attention import Attend
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class AttentionSlicing(Technique):
    """``attention-slicing:size=1024``: so many queries at a time attend to all keys. Where attention forms its matrix
    (fp32 on GPUs without FlashAttention, mps), that is ``size`` rows instead of all: 32,760 tokens of 12 heads take
    1.6 GB instead of 52 in fp32. Flash and cuDNN kernels never form it: there it saves nothing and costs launches."""

    size: int = 1024

    name = "attention-slicing"
    kind = "exact"
    reason = (
        "each query's softmax is its own; saves memory only where the kernel forms the matrix (flash, cudnn do not)"
    )
    slot = Slot.BLOCKS
    switch = "nothing"
    claims = ("transformer.self-attention",)
    refuses = MappingProxyType(
        {
            "attention-in-8-bits": "attention in 8 bits is written for as many keys as queries, and a slice has fewer "
            "queries; drop one"
        }
    )

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PlanError(f"attention-slicing: size is {self.size}; it is a number of queries, 1 or more.")

    def install(self, parts: Parts) -> None:
        for block in each_block(parts.transformer, parts.transformer_2):
            block.attn1.attend = Sliced(cast("Attend", block.attn1.attend), self.size)


class Sliced:
    """An attention kernel over slices of the queries (B, L, H, E)."""

    def __init__(self, attend: Attend, size: int) -> None:
        self.attend, self.size = attend, size

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([self.attend(part, k, v) for part in q.split(self.size, dim=1)], dim=1)
