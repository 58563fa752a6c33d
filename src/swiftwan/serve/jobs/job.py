"""What a job is: a request that was accepted, how far it is, and how it ended."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, fields
from typing import Any, Literal

State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("completed", "failed", "cancelled")

MAX_REQUEUES = 2
"""How often a job whose worker died is queued again: a third death is the job's own doing."""


@dataclass(frozen=True)
class Job:
    """One row of the store.

    Attributes:
        number: order of arrival.
        place: order in the queue; the lowest runs first.
        request: of :func:`swiftwan.pipelines.request.request_from_json`, completed; paths are relative to the folder.
        model, plan: what ``Engine.load`` takes.
        inputs: names of the uploaded files that belong to it.
        work: TFLOP, as the planner counts them; what times to wait are estimated with.
        attempt: how many times it was started.
        crashes: how many of these ended with their worker's death.
        expired: its files were removed because they had been kept as long as the server keeps them.
        phase, step, steps, eta_s: where it is; eta_s None while unknown.
        files: names of what was written, by variant: video or image, thumbnail, spritesheet.
        record: seconds by stage, peak_bytes, sha256 and the like, once completed.
    """

    id: str
    number: int
    place: float
    state: State
    request: dict[str, Any]
    model: str
    plan: str | list[str]
    inputs: list[str]
    work: float
    created_at: float
    started_at: float | None
    finished_at: float | None
    attempt: int
    crashes: int
    cancel: bool
    expired: bool
    phase: str
    step: int
    steps: int
    eta_s: float | None
    files: dict[str, str]
    record: dict[str, Any]
    error_code: str | None
    error_message: str | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def progress(self) -> int:
        """Percent: 100 only once the file is there; it never falls within an attempt."""
        if self.state == "completed":
            return 100
        if self.state != "in_progress":
            return 0
        share = self.step / self.steps if self.steps else 0.0
        begin, end = _SPANS.get(self.phase, (0, 0))
        return int(begin + share * (end - begin))


# Denoising is nearly all of a run of tens of steps; what is left to each side only has to rise.
_SPANS = {"load": (0, 0), "image": (0, 1), "text": (1, 2), "denoise": (2, 90), "decode": (90, 98), "save": (99, 99)}

_JSON = ("request", "plan", "inputs", "files", "record")
_FLAGS = ("cancel", "expired")


def from_row(row: sqlite3.Row) -> Job:
    values = {field.name: row[field.name] for field in fields(Job)}
    told = {name: json.loads(values[name]) for name in _JSON} | {name: bool(values[name]) for name in _FLAGS}
    return Job(**values | told)
