"""One SQLite file that several processes open at once, and that a crash of any of them leaves whole."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swiftwan.errors import SwiftwanError

_SCHEMA_VERSION = 3

# What was completed is counted when it happens: rows go, and a counter that falls tells Prometheus of a restart.
_TOTALS = """
CREATE TABLE totals (jobs INTEGER NOT NULL, seconds REAL NOT NULL) STRICT;
INSERT INTO totals SELECT count(*), coalesce(sum(finished_at - started_at), 0) FROM jobs WHERE state = 'completed';
CREATE TRIGGER counted AFTER UPDATE OF state ON jobs WHEN NEW.state = 'completed' AND OLD.state != 'completed' BEGIN
    UPDATE totals SET jobs = jobs + 1, seconds = seconds + NEW.finished_at - NEW.started_at;
END;
"""

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    place REAL NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    request TEXT NOT NULL,
    model TEXT NOT NULL,
    plan TEXT NOT NULL,
    inputs TEXT NOT NULL DEFAULT '[]',
    work REAL NOT NULL DEFAULT 1,
    key TEXT UNIQUE,
    fingerprint TEXT,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    attempt INTEGER NOT NULL DEFAULT 0,
    crashes INTEGER NOT NULL DEFAULT 0,
    worker TEXT,
    cancel INTEGER NOT NULL DEFAULT 0,
    deleted INTEGER NOT NULL DEFAULT 0,
    expired INTEGER NOT NULL DEFAULT 0,
    phase TEXT NOT NULL DEFAULT '',
    step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0,
    eta_s REAL,
    files TEXT NOT NULL DEFAULT '{{}}',
    record TEXT NOT NULL DEFAULT '{{}}',
    error_code TEXT,
    error_message TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, place);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
{_TOTALS}
"""

_FROM = {
    0: _SCHEMA,
    1: f"ALTER TABLE jobs ADD COLUMN expired INTEGER NOT NULL DEFAULT 0; {_TOTALS}",
    2: _TOTALS,
}
"""What brings a file of an earlier version, or a new one, up to this version."""


class StoreError(SwiftwanError):
    """What was asked of the queue cannot be done."""


class Database:
    """The tables of one folder. Safe to share among threads; each process opens its own.

    What was written is on the disk when the call returns (WAL, synchronous=FULL).
    """

    def __init__(self, path: Path) -> None:
        """Open, or make, the file.

        Raises:
            StoreError: a later version of swiftwan wrote it.
        """
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA wal_autocheckpoint=100")  # 400 kB: on a full disk the reserve must hold the log too
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found > _SCHEMA_VERSION:
            self._db.close()
            raise StoreError(
                f"'{path.name}' was written by another version of swiftwan (schema {found}, this one knows "
                f"{_SCHEMA_VERSION}); use that version or another folder."
            )
        if found < _SCHEMA_VERSION:
            self._db.executescript(f"BEGIN; {_FROM[found]} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _row(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Row | None:
        with self._lock:
            row: sqlite3.Row | None = self._db.execute(query, values).fetchone()
            return row

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """One transaction; IMMEDIATE, so that it waits at its beginning and never fails in its middle."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself rolls back when the disk is full
                    self._db.execute("ROLLBACK")
                raise
