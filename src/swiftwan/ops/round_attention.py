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
"""Tokens that one program of the first pass reads: 384 programs for 32,760 tokens of 12 heads."""


@triton.jit
def _statistics_kernel(
    k, v, parts, length, k_batch, k_row, v_batch, v_row,
    PART: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    part, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = tl.arange(0, WIDTH)
    k += batch.to(tl.int64) * k_batch + head * WIDTH + channel
    v += batch.to(tl.int64) * v_batch + head * WIDTH + channel
    total = tl.zeros((WIDTH,), tl.float32)
    largest_k = tl.zeros((WIDTH,), tl.float32)
    largest_v = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, PART, ROWS):
        token = part * PART + first + tl.arange(0, ROWS)
        inside = (token < length)[:, None]
        token = token.to(tl.int64)[:, None]
        key = tl.load(k + token * k_row, inside, other=0.0).to(tl.float32)
        value = tl.load(v + token * v_row, inside, other=0.0).to(tl.float32)
        total += tl.sum(key, 0)
        largest_k = tl.maximum(largest_k, tl.max(tl.abs(key), 0))
        largest_v = tl.maximum(largest_v, tl.max(tl.abs(value), 0))
    line = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + part
    place = parts + line * 3 * WIDTH + channel
    tl.store(place, total)
    tl.store(place + WIDTH, largest_k)
    tl.store(place + 2 * WIDTH, largest_v)


@triton.jit
def _finish_kernel(parts, mean, k_scale, v_scale, length, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    line = tl.program_id(0)
    channel = tl.arange(0, WIDTH)
    parts += line * PARTS * 3 * WIDTH + channel
    total = tl.zeros((WIDTH,), tl.float32)
    largest_k = tl.zeros((WIDTH,), tl.float32)
    largest_v = tl.zeros((WIDTH,), tl.float32)
    for part in range(PARTS):
        place = parts + part * 3 * WIDTH
        total += tl.load(place)
        largest_k = tl.maximum(largest_k, tl.load(place + WIDTH))
        largest_v = tl.maximum(largest_v, tl.load(place + 2 * WIDTH))
    total /= length
    tl.store(mean + line * WIDTH + channel, total)
    tl.store(k_scale + line, tl.maximum(tl.max(largest_k + tl.abs(total), 0), 1e-12) / 448.0)
    tl.store(v_scale + line * WIDTH + channel, tl.maximum(largest_v, 1e-12) / 448.0)


@triton.jit
def _round_kernel(
    q, k, v, mean, k_scale, v_scale, q_out, k_out, v_out, factor, q_mean, k_mean,
    length, q_batch, q_row, k_batch, k_row, v_batch, v_row, out_row, v_out_row, softmax_scale,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    line = batch * heads + head
    place = tl.arange(0, BLOCK)
    channel = tl.arange(0, WIDTH)
    token = block * BLOCK + place
    inside = (token < length)[:, None]
    row = token.to(tl.int64)[:, None]
    column = head * WIDTH + channel[None, :]
    out = (batch.to(tl.int64) * length + row) * out_row + column

    key_scale = tl.load(k_scale + line)
    query = tl.load(q + batch.to(tl.int64) * q_batch + row * q_row + column, inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(query), 1), 1e-12) / 448.0
    tl.store(q_out + out, (query / scale[:, None]).to(tl.float8e4nv), inside)
    tl.store(factor + line.to(tl.int64) * length + token, scale * key_scale * softmax_scale, token < length)

    key = tl.load(k + batch.to(tl.int64) * k_batch + row * k_row + column, inside, other=0.0).to(tl.float32)
    centred = key - tl.load(mean + line * WIDTH + channel)[None, :]
    tl.store(k_out + out, (centred / key_scale).to(tl.float8e4nv), inside)
    if MEANS:
        count = tl.minimum(length - block * BLOCK, BLOCK)
        mean_place = (line * tl.num_programs(0) + block) * WIDTH + channel
        tl.store(q_mean + mean_place, tl.sum(query, 0) / count)
        tl.store(k_mean + mean_place, tl.sum(key, 0) / count)

    # See kernel_order: which token stands at each place.
    moved = (place // 16) * 16 + ((place >> 1) & 1) * 8 + ((place >> 2) & 3) * 2 + (place & 1)
    source = block * BLOCK + moved
    value = tl.load(
        v + batch.to(tl.int64) * v_batch + source.to(tl.int64)[:, None] * v_row + column,
        (source < length)[:, None],
        other=0.0,
    ).to(tl.float32)
    value = value / tl.load(v_scale + line * WIDTH + channel)[None, :]
    turned = tl.trans(value.to(tl.float8e4nv))
    target = (line * WIDTH + channel).to(tl.int64)[:, None] * v_out_row + (block * BLOCK + place)[None, :]
    tl.store(v_out + target, turned)


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
    empty8 = functools.partial(empty, dtype=torch.float8_e4m3fn)
    sums = empty(batch, heads, parts, 3, WIDTH)
    mean, v_scale = (empty(batch, heads, WIDTH) for _ in range(2))
    k_scale = empty(batch, heads)
    rounded = RoundedAttention(
        empty8(batch, length, heads, WIDTH),
        empty8(batch, length, heads, WIDTH),
        empty(batch, heads, length),
        empty8(batch, heads, WIDTH, blocks * BLOCK),
        v_scale,
    )
    pooled = [empty(batch, heads, blocks if means else 0, WIDTH) for _ in range(2)]
    _statistics_kernel[(parts, heads, batch)](
        k, v, sums, length, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        PART=PART, ROWS=64, WIDTH=WIDTH, num_warps=8,
    )  # fmt: skip
    _finish_kernel[(batch * heads,)](sums, mean, k_scale, v_scale, length, PARTS=parts, WIDTH=WIDTH, num_warps=4)
    _round_kernel[(blocks, heads, batch)](
        q, k, v, mean, k_scale, v_scale, rounded.q, rounded.k, rounded.v, rounded.factor, *pooled,
        length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        heads * WIDTH, blocks * BLOCK, WIDTH**-0.5 * math.log2(math.e),
        BLOCK=BLOCK, WIDTH=WIDTH, MEANS=means, num_warps=8,
    )  # fmt: skip
    return rounded, pooled[0], pooled[1]
