"""The charts of a study, for the page, and the figures made of them, for files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from engine.report import text
from engine.report.findings import PairFindings, histories, layer_curve
from engine.report.inputs import Results
from engine.report.plots import Cells, Chart, Column, FigureFile, Line, Stretch
from engine.report.wording import accuracies, accuracy_title
from kernels import METRICS


def curve_chart(results: Results, metric: str, region: str | None, comparisons: Sequence[PairFindings] = ()) -> Chart:
    """Every condition's metric by layer; the regions of one metric share their scale.

    With comparisons, the runs of layers that differ are marked at the foot.
    """
    lines = []
    for condition in results.conditions:
        curve, color = layer_curve(results, metric, condition, region), results.color(condition)
        if len(curve.by_seed) > 1:
            lines += [Line(condition, color, results.layers, run, look="thin") for run in curve.by_seed.values()]
        lines.append(Line(condition, color, results.layers, curve.mean, curve.low, curve.high))
    stretches = [
        Stretch(
            f"{cluster.direction} than {cluster.against} in {text.span(cluster.layers)}, p {text.p_value(cluster.p)}",
            results.color(cluster.condition),
            cluster.layers[0],
            cluster.layers[-1],
        )
        for pair in comparisons
        for cluster in results.clusters(condition=pair.condition, against=pair.against, metric=metric, region=region)
    ]
    y_range = None
    if region is not None:
        highs = [layer_curve(results, metric, c, name).high for c in results.conditions for name in results.regions]
        known = [high for high in np.concatenate(highs) if np.isfinite(high)]
        y_range = (0.0, float(max(known))) if known else None
    unit = results.unit(metric)
    return Chart(
        title=results.heading(metric, region),
        heading=region or "",
        unit=unit,
        note=_association(results, metric),
        lines=lines,
        stretches=stretches,
        x_label="layer",
        y_label=unit or (results.title(metric) if region is None else "share"),
        x_ticks=results.layers,
        y_range=y_range,
    )


def seed_chart(results: Results, metric: str, region: str | None) -> Chart:
    """Every training run's difference by layer."""
    lines = []
    for condition, against in results.comparisons():
        runs = layer_curve(results, metric, condition, region).by_seed
        base = layer_curve(results, metric, against, region).by_seed
        for seed, means in runs.items() if base else ():
            other = base.get(seed, next(iter(base.values())))  # a seed-invariant condition has one run
            name = f"{condition}, seed {seed}"
            lines.append(Line(name, results.color(condition), results.layers, means - other, look="thin"))
    title = results.heading(metric, region)
    return Chart(
        title=f"{title}, difference by training run",
        heading=title,
        unit=results.unit(metric),
        lines=lines,
        x_label="layer",
        y_label="difference",
        x_ticks=results.layers,
        zero=True,
    )


def training_charts(results: Results) -> Iterator[Chart]:
    """Loss and validation accuracy by epoch, where they were recorded."""
    for key, label, scale in (
        ("loss", "training loss", 1.0),
        ("validation_accuracy", "validation accuracy (%)", 100.0),
    ):
        lines: list[Line] = []
        for condition, epochs, values in histories(results, key):
            again = any(line.name == condition for line in lines)
            color = results.color(condition)
            lines.append(Line(condition, color, epochs.tolist(), scale * values, look="thin" if again else "line"))
        if lines:
            marks = sorted({epoch for line in lines for epoch in line.x})
            yield Chart(title=label, lines=lines, x_label="epoch", y_label=label, x_ticks=marks)


def figures(results: Results) -> Iterator[tuple[str, FigureFile]]:
    """(file name without its ending, figure) of everything that these results have something for."""
    legend = [(name, results.color(name)) for name in results.conditions]
    for metric in results.metrics:
        regions = results.regions_of(metric)
        panels = [curve_chart(results, metric, region) for region in regions]
        if metric in METRICS and (label := METRICS[metric].axis_label):
            panels = [replace(chart, y_label=label) for chart in panels]
        name, note = metric if results.has_regions(metric) else f"layers_{metric}", _interval_note(results, metric)
        yield name, FigureFile(panels=panels, columns=3, title=results.title(metric), legend=legend, note=note)
        if results.select("head", metric=metric):
            yield f"difference_{metric}", _difference_maps(results, metric, regions)
    if accuracies(results):
        yield "accuracy", _accuracy(results)
    if trained := {condition for condition, _, _ in histories(results, "loss")}:
        panels = [
            replace(c, y_label="training loss (nat)") if c.y_label == "training loss" else c
            for c in training_charts(results)
        ]
        shown = [entry for entry in legend if entry[0] in trained]
        yield "training", FigureFile(panels=panels, columns=2, legend=shown)
    if len(results.seeds) > 1:
        pairs = [(f"{condition} − {against}", results.color(condition)) for condition, against in results.comparisons()]
        note = f"One line per training run ({len(results.seeds)} seeds); mean over heads and images"
        panels = [seed_chart(results, metric, None) for metric in results.metrics if not results.has_regions(metric)]
        panels = [replace(c, y_label=f"difference ({c.unit or '1'})") for c in panels]
        yield "seeds", FigureFile(panels=panels, columns=3, legend=pairs, note=note)


