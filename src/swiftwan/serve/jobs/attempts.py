"""What a worker does with jobs: takes one, tells how far it is, and notes how it ended.

A worker names the attempt it works on with every write, so that one that was given up for dead cannot overwrite
what its successor does.
"""

from __future__ import annotations

import json
import time
from typing import Any

from swiftwan.serve.jobs.database import Database
from swiftwan.serve.jobs.job import MAX_REQUEUES, Job, from_row


class Attempts(Database):
    @property
    def paused(self) -> bool:
        row = self._row("SELECT value FROM settings WHERE name = 'paused'")
        return row is not None and row["value"] == "1"

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

    def _update(self, job: Job, **values: Any) -> bool:
        columns = ", ".join(f"{name} = ?" for name in values)
        with self._write() as db:
            done = db.execute(
                f"UPDATE jobs SET {columns} WHERE id = ? AND attempt = ? AND state = 'in_progress'",
                (*values.values(), job.id, job.attempt),
            )
            return done.rowcount == 1
