"""Prompt embeddings kept by content, in memory and on disk, so that a repeated prompt costs nothing.

The key is a digest of all that decides an embedding's bits: the text, the encoder's weights and tokenizer,
number format, device and torch version. So a hit is bit-equal to encoding again, and nothing ever expires.
The disk holds digests and embeddings, no prompt in words.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

log = logging.getLogger(__name__)

MEMORY_ENTRIES = 64
"""Held on the device: at most 64 of 4 MiB (512 tokens of UMT5-XXL in 16 bit), mostly of a few 100 KiB."""

DISK_BYTES = 512 * 2**20


def digest(parts: Mapping[str, str | int]) -> str:
    """The key of an embedding: SHA-256 of all that decides it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class PromptCache:
    """Embeddings by key; the least recently used leave first.

    Any number of processes may share a folder: an entry appears whole or not at all, one that is damaged
    counts as absent, and one that another process removed is encoded again.

    Args:
        folder: where entries lie on disk, made when the first is written; None keeps them in memory only.
        disk_bytes: limit of the folder.
    """

    def __init__(self, folder: Path | None, *, disk_bytes: int = DISK_BYTES) -> None:
        self.folder = folder
        self.disk_bytes = disk_bytes
        self._memory: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, key: str, device: torch.device) -> Tensor | None:
        """The embedding (S, text_dim) on ``device``, or None."""
        if (found := self._memory.get(key)) is None and self.folder is not None:
            found = self._read(self._path(key))
        if found is None:
            return None
        found = found.to(device)
        self._remember(key, found)
        return found

    def put(self, key: str, embedding: Tensor) -> None:
        """Keep an embedding. A disk that is full or not writable is logged once and done without."""
        self._remember(key, embedding)
        if self.folder is None:
            return
        try:
            self._write(self._path(key), embedding)
            self._shrink()
        except (OSError, SafetensorError) as error:
            log.warning("prompt embeddings are not kept in %s (%s)", self.folder, error)
            self.folder = None

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.safetensors"

    def _remember(self, key: str, embedding: Tensor) -> None:
        self._memory[key] = embedding
        self._memory.move_to_end(key)
        if len(self._memory) > MEMORY_ENTRIES:
            self._memory.popitem(last=False)

    def _read(self, path: Path) -> Tensor | None:
        try:
            embedding = load_file(path)["embedding"]
            os.utime(path)  # used just now, so it leaves last
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError):
            path.unlink(missing_ok=True)
            return None
        return embedding

    def _write(self, path: Path, embedding: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        try:
            save_file({"embedding": embedding.cpu().contiguous()}, name)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _shrink(self) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries[:-1]:
            if total <= self.disk_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Time of last use, size and path of each, and of what a writer killed an hour ago left behind."""
        assert self.folder is not None
        for path in self.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # removed by another process just now
                continue
            if path.suffix == ".safetensors" or time.time() - stat.st_mtime > 3600:
                yield stat.st_mtime_ns, stat.st_size, path
