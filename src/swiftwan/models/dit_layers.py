"""Layers of the diffusion transformer around its attention: feed-forward, and what embeds timestep, text and image.

Shapes are those of :mod:`swiftwan.models.dit`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.models.config import TransformerConfig


class Projection(nn.Module):
    """Two linear layers with an activation between, under diffusers' names."""

    def __init__(self, in_dim: int, out_dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.activation = activation
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


def linear_gelu(linear: nn.Module, x: Tensor, approximate: str) -> Tensor:
    return F.gelu(linear(x), approximate=approximate)


class GELU(nn.Module):
    """A linear layer, named ``proj`` as diffusers has it, and its activation."""

    def __init__(self, in_dim: int, out_dim: int, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(in_dim, out_dim)
        self.linear_gelu: Callable[..., Any] = partial(linear_gelu, approximate=approximate)

    def forward(self, x: Tensor) -> Any:
        return self.linear_gelu(self.proj, x)


class FeedForward(nn.Module):
    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, approximate: str) -> None:
        super().__init__()
        # net.1 is diffusers' dropout; the names net.0 and net.2 depend on it.
        self.net = nn.ModuleList([GELU(in_dim, hidden_dim, approximate), nn.Identity(), nn.Linear(hidden_dim, out_dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class PatchEmbedding(nn.Conv3d):
    """A convolution whose patches do not overlap, as one matrix product: it leaves tokens where the convolution leaves
    channels, which took a transposition, 0.6 ms of a 1.3B forward at 832x480x81 (H200)."""

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, f p, h q, w r) to (B, f h w, D), for patches of (p, q, r)."""
        p, q, r = self.kernel_size
        patches = latents.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class LayerNorm32(nn.LayerNorm):
    """Layer norm in float32, returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class ImageEmbedder(nn.Module):
    """CLIP tokens to the width of the model; FLF2V adds a position to the tokens of its two images."""

    def __init__(self, in_dim: int, out_dim: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = LayerNorm32(in_dim)
        self.ff = FeedForward(in_dim, in_dim, out_dim, approximate="none")
        self.norm2 = LayerNorm32(out_dim)
        self.pos_embed = None if positions is None else nn.Parameter(torch.zeros(1, positions, in_dim))

    def forward(self, image: Tensor) -> Tensor:
        if self.pos_embed is not None:
            image = image.reshape(-1, 2 * image.shape[1], image.shape[2]) + self.pos_embed
        return self.norm2(self.ff(self.norm1(image)))


class ConditionEmbedder(nn.Module):
    """Embeds timestep, text and image tokens."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = Projection(config.freq_dim, config.dim, nn.SiLU())
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = Projection(config.text_dim, config.dim, nn.GELU(approximate="tanh"))
        self.image_embedder = (
            None if config.image_dim is None else ImageEmbedder(config.image_dim, config.dim, config.pos_embed_seq_len)
        )

    def time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timestep (B, K) in [0, 1000] to the final layer's vector (B, K, D) and the blocks' (B, K, 6, D)."""
        wave = sinusoid(timestep, self.freq_dim).to(self.time_embedder.linear_1.weight.dtype)
        vector = self.time_embedder(wave).to(dtype)
        return vector, self.time_proj(F.silu(vector)).unflatten(-1, (6, -1))


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of a timestep at dim / 2 geometrically spaced frequencies; float32 (..., dim)."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / -half
    angle = timestep.float()[..., None] * torch.exp(math.log(10_000) * exponent)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
