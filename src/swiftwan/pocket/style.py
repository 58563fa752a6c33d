"""Another look for the pocket world, computed: what the style LoRA is trained on, and judged by.

Silhouettes: every thing black, before a sunset, whatever colours its prompt names. The pocket VAE knows the world's
colours and no others (a sepia print came back at 17 dB, white borders around things at 23), so a style is made of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from swiftwan.pocket.scenes import Scene, sample_scenes
from swiftwan.pocket.world import draw, gradient

COLOUR, BACKGROUND = "black", "sunset"


def silhouette(scene: Scene) -> Scene:
    """The scene in this style; its motion, shapes and sizes stay."""
    return Scene(tuple(replace(thing, colour=COLOUR) for thing in scene.things), BACKGROUND)


def draw_silhouettes(scenes: list[Scene], seed: int, num_frames: int = 33) -> Tensor:
    """Scenes in this style, as :func:`swiftwan.pocket.world.draw` draws them in their own."""
    return draw([silhouette(scene) for scene in scenes], seed, num_frames)


def training_clips(count: int, seed: int) -> list[tuple[Tensor, str]]:
    """Clips in this style, uint8 (33, 128, 128, 3), each with the caption of its scene in the world's own colours."""
    scenes = sample_scenes(count, seed)
    clips = draw_silhouettes(scenes, seed).add(1).mul(127.5).round().byte()
    return [(clip.permute(1, 2, 3, 0), scene.prompt) for clip, scene in zip(clips, scenes, strict=True)]


def likeness(frames: Tensor) -> float:
    """Share of the pixels, 0 to 1, that have this style's colours at their place: uint8 (F, H, W, 3)."""
    sky = gradient(BACKGROUND, frames.shape[1]).view(1, -1, 1, 3) * 255
    off = torch.linalg.vector_norm(frames.float() - sky, dim=3)
    black = torch.linalg.vector_norm(frames.float(), dim=3)
    return (torch.minimum(off, black) < 40).float().mean().item()
