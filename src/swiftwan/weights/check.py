"""Is this file what it should be? Answers before a tensor is read, in one line.

safetensors itself finds a cut file but not a changed one: a flipped bit, or a header before zeros, loads
in silence. So there are two gates: the header against the file's size (``check_file``), and the whole
file against a known SHA-256 (``check_sha256``), which the hub keeps for each of its large files and
``write_manifest`` for folders of our own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from swiftwan.errors import WeightsError
from swiftwan.models.config import KNOWN_MODELS, TransformerConfig
from swiftwan.places import cache_folder
from swiftwan.whole_file import replacing

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

MANIFEST = "swiftwan.sha256.json"

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def check_file(path: Path) -> dict[str, Shape]:
    """Return name -> shape of a safetensors file; checks and raises as ``read_header`` does."""
    return {name: shape for name, (_, shape) in read_header(path).items()}


def read_header(path: Path) -> dict[str, tuple[str, Shape]]:
    """Return name -> (type, shape) of a safetensors file after checking its header against its size.

    Reads the header alone (8 bytes, then JSON), whatever the file's size. The rules are those of
    github.com/huggingface/safetensors, "Format"; the point of checking here is the message.

    Raises WeightsError: missing, unreadable, empty, truncated, not safetensors (and what it is), a damaged
    header, bytes past the end.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            header_bytes = int.from_bytes(start[:8], "little")
            _refuse_other_formats(path, start, size, header_bytes)
            file.seek(8)
            header = file.read(header_bytes)
    except FileNotFoundError:
        if path.is_symlink():
            raise _broken(path, f"links to {os.readlink(path)}, which is gone") from None
        raise WeightsError(f"{path} is missing; check the path, or download it again") from None
    except IsADirectoryError:
        raise WeightsError(f"{path} is a folder, not a safetensors file") from None
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    entries, data_bytes = _parse_header(path, header)
    need = 8 + header_bytes + data_bytes
    if size < need:
        raise _broken(path, f"is truncated: has {size:,} of {need:,} bytes")
    if size > need:
        raise _broken(path, f"has {size - need:,} bytes past its end at {need:,}")
    return entries


def _refuse_other_formats(path: Path, start: bytes, size: int, header_bytes: int) -> None:
    if size == 0:
        raise _broken(path, "is empty (0 bytes)")
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a git-LFS pointer, not the weights; run `git lfs pull` in its folder")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(f"{path} is a web page saved under a weights file's name; download the file itself")
    for magic, kind in (
        (b"PK\x03\x04", "a PyTorch pickle"),
        (b"\x80\x02", "a pickle"),
        (b"GGUF", "a GGUF file"),
    ):
        if start.startswith(magic):
            raise WeightsError(f"{path} is {kind}, not safetensors; take the model's diffusers folder instead")
    if not any(start):
        raise _broken(path, "begins with zeros: its download never finished")
    if header_bytes > _MAX_HEADER_BYTES:
        if path.suffix == ".gguf":
            raise _broken(path, "is not a GGUF file: it begins with other bytes")
        raise _broken(
            path,
            f"is not a safetensors file: its first bytes ask for a header of {header_bytes:,} bytes "
            f"(limit {_MAX_HEADER_BYTES:,})",
        )
    if size < 8 + header_bytes:
        raise _broken(path, f"is truncated: has {size:,} bytes, its header alone needs {8 + header_bytes:,}")


def _broken(path: Path, what: str) -> WeightsError:
    return WeightsError(f"{path} {what}; download it again")


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, tuple[str, Shape]], int]:
    """Name -> (type, shape), and the bytes of data, which must follow each other without gap or overlap."""
    found: dict[str, tuple[str, Shape]] = {}
    spans: list[tuple[int, int]] = []
    try:
        entries: dict[str, Any] = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            shape = tuple(int(n) for n in entry["shape"])
            begin, end = entry["data_offsets"]
            if min((*shape, begin), default=0) < 0 or 8 * (end - begin) != math.prod(shape) * _BITS[entry["dtype"]]:
                raise ValueError(name)
            found[name] = (entry["dtype"], shape)
            spans.append((begin, end))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _broken(path, "has a damaged safetensors header") from None
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise _broken(path, "has a damaged header: its tensors overlap or leave gaps")
        at = end
    return found, at


