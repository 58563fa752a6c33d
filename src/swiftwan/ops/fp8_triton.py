# mypy: disable-error-code="no-untyped-def"
"""The kernel of :mod:`swiftwan.ops.fp8`. Imported only where Triton is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _quantize_rows(x, rounded, scale, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row.to(tl.int64) * stride + column, inside, other=0.0).to(tl.float32)
    factor = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 448.0
    tl.store(scale + row, factor)
    tl.store(rounded + row.to(tl.int64) * width + column, (value / factor).to(tl.float8e4nv), inside)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, I) to float8_e4m3fn (M, I) and the scale of each row, float32 (M, 1), in one pass."""
    rows, width = x.shape
    rounded = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantize_rows[(rows,)](x, rounded, scale, width, x.stride(0), BLOCK=block, num_warps=4 if block <= 4096 else 8)
    return rounded, scale
