"""Linear layers in 8-bit floats (E4M3, arXiv 2209.05433): weights at rest, activations as they come.

A row of activations, one token, is scaled by its own largest value, and a row of weights, one output, by its own;
cuBLASLt multiplies the bytes and applies both scales to the sum. Rounding the activations is the only extra pass
over them: the Triton kernel makes it one read and half a write, where eager torch takes five, and the kernels of
:mod:`swiftwan.ops.fused_fp8` round what they have in their registers, which costs no pass at all.

Shapes: M tokens, I and O in- and out-width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

LARGEST = 448.0
"""Of float8_e4m3fn."""

_TINY = 1e-12


class Rounded(NamedTuple):
    """Activations as an 8-bit layer multiplies them: float8_e4m3fn (..., I), and each row's scale, float32 (..., 1)."""

    values: Tensor
    scale: Tensor

    def flatten(self, start: int) -> Rounded:
        """Dimensions from this one on as one, for what is scaled by all of them."""
        return Rounded(self.values.flatten(start), self.scale.flatten(start))


def quantize_rows(x: Tensor) -> Rounded:
    """The plain way, for x (..., I)."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_min(_TINY) / LARGEST
    return Rounded((x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale)


class Fp8Linear(nn.Module):
    """An ``nn.Linear`` whose weight rests, and whose product runs, in 8-bit floats.

    Args:
        weight: float8_e4m3fn (O, I), on a CUDA device of compute capability 8.9 or more; both widths divide by 16.
        scale: of each row of it, float32 (O, 1).
        bias: (O,), if there is one.
        dtype: of the result.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.T.contiguous())
        self.bias = bias
        self.quantize_rows = _fast_rows()
        self.product: Callable[[Fp8Linear, Tensor, Tensor], Tensor] = scaled_product
        self.multiply: Callable[[Fp8Linear, Rounded], Any] = multiply

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """Round a layer's weight, where it lies."""
        return cls(*quantize_rows(linear.weight.detach()), linear.bias, linear.weight.dtype)

    @classmethod
    def merged(cls, layers: Sequence[Self]) -> Self:
        """One layer whose outputs are those of all, side by side. Their weights become views of its own, so that a
        change in place reaches both, but a weight that is replaced or moved does not."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) == len(layers), "all of them have a bias, or none can be merged"
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([bias.data for bias in biases])
        scale = torch.cat([layer.scale.T for layer in layers])
        start = 0
        for layer, own in zip(layers, biases, strict=True):
            end = start + layer.out_features
            layer.weight, own.data = weight[start:end], bias[start:end]
            start = end
        return cls(weight, scale, nn.Parameter(bias, False), layers[0].dtype)

    def forward(self, x: Tensor | Rounded) -> Any:
        """(..., I) to (..., O), from activations that may be rounded already; or to the :class:`Product` of both."""
        return self.multiply(self, x if isinstance(x, Rounded) else self.quantize_rows(x))


def multiply(linear: Fp8Linear, x: Rounded) -> Tensor:
    out = linear.product(linear, x.values.flatten(0, -2), x.scale.flatten(0, -2))
    return out.view(*x.values.shape[:-1], linear.out_features)


class Product(NamedTuple):
    """A layer's result before it is computed, for who adds it to something and can do that in the product."""

    linear: Fp8Linear
    x: Rounded

    def whole(self) -> Tensor:
        return multiply(self.linear, self.x)


def scaled_product(linear: Fp8Linear, values: Tensor, scale: Tensor) -> Tensor:
    """cuBLASLt's: rows (M, I) with their scales (M, 1) to (M, O)."""
    return torch._scaled_mm(
        values,
        linear.weight.T,
        scale_a=scale,
        scale_b=linear.scale,
        bias=linear.bias,
        out_dtype=linear.dtype,
        use_fast_accum=True,
    )


def _fast_rows() -> Callable[[Tensor], Rounded]:
    if importlib.util.find_spec("triton") is None:
        return quantize_rows
    from swiftwan.ops.fused_fp8 import quantize_rows as in_one_pass

    return in_one_pass
