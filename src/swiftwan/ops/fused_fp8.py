# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that end in :class:`swiftwan.ops.fp8.Rounded`: what an 8-bit layer reads, made in the pass before it.

Each is one of :mod:`swiftwan.ops.fused` with a last step more, on numbers that are in registers still: the largest of
a row, and a division. So the rounding reads nothing, and the pass writes one byte a number instead of two.

A row comes in two parts: the largest power of two below its width, and the rest. Whole, a row of 1536 would take 2048
lanes and one of 8960 would take 16,384.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.block import BlockOps, refuse_gradient
from swiftwan.ops.fp8 import Fp8Linear, Rounded
from swiftwan.ops.fused import FUSED, sum_of
from swiftwan.ops.modulate import Tokens
from swiftwan.ops.text_attention import norm_attend_round


def empty_rounded(shape: Sequence[int], device: torch.device) -> Rounded:
    """Room for rows of the last dimension."""
    return Rounded(
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device),
    )


def _parts(width: int) -> tuple[int, int]:
    """Lanes of a row's two parts."""
    first = 1 << (width - 1).bit_length() - 1
    return first, triton.next_power_of_2(width - first)


@triton.jit
def _round(one, other, other_inside):
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
def _add_norm_round_kernel(
    x, update, gate, scale, shift, summed, values, row_scale,
    length, boundary, gate_batch, gate_span, scale_batch, scale_span, eps,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SPANS: tl.constexpr, ROWS: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, MODULATED: tl.constexpr,
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
        mean = (tl.sum(value, 0) + tl.sum(other_value, 0)) / WIDTH
        value -= mean
        other_value = tl.where(other_inside, other_value - mean, 0.0)
        variance = (tl.sum(value * value, 0) + tl.sum(other_value * other_value, 0)) / WIDTH
        inverse_deviation = tl.rsqrt(variance + eps)
        value = _scale_shift(value * inverse_deviation, factors, offsets, MODULATED)
        other_value = _scale_shift(other_value * inverse_deviation, other_factors, other_offsets, MODULATED)
        step, inverse = _round(value, other_value, other_inside)
        tl.store(row_scale + batch * length + token, step, there)
        tl.store(values + place, (value * inverse).to(tl.float8e4nv), inside & there)
        tl.store(values + other_place, (other_value * inverse).to(tl.float8e4nv), other_inside & there)
        one, other, more, other_more = next_one, next_other, next_more, next_other_more
        token += 1
        start += WIDTH


def _add_norm_round(
    x: Tensor, update: Tensor | None, gate: Tensor | None, norm: tuple[Tensor, Tensor], spans: Sequence[int], eps: float
) -> tuple[Tensor, Rounded]:
    """As :func:`swiftwan.ops.fused.add_norm`, whose result is rounded."""
    refuse_gradient(x)
    x = (x if update is None else x.expand_as(update)).contiguous()
    batch, length, width = x.shape
    rounded = empty_rounded(x.shape, x.device)
    summed = x if update is None else torch.empty_like(x)
    update = x if update is None else update.contiguous()
    scale, shift = norm
    modulated = scale.ndim == 3
    if modulated:  # one vector for the whole batch has a stride of 0
        scale, shift = scale.expand(batch, -1, -1), shift.expand(batch, -1, -1)
    vectors = None if gate is None else gate.expand(batch, -1, -1)
    first, rest = _parts(width)
    rows = 4 if len(spans) == 1 else 1
    _add_norm_round_kernel[(triton.cdiv(length, rows), batch)](
        x, update, x if vectors is None else vectors, scale, shift, summed, *rounded, length, spans[0],
        *((0, 0) if vectors is None else vectors.stride()[:2]),
        *(scale.stride()[:2] if modulated else (0, 0)), eps,
        WIDTH=width, FIRST=first, REST=rest, SPANS=len(spans), ROWS=rows,
        ADD=summed is not x, GATED=gate is not None, MODULATED=modulated, num_warps=_warps(first, rows),
    )  # fmt: skip
    return summed, rounded


def _warps(lanes: int, rows: int = 1) -> int:
    """32,760 rows of 1536, norm with gate and rounding: 4 warps a row take 0.100 ms, 1 and 2 0.110 and 0.120; of four
    rows, the next on its way, 2 warps 0.093, 4 and 8 0.098 and 0.138 (H200)."""
    return max(1, min(8, lanes // (256 if rows == 1 else 512)))


def norm_modulate(x: Tokens, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> tuple[Tensor, Rounded]:
    return _add_norm_round(*sum_of(x), (scale, shift), spans, eps)


def gated_add_norm(
    x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Rounded]:
    return _add_norm_round(x, update, gate, (weight, bias), spans, eps)


def add_norm_modulate(
    x: Tensor, update: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Rounded]:
    return _add_norm_round(x, update, None, (scale, shift), spans, eps)


FUSED_FP8 = BlockOps(
    norm_modulate=norm_modulate,
    gated_add=FUSED.gated_add,
    gated_add_norm=gated_add_norm,
    add_norm_modulate=add_norm_modulate,
    norm_rope=FUSED.norm_rope,
    norm_attend=norm_attend_round,
)
"""For a block whose linear layers are all :class:`Fp8Linear`."""


# Rows, as they are and behind GELU


@triton.jit
def _gelu(x):
    """tanh form; tanh(z) = 2 sigmoid(2 z) - 1."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _round_rows_kernel(
    x, values, scale, stride, WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, GELU: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column, other_column = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    inside, other_inside = column < WIDTH, other_column < WIDTH
    one = tl.load(x + row * stride + column, inside, other=0.0).to(tl.float32)
    other = tl.load(x + row * stride + other_column, other_inside, other=0.0).to(tl.float32)
    if GELU:
        one, other = _gelu(one), _gelu(other)
    step, inverse = _round(one, other, other_inside)
    tl.store(scale + row, step)
    tl.store(values + row * WIDTH + column, (one * inverse).to(tl.float8e4nv), inside)
    tl.store(values + row * WIDTH + other_column, (other * inverse).to(tl.float8e4nv), other_inside)


def _round_rows(x: Tensor, gelu: bool) -> Rounded:
    rows = x.reshape(-1, x.shape[-1])
    rounded = empty_rounded(x.shape, x.device)
    first, rest = _parts(rows.shape[1])
    _round_rows_kernel[(rows.shape[0],)](
        rows, *rounded, rows.stride(0), WIDTH=rows.shape[1], FIRST=first, REST=rest, GELU=gelu, num_warps=_warps(first)
    )
    return rounded


def quantize_rows(x: Tensor) -> Rounded:
    """:func:`swiftwan.ops.fp8.quantize_rows` in one pass."""
    return _round_rows(x, gelu=False)


def linear_gelu(linear: Fp8Linear, x: Tensor | Rounded) -> Rounded:
    """GELU (tanh form) of the layer's result, rounded, for the layer behind it. On Hopper there is a kernel for all
    of it: :mod:`swiftwan.ops.gelu_fp8_gluon`."""
    return _round_rows(linear(x), gelu=True)
