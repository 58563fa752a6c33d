"""A tiny decoder that imitates a VAE's: the architecture and names of TAEHV (github.com/madebyollin/taehv).

Frames run as a batch of images through 2D convolutions; each block also sees its input one frame before. It reads
latents as the transformer makes them, normalised. ``taew2_1`` is for Wan2.1 and the 14B models of Wan2.2, ``taew2_2``
for Wan2.2-TI2V-5B; those with ``super`` in their name have wider blocks.

Shapes: B clips, T frames, C channels, H x W positions; images are (B T, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.errors import WeightsError
from swiftwan.models.vae_blocks import Stream

DOUBLES_TIME = (1, 2, 2)
"""Of Wan's latents: how many frames a frame becomes, level by level."""


@dataclass(frozen=True)
class TinySizes:
    """What a checkpoint's shapes say: latent channels, width of each level, side of the pixel squares that the last
    convolution makes, and whether blocks are the ``super`` ones."""

    latent_channels: int
    widths: tuple[int, int, int, int]
    patch: int
    is_super: bool = False

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], origin: str) -> Self:
        """Read them off a file's tensors.

        Raises:
            WeightsError: it is no TAEHV decoder for Wan.
        """
        is_super = "decoder.1.conv.3.weight" in shapes
        inner = (4, 11, 18) if is_super else (8, 14, 20)
        first = "decoder.0.weight" if is_super else "decoder.1.weight"
        try:
            widths = (shapes[first][0], *(shapes[f"decoder.{i}.weight"][0] // (4 if is_super else 1) for i in inner))
            last, latent_channels = shapes["decoder.22.weight"][0], shapes[first][1]
        except (KeyError, IndexError):
            raise WeightsError(
                f"{origin} holds no TAEHV decoder; take taew2_1 (Wan2.1, Wan2.2-A14B) or taew2_2 (Wan2.2-TI2V-5B) "
                "of github.com/madebyollin/taehv"
            ) from None
        patch = round((last / 3) ** 0.5)
        return cls(latent_channels, (widths[0], widths[1], widths[2], widths[3]), patch, is_super)


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, added to the frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * dim, dim), nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat((x, before), dim=1)) + x)


class SuperMemoryBlock(nn.Module):
    """The same with one 7x7 convolution a channel and two products over the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * dim, 2 * dim, 7, padding=3, groups=2 * dim, bias=False),
            nn.Conv2d(2 * dim, 4 * dim, 1),
            nn.ReLU(),
            nn.Conv2d(4 * dim, dim, 1, bias=False),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        out: Tensor = self.conv(torch.cat((x, before), dim=1)) + x
        return out


class MoreFrames(nn.Module):
    """(T, C, H, W) to (times T, C, H, W), each frame's own behind each other."""

    def __init__(self, dim: int, times: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, *x.shape[1:])


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TinyDecoder(nn.Module):
    """Normalised latents (B, C, f, h, w) to video (B, 3, F, H, W) in [-1, 1], a chunk at a time; differentiable."""

    def __init__(self, sizes: TinySizes) -> None:
        super().__init__()
        self.sizes = sizes
        layers = _super_layers(sizes) if sizes.is_super else _layers(sizes)
        self.decoder = nn.Sequential(*layers, _conv(sizes.widths[3], 3 * sizes.patch**2))

    def channels_last(self) -> Self:
        """Lay all weights out channels last: the activations follow from the first convolution on."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def forward(self, latents: Tensor, stream: Stream) -> Tensor:
        clips = len(latents)
        x = latents.transpose(1, 2).flatten(0, 1).to(next(self.parameters()).dtype)
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock | SuperMemoryBlock):
                x = layer(x, _before(layer, x, clips, stream))
            else:
                x = layer(x)
        x = F.pixel_shuffle(x, self.sizes.patch).unflatten(0, (clips, -1))
        if stream.at_start:  # the first latent frame stands for one frame, its last
            x = x[:, math.prod(DOUBLES_TIME) - 1 :]
            stream.at_start = False
        return x.transpose(1, 2) * 2 - 1


def _before(layer: nn.Module, x: Tensor, clips: int, stream: Stream) -> Tensor:
    """The frame before each of x (clips T, C, H, W); zeros before the first one."""
    frames = x.unflatten(0, (clips, -1))
    past = stream.past.get(layer)
    stream.past[layer] = frames[:, -1:].clone()
    return torch.cat((torch.zeros_like(frames[:, :1]) if past is None else past, frames[:, :-1]), dim=1).flatten(0, 1)


def _layers(sizes: TinySizes) -> list[nn.Module]:
    width = sizes.widths
    layers: list[nn.Module] = [SoftClamp(), _conv(sizes.latent_channels, width[0]), nn.ReLU()]
    for level, times in enumerate(DOUBLES_TIME):
        layers += [MemoryBlock(width[level]) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), MoreFrames(width[level], times)]
        layers.append(_conv(width[level], width[level + 1], bias=False))
    return [*layers, nn.ReLU()]


def _super_layers(sizes: TinySizes) -> list[nn.Module]:
    width = sizes.widths
    layers: list[nn.Module] = [nn.Conv2d(sizes.latent_channels, width[0], 1, bias=False)]
    for level, times in enumerate(DOUBLES_TIME):
        layers += [SuperMemoryBlock(width[level]) for _ in range(3)]
        layers += [_conv(width[level], 4 * width[level + 1]), nn.ReLU(), nn.PixelShuffle(2)]
        layers.append(MoreFrames(width[level + 1], times))
    return layers


def _conv(in_dim: int, out_dim: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_dim, out_dim, 3, padding=1, bias=bias)
