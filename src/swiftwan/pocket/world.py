"""The world the pocket model knows, drawn: a few solid shapes, each in one motion, over a soft background.

A program draws it, so whether a generated clip is right can be computed (``pocket/judge.py``).

Lengths are in units: 128 of them span the shorter side of the picture, so every picture size shows the same scene,
larger. Shape letters: B clips, K two slots for things, F frames, H rows, W columns. x runs right, y down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from swiftwan.errors import RequestError
from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, PAIR_SCALE, RADII, SHAPES, Scene

_MARGIN = 2.0
_STARS = 16
_STAR_RGB = (176, 176, 214)
# Per plane: 512 clips take 0.13 s and 0.3 GB beside the result on an H200 (2**22: 0.33 s); a CPU gains too.
_CHUNK_PIXELS = 2**24


# --- drawing ---


def draw(
    scenes: list[Scene],
    seed: int,
    num_frames: int = 33,
    height: int = 128,
    width: int = 128,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw one clip per scene: float32 (B, 3, F, H, W) in [-1, 1].

    Clip ``i`` depends on its scene and on ``seed + i`` alone: ``draw([scenes[i]], seed + i)`` draws it again,
    and whoever draws batch after batch advances the seed by the batch size. A motion fills the clip whatever
    its number of frames; a single frame shows the middle of it.
    Raises RequestError for no scenes, no frames, or a side under 32 pixels.
    """
    if not scenes:
        raise RequestError("no scenes to draw; give at least one.")
    if num_frames < 1:
        raise RequestError(f"{num_frames} frames; a clip has at least 1.")
    if min(height, width) < 32:
        raise RequestError(f"{width}x{height} pixels; the world is drawn at 32x32 or more.")
    unit = min(height, width) / 128
    chance = _uniform(seed, len(scenes), 2 * _CHANCES + 3 + 4 * _STARS)
    tracks = _plan_tracks(scenes, chance[:, : 2 * _CHANCES], num_frames, torch.tensor([width, height]) / unit)
    tracks = tracks.scaled(unit).to(device)
    chance = chance[:, 2 * _CHANCES :].to(device)

    clips = torch.empty(len(scenes), 3, num_frames, height, width, device=device)
    step = max(1, _CHUNK_PIXELS // (num_frames * height * width))
    for start in range(0, len(scenes), step):
        part = slice(start, start + step)
        clips[part] = _draw_backgrounds(scenes[part], chance[part], height, width)[:, :, None]
        for slot in (0, 1):
            _paint_things(clips[part], scenes[part], tracks.part(part), slot)
    return clips.mul_(2).sub_(1)


def gradient(background: str, height: int, device: torch.device | str = "cpu") -> Tensor:
    """The colours of a background from top to bottom: (height, 3) in [0, 1]."""
    points = torch.tensor(BACKGROUNDS[background], device=device) / 255
    return _bezier(points[None], height)[0].T


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, width: Tensor) -> Tensor:
    """How much of each pixel a shape covers, in [0, 1]: the anti-aliased edge is one pixel wide.

    ``x`` (..., 1, W) and ``y`` (..., H, 1) are pixel offsets from the middle of the shape's bounding box;
    ``radius`` in pixels and ``width`` (1 from the front, 0.15 nearly edge-on) broadcast against both.
    """
    if shape == "circle":
        # The usual distance to an ellipse to first order: f / |grad f| of f = |p / r| - 1.
        x = x / (radius * width)
        y = y / radius
        k = (x.square() + y.square()).sqrt_()
        slope = ((x / (radius * width)).square() + (y / radius).square()).sqrt_().clamp_(min=1e-6)
        distance = (k - 1).mul_(k).div_(slope)
    else:
        distance = _polygon_distance(shape, x, y, radius, width)
    return distance.neg_().add_(0.5).clamp_(0, 1)


def half_extents(shape: str) -> tuple[float, float]:
    """Half the width and half the height of a shape's bounding box, for radius 1."""
    reach = _REACH[shape]
    return {
        "circle": (reach, reach),
        "square": (reach, reach),
        "triangle": (reach * math.sqrt(3) / 2, reach * 3 / 4),
        "star": (reach * math.sin(math.radians(72)), reach * (1 + math.cos(math.radians(36))) / 2),
    }[shape]


# Distance from the middle to a corner (square: to an edge), for radius 1; by eye, so that sizes look equal.
_REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.34, "star": 1.42}


@cache
def _half_planes(shape: str) -> list[tuple[float, float, float]]:
    """(nx, ny, c) of the half planes nx x + ny y <= c around the bounding box's middle, for radius 1."""
    reach = _REACH[shape]
    sides, first_degrees, inset = {
        "square": (4, 0.0, 1.0),
        "triangle": (3, 90.0, 0.5),
        "star": (5, -90.0, math.cos(math.radians(72))),
    }[shape]
    normals = [math.radians(first_degrees + 360 * i / sides) for i in range(sides)]
    middle_y = 0.0 if shape == "square" else reach - half_extents(shape)[1]
    return [(math.cos(a), math.sin(a), reach * inset + math.sin(a) * middle_y) for a in normals]


