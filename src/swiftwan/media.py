"""Write and read videos and images; the record of the run travels inside the file.

A file appears whole or not at all: it is encoded in memory, written beside its destination, flushed to the
disk, then renamed. The same frames give the same bytes on the same machine.
"""

from __future__ import annotations

import errno
import io
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from swiftwan.errors import OutputError, RequestError, UnavailableError, did_you_mean, reason
from swiftwan.whole_file import beside, replacing

if TYPE_CHECKING:
    from torch import Tensor

ENDINGS = (".mp4", ".png")

_TAG = "swiftwan"

# x264's output depends on its number of threads, so it is fixed. Each takes a frame: in slices, as PyAV has it unless
# told otherwise, all wait for one another at every frame, and files of flat colours, texture and noise are 21, 6 and
# 0.5 % larger. 81 frames of noise at 832x480 on 16 cores: 1.24 s in slices; 0.94, 1.41 (one thread that looks ahead is
# too few for eight), 0.47 and 0.47 s with 4, 8, 12 and 16 threads, of texture 0.33, 0.23, 0.20 and 0.20 s.
_X264_THREADS = 12

# RGB to yuv420p is 2 to 6 ms a frame, all that one thread would do if it encoded beside.
_CONVERTERS = 4
_CONVERTED_AHEAD = 16  # frames, so that a long clip is not in memory twice

# Half to a third of medium's work for its quality, if crf is 1.5 lower. 81 frames of 832x480 in seconds of CPU, MB, dB
# (of the yuv420p picture) and SSIM, medium at crf 18 and veryfast at 16.5: flat colours 1.53, 0.53, 59.5, 0.9992 and
# 0.60, 0.60, 59.4, 0.9993; textured 1.67, 2.0, 42.4, 0.982 and 0.86, 2.8, 42.8, 0.986; white noise 7.5, 19.4, 33.5,
# 0.9930 and 2.3, 20.6, 33.7, 0.9938. Of the frames that it looks ahead, 10 for 40, fewer are left when the last comes.
_X264_PRESET = "veryfast"
_BELOW_MEDIUM = 1.5


@dataclass(frozen=True)
class MediaFacts:
    """What a file holds; sizes in pixels, fps None for an image."""

    width: int
    height: int
    num_frames: int
    fps: float | None
    codec: str
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write(path: Path, frames: Tensor, *, fps: float, quality: int = 8, record: dict[str, Any]) -> Path:
    """Write frames as an .mp4 (H.264, yuv420p, BT.709) or, for one frame, a .png.

    Args:
        path: where to; an existing file is replaced.
        frames: uint8 (F, H, W, 3), on the CPU.
        fps: frames per second.
        quality: 1 (small) to 10 (visually lossless): what x264's medium gives at CRF 40 to 12.
        record: what made the frames; read back by :func:`read_record`.

    Raises:
        OutputError: the file cannot be written there; nothing is left behind.
        RequestError: quality is out of range.
        UnavailableError: this build of PyAV has no H.264 encoder.
    """
    num_frames, height, width, _ = frames.shape
    size = {"num_frames": num_frames, "height": height, "width": width}
    with writing(path, **size, fps=fps, quality=quality, record=record) as add:
        add(frames)
    return Path(path)


@contextmanager
def writing(
    path: Path, *, num_frames: int, height: int, width: int, fps: float, quality: int = 8, record: dict[str, Any]
) -> Iterator[Callable[[Tensor], None]]:
    """Write as :func:`write` does, to the byte, frames that come in pieces: yields what takes the next (F, H, W, 3).

    That returns at once: a thread encodes beside whatever makes the next piece. The file appears when the block ends,
    and not at all if it raises.
    """
    path = Path(path)
    _check_name(path, num_frames=num_frames, height=height, width=width)
    if not 1 <= quality <= 10:
        raise RequestError(f"quality is {quality}; allowed: 1 (small) to 10 (visually lossless).")
    # ASCII, so that a prompt in any script fits a PNG's Latin-1 text and survives a file's round trip.
    text = json.dumps(record)
    buffer = io.BytesIO()
    if path.suffix.lower() == ".png":
        encoding = _png(buffer, text)
    else:
        crf = round(40 - (quality - 1) * 28 / 9) - _BELOW_MEDIUM
        encoding = _mp4(buffer, height=height, width=width, fps=fps, crf=crf, text=text)
    with encoding as add:
        yield add
    _write_whole(path, buffer.getvalue())


