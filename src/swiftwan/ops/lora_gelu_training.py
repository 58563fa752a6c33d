# mypy: disable-error-code="no-untyped-def"
"""What a LoRA adds to the feed-forward's first product, the sum and its GELU in one pass each way, in Triton.

The hidden layer is the widest of a block. Done one by one, the adapter's part of it is written, read, summed and kept;
here it is made again, from ``rank`` numbers a token, wherever it is needed: two reads and two writes of the
hidden layer less in the forward pass, one of each less in the backward.

Kind: exact (the sum is not rounded before GELU). Shapes: M tokens, O out-width, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_O = 64, 128


def reference(base: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """GELU (tanh form) of ``base (..., O) + low (..., R) up^T``, ``up`` (O, R)."""
    return F.gelu(base + F.linear(low, up), approximate="tanh")


@triton.jit
def _tile(
    base, low, up, tokens, width, rank,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of this program: where its tile lies, what of it exists, the sum there, and GELU's sigmoid of it."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    part = tl.arange(0, BLOCK_R)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row[:, None] < tokens) & (column[None, :] < width)
    known = part[None, :] < rank
    left = tl.load(low + row[:, None] * rank + part[None, :], (row[:, None] < tokens) & known, other=0.0)
    right = tl.load(up + column[:, None] * rank + part[None, :], (column[:, None] < width) & known, other=0.0)
    value = tl.load(base + place, inside, other=0.0).to(tl.float32) + tl.dot(left, tl.trans(right))
    # gelu(x) = x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    gate = tl.sigmoid(1.5957691216057308 * value * (1 + 0.044715 * value * value))
    return place, inside, value, gate


@triton.jit
def _forward_kernel(
    base, low, up, out, tokens, width, rank,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    place, inside, value, gate = _tile(base, low, up, tokens, width, rank, BLOCK_M, BLOCK_O, BLOCK_R)
    tl.store(out + place, (value * gate).to(out.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    base, low, up, grad, out, tokens, width, rank,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    place, inside, value, gate = _tile(base, low, up, tokens, width, rank, BLOCK_M, BLOCK_O, BLOCK_R)
    slope = gate + value * gate * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * value * value)
    given = tl.load(grad + place, inside, other=0.0).to(tl.float32)
    tl.store(out + place, (given * slope).to(out.dtype.element_ty), inside)


def _launch(kernel: Any, base: Tensor, low: Tensor, up: Tensor, *others: Tensor) -> None:
    tokens, width, rank = base.numel() // base.shape[-1], *up.shape
    grid = triton.cdiv(width, BLOCK_O), triton.cdiv(tokens, BLOCK_M)
    block_r = max(16, triton.next_power_of_2(rank))  # a tensor core multiplies 16 at once
    kernel[grid](
        base.contiguous(), low.contiguous(), up.contiguous(), *others, tokens, width, rank,
        BLOCK_M=BLOCK_M, BLOCK_O=BLOCK_O, BLOCK_R=block_r, num_warps=8,
    )  # fmt: skip


@torch.library.custom_op("swiftwan::lora_gelu_forward", mutates_args=())
def lora_gelu_forward(base: Tensor, low: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    _launch(_forward_kernel, base, low, up, out)
    return out


@torch.library.custom_op("swiftwan::lora_gelu_backward", mutates_args=())
def lora_gelu_backward(grad: Tensor, base: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """The gradient of the sum."""
    out = torch.empty_like(base, memory_format=torch.contiguous_format)
    _launch(_backward_kernel, base, low, up, grad.contiguous(), out)
    return out


@lora_gelu_forward.register_fake
def _(base: Tensor, low: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


@lora_gelu_backward.register_fake
def _(grad: Tensor, base: Tensor, low: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    base, low, up = ctx.saved_tensors
    d_sum = lora_gelu_backward(grad, base, low, up)
    return d_sum, d_sum @ up, d_sum.flatten(0, -2).T @ low.flatten(0, -2)


lora_gelu_forward.register_autograd(_backward, setup_context=_keep)


def lora_gelu(base: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """:func:`reference`, differentiable."""
    out: Tensor = lora_gelu_forward(base, low, up)
    return out
