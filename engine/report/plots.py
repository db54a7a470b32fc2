"""One plotter: a chart, described once, is drawn as SVG for the page and as SVG or PNG files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

from engine.report.marks import LIGHT, PALETTE, PAPER, ROUND, Mark, Point, png, shade, style_sheet, svg


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line of a chart: points, an interval around them where there is one, and its condition's colour.

    `look`: "points" are points without a line, "thin" is a line without points.
    """

    name: str
    color: int | str
    x: Sequence[float]
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    look: Literal["line", "thin", "points"] = "line"


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the x axis, marked at the foot of a chart in a condition's colour."""

    name: str
    color: int
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Column:
    """A column from 0 up to a value, the single values that it is the mean of, and a level to compare it with."""

    color: int
    x: float
    y: float
    label: str
    points: Sequence[float]
    level: float


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """A heat map [row, column] from −limit to limit, the first row on top.

    `verdicts` are `PairedTest.verdict`'s: what is different has a dot, what is negligible a ring, and what does not
    survive is faded, or noise on a narrow scale would look like a finding; what is equivalent has ≈. What is not finite
    is hatched.
    """

    values: np.ndarray
    verdicts: np.ndarray
    limit: float


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Chart:
    """Lines, columns or cells over one axis. NaN breaks a line.

    Args:
        title: accessible name; heading: what stands above it, the title if empty.
        unit, note: beside and below the heading.
        x_ticks: numbers at the x axis; x_names, y_names: words for 0, 1, … at an axis in place of numbers.
        y_range: what the y axis spans at the least; zero: marks that level and takes it in.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[float] = ()
    x_names: Sequence[str] = ()
    y_names: Sequence[str] = ()
    heading: str = ""
    unit: str = ""
    note: str = ""
    lines: Sequence[Line] = ()
    stretches: Sequence[Stretch] = ()
    columns: Sequence[Column] = ()
    cells: Cells | None = None
    y_range: tuple[float, float] | None = None
    zero: bool = False
    width: float = 360
    height: float = 240

    def svg(self) -> Markup:
        """The chart on the page: without its heading, which the page sets."""
        name = f"{self.title}: {self.y_label} by {self.x_label}; the numbers are in the table below"
        return svg(_chart(self), self.width, self.height, f'class="chart" role="img" aria-label="{escape(name)}"')


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FigureFile:
    """Panels in a grid as one file, with title, legend (name and colour of its lines) and small print."""

    panels: Sequence[Chart]
    columns: int = 1
    title: str = ""
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""
    scale: str = ""
    """What the colours of heat maps stand for."""

    def svg(self) -> bytes:
        """A file of its own, with text as text."""
        marks, width, height = _figure(self)
        head = '<?xml version="1.0" encoding="UTF-8"?>\n'
        style = f"<style>svg{{font-family:'DejaVu Sans',Arial,sans-serif}}{style_sheet(PAPER, PALETTE)}</style>"
        ground = f'<rect width="{width:.1f}" height="{height:.1f}" fill="#fff"/>'
        attributes = f'xmlns="http://www.w3.org/2000/svg" width="{width:.1f}" height="{height:.1f}" class="chart"'
        return f"{head}{svg(marks, width, height, attributes, style + ground)}\n".encode()

    def png(self) -> bytes:
        """The same marks with matplotlib's own font: the same bytes on every machine."""
        return png(*_figure(self))


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [step * index for index in range(first, last + 1)]


def _labels(marks: Sequence[float]) -> list[str]:
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 2
    return [f"{mark:.{decimals}f}".replace("-", "−") for mark in marks]


