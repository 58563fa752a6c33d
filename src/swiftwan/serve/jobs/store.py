"""The queue: jobs in one SQLite file, which a crash of any process leaves whole.

Several processes open it at once. A job that was added is on the disk when ``add`` returns (WAL, synchronous=FULL).
A worker names the attempt it works on with every write, so that one that was given up for dead cannot
overwrite what its successor does.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from swiftwan.errors import SwiftwanError
from swiftwan.serve.jobs.job import ENDED, MAX_REQUEUES, Job, State, from_row

_SCHEMA_VERSION = 1

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
PRAGMA user_version = {_SCHEMA_VERSION};
"""


class StoreError(SwiftwanError):
    """What was asked of the queue cannot be done."""


class UnknownJobError(StoreError):
    pass


class QueueFullError(StoreError):
    """Attributes: wait_s, seconds until there is probably room."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class KeyReusedError(StoreError):
    """An idempotency key came back with another request."""


class WrongStateError(StoreError):
    pass


class Store:
    """The jobs of one folder. Safe to share among threads; each process opens its own."""

    def __init__(self, path: Path, *, limit: int = 100) -> None:
        """Open, or make, the file.

        Args:
            path: of the database.
            limit: how many jobs may be queued.
        """
        self.limit = limit
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, _SCHEMA_VERSION):
            self._db.close()
            raise StoreError(
                f"'{path.name}' was written by another version of swiftwan (schema {found}, this one knows "
                f"{_SCHEMA_VERSION}); use that version or another folder."
            )
        if found == 0:
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Clients: accept, look, change

    def add(
        self,
        request: dict[str, Any],
        *,
        model: str,
        plan: str | Sequence[str],
        inputs: Sequence[str] = (),
        work: float = 1.0,
        prefix: str = "video",
        key: str | None = None,
        fingerprint: str = "",
    ) -> tuple[Job, bool]:
        """Accept a job; return it, and whether it is new.

        Args:
            request: as ``Request.to_json`` tells it.
            key: the client's name for this call; the same key and fingerprint give back the same job.
            fingerprint: tells calls apart that carry the same key.

        Raises:
            QueueFullError: the queue holds ``limit`` jobs.
            KeyReusedError: the key belongs to a call with another fingerprint.
        """
        with self._write() as db:
            if key is not None:
                row = db.execute("SELECT * FROM jobs WHERE key = ?", (key,)).fetchone()
                if row is not None and row["fingerprint"] != fingerprint:
                    raise KeyReusedError(
                        "this Idempotency-Key was used for another request; give each new request a key of its own."
                    )
                if row is not None:
                    return from_row(row), False
            queued = db.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
            if queued >= self.limit:
                wait_s = self._wait_for_room(db)
                raise QueueFullError(
                    f"the queue is full: {queued} jobs of {self.limit}; try again in about {wait_s:.0f} s.", wait_s
                )
            last = db.execute("SELECT coalesce(max(place), 0) FROM jobs").fetchone()[0]
            row = db.execute(
                "INSERT INTO jobs (id, place, request, model, plan, inputs, work, key, fingerprint, created_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING *",
                (
                    f"{prefix}_{secrets.token_hex(16)}",
                    last + 1,
                    json.dumps(request),
                    model,
                    json.dumps(plan if isinstance(plan, str) else list(plan)),
                    json.dumps(list(inputs)),
                    work,
                    key,
                    fingerprint,
                    time.time(),
                ),
            ).fetchone()
            return from_row(row), True

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            UnknownJobError: there is none, or it was deleted.
        """
        row = self._row("SELECT * FROM jobs WHERE id = ? AND NOT deleted", (job_id,))
        if row is None:
            raise UnknownJobError("there is no such job; it may have been deleted.")
        return from_row(row)

    def page(
        self,
        *,
        prefix: str = "",
        after: str | None = None,
        limit: int = 20,
        order: Literal["asc", "desc"] = "desc",
        states: Sequence[State] = (),
    ) -> tuple[list[Job], bool]:
        """Return jobs by arrival, and whether there are more behind them.

        Args:
            prefix: of the ids; "video" leaves pictures out.
            after: id of the last job that the caller has.
            states: only these; () is all.

        Raises:
            UnknownJobError: there is no job ``after``.
        """
        where, values = ["NOT deleted", "id LIKE ? || '%'"], [prefix, *states]
        if states:
            where.append(f"state IN ({','.join('?' * len(states))})")
        if after is not None:
            where.append(f"number {'>' if order == 'asc' else '<'} {self.get(after).number}")
        rows = self._rows(
            f"SELECT * FROM jobs WHERE {' AND '.join(where)} ORDER BY number {order.upper()} LIMIT {limit + 1:d}",
            values,
        )
        return [from_row(row) for row in rows[:limit]], len(rows) > limit

    def queue(self) -> list[Job]:
        """Jobs that wait, in the order in which they will run."""
        return [from_row(row) for row in self._rows("SELECT * FROM jobs WHERE state = 'queued' ORDER BY place")]

    def running(self) -> list[Job]:
        return [from_row(row) for row in self._rows("SELECT * FROM jobs WHERE state = 'in_progress' ORDER BY place")]

    def cancel(self, job_id: str) -> Job:
        """Ask a job to stop: one that waits is cancelled at once, one that runs within its step."""
        self.get(job_id)
        with self._write() as db:
            db.execute(
                "UPDATE jobs SET state = 'cancelled', finished_at = ?, error_code = 'cancelled',"
                " error_message = 'cancelled before it began' WHERE id = ? AND state = 'queued'",
                (time.time(), job_id),
            )
            db.execute("UPDATE jobs SET cancel = 1 WHERE id = ? AND state = 'in_progress'", (job_id,))
        return self.get(job_id)

    def delete(self, job_id: str) -> Job:
        """Remove a job from sight at once, and stop it; return what it was.

        The row of one that runs goes when its worker lets go (:meth:`forget`).
        """
        job = self.get(job_id)
        with self._write() as db:
            db.execute("UPDATE jobs SET deleted = 1, cancel = 1, key = NULL WHERE id = ?", (job_id,))
            db.execute("DELETE FROM jobs WHERE id = ? AND state != 'in_progress'", (job_id,))
        return job

    def retry(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again, behind the others.

        Raises:
            WrongStateError: it is in another state.
        """
        job = self.get(job_id)
        with self._write() as db:
            changed = db.execute(
                "UPDATE jobs SET state = 'queued', crashes = 0, cancel = 0, phase = '', step = 0, steps = 0,"
                " eta_s = NULL, started_at = NULL, finished_at = NULL, error_code = NULL, error_message = NULL,"
                " place = (SELECT max(place) + 1 FROM jobs)"
                " WHERE id = ? AND state IN ('failed', 'cancelled')",
                (job_id,),
            ).rowcount
        if not changed:
            raise WrongStateError(f"this job is {job.state}; only a failed or cancelled one can be tried again.")
        return self.get(job_id)

    def move(self, job_id: str, position: int) -> Job:
        """Put a waiting job at a position of the queue; 0 runs next.

        Raises:
            WrongStateError: it does not wait.
        """
        self.get(job_id)
        with self._write() as db:
            rows = db.execute("SELECT id, place FROM jobs WHERE state = 'queued' ORDER BY place").fetchall()
            order = [row["id"] for row in rows]
            if job_id not in order:
                raise WrongStateError("this job does not wait in the queue; only one that does can be moved.")
            order.remove(job_id)
            order.insert(max(0, position), job_id)
            places = [(row["place"], moved) for row, moved in zip(rows, order, strict=True)]
            db.executemany("UPDATE jobs SET place = ? WHERE id = ?", places)
        return self.get(job_id)

    def pause(self, *, paused: bool) -> None:
        """Stop, or go on, starting jobs; those that run are not touched."""
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO settings VALUES ('paused', ?)", (str(int(paused)),))

    @property
    def paused(self) -> bool:
        row = self._row("SELECT value FROM settings WHERE name = 'paused'")
        return row is not None and row["value"] == "1"

    # What is known of times

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        rows = self._rows("SELECT state, count(*) AS jobs FROM jobs WHERE NOT deleted GROUP BY state")
        return dict.fromkeys(("queued", "in_progress", *ENDED), 0) | {row["state"]: row["jobs"] for row in rows}

    def position(self, job: Job) -> int | None:
        """How many jobs run before this one; None for one that does not wait."""
        if job.state != "queued":
            return None
        row = self._row("SELECT count(*) AS ahead FROM jobs WHERE state = 'queued' AND place < ?", (job.place,))
        assert row is not None
        return int(row["ahead"])

    def wait_s(self, job: Job, *, workers: int) -> float | None:
        """Seconds until a waiting job starts, from the speed of the last jobs; None while no job was measured."""
        row = self._row("SELECT sum(work) AS ahead FROM jobs WHERE state = 'queued' AND place < ?", (job.place,))
        assert row is not None
        rate = self.seconds_per_tflop()
        if rate is None:
            return None
        running = sum(other.eta_s or 0 for other in self.running())
        return float(running + (row["ahead"] or 0) * rate) / max(1, workers)

    def seconds_per_tflop(self) -> float | None:
        """Speed of the last jobs, as the planner counts work; None while none was measured."""
        with self._lock:
            return self._seconds_per_tflop(self._db)

    def seconds_of_jobs(self) -> tuple[int, float]:
        """How many completed jobs the store holds, and the seconds they took."""
        row = self._row(
            "SELECT count(*) AS jobs, coalesce(sum(finished_at - started_at), 0) AS seconds FROM jobs"
            " WHERE state = 'completed'"
        )
        assert row is not None
        return row["jobs"], row["seconds"]

    def _seconds_per_tflop(self, db: sqlite3.Connection) -> float | None:
        row = db.execute(
            "SELECT sum(seconds) / sum(work) AS rate FROM (SELECT finished_at - started_at AS seconds, work FROM jobs"
            " WHERE state = 'completed' ORDER BY finished_at DESC LIMIT 20)"
        ).fetchone()
        return row["rate"] if row is not None else None

    def _wait_for_room(self, db: sqlite3.Connection) -> float:
        """One job has to start; without any measure, ten seconds."""
        rate = self._seconds_per_tflop(db)
        row = db.execute(
            "SELECT min(coalesce(eta_s, work * ?)) AS soonest FROM jobs WHERE state = 'in_progress'", (rate,)
        )
        soonest = row.fetchone()["soonest"]
        return 10.0 if soonest is None else max(1.0, soonest)

    # Workers: take, tell, end

    def claim(self, worker: str) -> Job | None:
        """Take the next job; None if there is none, or the queue is paused."""
        if self.paused or self._row("SELECT 1 FROM jobs WHERE state = 'queued'") is None:
            return None
        with self._write() as db:
            row = db.execute(
                "UPDATE jobs SET state = 'in_progress', worker = ?, started_at = ?, attempt = attempt + 1,"
                " phase = 'load', step = 0, steps = 0, eta_s = NULL"
                " WHERE id = (SELECT id FROM jobs WHERE state = 'queued' ORDER BY place LIMIT 1) RETURNING *",
                (worker, time.time()),
            ).fetchone()
            return from_row(row) if row is not None else None

    def wanted(self, job: Job) -> bool:
        """Whether the worker of this attempt should go on."""
        row = self._row(
            "SELECT cancel FROM jobs WHERE id = ? AND attempt = ? AND state = 'in_progress'", (job.id, job.attempt)
        )
        return row is not None and not row["cancel"]

    def tell(self, job: Job, phase: str, step: int, steps: int, eta_s: float | None) -> None:
        """Note how far an attempt is."""
        self._update(job, phase=phase, step=step, steps=steps, eta_s=eta_s)

    def complete(self, job: Job, files: dict[str, str], record: dict[str, Any]) -> bool:
        """End an attempt well; False if it was no longer this worker's."""
        return self._update(
            job,
            state="completed",
            finished_at=time.time(),
            eta_s=0.0,
            files=json.dumps(files),
            record=json.dumps(record),
        )

    def fail(self, job: Job, code: str, message: str) -> bool:
        """End an attempt with its reason."""
        return self._update(job, state="failed", finished_at=time.time(), error_code=code, error_message=message)

    def stopped(self, job: Job, where: str) -> bool:
        """End an attempt that was asked to stop."""
        message = f"cancelled at {where}"
        return self._update(
            job, state="cancelled", finished_at=time.time(), error_code="cancelled", error_message=message
        )

    def put_back(self, job: Job) -> bool:
        """Queue an attempt again that its worker had no time to finish; it keeps its place."""
        return self._update(job, state="queued", phase="", step=0, steps=0, eta_s=None)

    def worker_died(self, worker: str | None, reason: str) -> list[Job]:
        """Queue what a dead worker held again; at the third death fail it. None is every worker.

        Args:
            worker: its name.
            reason: what is told of the job that fails.

        Returns:
            the jobs, as they are now; deleted and cancelled ones included.
        """
        with self._write() as db:
            held = db.execute(
                "SELECT id FROM jobs WHERE state = 'in_progress' AND (? IS NULL OR worker = ?)", (worker, worker)
            ).fetchall()
            for row in held:
                db.execute(
                    "UPDATE jobs SET crashes = crashes + 1, phase = '', step = 0, steps = 0, eta_s = NULL,"
                    " state = CASE WHEN cancel THEN 'cancelled' WHEN crashes < ? THEN 'queued' ELSE 'failed' END,"
                    " finished_at = CASE WHEN cancel OR crashes >= ? THEN ? END,"
                    " error_code = CASE WHEN cancel THEN 'cancelled' WHEN crashes >= ? THEN 'worker_crashed' END,"
                    " error_message = CASE WHEN cancel THEN 'cancelled' WHEN crashes >= ? THEN ? END"
                    " WHERE id = ?",
                    (MAX_REQUEUES, MAX_REQUEUES, time.time(), MAX_REQUEUES, MAX_REQUEUES, reason, row["id"]),
                )
            return [from_row(db.execute("SELECT * FROM jobs WHERE id = ?", (row["id"],)).fetchone()) for row in held]

    def forget(self) -> list[Job]:
        """Remove the rows of deleted jobs that no worker holds; return them, so that their files can go too."""
        if self._row("SELECT 1 FROM jobs WHERE deleted AND state != 'in_progress'") is None:
            return []
        with self._write() as db:
            rows = db.execute("DELETE FROM jobs WHERE deleted AND state != 'in_progress' RETURNING *").fetchall()
            return [from_row(row) for row in rows]

    def all_files(self) -> set[str]:
        """Names of every file that a job, deleted ones included, still needs."""
        rows = self._rows("SELECT inputs, files FROM jobs")
        return {name for row in rows for name in (*json.loads(row["inputs"]), *json.loads(row["files"]).values())}

    def _update(self, job: Job, **values: Any) -> bool:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._write() as db:
            done = db.execute(
                f"UPDATE jobs SET {columns} WHERE id = ? AND attempt = ? AND state = 'in_progress'",
                (*values.values(), job.id, job.attempt),
            )
            return done.rowcount == 1

    # SQLite

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
