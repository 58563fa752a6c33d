# mypy: disable-error-code="no-untyped-def"
"""Norm and RoPE of queries and keys that end in :class:`swiftwan.ops.attention_fp8.RoundedAttention`, in Triton.

Keys are turned twice: once for what rounding needs to know of all tokens, once to be rounded. That reads them again,
and spares writing queries and keys in 16 bits and reading them twice. Sums are of fixed parts in a fixed order, as in
:mod:`swiftwan.ops.round_attention`.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.attention_fp8 import BLOCK, WIDTH, RoundedAttention
from swiftwan.ops.block import refuse_gradient
from swiftwan.ops.fused import angles, norm_turn
from swiftwan.ops.rope import Rope
from swiftwan.ops.round_attention import round_values, to_int8

PART = 64
"""Tokens that a program of the first pass reads."""

TOKENS = 32
"""Tokens that a program of the second pass rounds: a quarter of a block."""

STAGES, WARPS = 3, 4


@triton.jit
def _statistics_kernel(
    k, v, weight, cos, sin, parts, k_scale, bound, length, k_batch, k_row, v_batch, v_row, eps,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum, least and largest of each channel of k, turned, or of v, over one part of the tokens. Behind the last token
    it comes again, and adds nothing."""
    part, batch = tl.program_id(0), tl.program_id(1) // 2
    head = tl.arange(0, BLOCK_H)[:, None]
    column = head * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < HEADS * WIDTH
    start = part * PART
    total = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    least = tl.full((BLOCK_H, WIDTH), float("inf"), tl.float32)
    largest = tl.full((BLOCK_H, WIDTH), float("-inf"), tl.float32)
    if tl.program_id(1) % 2 == 0:
        if part == 0:  # for _finish_kernel
            tl.store(bound + batch, 0.0)
            tl.store(k_scale + batch * HEADS + head, 0.0, head < HEADS)
        weights = tl.load(weight + column, inside, other=0.0).to(tl.float32)
        k += batch.to(tl.int64) * k_batch
        for row in tl.range(PART, num_stages=STAGES):
            token = tl.minimum(start + row, length - 1)
            value = tl.load(k + token.to(tl.int64) * k_row + column, inside, other=0.0).to(tl.float32)
            cosine, sine = angles(cos, sin, token, WIDTH, WIDTH)
            value = norm_turn(value, weights, cosine, sine, eps, HEADS * WIDTH, BLOCK_H, WIDTH)
            total += tl.where(start + row < length, value, 0.0)
            least = tl.minimum(least, value)
            largest = tl.maximum(largest, value)
    else:
        v += batch.to(tl.int64) * v_batch
        for row in tl.range(PART, num_stages=STAGES):
            token = tl.minimum(start + row, length - 1)
            value = tl.load(v + token.to(tl.int64) * v_row + column, inside, other=0.0).to(tl.float32)
            total += tl.where(start + row < length, value, 0.0)
            least = tl.minimum(least, value)
            largest = tl.maximum(largest, value)
    place = parts + (tl.program_id(1) * tl.num_programs(0) + part) * 3 * HEADS * WIDTH + column
    tl.store(place, total, inside)
    tl.store(place + HEADS * WIDTH, least, inside)
    tl.store(place + 2 * HEADS * WIDTH, largest, inside)