def check_writable(path: Path, *, num_frames: int, height: int, width: int) -> None:
    """Raise now what :func:`write` would raise after the run, for every reason that is already known.

    Raises:
        OutputError: the ending is not .mp4 or .png, a .png would have many frames, the folder is missing or
            not writable, the path is a folder, or the disk has too little room.
    """
    path = Path(path)
    with _told(path):
        if path.is_dir():
            raise OutputError(f"'{path}' is a folder; give the name of a file in it.")
        _check_name(path, num_frames=num_frames, height=height, width=width)
        if not path.parent.is_dir():
            raise OutputError(f"the folder '{path.parent}' does not exist; create it or choose another.")
        with beside(path) as probe:
            probe.write_bytes(b"?")
        free = shutil.disk_usage(path.parent).free
    # White noise at quality 10, the worst there is, takes 0.94 bytes a pixel; a PNG at most its raw three.
    need = num_frames * height * width * (3 if path.suffix.lower() == ".png" else 1) + 2**20
    if free < need:
        raise OutputError(
            f"the disk of '{path.parent}' has {free / 2**20:.1f} MiB free, and '{path.name}' may need "
            f"{need / 2**20:.1f} MiB; free some or write elsewhere."
        )


def read_record(path: Path) -> dict[str, Any]:
    """Return the record that :func:`write` put into an .mp4 or .png.

    Raises:
        OutputError: the file is missing, is neither of the two, or carries no swiftwan record.
    """
    path = Path(path)
    if _kind(path) == ".png":
        with _open_png(path) as image:
            text = image.info.get(_TAG, "")
    else:
        with _open_mp4(path) as container:
            tags = container.metadata
            # `ffmpeg -c copy` drops tags it does not know and keeps the comment, which holds the record too.
            text = tags.get(_TAG) or tags.get("comment", "").removeprefix(_TAG)
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("request"), dict):
        raise OutputError(f"'{path}' carries no swiftwan record; only files that swiftwan wrote do.")
    return record


def read_frames(path: Path) -> Tensor:
    """Return the frames of an .mp4 or .png as uint8 (F, H, W, 3).

    Raises:
        OutputError: the file is missing, damaged, or neither of the two.
    """
    import numpy as np
    import torch

    path = Path(path)
    if _kind(path) == ".png":
        with _open_png(path) as image:
            images = [np.array(image.convert("RGB"))]
    else:
        with _open_mp4(path) as container:
            images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(images))


def media_facts(path: Path) -> MediaFacts:
    """Return what the headers of an .mp4 or .png say; no frame is decoded.

    Raises:
        OutputError: the file is missing or neither of the two.
    """
    path = Path(path)
    kind = _kind(path)
    size = path.stat().st_size
    if kind == ".png":
        with _open_png(path) as image:
            width, height = image.size
        return MediaFacts(width, height, 1, None, "png", size)
    with _open_mp4(path) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate) if stream.average_rate else None
        return MediaFacts(stream.width, stream.height, stream.frames, fps, stream.codec_context.name, size)


def h264_problem() -> str | None:
    """Return why this installation cannot write H.264; None if it can."""
    import av

    try:
        av.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        return f"PyAV {av.__version__} has no libx264 encoder; the wheels on PyPI do: 'pip install -U av'"
    return None


def _check_name(path: Path, *, num_frames: int, height: int, width: int) -> None:
    ending = path.suffix.lower()
    if not ending:
        raise OutputError(f"'{path}' has no ending; name it .mp4, or .png for a picture.")
    if ending not in ENDINGS:
        raise OutputError(f"'{path}' ends in '{ending}'." + did_you_mean(ending, ENDINGS))
    if ending == ".png" and num_frames != 1:
        raise OutputError(f"'{path}' is an image, which cannot hold {num_frames} frames; name it .mp4.")
    if ending == ".mp4" and (width % 2 or height % 2):
        raise OutputError(f"'{path}' cannot hold {width}x{height}: H.264 needs even sizes (a .png does not).")


@contextmanager
def _png(buffer: io.BytesIO, text: str) -> Iterator[Callable[[Tensor], None]]:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(_TAG, text)
    yield lambda frames: Image.fromarray(frames[0].contiguous().numpy()).save(buffer, format="png", pnginfo=info)


