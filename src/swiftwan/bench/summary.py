"""From the journal's lines to one row a cell: medians, spreads, ratios to the baseline. Nothing is measured here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from swiftwan.bench.matrix import Cell, Matrix
from swiftwan.bench.rows import Row

_KINDS = ("exact", "near", "approximate", "retrained")
"""Of techniques, from the strictest on."""

_AS_SMALL = 1.05
"""A plan that needs this much more memory than the smallest still counts as small, and may be far faster."""


def rung_of(specs: Iterable[str], kinds: Iterable[str]) -> str:
    """How exact a plan is: the loosest of its techniques' kinds, where a few-step model is told from other LoRAs."""
    if any(spec.split(":")[0] == "few-step" for spec in specs):
        return "few-step"
    return max(kinds, key=_KINDS.index, default="exact")


def rows_of(matrix: Matrix, lines: Sequence[Row]) -> list[Row]:
    """One row a cell, in the matrix's order; a cell without lines is a row that says so."""
    rows = [_row(cell, [line for line in lines if _is_of(line, cell)], lines[-1]) for cell in matrix.cells() if lines]
    for row in rows:
        _relate(row, next((r for r in rows if r["is_baseline"] and group(r) == group(row)), None))
    return rows


def group(row: Row) -> tuple[str, str]:
    """What rows share that can be compared: model and request."""
    return row["model"], row["request_name"]


def _is_of(line: Row, cell: Cell) -> bool:
    return (line["model"], line["request_name"], line["plan_name"]) == (cell.model, cell.request_name, cell.plan.name)


NOT_RUN: Row = {"status": "not run", "reason": "the benchmark ended before its turn"}


def _row(cell: Cell, lines: list[Row], last: Row) -> Row:
    done = [line for line in lines if line["status"] == "ok"]
    bad = next((line for line in lines or [NOT_RUN] if line["status"] != "ok"), None)
    row: Row = {
        "case": cell.case,
        "model": cell.model,
        "request_name": cell.request_name,
        "plan_name": cell.plan.name,
        "told": cell.plan.told,
        "is_baseline": cell.is_baseline,
        "status": bad["status"] if bad else "ok",
        "reason": bad["reason"] if bad else None,
        "rung": cell.plan.rung or (rung_of(done[0]["plan"], done[0]["kinds"]) if done else None),
        "plan": done[0]["plan"] if done else list(cell.plan.with_ if not isinstance(cell.plan.with_, str) else ()),
        "request": done[0]["request"] if done else dict(cell.request),
        "repeats": 0,
        "device": last["device"],
        "versions": last["versions"],
        "commit": last["commit"],
        "date": last["date"],
    }
    if not done:
        return row | {"seconds": None, "spread": None, "peak_bytes": None, "error": None}
    row |= _numbers(done)
    # The warm-up is a first clip of fewer steps: the others have still to come.
    steps_to_come = row["request"]["num_inference_steps"] - cell.warm_up_steps
    return row | {"first_clip_seconds": row["first_output_seconds"] + steps_to_come * row["step_median_seconds"]}