def _interval_note(results: Results, metric: str) -> str:
    curves = [layer_curve(results, metric, c, r) for c in results.conditions for r in results.regions_of(metric)]
    fewest = min(int(curve.n.min()) for curve in curves)
    n = f"n = {results.num_images:,} images"
    if fewest < results.num_images:
        n = f"n = {fewest:,} to {results.num_images:,} images per point"
    seeds = "; thin lines: single training runs" if len(results.seeds) > 1 else ""
    return f"Mean over heads and images; band: {100 * results.confidence:g} % t interval over images, {n}{seeds}"


def _difference_maps(results: Results, metric: str, regions: Sequence[str | None]) -> FigureFile:
    """Layer × head maps of the difference, one panel per comparison (and region), on one symmetric scale."""
    pairs = results.comparisons()
    maps = [(pair, region, *_differences(results, *pair, metric, region)) for region in regions for pair in pairs]
    known = np.concatenate([np.abs(values).ravel() for _, _, values, _ in maps])
    greatest = float(known[np.isfinite(known)].max(initial=0.0))
    cell = 38 if len(results.heads) <= 6 else 23
    panels = [
        Chart(
            title=results.heading(metric, region),
            heading=f"{condition} − {against}" + ("" if region is None else f"\non {region}"),
            cells=Cells(values, verdicts, greatest or 1.0),
            x_names=[str(head) for head in results.heads],
            y_names=[str(layer) for layer in results.layers],
            x_label="head",
            y_label="layer",
            width=50 + cell * len(results.heads),
            height=52 + cell * len(results.layers),
        )
        for (condition, against), region, values, verdicts in maps
    ]
    hatched = "" if np.isfinite(known).all() else ", hatched: undefined"
    tests, unit = results.select("head", metric=metric), results.unit(metric)
    n = max((test.n or 0 for test in tests), default=0)
    note = f"Dot: max-T p ≤ {results.alpha:g} in its family; faded: above it{hatched}; n = {n:,} images"
    if (bound := next((test.tost_bound for test in tests if test.tost_bound is not None), None)) is not None:
        note += (
            f". Bound ±{text.quantity(bound, unit)}: a ring survives and lies within, ≈ lies within and does not "
            "survive; no mark: undecided"
        )
    return FigureFile(
        panels=panels,
        columns=len(pairs),
        title=results.title(metric),
        note=note,
        scale=f"difference ({unit})" if unit else "difference",
    )


def _differences(
    results: Results, condition: str, against: str, metric: str, region: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Difference (NaN where there is none) and verdict, as [layer, head]."""
    shape = (len(results.layers), len(results.heads))
    values, verdicts = np.full(shape, np.nan), np.full(shape, "undecided", dtype=object)
    for test in results.select("head", condition=condition, against=against, metric=metric, region=region):
        if test.layer is not None and test.head is not None and test.difference is not None:
            place = results.layers.index(test.layer), results.heads.index(test.head)
            values[place], verdicts[place] = test.difference, test.verdict(results.alpha)
    return values, verdicts


def _accuracy(results: Results) -> FigureFile:
    rows = accuracies(results)
    columns = []
    for x, (condition, test, chance, runs) in enumerate(rows):
        each = [100 * run.test for run in results.document.accuracy[condition].values()]
        points = each if runs > 1 else []
        columns.append(Column(results.color(condition), x, test, f"{test:.1f}", points, chance))
    chart = Chart(
        title="Accuracy",
        columns=columns,
        x_label="",
        x_names=[name for name, *_ in rows],
        y_label=f"{accuracy_title(results).lower()} (%)",
        y_range=(0.0, 100.0),
        width=80 + 90 * max(len(columns), 2),
    )
    most = max(runs for *_, runs in rows)
    bars = "one training run per condition" if most == 1 else f"bar: mean of {most} runs; dots: runs"
    return FigureFile(panels=[chart], title=chart.title, note=f"{bars}; line: chance")


def _association(results: Results, metric: str) -> str:
    """What a metric is without association, where it has such a value and the grid is known; or ""."""
    if metric not in METRICS or results.samples is None:
        return ""
    sizes = {layer.layout.num_patches for run in results.samples.runs.values() for layer in run.layers}
    null = METRICS[metric].null(sizes.pop()) if len(sizes) == 1 else None
    return "" if null is None else f"No association: {text.number(null)}, not 0."
