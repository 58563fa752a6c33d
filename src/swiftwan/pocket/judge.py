"""Says what a clip of the pocket world shows, and whether that is what its prompt asked for.

Plain image analysis, no network. ``read_clip`` looks at the pixels alone, without the prompt; ``judge`` compares
what it saw with a scene, so asking cannot make it see. The steps of the reading:

1. background: the gradient that explains most pixels, then its actual tone, row by row;
2. things: colours of the world that fill more than a thin edge, each with the share it covers of every pixel;
3. for each thing, mass, middle and spread of that share in each frame;
4. from these: shape (the world's own shapes are drawn at the same middle and spread, the best fit wins),
   size, and motion (the largest of travel, bounce, turn and growth).

Shape letters: F frames, H rows, W columns. Lengths are the world's units, 128 to the shorter side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache
from itertools import permutations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from swiftwan.errors import RequestError
from swiftwan.pocket.world import (
    BACKGROUNDS,
    COLOURS,
    PAIR_SCALE,
    RADII,
    SHAPES,
    Scene,
    Thing,
    coverage,
    gradient,
)


@dataclass(frozen=True)
class SeenThing:
    """What one thing looks like; None where it looks like nothing of the world (motion: in a single frame)."""

    colour: str
    shape: str | None
    motion: str | None
    size: str

    def __str__(self) -> str:
        size = "" if self.size == "medium" else f"{self.size} "
        motion = f" {self.motion}" if self.motion else ""
        return f"{size}{self.colour} {self.shape or 'blob'}{motion}"


@dataclass(frozen=True)
class Observation:
    """What a clip shows: the largest thing first."""

    background: str | None
    things: tuple[SeenThing, ...]

    def __str__(self) -> str:
        things = " and ".join(map(str, self.things)) or "nothing"
        return f"{things} over {self.background or 'no known background'}"


@dataclass(frozen=True)
class ThingVerdict:
    """Which words about one thing are right. ``motion`` is None for a single frame."""

    found: bool
    colour: bool
    shape: bool
    motion: bool | None
    size: bool

    @property
    def right(self) -> bool:
        return all(getattr(self, field.name) is not False for field in fields(self))


@dataclass(frozen=True)
class Verdict:
    """Which words of a prompt a clip keeps. ``colours_present``: it shows these colours of things and no other."""

    background: bool
    things: tuple[ThingVerdict, ...]
    colours_present: bool
    seen: Observation

    @property
    def right(self) -> bool:
        return self.background and self.colours_present and all(thing.right for thing in self.things)


def judge(frames: Tensor, scene: Scene) -> Verdict:
    """Compare a clip, uint8 (F, H, W, 3), with the scene that it should show.

    Things are paired with what was seen so that the most words fit. Two things of one colour are seen as one.
    Raises RequestError as ``read_clip`` does.
    """
    seen = read_clip(frames)
    is_clip = len(frames) > 1
    nothing = [None] * len(scene.things)
    pairings = permutations([*seen.things, *nothing], len(scene.things))
    verdicts = [
        tuple(_compare(thing, other, is_clip) for thing, other in zip(scene.things, pairing, strict=True))
        for pairing in pairings
    ]
    return Verdict(
        background=seen.background == scene.background,
        things=max(verdicts, key=lambda things: sum(map(_words_right, things))),
        colours_present={thing.colour for thing in seen.things} == {thing.colour for thing in scene.things},
        seen=seen,
    )


def _compare(asked: Thing, seen: SeenThing | None, is_clip: bool) -> ThingVerdict:
    if seen is None:
        return ThingVerdict(False, False, False, False if is_clip else None, False)
    return ThingVerdict(
        found=True,
        colour=seen.colour == asked.colour,
        shape=seen.shape == asked.shape,
        motion=seen.motion == asked.motion if is_clip else None,
        size=seen.size == asked.size,
    )


def _words_right(verdict: ThingVerdict) -> float:
    # Colour counts double: it is what a thing is found by.
    return verdict.found + 2 * verdict.colour + verdict.shape + bool(verdict.motion) + 0.5 * verdict.size


def read_clip(frames: Tensor) -> Observation:
    """Say what a clip, uint8 (F, H, W, 3), shows. Raises RequestError for another type or shape."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.numel():
        raise RequestError(
            f"frames are {frames.dtype} {tuple(frames.shape)}; the judge reads torch.uint8 (F, H, W, 3)."
        )
    pixels = _to_world_size(frames.cpu())
    name, backdrop = _find_background(pixels)
    tracks = [_follow(pixels, backdrop, find) for find in _find_colours(pixels, backdrop)]
    scale = PAIR_SCALE if len(tracks) > 1 else 1.0
    return Observation(name, tuple(_describe(track, scale) for track in tracks))


