"""``swiftwan bench``: run a matrix of models, requests and plans, and report on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from swiftwan.errors import Cancelled, RequestError, SwiftwanError

if TYPE_CHECKING:
    from swiftwan.bench.machine import Machine
    from swiftwan.bench.matrix import Matrix
    from swiftwan.bench.rows import Row
    from swiftwan.bench.run import Progress


def bench(
    matrix: Annotated[str, typer.Argument(help="A TOML file, or a name: pocket, seed-001.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for rows, videos and the report; goes on where it broke off.")],
    compare: Annotated[
        Path | None,
        typer.Option(help="rows.jsonl of an earlier run: exit 1 if anything got worse.", metavar="ROWS"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, cuda:N or cpu. Unset: the best here.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this plan, and the baseline; may be given again.", metavar="PLAN")
    ] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option(help="Run nothing: report on parts of this matrix that ran elsewhere.", metavar="FOLDER"),
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed, was refused or ran out.")] = False,
) -> None:
    """Measure plans against each other and against diffusers, each in a process of its own."""
    from dataclasses import replace

    from swiftwan.bench.compare import check_comparable
    from swiftwan.bench.join import join as join_parts
    from swiftwan.bench.matrix import read_matrix
    from swiftwan.bench.report import Report, write
    from swiftwan.bench.rows import read_rows, write_rows
    from swiftwan.bench.run import ask_machine, lines_of
    from swiftwan.bench.summary import rows_of

    what = read_matrix(matrix)
    if device is not None:
        what = replace(what, device=device)
    if only:
        what = what.only(only)
    before = read_rows(compare) if compare else []
    machine = join_parts(out, join) if join else ask_machine(what.device)
    if compare:
        check_comparable(before, [cell.name for cell in what.cells()], {machine.device})
    if not join:
        _run(what, out, machine, retry=retry)
    lines, others = lines_of(what, out, machine)
    if others:
        typer.echo(f"{others} rows of other code, versions, devices or settings in '{out}' are left aside", err=True)
    rows = rows_of(what, lines)
    if not rows:
        raise RequestError(f"none of these parts has a row of '{matrix}' as it is now; give the matrix they ran.")
    write_rows(out / "rows.jsonl", rows)
    _, page = write(Report(what.title, rows, out, ["swiftwan", *sys.argv[1:]]))
    if all(row["status"] != "ok" for row in rows):
        kind = RequestError if all(row["status"] == "refused" for row in rows) else SwiftwanError
        raise kind(f"no cell of '{matrix}' ran: {rows[0]['reason']}; see '{page}'.")
    if compare:
        _judge(before, rows)
    typer.echo(page)


def _run(matrix: Matrix, out: Path, machine: Machine, *, retry: bool) -> None:
    from swiftwan.bench.run import run_in_process, run_matrix

    try:
        for progress in run_matrix(matrix, out, machine, run_in_process, retry=retry):
            typer.echo(_told(progress), err=True)
    except KeyboardInterrupt:
        raise Cancelled(f"stopped; finished rows are in '{out}', and the same command goes on") from None


def _told(progress: Progress) -> str:
    row = progress.row
    took = f"{row['runs'][0]['clip_latency_seconds']:.2f} s" if row["status"] == "ok" else f"{row['reason']}"
    where = f"{row['model']} / {row['request_name']} / {row['plan_name']}"
    return f"{progress.done}/{progress.turns}  {where}, round {row['round'] + 1}: {row['status']}, {took}"


def _judge(before: list[Row], rows: list[Row]) -> None:
    """Exit 1, naming each, if something got worse."""
    from swiftwan.bench.compare import worse

    changes = worse(before, rows)
    for change in changes:
        typer.echo(f"worse: {change}", err=True)
    if changes:
        raise typer.Exit(1)
    typer.echo("nothing got worse beyond the noise", err=True)
