# mypy: disable-error-code="no-untyped-def"
"""RMS norm and rotary position embedding with a backward pass, one read and one write each way: the kernel of
:mod:`swiftwan.ops.fused` and its gradient, in Triton. The norm's weight is frozen: it has none.

Kind: exact. Shapes: B batch, L tokens, H heads, E width of a head, D = H E.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftwan.ops.block import PLAIN
from swiftwan.ops.fused import _norm_turn, _warps
from swiftwan.ops.rope import Rope


@triton.jit
def _place(cos, sin, length, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of this program's token: where its row begins, its columns, which exist, and its angles."""
    token = tl.program_id(0)
    start = (tl.program_id(1) * length + token).to(tl.int64) * HEADS * WIDTH
    head, channel = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_E)[None, :]
    pair = tl.arange(0, BLOCK_E // 2)[None, :]
    angle = token * (WIDTH // 2) + pair
    cosine = tl.load(cos + angle, pair < WIDTH // 2, other=0.0)
    sine = tl.load(sin + angle, pair < WIDTH // 2, other=0.0)
    return start, head * WIDTH + channel, (head < HEADS) & (channel < WIDTH), cosine, sine


@triton.jit
def _forward_kernel(
    x, weight, cos, sin, out, length, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    start, column, inside, cosine, sine = _place(cos, sin, length, HEADS, WIDTH, BLOCK_H, BLOCK_E)
    dim: tl.constexpr = HEADS * WIDTH
    _norm_turn(x, weight, out, start, start, column, inside, cosine, sine, eps, dim, BLOCK_H, BLOCK_E)


@triton.jit
def _backward_kernel(
    x, weight, cos, sin, grad, dx, length, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    start, column, inside, cosine, sine = _place(cos, sin, length, HEADS, WIDTH, BLOCK_H, BLOCK_E)
    given = tl.load(grad + start + column, inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(given, [BLOCK_H, BLOCK_E // 2, 2]))
    back = tl.reshape(tl.join(even * cosine + odd * sine, odd * cosine - even * sine), [BLOCK_H, BLOCK_E])
    back *= tl.load(weight + column, inside, other=0.0).to(tl.float32)
    value = tl.load(x + start + column, inside, other=0.0).to(tl.float32)
    dim: tl.constexpr = HEADS * WIDTH
    factor = tl.rsqrt(tl.sum(tl.sum(value * value, axis=1), axis=0) / dim + eps)
    along = tl.sum(tl.sum(value * back, axis=1), axis=0) / dim
    out = factor * (back - value * factor * factor * along)
    tl.store(dx + start + column, out.to(dx.dtype.element_ty), inside)


def _launch(kernel: Any, x: Tensor, *arguments: Any, length: int, heads: int, eps: float) -> None:
    batch, width = x.shape[0], x.shape[-1] // heads
    block_h, block_e = triton.next_power_of_2(heads), triton.next_power_of_2(width)
    kernel[(length, batch)](
        x, *arguments, length, eps, HEADS=heads, WIDTH=width, BLOCK_H=block_h, BLOCK_E=block_e,
        num_warps=_warps(block_h * block_e),
    )  # fmt: skip


@torch.library.custom_op("swiftwan::norm_rope_forward", mutates_args=())
def norm_rope_forward(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    batch, length, dim = x.shape
    out = x.new_empty(batch, length, heads, dim // heads)
    _launch(_forward_kernel, x.contiguous(), weight, cos, sin, out, length=length, heads=heads, eps=eps)
    return out


@norm_rope_forward.register_fake
def _(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], heads, x.shape[2] // heads)


@torch.library.custom_op("swiftwan::norm_rope_backward", mutates_args=())
def norm_rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> Tensor:
    x, dx = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(
        _backward_kernel, x, weight, cos, sin, grad.contiguous(), dx, length=x.shape[1], heads=heads, eps=eps
    )  # fmt: skip
    return dx


@norm_rope_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return norm_rope_backward(grad, *ctx.saved_tensors, ctx.heads, ctx.eps), *(None,) * 5


norm_rope_forward.register_autograd(_backward, setup_context=_keep)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """As :func:`swiftwan.ops.rope.norm_rope`, differentiable in q and k."""
    one, other = (norm_rope_forward(x, weight, *rope, heads, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    return one, other


TRAINING = replace(PLAIN, norm_rope=norm_rope)
"""For a block that learns and is compiled: torch's compiler makes the rest, backward pass and all, in one pass each."""
