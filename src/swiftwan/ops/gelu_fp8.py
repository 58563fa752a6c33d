"""The feed-forward's first product and GELU, rounded to 8 bits as they are made: by a bound, not by the largest.

A row's largest number is known when the whole row is, 8960 of them, and a matrix product makes tiles of 128. But E4M3
is a float: of its 16 powers of two the largest need not meet the highest. So a row is scaled by what it cannot exceed:
an output is at most the largest input times the sum of its weights' magnitudes (Hoelder's inequality), and GELU makes
nothing larger. For random rows and weights that is 30 times the true largest number: five powers of two are not used,
and full precision ends at a thousandth of the largest number instead of a 28,000th.

Shapes: M tokens, I and O in- and out-width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from swiftwan.ops.fp8 import LARGEST, Fp8Linear, Rounded


class Bound(NamedTuple):
    """No output's magnitude is over 448 (slope * the scale of its row of inputs + offset)."""

    slope: float
    offset: float

    @classmethod
    def of(cls, linear: Fp8Linear) -> Bound:
        """Waits for the device: once a layer, when a plan is installed."""
        sums = linear.weight.float().abs().sum(1) * linear.scale.flatten()
        offset = 0.0 if linear.bias is None else linear.bias.abs().max().item()
        return cls(sums.max().item(), offset / LARGEST)


def linear_gelu(linear: Fp8Linear, x: Rounded, bound: Bound) -> Rounded:
    """The plain way: GELU (tanh form) of the layer's result for x (..., I), rounded (..., O)."""
    scale = bound.slope * x.scale + bound.offset
    value = F.gelu(linear(x).float(), approximate="tanh") / scale
    return Rounded(value.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale)
