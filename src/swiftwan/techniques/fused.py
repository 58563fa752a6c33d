"""What lies between the matrix products of a block in one pass over memory each, and fewer matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.models.dit import Block, SelfAttention, each_block
from swiftwan.models.dit_layers import GELU
from swiftwan.ops.attention import kernel
from swiftwan.ops.block import BlockOps
from swiftwan.ops.fp8 import Fp8Linear, Product
from swiftwan.ops.gelu_fp8 import Bound
from swiftwan.techniques.base import Slot, Technique

if TYPE_CHECKING:
    from swiftwan.device import Device
    from swiftwan.techniques.costs import Costs
    from swiftwan.weights.build import Parts


@dataclass(frozen=True)
class Fused(Technique):
    """Triton kernels for norms, modulation, gates and RoPE; GELU inside its matrix product; q, k and v in one."""

    name = "fused"
    kind = "exact"
    reason = "the same maths in fewer passes over memory, rounded less often"
    slot = Slot.BLOCKS
    switch = "merges the projections of q, k and v: a copy of their weights"
    claims = ("blocks.ops",)
    makes = frozenset({"fused-blocks"})

    def missing_on(self, device: Device) -> str:
        if device.capability is None or device.capability < (8, 0):
            return "it needs an NVIDIA GPU of compute capability 8.0 or more"
        if find_spec("triton") is None:
            return "the package is missing: pip install triton"
        return ""

    def cost(self, costs: Costs) -> Costs:
        return replace(costs, fused=True)

    def begin(self, device: torch.device) -> None:
        from swiftwan.ops import ahead

        ahead.begin(device)

    def install(self, parts: Parts) -> None:
        from swiftwan.ops.fused import FUSED, linear_gelu
        from swiftwan.ops.text_attention import norm_attend

        for transformer in filter(None, (parts.transformer, parts.transformer_2)):
            transformer.ops = FUSED
        ops = _with_heads(FUSED, norm_attend) if _is_hopper(parts.device) else FUSED
        for block in each_block(parts.transformer, parts.transformer_2):
            if _is_fp8(block):
                _round_in_passing(block, parts)
                continue
            block.ops = ops
            # A layer that a technique before this one put there, 8-bit or with a LoRA, has a product of its own.
            gelu = cast(GELU, block.ffn.net[0])
            if _is_plain(gelu.proj):
                gelu.linear_gelu = linear_gelu
            if not parts.weights_move and all(map(_is_plain, (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v))):
                block.attn1.project = MergedProjection(block.attn1)


class MergedProjection:
    """Queries, keys and values by one matrix product: for two pictures of 1560 tokens 670 instead of 564 TFLOP/s on
    an H200, for 32,760 tokens 3 to 7 % more.

    The layers keep their names; their weights become views of the merged ones, so that a change in place reaches
    both; one that is replaced or moved does not, so offloaded weights stay three.
    """

    def __init__(self, attention: SelfAttention) -> None:
        layers = (attention.to_q, attention.to_k, attention.to_v)
        self.weight = torch.cat([layer.weight.data for layer in layers])
        self.bias = torch.cat([layer.bias.data for layer in layers])
        for layer, weight, bias in zip(layers, self.weight.chunk(3), self.bias.chunk(3), strict=True):
            layer.weight.data, layer.bias.data = weight, bias

    def __call__(self, attention: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        return q, k, v


def _is_plain(layer: nn.Module) -> bool:
    """Whether its weight is one tensor of floats; torchao puts a tensor of its own into a linear layer."""
    return type(layer) is nn.Linear and type(layer.weight) is nn.Parameter


def _is_hopper(device: torch.device) -> bool:
    """Whether kernels run that are written for its tensor cores, as 8-bit attention is."""
    return not kernel("fp8").missing_on(torch.cuda.get_device_capability(device))


def _with_heads(ops: BlockOps, norm_attend: Callable[..., Any]) -> BlockOps:
    """The same with Hopper's own kernel for heads that attend to text."""
    from swiftwan.ops.text_attention_gluon import attend_heads

    return replace(ops, norm_attend=partial(norm_attend, heads=attend_heads))


# Blocks of 8-bit layers


def _is_fp8(block: Block) -> bool:
    one, other, gelu = block.attn1, block.attn2, cast(GELU, block.ffn.net[0])
    # Those that read what a fused kernel wrote.
    readers = (one.to_q, one.to_k, one.to_v, other.to_q, other.to_out[0], gelu.proj, block.ffn.net[2])
    return all(type(layer) is Fp8Linear for layer in readers)


def _round_in_passing(block: Block, parts: Parts) -> None:
    """Kernels before an 8-bit layer hand it its bytes; where weights stay, q, k and v become one product."""
    from swiftwan.ops.fused_fp8 import FUSED_FP8, linear_gelu
    from swiftwan.ops.text_attention import norm_attend_round

    block.ops = FUSED_FP8
    gelu = cast(GELU, block.ffn.net[0])
    gelu.linear_gelu = linear_gelu
    on_hopper = _is_hopper(parts.device)
    if on_hopper:
        block.ops = _with_heads(FUSED_FP8, norm_attend_round)
        _multiply_on_hopper(block)
    if parts.weights_move:
        return
    if on_hopper:
        _add_in_products(block)
    attention = block.attn1
    layers = cast(list[Fp8Linear], [attention.to_q, attention.to_k, attention.to_v])
    merged = Fp8Linear.merged(layers)
    attention.project = lambda _, x: merged(x).chunk(3, dim=-1)


def _multiply_on_hopper(block: Block) -> None:
    """Products that are written for its tensor cores: one with GELU and rounding in it, and one for two pictures."""
    from swiftwan.ops import gelu_fp8_gluon, tall_product

    gelu = cast(GELU, block.ffn.net[0])
    up = cast(Fp8Linear, gelu.proj)
    if gelu_fp8_gluon.fits(up):
        gelu.linear_gelu = partial(gelu_fp8_gluon.linear_gelu, bound=Bound.of(up))
    for layer in block.modules():
        if isinstance(layer, Fp8Linear) and tall_product.fits(layer):
            layer.product = tall_product.scaled_product


def _add_in_products(block: Block) -> None:
    """Leave the last products of both attentions and of the feed-forward to the sums behind them. The feed-forward's
    is made when the next block begins, so its weights must still be there."""
    from swiftwan.ops import added_product, cublaslt

    last = (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2])
    if cublaslt.can_add() and all(map(added_product.fits, last)):
        block.ops = added_product.adding(block.ops)
        for layer in last:
            cast(Fp8Linear, layer).multiply = Product
