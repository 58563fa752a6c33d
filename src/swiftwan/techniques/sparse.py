"""Self-attention that skips what matters least."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from swiftwan.errors import PlanError
from swiftwan.models.dit import each_block
from swiftwan.ops.attention import Attend
from swiftwan.ops.sparse import (
    BLOCK,
    SparseKernel,
    select_blocks,
    sparse_flash4,
    sparse_flex,
    sparse_reference,
    tile_order,
)
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.models.dit import Condition, WanTransformer
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class SparseAttention(Technique):
    """``sparse-attention:keep=0.25``: each 128 tokens attend to the share ``keep`` of all blocks of 128, chosen anew at
    each step from pooled queries and keys.

    Args:
        keep: share of the blocks that are computed, over 0 and at most 1.
        dense_steps: so many first steps see everything; they lay out the picture.
        dense_layers: so many first layers see everything.
        block: tokens in a block; other than 128 only where there is no fast kernel anyway.
    """

    keep: float = 0.25
    dense_steps: int = 0
    dense_layers: int = 0
    block: int = BLOCK

    name = "sparse-attention"
    kind = "approximate"
    reason = "blocks of keys that pooled queries and keys give little weight are skipped"
    slot = Slot.BLOCKS
    switch = "nothing"
    claims = ("transformer.self-attention",)
    makes = frozenset({"steps-differ"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise PlanError(f"sparse-attention: keep is {self.keep}; it is a share, over 0 and at most 1.")
        for option in ("dense_steps", "dense_layers"):
            if (count := getattr(self, option)) < 0:
                raise PlanError(f"sparse-attention: {option.replace('_', '-')} is {count}; it is 0 or more.")
        if self.block < 1:
            raise PlanError(f"sparse-attention: block is {self.block}; it is a number of tokens.")

    def cost(self, costs: Costs) -> Costs:
        """But for the dense first steps, of which there are few."""
        sparse = max(0, costs.sizes.num_layers - self.dense_layers) / costs.sizes.num_layers
        return replace(costs, attention_share=costs.attention_share * (1 - sparse * (1 - self.keep)))

    def install(self, parts: Parts) -> None:
        kernel = best_kernel(parts.device)
        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            steps = DenseSteps(self.dense_steps)
            transformer.token_order = tile_order
            transformer.register_forward_pre_hook(steps)
            for block in list(each_block(transformer))[self.dense_layers :]:
                block.attn1.attend = Sparse(kernel, block.attn1.attend, steps, self.keep, self.block)


def best_kernel(device: torch.device) -> SparseKernel:
    """FlashAttention-4 where it runs, FlexAttention on other GPUs, the reference (which saves nothing) elsewhere."""
    if device.type != "cuda":
        return sparse_reference
    if torch.cuda.get_device_capability(device) >= (9, 0) and importlib.util.find_spec("flash_attn.cute"):
        return sparse_flash4
    return sparse_flex()


class DenseSteps:
    """Counts the calls of a transformer, each guidance branch by itself, and says whether this one is dense."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.calls: WeakKeyDictionary[Condition, int] = WeakKeyDictionary()
        self.now = False

    def __call__(self, transformer: WanTransformer, inputs: tuple[Any, ...]) -> None:
        condition = inputs[2]
        done = self.calls.get(condition, 0)
        self.calls[condition] = done + 1
        self.now = done < self.count


class Sparse:
    """An attention kernel that is block-sparse but for the dense steps."""

    def __init__(self, kernel: SparseKernel, dense: Attend, steps: DenseSteps, keep: float, block: int) -> None:
        self.kernel, self.dense, self.steps = kernel, dense, steps
        self.keep, self.block = keep, block

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.steps.now:
            return self.dense(q, k, v)
        return self.kernel(q, k, v, select_blocks(q, k, self.keep, self.block), self.block)
