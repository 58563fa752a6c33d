"""The front desk: what a server or a page asks for, in one object. No HTTP and no GPU in here."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from swiftwan.errors import OutputError, SwiftwanError
from swiftwan.pipelines.request import Request, request_from_json
from swiftwan.serve.jobs.admission import FILE_FIELDS, Admission, device_from_facts, stand_in
from swiftwan.serve.jobs.folder import Folder
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.store import Store
from swiftwan.serve.jobs.supervisor import WORKER, Patience, Supervisor
from swiftwan.serve.jobs.worker import WorkerSettings

Readiness = Literal["STARTING", "READY", "BUSY", "SETUP_FAILED", "DEFUNCT", "DRAINING"]


class NotReadyError(SwiftwanError):
    """No job is taken now: the server starts, stops, or has no worker."""


@dataclass(frozen=True)
class ServiceSettings:
    """How a service is set up.

    Attributes:
        folder: where jobs and files are kept; made if it is missing.
        model, plan, dtype: as ``Engine.load`` takes them; the model is there before the first job comes.
        others: models that may be asked for beside it; each is loaded when its turn comes.
        devices: one worker each.
        queue_limit: jobs that may wait.
        grace_s: how long a drain waits for running jobs.
        keep_s: how long the files of ended jobs are kept, and as long again their records; None is for ever.
        patience, command: of the supervisor.
    """

    folder: Path
    model: str = "pocket"
    plan: str | Sequence[str] = "auto"
    dtype: str | None = None
    others: Sequence[str] = ()
    devices: Sequence[str] = ("cpu",)
    queue_limit: int = 100
    grace_s: float = 30.0
    keep_s: float | None = None
    patience: Patience = field(default_factory=Patience)
    command: Sequence[str] = WORKER


class Service:
    """Owns the folder, the queue and the workers from :meth:`start` to :meth:`close`."""

    def __init__(self, settings: ServiceSettings) -> None:
        """Open the folder and put right what a crash left.

        Raises:
            OutputError: the folder cannot be made or written, its disk is full, or another server uses it.
            StoreError: another version of swiftwan wrote it.
        """
        self.settings = settings
        self.folder = Folder(settings.folder)
        self.folder.make()
        self._lock = FileLock(self.folder.lock)
        try:
            self._lock.acquire(timeout=2)  # the workers of a server that was killed need a moment to notice
        except Timeout:
            raise OutputError(f"another server uses '{settings.folder}'; stop it or choose another folder.") from None
        except OSError as error:
            told = f"the folder '{settings.folder}' cannot be written: {error.strerror}; choose another."
            raise OutputError(told) from None
        try:
            self.store = Store(self.folder.database, limit=settings.queue_limit)
            self.store.worker_died(None, "the server died in every attempt at this job; see its log.")
            self.store.forget()
        except sqlite3.OperationalError as error:
            told = f"the queue in '{settings.folder}' cannot be written: {error}; free some room or choose another."
            raise OutputError(told) from None
        self.folder.sweep(self.store.all_files())
        self.supervisor = Supervisor(
            self.folder, self.store, self._workers(), settings.patience, settings.command, settings.keep_s
        )
        self._admissions: dict[str, Admission] = {}
        self.admitting = False

    def _workers(self) -> list[WorkerSettings]:
        chosen = self.settings
        plan = chosen.plan if isinstance(chosen.plan, str) else list(chosen.plan)
        return [
            WorkerSettings(name, str(self.folder.root), chosen.model, plan, device=name, dtype=chosen.dtype)
            for name in chosen.devices
        ]

    def start(self) -> None:
        self.supervisor.start()
        self.admitting = True

    def drain(self) -> None:
        """Take no more jobs and end the workers, giving running jobs their time."""
        self.admitting = False
        self.supervisor.drain(self.settings.grace_s)

    def close(self) -> None:
        self.store.close()
        self._lock.release()

    @property
    def readiness(self) -> Readiness:
        slots = self.supervisor.slots
        if not self.admitting:
            return "DRAINING"
        if all(slot.early_deaths and slot.defunct for slot in slots):
            return "DEFUNCT"
        if any(slot.state == "ready" for slot in slots):
            return "SETUP_FAILED" if all(slot.problem for slot in slots) else "READY"
        return "BUSY" if any(slot.state == "busy" for slot in slots) else "STARTING"

    @property
    def models(self) -> tuple[str, ...]:
        """What can be asked for, the one that is loaded at the start first."""
        return (self.settings.model, *self.settings.others)

    def admission(self, model: str | None = None) -> Admission:
        """What can be asked of a model here; None is the first.

        Raises:
            NotReadyError: no worker has told its device yet, or the server stops.
        """
        if not self.admitting:
            raise NotReadyError("the server is stopping and takes no more jobs; try another, or later.")
        if not self.supervisor.devices:
            raise NotReadyError("the server is starting; try again in a few seconds.")
        model = model or self.settings.model
        if model not in self._admissions:
            device = device_from_facts(self.supervisor.devices[0])
            self._admissions[model] = Admission(model, self.settings.plan, device, self.settings.dtype)
        return self._admissions[model]

    def submit(
        self,
        request: Request,
        *,
        model: str | None = None,
        plan: str | list[str] | None = None,
        inputs: Sequence[str] = (),
        sizes: Sequence[tuple[int, int]] = (),
        key: str | None = None,
        fingerprint: str = "",
    ) -> tuple[Job, bool]:
        """Check a request and queue it; return the job, and whether it is new (False: the key was known).

        Args:
            request: its paths are names that ``folder.take_in`` gave.
            model: one of ``models``; None is the first.
            inputs: these names.
            sizes: width and height of each; () where the request says the size itself.

        Raises:
            RequestError, PlanError, WillNotFitError: it cannot be met.
            QueueFullError, KeyReusedError, NotReadyError, DiskFullError: it cannot be taken now.
        """
        admission = self.admission(model)
        explanation = admission.check(stand_in(request, sizes), plan)
        self.folder.check_room()
        load = explanation.load
        files = {name: getattr(request, name) for name in FILE_FIELDS if hasattr(request, name)}
        return self.store.add(
            replace(explanation.request, **files).to_json(),
            model=admission.model,
            plan=_listed(self.settings.plan if plan is None else plan),
            inputs=inputs,
            work=load.forwards * load.tflop_per_forward,
            prefix="image" if explanation.request.num_frames == 1 else "video",
            key=key,
            fingerprint=fingerprint,
        )

    def delete(self, job_id: str) -> Job:
        """Stop a job and remove it with its files: at once, or when its worker lets go."""
        job = self.store.delete(job_id)
        if job.state != "in_progress":
            self.folder.remove_job(job)
        return job

    def expires_at(self, job: Job) -> float | None:
        """When the files of an ended job go (seconds since 1970); None for never, or not known yet."""
        return None if self.settings.keep_s is None or not job.finished_at else job.finished_at + self.settings.keep_s

    def wait_s(self, job: Job) -> float | None:
        """Seconds until a waiting job starts, if that can be told."""
        return self.store.wait_s(job, workers=len(self.supervisor.slots)) if job.state == "queued" else None

    def wait_for_new_s(self) -> float | None:
        """Seconds until a job that is added now would start, if that can be told."""
        return self.store.wait_for_new_s(workers=len(self.supervisor.slots))

    def wait_for(self, job_id: str, *, timeout_s: float) -> Job:
        """Return a job when it has ended, or as it is after the time."""
        end = time.monotonic() + timeout_s
        while not (job := self.store.get(job_id)).ended and time.monotonic() < end:
            time.sleep(0.05)
        return job

    def request_of(self, job: Job) -> Request:
        return request_from_json(job.request)


def fingerprint(fields: dict[str, Any], contents: Iterable[bytes]) -> str:
    """Tell calls apart by what they ask and bring."""
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _listed(plan: str | Sequence[str]) -> str | list[str]:
    return plan if isinstance(plan, str) else list(plan)
