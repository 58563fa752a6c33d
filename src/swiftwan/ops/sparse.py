"""Block-sparse self-attention without training: each block of queries sees the blocks of keys that matter most to it.

Which ones is read off pooled queries and keys: the mean of a block's queries against the mean of a block's
keys, the best ``keep`` of them, and the block itself. (SpargeAttention, arXiv 2502.18137, and Sparse VideoGen 2,
arXiv 2505.18875, choose along these lines, with more care and other kernels.) Means tell something only where a
block's tokens are alike, so tokens are put in an order in which 128 of them are neighbours in space and time.

Shapes: B batch, L tokens, H heads, E width of a head, N blocks of ``block`` tokens (the last may be short), M of them
kept for each block of queries.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Tokens in a block: the tile of FlashAttention-4 on Hopper."""

TILE = (2, 8, 8)
"""Frames, rows and columns of patches that make a block."""

SparseKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, blocks, block) to (B, L, H, E); q, k, v (B, L, H, E), blocks int32 (B, H, N, M), ascending."""


def tile_order(frames: int, height: int, width: int, *, device: torch.device) -> Tensor:
    """Which token of the grid (frames, height, width) stands at each place; int64 (L,).

    The first frame stays first, in tiles of its own: image-to-video holds it at another timestep.
    """
    t, h, w = TILE
    frame = torch.arange(frames, device=device).view(-1, 1, 1)
    row = torch.arange(height, device=device).view(1, -1, 1)
    column = torch.arange(width, device=device).view(1, 1, -1)
    tile = ((frame + t - 1) // t * -(-height // h) + row // h) * -(-width // w) + column // w
    within = ((frame + t - 1) % t * h + row % h) * w + column % w
    return (tile * (t * h * w) + within).flatten().argsort()


def block_means(x: Tensor, block: int) -> Tensor:
    """(B, L, H, E) to the mean of each block, float32 (B, H, N, E)."""
    whole = x.shape[1] // block * block
    means = x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=torch.float32)
    if whole < x.shape[1]:
        means = torch.cat((means, x[:, whole:].mean(1, keepdim=True, dtype=torch.float32)), dim=1)
    return means.transpose(1, 2)


def keep_best(scores: Tensor, kept: int) -> Tensor:
    """The columns of the ``kept`` largest scores of each row, the diagonal always among them: int32 (B, H, N, kept),
    ascending, from (B, H, N, N)."""
    scores = scores.clone()
    scores.diagonal(dim1=-2, dim2=-1).fill_(math.inf)
    return scores.topk(kept, dim=-1, sorted=False).indices.sort(dim=-1).values.int()


def choose_blocks(q_means: Tensor, k_means: Tensor, keep: float) -> Tensor:
    """The blocks of keys that each block of queries will see, of means (B, H, N, E): int32 (B, H, N, M), ascending,
    M = ceil(keep N)."""
    scores = q_means @ k_means.transpose(-1, -2)
    kept = math.ceil(keep * scores.shape[-1])
    if scores.is_cuda and importlib.util.find_spec("triton") is not None:
        from swiftwan.ops.sparse_triton import keep_best as in_one_pass

        return in_one_pass(scores, kept)
    return keep_best(scores, kept)


def select_blocks(q: Tensor, k: Tensor, keep: float, block: int = BLOCK) -> Tensor:
    """:func:`choose_blocks` for q and k (B, L, H, E)."""
    return choose_blocks(block_means(q, block), block_means(k, block), keep)


def sparse_reference(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int) -> Tensor:
    """The plain way: dense attention under a mask; runs everywhere, saves nothing."""
    count = -(-q.shape[1] // block)
    seen = torch.zeros(*blocks.shape[:3], count, dtype=torch.bool, device=q.device).scatter_(-1, blocks.long(), True)
    mask = seen.repeat_interleave(block, -2).repeat_interleave(block, -1)[..., : q.shape[1], : k.shape[1]]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return out.transpose(1, 2)


def sparse_flash4(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int) -> Tensor:
    """FlashAttention-4's block-sparse forward. It masks the end of the sequence in the last block of a list,
    which is where a short block stands."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    count = torch.full(blocks.shape[:3], blocks.shape[3], dtype=torch.int32, device=q.device)
    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=blocks[..., :1],
        full_block_cnt=count,
        full_block_idx=blocks,
        block_size=(block, block),
    )
    out: Tensor = _flash_attn_fwd(q, k, v, block_sparse_tensors=tensors)[0]
    return out


def sparse_flex() -> SparseKernel:
    """torch's FlexAttention, compiled: for CUDA devices without FlashAttention-4."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def kernel(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, block: int) -> Tensor:
        count = torch.full(blocks.shape[:3], blocks.shape[3], dtype=torch.int32, device=q.device)
        index = F.pad(blocks, (0, -(-k.shape[1] // block) - blocks.shape[3]))
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(count),
            torch.zeros_like(index),
            count,
            index,
            BLOCK_SIZE=block,
            seq_lengths=(q.shape[1], k.shape[1]),
            compute_q_blocks=False,
        )
        out: Tensor = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
        return out.transpose(1, 2)

    return kernel
