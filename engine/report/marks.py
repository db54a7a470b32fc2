"""What charts are drawn with: marks in CSS pixels, and the writers that make SVG or PNG of them.

Each mark has a role, and `ROLES` says how a role looks: the page takes it from there as a style sheet (so that charts
follow light and dark), a file as colours.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from markupsafe import Markup, escape

# Okabe & Ito's colours, darkened where they are too pale for a line on white, and brightened for a dark ground. Shapes
# and dashes repeat the distinction for print in grey.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b85c95", "#b87f00", "#2c8fc9")
DARK_PALETTE = ("#4aa8e0", "#f28a3f", "#35c79d", "#e29cc8", "#f0b73c", "#9ad4f5")
DASHES = ((), (8, 2.5), (2.5, 2.5), (7, 2, 2, 2), (4, 2), (10, 3))
LIGHT = {"ground": "#fbfbf9", "ink": "#1c1d1f", "soft": "#5a5d63", "rule": "#dddcd6"}
DARK = {"ground": "#16181b", "ink": "#eceae6", "soft": "#a9adb5", "rule": "#383c43"}
PAPER = LIGHT | {"ground": "#ffffff"}

# Blue to red through near-white, distinct in every common form of colour blindness.
DIVERGING = np.array(
    [
        *([5, 48, 97], [33, 102, 172], [67, 147, 195], [146, 197, 222], [209, 229, 240], [247, 247, 247]),
        *([253, 219, 199], [244, 165, 130], [214, 96, 77], [178, 24, 43], [103, 0, 31]),
    ]
)

Point = tuple[float, float]
ROUND = tuple((3.4 * math.cos(a), 3.4 * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 12, endpoint=False))
SHAPES: tuple[tuple[Point, ...], ...] = (  # outlines of the points of a line around 0, 0, one per colour
    ROUND,
    ((-3, -3), (3, -3), (3, 3), (-3, 3)),
    ((0, -3.8), (3.6, 2.8), (-3.6, 2.8)),
    ((0, -4), (4, 0), (0, 4), (-4, 0)),
    ((0, 3.8), (3.6, -2.8), (-3.6, -2.8)),
    tuple(
        (x * s, y * s) for s in (1, -1) for x, y in ((-1.3, -3.6), (1.3, -3.6), (1.3, -1.3), (3.6, -1.3), (3.6, 1.3))
    ),
)


@dataclass(frozen=True, slots=True)
class Role:
    """How a kind of mark looks: paints are "series" (the mark's own colour) or a name in `LIGHT`; sizes in pixels."""

    stroke: str = ""
    fill: str = ""
    width: float = 0.0
    opacity: float = 1.0
    size: float = 0.0  # of text; a role without one is a line or an area
    weight: Literal["normal", "bold"] = "normal"


ROLES: Mapping[str, Role] = {
    "grid": Role(stroke="rule", width=1),
    "axis": Role(stroke="soft", width=1),
    "line": Role(stroke="series", width=2),
    "thin": Role(stroke="series", width=1, opacity=0.65),
    "level": Role(stroke="ink", width=1),
    "hatch": Role(stroke="soft", width=0.8),
    "band": Role(fill="series", opacity=0.2),
    "stretch": Role(fill="series"),
    "column": Role(fill="series", opacity=0.85),
    "cell": Role(fill="series", stroke="ground", width=1),
    "shade": Role(fill="series"),
    "mark": Role(fill="series", stroke="ground", width=0.8),
    "point": Role(fill="series", stroke="ground", width=0.6),
    "tick": Role(fill="soft", size=12.5),
    "label": Role(fill="ink", size=12.5),
    "title": Role(fill="ink", size=13.5, weight="bold"),
    "note": Role(fill="soft", size=10.5),
}


@dataclass(frozen=True, slots=True)
class Mark:
    """One line, area, point or text. `color` is a condition's number, or any colour written out."""

    role: str
    points: tuple[Point, ...]
    color: int | str = 0
    text: str = ""
    anchor: Literal["start", "middle", "end"] = "start"
    turned: bool = False

    def moved(self, right: float, down: float) -> Mark:
        return replace(self, points=tuple((x + right, y + down) for x, y in self.points))


def shade(value: float, strength: float = 1.0) -> str:
    """The diverging colour of −1 to 1; a lesser `strength` fades it towards the middle."""
    at = (min(max(value, -1.0), 1.0) + 1) / 2 * (len(DIVERGING) - 1)
    stops = [np.interp(at, range(len(DIVERGING)), DIVERGING[:, channel]) for channel in range(3)]
    return "#" + "".join(f"{round(247 + strength * (stop - 247)):02x}" for stop in stops)


def style_sheet(theme: Mapping[str, str] | None = None, palette: Sequence[str] = ()) -> str:
    """The roles as CSS: with a theme in its colours, without one by the page's variables."""
    paints = {"series": "currentColor", "": "none"} | dict(theme or {name: f"var(--{name})" for name in LIGHT})
    rules = [f".chart .c{n}{{color:{color}}}" for n, color in enumerate(palette)]
    for name, role in ROLES.items():
        if role.size:
            rules.append(
                f".chart .{name}{{fill:{paints[role.fill]};font-size:{role.size}px;font-weight:{role.weight}}}"
            )
        else:
            look = f"fill:{paints[role.fill]};stroke:{paints[role.stroke]};stroke-width:{role.width}"
            rules.append(f".chart .{name}{{{look};opacity:{role.opacity};stroke-linejoin:round}}")
    for n, dashes in enumerate(DASHES):
        if dashes:
            rules.append(f".chart .line.c{n}{{stroke-dasharray:{' '.join(map(str, dashes))}}}")
    return "".join(rules)


def svg(marks: Sequence[Mark], width: float, height: float, attributes: str, inside: str = "") -> Markup:
    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" {attributes}>{inside}']
    for mark in marks:
        paint = (
            f'class="{mark.role} c{mark.color}"'
            if isinstance(mark.color, int)
            else f'class="{mark.role}" color="{escape(mark.color)}"'
        )
        if ROLES[mark.role].size:
            ((x, y),) = mark.points
            at = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if mark.turned else f'x="{x:.1f}" y="{y:.1f}"'
            parts.append(f'<text class="{mark.role}" {at} text-anchor="{mark.anchor}">{escape(mark.text)}</text>')
            continue
        tip = f"><title>{escape(mark.text)}</title></" if mark.text else "/"
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in _outline(mark))
        tag = "polygon" if ROLES[mark.role].fill else "polyline"
        parts.append(f'<{tag} {paint} points="{points}"{tip}{tag if mark.text else ""}>')
    return Markup("".join([*parts, "</svg>"]))


