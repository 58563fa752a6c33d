"""What each block keeps from the forward pass for the backward pass, chosen to fit the device.

``all`` keeps everything; ``nothing`` keeps the block's input and computes the block again (arXiv 1604.06174);
``attention`` also keeps the output and log-sum-exp of self-attention, and so spares the dearest part of computing it
again: at 832x480x81 it is 70 % of a 1.3B forward's work, and 3 GB. ``products`` keeps the results of the frozen matrix
products as well, so that only what is cheap is computed again, in half of the memory of ``all``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from swiftwan.models.config import TransformerConfig
from swiftwan.models.dit import Block, WanTransformer
from swiftwan.ops.attention_fp8_training import attention_fp8_forward
from swiftwan.ops.flash4_training import flash4_forward

Keep = Literal["all", "products", "attention", "nothing"]
KEEPS: tuple[Keep, ...] = ("all", "products", "attention", "nothing")
"""The dearest first."""

# It warns of in-place operations in what is computed again; a block has none.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

_aten = torch.ops.aten
ATTENTION_OPS = (
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    flash4_forward._opoverload,
    attention_fp8_forward._opoverload,
)
"""Attention as the checkpointing sees it: each returns the output and the log-sum-exp."""
PRODUCTS = (_aten.addmm.default, _aten._scaled_mm.default)
"""Products with frozen weights: these have a bias, or are in 8 bits; an adapter's thin ones are neither."""


def bytes_kept(config: TransformerConfig, tokens: int, keep: Keep, itemsize: int) -> int:
    """What one block keeps of ``tokens`` tokens, rank-sized things left out.

    ``all`` is: its input, q, k and v before and after their norm, both attentions' in- and outputs, three normed
    streams, and the feed-forward's hidden layer before and behind its activation.
    """
    width = tokens * config.dim * itemsize
    if keep == "nothing":
        return width
    attention = 2 * width + 4 * tokens * config.num_attention_heads
    if keep == "attention":
        return attention
    if keep == "products":
        return attention + 6 * width + tokens * config.ffn_dim * itemsize
    return 16 * width + 2 * tokens * config.ffn_dim * itemsize


def choose(config: TransformerConfig, tokens: int, budget: int, itemsize: int) -> list[Keep]:
    """The dearest choice that fits: all blocks at one level of ``KEEPS``, and as many as can at the next above it.

    Args:
        tokens: of the largest batch.
        budget: bytes for all blocks together; one block's whole memory is set aside for computing it again.
    """
    cost = {keep: bytes_kept(config, tokens, keep, itemsize) for keep in KEEPS}
    count = config.num_layers
    budget -= cost["all"]
    for high, low in reversed(list(pairwise(KEEPS))):
        more = max(0, (budget - count * cost[low]) // (cost[high] - cost[low]))
        if more < count:
            return [high] * more + [low] * (count - more)
    return ["all"] * count


def keep_in_blocks(transformer: WanTransformer, choice: Sequence[Keep]) -> None:
    """Wrap the blocks that do not keep all; parameters' names stay."""
    for number, (block, keep) in enumerate(zip(list(transformer.blocks), choice, strict=True)):
        if keep != "all":
            transformer.blocks[number] = _wrapped(cast(Block, block), keep)


def _wrapped(block: Block, keep: Keep) -> torch.nn.Module:
    options: dict[str, Any] = {"preserve_rng_state": False}  # a block draws no random numbers
    if keep != "nothing":
        kept = (*ATTENTION_OPS, *PRODUCTS) if keep == "products" else ATTENTION_OPS
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_policy, kept))
    wrapped: torch.nn.Module = checkpoint_wrapper(block, **options)
    return wrapped


def _policy(kept: tuple[Any, ...], context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    # Cross-attention's few keys cost nothing to attend to again.
    cheap = op in ATTENTION_OPS and args[0].shape != args[1].shape
    return CheckpointPolicy.MUST_SAVE if op in kept and not cheap else CheckpointPolicy.PREFER_RECOMPUTE
