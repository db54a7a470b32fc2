"""Figures as SVG and PNG: colours safe for colour blindness, units, intervals and n; the same bytes each time."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.report.findings import head_maps, histories, layer_curve
from engine.report.inputs import Results
from engine.report.wording import accuracy_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's palette without its yellow (too pale for a line) and black; blue and vermilion, the pair that is told
# apart best, come first. Shapes and dashes repeat the distinction for print in grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (6, 1.6)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)), (0, (3, 1)), (0, (8, 2)))

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vit-attention-engine",
    "svg.fonttype": "path",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same glyphs on every machine
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.edgecolor": "#444444",
    "axes.unicode_minus": True,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
}
PNG_DPI = 200


def condition_styles(results: Results) -> dict[str, dict[str, Any]]:
    """Condition -> colour, marker and dashes, the same in every figure."""
    return {
        name: {
            "color": PALETTE[index % len(PALETTE)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": DASHES[index % len(DASHES)],
        }
        for index, name in enumerate(results.conditions)
    }


def file_stem(name: str) -> str:
    """A metric's name as part of a file name; a user's metric may be called `my_module:my_metric`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "metric"


def render_figures(results: Results) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of every figure that these results have something for, SVG and PNG."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        for stem, figure in _figures(results):
            yield f"{stem}.svg", _bytes(figure, "svg")
            figure.set_layout_engine("none")  # laid out once is laid out for both: a quarter of the time
            yield f"{stem}.png", _bytes(figure, "png")


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    taken: set[str] = set()
    for metric in results.metrics:
        stem = file_stem(metric)
        while stem in taken:
            stem += "_"
        taken.add(stem)
        if "region" in results.table[metric].dims:
            yield stem, _region_curves(results, metric)
        else:
            yield f"layers_{stem}", _layer_curves(results, metric)
        if results.select("head", metric=metric):
            yield f"difference_{stem}", _difference_maps(results, metric)
    if any(results.accuracy.get(condition) for condition in results.conditions):
        yield "accuracy", _accuracy(results)
    if results.training and any(histories(results, "loss")):
        yield "training", _training_curves(results)
    if len(results.seeds) > 1:
        yield "seeds", _seeds(results)


def _bytes(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=PNG_DPI, metadata=metadata)
    return buffer.getvalue()


def _new(width: float, height: float, rows: int = 1, cols: int = 1, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure that no window or global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, cols, squeeze=False, **options)


def _axis_label(results: Results, metric: str) -> str:
    """The unit; the title stands above the axes, and beside them where there is no unit to name."""
    return literal(results.unit(metric) or results.title(metric))


def _note(figure: Figure, text: str) -> None:
    """Small print under a figure, broken to its width (17 characters an inch at 7.5 pt)."""
    lines = textwrap.fill(text, int(17 * figure.get_figwidth()))
    figure.supxlabel(lines, fontsize=7.5, color="#555555", x=0.01, ha="left", linespacing=1.3)


def literal(text: str) -> str:
    """Text that matplotlib draws as it stands: names come from users, and $…$ would be parsed as a formula."""
    return text.replace("$", r"\$")


def _curve_axes(results: Results, axes: Axes, metric: str, region: str | None) -> int:
    """Draws every condition's curve; returns the least number of images behind a point."""
    styles = condition_styles(results)
    fewest = results.num_images
    layers = np.asarray(results.layers)
    for condition in results.conditions:
        curve = layer_curve(results, metric, condition, region)
        style = styles[condition]
        axes.fill_between(layers, curve.low, curve.high, color=style["color"], alpha=0.22, linewidth=0)
        if len(curve.by_seed) > 1:
            for means in curve.by_seed.values():
                axes.plot(layers, means, color=style["color"], linewidth=0.6, alpha=0.55)
        axes.plot(layers, curve.mean, label=literal(condition), markeredgecolor="white", markeredgewidth=0.5, **style)
        fewest = min(fewest, int(curve.n.min()))
    _layer_ticks(axes, results.layers)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    return fewest


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    step = 1 if len(layers) <= 16 else 2 if len(layers) <= 32 else 4
    axes.set_xticks(layers[::step])
    axes.set_xlim(layers[0] - 0.35, layers[-1] + 0.35)
    axes.set_xlabel("layer")


def _interval_note(results: Results, fewest: int) -> str:
    n = f"n = {results.num_images:,} images"
    if fewest < results.num_images:
        n = f"n = {fewest:,} to {results.num_images:,} images a point"
    seeds = "; thin lines: single training runs" if len(results.seeds) > 1 else ""
    return f"Mean over heads and images; band: {100 * results.confidence:g} % t interval over images, {n}{seeds}"


