"""``swiftwan generate --prompts FILE --out FOLDER``: many requests on one engine.

What fails is told at the end and the rest is done. Run again, it goes on: a file that was already made from the same
request, by its record, is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from swiftwan.cli.asked import Asked
from swiftwan.cli.progress import Display, cancellable
from swiftwan.cli.understand import (
    ending,
    short_name,
    understand_plan,
    understand_request,
    words_of,
)
from swiftwan.errors import Cancelled, MemoryLimitError, OutputError, RequestError
from swiftwan.memory import refuse_what_cannot_fit
from swiftwan.pipelines.request import TASKS, Request, request_from_json

if TYPE_CHECKING:
    from swiftwan.engine import Engine


@dataclass(frozen=True)
class Job:
    """One line of the file: its number, and the request and name that it comes to."""

    line: int
    request: Request
    out: Path


@dataclass
class Outcome:
    """What became of each line; a failure is a line's number and the reason."""

    written: list[Path] = field(default_factory=list)
    there: list[Path] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.written)} written, {len(self.there)} already there, {len(self.failed)} failed"

    def to_json(self) -> dict[str, Any]:
        return {
            "written": [str(path) for path in self.written],
            "already_there": [str(path) for path in self.there],
            "failed": [{"line": line, "error": reason} for line, reason in self.failed],
        }


def generate_many(asked: Asked, display: Display) -> Outcome:
    """Run every line of ``--prompts``.

    Raises:
        RequestError: the file cannot be read or is empty, or options that cannot go with it.
        PlanError, UnavailableError, WeightsError: what would fail every line.
        OutputError: the folder cannot be made.
    """
    entries = list(_entries(asked))
    runner = Runner(asked, display)
    folder = _folder(asked)
    outcome = Outcome()
    names: set[Path] = set()
    try:
        with cancellable(display):
            for number, (line, text) in enumerate(entries, 1):
                try:
                    job = _job(asked, folder, line, number, text)
                    if job.out in names:
                        raise RequestError(f"'{job.out.name}' is the name of an earlier line too; give another 'out'.")
                    names.add(job.out)
                    typer.echo(f"{number}/{len(entries)} {job.out}", err=True)
                    if runner.is_done(job):
                        outcome.there.append(job.out)
                    else:
                        outcome.written.append(runner.run(job))
                except (RequestError, OutputError, MemoryLimitError) as error:
                    outcome.failed.append((line, str(error)))
    except Cancelled:
        raise Cancelled(f"cancelled at {display.where}; {outcome}; run the same again for the rest") from None
    return outcome


class Runner:
    """One engine for all lines, loaded when the first one needs it."""

    def __init__(self, asked: Asked, display: Display) -> None:
        from swiftwan.device import pick_device
        from swiftwan.plan import describe, make_plan

        self.asked, self.display = asked, display
        self.model = "pocket" if asked.model is None else asked.model
        # One plan for all lines, so that a later call finds what it has made.
        named = understand_plan(asked, {})
        self.plan = make_plan(named, pick_device(asked.device), asked.dtype, describe(self.model)).specs
        self.engine: Engine | None = None

    def is_done(self, job: Job) -> bool:
        """Whether the job's file is there, made from the same request, inputs, model and plan.

        Raises:
            RequestError: the request cannot run.
            OutputError: there is a file of that name which swiftwan did not write, or none can be written.
        """
        from swiftwan.media import check_writable, read_record
        from swiftwan.plan import explain

        record = read_record(job.out) if job.out.exists() else {}
        request = job.request
        if request.seed is None and record:
            request = replace(request, seed=record["request"].get("seed"))
        told = explain(self.model, request, plan=self.plan, device=self.asked.device, dtype=self.asked.dtype)
        wanted = {
            "model": self.model,
            "request": told.request.to_json(),
            "plan": list(told.plan.specs),
            "inputs": [vars(given) for given in told.given],
        }
        if {"inputs": []} | {name: record[name] for name in wanted if name in record} == wanted:
            return True
        refuse_what_cannot_fit(told)
        assert told.request.num_frames is not None
        assert told.request.height is not None
        assert told.request.width is not None
        size = {"height": told.request.height, "width": told.request.width}
        check_writable(job.out, num_frames=told.request.num_frames, **size)
        return False

    def run(self, job: Job) -> Path:
        """Make the job's file."""
        from swiftwan.engine import Engine

        if self.engine is None:
            self.display.begin("load")
            self.engine = Engine.load(self.model, plan=self.plan, device=self.asked.device, dtype=self.asked.dtype)
        self.display.begin("image" if job.request.brings_pixels else "text")
        self.engine.run(job.request, on_step=self.display.on_step, out=job.out, quality=self.asked.file_quality)
        self.display.end()
        return job.out


def _folder(asked: Asked) -> Path:
    assert asked.prompts is not None
    for word, value in {"a prompt": asked.prompt, "--like": asked.like}.items():
        if value is not None:
            raise RequestError(f"{word} and --prompts are both given; the file '{asked.prompts}' has the prompts.")
    if asked.out is None:
        raise RequestError("--prompts makes many files; give a folder for them with --out.")
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder '{asked.out}' cannot be made: {error.strerror}; choose another.") from None
    return asked.out


def _entries(asked: Asked) -> Iterator[tuple[int, str]]:
    """The lines that say something, with their numbers."""
    assert asked.prompts is not None
    try:
        lines = asked.prompts.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"'{asked.prompts}' is no UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise RequestError(f"'{asked.prompts}' cannot be read: {error.strerror}.") from None
    entries = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    entries = [(number, line) for number, line in entries if line and not line.startswith("#")]
    if not entries:
        raise RequestError(f"'{asked.prompts}' has no prompts; write one a line.")
    yield from entries


def _job(asked: Asked, folder: Path, line: int, number: int, text: str) -> Job:
    request, name = _from_json(asked, text) if text.startswith("{") else (_from_words(asked, text), None)
    wanted = ending(type(request).__name__)
    if name is None:
        name = f"{number:04}-{short_name(request.prompt)}{wanted}"
    elif Path(name).name != name or Path(name).suffix.lower() != wanted:
        # The file may be anyone's: nothing it names lies outside the folder.
        raise RequestError(f"out is '{name}'; it must be the name of a {wanted} file, without a folder.")
    return Job(line, request, folder / name)


def _from_words(asked: Asked, prompt: str) -> Request:
    out = Path("x.png") if asked.frames == 1 else None
    return understand_request(replace(asked, prompt=prompt, out=out), {})


def _from_json(asked: Asked, text: str) -> tuple[Request, str | None]:
    """A request and the name it asks for; the command line fills in what the line leaves open."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"no JSON object: {error}.") from None
    name = values.pop("out", None)
    if not isinstance(name, str | None):
        raise RequestError(f"out is {name!r}; it must be text.")
    task = str(values.get("task", "TextToVideo"))
    open_words = words_of(asked, task) if task in TASKS else {}
    return request_from_json({"task": task} | open_words | values), name
