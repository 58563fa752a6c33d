"""Two small charts for the page, as SVG: they take its colours, scale with it, and say in words what they show."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from swiftwan.bench.charts import ticks

_WIDTH, _HEIGHT = 320, 120
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 4, 8, 18


def area(points: Sequence[tuple[float, float]], *, unit: str, said: str) -> str:
    """A value over time, in seconds before now.

    Args:
        points: (seconds, value), by time; with fewer than two the chart says that it waits.
        unit: of the value.
        said: what a screen reader tells.
    """
    if len(points) < 2:
        return _empty("Waiting for readings.")
    marks = ticks(0.0, max(value for _, value in points), 3)
    begin, end = points[0][0], points[-1][0]

    def x(seconds: float) -> float:
        return _LEFT + (seconds - begin) / (end - begin) * (_WIDTH - _LEFT - _RIGHT)

    line = " ".join(f"{x(seconds):.1f},{_y(value, marks):.1f}" for seconds, value in points)
    floor = _HEIGHT - _BOTTOM
    inside = (
        f'<polygon class="fill" points="{x(begin):.1f},{floor} {line} {x(end):.1f},{floor}"/>'
        f'<polyline class="line" points="{line}"/>'
    )
    return _svg(inside, marks, unit, said, (f"{end - begin:.0f} s ago", "now"))


def bars(values: Sequence[float], *, unit: str, said: str) -> str:
    """One bar a value, numbered from 1."""
    if not values:
        return _empty("Shown when the run has ended.")
    marks = ticks(0.0, max(values), 3)
    room = (_WIDTH - _LEFT - _RIGHT) / len(values)
    floor = _HEIGHT - _BOTTOM
    inside = "".join(
        f'<rect class="column" x="{_LEFT + (i + 0.12) * room:.2f}" y="{_y(value, marks):.1f}"'
        f' width="{0.76 * room:.2f}" height="{floor - _y(value, marks):.1f}" rx="{min(2.0, room / 4):.1f}">'
        f"<title>step {i + 1}: {value:.3g} {escape(unit)}</title></rect>"
        for i, value in enumerate(values)
    )
    return _svg(inside, marks, unit, said, ("step 1", f"step {len(values)}"))


def _y(value: float, marks: Sequence[float]) -> float:
    floor = _HEIGHT - _BOTTOM
    return floor - value / marks[-1] * (floor - _TOP)


def _svg(inside: str, marks: Sequence[float], unit: str, said: str, ends: tuple[str, str]) -> str:
    grid = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{_y(mark, marks):.1f}" y2="{_y(mark, marks):.1f}"/>'
        f'<text x="{_LEFT - 5}" y="{_y(mark, marks) + 3:.1f}" text-anchor="end">{mark:g}</text>'
        for mark in marks
    )
    floor = _HEIGHT - 4
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(said, quote=True)}">'
        f'<g class="grid">{grid}<text x="0" y="{floor}">{escape(unit)}</text>'
        f'<text x="{_LEFT}" y="{floor}">{escape(ends[0])}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{floor}" text-anchor="end">{escape(ends[1])}</text></g>{inside}</svg>'
    )


def _empty(words: str) -> str:
    return f'<p class="chart empty">{escape(words)}</p>'
