"""One plotter: a chart, described once, is drawn as SVG for the page and as SVG, PNG or PDF files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

from engine.report.marks import LIGHT, PALETTE, PAPER, ROUND, Mark, Point, image, shade, style_sheet, svg


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
    points: Sequence[float] = ()
    level: float | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Chart:
    """Lines or columns over one axis. NaN breaks a line.

    Args:
        title: accessible name; heading: what stands above it, the title if empty.
        unit, note: beside and below the heading.
        x_ticks: numbers at the x axis; x_names: words in their place.
        y_range: what the y axis spans at the least; zero: marks that level and takes it in.
    """

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[float]
    x_names: Sequence[str] = ()
    heading: str = ""
    unit: str = ""
    note: str = ""
    lines: Sequence[Line] = ()
    stretches: Sequence[Stretch] = ()
    columns: Sequence[Column] = ()
    y_range: tuple[float, float] | None = None
    zero: bool = False
    width: float = 360
    height: float = 240

    def svg(self) -> Markup:
        """The chart on the page: without its heading, which the page sets."""
        name = f"{self.title}: {self.y_label} by {self.x_label}; the numbers are in the table below"
        return svg(_chart(self), self.width, self.height, f'class="chart" role="img" aria-label="{escape(name)}"')


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeatMap:
    """Cells [row, column] from −limit to limit. What is not `sure` is faded, or noise on a narrow scale would look like
    a finding; what is sure has a dot; what is not finite is hatched.
    """

    heading: str
    values: np.ndarray
    sure: np.ndarray
    limit: float
    rows: Sequence[int]
    columns: Sequence[int]
    x_label: str
    y_label: str

    @property
    def cell(self) -> float:
        return 38 if len(self.columns) <= 6 else 23

    @property
    def width(self) -> float:
        return 46 + self.cell * len(self.columns)

    @property
    def height(self) -> float:
        return 44 + self.cell * len(self.rows)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Figure:
    """Panels in a grid as one file, with title, legend (name and colour of its lines) and small print."""

    panels: Sequence[Chart | HeatMap]
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
        return (head + svg(marks, width, height, attributes, style + ground) + "\n").encode()

    def image(self, kind: Literal["png", "pdf"], dpi: int = 300) -> bytes:
        """The same marks as PNG or PDF, with matplotlib's own font: the same bytes on every machine."""
        return image(*_figure(self), kind, dpi)


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


