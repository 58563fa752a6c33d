"""FlashAttention-4 with its backward pass, as operators of their own: torch.compile calls them without looking inside,
and activation checkpointing sees the output and the log-sum-exp, which it may keep.

Shapes as in :mod:`swiftwan.ops.attention`; the log-sum-exp is (B, H, L), float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swiftwan.ops.flash4 import options_for


@torch.library.custom_op("swiftwan::flash4_forward", mutates_args=())
def flash4_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    inputs = (x.contiguous() for x in (q, k, v))
    on_hopper = q.shape[-1] == 128 and torch.cuda.get_device_capability(q.device)[0] == 9
    options = options_for(k.shape[1])._asdict() if on_hopper else {}
    out, lse = _flash_attn_fwd(*inputs, return_lse=True, **options)[:2]
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


def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    """What :func:`backward` needs of any forward pass: its inputs, output and log-sum-exp."""
    ctx.save_for_backward(*inputs, *output)


def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of q, k and v, of what :func:`keep` kept."""
    grads: tuple[Tensor, ...] = flash4_backward(grad, *ctx.saved_tensors, torch.are_deterministic_algorithms_enabled())
    return grads


flash4_forward.register_autograd(backward, setup_context=keep)


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, differentiable."""
    out: Tensor = flash4_forward(q, k, v)[0]
    return out