def _polygon_distance(shape: str, x: Tensor, y: Tensor, radius: Tensor, width: Tensor) -> Tensor:
    """Distance to the outermost violated edge; a five-pointed star may violate one of its five lines."""
    largest = second = torch.full((), -torch.inf, device=x.device)
    for nx, ny, c in _half_planes(shape):
        norm = (nx / width).square().add(ny * ny).sqrt()
        distance = x * (nx / width / norm) + (y * ny - c * radius) / norm
        if shape == "star":
            second = torch.maximum(second, torch.minimum(largest, distance))
        largest = torch.maximum(largest, distance)
    return second if shape == "star" else largest


def _draw_backgrounds(scenes: list[Scene], chance: Tensor, height: int, width: int) -> Tensor:
    """(B, 3, H, W) in [0, 1]: a gradient, its tone up to 3 % off from clip to clip, and stars at night."""
    device = chance.device
    points = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=device) / 255
    tone = 1 + 0.03 * (2 * chance[:, :3, None] - 1)
    rows = _bezier((points * tone).clamp(0, 1), height)
    pictures = rows[..., None].repeat(1, 1, 1, width)
    nights = [i for i, scene in enumerate(scenes) if scene.background == "night"]
    if nights:
        glow = _starlight(chance[nights, 3:].unflatten(1, (4, _STARS)), height, width)
        starlight = torch.tensor(_STAR_RGB, device=device)[None, :, None, None] / 255
        pictures[nights] = torch.lerp(pictures[nights], starlight, glow[:, None])
    return pictures


def _bezier(points: Tensor, height: int) -> Tensor:
    """(B, 3 control points, 3 channels) to (B, 3 channels, height)."""
    v = (torch.arange(height, device=points.device) + 0.5) / height
    weights = torch.stack([(1 - v) ** 2, 2 * v * (1 - v), v**2])
    return torch.einsum("bpc,ph->bch", points, weights)


