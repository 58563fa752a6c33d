"""Self-attention with both products in 8 bits, which Hopper's tensor cores multiply twice as fast as 16.

What is rounded, and how (after SageAttention, arXiv 2410.02367 and 2411.10958, and FlashAttention-3, 2407.08608):

- Queries and keys to integers: queries by the largest number of each token of each head, keys by the largest of each
  head, after their mean over all tokens is taken off. A constant added to every key adds the same to all scores of a
  query, and softmax does not see it. As 8-bit floats they erred five times as much (11 instead of 2 % of the pocket
  model's final latents): normed queries and keys have no outliers for which a float's range would pay.
- Softmax's numerators to E4M3 floats, at most 2**8: below 2**-6 E4M3 has less than its three bits of mantissa.
- Of every second key, the exponential itself: a line between powers of two (:func:`exp2_by_lines`), 4 % below to 2 %
  above, since the units for exponentials take as long as the tensor cores: 942 -> 1027 TFLOP/s on an H200 when half
  of them are spared, and 4.86 instead of 4.72 % from float32 on white noise. Its slope is rounded (:func:`slope_of`),
  which makes it an integer product: 6702 -> 6348 us for 32,760 tokens, the same error.
- Values to E4M3, by the largest of each channel of each head, after their mean is taken off too: weights sum to 1, so
  it is added to the result (9.4 % before, 2.8 % after, of the same latents).

Scores are exact sums, softmax and its sums are float32. The tensor cores add E4M3 products with some bits less.

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
        q, k: int8 (B, L, H, E).
        factor: float32 (B, H, L): what a row of q @ k is multiplied by to be the exponent of two in softmax.
        v: float8_e4m3fn (B, H, E, L'), L' the next multiple of 128, zeros at the end; tokens in the order of
            :func:`kernel_order`, channels in that of :func:`channel_order`.
        v_scale, v_mean: float32 (B, H, E), in the usual order.
        bound: float32 (B,): what no number of the result exceeds, a weighted mean of values.
    """

    q: Tensor
    k: Tensor
    factor: Tensor
    v: Tensor
    v_scale: Tensor
    v_mean: Tensor
    bound: Tensor


def kernel_order(tokens: int, device: torch.device | None = None) -> Tensor:
    """The token at each place of v, for a multiple of 16 tokens.

    The first product leaves a thread's scores two neighbours at a time, and the second wants its left side four at a
    time. It adds up over tokens, so their order is free: with this one each thread has what it needs.
    """
    place = torch.arange(tokens, device=device)
    return place // 16 * 16 + (place >> 1 & 1) * 8 + (place >> 2 & 3) * 2 + (place & 1)


def channel_order(width: int, device: torch.device | None = None) -> Tensor:
    """The channel at each row of v. A thread of the tensor cores gets two neighbours of every eight rows: with this
    order 16 channels in a row, which it writes at once. Heads of another width than the kernel's keep theirs."""
    row = torch.arange(width, device=device)
    return row if width != WIDTH else row // 64 * 64 + row // 2 % 4 * 16 + row // 8 % 8 * 2 + row % 2


def round_attention(q: Tensor, k: Tensor, v: Tensor) -> RoundedAttention:
    """The plain way, for q, k and v (B, L, H, E)."""
    length, width = q.shape[1], q.shape[-1]
    q, k, v = q.float(), k.float(), v.float()
    k_mean, v_mean = k.mean(1), v.mean(1)
    k, v = k - k_mean[:, None], v - v_mean[:, None]
    q_scale, k_scale = _scale(q.abs().amax(-1), 127), _scale(k.abs().amax((1, 3)), 127)
    v_scale = _scale(v.abs().amax(1), LARGEST)
    factor = q_scale.transpose(1, 2) * k_scale[..., None] * (width**-0.5 * math.log2(math.e))
    values = (v / v_scale[:, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, -length % BLOCK))
    values = values[:, kernel_order(values.shape[1], v.device)][..., channel_order(width, v.device)]
    values = values.permute(0, 2, 3, 1).contiguous()
    return RoundedAttention(
        (q / q_scale[..., None]).round().to(torch.int8),
        (k / k_scale[:, None, :, None]).round().to(torch.int8),
        factor.contiguous(),
        values.view(torch.float8_e4m3fn),
        v_scale,
        v_mean,
        (LARGEST * v_scale + v_mean.abs()).amax((1, 2)),
    )


def _scale(largest: Tensor, most: float) -> Tensor:
    return largest.clamp_min(1e-12) / most


LINE_SHIFT = 0.05756
"""What makes the mean of the lines' relative errors zero: log2(1.0407)."""


def exp2_by_lines(x: Tensor) -> Tensor:
    """2 ** x in the way of Schraudolph (Neural Computation 11, 1999): the fraction of x is taken for the mantissa."""
    x = x - LINE_SHIFT
    return torch.ldexp(1 + x - x.floor(), x.floor().int().clamp_min(-126))


def slope_of(factor: Tensor) -> Tensor:
    """A row's factor as lines have it: in steps of 2**-23 and at least one, so that the bits of a line's result are an
    integer times the score. From the largest score down a line so leaves its exponent by no more than 2**-24 a score.
    """
    return torch.floor(factor * 2**23 + 0.5).clamp_min(1) / 2**23


def plain_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: the same roundings in float32 arithmetic, on any device and for any width; it forms the matrix."""
    rounded = round_attention(q, k, v)
    length = q.shape[1]
    scores = torch.einsum("blhe,bmhe->bhlm", rounded.q.float(), rounded.k.float())
    below, factor = scores - scores.amax(-1, keepdim=True), rounded.factor[..., None]
    weights = torch.exp2(below * factor + NUMERATOR_BITS)
    weights[..., 1::2] = exp2_by_lines(below[..., 1::2] * slope_of(factor) + NUMERATOR_BITS)
    order = kernel_order(rounded.v.shape[-1], v.device)
    values = torch.empty_like(rounded.v, dtype=torch.float32).index_copy_(-1, order, rounded.v.float())
    values = torch.empty_like(values).index_copy_(2, channel_order(v.shape[-1], v.device), values)
    out = torch.einsum("bhlm,bhem->blhe", weights.to(torch.float8_e4m3fn).float(), values[..., :length])
    out = out / weights.sum(-1).transpose(1, 2)[..., None]
    return (out * rounded.v_scale[:, None] + rounded.v_mean[:, None]).type_as(q)
