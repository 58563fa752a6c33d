"""The images and the video that a request brings: read, checked, and fitted to its size.

Fitting keeps the aspect: the picture is scaled until it covers the size, and what sticks out is cut off evenly on
both sides. Whatever was done to a picture is said in its :class:`Input`, which travels in the result.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from swiftwan.errors import RequestError, reason
from swiftwan.models.config import Defaults
from swiftwan.pipelines.request import Blend, Grid, Request, VideoToVideo

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAX_PIXELS = 2**26
"""8192 x 8192: a file of a few KB can hold more, and would take all memory."""
MAX_BYTES = 2**31
MAX_ASPECT = 4.0
"""A longer picture is cut to this aspect where no size is asked for."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
_CONTAINERS = {b"ftyp": "mov,mp4,m4a,3gp,3g2,mj2", b"\x1aE\xdf\xa3": "matroska,webm", b"RIFF": "avi"}


@dataclass(frozen=True)
class Input:
    """One image or video, as a run used it.

    Attributes:
        name: the file as the request names it, or ``memory``.
        sha256: of the file's bytes; of the pixels where there is no file.
        fitted: how it was brought to the run's size and mode; empty if nothing was done to it.
    """

    name: str
    sha256: str
    fitted: str

    def __str__(self) -> str:
        return f"{self.name}: {self.fitted or 'used as it is'}"


@dataclass(frozen=True)
class Given:
    """The pixels that a request brings, uint8 (N, F, H, W, 3) on the CPU, and what is known of each."""

    pixels: Tensor
    inputs: tuple[Input, ...]


def sized(request: Request, defaults: Defaults, grid: Grid) -> Request:
    """Fill the size that was not asked for: the model's area in the input's aspect, on the model's grid.

    A video also brings its frame rate, and its length as far as the model's default goes.

    Raises:
        RequestError: an input cannot be read, is too large, or a blend's images differ in size.
    """
    if isinstance(request, VideoToVideo):
        clip = clip_facts(request.video)
        most = min(clip.frames, defaults.num_frames)
        whole = (most - 1) // grid.temporal * grid.temporal + 1
        request = replace(
            request,
            num_frames=request.num_frames or whole,
            fps=request.fps or min(max(round(clip.fps or defaults.fps), 1), 240),
        )
        if (request.num_frames or 0) > clip.frames:
            raise RequestError(
                f"num_frames is {request.num_frames}, and the video '{_name(request.video)}' has {clip.frames}; "
                f"take {whole} or fewer."
            )
        sizes = [clip.size]
    else:
        sizes = [read_image(name, source)[0].size for name, source in request.sources().items()]
    if not sizes:
        return request
    if isinstance(request, Blend) and len(set(sizes)) > 1:
        told = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise RequestError(f"the images of a blend differ in size ({told}); crop or scale them to one size first.")
    width, height = _size_on_grid(sizes[0], request, defaults, grid.spatial)
    return replace(request, width=width, height=height)


