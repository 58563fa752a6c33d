"""The journal of a benchmark: one JSON object a line, each on the disk before the next cell starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swiftwan.errors import OutputError, RequestError
from swiftwan.whole_file import write_text

Row = dict[str, Any]

ITSELF = "it is the baseline"
"""Why a baseline has no value beside the baseline."""


class Journal:
    """Rows in a file that only grows. A process that is killed while writing leaves half a line: it is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """Every whole row.

        Raises:
            OutputError: a row before the last is damaged, so the file is not a journal.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise OutputError(f"'{self.path}' cannot be read: {error.strerror}.") from None
        lines = data.split(b"\n")
        return [row for number, line in enumerate(lines, 1) if (row := self._row(line, number, len(lines))) is not None]

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, whole and through to the disk.

        Raises:
            OutputError: it cannot be written; the rows before it stay.
        """
        line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            with self.path.open("ab+") as file:
                file.truncate(_whole_bytes(self.path))
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"'{self.path}' cannot be written: {error.strerror}; the rows before it are kept."
            ) from None

    def _row(self, line: bytes, number: int, lines: int) -> Row | None:
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                return row
        except ValueError:
            if number == lines or not line.strip():  # after the last line break: half a row, or nothing
                return None
        raise OutputError(f"'{self.path}' line {number} is not a benchmark row; take it out or give another --out.")


def _whole_bytes(path: Path) -> int:
    """Length of the file up to its last line break."""
    return path.read_bytes().rfind(b"\n") + 1


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows that a benchmark wrote; raises RequestError if there is none, or none in it."""
    rows = Journal(path).read() if path.is_file() else []
    if not rows:
        raise RequestError(f"there are no rows at '{path}'; give the rows.jsonl of another run.")
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replace a file of rows, whole or not at all."""
    write_text(path, "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows))


def content_key(values: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that stand for the values: what is equal has the same key."""
    told = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(told.encode()).hexdigest()[:16]
