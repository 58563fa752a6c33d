"""Write what a job made: the video or picture, a thumbnail, a sheet of frames, and what is known of the run."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING, Any

from swiftwan.serve.jobs.folder import Folder
from swiftwan.serve.jobs.job import Job

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from swiftwan.pipelines.result import Result

_THUMBNAIL, _SHEET_COLUMNS, _SHEET_ROWS, _SHEET_CELL = 320, 4, 4, 160


def save(folder: Folder, job: Job, result: Result) -> tuple[dict[str, str], dict[str, Any]]:
    """Write the files of a result; return their names by variant, and the record.

    Raises:
        OutputError: one cannot be written; none is left behind.
    """
    num_frames, height, width, _ = result.frames.shape
    folder.check_room(num_frames * height * width)
    picture = num_frames == 1
    files = {
        "image" if picture else "video": folder.result(job, ".png" if picture else ".mp4"),
        "thumbnail": folder.result(job, ".thumbnail.webp"),
        "spritesheet": folder.result(job, ".spritesheet.jpg"),
    }
    try:
        path = result.save(folder.path(next(iter(files.values()))))
        folder.write(files["thumbnail"], [_encoded(_thumbnail(result.frames), "webp")])
        folder.write(files["spritesheet"], [_encoded(_sheet(result.frames), "jpeg")])
    except BaseException:
        folder.remove(files.values())
        raise
    data = path.read_bytes()
    return files, {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "seconds": result.seconds,
        "step_seconds": [round(seconds, 4) for seconds in result.step_seconds],
        "peak_bytes": result.peak_bytes,
        "seed": result.request.seed,
        "plan": list(result.plan),
        "device": result.device,
        "dtype": result.dtype,
        "versions": result.versions,
    }


def _thumbnail(frames: Tensor) -> Image:
    from PIL import Image

    picture = Image.fromarray(frames[len(frames) // 2].contiguous().numpy())  # the first is often still empty
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return picture


def _sheet(frames: Tensor) -> Image:
    """Frames at even distances, row by row."""
    from PIL import Image

    count = min(len(frames), _SHEET_COLUMNS * _SHEET_ROWS)
    chosen = [round(i * (len(frames) - 1) / max(1, count - 1)) for i in range(count)]
    cell = (_SHEET_CELL, max(1, round(_SHEET_CELL * frames.shape[1] / frames.shape[2])))
    columns = min(count, _SHEET_COLUMNS)
    sheet = Image.new("RGB", (columns * cell[0], -(-count // columns) * cell[1]))
    for place, index in enumerate(chosen):
        corner = (place % columns * cell[0], place // columns * cell[1])
        sheet.paste(Image.fromarray(frames[index].contiguous().numpy()).resize(cell), corner)
    return sheet


def _encoded(picture: Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, quality=80)
    return buffer.getvalue()
