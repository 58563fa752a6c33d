"""The first steps on a smaller picture: latents that are shrunk before them and enlarged behind.

High noise hides all but the layout, and a quarter of the positions says as much of that as all of them do. Where the
small steps end, the clean video they are heading for is enlarged and noised again to the level where the schedule
stands, so that the large steps find what they would find on a path of their own. (Wan-sized systems do the same in
other ways: Pyramidal Flow Matching, arXiv 2410.05954; the DCT of SGLang's progressive resolution.)

Shapes: f h w latent frames, height, width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Progressive:
    """How small, and how long.

    Attributes:
        scale: height and width of the small latents, relative to the whole.
        until: noise level, timestep / 1000, down to which steps are small.
    """

    scale: float
    until: float

    def small_steps(self, sigmas: Sequence[float]) -> int:
        """How many of the steps that begin at these noise levels are small; the last never is."""
        return min(sum(sigma > self.until for sigma in sigmas), len(sigmas) - 1)

    def shrink(self, noise: Tensor, patch: int) -> Tensor:
        """White noise (1, C, f, h, w) to white noise of the small size, of the same low frequencies.

        Args:
            patch: latent positions along a side of the transformer's patches; the small size is whole patches.
        """
        height, width = (max(patch, round(side * self.scale / patch) * patch) for side in noise.shape[3:])
        means = F.adaptive_avg_pool2d(noise[0], (height, width))[None]
        # The mean of n independent numbers has a deviation of n ** -0.5.
        rows, columns = (_window_lengths(a, b, noise) for a, b in zip(noise.shape[3:], (height, width), strict=True))
        return means * (rows[:, None] * columns).sqrt()

    def enlarge(self, clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """The small clean video (1, C, f, h', w') at the size of ``noise`` (1, C, f, h, w), noised to ``sigma``."""
        large = F.interpolate(clean[0], noise.shape[3:], mode="bicubic")[None]
        return (1 - sigma) * large + sigma * noise


def _window_lengths(whole: int, parts: int, like: Tensor) -> Tensor:
    """How many positions ``adaptive_avg_pool`` averages for each of ``parts`` along a side of ``whole``."""
    each = torch.arange(parts, device=like.device)
    return ((each + 1) * whole + parts - 1).div(parts, rounding_mode="floor") - (each * whole) // parts


class Watched:
    """A scheduler that remembers the clean video that its last step was heading for."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.clean: Tensor | None = None

    def step(self, flow: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Any:
        sigma = self.scheduler.sigmas[self.scheduler.step_index or self.scheduler.begin_index].to(latents)
        # On the straight path of a rectified flow, latents = clean + sigma * flow.
        self.clean = latents - sigma * flow
        return self.scheduler.step(flow, timestep, latents, **options)
