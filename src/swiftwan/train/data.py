"""What there is to train on: clips and images with captions, found, checked, and told about.

A folder with ``clip.txt`` beside ``clip.mp4``; a folder with ``metadata.csv`` or ``metadata.jsonl`` as Hugging Face's
video and image folders have it; a ``.csv`` or ``.jsonl`` file; or ``hf:NAME``, a data set of the hub. Nothing
is left out in silence: what cannot be used is a :class:`Problem` with its reason.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swiftwan.errors import RequestError, SwiftwanError, UnavailableError, reason
from swiftwan.inputs import clip_facts, read_image, sha256_of
from swiftwan.whole_file import replacing

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MEDIA_COLUMNS = ("file_name", "file", "path", "video", "image", "media")
CAPTION_COLUMNS = ("caption", "text", "prompt")
_TABLES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Clip:
    """A video or image that can be read, and its caption.

    Attributes:
        frames: as stored; 1 for an image.
        fps: as stored; None for an image, and where the file does not say.
        sha256: of the file's bytes.
    """

    path: Path
    caption: str
    width: int
    height: int
    frames: int
    fps: float | None
    sha256: str

    @property
    def is_image(self) -> bool:
        return self.path.suffix.lower() in IMAGES


@dataclass(frozen=True)
class Problem:
    """What cannot be used, and why."""

    what: str
    why: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass
class Found:
    """Everything that a search came upon."""

    clips: list[Clip] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """Of all contents and captions, whatever the files' names and order: whether two data sets are the same."""
        lines = sorted(f"{clip.sha256} {clip.caption}" for clip in self.clips)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def lines(self) -> list[str]:
        """A line for all that can be used, and one for each that cannot."""
        images = sum(clip.is_image for clip in self.clips)
        return [
            f"{len(self.clips) - images} clips and {images} images can be used",
            *(f"unusable: {problem}" for problem in self.problems),
        ]


@dataclass(frozen=True)
class Entry:
    """A line of what was given: where a clip lies, and its caption; None if there is none."""

    path: Path
    caption: str | None


def find(source: str, check_caption: Callable[[str], None], *, downloads: Path | None = None) -> Found:
    """Search a source and check all that is in it.

    Args:
        source: a folder, a .csv or .jsonl file, or ``hf:NAME``.
        check_caption: raises RequestError for one that the model cannot read.
        downloads: where clips that come from a hub's tables are kept.

    Raises:
        RequestError: there is no such source, its form is unknown, or nothing in it can be used.
        UnavailableError: ``hf:`` without the package for it.
    """
    found = Found()
    seen: dict[tuple[str, str], Path] = {}
    for entry in _entries(source, found, downloads):
        try:
            clip = _read(entry, check_caption)
        except SwiftwanError as problem:
            found.problems.append(Problem(str(entry.path), str(problem).rstrip(".")))
            continue
        if (twin := seen.setdefault((clip.sha256, clip.caption), entry.path)) != entry.path:
            found.problems.append(Problem(str(entry.path), f"the same clip and caption as {twin}"))
            continue
        found.clips.append(clip)
    if not found.clips:
        told = "; ".join(map(str, found.problems[:3])) or "it holds no videos or images"
        more = f" and {len(found.problems) - 3} more" if len(found.problems) > 3 else ""
        raise RequestError(f"nothing in '{source}' can be used: {told}{more}.")
    return found


def _read(entry: Entry, check_caption: Callable[[str], None]) -> Clip:
    path, caption = entry.path, entry.caption
    if not path.is_file():
        raise RequestError("the file does not exist")
    if caption is None:
        raise RequestError(f"no caption; write it to '{path.with_suffix('.txt').name}' beside it")
    if not caption.strip():
        raise RequestError("its caption is empty")
    check_caption(caption)
    if path.suffix.lower() in IMAGES:
        image, sha256, _ = read_image("image", path)
        return Clip(path, caption, *image.size, 1, None, sha256)
    if path.suffix.lower() not in VIDEOS:
        raise RequestError(f"'{path.suffix}' is no ending of a video or image ({', '.join(VIDEOS + IMAGES)})")
    facts = clip_facts(path)
    return Clip(path, caption, *facts.size, facts.frames, facts.fps, sha256_of(path))


# Forms of a source


