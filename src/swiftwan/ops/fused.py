# mypy: disable-error-code="no-untyped-def"
"""The functions of :mod:`swiftwan.ops.block`, each in one pass over device memory, written in Triton.

In: bf16, fp16 or fp32; inside: float32; out: the input's dtype. What the plain functions round between two steps is
not rounded here, except the residual stream, which later layers read again.

A row is one token. Widths need not be powers of two: lanes beyond the width are masked, and move no bytes. Norms take
a row in two parts, the largest power of two below its width and the rest: whole, 1536 would take 2048 lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from swiftwan.ops.block import BlockOps, refuse_gradient
from swiftwan.ops.modulate import GatedSum, Tokens, Unsummed
from swiftwan.ops.rope import Rope
from swiftwan.ops.text_attention import norm_attend

# Rows in two parts


def parts_of(width: int) -> tuple[int, int]:
    """Lanes of a row's two parts."""
    first = 1 << (width - 1).bit_length() - 1
    return first, triton.next_power_of_2(width - first)


def warps_of(lanes: int, rows: int = 1) -> int:
    """32,760 rows of 1536, norm with gate and rounding: 4 warps a row take 0.100 ms, 1 and 2 0.110 and 0.120; of four
    rows, the next on its way, 2 warps 0.093, 4 and 8 0.098 and 0.138 (H200)."""
    return max(1, min(8, lanes // (256 if rows == 1 else 512)))


def rows_of(lines: int, spans: int, added: bool) -> int:
    """Rows a program. A norm that only reads takes, with 16 instead of 4, 50 instead of 57 us for 32,760 rows of 1536,
    25.4 instead of 27.0 for 14,040, and 18.8 instead of 15.8 for 7,800, which are too few programs (H200)."""
    if spans > 1:
        return 1
    return 4 if added or lines < 10_000 else 16


@triton.jit
def round_parts(one, other, other_inside):
    """What a row's two parts are divided by, and its inverse."""
    largest = tl.maximum(tl.max(tl.abs(one), 0), tl.max(tl.where(other_inside, tl.abs(other), 0.0), 0))
    step = tl.maximum(largest, 1e-12) / 448.0
    return step, 1.0 / step


# Residual add, layer norm and modulation


@triton.jit
def _vector(source, column, inside):
    return tl.load(source + column, inside, other=0.0).to(tl.float32)


@triton.jit
def _sum(value, update, gate, summed, there, ADD: tl.constexpr, GATED: tl.constexpr):
    """One part of a row of the residual stream, with what is added to it."""
    value = value.to(tl.float32)
    if ADD:
        more = update.to(tl.float32)
        if GATED:
            more *= gate
        rounded = (value + more).to(summed.dtype.element_ty)
        tl.store(summed, rounded, there)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _scale_shift(value, factor, offset, MODULATED: tl.constexpr):
    if MODULATED:
        factor += 1.0
    return value * factor + offset


@triton.jit
def _add_norm_kernel(
    x, update, gate, scale, shift, summed, normed, row_scale,
    length, boundary, gate_batch, gate_span, scale_batch, scale_span, eps,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, MODULATED: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Some rows one after the other; the next one is on its way while this one's sums are made."""
    batch = tl.program_id(1)
    token = tl.program_id(0) * ROWS
    span = 0
    if SPANS == 2:  # a program has one row then
        span = (token >= boundary).to(tl.int32)
    gate += batch * gate_batch + span * gate_span
    scale += batch * scale_batch + span * scale_span
    shift += batch * scale_batch + span * scale_span
    column, other_column = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    inside, other_inside = column < WIDTH, other_column < WIDTH
    gates, other_gates = 0.0, 0.0
    if GATED:
        gates, other_gates = _vector(gate, column, inside), _vector(gate, other_column, other_inside)
    factors, other_factors, offsets, other_offsets = 0.0, 0.0, 0.0, 0.0
    if NORM:
        factors, other_factors = _vector(scale, column, inside), _vector(scale, other_column, other_inside)
        offsets, other_offsets = _vector(shift, column, inside), _vector(shift, other_column, other_inside)

    start = (batch * length + token).to(tl.int64) * WIDTH
    one = tl.load(x + start + column, inside, other=0.0)
    other = tl.load(x + start + other_column, other_inside, other=0.0)
    more, other_more = one, other
    if ADD:
        more = tl.load(update + start + column, inside, other=0.0)
        other_more = tl.load(update + start + other_column, other_inside, other=0.0)
    for row in range(ROWS):
        there = token < length
        place, other_place = start + column, start + other_column
        follows = (token + 1 < length) & (row + 1 < ROWS)
        next_one = tl.load(x + WIDTH + place, inside & follows, other=0.0)
        next_other = tl.load(x + WIDTH + other_place, other_inside & follows, other=0.0)
        next_more, next_other_more = next_one, next_other
        if ADD:
            next_more = tl.load(update + WIDTH + place, inside & follows, other=0.0)
            next_other_more = tl.load(update + WIDTH + other_place, other_inside & follows, other=0.0)
        value = _sum(one, more, gates, summed + place, inside & there, ADD, GATED)
        other_value = _sum(other, other_more, other_gates, summed + other_place, other_inside & there, ADD, GATED)
        if NORM:
            mean = (tl.sum(value, 0) + tl.sum(other_value, 0)) / WIDTH
            value -= mean
            other_value = tl.where(other_inside, other_value - mean, 0.0)
            variance = (tl.sum(value * value, 0) + tl.sum(other_value * other_value, 0)) / WIDTH
            inverse_deviation = tl.rsqrt(variance + eps)
            value = _scale_shift(value * inverse_deviation, factors, offsets, MODULATED)
            other_value = _scale_shift(other_value * inverse_deviation, other_factors, other_offsets, MODULATED)
            if ROUNDED:
                step, inverse = round_parts(value, other_value, other_inside)
                tl.store(row_scale + batch * length + token, step, there)
                value *= inverse
                other_value *= inverse
            tl.store(normed + place, value.to(normed.dtype.element_ty), inside & there)
            tl.store(normed + other_place, other_value.to(normed.dtype.element_ty), other_inside & there)
        one, other, more, other_more = next_one, next_other, next_more, next_other_more
        token += 1
        start += WIDTH


def add_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    spans: Sequence[int],
    eps: float,
    rounded: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``norm`` is (scale, shift) as (B, K, D), or (weight, bias) as (D,). What is not asked for returns x.

    ``rounded`` is where values and scale go where the result is rounded (:mod:`swiftwan.ops.fused_fp8`).
    """
    refuse_gradient(x)
    x = (x if update is None else x.expand_as(update)).contiguous()
    batch, length, width = x.shape
    summed = x if update is None else torch.empty_like(x)
    update = x if update is None else update.contiguous()
    normed, row_scale = rounded or (x if norm is None else torch.empty_like(x), x)
    scale, shift = norm or (x, x)
    modulated = norm is not None and scale.ndim == 3
    if modulated:  # one vector for the whole batch has a stride of 0
        scale, shift = scale.expand(batch, -1, -1), shift.expand(batch, -1, -1)
    vectors = None if gate is None else gate.expand(batch, -1, -1)
    first, rest = parts_of(width)
    rows = rows_of(batch * length, len(spans), added=summed is not x)
    _add_norm_kernel[(triton.cdiv(length, rows), batch)](
        x, update, x if vectors is None else vectors, scale, shift, summed, normed, row_scale, length, spans[0],
        *((0, 0) if vectors is None else vectors.stride()[:2]),
        *(scale.stride()[:2] if modulated else (0, 0)), eps,
        WIDTH=width, FIRST=first, REST=rest, SPANS=len(spans), ROWS=rows,
        ADD=summed is not x, GATED=gate is not None, NORM=norm is not None, MODULATED=modulated,
        ROUNDED=rounded is not None, num_warps=warps_of(first, rows),
    )  # fmt: skip
    return summed, normed


def norm_modulate(x: Tokens, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    return add_norm(*sum_of(x), (scale, shift), spans, eps)


def sum_of(x: Tokens) -> Unsummed:
    return x.take() if isinstance(x, GatedSum) else (x, None, None)


def gated_add(x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int]) -> GatedSum:
    """Left to the next norm: both in one pass move 7 bytes a number in 8 bits, one by one 9."""
    refuse_gradient(x)
    return GatedSum(x, update, gate, spans, add_gated)


def add_gated(x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int]) -> Tensor:
    return add_norm(x, update, gate, None, spans, 0.0)[0]


def gated_add_norm(
    x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return add_norm(x, update, gate, (weight, bias), spans, eps)


def add_norm_modulate(
    x: Tensor, update: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    return add_norm(x, update, None, (scale, shift), spans, eps)


# RMS norm and rotary position embedding of q and k


def _warps(block: int) -> int:
    """32 numbers a thread: at 1536 wide, 1 to 4 warps reach 3.4 to 3.8 TB/s on an H200 and 16 stay below 2.8."""
    return max(1, min(16, block // 1024))


@triton.jit
def _norm_turn(
    source, weight, out, start, place, column, inside, cosine, sine, eps,
    DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    value = tl.load(source + start + column, inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(value * value, axis=1), axis=0) / DIM
    value *= tl.rsqrt(mean + eps) * tl.load(weight + column, inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [BLOCK_H, BLOCK_E // 2, 2]))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    tl.store(out + place + column, tl.reshape(turned, [BLOCK_H, BLOCK_E]).to(out.dtype.element_ty), inside)


@triton.jit
def _norm_rope_kernel(
    q, k, q_weight, k_weight, cos, sin, q_out, k_out, length, row, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    line = (tl.program_id(1) * length + token).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_E)[None, :]
    inside = (head < HEADS) & (channel < WIDTH)
    column = head * WIDTH + channel
    pair = tl.arange(0, BLOCK_E // 2)[None, :]
    angle = token * (WIDTH // 2) + pair
    cosine = tl.load(cos + angle, pair < WIDTH // 2, other=0.0)
    sine = tl.load(sin + angle, pair < WIDTH // 2, other=0.0)
    dim: tl.constexpr = HEADS * WIDTH
    _norm_turn(q, q_weight, q_out, line * row, line * dim, column, inside, cosine, sine, eps, dim, BLOCK_H, BLOCK_E)
    _norm_turn(k, k_weight, k_out, line * row, line * dim, column, inside, cosine, sine, eps, dim, BLOCK_H, BLOCK_E)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    refuse_gradient(q)
    batch, length, dim = q.shape
    assert q.stride() == k.stride() == (length * q.stride(1), q.stride(1), 1), "rows must follow each other evenly"
    width = dim // heads
    q_out, k_out = (q.new_empty(batch, length, heads, width) for _ in range(2))
    block_h, block_e = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    _norm_rope_kernel[(length, batch)](
        q, k, q_weight, k_weight, rope[0], rope[1], q_out, k_out, length, q.stride(1), eps,
        HEADS=heads, WIDTH=width, BLOCK_H=block_h, BLOCK_E=block_e,
        num_warps=_warps(block_h * block_e),
    )  # fmt: skip
    return q_out, k_out


FUSED = BlockOps(
    norm_modulate=norm_modulate,
    gated_add=gated_add,
    gated_add_norm=gated_add_norm,
    add_norm_modulate=add_norm_modulate,
    norm_rope=norm_rope,
    norm_attend=norm_attend,
)


# The feed-forward's first product


def linear_gelu(linear: nn.Linear, x: Tensor) -> Tensor:
    """``gelu(linear(x))``, tanh form, in the epilogue of cuBLASLt's product: (L, ffn_dim) is written once."""
    out: Tensor = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return out.unflatten(0, x.shape[:-1])