@contextmanager
def _mp4(
    buffer: io.BytesIO, *, height: int, width: int, fps: float, crf: float, text: str
) -> Iterator[Callable[[Tensor], None]]:
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    if problem := h264_problem():
        raise UnavailableError(f"no video can be written: {problem}.")
    with (
        av.open(
            buffer,
            "w",
            format="mp4",
            options={"movflags": "use_metadata_tags+faststart"},
            # faststart moves the index to the front by reading the file once more.
            io_open=lambda url, flags, options: io.BytesIO(buffer.getvalue()),
        ) as container,
        ThreadPoolExecutor(1) as beside,
        ThreadPoolExecutor(_CONVERTERS) as converters,
    ):
        container.metadata.update({_TAG: text, "comment": f"{_TAG} {text}"})
        # x264's macroblock tree gives other bytes for the same frames now and then (32x32: 4 files in 10 runs). Without
        # it a clip of flat colours takes twice the bytes, 16 kB for 33 frames of 128x128.
        options = {"crf": str(crf), "preset": _X264_PRESET, "mbtree": "0"}
        stream = container.add_stream("libx264", rate=_rate(fps), options=options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        stream.thread_count = _X264_THREADS
        stream.codec_context.thread_type = "FRAME"
        # Untagged, some players take BT.601 and some BT.709, and colours shift (33 dB becomes 27).
        stream.codec_context.colorspace = Colorspace.ITU709
        stream.codec_context.color_primaries = ColorPrimaries.BT709
        stream.codec_context.color_trc = ColorTrc.BT709
        stream.codec_context.color_range = ColorRange.MPEG

        def convert(image: Any) -> av.VideoFrame:
            return av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                # The mean of four pixels: 45 dB against 38 of the default on hard edges (crf 12).
                interpolation=Interpolation.AREA,
            )

        def encode(frames: Tensor) -> None:
            for some in frames.split(_CONVERTED_AHEAD):
                for yuv in converters.map(convert, some.contiguous().numpy()):
                    container.mux(stream.encode(yuv))

        pieces: list[Future[None]] = []
        try:
            yield lambda frames: pieces.append(beside.submit(encode, frames))
            for piece in pieces:
                piece.result()
        finally:
            beside.shutdown(cancel_futures=True)
        container.mux(stream.encode())


def _rate(fps: float) -> Any:
    from fractions import Fraction

    return Fraction(fps).limit_denominator(1001)


def _write_whole(path: Path, data: bytes) -> None:
    with _told(path):
        if path.is_dir():
            raise OutputError(f"'{path}' is a folder; give the name of a file in it.")
        with replacing(path) as half:
            half.write_bytes(data)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        _refuse(path, error)


def _refuse(path: Path, error: OSError | ValueError) -> NoReturn:
    match getattr(error, "errno", None):
        case errno.ENOSPC | errno.EDQUOT:
            what = f"the disk of '{path.parent}' is full; free some room or write elsewhere"
        case errno.ENOENT | errno.ENOTDIR if not path.parent.is_dir():
            what = f"the folder '{path.parent}' does not exist; create it or choose another"
        case errno.EACCES | errno.EPERM | errno.EROFS | errno.ENOENT:
            what = f"the folder '{path.parent}' is not writable; choose another or change its permissions"
        case errno.ENAMETOOLONG:
            what = f"'{path.name[:40]}...' is too long a name for this disk; choose a shorter one"
        case _:
            what = f"'{path}' cannot be written: {reason(error)}"
    raise OutputError(what + ".") from error


def _kind(path: Path) -> str:
    """Return the ending that a file's first bytes, not its name, call for."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except FileNotFoundError:
        raise OutputError(f"'{path}' does not exist.") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"'{path}' cannot be read: {reason(error)}.") from None
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png"
    if head[4:8] == b"ftyp":
        return ".mp4"
    raise OutputError(f"'{path}' is neither an mp4 nor a PNG, so it carries no swiftwan record.")


@contextmanager
def _open_png(path: Path) -> Iterator[Any]:
    from PIL import Image

    with _told_unreadable(path), Image.open(path, formats=["png"]) as image:
        yield image


@contextmanager
def _open_mp4(path: Path) -> Iterator[Any]:
    import av

    # Opened by us, the format fixed: neither a name nor a playlist can make ffmpeg open something else.
    with path.open("rb") as file, _told_unreadable(path), av.open(file, format="mp4") as container:
        if not container.streams.video:
            raise OutputError(f"'{path}' is damaged or holds no video.")
        yield container


@contextmanager
def _told_unreadable(path: Path) -> Iterator[None]:
    import av
    from PIL import Image

    try:
        yield
    except (av.FFmpegError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OutputError(f"'{path}' is damaged: {reason(error)}.") from error
