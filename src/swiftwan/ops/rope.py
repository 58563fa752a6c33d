"""Rotary position embedding (RoFormer, arXiv 2104.09864), the head split between time, height and width."""

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]
"""cos and sin, each (L, 1, E / 2), float32."""


def rope_tables(
    head_dim: int, frames: int, height: int, width: int, *, theta: float = 10_000.0, device: torch.device
) -> Rope:
    """Angles for a grid of patches, in the order frames, height, width.

    Of each head, ``2 * (head_dim // 6)`` channels turn with height, as many with width, the rest with time
    (128: 42, 42, 44). Angles are computed in float64 as in the official code, and kept in float32: a float32
    angle is off by up to 1e-4 rad at position 1000.
    """
    side = 2 * (head_dim // 6)
    angles = []
    for axis, (size, dim) in enumerate(
        ((frames, head_dim - 2 * side), (height, side), (width, side)),
    ):
        frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
        angle = torch.outer(torch.arange(size, dtype=torch.float64, device=device), frequency)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = size
        angles.append(angle.view(shape).expand(frames, height, width, dim // 2))
    flat = torch.cat(angles, dim=-1).view(frames * height * width, 1, head_dim // 2)
    return flat.cos().float(), flat.sin().float()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turn neighbouring pairs of channels of x (B, L, H, E), in float32, returned in x's dtype."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Rope, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm over the whole width of q and of k, both (B, L, D), then rotate their heads.

    Returns:
        q and k as (B, L, H, E).
    """
    normed = (F.rms_norm(x, x.shape[-1:], weight, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    one, other = (apply_rope(x.unflatten(-1, (heads, -1)), rope) for x in normed)
    return one, other
