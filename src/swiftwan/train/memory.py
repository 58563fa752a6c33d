"""What each block keeps from the forward pass for the backward pass, chosen to fit the device.

``all`` keeps everything; ``nothing`` keeps the block's input and computes the block again (arXiv 1604.06174);
``attention`` also keeps the output and log-sum-exp of self-attention, and so spares the dearest part of computing it
again: at 832x480x81 it is 70 % of a 1.3B forward's work, and 3 GB.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import Block, WanTransformer
from swiftwan.ops.flash4_training import flash4_forward

Keep = Literal["all", "attention", "nothing"]
KEEPS: tuple[Keep, ...] = ("all", "attention", "nothing")

# It warns of in-place operations in what is computed again; a block has none.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

_aten = torch.ops.aten
ATTENTION_OPS = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    flash4_forward._opoverload,
)
"""Attention as the checkpointing sees it: each returns the output and the log-sum-exp."""


def bytes_kept(config: TransformerConfig, tokens: int, keep: Keep, itemsize: int) -> int:
    """What one block keeps of ``tokens`` tokens, rank-sized things left out.

    ``all`` is: its input, q, k and v before and after their norm, both attentions' in- and outputs, three normed
    streams, and the feed-forward's hidden layer before and behind its activation.
    """
    width = tokens * config.dim * itemsize
    if keep == "nothing":
        return width
    if keep == "attention":
        return 2 * width + 4 * tokens * config.num_attention_heads
    return 16 * width + 2 * tokens * config.ffn_dim * itemsize


def choose(config: TransformerConfig, tokens: int, budget: int, itemsize: int) -> list[Keep]:
    """The dearest choice that fits, block by block: as many as can keep all, and the others their attention; where
    that is too much, as many as can their attention, and the others nothing.

    Args:
        tokens: of the largest batch.
        budget: bytes for all blocks together; one block's whole memory is set aside for computing it again.
    """
    cost = {keep: bytes_kept(config, tokens, keep, itemsize) for keep in KEEPS}
    count = config.num_layers
    budget -= cost["all"]
    low: Keep = "attention" if count * cost["attention"] <= budget else "nothing"
    high: Keep = "all" if low == "attention" else "attention"
    more = max(0, min(count, (budget - count * cost[low]) // (cost[high] - cost[low])))
    return [high] * more + [low] * (count - more)


def keep_in_blocks(transformer: WanTransformer, choice: Sequence[Keep]) -> None:
    """Wrap the blocks that do not keep all; parameters' names stay."""
    for number, (block, keep) in enumerate(zip(list(transformer.blocks), choice, strict=True)):
        if keep != "all":
            transformer.blocks[number] = _wrapped(cast(Block, block), keep)


def _wrapped(block: Block, keep: Keep) -> torch.nn.Module:
    options: dict[str, Any] = {"preserve_rng_state": False}  # a block draws no random numbers
    if keep == "attention":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    wrapped: torch.nn.Module = checkpoint_wrapper(block, **options)
    return wrapped


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Cross-attention's few keys cost nothing to attend to again.
    if op in ATTENTION_OPS and args[0].shape == args[1].shape:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