def _starlight(chance: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, stars) random numbers to (B, H, W) in [0, 1]: small soft dots in the upper three quarters."""
    unit = min(height, width) / 128
    left, top, size, light = (column[..., None] for column in chance.unbind(1))
    x = torch.arange(width, device=chance.device) + 0.5 - left * width
    y = torch.arange(height, device=chance.device) + 0.5 - top**1.5 * 0.75 * height
    spread = 2 * ((0.6 + 0.4 * size) * unit) ** 2
    across = (0.4 + 0.6 * light) * torch.exp(-(x.square()) / spread)
    return torch.einsum("bsh,bsw->bhw", torch.exp(-(y.square()) / spread), across).clamp(max=1)


def _paint_things(clips: Tensor, scenes: list[Scene], tracks: Tracks, slot: int) -> None:
    """Paint the things of one slot over the clips (B, 3, F, H, W) in place, one shape at a time."""
    x = torch.arange(clips.shape[4], device=clips.device) + 0.5
    y = (torch.arange(clips.shape[3], device=clips.device) + 0.5)[:, None]
    for shape in SHAPES:
        chosen = [i for i, s in enumerate(scenes) if slot < len(s.things) and s.things[slot].shape == shape]
        if not chosen:
            continue
        centre_x, centre_y, radius, width = (
            track[chosen, slot, :, None, None] for track in (tracks.x, tracks.y, tracks.radius, tracks.width)
        )
        covered = coverage(shape, x - centre_x, y - centre_y, radius, width)[:, None]
        colours = [COLOURS[scenes[i].things[slot].colour] for i in chosen]
        paint = torch.tensor(colours, device=clips.device)[:, :, None, None, None] / 255
        clips[chosen] = torch.lerp(clips[chosen], paint, covered)


# --- where things are, frame by frame ---


@dataclass(frozen=True)
class Tracks:
    """Middle of the bounding box, radius, and width factor of each thing in each frame: (B, K, F) each."""

    x: Tensor
    y: Tensor
    radius: Tensor
    width: Tensor

    def scaled(self, unit: float) -> Tracks:
        return Tracks(self.x * unit, self.y * unit, self.radius * unit, self.width)

    def to(self, device: torch.device | str) -> Tracks:
        return Tracks(self.x.to(device), self.y.to(device), self.radius.to(device), self.width.to(device))

    def part(self, clips: slice) -> Tracks:
        return Tracks(self.x[clips], self.y[clips], self.radius[clips], self.width[clips])


_CHANCES = 7  # random numbers a thing uses


def _plan_tracks(scenes: list[Scene], chance: Tensor, num_frames: int, span: Tensor) -> Tracks:
    """Give each thing the box that its motion sweeps, place the boxes in the picture, move inside them."""
    tempo, reach, phase, growth, size, place_x, place_y = chance.unflatten(1, (2, _CHANCES)).unbind(2)
    pair = torch.tensor([len(scene.things) == 2 for scene in scenes])[:, None]
    slots = [scene.things if len(scene.things) == 2 else scene.things * 2 for scene in scenes]

    def moving(*motions: str) -> Tensor:
        return torch.tensor([[thing.motion in motions for thing in things] for things in slots])

    radius = torch.tensor([[RADII[thing.size] for thing in things] for things in slots])
    radius = radius * torch.where(pair, PAIR_SCALE, 1.0) * (0.96 + 0.08 * size)
    ratio = 2 + torch.where(pair, 0.2, 0.6) * growth
    ratio = torch.where(moving("grows"), ratio, torch.where(moving("shrinks"), 1 / ratio, 1.0))
    travel = 35 + torch.where(pair, 8.0, 25.0) * reach

    extents = torch.tensor([[half_extents(thing.shape) for thing in things] for things in slots])
    extents = extents * (radius * torch.maximum(ratio, 1 / ratio).sqrt())[..., None]
    along_x = moving("moves left", "moves right")
    along_y = moving("moves up", "moves down", "bounces")
    boxes = extents + torch.stack([along_x, along_y], dim=-1) * (travel / 2)[..., None]
    middle = _place(boxes, torch.stack([place_x, place_y], dim=-1), pair, span)

    # A single frame is the middle of the motion, a coin facing us, a ball at its highest.
    time = torch.linspace(-0.5, 0.5, num_frames) if num_frames > 1 else torch.zeros(1)
    phase = (phase if num_frames > 1 else torch.zeros_like(phase))[..., None]
    shift = travel[..., None] * time
    bounce = ((1.5 + tempo)[..., None] * time + phase + 0.5) % 1
    fall = travel[..., None] * (0.5 - 4 * bounce * (1 - bounce))
    turn = 2 * math.pi * ((1 + tempo)[..., None] * time + phase)
    signs_x = moving("moves right").float() - moving("moves left").float()
    signs_y = moving("moves down").float() - moving("moves up").float()
    return Tracks(
        x=middle[..., :1] + signs_x[..., None] * shift,
        y=middle[..., 1:] + signs_y[..., None] * shift + moving("bounces")[..., None] * fall,
        radius=radius[..., None] * ratio[..., None] ** time,
        width=torch.where(moving("spins")[..., None], turn.cos().abs().clamp(min=0.15), 1.0),
    )


def _place(boxes: Tensor, chance: Tensor, pair: Tensor, span: Tensor) -> Tensor:
    """Middles of the boxes, (B, K, xy): anywhere in the picture, two side by side or one above the other.

    ``boxes`` (B, K, xy) are half widths and heights, ``chance`` (B, K, xy) is random, ``span`` its size.
    """
    low, high = boxes + _MARGIN, span - _MARGIN - boxes
    alone = torch.lerp(low, torch.maximum(low, high), chance)
    # Two boxes share the axis that leaves more room; too large ones stand at its ends and overlap a little.
    room = span - 2 * _MARGIN - 2 * boxes.sum(1)
    gaps = room.clamp(min=0)[:, None] * chance.sort(1).values
    first = (low[:, 0] + gaps[:, 0], low[:, 1] + gaps[:, 1] + 2 * boxes[:, 0] + room.clamp(max=0))
    second = (low[:, 0] + gaps[:, 1] + 2 * boxes[:, 1] + room.clamp(max=0), low[:, 1] + gaps[:, 0])
    swap = (chance[:, :1, :] > chance[:, 1:, :])[:, 0]
    beside = torch.stack([torch.where(swap, b, a) for a, b in zip(first, second, strict=True)], dim=1)
    shared = room == room.amax(1, keepdim=True)
    return torch.where(pair[..., None] & shared[:, None], beside, alone)


# --- chance ---


def _uniform(seed: int, clips: int, count: int) -> Tensor:
    """(clips, count) numbers in [0, 1); row ``i`` depends on ``seed + i`` alone, on any machine.

    A generator per clip would cost more than the drawing; this is a hash of (seed + i, column):
    lowbias32 of github.com/skeeto/hash-prospector, on 32 bits held in int64.
    """
    seeds = [(seed + i) % 2**64 for i in range(clips)]
    low = torch.tensor([s % 2**32 for s in seeds])
    high = torch.tensor([s >> 32 for s in seeds])
    rows = _hash32(_hash32(low) ^ high)[:, None]
    bits = _hash32((rows + _hash32(torch.arange(1, count + 1))) % 2**32)
    return (bits >> 8).float() / 2**24


def _hash32(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)
