# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that make :class:`swiftwan.ops.attention_fp8.RoundedAttention`: two passes over k and v, one over q.

The first pass takes sums and largest numbers over all tokens, the second rounds. Sums are of fixed parts in a fixed
order, without atomics, so that the same input gives the same bits.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.attention_fp8 import BLOCK, WIDTH, RoundedAttention

PART = 1024
"""Tokens that one program of the first pass reads: 768 programs for 32,760 tokens of 12 heads, of k and of v."""


@triton.jit
def _statistics_kernel(
    k, v, parts, bound, length, k_batch, k_row, v_batch, v_row,
    PART: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum, least and largest of each channel of k, or of v, over one part of the tokens."""
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 2
    line = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + part
    parts += line * 6 * WIDTH
    if tl.program_id(2) % 2 == 0:
        k += batch.to(tl.int64) * k_batch + head * WIDTH
        _statistics(k, parts, part * PART, length, k_row, PART, ROWS, WIDTH)
    else:
        if part + head == 0:
            tl.store(bound + batch, 0.0)  # for _finish_kernel
        v += batch.to(tl.int64) * v_batch + head * WIDTH
        _statistics(v, parts + 3 * WIDTH, part * PART, length, v_row, PART, ROWS, WIDTH)


@triton.jit
def _statistics(x, parts, start, length, stride, PART: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Each thread keeps its own, and they meet at the end. Behind the last token it comes again, and adds nothing."""
    channel = tl.arange(0, WIDTH)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    least = tl.full((ROWS, WIDTH), float("inf"), tl.float32)
    largest = tl.full((ROWS, WIDTH), float("-inf"), tl.float32)
    for first in range(0, PART, ROWS):
        token = start + first + tl.arange(0, ROWS)
        place = tl.minimum(token, length - 1).to(tl.int64)[:, None] * stride + channel[None, :]
        value = tl.load(x + place).to(tl.float32)
        total += tl.where((token < length)[:, None], value, 0.0)
        least = tl.minimum(least, value)
        largest = tl.maximum(largest, value)
    tl.store(parts + channel, tl.sum(total, 0))
    tl.store(parts + WIDTH + channel, tl.min(least, 0))
    tl.store(parts + 2 * WIDTH + channel, tl.max(largest, 0))


@triton.jit
def _finish_kernel(
    parts, k_mean, v_mean, k_scale, v_scale, bound, count, length, heads, PARTS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    parts += line * count * 6 * WIDTH
    if tl.program_id(1) == 0:
        mean, furthest = _finish(parts, count, length, PARTS, WIDTH)
        tl.store(k_mean + line * WIDTH + channel, mean)
        tl.store(k_scale + line, tl.maximum(tl.max(furthest, 0), 1e-12) / 127.0)
    else:
        mean, furthest = _finish(parts + 3 * WIDTH, count, length, PARTS, WIDTH)
        tl.store(v_mean + line * WIDTH + channel, mean)
        furthest = tl.maximum(furthest, 1e-12)
        tl.store(v_scale + line * WIDTH + channel, furthest / 448.0)
        tl.atomic_max(bound + line // heads, tl.max(furthest + tl.abs(mean), 0))


@triton.jit
def _finish(parts, count, length, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Each channel's mean, and how far from it its numbers lie at most."""
    part = tl.arange(0, PARTS)[:, None]
    place = parts + part * 6 * WIDTH + tl.arange(0, WIDTH)[None, :]
    mean = tl.sum(tl.load(place, part < count, other=0.0), 0) / length
    least = tl.min(tl.load(place + WIDTH, part < count, other=float("inf")), 0)
    largest = tl.max(tl.load(place + 2 * WIDTH, part < count, other=float("-inf")), 0)
    return mean, tl.maximum(largest - mean, mean - least)


@triton.jit
def _to_int8(x):
    """The nearest integer: adding 1.5 * 2**23 leaves it in the last bits of a float32."""
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)


@triton.jit
def _round_kernel(
    q, k, v, k_mean, v_mean, k_scale, v_scale, q_out, k_out, v_out, factor, q_pooled, k_pooled,
    length, q_batch, q_row, k_batch, k_row, v_batch, v_row, out_row, v_out_row, softmax_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """One block of a head's queries, keys or values: of all three in one program, registers would run out."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 3
    what = tl.program_id(2) % 3
    line = batch * tl.num_programs(1) + head
    token = block * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    column = head * WIDTH + channel[None, :]
    out = (batch.to(tl.int64) * length + token.to(tl.int64)[:, None]) * out_row + column
    pooled = (line * tl.num_programs(0) + block) * WIDTH + channel
    vector = line * WIDTH + channel
    if what == 0:
        start = q + batch.to(tl.int64) * q_batch
        factors = factor + line.to(tl.int64) * length
        per_scale = tl.load(k_scale + line) * softmax_scale
        _round_queries(start, q_out + out, factors, q_pooled + pooled, token, column, length, q_row, per_scale, MEANS)
    elif what == 1:
        start = k + batch.to(tl.int64) * k_batch
        head_scale = tl.load(k_scale + line)
        mean = tl.load(k_mean + vector)
        _round_keys(start, k_out + out, k_pooled + pooled, token, column, length, k_row, mean, head_scale, MEANS)
    else:
        start = v + batch.to(tl.int64) * v_batch
        # See channel_order.
        place = channel // 64 * 64 + channel // 2 % 8 * 8 + channel // 16 % 4 * 2 + channel % 2
        target = v_out + (line * WIDTH + place).to(tl.int64)[:, None] * v_out_row + token[None, :]
        mean = tl.load(v_mean + vector)
        scale = tl.load(v_scale + vector)
        _round_values(start, target, block * BLOCK, column, length, v_row, mean, scale, BLOCK)


@triton.jit
def _load(source, token, column, length, row):
    place = token.to(tl.int64)[:, None] * row + column
    return tl.load(source + place, (token < length)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _pool(value, pooled, token, length):
    """The mean of a block's tokens; those behind the last are zeros."""
    tl.store(pooled, tl.sum(value, 0) / tl.sum((token < length).to(tl.int32), 0))


@triton.jit
def _round_queries(q, out, factor, pooled, token, column, length, row, per_scale, MEANS: tl.constexpr):
    query = _load(q, token, column, length, row)
    scale = tl.maximum(tl.max(tl.abs(query), 1), 1e-12) / 127.0
    tl.store(out, _to_int8(query * (1.0 / scale)[:, None]), (token < length)[:, None])
    tl.store(factor + token, scale * per_scale, token < length)
    if MEANS:
        _pool(query, pooled, token, length)


@triton.jit
def _round_keys(k, out, pooled, token, column, length, row, mean, scale, MEANS: tl.constexpr):
    key = _load(k, token, column, length, row)
    tl.store(out, _to_int8((key - mean[None, :]) * (1.0 / scale)), (token < length)[:, None])
    if MEANS:
        _pool(key, pooled, token, length)


@triton.jit
def _round_values(v, out, start, column, length, row, mean, scale, BLOCK: tl.constexpr):
    # See kernel_order: which token stands at each place.
    place = tl.arange(0, BLOCK)
    token = start + (place // 16) * 16 + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2 + (place & 1)
    value = (_load(v, token, column, length, row) - mean[None, :]) * (1.0 / scale)[None, :]
    value = tl.where((token < length)[:, None], value, 0.0)
    tl.store(out, tl.trans(value.to(tl.float8e4nv)))


def round_attention(q: Tensor, k: Tensor, v: Tensor) -> RoundedAttention:
    """:func:`swiftwan.ops.attention_fp8.round_attention` for heads of 128, whose channels lie together."""
    return _round_attention(q, k, v, means=False)[0]


def round_and_pool(q: Tensor, k: Tensor, v: Tensor) -> tuple[RoundedAttention, Tensor, Tensor]:
    """Also the means of each block of 128 queries and keys, float32 (B, H, N, E)."""
    return _round_attention(q, k, v, means=True)


def _round_attention(q: Tensor, k: Tensor, v: Tensor, means: bool) -> tuple[RoundedAttention, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    assert width == WIDTH
    assert all(x.stride(3) == 1 and x.stride(2) == WIDTH for x in (q, k, v))
    blocks, parts = triton.cdiv(length, BLOCK), triton.cdiv(length, PART)
    empty = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    sums = empty(batch, heads, parts, 6, WIDTH)
    k_mean, v_mean, v_scale = (empty(batch, heads, WIDTH) for _ in range(3))
    k_scale = empty(batch, heads)
    rounded = RoundedAttention(
        empty(batch, length, heads, WIDTH, dtype=torch.int8),
        empty(batch, length, heads, WIDTH, dtype=torch.int8),
        empty(batch, heads, length),
        empty(batch, heads, WIDTH, blocks * BLOCK, dtype=torch.float8_e4m3fn),
        v_scale,
        v_mean,
        empty(batch),
    )
    pooled = [empty(batch, heads, blocks if means else 0, WIDTH) for _ in range(2)]
    _statistics_kernel[(parts, heads, 2 * batch)](
        k, v, sums, rounded.bound, length, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        PART=PART, ROWS=16, WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    _finish_kernel[(batch * heads, 2)](
        sums, k_mean, v_mean, k_scale, v_scale, rounded.bound, parts, length, heads,
        PARTS=triton.next_power_of_2(parts), WIDTH=WIDTH, num_warps=8,
    )  # fmt: skip
    _round_kernel[(blocks, heads, 3 * batch)](
        q, k, v, k_mean, v_mean, k_scale, v_scale, rounded.q, rounded.k, rounded.v, rounded.factor, *pooled,
        length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        heads * WIDTH, blocks * BLOCK, WIDTH**-0.5 * math.log2(math.e),
        BLOCK=BLOCK, WIDTH=WIDTH, MEANS=means, num_warps=4,
    )  # fmt: skip
    return rounded, pooled[0], pooled[1]