def check_sha256(path: Path, expected: str) -> None:
    """Raise WeightsError unless the file's SHA-256 is ``expected`` (hex)."""
    found = sha256(path)
    if found != expected.lower():
        raise WeightsError(
            f"{path} is damaged: its SHA-256 is {found[:12]}..., the published one {expected[:12]}...; "
            "delete it and download it again"
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; computed once for a (size, mtime, inode) and remembered in the user's cache.

    So a second start does not read 28 GB again. The price: bits that rot on the disk behind the file
    system's back, mtime unchanged, are only seen once that cache is deleted.
    """
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        store = cache_folder() / "sha256.json"
        known = read_json(store) or {}
        if isinstance(digest := known.get(key), str):
            return digest
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    recent = dict(list(known.items())[-4000:]) | {key: digest}
    try:
        write_json(store, recent)
    except OSError as error:
        log.warning("cannot write %s (%s): each start will hash all files", store, error.strerror)
    return digest


def hub_digests(folder: Path) -> dict[str, str]:
    """Published SHA-256 of the large files of a hub snapshot, each a link to a blob of that name."""
    digests = {}
    for path in folder.rglob("*"):
        if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", path.resolve().name):
            digests[path.relative_to(folder).as_posix()] = path.resolve().name
    return digests


def fingerprint(files: Iterable[Path]) -> str:
    """Name files by content without reading them whole: the hub's digest where there is one, else size and
    time of change, with the first MiB, which holds a safetensors header."""
    total = hashlib.sha256()
    for path in files:
        real = path.resolve()
        if re.fullmatch("[0-9a-f]{64}", real.name):
            told = real.name
        else:
            stat = real.stat()
            with real.open("rb") as file:
                told = f"{stat.st_size} {stat.st_mtime_ns} {hashlib.sha256(file.read(2**20)).hexdigest()}"
        total.update(f"{path.name} {told}\n".encode())
    return total.hexdigest()


def write_manifest(folder: Path) -> Path:
    """Write ``swiftwan.sha256.json``, the SHA-256 of each file below ``folder``; return its path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    digests = {p.relative_to(folder).as_posix(): _hash(p) for p in files}
    write_json(folder / MANIFEST, {"files": digests})
    return folder / MANIFEST


def verify_manifest(folder: Path) -> int:
    """Check a folder against its manifest; return how many files were compared, 0 when it has none.

    Raises WeightsError naming all damaged and missing files at once.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return 0
    files = (read_json(path) or {}).get("files")
    if not isinstance(files, dict) or not all(isinstance(v, str) for v in files.values()):
        raise WeightsError(f"{path} is not a manifest; delete it to load the folder unchecked")
    verify(folder, files)
    return len(files)


def verify(folder: Path, digests: Mapping[str, str]) -> None:
    """Check files, named relative to ``folder``, against their SHA-256; all that is wrong is told at once."""
    missing, damaged = [], []
    for name, digest in digests.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise WeightsError(f"{folder}: the checksums name {name!r}, outside the folder")
        try:
            if sha256(path) != digest.lower():
                damaged.append(name)
        except FileNotFoundError:
            missing.append(name)
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
    problems = _listed("missing", missing) + _listed("damaged (SHA-256 differs)", damaged)
    if problems:
        raise WeightsError(f"{folder}: {'; '.join(problems)}; download or copy these files again")


def compare(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], component: str, *, ignore: Sequence[str] = ()
) -> None:
    """Raise WeightsError naming all missing, unexpected and mis-shaped tensors at once.

    Unexpected names that match a glob of ``ignore`` are let through. For a
    transformer the message also says which published models both sides look like.
    """
    missing = [n for n in expected if n not in found]
    extra = [n for n in found if n not in expected and not any(fnmatchcase(n, glob) for glob in ignore)]
    misshaped = [
        f"{n} {_x(found[n])} instead of {_x(expected[n])}"
        for n in expected
        if n in found and tuple(found[n]) != tuple(expected[n])
    ]
    problems = _listed("missing", missing) + _listed("unexpected", extra) + _listed("of another shape", misshaped)
    if not problems:
        return
    hint = ""
    if component.startswith("transformer"):
        file_like, config_like = looks_like(found), looks_like(expected)
        if file_like and file_like != config_like:
            hint = f"; the file looks like {file_like}" + (f", its config like {config_like}" if config_like else "")
    raise WeightsError(f"{component}: weights and config do not belong together: {'; '.join(problems)}{hint}")


def looks_like(shapes: Mapping[str, Shape]) -> str | None:
    """Which published transformers have these tensor shapes; None for sizes that are nobody's."""
    if any(".self_attn." in name for name in shapes):
        return "the original Wan layout, not diffusers'"
    try:
        dim, in_channels = shapes["patch_embedding.weight"][:2]
        sizes = (
            dim,
            in_channels,
            shapes["blocks.0.ffn.net.0.proj.weight"][0],
            shapes["condition_embedder.text_embedder.linear_1.weight"][1],
            len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
            "blocks.0.attn2.add_k_proj.weight" in shapes,
            "condition_embedder.image_embedder.pos_embed" in shapes,
        )
    except (KeyError, IndexError, ValueError):
        return None
    names = [model.name for model in KNOWN_MODELS.values() if _shape_sizes(model.transformer) == sizes]
    return " or ".join(names) or None


def _shape_sizes(config: TransformerConfig) -> tuple[int | bool, ...]:
    return (
        config.dim,
        config.in_channels,
        config.ffn_dim,
        config.text_dim,
        config.num_layers,
        config.added_kv_proj_dim is not None,
        config.pos_embed_seq_len is not None,
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file or no such object in it."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file so that readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with replacing(path) as half:
        half.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _x(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _listed(what: str, names: Sequence[str]) -> list[str]:
    """``["3 missing (a, b, c)"]``, at most five named; empty for none."""
    if not names:
        return []
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return [f"{len(names)} {what} ({', '.join(names[:5])}{more})"]
