"""Linear layers in 8-bit floats (E4M3, arXiv 2209.05433): weights at rest, activations as they come.

A row of activations, one token, is scaled by its own largest value, and a row of weights, one output, by its own;
cuBLASLt multiplies the bytes and applies both scales to the sum. Rounding the activations is the only extra pass
over them, and the Triton kernel makes it one read and half a write; in eager torch it is five.

Shapes: M tokens, I and O in- and out-width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGEST = 448.0
"""Of float8_e4m3fn."""

_TINY = 1e-12


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The plain way: (M, I) to float8_e4m3fn (M, I) and the scale of each row, float32 (M, 1)."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp_min(_TINY) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


class Fp8Linear(nn.Module):
    """An ``nn.Linear`` whose weight rests, and whose product runs, in 8-bit floats.

    Args:
        linear: on a CUDA device of compute capability 8.9 or more; its widths divide by 16.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        weight, scale = quantize_rows(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = linear.bias
        self.quantize_rows = _fast_rows()

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = self.quantize_rows(x.reshape(-1, self.in_features))
        out = torch._scaled_mm(
            rows,
            self.weight.T,
            scale_a=row_scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=self.dtype,
            use_fast_accum=True,
        )
        return out.view(*x.shape[:-1], self.out_features)


def _fast_rows() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if importlib.util.find_spec("triton") is None:
        return quantize_rows
    from swiftwan.ops.fp8_triton import quantize_rows as in_one_pass

    return in_one_pass
