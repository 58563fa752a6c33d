"""Says what a clip of the pocket world shows, and whether that is what its prompt asked for.

Plain image analysis, no network. ``read_clip`` looks at the pixels alone, without the prompt; ``judge``
compares what it saw with a scene, so asking cannot make it see. The steps of the reading:

1. background: the gradient that explains most pixels, then its actual tone, row by row;
2. things: colours of the world that fill more than a thin edge, each with the share it covers of every pixel;
3. for each thing, mass, middle and spread of that share in each frame;
4. from these: shape (the world's own shapes are drawn alike, the best fit wins: ``pocket/silhouette.py``),
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
from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, PAIR_SCALE, RADII, Scene, Thing
from swiftwan.pocket.silhouette import cut_out, find_shape, middle_and_spread, unit_moments
from swiftwan.pocket.world import gradient


@dataclass(frozen=True)
class SeenThing:
    """What one thing looks like; no shape if it is none of the world's, no motion in a single frame."""

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
    num_frames: int

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
    """Which words of a prompt a clip keeps. ``colours_present``: its things have these colours, no other."""

    background: bool
    things: tuple[ThingVerdict, ...]
    colours_present: bool
    seen: Observation

    @property
    def right(self) -> bool:
        return self.background and self.colours_present and all(thing.right for thing in self.things)


def judge(frames: Tensor, scene: Scene) -> Verdict:
    """Compare a clip, uint8 (F, H, W, 3), with its scene. Raises RequestError for another type or shape."""
    return compare(read_clip(frames), scene)


def compare(seen: Observation, scene: Scene) -> Verdict:
    """Compare what was seen with a scene. Things are paired so that most words fit; a colour is seen once."""
    nothing = [None] * len(scene.things)
    pairings = permutations([*seen.things, *nothing], len(scene.things))
    verdicts = [
        tuple(_compare(asked, thing, seen.num_frames) for asked, thing in zip(scene.things, pairing, strict=True))
        for pairing in pairings
    ]
    return Verdict(
        background=seen.background == scene.background,
        things=max(verdicts, key=lambda things: sum(map(_words_right, things))),
        colours_present={thing.colour for thing in seen.things} == {thing.colour for thing in scene.things},
        seen=seen,
    )


