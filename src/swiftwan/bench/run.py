"""Run a matrix: every cell in a process of its own, taking turns, each result on the disk before the next.

    OUT/journal.jsonl   what was measured, a line a cell and round, as it came
    OUT/rows.jsonl      a row a cell: medians, spreads, ratios; made from the journal
    OUT/report.md, report.html
    OUT/videos, OUT/logs, OUT/reference

Killed and started again, it runs what is missing: a line's key is made of the cell, the round, the device, the versions
and the code, so lines of another time or place are left aside.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from swiftwan.bench.cell import Job
from swiftwan.bench.machine import Machine
from swiftwan.bench.matrix import Cell, Matrix
from swiftwan.bench.rows import Journal, Row, content_key
from swiftwan.errors import OutputError, RequestError, SwiftwanError

_UNFIT = re.compile(r"[^\w.=-]+")
"""What a plan's name may hold and a file's should not."""

RunCell = Callable[[Job, float], Row]
"""A job and its time limit in seconds, to the values it measured."""


@dataclass(frozen=True)
class Turn:
    """A cell in one round, and the key its line has in the journal."""

    cell: Cell
    round: int
    key: str


def turns(matrix: Matrix, machine: Machine) -> list[Turn]:
    """All that is to be run, in order: rounds go forth and back, so that what drifts hits first and last alike."""
    cells = matrix.cells()
    return [
        Turn(cell, number, _key(cell, number, machine))
        for number in range(matrix.rounds)
        for cell in (cells if number % 2 == 0 else reversed(cells))
    ]


def _key(cell: Cell, number: int, machine: Machine) -> str:
    return content_key({"cell": cell.to_json(), "round": number, **machine.identity})


@dataclass(frozen=True)
class Progress:
    """One turn done: how many are, how many there are, and its line."""

    done: int
    turns: int
    row: Row


def run_matrix(
    matrix: Matrix, out: Path, machine: Machine, run_cell: RunCell, *, retry: bool = False
) -> Iterator[Progress]:
    """Run what the journal lacks, yielding each turn as its line is written.

    Args:
        retry: run failed, refused and out-of-memory cells again.

    Raises:
        OutputError: a folder, a video or a line cannot be written; what is done is kept.
    """
    try:
        for folder in (out, out / "logs", out / "videos", out / "reference"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written: {error.strerror}; give another --out.") from None
    journal = Journal(out / "journal.jsonl")
    have = {row.get("key") for row in journal.read() if row.get("status") == "ok" or not retry}
    everything = turns(matrix, machine)
    missing = [turn for turn in everything if turn.key not in have]
    missing = [*_lost_references(journal, missing, out, matrix, machine), *missing]
    for done, turn in enumerate(missing, len(everything) - len(missing) + 1):
        row = _run(turn, matrix, out, machine, run_cell)
        journal.append(row)
        yield Progress(done, len(everything), row)


def _lost_references(journal: Journal, missing: list[Turn], out: Path, matrix: Matrix, machine: Machine) -> list[Turn]:
    """Baselines that ran, and whose frames are no longer there though a cell is yet to be compared with them."""
    ran = {row.get("key") for row in journal.read() if row.get("status") == "ok"}
    compared = [turn.cell for turn in missing if turn.round == 0 and not turn.cell.is_baseline]
    wanted = {turn.key: turn for turn in (_baseline(cell, matrix, machine) for cell in compared)}
    return [turn for key, turn in wanted.items() if key in ran and not _reference(turn, out).exists()]


def _baseline(cell: Cell, matrix: Matrix, machine: Machine) -> Turn:
    """The baseline's first turn of the cell's model and request, whose frames the cell is compared with."""
    alike = (each for each in matrix.cells() if (each.model, each.request_name) == (cell.model, cell.request_name))
    baseline = next(each for each in alike if each.is_baseline)
    return Turn(baseline, 0, _key(baseline, 0, machine))


def _reference(turn: Turn, out: Path) -> Path:
    return out / "reference" / f"{turn.key}.safetensors"


def _run(turn: Turn, matrix: Matrix, out: Path, machine: Machine, run_cell: RunCell) -> Row:
    cell = turn.cell
    job = Job(
        cell=cell,
        round=turn.round,
        folder=out,
        stem=f"{_UNFIT.sub('-', cell.plan.name)}-{turn.key[:8]}",
        reference=_reference(_baseline(cell, matrix, machine), out),
    )
    measured = run_cell(job, matrix.timeout_seconds)
    if measured["status"] == "no space":
        raise OutputError(f"{measured['reason']} Finished rows are kept; start again to go on.")
    return {
        "key": turn.key,
        "case": cell.case,
        "model": cell.model,
        "request_name": cell.request_name,
        "plan_name": cell.plan.name,
        "told": cell.plan.told,
        "round": turn.round,
        **measured,
        "device": machine.device,
        "versions": machine.versions | {"code": machine.code},
        "commit": machine.commit,
        "date": datetime.now(UTC).date().isoformat(),
    }


def lines_of(matrix: Matrix, out: Path, machine: Machine) -> tuple[list[Row], int]:
    """The matrix's own lines in the journal, in order, and how many others there are.

    A turn may have run more than once: for a retry, or in each part of a joined benchmark. Then its good lines count.
    """
    lines = Journal(out / "journal.jsonl").read()
    by_key: dict[str | None, list[Row]] = {}
    for line in lines:
        by_key.setdefault(line.get("key"), []).append(line)
    mine: list[Row] = []
    for turn in turns(matrix, machine):
        told = by_key.pop(turn.key, [])
        mine += [line for line in told if line["status"] == "ok"] or told[-1:]
    return mine, len(by_key)


# Processes


def run_in_process(job: Job, timeout_seconds: float) -> Row:
    """Run a cell in a fresh interpreter; its output goes to OUT/logs."""
    at = job.folder / "logs" / job.stem
    try:
        return _run_in_process(job, timeout_seconds, at)
    except OSError as error:
        return {"status": "no space", "reason": f"'{at.parent}' cannot be written: {error.strerror}."}


def _run_in_process(job: Job, timeout_seconds: float, at: Path) -> Row:
    """As :func:`run_in_process`; ``at`` is the path of its files without their endings."""
    # Not with_suffix: a plan may be named after a number, and all behind its point would go.
    told, result, log = (at.with_name(at.name + ending) for ending in (".job.json", ".result.json", ".txt"))
    result.unlink(missing_ok=True)
    started = time.monotonic()
    try:
        told.write_text(json.dumps(job.to_json()), encoding="utf-8")
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [sys.executable, "-m", "swiftwan.bench.cell", str(told), str(result)],
                stdin=subprocess.PIPE,  # never written to: the cell ends when it closes
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                code = process.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                return {"status": "failed", "reason": f"not done after {timeout_seconds:g} s; stopped"}
            finally:
                process.kill()  # also on Ctrl-C: no cell outlives its benchmark
        if result.exists():
            row: Row = json.loads(result.read_text(encoding="utf-8"))
            return row
    finally:
        told.unlink(missing_ok=True)
        result.unlink(missing_ok=True)
    ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
    words = f"the process ended {ended} after {time.monotonic() - started:.0f} s; see {log.relative_to(job.folder)}"
    return {"status": "failed", "reason": words}


def ask_machine(device: str | None) -> Machine:
    """This machine as a cell will see it; asked in a process that ends, so that nothing stays on the GPU."""
    asked = subprocess.run(
        [sys.executable, "-m", "swiftwan.bench.machine", device or ""], capture_output=True, text=True, check=False
    )
    try:
        told: dict[str, Any] = json.loads(asked.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (asked.stderr.strip().splitlines() or ["no word"])[-1]
        raise SwiftwanError(f"a fresh Python cannot run swiftwan: {last}") from None
    if "error" in told:
        raise RequestError(told["error"])
    return Machine(**told)
