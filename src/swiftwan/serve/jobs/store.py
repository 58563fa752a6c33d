"""The queue as its clients see it: jobs in one SQLite file, accepted, looked at, ordered, stopped and kept."""

from __future__ import annotations

import json
import math
import secrets
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from swiftwan.serve.jobs.attempts import Attempts
from swiftwan.serve.jobs.database import StoreError
from swiftwan.serve.jobs.job import ENDED, Job, State, from_row


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


class Store(Attempts):
    """The jobs of one folder."""

    def __init__(self, path: Path, *, limit: int = 100) -> None:
        """Open, or make, the file.

        Args:
            path: of the database.
            limit: how many jobs may be queued.
        """
        super().__init__(path)
        self.limit = limit

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
        """Jobs at work; one that was deleted is out of sight already, and stops within its step."""
        query = "SELECT * FROM jobs WHERE state = 'in_progress' AND NOT deleted ORDER BY place"
        return [from_row(row) for row in self._rows(query)]

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
            WrongStateError: it is in another state, or its files have expired.
        """
        job = self.get(job_id)
        if job.expired and job.inputs:
            raise WrongStateError("the files of this job have expired; send it anew with its images.")
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

    def expire(self, before: float) -> list[Job]:
        """Mark jobs that ended before a time as expired; return them, so that their files can go.

        Their records stay until :meth:`prune`.
        """
        with self._write() as db:
            rows = db.execute(
                f"UPDATE jobs SET expired = 1 WHERE NOT expired AND finished_at < ? AND state IN {ENDED} RETURNING *",
                (before,),
            ).fetchall()
            return [from_row(row) for row in rows]

    def prune(self, before: float) -> list[Job]:
        """Remove the records of jobs that ended before a time; return them, so that files can go that are left."""
        with self._write() as db:
            query = f"DELETE FROM jobs WHERE finished_at < ? AND state IN {ENDED} RETURNING *"
            return [from_row(row) for row in db.execute(query, (before,)).fetchall()]

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
        return self._wait_behind(job.place, workers)

    def wait_for_new_s(self, *, workers: int) -> float | None:
        """The same for a job that is added now."""
        return self._wait_behind(math.inf, workers)

    def _wait_behind(self, place: float, workers: int) -> float | None:
        row = self._row("SELECT sum(work) AS ahead FROM jobs WHERE state = 'queued' AND place < ?", (place,))
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
        """How many jobs were ever completed, and the seconds they took; deleted and forgotten ones count."""
        row = self._row("SELECT jobs, seconds FROM totals")
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

    def all_files(self) -> set[str]:
        """Names of every file that a job, deleted ones included, still needs."""
        rows = self._rows("SELECT inputs, files FROM jobs WHERE NOT expired")
        return {name for row in rows for name in (*json.loads(row["inputs"]), *json.loads(row["files"]).values())}
