"""One worker: a process that owns one device, takes jobs from the store and runs them one after the other.

    python -m swiftwan.serve.jobs.worker '{"name": ..., "root": ..., ...}'

It tells its supervisor what it does, one JSON object a line on stdout, and is told `drain` (end after this job),
`stop` (put this job back within a step) or `reload` (load the model anew for the next job) on stdin. When stdin closes
the supervisor is gone, and so is the worker.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from swiftwan.errors import Cancelled, MemoryLimitError, OutputError, RequestError, SwiftwanError, WeightsError
from swiftwan.memory import WillNotFitError
from swiftwan.serve.jobs.folder import DiskFullError, Folder
from swiftwan.serve.jobs.job import Job
from swiftwan.serve.jobs.store import Store

if TYPE_CHECKING:
    from swiftwan.engine import Engine
    from swiftwan.models.vae import WanVAE
    from swiftwan.pipelines.result import StepEvent
    from swiftwan.serve.jobs.preview import Glimpse

SICK = 70
"""Exit code of a worker whose device no longer answers: its job is not to blame."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is started with.

    Attributes:
        name: its place, for example ``cuda:0``.
        root: the server's folder.
        device, dtype: as ``Engine.load`` takes them.
        model, plan: loaded before the first job comes.
    """

    name: str
    root: str
    model: str
    plan: str | list[str]
    device: str | None = None
    dtype: str | None = None


class PutBack(Exception):
    """The server stops, and the job goes back into the queue."""


class Worker:
    def __init__(self, settings: WorkerSettings, tell: Callable[[dict[str, Any]], None]) -> None:
        self.settings = settings
        self.tell = tell
        self.folder = Folder(Path(settings.root))
        self.store = Store(self.folder.database)
        self.draining = threading.Event()
        self.stopping = threading.Event()
        self.stale = threading.Event()
        self.load_s = 0.0
        self._loaded: tuple[str, str] | None = None
        self._engine: Engine | None = None
        self.decode_s_per_pixel = 0.0
        """Of the last job; unknown to the first, whose ETA is then short by its decoding."""

    def listen(self, commands: IO[str]) -> None:
        """Follow the supervisor's words until it is gone."""
        for word in map(str.strip, commands):
            if word == "reload":
                self.stale.set()
                continue
            self.draining.set()
            if word == "stop":
                self.stopping.set()
        os._exit(0)

    def run(self) -> None:
        """Load the model, then take jobs until told to drain."""
        facts = self.device_facts()
        self.tell({"device": facts, "gpu": _uuid(facts["torch_device"])})
        problem = None
        try:
            self.engine_for(self.settings.model, self.settings.plan)
        except SwiftwanError as error:  # jobs will fail with it, one by one, and may name another plan
            problem = str(error)
            _log.error("%s: %s", self.settings.name, problem)
        while not self.draining.is_set():
            self.tell({"state": "ready", "problem": problem})
            job = self._next()
            if job is not None:
                self.tell({"state": "busy"})
                self.work(job)

    def device_facts(self) -> dict[str, Any]:
        """What this worker runs on, for the admission of jobs."""
        from swiftwan.device import pick_device

        device = pick_device(self.settings.device)
        return asdict(device) | {"dtype": str(device.dtype).removeprefix("torch.")}

    def _next(self) -> Job | None:
        while not self.draining.is_set():
            if job := self.store.claim(self.settings.name):
                return job
            self.draining.wait(0.1)
        return None

    def work(self, job: Job) -> None:
        """Run a job and note how it ended."""
        end = self._attempt(job)
        if self._engine is not None and not _answers(self._engine.torch_device.type):
            _log.error("%s no longer answers; leaving", self.settings.name)
            os._exit(SICK)
        gc.collect()
        self._surely(end)
        for other in self.store.forget():
            self.folder.remove_job(other)

    def _attempt(self, job: Job) -> Callable[[], Any]:
        """Make the video; return what is to be noted. What is raised ends here, and its tensors with it."""
        watch = Watch(self, job)
        try:
            files, record = self.make(job, watch)
        except PutBack:
            return lambda: self.store.put_back(job)
        except Cancelled:
            where = watch.where
            return lambda: self.store.stopped(job, where)
        except Exception as error:
            code, message = _reason(error)
            if code == "internal":
                _log.exception("job %s", job.id)
            return lambda: self.store.fail(job, code, message)

        def keep() -> None:
            if not self.store.complete(job, files, record):
                self.folder.remove(files.values())

        return keep

    def make(self, job: Job, watch: Watch) -> tuple[dict[str, str], dict[str, Any]]:
        """Run a job's request; return the names of its files, and its record."""
        from swiftwan.pipelines.request import request_from_json
        from swiftwan.serve.jobs.preview import Glimpse
        from swiftwan.serve.jobs.results import save

        self.folder.check_room()
        engine = self.engine_for(job.model, job.plan)
        watch.check()
        watch.glimpse = Glimpse()
        result = engine.run(request_from_json(job.request), on_step=watch.on_step)
        self.decode_s_per_pixel = 3 * result.seconds.get("decode", 0.0) / result.frames.numel()
        watch.begin("save")
        files, record = save(self.folder, job, result)
        return files, record | {"load_seconds": round(self.load_s, 3)}

    def engine_for(self, model: str, plan: str | list[str]) -> Engine:
        """The engine of a model and plan; another one is dropped first, since two seldom fit."""
        wanted = (model, json.dumps(plan))
        if self._engine is None or self._loaded != wanted or self.stale.is_set():
            from swiftwan.engine import Engine

            self.stale.clear()
            self._engine = self._loaded = None
            gc.collect()
            began = time.monotonic()
            self._engine = Engine.load(model, plan=plan, device=self.settings.device, dtype=self.settings.dtype)
            self.load_s = time.monotonic() - began
            self._loaded = wanted
        return self._engine

    @property
    def vae(self) -> WanVAE:
        assert self._engine is not None
        return self._engine.parts.vae

    def _surely(self, note: Callable[[], Any]) -> None:
        """Write down how a job ended; while the disk has no room, wait: no other job could be noted either."""
        while True:
            try:
                note()
                return
            except sqlite3.OperationalError as error:
                _log.error("%s: the queue cannot be written (%s); trying again", self.settings.name, error)
            if self.stopping.wait(1):
                os._exit(1)