@triton.jit
def _finish_kernel(
    parts, k_mean, v_mean, k_scale, v_scale, bound, count, length,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, TURN: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Some channels of a head of k, or of v: mean, and how far from it numbers lie at most."""
    batch = tl.program_id(1) // 2
    dim: tl.constexpr = HEADS * WIDTH
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((TURN, CHANNELS), tl.float32)
    least = tl.full((TURN, CHANNELS), float("inf"), tl.float32)
    largest = tl.full((TURN, CHANNELS), float("-inf"), tl.float32)
    for turn in range(TURNS):
        part = turn * TURN + tl.arange(0, TURN)[:, None]
        there = part < count
        place = parts + (tl.program_id(1) * count + part) * 3 * dim + channel[None, :]
        total += tl.load(place, there, other=0.0)
        least = tl.minimum(least, tl.load(place + dim, there, other=float("inf")))
        largest = tl.maximum(largest, tl.load(place + 2 * dim, there, other=float("-inf")))
    mean = tl.sum(total, 0) / length
    furthest = tl.maximum(tl.maximum(tl.max(largest, 0) - mean, mean - tl.min(least, 0)), 1e-12)
    if tl.program_id(1) % 2 == 0:
        tl.store(k_mean + batch * dim + channel, mean)
        line = batch * HEADS + tl.program_id(0) * CHANNELS // WIDTH
        tl.atomic_max(k_scale + line, tl.max(furthest, 0) / 127.0)
    else:
        tl.store(v_mean + batch * dim + channel, mean)
        tl.store(v_scale + batch * dim + channel, furthest / 448.0)
        tl.atomic_max(bound + batch, tl.max(furthest + tl.abs(mean), 0))


@triton.jit
def _round_kernel(
    q, k, q_weight, k_weight, cos, sin, k_mean, k_scale, q_out, k_out, factor, pooled,
    length, q_batch, q_row, k_batch, k_row, softmax_scale, eps,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Queries or keys of some tokens, and their share of the mean of their block."""
    part, batch = tl.program_id(0), tl.program_id(1) // 2
    dim: tl.constexpr = HEADS * WIDTH
    head = tl.arange(0, BLOCK_H)
    column = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = column < dim
    start = part * TOKENS
    line = batch * HEADS + head
    out = batch.to(tl.int64) * length * dim + column
    total = tl.zeros((BLOCK_H, WIDTH), tl.float32)
    if tl.program_id(1) % 2 == 0:
        weights = tl.load(q_weight + column, inside, other=0.0).to(tl.float32)
        per_scale = tl.load(k_scale + line, head < HEADS, other=0.0) * softmax_scale
        q += batch.to(tl.int64) * q_batch
        for row in tl.range(TOKENS, num_stages=STAGES):
            token = start + row
            there = inside & (token < length)
            value = tl.load(q + token.to(tl.int64) * q_row + column, there, other=0.0).to(tl.float32)
            cosine, sine = angles(cos, sin, tl.minimum(token, length - 1), WIDTH, WIDTH)
            value = norm_turn(value, weights, cosine, sine, eps, dim, BLOCK_H, WIDTH)
            scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-12) / 127.0
            tl.store(q_out + out + token.to(tl.int64) * dim, to_int8(value * (1.0 / scale)[:, None]), there)
            tl.store(factor + line.to(tl.int64) * length + token, scale * per_scale, (head < HEADS) & (token < length))
            if MEANS:
                total += value
    else:
        weights = tl.load(k_weight + column, inside, other=0.0).to(tl.float32)
        mean = tl.load(k_mean + batch * dim + column, inside, other=0.0)
        inverse = 1.0 / tl.load(k_scale + line, head < HEADS, other=1.0)
        k += batch.to(tl.int64) * k_batch
        for row in tl.range(TOKENS, num_stages=STAGES):
            token = start + row
            there = inside & (token < length)
            value = tl.load(k + token.to(tl.int64) * k_row + column, there, other=0.0).to(tl.float32)
            cosine, sine = angles(cos, sin, tl.minimum(token, length - 1), WIDTH, WIDTH)
            value = norm_turn(value, weights, cosine, sine, eps, dim, BLOCK_H, WIDTH)
            tl.store(k_out + out + token.to(tl.int64) * dim, to_int8((value - mean) * inverse[:, None]), there)
            if MEANS:
                total += value
    if MEANS:
        begin = start // BLOCK * BLOCK
        count = tl.maximum(tl.minimum(begin + BLOCK, length) - begin, 1)
        place = (tl.program_id(1) * HEADS * tl.num_programs(0) + part) * WIDTH
        place += head[:, None] * tl.num_programs(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(pooled + place, total / count, inside)


@triton.jit
def _round_values_kernel(
    v, v_mean, v_scale, v_out, length, v_batch, v_row, out_row, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = batch * tl.num_programs(1) + head
    round_values(
        v + batch.to(tl.int64) * v_batch,
        v_mean,
        v_scale,
        v_out,
        line,
        head,
        block,
        length,
        v_row,
        out_row,
        BLOCK,
        WIDTH,
    )


def norm_rope_round(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, eps: float
) -> RoundedAttention:
    """:func:`swiftwan.ops.rope.norm_rope`, then :func:`swiftwan.ops.attention_fp8.round_attention`, of q and k
    (B, L, D) and v (B, L, H, 128)."""
    return _norm_rope_round(q, k, v, q_weight, k_weight, rope, eps, means=False)[0]


def norm_rope_round_and_pool(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, eps: float
) -> tuple[RoundedAttention, Tensor, Tensor]:
    """Also the means of each block of 128 queries and keys, float32 (B, H, N, E)."""
    rounded, pooled = _norm_rope_round(q, k, v, q_weight, k_weight, rope, eps, means=True)
    means = pooled.unflatten(-2, (-1, BLOCK // TOKENS)).sum(-2)
    return rounded, means[:, 0], means[:, 1]


def _norm_rope_round(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, eps: float, means: bool
) -> tuple[RoundedAttention, Tensor]:
    refuse_gradient(q)
    batch, length, heads, width = v.shape
    assert width == WIDTH
    assert v.stride(3) == q.stride(2) == k.stride(2) == 1
    assert v.stride(2) == WIDTH
    blocks, parts = triton.cdiv(length, BLOCK), triton.cdiv(length, PART)
    empty = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    sums = empty(batch, 2, parts, 3, heads * WIDTH)
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
    quarters = blocks * (BLOCK // TOKENS)
    pooled = empty(batch, 2, heads, quarters if means else 0, WIDTH)
    block_h = triton.next_power_of_2(heads)
    _statistics_kernel[(parts, 2 * batch)](
        k, v, k_weight, *rope, sums, k_scale, rounded.bound, length,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), eps,
        HEADS=heads, BLOCK_H=block_h, WIDTH=WIDTH, PART=PART, STAGES=STAGES, num_warps=WARPS,
    )  # fmt: skip
    _finish_kernel[(heads * 4, 2 * batch)](
        sums, k_mean, v_mean, k_scale, v_scale, rounded.bound, parts, length,
        HEADS=heads, WIDTH=WIDTH, CHANNELS=WIDTH // 4, TURN=32, TURNS=triton.next_power_of_2(triton.cdiv(parts, 32)),
        num_warps=4,
    )  # fmt: skip
    _round_kernel[(quarters, 2 * batch)](
        q, k, q_weight, k_weight, *rope, k_mean, k_scale, rounded.q, rounded.k, rounded.factor, pooled,
        length, q.stride(0), q.stride(1), k.stride(0), k.stride(1), WIDTH**-0.5 * math.log2(math.e), eps,
        HEADS=heads, BLOCK_H=block_h, WIDTH=WIDTH, BLOCK=BLOCK, TOKENS=TOKENS, STAGES=STAGES, MEANS=means,
        num_warps=WARPS,
    )  # fmt: skip
    _round_values_kernel[(blocks, heads, batch)](
        v, v_mean, v_scale, rounded.v, length, v.stride(0), v.stride(1), blocks * BLOCK,
        BLOCK=BLOCK, WIDTH=WIDTH, num_warps=4,
    )  # fmt: skip
    return rounded, pooled