# --- background and colours ---


def _to_world_size(frames: Tensor) -> Tensor:
    """float32 (F, 3, H, W) in 0 to 255, the shorter side 128 pixels."""
    pixels = frames.permute(0, 3, 1, 2).float()
    height, width = pixels.shape[2:]
    unit = min(height, width) / 128
    if unit == 1:
        return pixels.contiguous()
    size = (round(height / unit), round(width / unit))
    return interpolate(pixels, size, mode="area" if unit > 1 else "bilinear")


def _find_background(pixels: Tensor) -> tuple[str | None, Tensor]:
    """Name of the background (None if none explains 30 % of the pixels), and its actual rows (3, H)."""
    sample = pixels[:: max(1, len(pixels) // 4), :, :, ::2]
    height = pixels.shape[2]
    rows = torch.stack([gradient(name, height).T for name in BACKGROUNDS]) * 255
    distance = torch.stack([(sample - row[:, :, None]).square_().sum(1) for row in rows])
    nearest = distance.min(0)
    explained = nearest.values < 45**2
    share = torch.bincount(nearest.indices[explained], minlength=len(BACKGROUNDS)) / explained.numel()
    best = int(share.argmax())
    if share[best] < 0.3:
        return None, sample.movedim(1, 0).transpose(1, 2).flatten(2).median(-1).values
    own = (explained & (nearest.indices == best))[:, None]
    off = (sample - rows[best][:, :, None]) * own
    shift = off.sum((0, 2, 3)) / own.sum()
    # A row that a large thing hides is pulled to the clip's mean shift by the weight of ten pixels.
    row_shift = (off.sum((0, 3)) + 10 * shift[:, None]) / (own.sum((0, 3)) + 10)
    return list(BACKGROUNDS)[best], rows[best] + row_shift


@dataclass(frozen=True)
class _Find:
    """A colour that fills more than an edge: where it is for certain, and where another colour is, (F, H, W)."""

    colour: str
    inside: Tensor
    elsewhere: Tensor


def _find_colours(pixels: Tensor, backdrop: Tensor) -> list[_Find]:
    palette = torch.tensor(list(COLOURS.values())).float()
    squares = pixels.square().sum(1)
    to_colour = torch.stack([squares - 2 * torch.einsum("fchw,c->fhw", pixels, c) + c @ c for c in palette])
    to_backdrop = squares - 2 * (pixels * backdrop[:, :, None]).sum(1) + backdrop.square().sum(0)[:, None]
    nearest = to_colour.min(0)
    # 60 is a little over half the least distance of two colours (108).
    label = torch.where((nearest.values < 60**2) & (nearest.values < to_backdrop), nearest.indices, -1)
    counts = torch.bincount(label.flatten() + 1, minlength=len(COLOURS) + 1)[1:] / len(pixels)
    finds = []
    for index, colour in enumerate(COLOURS):
        if counts[index] < 12:
            continue
        # The edge between a thing and the background can pass near a third colour, but is too thin to survive this.
        inside = -max_pool2d(-(label == index).float()[:, None], 3, stride=1, padding=1)[:, 0]
        if (inside.sum((1, 2)) >= 4).float().mean() >= 0.3:
            finds.append(_Find(colour, inside, (label >= 0) & (label != index)))
    return sorted(finds, key=lambda find: -find.inside.sum())[:4]


# --- one thing, frame by frame ---


@dataclass(frozen=True)
class _Track:
    """One thing over time: its coverage (F, H, W), and mass, middle and spread of it, (F,); lengths in pixels."""

    colour: str
    covered: Tensor
    time: Tensor  # (F,), 0 to 1, of the frames that show it
    mass: Tensor
    x: Tensor
    y: Tensor
    spread_x: Tensor
    spread_y: Tensor


def _follow(pixels: Tensor, backdrop: Tensor, find: _Find) -> _Track:
    near = max_pool2d(find.inside[:, None], 9, stride=1, padding=4)
    # A coin seen edge-on has no inside for up to three frames; it is still where it was.
    near = max_pool2d(near.flatten(1).T[None], (1, 9), stride=1, padding=(0, 4))[0].T.view_as(find.inside) > 0
    colour = (pixels * find.inside[:, None]).sum((0, 2, 3)) / find.inside.sum()
    toward = colour[:, None] - backdrop
    toward = toward / toward.square().sum(0)
    share = (pixels * toward[:, :, None]).sum(1) - (backdrop * toward).sum(0)[:, None]
    # Steeper than the true edge, so that noise far from a thing (0.05 at 5 grey levels) weighs nothing.
    covered = ((share - 0.2) / 0.6).clamp_(0, 1) * (near & ~find.elsewhere)
    mass = covered.sum((1, 2))
    shown = mass >= 8
    time = torch.linspace(0, 1, len(pixels))[shown] if len(pixels) > 1 else torch.zeros(1)
    covered, mass = covered[shown], mass[shown]
    x, spread_x = _middle_and_spread(covered.sum(1) / mass[:, None])
    y, spread_y = _middle_and_spread(covered.sum(2) / mass[:, None])
    return _Track(find.colour, covered, time, mass, x, y, spread_x, spread_y)


def _middle_and_spread(profile: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (F,) each, of densities (F, length) over pixel middles."""
    place = torch.arange(profile.shape[1]) + 0.5
    middle = profile @ place
    return middle, (profile @ place.square() - middle.square()).clamp(min=0.1).sqrt()


def _describe(track: _Track, scale: float) -> SeenThing:
    shape, fit = _find_shape(track)
    radius = (track.spread_y / _unit_moments(fit).spread_y).log().mean().exp().item()
    size = min(RADII, key=lambda size: abs(math.log(radius / (RADII[size] * scale))))
    return SeenThing(track.colour, shape, _find_motion(track), size)


# --- shape ---


@dataclass(frozen=True)
class _Moments:
    """Middle, from the bounding box's, and spread of a shape of radius 1."""

    y: float
    spread_x: float
    spread_y: float


@cache
def _unit_moments(shape: str) -> _Moments:
    grid = torch.arange(200) + 0.5
    one = torch.tensor(1.0)
    covered = coverage(shape, grid - 100, (grid - 100)[:, None], 60 * one, one)[None]
    _, spread_x = _middle_and_spread(covered.sum(1) / covered.sum())
    y, spread_y = _middle_and_spread(covered.sum(2) / covered.sum())
    return _Moments((y.item() - 100) / 60, spread_x.item() / 60, spread_y.item() / 60)


def _find_shape(track: _Track) -> tuple[str | None, str]:
    """The shape, None if even the best fit leaves a quarter of the pixels unexplained; and the best fit."""
    aspect = track.spread_x / track.spread_y
    open_to_us = aspect >= 0.9 * aspect.quantile(0.95)
    frames = (track.mass * open_to_us).topk(min(5, len(aspect))).indices
    misfits = {shape: _misfit(track, frames, shape) for shape in SHAPES}
    best = min(misfits, key=lambda shape: misfits[shape])
    return (best if misfits[best] < 0.25 else None), best


def _misfit(track: _Track, frames: Tensor, shape: str) -> float:
    """Draw the shape with the track's middle and spread; the share of the pixels that differ."""
    unit = _unit_moments(shape)
    covered = track.covered[frames]
    radius = (track.spread_y[frames] / unit.spread_y)[:, None, None]
    width = (track.spread_x[frames] / unit.spread_x)[:, None, None] / radius
    x = torch.arange(covered.shape[2]) + 0.5 - track.x[frames, None, None]
    y = (torch.arange(covered.shape[1]) + 0.5)[:, None] - track.y[frames, None, None] + unit.y * radius
    drawn = coverage(shape, x, y, radius, width)
    return ((covered - drawn).abs().sum() / (covered + drawn).sum()).item()


# --- motion ---


def _find_motion(track: _Track) -> str | None:
    """The motion with the largest evidence, in parts of the least that the world shows of it; None for one frame."""
    if len(track.time) < 2:
        return None
    across, _ = _fit_line(track.time, track.x)
    down, swing = _fit_line(track.time, track.y)
    growth, _ = _fit_line(track.time, track.spread_y.log())
    aspect = (track.spread_x / track.spread_y).quantile(torch.tensor([0.1, 0.9]))
    evidence = {
        "moves right" if across > 0 else "moves left": abs(across) / 35,
        "moves down" if down > 0 else "moves up": abs(down) / 35,
        "grows" if growth > 0 else "shrinks": abs(growth) / math.log(2),
        "bounces": swing / 8,
        "spins": (1 - aspect[0] / aspect[1]).item() / 0.6,
    }
    motion = max(evidence, key=lambda motion: evidence[motion])
    return motion if evidence[motion] > 0.4 else "stays still"


def _fit_line(time: Tensor, value: Tensor) -> tuple[float, float]:
    """Change from time 0 to 1 along the best line, and the standard deviation around it."""
    time, value = time - time.mean(), value - value.mean()
    slope = (time @ value) / (time @ time)
    return slope.item(), (value - slope * time).square().mean().sqrt().item()
