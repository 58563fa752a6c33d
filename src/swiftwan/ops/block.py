"""What a transformer block computes beside its matrix products and attention: one set of functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from swiftwan.ops import modulate, rope


@dataclass(frozen=True)
class BlockOps:
    """Each field has the signature and the meaning of the plain function that :data:`PLAIN` holds in it."""

    norm_modulate: Callable[..., Tensor]
    gated_add: Callable[..., Tensor]
    gated_add_norm: Callable[..., tuple[Tensor, Tensor]]
    add_norm_modulate: Callable[..., tuple[Tensor, Tensor]]
    norm_rope: Callable[..., tuple[Tensor, Tensor]]


PLAIN = BlockOps(
    norm_modulate=modulate.norm_modulate,
    gated_add=modulate.gated_add,
    gated_add_norm=modulate.gated_add_norm,
    add_norm_modulate=modulate.add_norm_modulate,
    norm_rope=rope.norm_rope,
)
"""Plain torch: the reference, and what runs everywhere."""
