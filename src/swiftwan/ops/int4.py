"""Linear layers whose weights rest in 4 bits and are expanded for each product.

Weights are cut into groups along the input; each group has a scale and a lowest value (asymmetric uniform
quantization, as in GPTQ's and AWQ's files, arXiv 2210.17323 and 2306.00978), rounded to nearest. Expanding
costs one pass over the weights: next to a product with 30,000 tokens it is nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 64
LEVELS = 15


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize (out, in), ``in`` a multiple of 64.

    Returns:
        codes uint8 (out, in / 2), two a byte; scale and lowest value, float32 (out, in / 64, 1).
    """
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (high - low).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    codes = ((groups - low) / scale).round().clamp_(0, LEVELS).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scale, low


def unpack(codes: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) that :func:`pack` stored, in ``dtype``."""
    pair = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).unflatten(1, (-1, GROUP))
    return torch.addcmul(low, pair, scale).flatten(1).to(dtype)


class Int4Linear(nn.Module):
    """An ``nn.Linear`` with its weight in 4 bits (4.5 to 5 with the groups' scales)."""

    codes: Tensor
    scale: Tensor
    low: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        for name, tensor in zip(("codes", "scale", "low"), pack(linear.weight.detach()), strict=True):
            self.register_buffer(name, tensor)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, unpack(self.codes, self.scale, self.low, self.dtype), self.bias)