_RIGHT, _TOP, _BOTTOM = 10, 12, 40
_STRETCH = 5.5  # height of a marked stretch
_LABEL, _DIGIT = 24, 8.0  # room for the label beside the axis, and for each character of the numbers at it


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where a chart's values are drawn: x from `first` to `last`, y from `low` at `base` to `high` at the top.

    `base` is above `foot`, the x axis, where stretches are marked between them.
    """

    left: float
    right: float
    base: float
    foot: float
    first: float
    last: float
    low: float
    high: float

    def at(self, x: float, y: float) -> Point:
        across = self.left + (self.right - self.left) * (x - self.first) / (self.last - self.first)
        return across, _TOP + (self.base - _TOP) * (self.high - y) / (self.high - self.low or 1.0)

    def level(self, role: str, y: float) -> Mark:
        return Mark(role, ((self.left, self.at(0, y)[1]), (self.right, self.at(0, y)[1])))


def _chart(chart: Chart) -> list[Mark]:
    named_y: list[tuple[float, str]] = list(enumerate(chart.y_names))
    x_ticks: Sequence[float] = range(len(chart.x_names)) if chart.x_names else chart.x_ticks
    if named_y:
        low, high = len(named_y) - 0.5, -0.5  # the first on top
    else:
        low, high = chart.y_range or _range(chart.lines)
        if chart.zero:
            low, high = min(low, 0.0), max(high, 0.0)
        y_ticks = ticks(low, high)
        low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
        named_y = list(zip(y_ticks, _labels(y_ticks), strict=True))
    first, last = min(x_ticks), max(x_ticks)
    pad = 0.5 if chart.x_names else 0.06 * (last - first) or 0.5
    foot = chart.height - _BOTTOM
    frame = _Frame(
        left=_LABEL + _DIGIT * max(len(name) for _, name in named_y),
        right=chart.width - _RIGHT,
        base=foot - _STRETCH * len({stretch.color for stretch in chart.stretches}),
        foot=foot,
        first=first - pad,
        last=last + pad,
        low=low,
        high=high,
    )
    marks: list[Mark] = []
    for value, name in named_y[:: max(1, -(-len(named_y) // 16))]:
        marks += [] if chart.x_names else [frame.level("grid", value)]
        marks.append(Mark("tick", ((frame.left - 6, frame.at(0, value)[1] + 4),), text=name, anchor="end"))
    names = chart.x_names or [f"{value:g}".replace("-", "−") for value in x_ticks]
    for value, name in list(zip(x_ticks, names, strict=True))[:: max(1, -(-len(names) // 13))]:
        marks.append(Mark("tick", ((frame.at(value, low)[0], foot + 16),), text=name, anchor="middle"))
    middle = ((frame.left + frame.right) / 2, chart.height - 7), (12, (_TOP + foot) / 2)
    marks += [Mark("axis", ((frame.left, foot), (frame.right, foot)))] if chart.cells is None else []
    marks.append(Mark("label", middle[:1], text=chart.x_label, anchor="middle"))
    marks.append(Mark("label", middle[1:], text=chart.y_label, anchor="middle", turned=True))
    marks += [frame.level("axis", 0.0)] if chart.zero else []
    return [*marks, *_contents(chart, frame)]


def _contents(chart: Chart, frame: _Frame) -> Iterator[Mark]:
    rows = {color: row for row, color in enumerate(dict.fromkeys(stretch.color for stretch in chart.stretches))}
    for stretch in chart.stretches:
        top = frame.foot - _STRETCH * (rows[stretch.color] + 1)
        start = max(frame.at(stretch.first - 0.3, frame.low)[0], frame.left)
        end = min(frame.at(stretch.last + 0.3, frame.low)[0], frame.right)
        yield Mark("stretch", _box((start, top), (end, top + _STRETCH - 1.5)), stretch.color, stretch.name)
    for column in chart.columns:
        x, most, lift = column.x, max([column.y, *column.points]), 9 if column.points else 5
        yield Mark("column", _box(frame.at(x - 0.31, column.y), frame.at(x + 0.31, 0.0)), column.color)
        for offset, value in zip(np.linspace(-0.16, 0.16, len(column.points)), column.points, strict=True):
            yield Mark("point", (frame.at(x + offset, value),), LIGHT["ink"])
        yield Mark("tick", (frame.at(x, most),), text=column.label, anchor="middle").moved(0, -lift)
        yield Mark("level", (frame.at(x - 0.5, column.level), frame.at(x + 0.5, column.level)))
    if chart.cells is not None:
        for (row, col), value in np.ndenumerate(chart.cells.values):
            yield from _cell(chart.cells, frame, row, col, value)
    for line in chart.lines:
        if line.low is not None and line.high is not None:
            for run in _runs(np.asarray(line.low) + np.asarray(line.high)):
                upper = [frame.at(line.x[i], line.high[i]) for i in run]
                yield Mark("band", (*upper, *(frame.at(line.x[i], line.low[i]) for i in run[::-1])), line.color)
    for line in chart.lines:
        for run in _runs(np.asarray(line.y)):
            points = tuple(frame.at(line.x[i], line.y[i]) for i in run)
            if line.look != "points":
                yield Mark(line.look, points, line.color)
            if line.look != "thin":
                for i, point in zip(run, points, strict=True):
                    tip = f"{line.name}, {chart.x_label} {line.x[i]:g}: {line.y[i]:.6g}"
                    yield Mark("mark", (point,), line.color, tip)


def _cell(cells: Cells, frame: _Frame, row: int, col: int, value: float) -> Iterator[Mark]:
    box = _box(frame.at(col - 0.5, row - 0.5), frame.at(col + 0.5, row + 0.5))
    if not np.isfinite(value):
        yield Mark("cell", box, "#f3f3f3")
        for at in (-0.5, 0.0, 0.5):
            start, end = max(-0.5, at - 0.5), min(0.5, at + 0.5)
            yield Mark("hatch", (frame.at(col + start, row + at - start), frame.at(col + end, row + at - end)))
        return
    verdict = cells.verdicts[row, col]
    survives = verdict in ("different", "negligible")
    ground, (x, y) = shade(value / cells.limit, 1.0 if survives else 0.4), frame.at(col, row)
    yield Mark("cell", box, ground)
    if verdict == "equivalent":
        yield Mark("tick", ((x, y + 4.5),), text="≈", anchor="middle")
    elif survives:
        ink = "#ffffff" if abs(value) > 0.6 * cells.limit else "#000000"
        for size, paint in ((0.7, ink),) if verdict == "different" else ((1.1, ink), (0.7, ground)):
            yield Mark("shade", tuple((x + size * across, y + size * down) for across, down in ROUND), paint)


def _figure(figure: FigureFile) -> tuple[list[Mark], float, float]:
    """Marks, width and height of the panels in their grid with everything around them."""
    cell_width, cell_height = (max(getattr(p, side) for p in figure.panels) for side in ("width", "height"))
    marks: list[Mark] = []
    y = 10.0
    if figure.title:
        y += 16
        marks.append(Mark("title", ((10, y),), text=figure.title))
    columns = min(figure.columns, len(figure.panels))
    width = max(10 + columns * cell_width + (90 if figure.scale else 0), 260)
    if figure.legend:
        legend, y = _legend(figure.legend, width, y + 18)
        marks += legend
    head = 6.0 + 15 * max(len(panel.heading.splitlines()) for panel in figure.panels)
    top = y = y + 4
    for index, panel in enumerate(figure.panels):
        right, down = 5 + index % columns * cell_width, y + index // columns * (cell_height + head)
        for number, line in enumerate(panel.heading.splitlines()):
            marks.append(Mark("label", ((right + 40, down + 15 * (number + 1)),), text=line))
        marks += [mark.moved(right, down + head) for mark in _chart(panel)]
    y += -(-len(figure.panels) // columns) * (cell_height + head)
    if figure.scale and panel.cells is not None:
        marks += _scale(panel.cells.limit, figure.scale, width - 78, top + head + _TOP, y - _BOTTOM)
    for line in textwrap.wrap(figure.note, int((width - 20) / 5.9)):
        y += 14
        marks.append(Mark("note", ((10, y),), text=line))
    return marks, width, y + 8


def _legend(entries: Sequence[tuple[str, int]], width: float, y: float) -> tuple[list[Mark], float]:
    marks: list[Mark] = []
    x = 10.0
    for name, color in entries:
        room = 34 + 7.6 * len(name) + 14
        if x > 10 and x + room > width:
            x, y = 10.0, y + 18
        marks += [Mark("line", ((x, y - 4), (x + 28, y - 4)), color), Mark("mark", ((x + 14, y - 4),), color)]
        marks.append(Mark("label", ((x + 34, y),), text=name))
        x += room
    return marks, y + 6


def _scale(limit: float, label: str, x: float, top: float, foot: float) -> Iterator[Mark]:
    steps = 64
    for step in range(steps):
        low, high = (foot - (foot - top) * edge / steps for edge in (step, step + 1))
        yield Mark("shade", _box((x, high - 0.3), (x + 10, low)), shade(2 * (step + 0.5) / steps - 1))
    marks = [value for value in ticks(-limit, limit, 6) if abs(value) <= limit * (1 + 1e-9)]
    for value, text in zip(marks, _labels(marks), strict=True):
        y = foot - (foot - top) * (value / limit + 1) / 2
        yield Mark("axis", ((x + 10, y), (x + 13, y)))
        yield Mark("note", ((x + 15, y + 4),), text=text)
    yield Mark("note", ((x + 72, (top + foot) / 2),), text=label, anchor="middle", turned=True)


def _box(first: Point, last: Point) -> tuple[Point, ...]:
    """The rectangle between two opposite corners."""
    return first, (last[0], first[1]), last, (first[0], last[1])


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    parts = [np.asarray(p, dtype=np.float64) for line in lines for p in (line.y, line.low, line.high) if p is not None]
    known = np.concatenate([part[np.isfinite(part)] for part in parts]) if parts else np.empty(0)
    if known.size == 0:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one level: an axis around it, not one through its rounding
        half = 0.05 * abs(low) or 0.05
        return low - half, high + half
    return low, high


def _runs(values: np.ndarray) -> list[np.ndarray]:
    """Stretches of indices whose values are all finite."""
    known = np.flatnonzero(np.isfinite(values))
    return [run for run in np.split(known, np.flatnonzero(np.diff(known) > 1) + 1) if len(run)]
