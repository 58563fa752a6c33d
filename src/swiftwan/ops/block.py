"""What a transformer block computes beside its matrix products and attention: one set of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swiftwan.ops import attention, modulate, rope


@dataclass(frozen=True)
class BlockOps:
    """Each field has the signature and the meaning of the plain function that :data:`PLAIN` holds in it.

    What a norm, or the text's attention, returns goes to linear layers and nowhere else: so it is whatever those take,
    a Tensor or, for 8-bit layers, :class:`swiftwan.ops.fp8.Rounded`. A gated sum may be left to the norm behind it.
    """

    norm_modulate: Callable[..., tuple[Tensor, Any]]
    gated_add: Callable[..., modulate.Tokens]
    gated_add_norm: Callable[..., tuple[Tensor, Any]]
    add_norm_modulate: Callable[..., tuple[Tensor, Any]]
    norm_rope: Callable[..., tuple[Tensor, Tensor]]
    norm_attend: Callable[..., Any]


PLAIN = BlockOps(
    norm_modulate=modulate.norm_modulate,
    gated_add=modulate.gated_add,
    gated_add_norm=modulate.gated_add_norm,
    add_norm_modulate=modulate.add_norm_modulate,
    norm_rope=rope.norm_rope,
    norm_attend=attention.norm_attend,
)
"""Plain torch: the reference, and what runs everywhere."""


def refuse_gradient(x: Tensor) -> None:
    """A Triton kernel is not recorded for the backward pass: without this, gradients would be cut off in silence."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the fused kernels have no backward pass; train on a plan without 'fused', for example [].")