class Watch:
    """Follows a run: notes progress, stops it when asked, and shows what it will be."""

    NOTE_S = 0.2
    PREVIEW_S = 0.5
    PREVIEW_SHARE = 0.05  # of the time, at most

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker = worker
        self.job = job
        self.glimpse: Glimpse | None = None
        self.where = "load"
        pixels = math.prod(int(job.request[side]) for side in ("num_frames", "height", "width"))
        self._decode_s = worker.decode_s_per_pixel * pixels
        self._first_step = 0.0
        self._noted = self._preview_at = -1e9

    def check(self) -> None:
        """Raise Cancelled or PutBack if the job must not go on."""
        if self.worker.stopping.is_set():
            raise PutBack
        if not self.worker.store.wanted(self.job):
            raise Cancelled("cancelled")

    def begin(self, phase: str) -> None:
        self.check()
        self.where = phase
        self._note(phase, 0, 0, None)

    def on_step(self, event: StepEvent) -> None:
        """Take a step of the engine."""
        self.where = f"{event.phase} {event.step} of {event.steps}"
        self.worker.tell({"state": "busy"})
        self.check()
        now = time.monotonic()
        if event.step == 1:
            self._first_step = now
        last = event.step == event.steps
        if last or now - self._noted >= self.NOTE_S:
            self._noted = now
            self._note(event.phase, event.step, event.steps, self._eta(event, now))
        if event.latents is not None and event.timestep is not None and self.glimpse is not None:
            self.glimpse.see(event.latents, event.timestep)
            if now >= self._preview_at:
                self._preview(self.worker.vae, self.glimpse)

    def _eta(self, event: StepEvent, now: float) -> float | None:
        """Seconds left; the first step of a phase, which compiles and warms up, tells nothing."""
        if event.step < 2 or event.phase not in ("denoise", "decode"):
            return None
        left = (now - self._first_step) / (event.step - 1) * (event.steps - event.step)
        return left + self._decode_s if event.phase == "denoise" else left

    def _note(self, phase: str, step: int, steps: int, eta_s: float | None) -> None:
        try:
            self.worker.store.tell(self.job, phase, step, steps, eta_s)
        except sqlite3.OperationalError as error:  # the end of the job must be written, its progress need not
            _log.warning("progress not written: %s", error)

    def _preview(self, vae: WanVAE, glimpse: Glimpse) -> None:
        from swiftwan.serve.jobs.preview import preview_jpeg

        began = time.monotonic()
        latents = glimpse.take()
        if latents is None or (picture := preview_jpeg(vae, latents)) is None:
            return
        folder = self.worker.folder
        try:
            folder.write(folder.preview(self.job), [picture], durable=False)
        except OutputError as error:
            _log.warning("preview not written: %s", error)
        now = time.monotonic()
        self._preview_at = now + max(self.PREVIEW_S, (now - began) / self.PREVIEW_SHARE)


