"""Which shape each clip trains in, and which clips train together.

A clip keeps its aspect as nearly as the model's grid allows, and never has more pixels than asked for. Its frames are
taken at the model's rate, so that motion keeps its speed; a long clip gives several items, one behind the other.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from swiftwan.errors import RequestError
from swiftwan.models.config import KnownModel
from swiftwan.pipelines.request import Grid
from swiftwan.train.data import Clip
from swiftwan.train.loop import seed_of


@dataclass(frozen=True, order=True)
class Bucket:
    """A shape that items share: pixels and frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Item:
    """A piece of a clip in the shape of a bucket.

    Attributes:
        indices: of the clip's frames, as stored, that stand for the bucket's.
    """

    clip: Clip
    bucket: Bucket
    indices: tuple[int, ...]

    @property
    def caption(self) -> str:
        return self.clip.caption


@dataclass(frozen=True)
class Shapes:
    """The buckets of a run.

    Args:
        grid: what the model divides.
        area: most pixels of a frame.
        frames: most frames of an item, 4k + 1; shorter clips take three quarters, a half or a quarter of it.
        fps: frames a second that the model was trained on.
        patch: pixels and frames to a token.
    """

    grid: Grid
    area: int
    frames: int
    fps: float
    patch: tuple[int, int]

    @classmethod
    def of(cls, known: KnownModel, width: int, height: int, frames: int) -> Shapes:
        """For a model; sizes that are not on its grid raise RequestError."""
        stride = known.vae.scale_factor_spatial * known.transformer.patch_size[1]
        grid = Grid(spatial=stride, temporal=known.vae.scale_factor_temporal)
        grid.check_size("width", width)
        grid.check_size("height", height)
        grid.check_frames(frames)
        return cls(grid, width * height, frames, known.defaults.fps, (grid.temporal, stride))

    @property
    def lengths(self) -> list[int]:
        """Frames of an item, longest first."""
        step = self.grid.temporal
        parts = {(self.frames - 1) * quarters // 4 // step * step + 1 for quarters in (1, 2, 3, 4)}
        return sorted(parts - {1} or {self.frames}, reverse=True)

    def tokens(self, bucket: Bucket) -> int:
        """What the transformer sees of an item."""
        step, cell = self.patch
        return ((bucket.frames - 1) // step + 1) * (bucket.width // cell) * (bucket.height // cell)

    def size(self, clip: Clip) -> tuple[int, int]:
        """Width and height on the grid, of the clip's aspect, within the area and not larger than the clip."""
        cell, aspect = self.grid.spatial, clip.width / clip.height
        area = min(self.area, max(clip.width * clip.height, cell * cell))
        width = max(1, round(math.sqrt(area * aspect) / cell))
        height = max(1, round(math.sqrt(area / aspect) / cell))
        while width * height * cell * cell > self.area:
            if width > height:
                width -= 1
            else:
                height -= 1
        return width * cell, height * cell

    def items(self, clip: Clip) -> list[Item]:
        """Cut a clip into items, the longest that fit first; frames behind the last one are not used.

        Raises:
            RequestError: it is shorter than the shortest item.
        """
        width, height = self.size(clip)
        if clip.is_image:
            return [Item(clip, Bucket(width, height, 1), (0,))]
        items, at = [], 0
        for length in self.lengths:
            while self.duration(clip) - at >= length:
                indices = tuple(self._stored(clip, at + i) for i in range(length))
                items.append(Item(clip, Bucket(width, height, length), indices))
                at += length
        if not items:
            raise RequestError(
                f"too short: {self.duration(clip)} frames at {self.fps:g} a second; the shortest item has "
                f"{self.lengths[-1]}; take fewer --frames"
            )
        return items

    def duration(self, clip: Clip) -> int:
        """A clip's frames at the model's rate."""
        return 1 if clip.is_image else int((clip.frames - 1) / self._step(clip)) + 1

    def _stored(self, clip: Clip, frame: int) -> int:
        return min(round(frame * self._step(clip)), clip.frames - 1)

    def _step(self, clip: Clip) -> float:
        return (clip.fps or self.fps) / self.fps


def batches(items: Sequence[Item], shapes: Shapes, token_budget: int, *, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches, as numbers of items: each item once, one shape a batch, within a budget of tokens.

    A batch holds one item at least. The same seed and epoch give the same batches; their number is that of every epoch.
    """
    chance = random.Random(seed_of(seed, epoch))
    buckets: dict[Bucket, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        buckets[item.bucket].append(number)
    made = []
    for bucket in sorted(buckets):
        numbers = buckets[bucket]
        chance.shuffle(numbers)
        size = max(1, token_budget // shapes.tokens(bucket))
        made += [numbers[start : start + size] for start in range(0, len(numbers), size)]
    chance.shuffle(made)
    return made


def hold_out(items: Sequence[Item], share: float) -> tuple[list[Item], list[Item]]:
    """Split into items to train on and items of clips kept aside, chosen by content: the same whatever the order.

    At least one clip is kept where there are five or more and the share is not 0.
    """
    clips = sorted({item.clip.sha256 for item in items})
    count = round(share * len(clips)) or int(share > 0 and len(clips) >= 5)
    aside = set(clips[:count])
    return [i for i in items if i.clip.sha256 not in aside], [i for i in items if i.clip.sha256 in aside]
