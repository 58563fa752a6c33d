"""Small SVG charts, without scripts or fonts of their own: they scale with the page and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 100, 18, 16, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#444444")
"""Told apart by colour-blind readers too (Okabe and Ito); from the ninth line on dashes differ."""

_SHAPES = ("M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-4-4h8v8h-8z", "M0-5 5 4H-5z", "M0-5.5 5.5 0 0 5.5-5.5 0z")
"""Of marks: circle, square, triangle, diamond. Letters beside them ran into each other from five lines on."""


@dataclass(frozen=True)
class Series:
    """A line, or for a scatter one point; ``number`` chooses its colour, the same in every chart of a page."""

    name: str
    number: int
    points: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, str]] = ()
    """Moments on the line, with a word each; every word has a shape, which the legend tells."""


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def dash(number: int) -> str:
    return ("", "6 3", "2 3")[number // len(COLOURS) % 3]


def lines(series: Sequence[Series], *, x: str, y: str) -> str:
    """A line a series, with a legend; y begins at 0."""
    frame = _Frame([p for s in series for p in s.points], x, y, from_zero=True)
    return frame.svg(_polylines(frame, series)) + _legend([*map(_line_swatch, series), *_mark_swatches(series)])


def figure(series: Sequence[Series], *, x: str, y: str) -> str:
    """:func:`lines` as an SVG file of its own: a dot a point, each line's name in the plot, on a white ground."""
    frame = _Frame([p for s in series for p in s.points], x, y, from_zero=True)
    dots = "".join(
        f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="3" fill="{colour(one.number)}"/>'
        for one in series
        for a, b in one.points
    )
    names = "".join(
        f'<text x="{_LEFT + 12}" y="{_TOP + 16 + 17 * place}" style="fill:{colour(s.number)}">{escape(s.name)}</text>'
        for place, s in enumerate(series)
    )
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    style = "<style>text{font:13px sans-serif;fill:#222}.grid{stroke:#ddd}</style>"
    svg = frame.svg(_polylines(frame, series) + dots + names)
    opening, drawn = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).split(">", 1)
    return f"{opening}>{style}{ground}{drawn}\n"  # the ground below all else, the axes' grid too


def _polylines(frame: _Frame, series: Sequence[Series]) -> str:
    drawn, shapes = [], _shapes(series)
    for one in series:
        path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in one.points)
        style = f'fill="none" stroke="{colour(one.number)}" stroke-width="2" stroke-dasharray="{dash(one.number)}"'
        marks = "".join(
            f'<path d="{shapes[word]}" transform="translate({frame.x(a):.1f} {frame.y(b):.1f})" class="mark"'
            f' stroke="{colour(one.number)}"><title>{escape(f"{one.name}: {word}")}</title></path>'
            for a, b, word in one.marks
        )
        drawn.append(f'<g><title>{escape(one.name)}</title><polyline points="{path}" {style}/>{marks}</g>')
    return "".join(drawn)


def _shapes(series: Sequence[Series]) -> dict[str, str]:
    """The shape of each word that marks a moment, in the order in which they come."""
    words = dict.fromkeys(word for one in series for _, _, word in one.marks)
    return {word: _SHAPES[place % len(_SHAPES)] for place, word in enumerate(words)}


def scatter(points: Sequence[Series], edge: Sequence[tuple[float, float]], *, x: str, y: str) -> str:
    """A dot a series, and a line through those that nothing beats."""
    frame = _Frame([p for s in points for p in s.points], x, y, from_zero=False)
    path = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in edge)
    drawn = [f'<polyline points="{path}" fill="none" stroke="#999" stroke-dasharray="4 4"/>']
    for one in points:
        for a, b in one.points:
            drawn.append(
                f'<circle cx="{frame.x(a):.1f}" cy="{frame.y(b):.1f}" r="6" fill="{colour(one.number)}"'
                f' fill-opacity="{_opacity(one.number)}"><title>{escape(one.name)}</title></circle>'
            )
    return frame.svg("".join(drawn)) + _legend(list(map(_dot_swatch, points)))


def _opacity(number: int) -> float:
    """Of dots: they have no dashes to tell the ninth from the first."""
    return 0.45 if dash(number) else 1


def _line_swatch(one: Series) -> tuple[str, str]:
    stroke = f'stroke="{colour(one.number)}" stroke-dasharray="{dash(one.number)}"'
    return f'<line x1="0" y1="6" x2="26" y2="6" stroke-width="3" {stroke}/>', one.name


def _dot_swatch(one: Series) -> tuple[str, str]:
    return f'<circle cx="20" cy="6" r="5" fill="{colour(one.number)}" fill-opacity="{_opacity(one.number)}"/>', one.name


def _mark_swatches(series: Sequence[Series]) -> list[tuple[str, str]]:
    style = 'class="mark" stroke="currentColor" transform="translate(20 6)"'
    return [(f'<path d="{shape}" {style}/>', word) for word, shape in _shapes(series).items()]


def _legend(items: Sequence[tuple[str, str]]) -> str:
    """A list of drawings and what they stand for."""
    told = "".join(
        f'<li><svg width="26" height="12" aria-hidden="true">{drawing}</svg> {escape(name)}</li>'
        for drawing, name in items
    )
    return f'<ul class="legend">{told}</ul>'


class _Frame:
    """Axes around some points: from values to places, round ticks, labels."""

    def __init__(self, points: Sequence[tuple[float, float]], x: str, y: str, *, from_zero: bool) -> None:
        xs, ys = [p[0] for p in points] or [0.0], [p[1] for p in points] or [0.0]
        self.labels = x, y
        self.x_ticks = ticks(min(xs), max(xs), whole=all(float(x).is_integer() for x in xs))
        self.y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def svg(self, inside: str) -> str:
        bottom = HEIGHT - _BOTTOM
        grid = "".join(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{t:.6g}</text>'
            for t in self.y_ticks
        )
        grid += "".join(
            f'<text x="{self.x(t):.1f}" y="{bottom + 18}" text-anchor="middle">{t:.6g}</text>' for t in self.x_ticks
        )
        x, y = map(escape, self.labels)
        middle = (_TOP + bottom) / 2
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{y} against {x}" class="chart">{grid}{inside}'
            f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{x}</text>'
            f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{y}</text></svg>'
        )


def ticks(low: float, high: float, wanted: int = 5, *, whole: bool = False) -> list[float]:
    """Round values, equally far apart, that hold low and high between them; ``whole`` ones for counts."""
    if high - low < 1e-3 * abs(high):  # six digits on an axis tell nobody anything
        low, high = low - 1e-3 * abs(high), high + 1e-3 * abs(high)
    high = high if high > low else low + 1
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
