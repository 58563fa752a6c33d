"""The report of a benchmark: Markdown, and one HTML page that needs nothing beside it.

Both are made from rows alone, so the same rows give the same report. Text that people wrote, prompts above all, is
escaped wherever it stands.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from swiftwan.bench import charts
from swiftwan.bench.charts import Series
from swiftwan.bench.page import CONTROLS, SCRIPT, STYLE
from swiftwan.bench.rows import Row
from swiftwan.bench.summary import conclusion, frontier, group, number
from swiftwan.bench.tables import QUALITY_FIGURES, beside_baseline, facts, hardware, missing_values, overview, quality
from swiftwan.whole_file import write_text

EMBEDDED_BYTES = 4 * 2**20
"""A video up to this size goes into the page itself; a larger one stays beside it, and the page says so."""


@dataclass(frozen=True)
class Report:
    """What a report is made of."""

    title: str
    rows: Sequence[Row]
    folder: Path
    command: Sequence[str]

    def groups(self) -> list[tuple[tuple[str, str], list[Row]]]:
        return [(key, list(rows)) for key, rows in groupby(self.rows, key=group)]


# Markdown


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [f"# {_md(report.title)}"]
    for (model, request), rows in report.groups():
        baseline = next((row for row in rows if row["is_baseline"]), None)
        parts.append(f"## {_md(model)}, {_md(request)}")
        parts.append("\n".join(f"- {_md(line)}" for line in conclusion(rows)))
        parts += [_md_table(overview(rows)), _md_table(quality(rows)), _md_table(hardware(rows))]
        if reasons := missing_values(rows):
            parts.append("Not measured:\n\n" + "\n".join(f"- {_md(line)}" for line in reasons))
        for row in rows:
            if baseline and row is not baseline and row["seconds"] and baseline["seconds"]:
                parts += [f"### {_md(row['plan_name'])}", _md_table(beside_baseline(row, baseline))]
        parts += ["### To repeat it", _md_table(facts(rows, report.command))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md_table(table: list[list[str]]) -> str:
    if len(table) < 2:
        return ""
    head, *body = ["| " + " | ".join(map(_md, line)) + " |" for line in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


def _md(text: str) -> str:
    escaped = escape(" ".join(text.split()), quote=False)
    for mark in "\\`*_[]|":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


# HTML


def page(report: Report) -> str:
    """The report as one HTML page, videos in it up to EMBEDDED_BYTES each."""
    body = [f"<h1>{escape(report.title)}</h1>"]
    for (model, request), rows in report.groups():
        body.append(_section(report, f"{model}, {request}", rows))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(report: Report, title: str, rows: Sequence[Row]) -> str:
    baseline = next((row for row in rows if row["is_baseline"]), None)
    prompt = escape(str(rows[0]["request"].get("prompt", "")))
    parts = [
        f"<h2>{escape(title)}</h2><p class='prompt'>{prompt}</p>",
        "<ul class='conclusion'>" + "".join(f"<li>{escape(line)}</li>" for line in conclusion(rows)) + "</ul>",
        _html_table("Time and memory", overview(rows)),
        _html_table("Quality, against the baseline and by itself", quality(rows)),
    ]
    if reasons := missing_values(rows):
        parts.append("<p>Not measured:</p><ul>" + "".join(f"<li>{escape(line)}</li>" for line in reasons) + "</ul>")
    parts += [_charts(rows), _videos(report, rows), _html_table("Hardware", hardware(rows))]
    others = [row for row in rows if baseline and row is not baseline and row["seconds"] and baseline["seconds"]]
    if baseline and others:
        parts.append("<h3>Each plan beside the baseline</h3><div class='pairs'>")
        parts += [_html_table(row["plan_name"], beside_baseline(row, baseline)) for row in others]
        parts.append("</div>")
    parts.append(_html_table("To repeat it", facts(rows, report.command), wrap=True))
    return f"<section>{''.join(parts)}</section>"


def _html_table(title: str, table: list[list[str]], *, wrap: bool = False) -> str:
    if len(table) < 2:
        return ""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in table[0])
    body = ""
    for name, *cells in table[1:]:
        if len(cells) > 2 and not any(cells[1:]):  # did not run: its reason over the columns of its numbers
            inner = f"<td colspan='{len(cells)}' class='reason'>{escape(cells[0])}</td>"
        else:
            inner = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body += f"<tr><th scope='row'>{escape(name)}</th>{inner}</tr>"
    kind = "table wrap" if wrap else "table"
    return (
        f"<figure class='{kind}'><figcaption>{escape(title)}</figcaption><div class='scroll'><table><thead><tr>{head}"
        f"</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _charts(rows: Sequence[Row]) -> str:
    done = [row for row in rows if row["seconds"] is not None]
    if not done:
        return ""
    places = {row["plan_name"]: place for place, row in enumerate(done)}

    def series(
        row: Row, points: Sequence[tuple[float, float]], marks: Sequence[tuple[float, float, str]] = ()
    ) -> Series:
        return Series(row["plan_name"], places[row["plan_name"]], points, marks)

    steps = [series(row, [(float(i), 1000 * s) for i, s in enumerate(row["step_seconds"], 1)]) for row in done]
    drawn = [_chart("Time of each denoising step", charts.lines(steps, x="step", y="ms"))]
    memory = [
        series(row, points, _phase_ends(row, points))
        for row in done
        for device in row["hardware"].get("memory_over_time", [])[:1]
        if (points := [(seconds, used / 1e9) for seconds, used in device])
    ]
    if memory:
        note = "Marks end a phase, by the host's clock."
        drawn.append(_chart("Memory over time, all processes", charts.lines(memory, x="seconds", y="GB"), note))
    for figure in QUALITY_FIGURES[:2]:
        dots = [series(row, [(row["seconds"], value)]) for row in done if (value := number(row, figure.field))]
        if dots:
            edge = [(row["seconds"], number(row, figure.field) or 0.0) for row in frontier(done, figure.field)]
            chart = charts.scatter(dots, edge, x="seconds a clip", y=figure.name)
            drawn.append(
                _chart(f"Quality against speed: {figure.name} to the baseline", chart, "Up and left is better.")
            )
    return f"<div class='charts'>{''.join(drawn)}</div>"


_PHASES = {"image": "end of image", "text": "end of text", "denoise": "end of denoising", "decode": "end of VAE"}


def _phase_ends(row: Row, points: Sequence[tuple[float, float]]) -> list[tuple[float, float, str]]:
    """Where each phase ends on the line of memory: at the sample nearest to it."""
    return [
        (seconds, min(points, key=lambda point: abs(point[0] - seconds))[1], _PHASES.get(phase, phase))
        for seconds, phase in row["hardware"]["phases"]
    ]


def _chart(title: str, svg: str, note: str = "") -> str:
    under = f"<p class='note'>{escape(note)}</p>" if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}{under}</figure>"


def _videos(report: Report, rows: Sequence[Row]) -> str:
    shown = []
    for row in rows:
        if not row.get("video"):
            continue
        source, note = _source(report.folder, row["video"])
        name = escape(row["plan_name"])
        if source is None:
            media = f"<p class='note'>{escape(note)}</p>"
        elif row["video"].endswith(".png"):
            media = f"<img src='{source}' alt='{name}'>"
        else:
            media = f"<video src='{source}' muted loop playsinline preload='auto' aria-label='{name}'></video>"
        under = f"<p class='note'>{escape(note)}</p>" if note and source else ""
        shown.append(f"<figure>{media}<figcaption>{name}</figcaption>{under}</figure>")
    return f"<h3>Videos, in step</h3>{CONTROLS}<div class='videos'>{''.join(shown)}</div>" if shown else ""


def _source(folder: Path, name: str) -> tuple[str | None, str]:
    """A data URL or a relative address, and a note."""
    path = folder / name
    try:
        if path.stat().st_size > EMBEDDED_BYTES:
            return escape(name, quote=True), f"{name}, beside this page"
        data = base64.b64encode(path.read_bytes()).decode()
    except OSError:
        return None, f"{name} is no longer there"
    kind = "image/png" if name.endswith(".png") else "video/mp4"
    return f"data:{kind};base64,{data}", ""


def write(report: Report) -> tuple[Path, Path]:
    """Write report.md and report.html into the benchmark's folder; raises OutputError where it cannot."""
    texts: dict[str, Any] = {"report.md": markdown(report), "report.html": page(report)}
    for name, text in texts.items():
        write_text(report.folder / name, text)
    return report.folder / "report.md", report.folder / "report.html"