def _numbers(lines: list[Row]) -> Row:
    """What some lines of one cell come to."""
    runs = sorted((run for line in lines for run in line["runs"]), key=lambda run: run["clip_latency_seconds"])
    middle = runs[(len(runs) - 1) // 2]
    first = next((line for line in lines if "quality" in line), None)
    load = median(line["load_seconds"] for line in lines)
    warm_up = median(line["warm_up_seconds"] for line in lines)
    denoise = median(run["phase_seconds"]["denoise"] for run in runs)
    ceiling = max(line["ceiling_tflop_per_second"] for line in lines)
    rate = lines[0]["tflop"] / denoise
    clip = median(run["clip_latency_seconds"] for run in runs)
    frames = round(middle["clip_latency_seconds"] / middle["frame_latency_seconds"])
    return {
        "dtype": lines[0]["dtype"],
        "repeats": len(runs),
        "seconds": clip,
        "spread": [runs[0]["clip_latency_seconds"], runs[-1]["clip_latency_seconds"]],
        "load_seconds": load,
        "warm_up_seconds": warm_up,
        "first_output_seconds": load + warm_up,
        "clip_latency_seconds": clip,
        "frame_latency_seconds": clip / frames,
        "throughput_frames_per_second": frames / clip,
        "phase_seconds": {
            phase: median(run["phase_seconds"][phase] for run in runs) for phase in middle["phase_seconds"]
        },
        "step_median_seconds": median(run["step_median_seconds"] for run in runs),
        "step_seconds": middle["step_seconds"],
        "encode_seconds": first and first["encode_seconds"],
        "peak_bytes": max(line["peak_bytes"] for line in lines),
        "denoise_tflop_per_second": rate,
        "ceiling_tflop_per_second": ceiling,
        "ceiling_fraction": rate / ceiling,
        "error": first and first["error"],
        "quality": first["quality"] if first else {},
        "hardware": lines[0]["hardware"],
        "video": first and first["video"],
    }


def _relate(row: Row, baseline: Row | None) -> None:
    """Put the baseline beside a row: the fields that all rows in benchmarks/ have."""
    known = baseline is not None and baseline["seconds"] is not None
    row["peer"] = f"{baseline['told']}, same weights, request and machine" if baseline else None
    row["peer_seconds"] = baseline["seconds"] if baseline and known else None
    row["peer_spread"] = baseline["spread"] if baseline and known else None
    row["ratio"] = baseline["seconds"] / row["seconds"] if baseline and known and row["seconds"] else None
    if row["rung"] == "exact" and known and baseline and row.get("dtype") != baseline["dtype"] == "float32":
        row["rung"] = "near"  # the same maths in 16 bits


# Reading a row


def number(row: Row, name: str) -> float | None:
    """A value of a row or of its quality; None where it is missing."""
    value: Any = row.get(name, (row.get("quality") or {}).get(name))
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def why_missing(row: Row, name: str) -> str | None:
    """The reason that stands where a value would."""
    value: Any = row.get(name, (row.get("quality") or {}).get(name))
    return value["missing"] if isinstance(value, dict) and "missing" in value else None


def short_dtype(row: Row) -> str:
    return _SHORT.get(row["dtype"], str(row["dtype"]))


_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def frontier(rows: Sequence[Row], quality: str) -> list[Row]:
    """The rows that no other beats in both speed and quality, fastest first."""
    known = [row for row in rows if row["seconds"] and number(row, quality) is not None]
    best: list[Row] = []
    for row in sorted(known, key=lambda row: (row["seconds"], -(number(row, quality) or 0))):
        if not best or (number(row, quality) or 0) > (number(best[-1], quality) or 0):
            best.append(row)
    return best


def conclusion(rows: Sequence[Row]) -> list[str]:
    """Which plan for which need, in sentences, from the rows of one model and request."""
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return ["No cell finished, so there is nothing to conclude."]

    def told(row: Row, figure: str) -> str:
        ratio = "" if row["ratio"] is None or row["is_baseline"] else f", {row['ratio']:.2f}x the baseline's speed"
        return f"{row['plan_name']} ({row['rung']}, {short_dtype(row)}): {figure}{ratio}"

    def cold(row: Row) -> str:
        return (
            f"{row['first_clip_seconds']:.1f} s from nothing to a clip of {row['request']['num_inference_steps']} steps"
        )

    def each(row: Row) -> str:
        return f"{row['seconds']:.2f} s a clip once loaded"

    def gb(row: Row) -> float:
        return float(row["peak_bytes"] / 1e9)

    single = min(done, key=lambda row: row["first_clip_seconds"])
    batch = min(done, key=lambda row: row["seconds"])
    least = min(row["peak_bytes"] for row in done)
    small = min((row for row in done if row["peak_bytes"] <= _AS_SMALL * least), key=lambda row: row["seconds"])
    alike = [row["plan_name"] for row in done if row is not batch and row["spread"][0] <= batch["spread"][1]]
    said = [
        f"Single prompts: {told(single, cold(single))}.{_later(single, done)}",
        f"Batches: {told(batch, each(batch))}." + (f" Within its spread: {', '.join(alike)}." if alike else ""),
        f"Little memory: {told(small, f'{gb(small):.2f} GB at its peak')}.",
    ]
    exact = [row for row in done if row["rung"] == "exact" and not row["is_baseline"]]
    if exact and (best := min(exact, key=lambda row: row["seconds"])) is not batch:
        said.append(f"Without any change of the maths: {told(best, each(best))}.")
    if lost := [row for row in rows if row["status"] != "ok"]:
        said.append(f"{len(lost)} of {len(rows)} cells did not run: {', '.join(row['plan_name'] for row in lost)}.")
    if any(row["model"].startswith("random:") for row in rows):
        said.append("The weights are random: times and memory are real; the videos and their distances say nothing.")
    return said


def _later(single: Row, done: Sequence[Row]) -> str:
    """From how many steps on a plan that takes longer to come up is the first with a clip after all."""
    fast = min(done, key=lambda row: row["step_median_seconds"])
    slower = [row for row in done if row["step_median_seconds"] > fast["step_median_seconds"]]
    if fast is single or not slower:
        return ""
    steps = fast["request"]["num_inference_steps"]
    lead = max(
        (fast["first_clip_seconds"] - row["first_clip_seconds"])
        / (row["step_median_seconds"] - fast["step_median_seconds"])
        for row in slower
    )
    return f" From {steps + math.ceil(lead)} steps on {fast['plan_name']} is sooner than all."
