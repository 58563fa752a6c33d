"""Where denoising starts, task by task: from noise, from given latents, or from noise beside a given image.

The maths of image to video is that of github.com/Wan-Video/Wan2.1 (wan/image2video.py, wan/first_last_frame2video.py)
and Wan2.2 (wan/textimage2video.py); the schedule's tail is that of SDEdit (arXiv 2108.01073).

Shapes: C latent channels, f h w latent frames, height, width; F frames, H x W pixels, N given images or clips.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from swiftwan.inputs import Given
from swiftwan.models.vae import Tiling
from swiftwan.pipelines.request import Blend, ImageToImage, ImageToVideo, Request, VideoToVideo
from swiftwan.sampling import TAKES_LEVELS
from swiftwan.weights.build import Parts

# What stays given while the rest is denoised


class Kept(Protocol):
    """What every step knows of the request's image."""

    def inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What the transformer takes, of latents (1, C, f, h, w) at a timestep (1,)."""

    def kept(self, latents: Tensor) -> Tensor:
        """Latents with what was given put back into them."""


class Nothing:
    """Words alone: latents and timestep are all that the transformer takes."""

    def inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return latents, timestep

    def kept(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class Channels:
    """Wan2.1-I2V, FLF2V and Wan2.2-I2V-A14B: (1, 4 + C, f, h, w) of mask and image latents, beside the noise."""

    mask_and_image: Tensor

    def inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat((latents, self.mask_and_image), dim=1), timestep

    def kept(self, latents: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True)
class FirstFrame:
    """Wan2.2-TI2V-5B: the first latent frame (1, C, 1, h, w) is the image's, and its timestep 0."""

    frame: Tensor

    def inputs(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        return self.kept(latents), torch.stack((torch.zeros_like(timestep), timestep), dim=1)

    def kept(self, latents: Tensor) -> Tensor:
        return torch.cat((self.frame, latents[:, :, 1:]), dim=2)


# Starts


@dataclass(frozen=True)
class Start:
    """Latents (1, C, f, h, w), the timesteps still to walk, what is given all the way, and the timestep behind it."""

    latents: Tensor
    timesteps: Tensor
    given: Kept
    ends_at: float = 0.0


@dataclass(frozen=True)
class Material:
    """What a start is made of: the model's parts, a completed request with its pixels, noise, and a fresh scheduler."""

    parts: Parts
    request: Request
    given: Given | None
    noise: Tensor
    scheduler: Any
    tiling: Tiling | None

    @property
    def first(self) -> Tensor:
        """Noise as the schedule begins: a distilled model (rCM) may begin at a level below all noise."""
        if self.request.scheduler in TAKES_LEVELS:
            return self.noise * self.scheduler.sigmas[0].to(self.noise)
        return self.noise  # the others' first sigma, 0.9998, is a matter of their steps, as in diffusers

    def encoded(self, video: Tensor) -> Tensor:
        """(1, 3, F, H, W) in [-1, 1] to normalised latents (1, C, f, h, w)."""
        return self.parts.vae.encode(video.to(self.noise.device), tiling=self.tiling)


def begin(material: Material) -> Start:
    """Start as the task and the model have it."""
    if isinstance(material.request, ImageToVideo):
        config = material.parts.transformer.config
        return beside_channels(material) if config.in_channels != config.out_channels else after_first_frame(material)
    if isinstance(material.request, ImageToImage | Blend | VideoToVideo):
        return from_pixels(material)
    return from_noise(material)


def draw_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Noise, drawn on the CPU in float32 as diffusers does, so that a seed means the same everywhere."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(device)


def from_noise(material: Material) -> Start:
    """Text to video and text to image: pure noise, the whole schedule."""
    return Start(material.first, material.scheduler.timesteps, Nothing())


def from_pixels(material: Material) -> Start:
    """Image to image, blend, video to video: the latents' weighted mean, noised to where the schedule's tail begins."""
    request, given, noise, scheduler = material.request, material.given, material.noise, material.scheduler
    assert isinstance(request, ImageToImage | Blend | VideoToVideo)
    assert request.num_inference_steps is not None
    assert given is not None
    if request.creativity == 1:
        return from_noise(material)
    weights = request.weights if isinstance(request, Blend) else None
    latents = weighted_mean([material.encoded(as_video(clip)) for clip in given.pixels], weights)
    if request.creativity == 0:
        return Start(latents, scheduler.timesteps[:0], Nothing())
    index = (request.num_inference_steps - request.steps_to_run) * scheduler.order
    scheduler.set_begin_index(index)
    sigma = scheduler.sigmas[index].to(noise)
    return Start((1 - sigma) * latents + sigma * noise, scheduler.timesteps[index:], Nothing())


def after_first_frame(material: Material) -> Start:
    """Image to video where the first latent frame is the image's own."""
    assert material.given is not None
    frame = material.encoded(as_video(material.given.pixels[0]))
    return Start(material.first, material.scheduler.timesteps, FirstFrame(frame))


def beside_channels(material: Material) -> Start:
    """Image to video where a mask, and the latents of the image with gray behind it, go beside the noise."""
    assert material.given is not None
    assert material.request.num_frames is not None
    first, *last = [as_video(clip) for clip in material.given.pixels]
    missing = material.request.num_frames - 1 - len(last)
    gray = first.new_zeros(1, 3, missing, *first.shape[3:])
    image = material.encoded(torch.cat([first, gray, *last], dim=2))
    # One mask channel a frame of the group that a latent frame stands for; the first stands for one frame alone.
    per_group = material.parts.vae.config.scale_factor_temporal
    mask = torch.zeros_like(image[:, :1]).repeat(1, per_group, 1, 1, 1)
    mask[:, :, 0] = 1
    if last:
        mask[:, -1, -1] = 1
    channels = Channels(torch.cat((mask, image), dim=1))
    return Start(material.first, material.scheduler.timesteps, channels)


# Pixels and latents


def as_video(frames: Tensor) -> Tensor:
    """uint8 (F, H, W, 3) to (1, 3, F, H, W) in [-1, 1], float32."""
    return frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def weighted_mean(latents: Sequence[Tensor], weights: Sequence[float] | None) -> Tensor:
    """The mean of latents of one shape; without weights each counts alike."""
    weights = weights or [1.0] * len(latents)
    total = sum(weights)
    return sum(
        (weight / total * one for weight, one in zip(weights, latents, strict=True)), torch.zeros_like(latents[0])
    )
