"""A frozen linear layer whose forward product and whose gradient of the input both run in 8-bit floats.

A LoRA never needs the gradient of the base weight, so these two products are all there is. Each contracts over
another side of the weight, so the weight is kept twice, scaled by row for each; together as large as it was in bf16.
Kind: near. Shapes: M tokens, I and O in- and out-width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from swiftwan.ops.fp8 import quantize_rows


def product(rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K) by (N, K), each row with a scale of its own, (M, 1) and (1, N); bfloat16."""
    return torch._scaled_mm(
        rows, weight.T, scale_a=row_scale, scale_b=scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        weight, scale, transposed, transposed_scale = weights
        context.save_for_backward(transposed, transposed_scale)
        return product(*quantize_rows(x), weight, scale, bias)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = context.saved_tensors
        return product(*quantize_rows(grad), weight, scale, None), *(None,) * 5


class Fp8FrozenLinear(nn.Module):
    """An ``nn.Linear`` that does not learn. Compile it: then rounding the activations is part of the kernel before it.

    Args:
        linear: bfloat16, on a CUDA device of compute capability 8.9 or more; its widths divide by 16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        forth, forth_scale = quantize_rows(weight)
        back, back_scale = quantize_rows(weight.T.contiguous())
        self.register_buffer("weight", forth)
        self.register_buffer("scale", forth_scale.T.contiguous())
        self.register_buffer("transposed", back)
        self.register_buffer("transposed_scale", back_scale.T.contiguous())
        self.bias = linear.bias

    weight: Tensor
    scale: Tensor
    transposed: Tensor
    transposed_scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        weights = self.weight, self.scale, self.transposed, self.transposed_scale
        out: Tensor = _Frozen.apply(rows, self.bias, *weights)
        return out.view(*x.shape[:-1], self.out_features)
