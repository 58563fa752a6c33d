"""``swiftwan generate`` makes videos and pictures; ``swiftwan explain`` says how, and makes nothing."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from swiftwan.cli.asked import Asked
from swiftwan.cli.many import generate_many
from swiftwan.cli.options import takes
from swiftwan.cli.progress import Display, cancellable, shown
from swiftwan.cli.understand import Run, understand
from swiftwan.collector import uncollected
from swiftwan.errors import Cancelled, RequestError
from swiftwan.memory import refuse_what_cannot_fit

if TYPE_CHECKING:
    from swiftwan.pipelines.result import Result
    from swiftwan.plan import Explanation


@takes(Asked)
def generate(asked: Asked) -> None:
    """Make a video (.mp4) or a picture (.png) from words, images or a video; with --prompts, many."""
    if asked.prompts is not None:
        _generate_many(asked)
        return
    run = understand(asked)
    if asked.like:
        typer.echo(_likeness(asked.like, run), err=True)
    # Libraries may print; standard output is ours alone, for the path or the JSON object.
    with redirect_stdout(sys.stderr), shown(plain=asked.as_json) as display:
        result = _run(run, display, quality=asked.file_quality)
    if asked.as_json:
        typer.echo(json.dumps(_to_json(result, run.out)))
    else:
        typer.echo(_summary(result), err=True)
        typer.echo(run.out)


def _generate_many(asked: Asked) -> None:
    with redirect_stdout(sys.stderr), shown(plain=True) as display:
        outcome = generate_many(asked, display)
    for line, reason in outcome.failed:
        typer.echo(f"line {line}: {reason}", err=True)
    typer.echo(str(outcome), err=True)
    if asked.as_json:
        typer.echo(json.dumps(outcome.to_json()))
    else:
        for path in outcome.written:
            typer.echo(path)
    if outcome.failed:
        raise typer.Exit(1)


@takes(Asked)
def explain(asked: Asked) -> None:
    """Say what generate would do and what it would take; load and write nothing."""
    if asked.prompts is not None:
        raise RequestError("--prompts is for generate; explain takes one request.")
    with redirect_stdout(sys.stderr):
        explanation = _explain(understand(asked))
    if asked.as_json:
        typer.echo(json.dumps(explanation.to_json()))
    else:
        typer.echo("\n".join(explanation.lines()))


def _explain(run: Run) -> Explanation:
    from swiftwan.plan import explain

    return explain(run.model, run.request, plan=run.plan, device=run.device, dtype=run.dtype)


def _run(run: Run, display: Display, *, quality: int) -> Result:
    before = _identity(run.out)
    try:
        with cancellable(display):
            display.begin("load")
            with uncollected():
                from swiftwan.engine import Engine
            _check(run)
            engine = Engine.load(run.model, plan=run.plan, device=run.device, dtype=run.dtype, request=run.request)
            display.begin("image" if run.request.brings_pixels else "text")
            result = engine.run(run.request, on_step=display.on_step, out=run.out, quality=quality)
            display.end()
    except Cancelled:
        if _identity(run.out) != before:  # Ctrl-C came in the instant after the file got its name
            raise Cancelled(f"cancelled, but '{run.out}' was already written, whole") from None
        raise
    return result


def _check(run: Run) -> None:
    """Raise now, before minutes of loading, what is already known to go wrong."""
    from swiftwan.device import parse_dtype, pick_device
    from swiftwan.media import check_writable

    pick_device(run.device)
    if run.dtype is not None:
        parse_dtype(run.dtype)
    explanation = _explain(run)
    refuse_what_cannot_fit(explanation)
    request = explanation.request
    assert request.num_frames is not None
    assert request.height is not None
    assert request.width is not None
    check_writable(run.out, num_frames=request.num_frames, height=request.height, width=request.width)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that replaced it."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _likeness(like: Path, run: Run) -> str:
    plan = run.plan if isinstance(run.plan, str) else " ".join(run.plan) or "none"
    return f"like {like}: model {run.model}, plan {plan}, seed {run.request.seed}, dtype {run.dtype or 'auto'}"


def _summary(result: Result) -> str:
    num_frames, height, width, _ = result.frames.shape
    size = f"{width}x{height}" + (f", {num_frames} frames" if num_frames > 1 else "")
    peak = f"{result.peak_bytes / 1e9:.2f} GB peak"
    where = f"{result.device} {result.dtype}"
    given = "".join(f"{given}\n" for given in result.inputs)
    return f"{given}{size}, seed {result.request.seed}, {result.seconds['total']:.1f} s on {where}, {peak}"


def _to_json(result: Result, path: Path) -> dict[str, Any]:
    return {
        "path": str(path),
        "seconds": result.seconds,
        "step_seconds": list(result.step_seconds),
        "peak_bytes": result.peak_bytes,
        "frames": len(result.frames),
    } | result.record()