def _outline(mark: Mark) -> Sequence[Point]:
    """The points of a line or area; of a single point the shape of its colour around it."""
    if mark.role not in ("mark", "point"):
        return mark.points
    ((x, y),) = mark.points
    shape = SHAPES[mark.color % len(SHAPES)] if isinstance(mark.color, int) else ROUND
    return [(x + a, y + b) for a, b in shape]


def png(marks: Sequence[Mark], width: float, height: float) -> bytes:
    import matplotlib
    from matplotlib.artist import Artist
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D
    from matplotlib.patches import Polygon
    from matplotlib.text import Text
    from matplotlib.transforms import Affine2D

    pixel, points = 1 / 96, 0.75  # a CSS pixel in inches and in typographic points
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        canvas = Canvas(figsize=(width * pixel, height * pixel), facecolor="white")
        FigureCanvasAgg(canvas)
        place = Affine2D().scale(pixel, -pixel).translate(0, height * pixel) + canvas.dpi_scale_trans
        for order, mark in enumerate(marks):
            role = ROLES[mark.role]
            artist: Artist
            color = mark.color if isinstance(mark.color, str) else PALETTE[mark.color % len(PALETTE)]
            paints = {"series": color, "": "none"} | PAPER
            if role.size:
                ((x, y),) = mark.points
                artist = Text(
                    x,
                    y,
                    mark.text,
                    color=paints[role.fill],
                    fontsize=role.size * points,
                    fontweight=role.weight,
                    ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
                    rotation=90 if mark.turned else 0,
                    rotation_mode="anchor",
                    parse_math=False,  # names come from users, and $…$ would be read as a formula
                )
            elif role.fill:
                width = role.width * points
                artist = Polygon(
                    _outline(mark), fc=paints[role.fill], ec=paints[role.stroke], alpha=role.opacity, lw=width
                )
            else:
                dashed = mark.role == "line" and isinstance(mark.color, int) and DASHES[mark.color % len(DASHES)]
                artist = Line2D(
                    *zip(*mark.points, strict=True),
                    color=paints[role.stroke],
                    alpha=role.opacity,
                    linewidth=role.width * points,
                    linestyle=(0, [dash / role.width for dash in dashed]) if dashed else "-",
                )
            artist.set(transform=place, zorder=order)
            canvas.add_artist(artist)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=300, metadata={"Software": None})
    return buffer.getvalue()
