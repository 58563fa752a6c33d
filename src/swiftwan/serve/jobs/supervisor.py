"""Keeps one worker process a device alive, and gives a dead one's job another chance."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from swiftwan.serve.jobs.folder import Folder
from swiftwan.serve.jobs.store import Store
from swiftwan.serve.jobs.worker import WorkerSettings

WorkerState = Literal["starting", "ready", "busy", "dead"]

_log = logging.getLogger(__name__)

_DEFUNCT_AFTER = 5

WORKER = (sys.executable, "-m", "swiftwan.serve.jobs.worker")


@dataclass
class Slot:
    """A device and the process that works on it now.

    Attributes:
        beat, moved: when the process last spoke, and last made progress (monotonic seconds).
        early_deaths: how many processes in a row died before they were ready.
        gpu: by what NVML knows the device, if it is one of its own.
        problem: why the model could not be loaded, if so.
    """

    settings: WorkerSettings
    process: subprocess.Popen[str] | None = None
    state: WorkerState = "starting"
    device: dict[str, Any] | None = None
    gpu: str | None = None
    problem: str | None = None
    beat: float = 0.0
    moved: float = 0.0
    restart_at: float = 0.0
    early_deaths: int = 0
    restarts: int = 0

    @property
    def defunct(self) -> bool:
        return self.early_deaths >= _DEFUNCT_AFTER


@dataclass(frozen=True)
class Patience:
    """How long a worker may be silent, in seconds.

    ``stall_s`` is between two steps: loading or compiling a 14B model takes minutes.
    """

    silent_s: float = 30.0
    stall_s: float = 1800.0
    back_off_s: float = 30.0


@dataclass
class Supervisor:
    """Start, watch, restart and drain the workers of a folder.

    ``command`` starts a worker; its settings follow as one JSON argument. Files of jobs go ``keep_s`` seconds after
    their end, and their records as long after that: a client that comes late learns that it is late.
    """

    folder: Folder
    store: Store
    settings: Sequence[WorkerSettings]
    patience: Patience = field(default_factory=Patience)
    command: Sequence[str] = WORKER
    keep_s: float | None = None

    def __post_init__(self) -> None:
        self.slots = [Slot(settings) for settings in self.settings]
        self.draining = False
        self._next_expiry = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        for slot in self.slots:
            self._spawn(slot)
        self._thread.start()

    def drain(self, grace_s: float) -> None:
        """Start no more jobs; let running ones end for ``grace_s`` seconds, then put them back into the queue."""
        self.draining = True
        self._say("drain")
        if not self._all_gone_within(grace_s):
            self._say("stop")
            if not self._all_gone_within(15):
                for slot in self.slots:
                    if slot.process is not None:
                        slot.process.kill()
                self._all_gone_within(15)
        self._end.set()
        self._thread.join()

    def reload(self) -> None:
        """Have every worker load its model anew for its next job."""
        self._say("reload")

    @property
    def devices(self) -> list[dict[str, Any]]:
        """What the workers said of their devices; empty until the first has come up."""
        return [slot.device for slot in self.slots if slot.device is not None]

    # The processes

    def _spawn(self, slot: Slot) -> None:
        slot.process = subprocess.Popen(
            [*self.command, json.dumps(asdict(slot.settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        slot.state = "starting"
        slot.beat = slot.moved = time.monotonic()
        assert slot.process.stdout is not None
        reader = threading.Thread(target=self._read, args=(slot, slot.process.stdout), daemon=True)
        reader.start()

    def _read(self, slot: Slot, messages: IO[str]) -> None:
        for line in messages:
            message = json.loads(line)
            slot.beat = time.monotonic()
            slot.device = message.get("device", slot.device)
            slot.gpu = message.get("gpu", slot.gpu)
            if "state" in message:
                slot.state = message["state"]
                slot.problem = message.get("problem", slot.problem)
                slot.moved = slot.beat
        messages.close()

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            for slot in self.slots:
                try:
                    self._look_after(slot)
                except sqlite3.OperationalError as error:  # a full disk: the next round tries again
                    _log.error("the queue cannot be written: %s", error)
            if not self.draining:
                self._tidy()

    def _look_after(self, slot: Slot) -> None:
        now = time.monotonic()
        if slot.process is None:
            if now >= slot.restart_at and not self.draining:
                slot.restarts += 1
                self._spawn(slot)
            return
        code = slot.process.poll()
        if code is None:
            stalled = slot.state != "ready" and now - slot.moved > self.patience.stall_s
            if stalled or now - slot.beat > self.patience.silent_s:
                _log.error("worker %s is silent; killing it", slot.settings.name)
                slot.process.kill()
            return
        self._bury(slot, code, now)

    def _bury(self, slot: Slot, code: int, now: float) -> None:
        """Give its job another chance first: should that fail, the next round comes back here."""
        why = _death(code)
        advice = "take fewer frames or a smaller size, or see the server's log"
        reason = f"the worker died in every attempt, at last of {why}; {advice}."
        for job in self.store.worker_died(slot.settings.name, reason):
            _log.error("worker %s died of %s; job %s is %s", slot.settings.name, why, job.id, job.state)
        assert slot.process is not None
        if slot.process.stdin is not None:
            slot.process.stdin.close()
        slot.process = None
        slot.early_deaths = slot.early_deaths + 1 if slot.state == "starting" else 0
        slot.state = "dead"
        slot.restart_at = now + min(self.patience.back_off_s, 0.25 * 2**slot.early_deaths)

    def _tidy(self) -> None:
        """Remove the files of deleted and of expired jobs."""
        try:
            gone = self.store.forget()
            if self.keep_s is not None and time.monotonic() >= self._next_expiry:
                self._next_expiry = time.monotonic() + min(60.0, self.keep_s / 10)
                gone += self.store.expire(time.time() - self.keep_s)
                gone += self.store.prune(time.time() - 2 * self.keep_s)
            for job in gone:
                self.folder.remove_job(job)
        except sqlite3.OperationalError as error:
            _log.error("the queue cannot be written: %s", error)

    def _say(self, word: str) -> None:
        for slot in self.slots:
            if slot.process is not None and slot.process.stdin is not None:
                try:
                    slot.process.stdin.write(word + "\n")
                    slot.process.stdin.flush()
                except OSError:  # it has just gone
                    continue

    def _all_gone_within(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if all(slot.process is None for slot in self.slots):
                return True
            time.sleep(0.05)
        return False


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
