"""What the tests say, comparison by comparison, in words and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from engine.report import text, wording
from engine.report.document import Block, Bullets, Content, Group, Heading, Span, Study, Table, Text, section
from engine.report.findings import Change, Comparison, cell_relations
from engine.report.inputs import Results
from engine.report.sections.closing import controls_and_data
from engine.statistics import PairedTest


@section("Tests, controls and data", page=80, anchor="tests", name="Tests")
def tests(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for comparison in study.comparisons:
        blocks += [
            Heading((study.swatch(comparison.condition), f" against {comparison.against}")),
            Text(wording.comparison_sentence(study.results, comparison)),
            Bullets(_changes(study.results, comparison)),
            *_details(study.results, comparison),
        ]
    if not study.comparisons:
        blocks.append(Text("One condition was measured, so nothing was tested."))
    return [*blocks, *controls_and_data(study)]


def _details(results: Results, comparison: Comparison) -> Iterator[Group]:
    """What a comparison has to say beyond its cells, closed until asked for."""
    yield Group("details", [_layer_table(results, comparison, on_page=True)], "Layer by layer")
    topics = [(title, note, _said(results, comparison, say)) for title, note, say in _TOPICS]
    note = "Cells of one model are not independent: descriptive, without p-values."
    topics.append(("How the metrics' differences go together", note, _relations(comparison)))
    yield from (Group("details", [Text(note), Bullets(said)], title) for title, note, said in topics if said)
    if seed_tests := comparison.seed_tests:
        caption = "Differences between training runs"
        if not comparison.speaks_of_runs:
            caption += f"; {comparison.runs} runs are too few to pass {results.alpha:g}"
        rows = [[*_named(results, test), text.p_value(test.p), text.p_value(test.p_max_t)] for test in seed_tests]
        rows = [[name, str(test.layer), *cells] for test, (name, *cells) in zip(seed_tests, rows, strict=True)]
        table = Table(["metric", "layer", "runs", "difference", "p (sign flip)", "p max-T"], rows, caption)
        yield Group("details", [Text(wording.seed_sentence(results, comparison)), table], "Over training runs")
    if comparison.layer_means:
        said = (
            "Layers of one network are not independent samples: with neighbouring layers correlated at .5 to .9 such a "
            "test rejects a true null in 25 to 68 % of cases instead of 5. It is given for comparison with work that "
            "reports it."
        )
        header = ["metric", "layers", "mean difference", "t", "p, not valid"]
        table = Table(header, _mean_rows(results, comparison), "Paired t-test over layer means (not valid inference)")
        yield Group("details", [Text(said), table], "The t-test over layer means: not valid inference")


def _changes(results: Results, comparison: Comparison) -> list[str]:
    return [wording.change_sentence(results, comparison, change) for change in comparison.changes]


def _said(results: Results, comparison: Comparison, say: Callable[[Results, Change], str]) -> list[str]:
    return [said for change in comparison.changes if (said := say(results, change))]


def _relations(comparison: Comparison) -> list[str]:
    return [said for pair in cell_relations(comparison) if (said := wording.relation_sentence(*pair))]


_TOPICS = (
    (
        "Runs of neighbouring layers",
        "Cluster permutation over images, heads averaged; a p speaks of the whole run, not of any one layer in it.",
        wording.cluster_sentence,
    ),
    ("Lower and upper half of the layers", "Paired over images, max-T over the metrics.", wording.trend_sentence),
    (
        "When every class of images counts alike",
        "Does a finding hang on a few large classes? Here a class is one unit.",
        wording.class_sentence,
    ),
)


def _mean_rows(results: Results, comparison: Comparison) -> list[list[str]]:
    return [[*_named(results, test), text.number(test.t), text.p_value(test.p)] for test in comparison.layer_means]


def _named(results: Results, test: PairedTest) -> list[str]:
    """Metric, n and difference of a test over runs or layers."""
    n = "" if test.n is None else str(test.n)
    return [text.what(test.metric, test.region), n, text.change(test.difference, results.unit(test.metric))]


def _layer_table(results: Results, comparison: Comparison, *, on_page: bool) -> Table:
    """A row per metric and layer; the page has the unit beside the metric's name, and a column for equivalence."""
    layer_tests = [test for change in comparison.changes for test in change.layers]
    nested = next((test.nested_levels for test in layer_tests if test.nested_levels), "")
    bounded = on_page and any(test.tost_bound is not None for test in results.document.tests)
    rows: list[list[Content]] = []
    for test in layer_tests:
        unit = results.unit(test.metric)
        name = text.what(test.metric, test.region)
        bound = (
            f"±{text.number(test.tost_bound)}: {text.p_value(test.p_tost_holm)}" if test.tost_bound is not None else ""
        )
        dz, detectable = ("" if value is None and not on_page else text.number(value) for value in (test.dz, test.mde))
        rows.append(
            [
                (name, " ", Span(f"({unit})", "small")) if on_page and unit else name,
                str(test.layer),
                text.change(test.difference, "" if on_page else unit),
                text.interval(test.ci),
                *([text.interval(test.ci_nested)] if nested else []),
                dz,
                *(text.p_value(p) for p in (test.p_max_t, test.p_holm, test.p_bh)),
                detectable,
                *([bound] if bounded else []),
            ]
        )
    confidence = text.percent(results.confidence)
    also = [("" if on_page else f"{confidence} ") + "CI, nested"] if nested else []
    header = [
        "metric",
        "layer",
        "difference",
        f"{confidence} CI",
        *also,
        "dz",
        "p max-T",
        "p Holm",
        "p BH",
        "detectable",
    ]
    caption = f"{comparison.minus}, mean over heads, paired by image"
    caption += f"; nested: {nested} resampled" if nested else ""
    caption += f". Detectable: what would have been found with a power of {text.percent(results.power)}"
    looks = ["sure" if test.changed(results.alpha) else "" for test in layer_tests]
    return Table([*header, *(["TOST"] if bounded else [])], rows, caption, looks=looks)


