# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that end in :class:`swiftwan.ops.fp8.Rounded`: what an 8-bit layer reads, made in the pass before it.

Each is one of :mod:`swiftwan.ops.fused` with a last step more, on numbers that are in registers still: the largest of
a row, and a division. So the rounding reads nothing, and the pass writes one byte a number instead of two.

A program has one row, in two parts: the largest power of two below its width, and the rest. Whole, a row of 1536
would take 2048 lanes and one of 8960 would take 16,384.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.block import BlockOps
from swiftwan.ops.fp8 import Fp8Linear, Rounded
from swiftwan.ops.fused import FUSED, refuse_gradient
from swiftwan.ops.text_attention import norm_attend


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
def _sum(x, update, gate, summed, column, inside, ADD: tl.constexpr, GATED: tl.constexpr):
    """One part of a row of the residual stream, with what is added to it."""
    value = tl.load(x + column, inside, other=0.0).to(tl.float32)
    if ADD:
        more = tl.load(update + column, inside, other=0.0).to(tl.float32)
        if GATED:
            more *= tl.load(gate + column, inside, other=0.0)
        rounded = (value + more).to(summed.dtype.element_ty)
        tl.store(summed + column, rounded, inside)
        value = rounded.to(tl.float32)
    return value


@triton.jit
def _scale_shift(value, scale, shift, column, inside, MODULATED: tl.constexpr):
    factor = tl.load(scale + column, inside, other=0.0).to(tl.float32)
    if MODULATED:
        factor += 1.0
    return value * factor + tl.load(shift + column, inside, other=0.0).to(tl.float32)


@triton.jit
def _add_norm_round_kernel(
    x, update, gate, scale, shift, summed, values, row_scale,
    length, boundary, gate_batch, gate_span, scale_batch, scale_span, eps,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, SPANS: tl.constexpr,
    ADD: tl.constexpr, GATED: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0), tl.program_id(1)
    line = batch * length + token
    start = line.to(tl.int64) * WIDTH
    span = 0
    if SPANS == 2:
        span = (token >= boundary).to(tl.int32)
    gate += batch * gate_batch + span * gate_span
    scale += batch * scale_batch + span * scale_span
    shift += batch * scale_batch + span * scale_span
    column, other_column = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    inside, other_inside = column < WIDTH, other_column < WIDTH

    one = _sum(x + start, update + start, gate, summed + start, column, inside, ADD, GATED)
    other = _sum(x + start, update + start, gate, summed + start, other_column, other_inside, ADD, GATED)
    mean = (tl.sum(one, 0) + tl.sum(other, 0)) / WIDTH
    one -= mean
    other = tl.where(other_inside, other - mean, 0.0)
    inverse_deviation = tl.rsqrt((tl.sum(one * one, 0) + tl.sum(other * other, 0)) / WIDTH + eps)
    one = _scale_shift(one * inverse_deviation, scale, shift, column, inside, MODULATED)
    other = _scale_shift(other * inverse_deviation, scale, shift, other_column, other_inside, MODULATED)
    step, inverse = _round(one, other, other_inside)
    tl.store(row_scale + line, step)
    tl.store(values + start + column, (one * inverse).to(tl.float8e4nv), inside)
    tl.store(values + start + other_column, (other * inverse).to(tl.float8e4nv), other_inside)


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
    _add_norm_round_kernel[(length, batch)](
        x, update, x if vectors is None else vectors, scale, shift, summed, *rounded, length, spans[0],
        *((0, 0) if vectors is None else vectors.stride()[:2]),
        *(scale.stride()[:2] if modulated else (0, 0)), eps,
        WIDTH=width, FIRST=first, REST=rest, SPANS=len(spans),
        ADD=summed is not x, GATED=gate is not None, MODULATED=modulated, num_warps=_warps(first),
    )  # fmt: skip
    return summed, rounded


def _warps(lanes: int) -> int:
    """At 1536 wide, 4 warps take 0.113 ms for a norm with gate and rounding, 1 and 2 0.122 and 0.132 (H200)."""
    return max(1, min(8, lanes // 256))


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> Rounded:
    return _add_norm_round(x, None, None, (scale, shift), spans, eps)[1]


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
    norm_attend=norm_attend,
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