def _size_on_grid(size: tuple[int, int], request: Request, defaults: Defaults, cell: int) -> tuple[int, int]:
    """As the official code sizes a video by its image: ``generate`` in wan/image2video.py."""
    aspect = min(max(size[1] / size[0], 1 / MAX_ASPECT), MAX_ASPECT)
    width, height = request.width, request.height
    if width is None and height is None:
        area = defaults.width * defaults.height
        width = max(cell, round(math.sqrt(area / aspect)) // cell * cell)
        height = max(cell, round(math.sqrt(area * aspect)) // cell * cell)
    elif width is None:
        assert height is not None
        width = max(cell, round(height / aspect / cell) * cell)
    elif height is None:
        height = max(cell, round(width * aspect / cell) * cell)
    return width, height


def read(request: Request) -> Given | None:
    """The pixels of a completed request's inputs, fitted to its size; None for a request of words alone.

    Raises:
        RequestError: a file cannot be read.
    """
    import torch

    assert request.width is not None
    assert request.height is not None
    size = request.width, request.height
    if isinstance(request, VideoToVideo):
        assert request.num_frames is not None
        pixels, given = _read_video(request.video, size, request.num_frames)
        return Given(pixels[None], (given,))
    images = [fitted(name, source, size) for name, source in request.sources().items()]
    if not images:
        return None
    return Given(torch.stack([pixels for pixels, _ in images])[:, None], tuple(given for _, given in images))


def sha256_of(source: str | Path) -> str:
    """Of a file's bytes.

    Raises:
        RequestError: there is no such file.
    """
    return hashlib.sha256(_bytes("input", source)).hexdigest()


# Images


def fitted(name: str, source: Any, size: tuple[int, int]) -> tuple[Tensor, Input]:
    """An image as uint8 (H, W, 3) of a size, and what was done to it.

    Raises:
        RequestError: it cannot be read; the message begins with ``name``.
    """
    image, sha256, told = read_image(name, source)
    image, cut = cover(image, size)
    return _pixels(image), Input(_name(source), sha256, ", ".join([*told, *cut]))


def cover(image: Image, size: tuple[int, int]) -> tuple[Image, list[str]]:
    """Scale an image to cover a size and cut off the rest; also say what was done, in words."""
    from PIL import Image

    if image.size == size:
        return image, []
    scale = max(size[0] / image.width, size[1] / image.height)
    kept = size[0] / scale, size[1] / scale
    left, top = (image.width - kept[0]) / 2, (image.height - kept[1]) / 2
    box = (left, top, left + kept[0], top + kept[1])
    told = []
    if left >= 0.5 or top >= 0.5:
        told.append(f"cropped from {image.width}x{image.height} to {kept[0]:.0f}x{kept[1]:.0f}")
    if round(scale, 3) != 1:
        start = "" if told else f" from {image.width}x{image.height}"
        told.append(f"scaled{start} to {size[0]}x{size[1]}")
    return image.resize(size, Image.Resampling.LANCZOS, box=box), told


def read_image(name: str, source: Any) -> tuple[Image, str, list[str]]:
    """An image upright and in RGB, its hash, and what that took."""
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        image, sha256 = source, hashlib.sha256(source.tobytes()).hexdigest()
        _check_pixels(name, "in memory", image.size)
    else:
        data = _bytes(name, source)
        sha256 = hashlib.sha256(data).hexdigest()
        image = _decoded(name, source, data)
    told = []
    if image.getexif().get(274, 1) != 1:  # orientation: a phone's picture may lie on its side
        image = ImageOps.exif_transpose(image)
        told.append("turned upright as its EXIF says")
    if image.mode not in _MODES:
        raise RequestError(
            f"{name} '{_name(source)}' has mode {image.mode}, not 8 bits a channel; save it as 8-bit RGB first."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
        told.append("transparency laid over white")
    elif image.mode != "RGB":
        told.append(f"made RGB from mode {image.mode}")
        image = image.convert("RGB")
    return image, sha256, told


def _decoded(name: str, source: Any, data: bytes) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_pixels(name, source, image.size)
        if (pictures := getattr(image, "n_frames", 1)) > 1:
            raise RequestError(f"{name} '{source}' holds {pictures} pictures; give one, or a video (--video).")
        image.load()
    except Image.DecompressionBombError:
        raise RequestError(f"{name} '{source}' has more pixels than the {MAX_PIXELS} allowed; scale it down.") from None
    except UnidentifiedImageError:
        raise RequestError(f"{name} '{source}' is no image of a known kind ({', '.join(_FORMATS)}).") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, MemoryError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{name} '{source}' is damaged: {reason(error)}.") from None
    return image


def _check_pixels(name: str, source: Any, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise RequestError(
            f"{name} '{source}' is {size[0]}x{size[1]}, more than the {MAX_PIXELS} pixels allowed; scale it down."
        )


def _bytes(name: str, source: str | Path) -> bytes:
    try:
        path = Path(source)
        if path.stat().st_size > MAX_BYTES:
            raise RequestError(f"{name} '{source}' has more than the {MAX_BYTES} bytes allowed; make it smaller.")
        return path.read_bytes()
    except FileNotFoundError:
        raise RequestError(f"{name} '{source}' does not exist.") from None
    except IsADirectoryError:
        raise RequestError(f"{name} '{source}' is a folder; give a file in it.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"{name} '{source}' cannot be read: {reason(error)}.") from None


def _pixels(image: Image) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image))


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "memory"


# Videos


@dataclass(frozen=True)
class ClipFacts:
    """Width and height, frames, and frames per second where the file says so."""

    size: tuple[int, int]
    frames: int
    fps: float | None


def clip_facts(video: str | Path | Sequence[Image]) -> ClipFacts:
    """Size, length and rate of a video; its first frame alone is decoded.

    Raises:
        RequestError: it cannot be read.
    """
    import av

    if not isinstance(video, str | Path):
        if not video:
            raise RequestError("the video has no frames; give one or more.")
        return ClipFacts(video[0].size, len(video), None)
    with _Opened(video) as container:
        stream = container.streams.video[0]
        first = next(_decode(video, container), None)
        if first is None:
            raise RequestError(f"video '{video}' has no frames.")
        _check_pixels("video", video, first.size)
        container.seek(0)
        try:
            # Headers may say nothing, or what is not so; packets are counted without decoding them.
            frames = sum(packet.size > 0 for packet in container.demux(stream))
        except av.FFmpegError as error:
            raise RequestError(f"video '{video}' is damaged: {reason(error)}.") from None
        return ClipFacts(first.size, frames, float(stream.average_rate) if stream.average_rate else None)


def _read_video(video: str | Path | Sequence[Image], size: tuple[int, int], num_frames: int) -> tuple[Tensor, Input]:
    import torch

    told: list[str] = []
    frames: list[Tensor] = []
    if isinstance(video, str | Path):
        sha256 = hashlib.sha256(_bytes("video", video)).hexdigest()
        with _Opened(video) as container:
            for image in _decode(video, container):
                if len(frames) == num_frames:
                    told.append(f"its first {num_frames} frames")
                    break
                fitted, cut = cover(image, size)
                frames.append(_pixels(fitted))
    else:
        digest = hashlib.sha256()
        for image in video[:num_frames]:
            digest.update(image.tobytes())
            fitted, cut = cover(image.convert("RGB"), size)
            frames.append(_pixels(fitted))
        sha256 = digest.hexdigest()
        if len(video) > num_frames:
            told.append(f"its first {num_frames} frames")
    if len(frames) < num_frames:
        raise RequestError(f"video '{_name(video)}' is damaged: only {len(frames)} of {num_frames} frames can be read.")
    return torch.stack(frames), Input(_name(video), sha256, ", ".join([*told, *cut]))


def video_frames(video: str | Path) -> Iterator[Image]:
    """Frames of a file in order, upright, one held at a time.

    Raises:
        RequestError: it cannot be read, or breaks off.
    """
    with _Opened(video) as container:
        yield from _decode(video, container)


def _decode(video: str | Path, container: Any) -> Iterator[Image]:
    """Frames in order, upright."""
    import av

    try:
        for frame in container.decode(video=0):
            image = frame.to_image()
            yield image.rotate(frame.rotation, expand=True) if frame.rotation else image
    except (av.FFmpegError, ValueError) as error:
        raise RequestError(f"video '{video}' is damaged: {reason(error)}.") from None


class _Opened:
    """A video file opened by us, its format fixed by its first bytes, so that no playlist can open another file."""

    def __init__(self, video: str | Path) -> None:
        self.video = video

    def __enter__(self) -> Any:
        import av

        data = _bytes("video", self.video)
        kind = next((kind for mark, kind in _CONTAINERS.items() if mark in (data[:4], data[4:8])), None)
        if kind is None:
            raise RequestError(f"video '{self.video}' is no .mp4, .mov, .mkv, .webm or .avi.")
        try:
            self.container = av.open(io.BytesIO(data), format=kind.split(",")[0])
        except (av.FFmpegError, ValueError) as error:
            raise RequestError(f"video '{self.video}' is damaged: {reason(error)}.") from None
        if not self.container.streams.video:
            self.container.close()
            raise RequestError(f"'{self.video}' holds no video.")
        return self.container

    def __exit__(self, *_: object) -> None:
        self.container.close()
