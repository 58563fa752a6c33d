"""Run the layers of a VAE over overlapping squares of each frame, chunk by chunk, and blend the results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from swiftwan.errors import RequestError
from swiftwan.models.vae_blocks import Stream


@dataclass(frozen=True)
class Tiling:
    """Run the VAE on overlapping squares of each frame: less memory, slightly other numbers.

    ``sample`` is the side of a square and ``stride`` the distance between two, both in pixels.
    """

    sample: int = 256
    stride: int = 192

    def over(self, factor: int) -> Tiling:
        """The same squares, counted in cells of ``factor`` x ``factor`` pixels.

        Raises:
            RequestError: the squares do not consist of whole cells, or leave gaps.
        """
        if self.sample % factor or self.stride % factor or not 0 < self.stride <= self.sample:
            raise RequestError(
                f"tiling has sample {self.sample} and stride {self.stride}; this VAE needs multiples of "
                f"{factor} with 0 < stride <= sample. Default: 256 and 192."
            )
        return Tiling(self.sample // factor, self.stride // factor)


class Tiles:
    """The chunks of one clip through ``layers``, each square with a stream of its own.

    ``cut`` is the tiling in positions of the input, ``paste`` the same in positions of the output;
    None for both runs each chunk whole.
    """

    def __init__(self, layers: Callable[[Tensor, Stream], Tensor], cut: Tiling | None, paste: Tiling | None) -> None:
        self.layers, self.cut, self.paste = layers, cut, paste
        self.streams: defaultdict[tuple[int, int], Stream] = defaultdict(Stream)

    @property
    def nbytes(self) -> int:
        """Bytes held between two chunks."""
        return sum(stream.nbytes for stream in self.streams.values())

    def __call__(self, x: Tensor) -> Tensor:
        if self.cut is None or self.paste is None or max(x.shape[3:]) <= self.cut.sample:
            return self.layers(x, self.streams[0, 0])
        cut, kept, overlap = self.cut, self.paste.stride, self.paste.sample - self.paste.stride
        rows: list[Tensor] = []
        above: list[Tensor] = []
        for top in range(0, x.shape[3], cut.stride):
            row: list[Tensor] = []
            for left in range(0, x.shape[4], cut.stride):
                square = x[:, :, :, top : top + cut.sample, left : left + cut.sample]
                tile = self.layers(square, self.streams[top, left])
                if above:
                    tile = _blend(above[len(row)], tile, overlap, dim=3)
                if row:
                    tile = _blend(row[-1], tile, overlap, dim=4)
                row.append(tile)
            rows.append(torch.cat([tile[:, :, :, :kept, :kept] for tile in row], dim=4))
            above = row
        return torch.cat(rows, dim=3)


def _blend(before: Tensor, tile: Tensor, overlap: int, dim: int) -> Tensor:
    """Fade along ``dim`` from ``before`` to ``tile``, whose ends overlap."""
    overlap = min(before.shape[dim], tile.shape[dim], overlap)
    weight = torch.arange(overlap, device=tile.device, dtype=tile.dtype) / max(overlap, 1)
    weight = weight.view(-1, *[1] * (tile.ndim - 1 - dim))
    old = before.narrow(dim, before.shape[dim] - overlap, overlap)
    new, rest = tile.split([overlap, tile.shape[dim] - overlap], dim)
    return torch.cat((old * (1 - weight) + new * weight, rest), dim)
