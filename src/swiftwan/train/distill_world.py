"""What a student learns from: prompts; for the embedded model those of its world, and a clip drawn for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from swiftwan.errors import RequestError, reason
from swiftwan.models.config import POCKET, KnownModel
from swiftwan.models.vae import WanVAE
from swiftwan.pipelines.request import Request
from swiftwan.pocket.scenes import Scene
from swiftwan.pocket.world import draw
from swiftwan.train.data import find
from swiftwan.train.pocket_dit import training_scenes

WORLD_CLIPS = 12_288
"""Prompts that the embedded model's own world gives where no file does, each with a clip that it draws."""


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty, or the captions of clips.

    Raises:
        RequestError: it cannot be read, or is empty.
    """
    if path.is_dir() or path.suffix.lower() in (".csv", ".jsonl"):
        return [clip.caption for clip in find(str(path), lambda caption: None).clips]
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as problem:
        raise RequestError(
            f"'{path}' cannot be read as text: {reason(problem)}; give a file with a prompt a line."
        ) from None
    if not (found := [line for line in lines if line]):
        raise RequestError(f"'{path}' holds no prompt; write one a line.")
    return found


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
