"""Bytes of files to a GPU through page-locked memory, several threads reading beside the copies."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from swiftwan.errors import WeightsError

THREADS = 4
PIECE = 2**22
"""Bytes that a thread reads at once; it has two buffers of so many."""


class Upload:
    """Reads stretches of files onto a GPU.

    A copy from a mapped file goes page by page through one thread and a buffer of the driver. Here a thread copies
    from one of its two buffers while it reads into the other.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._threads = ThreadPoolExecutor(THREADS)
        self._own = threading.local()

    def read(self, path: Path, begin: int, end: int) -> Tensor:
        """Bytes ``begin`` to ``end`` of a file, uint8 (end - begin,), for the work that is queued from now on.

        Raises:
            WeightsError: the file ends before, or cannot be read.
        """
        stream = torch.cuda.current_stream(self.device)
        whole = torch.empty(end - begin, dtype=torch.uint8, device=self.device)
        free = stream.record_event()  # behind it nothing uses what this memory held before
        starts = range(begin, end, PIECE)
        pieces = zip(starts, whole.split(PIECE), strict=True) if starts else ()
        read = [self._threads.submit(self._read, path, at, piece, free) for at, piece in pieces]
        wait(read)  # for all of them, before an error lets go of the memory
        for copied in read:
            stream.wait_event(copied.result())
        return whole

    def close(self) -> None:
        self._threads.shutdown()

    def _read(self, path: Path, at: int, piece: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        if not hasattr(self._own, "lane"):
            self._own.lane = _Lane(self.device)
        copied: torch.cuda.Event = self._own.lane.read(path, at, piece, free)
        return copied


class _Lane:
    """One thread's buffers and stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def read(self, path: Path, at: int, piece: Tensor, free: torch.cuda.Event) -> torch.cuda.Event:
        self._buffers.reverse()
        self._copied.reverse()
        if self._copied[0] is not None:
            self._copied[0].synchronize()
        buffer = self._buffers[0][: len(piece)]
        _fill(buffer, path, at)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            piece.copy_(buffer, non_blocking=True)
            copied = self._stream.record_event()
        self._copied[0] = copied
        return copied


def _fill(buffer: Tensor, path: Path, at: int) -> None:
    left = memoryview(buffer.numpy())  # type: ignore[arg-type]
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            while left:
                count = file.readinto(left)
                if not count:
                    raise WeightsError(f"{path} ends before its last tensor; download it again")
                left = left[count:]
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None
