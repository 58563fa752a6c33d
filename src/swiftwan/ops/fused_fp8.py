# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that end in :class:`swiftwan.ops.fp8.Rounded`: what an 8-bit layer reads, made in the pass before it.

Norms are those of :mod:`swiftwan.ops.fused` with a last step more, on numbers that are in registers still: the largest
of a row, and a division. So the rounding reads nothing, and the pass writes one byte a number instead of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.block import BlockOps
from swiftwan.ops.fp8 import Fp8Linear, Rounded
from swiftwan.ops.fused import FUSED, add_norm, parts_of, round_parts, sum_of, warps_of
from swiftwan.ops.modulate import Tokens
from swiftwan.ops.text_attention import norm_attend_round


def empty_rounded(shape: Sequence[int], device: torch.device) -> Rounded:
    """Room for rows of the last dimension."""
    return Rounded(
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device),
    )


# Residual add, layer norm and modulation


def add_norm_round(
    x: Tensor, update: Tensor | None, gate: Tensor | None, norm: tuple[Tensor, Tensor], spans: Sequence[int], eps: float
) -> tuple[Tensor, Rounded]:
    """:func:`swiftwan.ops.fused.add_norm`, whose result is rounded."""
    rounded = empty_rounded((x if update is None else update).shape, x.device)
    return add_norm(x, update, gate, norm, spans, eps, rounded)[0], rounded


def norm_modulate(x: Tokens, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> tuple[Tensor, Rounded]:
    return add_norm_round(*sum_of(x), (scale, shift), spans, eps)


def gated_add_norm(
    x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Rounded]:
    return add_norm_round(x, update, gate, (weight, bias), spans, eps)


def add_norm_modulate(
    x: Tensor, update: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Rounded]:
    return add_norm_round(x, update, None, (scale, shift), spans, eps)


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
    step, inverse = round_parts(one, other, other_inside)
    tl.store(scale + row, step)
    tl.store(values + row * WIDTH + column, (one * inverse).to(tl.float8e4nv), inside)
    tl.store(values + row * WIDTH + other_column, (other * inverse).to(tl.float8e4nv), other_inside)


def _round_rows(x: Tensor, gelu: bool) -> Rounded:
    rows = x.reshape(-1, x.shape[-1])
    rounded = empty_rounded(x.shape, x.device)
    first, rest = parts_of(rows.shape[1])
    _round_rows_kernel[(rows.shape[0],)](
        rows, *rounded, rows.stride(0), WIDTH=rows.shape[1], FIRST=first, REST=rest, GELU=gelu,
        num_warps=warps_of(first),
    )  # fmt: skip
    return rounded


def quantize_rows(x: Tensor) -> Rounded:
    """:func:`swiftwan.ops.fp8.quantize_rows` in one pass."""
    return _round_rows(x, gelu=False)


def linear_gelu(linear: Fp8Linear, x: Tensor | Rounded) -> Rounded:
    """GELU (tanh form) of the layer's result, rounded, for the layer behind it. On Hopper there is a kernel for all
    of it: :mod:`swiftwan.ops.gelu_fp8_gluon`."""
    return _round_rows(linear(x), gelu=True)
