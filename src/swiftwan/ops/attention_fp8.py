"""Self-attention with both products in 8-bit floats (E4M3), which Hopper's tensor cores multiply twice as fast.

What is rounded, and how (after FlashAttention-3, arXiv 2407.08608, and SageAttention, arXiv 2410.02367):

- Queries, each token of each head by its own largest number.
- Keys, each head by its largest number, after their mean over all tokens is taken off. A constant added to every key
  adds the same to all scores of a query, and softmax does not see it; but a number near a large mean is rounded by
  that mean's step.
- Softmax's numerators, at most 2**8: below 2**-6 E4M3 has less than its three bits of mantissa.
- Values, each channel of each head by its largest number.

Scores, softmax and sums are in float32. The tensor cores add up 8-bit products in float32 with some bits less.

Shapes: B batch, L tokens, H heads, E = 128 width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from swiftwan.ops.fp8 import LARGEST

WIDTH = 128
"""Of a head: the only one that the kernel takes, and the one of every published Wan."""

BLOCK = 128
"""Tokens that the kernel reads at once."""

NUMERATOR_BITS = 8.0
"""Softmax's numerators are at most 2 to this."""


class RoundedAttention(NamedTuple):
    """What the kernel reads.

    Attributes:
        q, k: float8_e4m3fn (B, L, H, E).
        factor: float32 (B, H, L): what a row of q @ k is multiplied by to be the exponent of two in softmax.
        v: float8_e4m3fn (B, H, E, L'), L' the next multiple of 128, zeros at the end; in each 16 tokens the order is
            that of :func:`kernel_order`.
        v_scale: float32 (B, H, E).
    """

    q: Tensor
    k: Tensor
    factor: Tensor
    v: Tensor
    v_scale: Tensor


def kernel_order(tokens: int, device: torch.device | None = None) -> Tensor:
    """The token at each place of v, for a multiple of 16 tokens.

    The first product leaves a thread's scores two neighbours at a time, and the second wants its left side four at a
    time. It adds up over tokens, so their order is free: with this one each thread has what it needs.
    """
    place = torch.arange(tokens, device=device)
    return place // 16 * 16 + (place >> 1 & 1) * 8 + (place >> 2 & 3) * 2 + (place & 1)


def round_attention(q: Tensor, k: Tensor, v: Tensor) -> RoundedAttention:
    """The plain way, for q, k and v (B, L, H, E)."""
    length, width = q.shape[1], q.shape[-1]
    q, k, v = q.float(), k.float(), v.float()
    mean = k.mean(1, keepdim=True)
    q_scale = _scale(q.abs().amax(-1))
    # Not the largest of what is left, but a bound of it, so that one pass over the keys tells both.
    k_scale = _scale((k.abs().amax(1) + mean.abs()[:, 0]).amax(-1))
    v_scale = _scale(v.abs().amax(1))
    factor = q_scale.transpose(1, 2) * k_scale[..., None] * (width**-0.5 * math.log2(math.e))
    rounded_v = torch.nn.functional.pad(_round(v / v_scale[:, None]), (0, 0, 0, 0, 0, -length % BLOCK))
    order = kernel_order(rounded_v.shape[1], v.device)
    return RoundedAttention(
        _round(q / q_scale[..., None]),
        _round((k - mean) / k_scale[:, None, :, None]),
        factor.contiguous(),
        rounded_v.view(torch.uint8)[:, order].permute(0, 2, 3, 1).contiguous().view(torch.float8_e4m3fn),
        v_scale,
    )


def _scale(largest: Tensor) -> Tensor:
    return largest.clamp_min(1e-12) / LARGEST


def _round(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def plain_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: the same roundings in float32 arithmetic, on any device and for any width; it forms the matrix."""
    rounded = round_attention(q, k, v)
    length = q.shape[1]
    scores = torch.einsum("blhe,bmhe->bhlm", rounded.q.float(), rounded.k.float()) * rounded.factor[..., None]
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True) + NUMERATOR_BITS)
    order = kernel_order(rounded.v.shape[-1], v.device)
    values = torch.empty_like(rounded.v, dtype=torch.float32).index_copy_(-1, order, rounded.v.float())
    out = torch.einsum("bhlm,bhem->blhe", _round(weights).float(), values[..., :length])
    return (out / weights.sum(-1).transpose(1, 2)[..., None] * rounded.v_scale[:, None]).type_as(q)
