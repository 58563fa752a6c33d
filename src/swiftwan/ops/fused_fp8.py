# mypy: disable-error-code="no-untyped-def"
"""Triton kernels that end in :class:`swiftwan.ops.fp8.Rounded`: what an 8-bit layer reads, made in the pass before it.

Each is one of :mod:`swiftwan.ops.fused` with a last step more, on numbers that are in registers still: the largest of
a row, and a division. So the rounding reads nothing, and the pass writes one byte a number instead of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.block import BlockOps
from swiftwan.ops.fp8 import Fp8Linear, Rounded
from swiftwan.ops.fused import FUSED, add_norm


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> Rounded:
    rounded = empty_rounded(x.shape, x.device)
    add_norm(x, None, None, (scale, shift), spans, eps, rounded)
    return rounded


def gated_add_norm(
    x: Tensor, update: Tensor, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Rounded]:
    rounded = empty_rounded(update.shape, x.device)
    return add_norm(x, update, gate, (weight, bias), spans, eps, rounded)[0], rounded


def add_norm_modulate(
    x: Tensor, update: Tensor, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Rounded]:
    rounded = empty_rounded(update.shape, x.device)
    return add_norm(x, update, None, (scale, shift), spans, eps, rounded)[0], rounded


FUSED_FP8 = BlockOps(
    norm_modulate=norm_modulate,
    gated_add=FUSED.gated_add,
    gated_add_norm=gated_add_norm,
    add_norm_modulate=add_norm_modulate,
    norm_rope=FUSED.norm_rope,
)
"""For a block whose linear layers are all :class:`Fp8Linear`."""


def empty_rounded(shape: Sequence[int], device: torch.device) -> Rounded:
    """Room for rows of the last dimension."""
    return Rounded(
        torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(*shape[:-1], 1, dtype=torch.float32, device=device),
    )


# Rows, as they are and behind GELU


@triton.jit
def _round_rows_kernel(x, values, scale, width, stride, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * stride + column, inside, other=0.0).to(tl.float32)
    if GELU:  # tanh form; tanh(z) = 2 sigmoid(2 z) - 1
        value *= tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    factor = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
    tl.store(scale + row, factor)
    tl.store(values + row * width + column, (value * (1.0 / factor)).to(tl.float8e4nv), inside)


def _round_rows(x: Tensor, gelu: bool) -> Rounded:
    rows = x.reshape(-1, x.shape[-1])
    rounded = empty_rounded(x.shape, x.device)
    width = rows.shape[1]
    block = triton.next_power_of_2(width)
    _round_rows_kernel[(rows.shape[0],)](
        rows, *rounded, width, rows.stride(0), BLOCK=block, GELU=gelu, num_warps=4 if block <= 4096 else 8
    )
    return rounded


def quantize_rows(x: Tensor) -> Rounded:
    """:func:`swiftwan.ops.fp8.quantize_rows` in one pass."""
    return _round_rows(x, gelu=False)


def linear_gelu(linear: Fp8Linear, x: Tensor | Rounded) -> Rounded:
    """GELU (tanh form) of the layer's result, rounded, for the layer behind it."""
    return _round_rows(linear(x), gelu=True)
