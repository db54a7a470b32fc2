"""What the tests say, comparison by comparison, in words and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from engine.report import text, wording
from engine.report.document import Block, Bullets, Content, Group, Heading, ReportedStudy, Span, Table, Text, section
from engine.report.findings import PairFindings, cell_relations
from engine.report.inputs import Results
from engine.report.relations import relation_lead, relation_sentence
from engine.report.sections.closing import controls, data
from engine.statistics import PairedTest


@section("Tests, controls and data", page=80, anchor="tests", name="Tests")
def tests(study: ReportedStudy) -> Iterator[Block]:
    for comparison in study.comparisons:
        yield Heading((study.swatch(comparison.condition), f" against {comparison.against}"))
        yield Text(wording.comparison_sentence(study.results, comparison))
        yield from _changes(study.results, comparison)
        yield from _details(study.results, comparison)
    if not study.comparisons:
        yield Text("One condition was measured, so nothing was tested.")
    yield Heading("Negative controls", "controls")
    yield from controls(study)
    yield Heading("Data", "data")
    yield from data(study)


def _details(results: Results, comparison: PairFindings) -> Iterator[Group]:
    """What a comparison has to say beyond its cells, closed until asked for."""
    for title, blocks in (
        ("Layer by layer", [_layer_table(results, comparison)]),
        ("Clusters of neighbouring layers", _clusters(results, comparison)),
        ("Lower and upper half of the layers", _halves(results, comparison)),
        ("When every class of images counts alike", _classes(results, [comparison])),
        ("How the metrics' differences go together", _relations(results, comparison)),
        ("The t-test over layer means: not valid inference", _layer_means(results, [comparison])),
    ):
        if blocks:
            yield Group("details", blocks, title)


def _changes(results: Results, comparison: PairFindings) -> Iterator[Block]:
    """A sentence per metric; behind those of the primary family the exploratory ones."""
    for primary in (True, False):
        changes = [change for change in comparison.changes if change.primary is primary]
        if changes and not primary and results.primary:
            yield Text("Exploratory:")
        if changes:
            yield Bullets([wording.change_sentence(results, comparison, change) for change in changes])


def _under(lead: str, sentences: Iterable[str]) -> list[Block]:
    """A list under its lead, without the sentences that have nothing to say; nothing where none has."""
    said = [sentence for sentence in sentences if sentence]
    return [Text(lead), Bullets(said)] if said else []


def _clusters(results: Results, comparison: PairFindings) -> list[Block]:
    lead = (
        f"{comparison.minus}, neighbouring layers that change in one direction (exploratory; cluster test over "
        "images, heads averaged; a p speaks of the whole cluster and not of any one layer in it):"
    )
    return _under(lead, (wording.cluster_sentence(change) for change in comparison.changes))


def _halves(results: Results, comparison: PairFindings) -> list[Block]:
    lead = f"{comparison.minus}, lower against upper half of the layers (exploratory; paired over images, max-T):"
    return _under(lead, (wording.trend_sentence(results, change) for change in comparison.changes))


def _classes(results: Results, comparisons: Sequence[PairFindings]) -> list[Block]:
    blocks: list[Block] = []
    for comparison in comparisons:
        sentences = (wording.class_sentence(results, change) for change in comparison.changes)
        blocks += _under(f"{comparison.minus}:", sentences)
    lead = "Does a finding depend on a few large classes? Here every class counts alike and is one unit (exploratory)."
    return [Text(lead), *blocks] if blocks else []


def _relations(results: Results, comparison: PairFindings) -> list[Block]:
    lead = relation_lead(results, comparison)
    return _under(lead, (relation_sentence(*pair) for pair in cell_relations(comparison)))


def _layer_means(results: Results, comparisons: Sequence[PairFindings]) -> list[Block]:
    said = (
        Span("Not valid inference.", "strong"),
        " Some publications test the layer means of two models with a paired t-test over "
        "layers. Layers of one network are not independent samples: with neighbouring layers correlated at .5 to .9, a "
        "test at 5 % rejects a true null in 25 to 68 % of cases, and opposite changes in low and high layers cancel. "
        "It is given for comparison with such work and for nothing else.",
    )
    header = ["comparison", "metric", "layers", "mean difference", "t", "p (not valid)"]
    rows = [
        [pair.minus, *_named(results, test), text.number(test.t), text.p_value(test.p)]
        for pair in comparisons
        for test in pair.layer_means
    ]
    return [Text(said), Table(header, rows, "Paired t-test over layer means (not valid inference)")] if rows else []


def _named(results: Results, test: PairedTest) -> list[str]:
    """Metric, n and difference of a test over runs or layers."""
    difference = text.change(test.difference, results.unit(test.metric))
    return [text.what(test.metric, test.region), text.plain(test.n), difference]


def _layer_table(results: Results, comparison: PairFindings) -> Table:
    """A row per metric and layer."""
    layer_tests = [test for change in comparison.changes for test in change.layers]
    bounded = any(test.tost_bound is not None for test in layer_tests)
    nested = next((test.nested_levels for test in layer_tests if test.nested_levels), "")
    rows: list[list[Content]] = []
    for test in layer_tests:
        bound = "" if test.tost_bound is None else f"{test.verdict(results.alpha)}, ±{text.number(test.tost_bound)}"
        rows.append(
            [
                text.what(test.metric, test.region),
                str(test.layer),
                text.change(test.difference, results.unit(test.metric)),
                text.interval(test.ci),
                text.interval(test.ci_simultaneous),
                *([text.interval(test.ci_nested)] if nested else []),
                text.plain(test.dz),
                *(text.p_value(p) for p in (test.p_max_t, test.p_holm, test.p_bh)),
                text.plain(test.mde),
                *([bound] if bounded else []),
            ]
        )
    interval = f"{text.percent(results.confidence)} CI"
    also = [f"{interval}, nested"] if nested else []
    header = ["metric", "layer", "difference", interval, f"{interval}, simultaneous", *also]
    header += ["dz", "p max-T", "p Holm", "p BH", "detectable", *(["verdict, bound"] if bounded else [])]
    caption = f"Layer by layer, {comparison.minus} (mean over heads, paired by image"
    caption += f"; nested: {nested} resampled" if nested else ""
    caption += f"; detectable: what would have been found with a power of {text.percent(results.power)})"
    looks = ["sure" if test.verdict(results.alpha) == "different" else "" for test in layer_tests]
    return Table(header, rows, caption, looks=looks)


# ------------------------------------------------------------------------------------------------- of the summary


@section("Observed patterns", summary=20)
def observed(study: ReportedStudy) -> Iterator[Block]:
    for comparison in study.comparisons:
        yield Heading(comparison.pair)
        yield from _changes(study.results, comparison)


@section("Tests", summary=30)
def tests_in_words(study: ReportedStudy) -> Iterator[Block]:
    for comparison in study.comparisons:
        yield Text(wording.comparison_sentence(study.results, comparison))
        table = _layer_table(study.results, comparison)
        if table.rows:
            yield Text(f"{table.caption}:")
            yield table


@section("Along the layers", summary=40)
def along_the_layers(study: ReportedStudy) -> Iterator[Block]:
    for comparison in study.comparisons:
        yield from _clusters(study.results, comparison)
        yield from _halves(study.results, comparison)


@section("Between metrics", summary=50)
def between_metrics(study: ReportedStudy) -> Iterator[Block]:
    for comparison in study.comparisons:
        yield from _relations(study.results, comparison)


@section("Classes", summary=60)
def classes(study: ReportedStudy) -> list[Block]:
    return _classes(study.results, study.comparisons)


@section("The t-test over layer means", summary=100)
def layer_means(study: ReportedStudy) -> list[Block]:
    return _layer_means(study.results, study.comparisons)