# ------------------------------------------------------------------------------------------------- of the summary


@section("Observed patterns", summary=20)
def observed(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for comparison in study.comparisons:
        blocks.append(Heading(comparison.pair))
        blocks.append(Bullets(_changes(study.results, comparison)))
    return blocks


@section("Tests", summary=30)
def tests_in_words(study: Study) -> list[Block]:
    results = study.results
    blocks: list[Block] = []
    for comparison in study.comparisons:
        blocks.append(Text(wording.comparison_sentence(results, comparison)))
        table = _layer_table(results, comparison, on_page=False)
        if table.rows:
            nested = next((test.nested_levels for change in comparison.changes for test in change.layers), "")
            said = f"Layer by layer, {comparison.minus} (mean over heads, paired by image"
            said += f"; nested: {nested} resampled" if nested else ""
            power = text.percent(results.power)
            blocks += [Text(f"{said}; detectable: what would have been found with a power of {power}):"), table]
        if over_runs := wording.seed_sentence(results, comparison):
            blocks.append(Text(over_runs))
    return blocks


@section("Along the layers", summary=40)
def along_the_layers(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for comparison in study.comparisons:
        for say, lead in (
            (
                wording.cluster_sentence,
                "runs of neighbouring layers that change in one direction (cluster permutation over images, heads "
                "averaged; a p speaks of the whole run and not of any one layer in it):",
            ),
            (
                wording.trend_sentence,
                "lower against upper half of the layers (paired over images, max-T over metrics):",
            ),
        ):
            if said := _said(study.results, comparison, say):
                blocks += [Text(f"{comparison.minus}, {lead}"), Bullets(said)]
    return blocks


@section("Between metrics", summary=50)
def between_metrics(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for comparison in study.comparisons:
        if said := _relations(comparison):
            lead = "Cells of one model are not independent, so no p-value is given:"
            blocks += [Text(f"Differences {comparison.minus}. {lead}"), Bullets(said)]
    return blocks


@section("Classes", summary=60)
def classes(study: Study) -> list[Block]:
    blocks: list[Block] = []
    for comparison in study.comparisons:
        if said := _said(study.results, comparison, wording.class_sentence):
            blocks += [Text(f"{comparison.minus}:"), Bullets(said)]
    lead = "Does a finding hang on a few large classes? Here every class counts alike and is one unit."
    return [Text(lead), *blocks] if blocks else []


@section("The t-test over layer means", summary=100)
def layer_means(study: Study) -> list[Block]:
    rows = [[pair.minus, *row] for pair in study.comparisons for row in _mean_rows(study.results, pair)]
    said = (
        Span("Not valid inference.", "strong"),
        " Some publications test the layer means of two models with a paired t-test over "
        "layers. Layers of one network are not independent samples: with neighbouring layers correlated at .5 to .9, a "
        "test at 5 % rejects a true null in 25 to 68 % of cases, and opposite changes in low and high layers cancel. "
        "It is given for comparison with such work and for nothing else.",
    )
    header = ["comparison", "metric", "layers", "mean difference", "t", "p (not valid)"]
    return [Text(said), Table(header, rows)] if rows else []
