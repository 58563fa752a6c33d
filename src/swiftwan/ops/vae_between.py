"""What stands between two convolutions of the Wan VAE, in one pass over memory.

A convolution leaves its sum without bias. What follows it (bias, residual, RMS norm over the channels, SiLU) and
what the next one wants (the frames before the chunk in front, frames gathered in its channels) is pointwise, so
one kernel reads the sum and writes the next input; no padding, concatenation or activation passes through memory.

Shapes: T frames, H x W positions, C channels, channels last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """How a convolution reads frames: ``reach`` frames of the past with each, in one of three forms.

    - ``volume``: a 3D convolution over the chunk, (reach + T, H, W, C).
    - ``stacked``: a 2D one over frames stacked in the channels, (T, H, W, reach + 1, C).
    - ``winograd``: four 2D ones that make two frames, where plain ones take six (arXiv 1509.09308, F(2, 3) over
      time): sums and differences of the frames d0 to d3, (4, T / 2, H, W, C) of d0 - d2, d1 + d2, d2 - d1, d1 - d3.
    """

    form: Literal["volume", "stacked", "winograd"]
    reach: int

    def shape(self, frames: int, height: int, width: int, channels: int) -> tuple[int, ...]:
        match self.form:
            case "volume":
                return self.reach + frames, height, width, channels
            case "stacked":
                return frames, height, width, self.reach + 1, channels
            case "winograd":
                assert frames % 2 == 0
                return 4, frames // 2, height, width, channels


VOLUME, STACKED, WINOGRAD = Window("volume", 2), Window("stacked", 2), Window("winograd", 2)
"""The windows of a 3x3x3 convolution."""
POINT = Window("volume", 0)
"""The window of a convolution that reads its own frame only: (T, H, W, C)."""


class Products(NamedTuple):
    """What the four convolutions of a Winograd window made, each (T / 2, H, W, C)."""

    first: Tensor
    total: Tensor
    difference: Tensor
    last: Tensor


@dataclass(frozen=True)
class Repeated:
    """A residual of half the size, (T / factor_t, H / 2, W / 2, C'), each value repeated ``repeats`` times.

    The order is that of Wan2.2's up blocks: channel, then frame, row and column of the block of copies.
    """

    x: Tensor
    factor_t: int
    repeats: int

    def frames(self, frames: int, channels: int) -> Tensor:
        """(T, H, W, C). Where T is less than the copies in time, the last T of them: the clip's first frame is one."""
        t, h, w, _ = self.x.shape
        wide = self.x.repeat_interleave(self.repeats, dim=3).view(t, h, w, channels, self.factor_t, 2, 2)
        full = wide.permute(0, 4, 1, 5, 2, 6, 3).reshape(t * self.factor_t, 2 * h, 2 * w, channels)
        return full[full.shape[0] - frames :]


@dataclass(frozen=True)
class Sum:
    """What a convolution left behind: ``y`` plus ``bias`` plus ``residual``, not yet added up.

    y is (T, H, W, C), contiguous; or four products; or, behind a folded upsampling (:func:`fold_upsample`),
    (T, H / 2 + 1, W / 2 + 1, 2, 2, C), where the value of row 2 i + a, column 2 j + b stands at [i + a, j + b, a, b].
    """

    y: Tensor | Products
    bias: Tensor | None = None
    residual: Tensor | Repeated | None = None

    @property
    def tensor(self) -> Tensor:
        """y, or the first of its products."""
        return self.y.first if isinstance(self.y, Products) else self.y

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of the sum."""
        if isinstance(self.y, Products):
            pairs, height, width, channels = self.y.first.shape
            return 2 * pairs, height, width, channels
        if self.y.ndim == 6:
            frames, rows, columns, _, _, channels = self.y.shape
            return frames, 2 * (rows - 1), 2 * (columns - 1), channels
        frames, height, width, channels = self.y.shape
        return frames, height, width, channels

    def split(self, frames: int) -> Iterator[Sum]:
        """The same sum, so many frames at a time; of a y in order or folded, and a residual that is none or repeated
        in space alone: what an upsampling leaves."""
        assert isinstance(self.y, Tensor)
        assert isinstance(self.residual, Repeated | None)
        count = -(-self.shape[0] // frames)
        residuals: Iterable[Repeated | None] = [None] * count
        if self.residual is not None:
            assert self.residual.factor_t == 1
            residuals = (replace(self.residual, x=part) for part in self.residual.x.split(frames))
        for y, residual in zip(self.y.split(frames), residuals, strict=True):
            yield replace(self, y=y, residual=residual)


@dataclass(frozen=True)
class Step:
    """What happens to a sum on its way into a convolution's ``window``: norm and SiLU where ``gamma`` is given."""

    window: Window
    gamma: Tensor | None = None
    silu: bool = False
    keep: bool = False
    """Also return the sum itself, for a residual."""


@dataclass(frozen=True)
class Entered:
    """``buffer`` in the window's shape, ``past`` (reach, H, W, C) for the next chunk, and the sum if kept."""

    buffer: Tensor
    past: Tensor | None
    kept: Tensor | None


def enter(total: Sum, step: Step, past: Tensor | None) -> Entered:
    """Add up, keep, normalise, and lay out as the next convolution reads it.

    Sums and norms are float32; what is stored is rounded once. ``past`` None counts as zeros.
    CUDA tensors go through a Triton kernel, all others through :func:`enter_plain`.
    """
    if not total.tensor.is_cuda:
        return enter_plain(total, step, past)
    from swiftwan.ops import vae_between_triton  # triton is there only where CUDA is

    return vae_between_triton.enter(total, step, past)


def enter_plain(total: Sum, step: Step, past: Tensor | None) -> Entered:
    """The reference of :func:`enter`."""
    frames, _, _, channels = total.shape
    dtype, window = total.tensor.dtype, step.window
    x = _in_order(total.y).float()
    if total.bias is not None:
        x = x + total.bias.float()
    if total.residual is not None:
        residual = total.residual
        x = x + (residual.frames(frames, channels) if isinstance(residual, Repeated) else residual).float()
    kept = x.to(dtype) if step.keep else None
    if step.gamma is not None:
        x = x * x.square().mean(dim=3, keepdim=True).clamp_min(1e-24).rsqrt() * step.gamma.float().flatten()
    if step.silu:
        x = F.silu(x)
    if window.reach:
        x = torch.cat((x.new_zeros(window.reach, *x.shape[1:]) if past is None else past.float(), x))
        past = x[-window.reach :].to(dtype, copy=True)
    if window.form == "winograd":
        d0, d1, d2, d3 = x[:-2:2], x[1:-1:2], x[2::2], x[3::2]
        return Entered(torch.stack((d0 - d2, d1 + d2, d2 - d1, d1 - d3)).to(dtype), past, kept)
    x = x.to(dtype)
    if window.form == "stacked":
        x = x.unfold(0, window.reach + 1, 1).transpose(3, 4).contiguous()
    return Entered(x, past, kept)


def _in_order(y: Tensor | Products) -> Tensor:
    """Any y of a :class:`Sum` -> (T, H, W, C)."""
    if isinstance(y, Products):
        first, total, difference, last = (part.float() for part in y)
        return torch.stack((first + total + difference, total - difference - last), dim=1).flatten(0, 1)
    if y.ndim == 4:
        return y
    rows, columns = y.shape[1] - 1, y.shape[2] - 1
    phases = [[y[:, a : a + rows, b : b + columns, a, b] for b in (0, 1)] for a in (0, 1)]
    return torch.stack([torch.stack(row, dim=3) for row in phases], dim=2).flatten(3, 4).flatten(1, 2)


def gather_taps(products: Tensor, past: Tensor | None, bias: Tensor) -> Tensor:
    """The sums of a 3x3x3 convolution whose products were made position by position: (O, T, H, W).

    A convolution to 3 channels leaves most of a tensor core idle. As one matrix product with all 27 taps in the rows,
    and this sum of shifted planes behind it, it costs one pass over the input and one over the products.

    Args:
        products: (27 O, T, H, W), rows in the order frame, row, column, output channel.
        past: (27 O, 2, H, W), the same of the two frames before; None counts as zeros.
        bias: (O,).
    """
    if not products.is_cuda:
        return gather_taps_plain(products, past, bias)
    from swiftwan.ops import vae_between_triton

    return vae_between_triton.gather_taps(products, past, bias)


def gather_taps_plain(products: Tensor, past: Tensor | None, bias: Tensor) -> Tensor:
    """The reference of :func:`gather_taps`."""
    _, frames, height, width = products.shape
    before = products.new_zeros(products.shape[0], 2, height, width) if past is None else past
    planes = F.pad(torch.cat((before, products), dim=1).float(), (1, 1, 1, 1)).unflatten(0, (3, 3, 3, -1))
    total = bias.float().view(-1, 1, 1, 1).expand(-1, frames, height, width)
    for t, i, j in product(range(3), repeat=3):
        total = total + planes[t, i, j, :, t : t + frames, i : i + height, j : j + width]
    return total.to(products.dtype)


# Weights


def stack_taps(weight: Tensor) -> Tensor:
    """(O, I, taps, h, w) -> (O, taps I, h, w): the same convolution over stacked frames."""
    return weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def winograd_taps(weight: Tensor) -> tuple[Tensor, ...]:
    """(O, I, 3, h, w) -> the four (O, I, h, w) of :class:`Products`; sums are taken in float32 and rounded once."""
    early, present, late = weight.float().unbind(2)
    planes = (early, (early + present + late) / 2, (early - present + late) / 2, late)
    return tuple(plane.to(weight.dtype).contiguous(memory_format=torch.channels_last) for plane in planes)


def fold_upsample(weight: Tensor) -> Tensor:
    """A 3x3 convolution behind a nearest upsampling by 2, as a 2x2 one before it: (O, I, 3, 3) -> (4 O, I, 2, 2).

    Of three neighbouring rows of the large image, two are copies of one small row: so each of the four kinds of
    output position sees 2 x 2 small positions, and needs 4 products a channel instead of 9. The result, on an image
    padded by 1, is the folded y of :class:`Sum`. Sums of weights are taken in float32 and rounded once.
    """
    # [output row's parity, small row, row of the kernel]
    rows = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32)
    folded = torch.einsum("auk,bvl,oikl->aboiuv", rows, rows, weight.float()).flatten(0, 2)
    return folded.to(weight.dtype).contiguous(memory_format=torch.channels_last)
