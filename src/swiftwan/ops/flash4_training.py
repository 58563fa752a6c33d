"""FlashAttention-4 with its backward pass, as operators of their own: torch.compile calls them without looking inside,
and activation checkpointing sees the output and the log-sum-exp, which it may keep.

Shapes as in :mod:`swiftwan.ops.attention`; the log-sum-exp is (B, H, L), float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftwan.ops.attention import flash4_tiles


@torch.library.custom_op("swiftwan::flash4_forward", mutates_args=())
def flash4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    inputs = (x.contiguous() for x in (q, k, v))
    out, lse = _flash_attn_fwd(*inputs, return_lse=True, **flash4_tiles(q))[:2]
    return out, lse


@flash4_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(batch, heads, length, dtype=torch.float32)


@torch.library.custom_op("swiftwan::flash4_backward", mutates_args=())
def flash4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    inputs = (x.contiguous() for x in (q, k, v))
    dq, dk, dv = _flash_attn_bwd(*inputs, out, grad.contiguous(), lse, deterministic=deterministic)[:3]
    return dq, dk, dv


@flash4_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = flash4_backward(grad, *ctx.saved_tensors, torch.are_deterministic_algorithms_enabled())
    return grads


flash4_forward.register_autograd(_backward, setup_context=_keep)


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, differentiable."""
    out: Tensor = flash4_forward(q, k, v)[0]
    return out