def _reason(error: Exception) -> tuple[str, str]:
    """A code for programs and words for people; nothing of ours that a client must not see."""
    match error:
        case MemoryLimitError() | WillNotFitError():
            code = "out_of_memory"
        case MemoryError():
            return "out_of_memory", "the server ran out of memory; take fewer frames or a smaller size."
        case DiskFullError():
            code = "disk_full"
        case OutputError() if isinstance(error.__cause__, OSError):
            from swiftwan.serve.jobs.folder import refused

            known = refused(error.__cause__)
            return "disk_full" if isinstance(known, DiskFullError) else "output_failed", str(known)
        case OutputError():
            return "output_failed", "the server could not write or read a file of this job."
        case WeightsError():
            return "model_unavailable", "the server could not load the model; its log says why."
        case RequestError():
            code = "invalid_request"
        case _:
            return "internal", f"unexpected {type(error).__name__}; the server's log has more."
    return code, str(error)


def _uuid(torch_device: str) -> str | None:
    """By what NVML knows a GPU; the server reads its memory without a CUDA context of its own."""
    if not torch_device.startswith("cuda"):
        return None
    import torch

    return str(torch.cuda.get_device_properties(torch_device).uuid)


def _answers(device_type: str) -> bool:
    """Whether the device still works: after an illegal access every later call fails."""
    if device_type != "cuda":
        return True
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def main(kind: type[Worker] = Worker) -> None:
    """Be a worker until drained."""
    settings = WorkerSettings(**json.loads(sys.argv[1]))
    # What a library writes to stdout must not be taken for a message.
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s worker {settings.name}: %(message)s")
    lock = threading.Lock()

    def tell(message: dict[str, Any]) -> None:
        with lock:
            try:
                messages.write(json.dumps(message) + "\n")
            except BrokenPipeError:  # the supervisor was killed: its successor decides about the job, nothing is noted
                os._exit(0)

    def beat() -> None:
        while True:
            tell({})
            time.sleep(1)

    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    threading.Thread(target=beat, daemon=True).start()
    os.chdir(settings.root)  # inputs are named relative to it, so that no path gets into a video's record
    worker = kind(settings, tell)
    threading.Thread(target=worker.listen, args=(sys.stdin,), daemon=True).start()
    worker.run()
    os._exit(0)  # skips the slow unloading of a model; every file and row is on the disk


if __name__ == "__main__":
    main()
