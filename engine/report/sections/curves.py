"""What is drawn by layer: maps of all heads, curves, training runs, and the attention itself."""

from __future__ import annotations

from collections.abc import Iterator

from engine.report import text
from engine.report.charts import curve_chart, training_charts
from engine.report.document import Block, Content, Figure, Group, ReportedStudy, Span, Table, Text, Widget, section
from engine.report.findings import histories, layer_curve
from engine.report.maps import MARKS, maps_payload


@section("Which layers and heads changed", page=10, anchor="maps", name="Layers and heads")
def maps(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    if not study.comparisons:
        return
    said: list[str | Span] = [f"Mean paired difference, condition − {results.against}. "]
    marked = (
        f" survives max-T at α\u00a0=\u00a0{results.alpha:g} over all layers, heads and metrics of its comparison, "
        "which is exploratory (the mean over heads: in the layer's family); a faded cell does not survive, which does "
        "not show that nothing changed there."
    )
    if any(test.tost_bound is not None for test in results.document.tests):
        marked += (
            f" Where a bound was set: {MARKS['negligible']} survives and its simultaneous interval lies within "
            f"(negligible), {MARKS['equivalent']} lies within and does not survive (equivalent), no mark is undecided."
        )
    said.append(Span(marked, "dot"))
    said.append(" Press a cell, or move with the arrow keys, for its numbers, its images and its attention.")
    yield Text(tuple(said))
    if unpaired := [pair.pair for pair in study.comparisons if not pair.heads_paired]:
        caution = f"Heads are not paired in {text.listing(unpaired)}: read the mean over heads, and see the limits."
        yield Text(Span(caution, "strong"))
    yield Widget("maps", list(maps_payload(results, study.comparisons)))
    without = (
        "The interactive maps need JavaScript; the same maps lie beside this page in visualizations/figures, and every "
        "test is among the ",
        Span("tables", "link", "#provenance"),
        ".",
    )
    yield Text(without, "noscript")


@section("Layer curves", page=20, anchor="curves")
def curves(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    said = (
        f"Means over heads and images. Bands: {text.percent(results.confidence)} t interval over images, n = "
        f"{text.count(results.num_images, 'image')}, given the checkpoints"
    )
    said += "; thin lines: single training runs." if len(results.seeds) > 1 else "."
    if any(results.clusters(condition=pair.condition, against=pair.against) for pair in study.comparisons):
        said += (
            " Bars at the foot, in a condition's colour: neighbouring layers that together "
            f"differ from {results.against} (exploratory; cluster test, α = {results.alpha:g})."
        )
    yield Text(said)
    yield study.legend()
    yield Group("charts", [curve(study, metric, None) for metric in results.metrics if not results.has_regions(metric)])


def curve(study: ReportedStudy, metric: str, region: str | None) -> Figure:
    """A chart with its numbers: mean, interval and images by layer, a column per condition."""
    results = study.results
    lines = [layer_curve(results, metric, condition, region) for condition in results.conditions]
    rows: list[list[Content]] = []
    for row, layer in enumerate(results.layers):
        cells: list[Content] = [str(layer)]
        for curve in lines:
            low, high = float(curve.low[row]), float(curve.high[row])
            mean = text.number(float(curve.mean[row]), decimals=text.decimals(high - low))
            interval = Span(f"{text.interval((low, high))}; n {int(curve.n[row])}", "small")
            cells.append((mean, Span("", "break"), interval))
        rows.append(cells)
    level = text.percent(results.confidence)
    caption = f"{results.heading(metric, region)} by layer: mean, {level} interval over images, n"
    table = Table(["layer", *results.conditions], rows, caption)
    return Figure(curve_chart(results, metric, region, study.comparisons), table)


@section("The attention itself", page=40, anchor="attention", name="Attention")
def attention(study: ReportedStudy) -> Iterator[Block]:
    viewer = study.viewer
    if viewer is None:
        return
    said = f"8-bit pictures of {len(viewer['images'])} of the {viewer['kept']} sample images kept in samples.zarr"
    if (stride := viewer["stride"]) > 1:
        nth = {2: "2nd", 3: "3rd"}.get(stride, f"{stride}th")
        said += f"; to keep this page small, queries are every {nth} row and column of patches"
    if len(study.results.seeds) > 1:
        said += "; of each condition its first training run, while the numbers above are means over runs"
    yield Text(
        "Point at or tap a patch of the image to see where it attends (or focus the image and use the arrow keys). "
        "Maps show each patch's share of the attention that falls on patches; point at one to read a share. Where "
        "attention goes is not why the model decides."
    )
    yield Widget("viewer", viewer)
    yield Text(f"{said}. Measurements were made on the full-precision maps.", "scope")
    yield Text("The viewer needs JavaScript.", "noscript")


@section("Training", page=70, anchor="training")
def training(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    if not results.training:
        return
    if charts := [Figure(chart) for chart in training_charts(results)]:
        yield study.legend()
        yield Group("charts", charts)
        drawn = {condition for condition, _, _ in histories(results, "loss")}
        if without := [condition for condition in results.training if condition not in drawn]:
            yield Text(f"{text.listing(without)}: fitted without epochs, so without a curve.", "scope")
    rows: list[list[Content]] = []
    for condition, entry in results.training.items():
        for seed, run in (entry.get("seeds") or {}).items():
            shares = [run.get("validation_accuracy"), run.get("test_accuracy")]
            accuracies = ["" if share is None else f"{100 * share:.1f} %" for share in shares]
            parameters = text.plain(run.get("trainable_parameters"))
            rows.append([study.swatch(condition), str(entry.get("recipe", "")), str(seed), parameters, *accuracies])
    header = ["condition", "recipe", "seed", "trained parameters", "validation", "test"]
    yield Table(header, rows, "Training runs and the accuracy of the checkpoints they kept")