def _chart(chart: Chart) -> list[Mark]:
    low, high = chart.y_range or _range(chart.lines)
    if chart.zero:
        low, high = min(low, 0.0), max(high, 0.0)
    y_ticks = ticks(low, high)
    low, high = min(low, y_ticks[0]), max(high, y_ticks[-1])
    texts = _labels(y_ticks)
    left, right, foot = _LABEL + _DIGIT * max(map(len, texts)), chart.width - _RIGHT, chart.height - _BOTTOM
    first, last = min(chart.x_ticks), max(chart.x_ticks)
    pad = 0.5 if chart.columns else 0.06 * (last - first) or 0.5
    first, last = first - pad, last + pad
    base = foot - _STRETCH * len({stretch.color for stretch in chart.stretches})  # lines stay above the stretches

    def place(x: float, y: float) -> Point:
        across = left + (right - left) * (x - first) / (last - first)
        return across, _TOP + (base - _TOP) * (high - y) / (high - low or 1.0)

    def level(role: str, y: float) -> Mark:
        return Mark(role, ((left, y), (right, y)))

    marks: list[Mark] = []
    for value, text in zip(y_ticks, texts, strict=True):
        y = place(first, value)[1]
        marks += [] if chart.columns else [level("grid", y)]
        marks += [Mark("tick", ((left - 6, y + 4),), text=text, anchor="end")]
    step = max(1, -(-len(chart.x_ticks) // 13))
    names = chart.x_names or [f"{value:g}" for value in chart.x_ticks]
    for value, name in list(zip(chart.x_ticks, names, strict=True))[::step]:
        marks.append(Mark("tick", ((place(value, low)[0], foot + 16),), text=name, anchor="middle"))
    marks.append(level("axis", foot))
    marks.append(Mark("label", (((left + right) / 2, chart.height - 7),), text=chart.x_label, anchor="middle"))
    marks.append(Mark("label", ((12, (_TOP + foot) / 2),), text=chart.y_label, anchor="middle", turned=True))
    if chart.zero:
        marks.append(level("axis", place(first, 0.0)[1]))
    rows = {color: row for row, color in enumerate(dict.fromkeys(stretch.color for stretch in chart.stretches))}
    for stretch in chart.stretches:
        top = foot - _STRETCH * (rows[stretch.color] + 1)
        start = max(place(stretch.first - 0.3, low)[0], left)
        end = min(place(stretch.last + 0.3, low)[0], right)
        marks.append(Mark("stretch", _box(start, top, end, top + _STRETCH - 1.5), stretch.color, stretch.name))
    for column in chart.columns:
        marks += _column(column, place)
    for line in chart.lines:
        if line.low is not None and line.high is not None:
            for run in _runs(np.asarray(line.low) + np.asarray(line.high)):
                upper = [place(line.x[i], line.high[i]) for i in run]
                marks.append(Mark("band", (*upper, *(place(line.x[i], line.low[i]) for i in run[::-1])), line.color))
    for line in chart.lines:
        for run in _runs(np.asarray(line.y)):
            points = tuple(place(line.x[i], line.y[i]) for i in run)
            if line.look != "points":
                marks.append(Mark(line.look, points, line.color))
            if line.look != "thin":
                for i, point in zip(run, points, strict=True):
                    tip = f"{line.name}, {chart.x_label} {line.x[i]:g}: {line.y[i]:.6g}"
                    marks.append(Mark("mark", (point,), line.color, tip))
    return marks


def _column(column: Column, place: Callable[[float, float], Point]) -> Iterator[Mark]:
    x, y = column.x, column.y
    yield Mark("column", _box(*place(x - 0.31, y), *place(x + 0.31, 0.0)), column.color)
    for offset, value in zip(np.linspace(-0.16, 0.16, len(column.points)), column.points, strict=True):
        yield Mark("point", (place(x + offset, value),), LIGHT["ink"])
    top = place(x, max([y, *column.points]))
    yield Mark("tick", ((top[0], top[1] - 5),), text=column.label, anchor="middle")
    if column.level is not None:
        yield Mark("level", (place(x - 0.5, column.level), place(x + 0.5, column.level)))


def _heat_map(heat: HeatMap) -> list[Mark]:
    left, top, cell = 40.0, 4.0, heat.cell
    marks: list[Mark] = []
    for row, layer in enumerate(heat.rows):
        for column in range(len(heat.columns)):
            value, sure = heat.values[row, column], bool(heat.sure[row, column])
            x, y = left + cell * column, top + cell * row
            box = _box(x, y, x + cell, y + cell)
            if not np.isfinite(value):
                marks.append(Mark("cell", box, "#f3f3f3"))
                for part in (0.25, 0.5, 0.75):
                    ends = (
                        ((x + cell * part, y), (x, y + cell * part)),
                        ((x + cell, y + cell * part), (x + cell * part, y + cell)),
                    )
                    marks += [Mark("hatch", end) for end in ends]
                continue
            color = shade(value / heat.limit, 1.0 if sure else 0.4)
            marks.append(Mark("cell", box, color))
            if sure:
                dot = "#ffffff" if abs(value) > 0.6 * heat.limit else "#000000"
                marks.append(
                    Mark("shade", tuple((x + cell / 2 + 0.7 * a, y + cell / 2 + 0.7 * b) for a, b in ROUND), dot)
                )
        if row % (1 if len(heat.rows) <= 16 else 2) == 0:
            marks.append(Mark("tick", ((left - 6, top + cell * row + cell / 2 + 4),), text=str(layer), anchor="end"))
    foot = top + cell * len(heat.rows)
    for column in range(0, len(heat.columns), 1 if len(heat.columns) <= 6 else 2):
        at = (left + cell * column + cell / 2, foot + 15)
        marks.append(Mark("tick", (at,), text=str(heat.columns[column]), anchor="middle"))
    marks.append(Mark("label", ((left + cell * len(heat.columns) / 2, foot + 32),), text=heat.x_label, anchor="middle"))
    marks.append(Mark("label", ((12, (top + foot) / 2),), text=heat.y_label, anchor="middle", turned=True))
    return marks


def _figure(figure: Figure) -> tuple[list[Mark], float, float]:
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
    if any(panel.heading for panel in figure.panels):
        lines = max(panel.heading.count("\n") + 1 for panel in figure.panels)
        head = 8.0 + 15 * lines
    else:
        head = 6.0
    top = y = y + 4
    for index, panel in enumerate(figure.panels):
        right, down = 5 + index % columns * cell_width, y + index // columns * (cell_height + head)
        for number, line in enumerate(panel.heading.split("\n")):
            role = "title" if isinstance(panel, Chart) else "label"
            marks.append(Mark(role, ((right + 40, down + 15 * (number + 1)),), text=line))
        drawn = _chart(panel) if isinstance(panel, Chart) else _heat_map(panel)
        marks += [mark.moved(right, down + head) for mark in drawn]
    y += -(-len(figure.panels) // columns) * (cell_height + head)
    if figure.scale and isinstance(panel, HeatMap):
        marks += _scale(panel.limit, figure.scale, width - 78, top + head + 4, y - 50)
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
        yield Mark("shade", _box(x, high - 0.3, x + 10, low), shade(2 * (step + 0.5) / steps - 1))
    marks = [value for value in ticks(-limit, limit, 6) if abs(value) <= limit * (1 + 1e-9)]
    for value, text in zip(marks, _labels(marks), strict=True):
        y = foot - (foot - top) * (value / limit + 1) / 2
        yield Mark("axis", ((x + 10, y), (x + 13, y)))
        yield Mark("note", ((x + 15, y + 4),), text=text)
    yield Mark("note", ((x + 72, (top + foot) / 2),), text=label, anchor="middle", turned=True)


def _box(left: float, top: float, right: float, bottom: float) -> tuple[Point, ...]:
    return (left, top), (right, top), (right, bottom), (left, bottom)


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
