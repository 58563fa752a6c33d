"""The tables of a report, as lines of text: what is told of a benchmark's rows, in whatever form it is written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from swiftwan.bench.rows import ITSELF, Row
from swiftwan.bench.summary import number, short_dtype, why_missing


@dataclass(frozen=True)
class Figure:
    """A value of a row as tables show it."""

    name: str
    field: str
    form: Callable[[float], str]
    better: str | None = None
    factor: bool = True


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _s(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 100 else f"{seconds:.1f} s"


SEED_FIGURES = (
    Figure("Load time", "load_seconds", _s, "less"),
    Figure("Warm-up time", "warm_up_seconds", _s, "less"),
    Figure("Max VRAM", "peak_bytes", _gb, "less"),
    Figure("CLIP score", "clip_score", "{:.3f}".format),
    Figure("Temporal LPIPS", "temporal_lpips", "{:.3f}".format),
    Figure("Throughput", "throughput_frames_per_second", "{:.3f} frames/s".format, "more"),
    Figure("Frame-wise latency", "frame_latency_seconds", _s, "less"),
    Figure("Clip-wise latency", "clip_latency_seconds", _s, "less"),
)
"""The eight figures of the report this project began with, in its order."""

POCKET_FIGURES = (
    Figure("Pocket CLIP score", "pocket_clip_score", "{:.3f}".format),
    Figure("Pocket perceptual distance", "pocket_perceptual", "{:.4f}".format),
    Figure("Pocket temporal distance", "pocket_temporal_perceptual", "{:.4f}".format),
)
"""Of the pocket world's own scorers, which are not CLIP and LPIPS."""

QUALITY_FIGURES = (
    Figure("PSNR", "psnr_db", "{:.2f} dB".format),
    Figure("SSIM", "ssim", "{:.4f}".format),
    Figure("LPIPS", "lpips", "{:.4f}".format),
    Figure("Temporal LPIPS", "temporal_lpips", "{:.3f}".format),
    Figure("CLIP score", "clip_score", "{:.3f}".format),
    Figure("Judge", "judge_percent", "{:.0f} %".format),
    *POCKET_FIGURES,
    Figure("Latent error", "error", "{:.3g}".format),
)


def overview(rows: Sequence[Row]) -> list[list[str]]:
    """A line a plan: what it is, how fast, how much memory; of one that did not run the reason alone."""
    names = "Plan, Rung, Dtype, Clip, Spread, Ratio, Text, Step, VAE, Encode, Peak, Of ceiling, Runs"
    table = [names.split(", ")]
    for row in rows:
        if row["seconds"] is None:
            table.append([row["plan_name"], _status(row), *[""] * 11])
            continue
        low, high = row["spread"]
        table.append(
            [
                _named(row),
                row["rung"],
                short_dtype(row),
                _s(row["seconds"]) if row["status"] == "ok" else _status(row),
                f"{low:.3g} to {high:.3g} s",
                f"{row['ratio']:.2f}x" if row["ratio"] else "",
                _s(row["phase_seconds"].get("text", 0.0)),
                f"{1000 * row['step_median_seconds']:.0f} ms",
                _s(row["phase_seconds"].get("decode", 0.0)),
                _s(row["encode_seconds"]) if row["encode_seconds"] is not None else "-",
                _gb(row["peak_bytes"]),
                f"{100 * row['ceiling_fraction']:.0f} %",
                str(row["repeats"]),
            ]
        )
    return table


def quality(rows: Sequence[Row]) -> list[list[str]]:
    """A line a plan, a column for each metric that any plan has."""
    figures = [f for f in QUALITY_FIGURES if any(number(row, f.field) is not None for row in rows)]
    if not figures:
        return []
    done = [row for row in rows if row["seconds"] is not None]
    return [
        ["Plan", *(f.name for f in figures)],
        *[[row["plan_name"], *(_value(row, f) for f in figures)] for row in done],
    ]


