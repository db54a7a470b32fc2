"""The figure of docs/statistics.md, drawn from docs/statistics_calibration.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.null_studies import band
from engine.report.marks import PALETTE

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vit-attention-engine",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same glyphs on every machine
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4.5,
}
GREEN, GREY, OWN = PALETTE[2], "#666666", PALETTE[1]
LABELS = {
    "lognormal 1": "lognormal 1",
    "skewed": "skewed",
    "exponential": "exponential",
    "lognormal .5": "lognormal .5",
    "t4": "mixture, t4,\nnormal",
}


def _lines(axes: Axes, entries: list[dict[str, Any]], group: str, key: str) -> None:
    """One line per kind of differences over the numbers of images; the studies' own are coloured."""
    sizes = sorted({entry["images"] for entry in entries})
    for kind in dict.fromkeys(entry["kind"] for entry in entries):
        rates = {entry["images"]: 100 * entry[group][key] for entry in entries if entry["kind"] == kind}
        own = kind.startswith("study")
        axes.plot(
            list(rates),
            list(rates.values()),
            color=OWN if own else PALETTE[0],
            marker="s" if own else "o",
            linewidth=1.4 if own else 1.0,
            alpha=1.0 if own else 0.75,
            zorder=3 if own else 2,
        )
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
    axes.minorticks_off()
    axes.set_xlabel("images")


def _level(axes: Axes, studies: int, rate: float) -> None:
    low, high = (100 * edge for edge in band(studies, rate))
    axes.axhspan(low, high, color=GREEN, alpha=0.25, linewidth=0)
    axes.axhline(100 * rate, color=GREEN, linewidth=0.8)


def figure(results: Mapping[str, Any]) -> Figure:
    """Three panels: the family-wise error of sign flips, that of the bootstrap, the coverage of its intervals."""
    entries = [*results["simulated"], *results["study"]]
    studies = entries[0]["studies"]
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(10.4, 3.5), layout="constrained", facecolor="white")
        FigureCanvasAgg(drawn)
        flips, bootstrap, cover = drawn.subplots(1, 3)
        for axes, key, title in ((flips, "sign_flip", "Sign flips, max-T"), (bootstrap, "max_t", "Bootstrap, max-T")):
            _lines(axes, entries, "error", key)
            _level(axes, studies, 0.05)
            axes.set_ylim(0, 80)
            axes.set_title(title)
        flips.set_ylabel("null studies with any finding (%)")
        flips.set_xlim(4.2, 1300)
        for entry in entries:
            if entry["images"] == 20 and (name := LABELS.get(entry["kind"])):
                flips.text(17, 100 * entry["error"]["sign_flip"], name, ha="right", va="center", fontsize=7, color=GREY)
        handles = [
            flips.plot([], [], color=color, marker=marker, label=label)[0]
            for color, marker, label in ((PALETTE[0], "o", "simulated"), (OWN, "s", "a study's own differences"))
        ]
        bootstrap.legend(handles=handles, fontsize=7.5, loc="upper right")

        _lines(cover, entries, "coverage", "bca")
        _level(cover, studies, 0.95)
        cover.set_ylim(80, 100)
        cover.set_yticks(range(80, 101, 5))
        cover.set_ylabel("intervals that cover the truth (%)")
        cover.set_title("BCa intervals, one test")
    return drawn


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the figure as SVG, the same bytes for the same results."""
    with matplotlib.rc_context(STYLE):
        figure(results).savefig(path, metadata={"Date": None, "Creator": None})
