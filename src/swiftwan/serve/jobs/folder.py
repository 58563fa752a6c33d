"""The folder that a server keeps: its database, and files under names that the server chose.

A file appears whole or not at all: written beside its place, flushed, renamed.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from swiftwan.errors import OutputError
from swiftwan.serve.jobs.job import Job
from swiftwan.whole_file import replacing

_PARTS = ("inputs", "results", "previews")
_NAME = re.compile(rf"({'|'.join(_PARTS)})/[a-z0-9_]+(\.[a-z0-9]+)+")

RESERVE_BYTES = 32 * 2**20
"""Room left for the database and the logs: below it no job is accepted or started."""


class DiskFullError(OutputError):
    pass


class Folder:
    """Paths below one root; nobody but this user may look inside."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()

    def make(self) -> None:
        """Create what is missing.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            for folder in (self.root, *(self.root / part for part in _PARTS)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the folder '{self.root}' cannot be made: {error.strerror}; choose another.") from None

    @property
    def database(self) -> Path:
        return self.root / "jobs.sqlite3"

    @property
    def lock(self) -> Path:
        return self.root / "server.lock"

    def path(self, name: str) -> Path:
        """Where a name that this class gave out lies."""
        assert _NAME.fullmatch(name), name
        return self.root / name

    def result(self, job: Job, ending: str) -> str:
        """A name for what an attempt makes; another attempt has another, so a late writer harms nobody."""
        return f"results/{job.id}.{job.attempt}{ending}"

    def preview(self, job: Job) -> str:
        return f"previews/{job.id}.jpg"

    def take_in(self, chunks: Iterable[bytes], ending: str) -> str:
        """Write an upload; return the name it got.

        Raises:
            DiskFullError: there is no room.
        """
        name = f"inputs/{secrets.token_hex(16)}{ending}"
        self.write(name, chunks)
        return name

    def copy_input(self, name: str) -> str:
        """A second copy of an upload, under a name of its own.

        Raises:
            OutputError: the first is gone, or there is no room.
        """
        path = self.path(name)
        try:
            return self.take_in([path.read_bytes()], path.suffix)
        except FileNotFoundError:
            raise OutputError("the file of this job is no longer there; choose it again.") from None

    def write(self, name: str, chunks: Iterable[bytes], *, durable: bool = True) -> None:
        """Write a file whole or not at all.

        Args:
            chunks: its bytes.
            durable: wait until they are on the disk.

        Raises:
            DiskFullError: there is no room; OutputError: another refusal of the system.
        """
        path = self.path(name)
        try:
            with replacing(path, durable=durable) as half, half.open("wb") as file:
                file.writelines(chunks)
        except OSError as error:
            raise refused(error) from error

    def check_room(self, need: int = 0) -> None:
        """Raise DiskFullError unless ``need`` bytes and the reserve are free."""
        free = shutil.disk_usage(self.root).free
        if free < need + RESERVE_BYTES:
            raise DiskFullError(
                f"the server's disk has {free / 2**20:.0f} MiB free, and this needs "
                f"{(need + RESERVE_BYTES) / 2**20:.0f} MiB; delete finished jobs and try again."
            )

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def remove_job(self, job: Job) -> None:
        """Remove every file of a job, those of all its attempts."""
        self.remove([*job.inputs, *job.files.values(), self.preview(job)])
        for path in (self.root / "results").glob(f"*{job.id}.*"):
            path.unlink(missing_ok=True)

    def sweep(self, needed: Collection[str]) -> None:
        """Remove what no job needs: halves of files, results of attempts that died, old previews."""
        for part in _PARTS:
            for path in (self.root / part).iterdir():
                if f"{part}/{path.name}" not in needed:
                    path.unlink()


def refused(error: OSError) -> OutputError:
    """What to raise for the system's refusal to write; the words name no path."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError("the server's disk is full; delete finished jobs and try again.")
    return OutputError(f"the server could not write a file: {error.strerror}.")
