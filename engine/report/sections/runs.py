"""Training runs: what holds for more of them and more images, how far they lie apart, and how many it takes."""

from __future__ import annotations

from collections.abc import Iterator

from engine.report import run_words, text
from engine.report.charts import seed_chart
from engine.report.document import (
    Block,
    Bullets,
    Content,
    Figure,
    Group,
    Heading,
    ReportedStudy,
    Table,
    Text,
    section,
)
from engine.report.findings import PairFindings
from engine.report.inputs import Results


@section("Training runs and images", page=30, anchor="seeds", name="Runs")
def runs(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    if len(results.seeds) < 2:
        return
    yield Text(
        f"Each line is one training run's difference from {results.against} (mean over heads and images): "
        "the spread that a claim about training has to beat."
    )
    yield study.legend()
    yield Group("charts", [Figure(seed_chart(results, metric, region)) for metric, region in results.series()])
    for comparison in study.comparisons:
        if comparison.crossed:
            yield Heading((study.swatch(comparison.condition), f" against {comparison.against}"))
            yield Bullets(_sentences(results, comparison))
            yield Group("details", [_layer_table(results, comparison)], "Components and runs needed, layer by layer")
            yield Group("details", [_seed_table(results, comparison)], "Sign flips of runs, on these very images")
    if results.document.run_controls:
        yield Group("details", [_control_table(results)], "Runs of one condition against each other")


@section("Training runs and images", summary=35)
def runs_in_words(study: ReportedStudy) -> Iterator[Block]:
    for comparison in study.comparisons:
        if comparison.crossed:
            yield Heading(comparison.pair)
            yield Bullets(_sentences(study.results, comparison))
            table = _layer_table(study.results, comparison)
            yield Text(f"{table.caption}:")
            yield table


def _sentences(results: Results, comparison: PairFindings) -> list[Content]:
    said = (
        *(run_words.control_sentence(results, name) for name in (comparison.condition, comparison.against)),
        run_words.spread_sentence(comparison),
        run_words.crossed_sentence(results, comparison),
        run_words.seed_sentence(results, comparison),
    )
    return [sentence for sentence in said if sentence]


def _layer_table(results: Results, comparison: PairFindings) -> Table:
    """A row per metric and layer: components of the difference, its interval and test, and what it takes to find it."""
    tests = [test for test in comparison.crossed if test.level == "layer"]
    dz = {(t.metric, t.region, t.layer): t.dz for change in comparison.changes for t in change.layers}
    rows: list[list[Content]] = []
    for test in tests:
        rows.append(
            [
                text.what(test.metric, test.region),
                str(test.layer),
                text.change(test.difference, results.unit(test.metric)),
                text.interval(test.ci),
                *(text.plain(sd) for sd in (test.sd_run, test.sd_image, test.sd_residual)),
                "" if test.share_run is None else text.number(test.share_run, 2),
                text.plain(test.d_run),
                text.plain(dz.get((test.metric, test.region, test.layer))),
                text.p_value(test.p_holm),
                *("–" if needed is None else f"{needed:,}" for needed in (test.runs_needed, test.images_needed)),
            ]
        )
    header = ["metric", "layer", "difference", f"{text.percent(results.confidence)} CI, runs and images"]
    header += ["sd of runs", "sd of images", "sd of residuals", "share of runs", "difference / sd of runs", "dz"]
    header += ["p Holm", "runs needed", "images needed"]
    caption = (
        f"Layer by layer, {comparison.minus} over runs and images like these (mean over heads; sd: standard deviations "
        "of the components in the metric's unit; share of runs in the variance of the mean; dz: difference / sd of the "
        f"images' differences; needed for a power of {text.percent(results.power)}: runs with as many images as here, "
        "or images with as many runs; –: none up to 1,000 runs or a million images)"
    )
    looks = ["sure" if test.survives(results.alpha) else "" for test in tests]
    return Table(header, rows, caption, looks=looks)


def _seed_table(results: Results, comparison: PairFindings) -> Table:
    caption = "Differences between training runs, test images held fixed"
    if not comparison.speaks_of_runs:
        caption += f"; {comparison.runs} runs are too few to pass {results.alpha:g}"
    rows: list[list[Content]] = []
    for test in comparison.seed_tests:
        difference = text.change(test.difference, results.unit(test.metric))
        ps = (text.p_value(p) for p in (test.p, test.p_max_t, test.p_holm))
        rows.append([text.what(test.metric, test.region), str(test.layer), text.plain(test.n), difference, *ps])
    header = ["metric", "layer", "runs", "difference", "p (sign flip)", "p max-T", "p Holm (Student's)"]
    return Table(header, rows, caption)


def _control_table(results: Results) -> Table:
    rows: list[list[Content]] = [
        [
            control.condition,
            text.listing([str(seed) for seed in control.seeds]),
            f"{control.cells_differ} of {control.cells}",
            f"{control.layers_differ} of {control.layers}",
        ]
        for control in results.document.run_controls
    ]
    caption = (
        "What differs between two runs of one condition, by max-T over images (cells and layer means, a family each)"
    )
    return Table(["condition", "seeds", "cells that differ", "layer means that differ"], rows, caption)
