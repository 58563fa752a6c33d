"""Files that appear whole or not at all, and are still there after a power cut."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from swiftwan.errors import OutputError


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a file beside ``path`` to write to; it takes that name when the block ends without an error.

    Until then, and for good if anything fails, ``path`` is as it was. Errors of the system pass as they are.

    Args:
        durable: wait until the bytes and the name are on the disk.
    """
    with beside(path) as half:
        half.touch()
        mode = half.stat().st_mode
        yield half
        # Writers that put a file of their own there, as safetensors' does, make it readable by its owner alone.
        if half.stat().st_mode != mode:
            half.chmod(mode)
        if durable:
            sync(half)
        half.replace(path)
    if durable:
        sync(path.parent)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yield a hidden name in the folder of ``path``; whatever then stands there is removed, however the block ends."""
    half = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield half
    finally:
        half.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file.

    Raises:
        OutputError: it cannot be written there.
    """
    try:
        with replacing(path) as half:
            half.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror}.") from None


def sync(path: Path) -> None:
    """Bring a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
