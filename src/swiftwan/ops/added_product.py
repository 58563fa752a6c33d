# mypy: disable-error-code="no-untyped-def"
"""A block of 8-bit layers whose last products, of both attentions and of the feed-forward, add to the tokens in place.

The pass behind such a product reads 2 bytes a number and writes 1, where it read two tensors of 2 bytes and wrote 3:
for 32,760 tokens of 1536 channels on an H200 51 us and 35 mJ instead of 91 and 62, and both together 203 instead of 230
us, behind the feed-forward 770 instead of 803. The gate is multiplied into the weight's scales and the bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from swiftwan.ops import cublaslt, fused_fp8
from swiftwan.ops.block import BlockOps
from swiftwan.ops.fp8 import Fp8Linear, Product, Rounded
from swiftwan.ops.fused import add_gated
from swiftwan.ops.modulate import GatedSum, Tokens, Unsummed

LEAST_BYTES = 16 * 2**20
"""Of tokens: 7,800 of 1536 channels take 53 instead of 60 us. Two pictures' 3,120, 9 MiB, stay in the chip's cache and
gain nothing (25.8, 26.5), and have tiles of their own (:mod:`swiftwan.ops.tall_product`)."""


@triton.jit
def _gated_kernel(scale, bias, gate, scale_out, bias_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    factor = tl.load(gate + column, inside)
    tl.store(scale_out + column, tl.load(scale + column, inside) * factor, inside)
    tl.store(bias_out + column, (tl.load(bias + column, inside) * factor).to(bias_out.dtype.element_ty), inside)


def _gated(scale: Tensor, bias: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's scales (1, O) and bias (O,), each output's times its gate, of (1, 1, O)."""
    scale_out, bias_out = torch.empty_like(scale), torch.empty_like(bias)
    width, block = len(bias), 512
    _gated_kernel[(triton.cdiv(width, block),)](scale, bias, gate, scale_out, bias_out, WIDTH=width, BLOCK=block)
    return scale_out, bias_out


def fits(layer: nn.Module) -> bool:
    """Whether the layer's product can be added to tokens."""
    return isinstance(layer, Fp8Linear) and layer.bias is not None and layer.dtype == torch.bfloat16


def _added(x: Tensor, update: Product, gate: Tensor | None, spans: Sequence[int]) -> Unsummed:
    """x with the product in it, or both, where the product cannot add, or does not pay."""
    linear, rows = update
    alike = x.shape[:-1] == rows.values.shape[:-1] and (gate is None or len(gate) == len(spans) == 1)
    if not alike or x.nbytes < LEAST_BYTES:
        return x, update.whole(), gate
    assert linear.bias is not None, "see fits"
    vectors = (linear.scale, linear.bias) if gate is None else _gated(linear.scale, linear.bias, gate)
    values, row_scale = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
    cublaslt.add_product(x.flatten(0, -2), values, row_scale, linear.weight, *vectors)
    return x, None, None


class _Sum(GatedSum):
    def take(self) -> Unsummed:
        x, update, gate = super().take()
        return _added(x, update, gate, self.spans)


def norm_modulate(x: Tokens, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float) -> tuple[Tensor, Rounded]:
    """Tokens that come as a sum are a block's own; others may be someone's, and what follows adds to them in place."""
    own = x if isinstance(x, GatedSum) or x.nbytes < LEAST_BYTES else x.clone(memory_format=torch.contiguous_format)
    return fused_fp8.norm_modulate(own, shift, scale, spans, eps)


def gated_add(x: Tensor, update: Product, gate: Tensor, spans: Sequence[int]) -> GatedSum:
    return _Sum(x, update, gate, spans, add_gated)


def gated_add_norm(
    x: Tensor, update: Product, gate: Tensor, spans: Sequence[int], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Rounded]:
    return fused_fp8.add_norm_round(*_added(x, update, gate, spans), (weight, bias), spans, eps)


def add_norm_modulate(
    x: Tensor, update: Product, shift: Tensor, scale: Tensor, spans: Sequence[int], eps: float
) -> tuple[Tensor, Rounded]:
    return fused_fp8.add_norm_round(*_added(x, update, None, spans), (scale, shift), spans, eps)


def adding(ops: BlockOps) -> BlockOps:
    """The same for a block whose three last products are left to the sums behind them."""
    return replace(
        ops,
        norm_modulate=norm_modulate,
        gated_add=gated_add,
        gated_add_norm=gated_add_norm,
        add_norm_modulate=add_norm_modulate,
    )