def _compare(asked: Thing, seen: SeenThing | None, num_frames: int) -> ThingVerdict:
    if seen is None:
        return ThingVerdict(False, False, False, False if num_frames > 1 else None, False)
    return ThingVerdict(
        found=True,
        colour=seen.colour == asked.colour,
        shape=seen.shape == asked.shape,
        motion=seen.motion == asked.motion if num_frames > 1 else None,
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
    found = (_follow(pixels, backdrop, find) for find in _find_colours(pixels, backdrop))
    tracks = [track for track in found if len(track.mass)]  # where it never covers eight pixels, nothing is there
    scale = PAIR_SCALE if len(tracks) > 1 else 1.0
    return Observation(name, tuple(_describe(track, scale) for track in tracks), len(frames))


# --- background and colours ---


def _to_world_size(frames: Tensor) -> Tensor:
    """uint8 (F, H, W, 3), the shorter side 128 pixels."""
    height, width = frames.shape[1:3]
    unit = min(height, width) / 128
    if unit == 1:
        return frames
    size = (round(height / unit), round(width / unit))
    pixels = frames.permute(0, 3, 1, 2).float()
    pixels = interpolate(pixels, size, mode="area" if unit > 1 else "bilinear")
    return pixels.round().byte().permute(0, 2, 3, 1).contiguous()


def _find_background(pixels: Tensor) -> tuple[str | None, Tensor]:
    """Name of the background (None if none explains 30 % of the pixels), and its actual rows (H, 3)."""
    sample = pixels[:: max(1, len(pixels) // 4), :, ::4].float()
    height = pixels.shape[1]
    rows = torch.stack([gradient(name, height) for name in BACKGROUNDS]) * 255
    away = [sample - row[:, None] for row in rows]
    distance = torch.stack([_dot(off, off) for off in away])
    nearest = distance.min(0)
    explained = nearest.values < 45**2
    share = torch.bincount(nearest.indices[explained], minlength=len(BACKGROUNDS)) / explained.numel()
    best = int(share.argmax())
    if share[best] < 0.3:
        return None, sample.transpose(0, 1).flatten(1, 2).median(1).values
    own = (explained & (nearest.indices == best))[..., None]
    off = (sample - rows[best][:, None]) * own
    shift = off.sum((0, 1, 2)) / own.sum()
    # A row that a large thing hides is pulled to the clip's mean shift by the weight of ten pixels.
    row_shift = (off.sum((0, 2)) + 10 * shift) / (own.sum((0, 2)) + 10)
    return list(BACKGROUNDS)[best], rows[best] + row_shift


@dataclass(frozen=True)
class _Find:
    """A colour that fills more than an edge: where it surely is, and where another colour is, (F, H, W)."""

    colour: str
    inside: Tensor
    elsewhere: Tensor


def _find_colours(pixels: Tensor, backdrop: Tensor) -> list[_Find]:
    label = _label_colours(pixels, backdrop)
    counts = torch.bincount(label.flatten() + 1, minlength=len(COLOURS) + 1)[1:] / len(pixels)
    finds = []
    for index, colour in enumerate(COLOURS):
        if counts[index] < 12:
            continue
        # The edge between a thing and the background can pass near a third colour, but is too thin to last.
        # A small spinning star, the hardest, still has an inside in three frames of four.
        inside = _erode(label == index)
        if (inside.sum((1, 2)) >= 4).float().mean() >= 0.5:
            finds.append(_Find(colour, inside, (label >= 0) & (label != index)))
    return sorted(finds, key=lambda find: -find.inside.sum())[:4]


def _label_colours(pixels: Tensor, backdrop: Tensor) -> Tensor:
    """Index of the colour that each pixel has, -1 for none: (F, H, W)."""
    red, green, blue = pixels.unbind(-1)
    label = _colour_table()[(red >> 3).int() << 10 | (green >> 3).int() << 5 | (blue >> 3).int()]
    some = (label >= 0).nonzero()
    frame, row, column = some.unbind(1)
    coloured = pixels[frame, row, column].float()
    palette = torch.tensor(list(COLOURS.values())).float()
    to_colour = (coloured - palette[label[frame, row, column]]).square().sum(1)
    to_backdrop = (coloured - backdrop[row]).square().sum(1)
    frame, row, column = some[to_backdrop <= to_colour].unbind(1)
    label[frame, row, column] = -1
    return label


@cache
def _colour_table() -> Tensor:
    """The nearest colour within 60 grey levels, else -1, for every colour of 5 bits a channel.

    One look-up a pixel instead of eight distances. 60 is a little over half the least distance of two (108).
    """
    level = torch.arange(32) * 8 + 4.0
    every = torch.cartesian_prod(level, level, level)
    nearest = torch.cdist(every, torch.tensor(list(COLOURS.values())).float()).min(1)
    return torch.where(nearest.values < 60, nearest.indices, -1)


def _erode(mask: Tensor) -> Tensor:
    """The pixels of (F, H, W) whose 3 x 3 neighbourhood is all set; the picture's border is not."""
    core = torch.zeros_like(mask)
    rows = mask[:, 1:-1] & mask[:, :-2] & mask[:, 2:]
    core[:, 1:-1, 1:-1] = rows[:, :, 1:-1] & rows[:, :, :-2] & rows[:, :, 2:]
    return core


# --- one thing, frame by frame ---


@dataclass(frozen=True)
class _Track:
    """One thing over time: its coverage (F, h, w) in a window, and mass, middle and spread of it, (F,)."""

    colour: str
    covered: Tensor
    time: Tensor  # (F,), 0 to 1, of the frames that show it
    mass: Tensor
    x: Tensor
    y: Tensor
    spread_x: Tensor
    spread_y: Tensor


def _follow(pixels: Tensor, backdrop: Tensor, find: _Find) -> _Track:
    rows, columns = _surroundings(find.inside)
    pixels, backdrop = pixels[:, rows, columns].float(), backdrop[rows]
    inside, elsewhere = find.inside[:, rows, columns], find.elsewhere[:, rows, columns]
    near = max_pool2d(inside.float()[:, None], 9, stride=1, padding=4)[:, 0]
    # A coin seen edge-on has no inside for up to three frames; it is still where it was.
    near = max_pool2d(near.flatten(1)[None], (9, 1), stride=1, padding=(4, 0))[0].view_as(near) > 0
    toward = pixels[inside].mean(0) - backdrop
    toward = toward / toward.square().sum(1, keepdim=True)
    share = _dot(pixels, toward[:, None]) - _dot(backdrop, toward)[:, None]
    # Steeper than the true edge, so that noise far from a thing (0.05 at 5 grey levels) weighs nothing.
    covered = ((share - 0.2) / 0.6).clamp_(0, 1) * (near & ~elsewhere)
    mass = covered.sum((1, 2))
    shown = mass >= 8
    time = torch.linspace(0, 1, len(pixels))[shown] if len(pixels) > 1 else torch.zeros(1)
    covered, mass = covered[shown], mass[shown]
    x, spread_x = middle_and_spread(covered.sum(1) / mass[:, None])
    y, spread_y = middle_and_spread(covered.sum(2) / mass[:, None])
    return _Track(find.colour, covered, time, mass, x, y, spread_x, spread_y)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the last dimension of three, three times faster than a product and its sum."""
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1] + a[..., 2] * b[..., 2]


def _surroundings(inside: Tensor) -> tuple[slice, slice]:
    """Rows and columns of everything set in (F, H, W), and six pixels around."""
    ever = inside.any(0)
    rows, columns = ever.any(1).nonzero(), ever.any(0).nonzero()
    return (
        slice(max(0, int(rows[0]) - 6), int(rows[-1]) + 7),
        slice(max(0, int(columns[0]) - 6), int(columns[-1]) + 7),
    )


def _describe(track: _Track, scale: float) -> SeenThing:
    shape, fit = _find_shape(track)
    radius = (track.spread_y / unit_moments(fit).spread_y).log().mean().exp().item()
    size = min(RADII, key=lambda size: abs(math.log(radius / (RADII[size] * scale))))
    return SeenThing(track.colour, shape, _find_motion(track), size)


def _find_shape(track: _Track) -> tuple[str | None, str]:
    """The shape, None if it is none of the world's, and the best fit, from the frames that show it best."""
    aspect = track.spread_x / track.spread_y
    # Not the largest aspect: in a few frames, a speck that another thing's edge leaves can make it any.
    usual = aspect.quantile(0.8)
    open_to_us = (aspect / usual - 1).abs() <= 0.1
    open_to_us[(aspect - usual).abs().argmin()] = True  # of a few torn frames, all may be apart from it
    # A decoder's mistakes come with its groups of four frames, so half a clip is asked, not the few largest.
    best = (track.mass * open_to_us).topk(min(16, int(open_to_us.sum()))).indices
    return find_shape(
        cut_out(track.covered[best], track.x[best], track.y[best], track.spread_x[best], track.spread_y[best])
    )


# --- motion ---


def _find_motion(track: _Track) -> str | None:
    """The motion with most evidence, in parts of the least that the world shows of it; None for one frame."""
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
