"""Folders and safetensors files that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from swiftwan.errors import OutputError, reason
from swiftwan.whole_file import replacing, sync

SHARD_BYTES = 5_000_000_000

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names of the types that are written."""


@dataclass(frozen=True)
class Slot:
    """A tensor that will be written; ``type`` is a name of ``TYPES``."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * TYPES[self.type].itemsize


def refuse_full(folder: Path) -> None:
    """Raise OutputError unless ``folder`` is absent or empty."""
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; give a new folder, so that nothing in it is lost")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give the name of a folder")


@contextmanager
def appearing(folder: Path, need: int) -> Iterator[Path]:
    """Yield a folder beside ``folder`` to write to; it takes that name when the block ends without an error.

    Raises OutputError: not enough space for ``need`` bytes, no permission, or the disk fails.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        refuse_if_too_large(folder, need)
        temporary.mkdir()
        yield temporary
        for inner in (path for path in temporary.rglob("*") if path.is_dir()):
            sync(inner)
        replace_folder(temporary, folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}; choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shards(
    folder: Path, stem: str, slots: Sequence[Slot], read: Callable[[Slot], Tensor], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write ``stem*.safetensors``, and an index where there is more than one; one tensor is held at a time.

    ``read`` gives each tensor on the CPU, of the slot's shape and type.
    """
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.nbytes
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        _write_shard(folder / file, shard, read)
    if len(shards) > 1:
        weight_map = {slot.name: file for file, shard in zip(files, shards, strict=True) for slot in shard}
        total = sum(slot.nbytes for slot in slots)
        write_json(
            folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _write_shard(path: Path, slots: Sequence[Slot], read: Callable[[Slot], Tensor]) -> None:
    # Wide types first: so each tensor begins at a multiple of its element's size, as its readers expect.
    slots = sorted(slots, key=lambda slot: -TYPES[slot.type].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for slot in slots:
        header[slot.name] = {"dtype": slot.type, "shape": slot.shape, "data_offsets": [at, at + slot.nbytes]}
        at += slot.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for slot in slots:
            tensor = read(slot)
            assert (tuple(tensor.shape), tensor.dtype) == (slot.shape, TYPES[slot.type]), slot.name
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    way_out: str = "free room, and run the same command again",
) -> None:
    """Write one safetensors file of tensors that share no memory; its folder is made where it is missing.

    Raises OutputError: it cannot be written, with the way out; what stood there before is as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as half:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, half, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written: {reason(error)}; {way_out}.") from None


def refuse_if_too_large(folder: Path, need: int) -> None:
    have = shutil.disk_usage(folder.parent).free
    if need > have:
        raise OutputError(f"{folder} needs {need / 1e9:.3f} GB, its disk has {have / 1e9:.3f} GB free; choose another")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sync(path)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; for an instant between two renames neither name exists, never a half."""
    sync(new)
    old = new.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