def _entries(source: str, found: Found, downloads: Path | None) -> Iterator[Entry]:
    if source.startswith("hf:"):
        return _of_hub(source.removeprefix("hf:"), found, downloads)
    path = Path(source).expanduser()
    if path.is_dir():
        tables = [path / name for name in _TABLES if (path / name).is_file()]
        return _of_table(tables[0], found) if tables else _of_folder(path, found)
    if path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        return _of_table(path, found)
    if not path.exists():
        raise RequestError(f"'{source}' does not exist; give a folder, a .csv or .jsonl file, or hf:NAME.")
    raise RequestError(f"'{source}' is no folder, .csv or .jsonl; give one of these, or hf:NAME.")


def _of_folder(folder: Path, found: Found) -> Iterator[Entry]:
    media: set[Path] = set()
    captions: list[Path] = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix.lower() == ".txt":
            captions.append(path)
        elif path.suffix.lower() in VIDEOS + IMAGES:
            media.add(path.with_suffix(""))
            beside = path.with_suffix(".txt")
            yield Entry(path, _text(beside) if beside.is_file() else None)
        else:
            found.problems.append(Problem(str(path), "neither a video, an image nor a caption"))
    found.problems += [
        Problem(str(path), "a caption with no clip beside it") for path in captions if path.with_suffix("") not in media
    ]


def _of_table(table: Path, found: Found) -> Iterator[Entry]:
    for number, row in enumerate(_rows(table), 2 if table.suffix.lower() == ".csv" else 1):
        if isinstance(row, str):
            found.problems.append(Problem(f"{table}:{number}", row))
            continue
        media = next((row[name] for name in MEDIA_COLUMNS if row.get(name)), None)
        caption = next((row[name] for name in CAPTION_COLUMNS if row.get(name) is not None), None)
        if not isinstance(media, str):
            found.problems.append(
                Problem(f"{table}:{number}", f"no file; name it in one of {', '.join(MEDIA_COLUMNS)}")
            )
        elif caption is None:
            found.problems.append(
                Problem(f"{table}:{number}", f"no caption; give it in one of {', '.join(CAPTION_COLUMNS)}")
            )
        elif not isinstance(caption, str):
            found.problems.append(Problem(f"{table}:{number}", f"its caption is {caption!r}, not text"))
        else:
            yield Entry(table.parent / media, caption)


def _rows(table: Path) -> Iterator[Mapping[str, Any] | str]:
    """Rows by column, or in words what is wrong with one."""
    lines = _text(table).splitlines()
    if table.suffix.lower() == ".csv":
        yield from csv.DictReader(lines)
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            row = f"not JSON: {error}"
        yield row if isinstance(row, dict | str) else "not a JSON object"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace").strip()


def _of_hub(name: str, found: Found, downloads: Path | None) -> Iterator[Entry]:
    """A data set of the hub; its clips' bytes go to ``downloads``, named by content."""
    try:
        import datasets
    except ImportError:
        raise UnavailableError("hf: needs the package 'datasets': pip install 'swiftwan[data]'.") from None
    assert downloads is not None
    try:
        table = datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # none of that name, no network, no split called train
        raise RequestError(f"'hf:{name}' cannot be loaded: {reason(error)}") from None
    media = next((column for column in MEDIA_COLUMNS if column in table.column_names), None)
    caption = next((column for column in CAPTION_COLUMNS if column in table.column_names), None)
    if media is None or caption is None:
        raise RequestError(
            f"'hf:{name}' has the columns {', '.join(table.column_names)}; it needs one of {', '.join(MEDIA_COLUMNS)} "
            f"and one of {', '.join(CAPTION_COLUMNS)}."
        )
    feature = table.features[media]
    if hasattr(feature, "decode"):  # Video, Image; else a path, or bytes beside their path
        table = table.cast_column(media, type(feature)(decode=False))
    for number, row in enumerate(table):
        if row[caption] is None or isinstance(row[caption], str):
            yield Entry(_kept(row[media], downloads, ".png" if media == "image" else ".mp4"), row[caption])
        else:
            found.problems.append(Problem(f"hf:{name}:{number}", f"its caption is {row[caption]!r}, not text"))


def _kept(media: Any, downloads: Path, ending: str) -> Path:
    """The file of a row: a path, or bytes, whose name may be missing."""
    if isinstance(media, str):
        return Path(media)
    if media.get("bytes") is None:
        return Path(media["path"])
    data = media["bytes"]
    path = downloads / (hashlib.sha256(data).hexdigest()[:32] + (Path(media.get("path") or "").suffix or ending))
    if not path.is_file():
        downloads.mkdir(parents=True, exist_ok=True)
        with replacing(path) as half:
            half.write_bytes(data)
    return path
