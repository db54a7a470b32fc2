"""Line charts of the page as small SVG text, coloured by the page's own style sheet (so they follow light and dark)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 240
RIGHT, TOP, BOTTOM = 10, 12, 40
BAR = 5.5  # height of a marked stretch
LABEL, DIGIT = 24, 7.2  # room for the label beside the axis, and for each character of the numbers at it
SHAPES = {  # marker outlines around 0, 0; the order is that of the conditions' colours
    0: "M-3.4 0a3.4 3.4 0 1 0 6.8 0a3.4 3.4 0 1 0 -6.8 0z",
    1: "M-3 -3h6v6h-6z",
    2: "M0 -3.8L3.6 2.8H-3.6z",
    3: "M0 -4L4 0L0 4L-4 0z",
    4: "M0 3.8L3.6 -2.8H-3.6z",
    5: "M-1.3 -3.6h2.6v2.3h2.3v2.6h-2.3v2.3h-2.6v-2.3h-2.3v-2.6h2.3z",
}


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A line of a chart: points, an interval around them where there is one, and its condition's colour."""

    name: str
    color: int
    x: Sequence[float]
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    thin: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of the x axis, marked at the foot of a chart in a condition's colour."""

    name: str
    color: int
    first: float
    last: float


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


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float],
    y_range: tuple[float, float] | None = None,
    bars: Sequence[Bar] = (),
    zero: bool = False,
) -> Markup:
    """SVG of some lines; what it shows in words is its accessible name. NaN breaks a line. `zero` marks that level."""
    low, high = y_range or _range(lines)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    marks = ticks(low, high)
    low, high = min(low, marks[0]), max(high, marks[-1])
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 2
    texts = [f"{mark:.{decimals}f}".replace("-", "−") for mark in marks]
    left = LABEL + DIGIT * max(len(text) for text in texts)
    x_low, x_high = min(x_ticks), max(x_ticks)
    pad = 0.06 * (x_high - x_low) or 0.5
    x_low, x_high = x_low - pad, x_high + pad

    def across(value: float) -> float:
        return left + (WIDTH - left - RIGHT) * (value - x_low) / (x_high - x_low)

    foot = BOTTOM + BAR * len({bar.color for bar in bars})  # lines stay above the bars

    def down(value: float) -> float:
        return TOP + (HEIGHT - TOP - foot) * (high - value) / (high - low or 1.0)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {y_label} by {x_label}; the numbers are in the table below")}">'
    ]
    for mark, text in zip(marks, texts, strict=True):
        y = down(mark)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    step = max(1, -(-len(x_ticks) // 13))
    for value in x_ticks[::step]:
        parts.append(f'<text x="{across(value):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    parts.append(
        f'<line class="axis" x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label" x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 7}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    if zero:
        parts.append(f'<line class="axis" x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{down(0):.1f}" y2="{down(0):.1f}"/>')
    rows = {color: row for row, color in enumerate(dict.fromkeys(bar.color for bar in bars))}
    for bar in bars:
        y, half = HEIGHT - BOTTOM - BAR * (rows[bar.color] + 1), 0.3
        start, end = max(across(bar.first - half), left), min(across(bar.last + half), WIDTH - RIGHT)
        parts.append(
            f'<rect class="bar c{bar.color}" x="{start:.1f}" y="{y:.1f}" width="{end - start:.1f}" '
            f'height="{BAR - 1.5}"><title>{escape(bar.name)}</title></rect>'
        )
    for line in lines:
        if line.low is not None and line.high is not None:
            for run in _runs(np.asarray(line.low) + np.asarray(line.high)):
                upper = [f"{across(line.x[i]):.1f},{down(line.high[i]):.1f}" for i in run]
                lower = [f"{across(line.x[i]):.1f},{down(line.low[i]):.1f}" for i in reversed(run)]
                parts.append(f'<polygon class="band c{line.color}" points="{" ".join(upper + lower)}"/>')
    for line in lines:
        kind = "thin" if line.thin else "line"
        for run in _runs(np.asarray(line.y)):
            points = " ".join(f"{across(line.x[i]):.1f},{down(line.y[i]):.1f}" for i in run)
            parts.append(f'<polyline class="{kind} c{line.color}" points="{points}"/>')
            if line.thin:
                continue
            for i in run:
                shape = SHAPES[line.color % len(SHAPES)]
                tip = escape(f"{line.name}, {x_label} {line.x[i]:g}: {line.y[i]:.6g}")
                parts.append(
                    f'<path class="mark c{line.color}" transform="translate({across(line.x[i]):.1f} '
                    f'{down(line.y[i]):.1f})" d="{shape}"><title>{tip}</title></path>'
                )
    parts.append("</svg>")
    return Markup("".join(parts))


def _range(lines: Sequence[Line]) -> tuple[float, float]:
    values = [
        np.asarray(part, dtype=np.float64)
        for line in lines
        for part in (line.y, line.low, line.high)
        if part is not None
    ]
    known = np.concatenate([part[np.isfinite(part)] for part in values]) if values else np.empty(0)
    if known.size == 0:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one level: an axis around it, not one through its rounding
        half = 0.05 * abs(low) or 0.05
        return low - half, high + half
    return low, high


def _runs(values: np.ndarray) -> list[list[int]]:
    """Stretches of indices whose values are all finite."""
    runs: list[list[int]] = []
    for index in np.flatnonzero(np.isfinite(values)):
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(int(index))
        else:
            runs.append([int(index)])
    return runs
