"""How good a clip is, by itself and beside a reference clip of the same seed.

Clips are uint8 (F, H, W, 3), as decoded, before any video codec. A metric whose weights are not on this machine is
``Missing``, with the reason, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from swiftwan.errors import RequestError, did_you_mean
from swiftwan.measure.missing import Missing

if TYPE_CHECKING:
    from swiftwan.measure.clip_score import ClipScorer
    from swiftwan.measure.lpips import Lpips
    from swiftwan.pocket.scenes import Scene
    from swiftwan.pocket.scorers import PocketScorers

PSNR_OF_EQUAL_DB = 100.0
"""What equal frames count: their ratio is infinite, which no mean and no JSON can hold."""


# Beside a reference


def psnr_db(frames: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: mean over the frames of 10 log10(255^2 / mean squared error)."""
    _check_pair(frames, reference)
    values = []
    for ours, theirs in zip(frames, reference, strict=True):  # a frame at a time: long clips need no float copy
        error = (ours.double() - theirs.double()).square().mean()
        values.append(min(PSNR_OF_EQUAL_DB, 10 * torch.log10(255**2 / error).item()) if error else PSNR_OF_EQUAL_DB)
    return sum(values) / len(values)


def ssim(frames: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004): 11 x 11 Gaussian window of 1.5, K = 0.01 and 0.03, inside the borders,
    mean over pixels, colours and frames. Frames of less than 11 pixels have none: RequestError."""
    _check_pair(frames, reference)
    if min(frames.shape[1:3]) < _WINDOW:
        raise RequestError(f"frames are {frames.shape[2]}x{frames.shape[1]}; SSIM needs {_WINDOW} pixels each way.")
    values = [_ssim(a, b) for a, b in zip(frames, reference, strict=True)]
    return sum(values) / len(values)


_WINDOW = 11


def _ssim(frame: Tensor, reference: Tensor) -> float:
    x = frame.permute(2, 0, 1).unsqueeze(1).double()  # (3, 1, H, W): colours are independent
    y = reference.permute(2, 0, 1).unsqueeze(1).double()
    line = torch.exp(-(torch.arange(_WINDOW, device=x.device).double() - _WINDOW // 2).square() / (2 * 1.5**2))
    line = line / line.sum()

    def blur(image: Tensor) -> Tensor:  # a Gaussian is a product of two lines
        return conv2d(conv2d(image, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (likeness / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean().item()


def relative_distance(latents: Tensor, reference: Tensor) -> float:
    """Distance of two tensors over the reference's length: |a - b| / |b|."""
    reference = reference.double()
    return ((latents.double() - reference).norm() / reference.norm()).item()


def _check_pair(frames: Tensor, reference: Tensor) -> None:
    if frames.shape != reference.shape:
        raise RequestError(
            f"clips are {tuple(frames.shape)} and {tuple(reference.shape)}; only clips of one size can be compared."
        )


# All metrics by name


@dataclass
class Material:
    """What metrics read: a clip, its prompt, and the reference clip or why there is none."""

    frames: Tensor
    prompt: str
    reference: Tensor | Missing
    device: torch.device

    @cached_property
    def lpips(self) -> Lpips | Missing:
        from swiftwan.measure.lpips import load_lpips

        return load_lpips(self.device)

    @cached_property
    def clip(self) -> ClipScorer | Missing:
        from swiftwan.measure.clip_score import load_clip

        return load_clip(self.device)

    @cached_property
    def scene(self) -> Scene | Missing:
        from swiftwan.pocket.scenes import parse_prompt

        return parse_prompt(self.prompt) or Missing("the prompt is not of the pocket world")

    @cached_property
    def pocket(self) -> PocketScorers:
        from swiftwan.pocket.scorers import load_scorers

        return load_scorers(self.device)


Value = float | Missing


def _against(metric: Callable[[Tensor, Tensor], float]) -> Callable[[Material], Value]:
    def value(material: Material) -> Value:
        if isinstance(material.reference, Missing):
            return material.reference
        return metric(material.frames, material.reference)

    return value


def _lpips(material: Material) -> Value:
    if isinstance(material.lpips, Missing):
        return material.lpips
    return _against(material.lpips.distance)(material)


def _temporal_lpips(material: Material) -> Value:
    if len(material.frames) < 2:
        return Missing("one frame has no motion")
    return material.lpips if isinstance(material.lpips, Missing) else material.lpips.temporal(material.frames)


def _clip_score(material: Material) -> Value:
    return material.clip if isinstance(material.clip, Missing) else material.clip(material.frames, material.prompt)


def _judge(material: Material) -> Value:
    from swiftwan.pocket.judge import judge

    if isinstance(material.scene, Missing):
        return material.scene
    verdict = judge(material.frames, material.scene)
    words = [verdict.background, verdict.colours_present]
    for thing in verdict.things:
        words += [word for word in (thing.colour, thing.shape, thing.motion, thing.size) if word is not None]
    return 100 * sum(words) / len(words)


# The pocket world's own scorers stand for CLIP and LPIPS there, and nowhere else: their fields say so.


def _pocket_clip_score(material: Material) -> Value:
    if isinstance(material.scene, Missing):
        return material.scene
    return material.pocket.clip_score(material.frames, material.scene)


def _pocket_perceptual(material: Material) -> Value:
    if isinstance(material.scene, Missing):
        return material.scene
    return _against(material.pocket.distance)(material)


def _pocket_temporal(material: Material) -> Value:
    if isinstance(material.scene, Missing):
        return material.scene
    return material.pocket.temporal(material.frames) if len(material.frames) > 1 else Missing("one frame has no motion")


METRICS: dict[str, tuple[str, Callable[[Material], Value]]] = {
    "psnr": ("psnr_db", _against(psnr_db)),
    "ssim": ("ssim", _against(ssim)),
    "lpips": ("lpips", _lpips),
    "temporal-lpips": ("temporal_lpips", _temporal_lpips),
    "clip-score": ("clip_score", _clip_score),
    "judge": ("judge_percent", _judge),
    "pocket-clip-score": ("pocket_clip_score", _pocket_clip_score),
    "pocket-perceptual": ("pocket_perceptual", _pocket_perceptual),
    "pocket-temporal-perceptual": ("pocket_temporal_perceptual", _pocket_temporal),
}
"""By the name a matrix calls it: its field in a row, and what computes it."""


def check_metrics(names: Iterable[str]) -> None:
    """Raise RequestError for a metric that is none of METRICS."""
    for name in names:
        if name not in METRICS:
            raise RequestError(f"unknown metric '{name}'." + did_you_mean(name, METRICS))


def score(material: Material, names: Iterable[str]) -> dict[str, Value]:
    """Compute metrics by name; the keys are the fields of a row."""
    found: dict[str, Value] = {}
    for name in names:
        field, metric = METRICS[name]
        try:
            found[field] = metric(material)
        except (RequestError, torch.OutOfMemoryError) as problem:
            found[field] = Missing(str(problem).partition("\n")[0])
    return found
