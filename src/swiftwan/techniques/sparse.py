"""Self-attention that skips what matters least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swiftwan.errors import PlanError
from swiftwan.models.dit import each_block
from swiftwan.ops import flash4
from swiftwan.ops.attention import Attend, AttendForLinear, kernel, opaque, opaque_for_bytes
from swiftwan.ops.fp8 import Rounded
from swiftwan.ops.sparse import (
    BLOCK,
    SparseKernel,
    select_blocks,
    sparse_flash4,
    sparse_flex,
    sparse_reference,
    tile_order,
)
from swiftwan.techniques.attention import hands_to_bytes
from swiftwan.techniques.base import Slot, Technique
from swiftwan.techniques.ends import Ends, OtherAtEnds

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.models.config import KnownModel
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class SparseAttention(Technique):
    """``sparse-attention:keep=0.5``: each 128 tokens attend to the share ``keep`` of all blocks of 128, chosen anew at
    each step from pooled queries and keys.

    Args:
        keep: share of the blocks that are computed, over 0 and at most 1.
        dense_steps: so many first steps see everything; they lay out the picture.
        dense_layers: so many first layers see everything.
        block: tokens in a block; other than 128 runs the reference, which saves nothing.
        bits: 16, or 8 for the kernel of ``attention:fp8``, which rounds and pools in one pass.
    """

    keep: float = 0.5
    dense_steps: int = 0
    dense_layers: int = 0
    block: int = BLOCK
    bits: int = 16

    name = "sparse-attention"
    kind = "approximate"
    reason = "blocks of keys that pooled queries and keys give little weight are skipped"
    slot = Slot.BLOCKS
    switch = "nothing"
    claims = ("transformer.self-attention",)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError(f"sparse-attention: keep is {self.keep}; it is a share, over 0 and at most 1.")
        for option in ("dense_steps", "dense_layers"):
            if (count := getattr(self, option)) < 0:
                raise PlanError(f"sparse-attention: {option.replace('_', '-')} is {count}; it is 0 or more.")
        if self.block < 1:
            raise PlanError(f"sparse-attention: block is {self.block}; it is a number of tokens.")
        if self.bits not in (8, 16):
            raise PlanError(f"sparse-attention: bits is {self.bits}; it is 16 or 8.")
        if self.bits == 8 and self.block != BLOCK:
            raise PlanError(f"sparse-attention: block is {self.block}; with bits=8 it is {BLOCK}.")

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"steps-differ"} if self.dense_steps else ())

    def missing_on(self, device: Device) -> str:
        return kernel("fp8").missing_on(device.capability) if self.bits == 8 else ""

    def fit(self, model: KnownModel) -> list[str]:
        width, widths = model.transformer.attention_head_dim, kernel("fp8").widths
        if self.bits == 8 and width not in widths:
            told = f"bits=8 takes heads of {' or '.join(map(str, widths))}, those of '{model.name}' are {width}"
            raise PlanError(told)
        return []

    def cost(self, costs: Costs) -> Costs:
        """But for the dense first steps, of which there are few."""
        sparse = max(0, costs.sizes.num_layers - self.dense_layers) / costs.sizes.num_layers
        return replace(costs, attention_share=costs.attention_share * (1 - sparse * (1 - self.keep)))

    def install(self, parts: Parts) -> None:
        attend, for_bytes = self.attend(parts.device), self.attend_for_bytes(parts.device)
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.token_order = tile_order
            blocks = list(each_block(transformer))[self.dense_layers :]
            if not self.dense_steps:
                for block in blocks:
                    block.attn1.attend = for_bytes if hands_to_bytes(block) else attend
                continue
            ends = Ends(first=self.dense_steps)
            transformer.register_forward_pre_hook(ends)
            for block in blocks:
                sparse = for_bytes if hands_to_bytes(block) else attend
                block.attn1.attend = OtherAtEnds(sparse, block.attn1.attend, ends)

    def attend(self, device: torch.device) -> Attend:
        """Choose blocks, and attend to them: on a GPU as one operator, since the compiler cannot look inside."""
        if device.type != "cuda":
            return partial(attend_to_best, keep=self.keep, block=self.block)
        if self.bits == 8:
            rounded = _rounded_operator()
            return lambda q, k, v: rounded(q, k, v, self.keep)
        operator = _operator()
        return lambda q, k, v: operator(q, k, v, self.keep, self.block)

    def attend_for_bytes(self, device: torch.device) -> AttendForLinear:
        """The same for an 8-bit layer behind it."""
        if self.bits == 8:
            for_bytes = _operator_for_bytes()
            return lambda q, k, v: for_bytes(q, k, v, self.keep)
        return self.attend(device)


def attend_to_best(q: Tensor, k: Tensor, v: Tensor, keep: float, block: int) -> Tensor:
    """Attention over the blocks that :func:`select_blocks` finds, by the fastest kernel."""
    out = best_kernel(q.device, block)(q, k, v, select_blocks(q, k, keep, block), block)
    return out.contiguous()  # as the operator promises the compiler


@cache
def _operator() -> Callable[..., Tensor]:
    return opaque("sparse_attention", attend_to_best, ", float keep, int block")


@cache
def _rounded_operator() -> Callable[..., Tensor]:
    from swiftwan.ops.attention_fp8_gluon import attend_sparse

    return opaque("sparse_attention_fp8", attend_sparse, ", float keep")


@cache
def _operator_for_bytes() -> Callable[..., Rounded]:
    from swiftwan.ops.attention_fp8_gluon import attend_sparse_for_bytes

    return opaque_for_bytes("sparse_attention_for_bytes", attend_sparse_for_bytes, ", float keep")


@cache
def best_kernel(device: torch.device, block: int) -> SparseKernel:
    """FlashAttention-4 where it runs, FlexAttention on other GPUs, the reference (which saves nothing) elsewhere, and
    for blocks of another size."""
    if device.type != "cuda" or block != BLOCK:
        return sparse_reference
    if kernel("flash4").missing_on(torch.cuda.get_device_capability(device)):
        return sparse_flex()
    flash4.package()  # told where it keeps what it compiles
    return sparse_flash4
