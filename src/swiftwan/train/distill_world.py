"""What the embedded model's student learns from: prompts of its world, and a clip drawn for each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swiftwan.errors import RequestError
from swiftwan.models.config import POCKET, KnownModel
from swiftwan.models.vae import WanVAE
from swiftwan.pipelines.request import Request
from swiftwan.pocket.world import Scene, draw
from swiftwan.train.pocket_dit import training_scenes

WORLD_CLIPS = 12_288
"""Prompts that the embedded model's own world gives where no file does, each with a clip that it draws."""


def world(model: KnownModel, seed: int) -> list[Scene]:
    """Scenes of the embedded model's world. Raises RequestError for another model."""
    if model.transformer != POCKET.transformer:
        raise RequestError(f"train distill needs prompts for '{model.name}': give a text file, a prompt a line.")
    return training_scenes(WORLD_CLIPS, seed, two_things=0.6, twins=0.2)


@torch.no_grad()
def drawn(vae: WanVAE, scenes: Sequence[Scene], request: Request, seed: int, batch: int = 64) -> Tensor:
    """Latents of a clip for each scene, float16, on the VAE's device."""
    assert request.num_frames is not None
    device, latents = vae.quant_conv.weight.device, []
    for start in range(0, len(scenes), batch):
        video = draw(list(scenes[start : start + batch]), seed + start, num_frames=request.num_frames, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            latents.append(vae.normalize(vae.moments(video)[0]).half())
    return torch.cat(latents)