def hardware(rows: Sequence[Row]) -> list[list[str]]:
    """A line a plan and device: what the sampler saw in its first run."""
    table = [
        [
            "Plan",
            "Free before",
            "Used at most",
            "Utilisation",
            "Temperature",
            "Power",
            "Energy",
            "SM clock",
            "Held back",
            "Sampler",
        ]
    ]
    for row in rows:
        for seen in (row.get("hardware") or {}).get("devices", []):
            table.append(
                [
                    row["plan_name"],
                    _or_dash(seen["memory_free_before_bytes"], _gb),
                    _or_dash(seen["memory_used_peak_bytes"], _gb),
                    _or_dash(seen["utilisation_mean_percent"], "{:.0f} %".format),
                    _or_dash(seen["temperature_peak_celsius"], "{:.0f} C".format),
                    _or_dash(seen["power_mean_watts"], "{:.0f} W".format),
                    _or_dash(seen["energy_joules"], "{:.0f} J".format),
                    _or_dash(seen["sm_clock_mean_mhz"], "{:.0f} MHz".format),
                    _or_dash(seen["clocks_held_back_percent"], "{:.0f} %".format),
                    f"{row['hardware']['cost_percent']:.2f} %",
                ]
            )
    return table


def beside_baseline(row: Row, baseline: Row) -> list[list[str]]:
    """The eight figures of one plan beside the baseline's, and in the pocket world its own scorers'."""
    table = [["Metric", _named(baseline), row["plan_name"], "Ratio"]]
    own = [figure for figure in POCKET_FIGURES if number(baseline, figure.field) is not None]
    for figure in (*SEED_FIGURES, *own):
        ours, theirs = number(row, figure.field), number(baseline, figure.field)
        ratio = ""
        if ours and theirs and figure.better:
            ratio = f"{theirs / ours if figure.better == 'less' else ours / theirs:.2f}x"
        elif ours is not None and theirs is not None:
            ratio = f"{round(ours - theirs, 3) + 0.0:+.3f}"  # never -0.000
        table.append([figure.name, _value(baseline, figure), _value(row, figure), ratio])
    return table


def missing_values(rows: Sequence[Row]) -> list[str]:
    """Why metrics have no value: each reason once, with what it keeps from being known."""
    reasons: dict[str, list[str]] = {}
    for figure in QUALITY_FIGURES:
        for row in rows:
            if reason := _told_missing(row, figure):
                names = reasons.setdefault(reason, [])
                if figure.name not in names:
                    names.append(figure.name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _named(row: Row) -> str:
    marked = row["is_baseline"] and row["plan_name"] != "baseline"
    return row["plan_name"] + " (baseline)" * marked


def _value(row: Row, figure: Figure) -> str:
    value = number(row, figure.field)
    if value is not None:
        return figure.form(value)
    return "not measured" if _told_missing(row, figure) else "-"


def _told_missing(row: Row, figure: Figure) -> str | None:
    """Why a value that was asked for is not there, unless the reason is that the row is its own baseline."""
    reason = why_missing(row, figure.field)
    return None if reason == ITSELF else reason


def _or_dash(value: float | None, form: Callable[[float], str]) -> str:
    return "-" if value is None else form(value)


def _status(row: Row) -> str:
    return f"{row['status']}: {row['reason']}"


def facts(rows: Sequence[Row], command: Sequence[str]) -> list[list[str]]:
    """What must be known to repeat it."""
    row = next((row for row in rows if row["seconds"] is not None), rows[0])
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return [
        ["What", "Value"],
        ["Model", row["model"]],
        ["Device", row["device"]],
        ["Request", json.dumps(row["request"], ensure_ascii=False)],
        ["Versions", versions],
        ["Commit", row["commit"] or "not a clone"],
        ["Date", row["date"]],
        ["Command", shlex.join(command)],
        *[[f"Plan {r['plan_name']}", " ".join(r["plan"]) if r["plan"] else r["told"]] for r in rows],
    ]