def _layer_curves(results: Results, metric: str) -> Figure:
    figure, grid = _new(5.2, 3.5)
    axes = grid[0, 0]
    fewest = _curve_axes(results, axes, metric, None)
    axes.set_title(literal(results.title(metric)))
    axes.set_ylabel(_axis_label(results, metric))
    _legend(figure, axes)
    _note(figure, _interval_note(results, fewest))
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 4), handlelength=2.6)


def _region_curves(results: Results, metric: str) -> Figure:
    """One panel a region, on one scale: where the class token's attention on patches falls."""
    regions = results.regions
    cols = min(len(regions), 3)
    rows = -(-len(regions) // cols)
    figure, grid = _new(max(5.0, 3.1 * cols), 0.9 + 2.5 * rows, rows, cols, sharey=True)
    fewest = results.num_images
    for index, axes in enumerate(grid.flat):
        if index >= len(regions):
            axes.set_visible(False)
            continue
        fewest = min(fewest, _curve_axes(results, axes, metric, regions[index]))
        axes.set_title(literal(regions[index]))
        if index % cols == 0:
            axes.set_ylabel(
                "share of attention on patches" if metric == "region_mass" else _axis_label(results, metric)
            )
    top = max(axes.dataLim.y1 for axes in grid.flat[: len(regions)])
    if np.isfinite(top):
        grid.flat[0].set_ylim(0, 1.05 * max(top, 0.05))
    _legend(figure, grid.flat[0])
    _note(figure, _interval_note(results, fewest))
    return figure


def _difference_maps(results: Results, metric: str) -> Figure:
    """Layer × head maps of the difference, one panel a comparison (and region), on one symmetric scale."""
    import matplotlib

    pairs = results.comparisons()
    regions: Sequence[str | None] = results.regions if "region" in results.table[metric].dims else (None,)
    depth, heads = len(results.sites), len(results.heads)
    panels = [(pair, region) for region in regions for pair in pairs]
    maps = [head_maps(results, *pair, metric, region) for pair, region in panels]
    greatest = max(
        (float(np.nanmax(np.abs(m["difference"]))) for m in maps if np.isfinite(m["difference"]).any()), default=0.0
    )
    limit = greatest or 1.0
    cols, rows = len(pairs), len(regions)
    cell = 0.42 if heads <= 6 else 0.24
    width, height = max(2.1, 0.6 + cell * heads), max(1.9, 0.7 + cell * depth)
    figure, grid = _new(width * cols + 1.3, height * rows + 0.8, rows, cols, sharex=True, sharey=True)
    figure.suptitle(literal(results.title(metric)), x=0.01, ha="left", fontsize=10.0, fontweight="bold")
    colours = matplotlib.colormaps["RdBu_r"]
    for axes, (pair, region), found in zip(grid.flat, panels, maps, strict=True):
        difference = found["difference"]
        axes.set_facecolor("#f3f3f3")
        marked = found["p_max_t"] <= results.alpha
        axes.imshow(
            np.ma.masked_invalid(difference),
            cmap=colours,
            vmin=-limit,
            vmax=limit,
            # What does not survive is faded, or noise on a narrow scale would look like a finding.
            alpha=np.where(marked, 1.0, 0.4),
            aspect="equal",
            origin="upper",
        )
        for layer, head in zip(*np.nonzero(~np.isfinite(difference)), strict=True):
            axes.add_patch(
                matplotlib.patches.Rectangle(
                    (head - 0.5, layer - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#8a8a8a", linewidth=0
                )
            )
        for layer, head in zip(*np.nonzero(marked & np.isfinite(difference)), strict=True):
            dark = abs(difference[layer, head]) > 0.6 * limit
            axes.plot(head, layer, marker="o", markersize=3.2, color="white" if dark else "black", linestyle="none")
        name = f"{pair[0]} − {pair[1]}"
        axes.set_title(literal(name if region is None else f"{name}\non {region}"), fontsize=9.0, fontweight="normal")
        every = 1 if heads <= 6 else 2
        axes.set_xticks(np.arange(0, heads, every), [str(head) for head in results.heads[::every]])
        step = 1 if depth <= 16 else 2
        axes.set_yticks(np.arange(0, depth, step), [str(layer) for layer in results.layers[::step]])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(depth + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
    for axes in grid[-1]:
        axes.set_xlabel("head")
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(-limit, limit), colours)
    bar = figure.colorbar(scale, ax=list(grid.flat), shrink=0.85, aspect=22, pad=0.02)
    bar.set_label(
        f"difference ({literal(results.unit(metric))})" if results.unit(metric) else "difference", fontsize=8.5
    )
    bar.outline.set_visible(False)
    hatched = ", hatched: undefined" if any(not np.isfinite(m["difference"]).all() for m in maps) else ""
    n = max((test.n or 0 for test in results.select("head", metric=metric)), default=0)
    _note(figure, f"Dot: max-T p ≤ {results.alpha:g} in its family; faded: above it{hatched}; n = {n:,} images")
    return figure


def _accuracy(results: Results) -> Figure:
    styles = condition_styles(results)
    named = [name for name in results.conditions if results.accuracy.get(name)]
    figure, grid = _new(max(3.4, 1.4 + 0.9 * len(named)), 3.3)
    axes = grid[0, 0]
    for position, condition in enumerate(named):
        runs = list(results.accuracy[condition].values())
        values = [100 * run["test"] for run in runs if run.get("test") is not None]  # type: ignore[operator]
        chance = next((run["chance"] for run in runs if run.get("chance") is not None), None)
        if not values:
            continue
        if chance is not None:
            axes.hlines(
                100 * chance, position - 0.5, position + 0.5, color="#444444", linewidth=0.9, linestyle=(0, (4, 2))
            )
            if position == len(named) - 1:
                axes.text(position + 0.55, 100 * chance, "chance", va="center", fontsize=7.5, color="#444444")
        mean = sum(values) / len(values)
        axes.bar(position, mean, width=0.62, color=styles[condition]["color"], alpha=0.85)
        if len(values) > 1:
            offsets = np.linspace(-0.16, 0.16, len(values))
            axes.plot(position + offsets, values, "o", color="black", markersize=3, markeredgecolor="white")
        axes.text(position, max(values) + 1.5, f"{mean:.1f}", ha="center", fontsize=8.5)
    axes.set_xticks(range(len(named)), [literal(name) for name in named])
    axes.set_xlim(-0.5, len(named) - 0.5)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"{accuracy_title(results).lower()} (%)")
    axes.set_title("Accuracy")
    runs_shown = max((len(results.accuracy[name]) for name in named), default=1)
    _note(figure, "one training run a condition" if runs_shown == 1 else f"bar: mean of {runs_shown} runs; dots: runs")
    return figure


def _training_curves(results: Results) -> Figure:
    from matplotlib.ticker import MaxNLocator

    styles = condition_styles(results)
    panels = [("loss", "training loss (nat)", 1.0), ("validation_accuracy", "validation accuracy (%)", 100.0)]
    panels = [panel for panel in panels if any(histories(results, panel[0]))]
    figure, grid = _new(max(4.2, 3.2 * len(panels)), 3.1, 1, len(panels))
    for axes, (key, label, scale) in zip(grid.flat, panels, strict=True):
        seen: set[str] = set()
        for condition, epochs, values in histories(results, key):
            style = styles.get(condition, {"color": "#777777"})
            name = None if condition in seen else literal(condition)
            axes.plot(epochs, scale * values, label=name, markeredgecolor="white", markeredgewidth=0.5, **style)
            seen.add(condition)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    _legend(figure, grid.flat[0])
    return figure


def _seeds(results: Results) -> Figure:
    """Every training run's difference from its counterpart, by layer: the spread that a claim has to beat."""
    styles = condition_styles(results)
    pairs = results.comparisons()
    metrics = [metric for metric in results.metrics if "region" not in results.table[metric].dims]
    cols = min(3, len(metrics))
    rows = -(-len(metrics) // cols)
    figure, grid = _new(3.0 * cols, 0.6 + 2.4 * rows, rows, cols)
    layers = np.asarray(results.layers)
    for index, axes in enumerate(grid.flat):
        if index >= len(metrics):
            axes.set_visible(False)
            continue
        metric = metrics[index]
        axes.axhline(0, color="#444444", linewidth=0.8)
        for condition, against in pairs:
            runs = layer_curve(results, metric, condition).by_seed
            base = layer_curve(results, metric, against).by_seed
            if not base:
                continue
            for order, (seed, means) in enumerate(runs.items()):
                other = base.get(seed, next(iter(base.values())))  # a seed-invariant baseline is stored once
                label = literal(f"{condition} − {against}") if order == 0 else None
                axes.plot(layers, means - other, label=label, linewidth=1.0, **_thin(styles[condition]))
        _layer_ticks(axes, results.layers)
        axes.set_ylabel(f"difference ({literal(results.unit(metric)) or '1'})")
        axes.set_title(literal(results.title(metric)))
    _legend(figure, grid.flat[0])
    _note(figure, f"One line a training run ({len(results.seeds)} seeds); mean over heads and images")
    return figure


def _thin(style: dict[str, Any]) -> dict[str, Any]:
    return {**style, "markersize": 2.8}
