"""Whether findings depend on how a metric is defined and on what heads become; nothing where it was not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from engine.report import text
from engine.report.document import Block, Bullets, Content, Figure, Group, Heading, ReportedStudy, Table, Text, section
from engine.report.findings import Change, PairFindings
from engine.report.inputs import Results, matches
from engine.report.plots import Chart, Line, ticks
from engine.statistics import Multiverse, Specification

TITLE = "Does it depend on the convention?"
_NO_CLAIM = "#8d9199"


@section(TITLE, summary=65)
def in_words(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    if not results.document.multiverse:
        return
    yield Text(
        "Published codes measure by different conventions. A specification is one convention of the metric and what it "
        "makes of an image's heads: their mean, median or greatest value. It claims a difference where max-T over its "
        f"own layers is at most {results.alpha:g}, without correction over metrics. What differs by a constant factor "
        "is one specification."
    )
    for comparison in study.comparisons:
        if said := [sentence for change in comparison.changes if (sentence := _sentence(results, comparison, change))]:
            yield Heading(comparison.pair)
            yield Bullets(said)


@section(TITLE, page=85, anchor="conventions", name="Conventions")
def with_curves(study: ReportedStudy) -> Iterator[Block]:
    yield from in_words(study)
    for comparison in study.comparisons:
        shown = ((change, _layers(study.results, comparison, change)) for change in comparison.changes)
        curves = [_curve(study.results, change, layers) for change, layers in shown if layers]
        if curves:
            yield Group("details", [Group("charts", curves)], f"Specification curves, {comparison.minus}")


def _layers(results: Results, comparison: PairFindings, change: Change) -> list[Multiverse]:
    """The layers of a metric under every specification, the one that `change` speaks of first; empty: not measured."""
    where = {"condition": comparison.condition, "against": comparison.against, "metric": change.metric}
    layers = [entry for entry in results.document.multiverse if matches(entry, {**where, "region": change.region})]
    shown = change.shown.layer if change.shown is not None else None
    return sorted(layers, key=lambda entry: (entry.layer != shown, entry.layer))


def _sentence(results: Results, comparison: PairFindings, change: Change) -> str:
    """How many specifications say what the study says of a metric; "" where none was measured or nothing differs."""
    layers = _layers(results, comparison, change)
    if not layers or change.identical:
        return ""
    alpha, shown = results.alpha, layers[0]
    count, opposing = len(shown.specifications), shown.opposing(alpha)
    jointly = shown.claiming(alpha, jointly=True)
    said = (
        f"{change.name} in layer {shown.layer} ({text.change(shown.specifications[0].difference, change.unit)}): "
        f"{shown.agreeing} of {count} specifications have this sign, {shown.claiming(alpha)} of {count} claim it"
        + (f", {opposing} of {count} claim the opposite" if opposing else "")
        + f". With all specifications and layers as one family, {jointly} of {count} claim it."
    )
    differing = {test.layer for test in change.layers if test.verdict(alpha) == "different"}
    if len(differing) > 1:
        of_these = [(entry, len(entry.specifications)) for entry in layers if entry.layer in differing]
        signs = sum(entry.agreeing == every for entry, every in of_these)
        claims = sum(entry.claiming(alpha) == every for entry, every in of_these)
        said += (
            f" Every specification has the study's sign in {text.share(signs, len(of_these))} layers that differ, and "
        )
        said += f"claims it in {text.share(claims, len(of_these))}."
    return said


def _curve(results: Results, change: Change, layers: Sequence[Multiverse]) -> Figure:
    """The specification curve of the layer that `change` speaks of: dz by specification, sorted."""
    shown = layers[0]
    ranked = sorted(shown.specifications, key=lambda entry: -(entry.dz or 0.0))
    names = [f"{one.metric}, {one.heads}" + ("*" if one is shown.specifications[0] else "") for one in ranked]
    lines = [Line("no difference", _NO_CLAIM, [0.0, 0.0], np.array([-0.5, len(ranked) - 0.5]), look="thin")]
    lines += [
        Line(name, results.color(shown.condition) if claims else _NO_CLAIM, [one.dz], np.array([row]), look="points")
        for row, (one, name) in enumerate(zip(ranked, names, strict=True))
        if one.dz is not None
        for claims in [one.survives(results.alpha)]
    ]
    sizes = [0.0, *(one.dz for one in ranked if one.dz is not None)]
    chart = Chart(
        title=f"{change.name}, layer {shown.layer}",
        note="*: the study's own. Grey: claims no difference.",
        lines=lines,
        x_label="dz",
        y_label="",
        x_ticks=ticks(min(sizes), max(sizes)),
        y_names=names,
        width=200 + 8 * max(map(len, names)),
        height=60 + 22 * len(ranked),
    )
    rows = [[name, *_cells(results, one, layers)] for one, name in zip(ranked, names, strict=True)]
    header = ["specification", "difference", "dz", "p max-T", "p, all together", "sign, layers", "claimed, layers"]
    looks = ["sure" if one.survives(results.alpha) else "" for one in ranked]
    return Figure(chart, Table(header, rows, f"{chart.title}: every specification (*: the study's own)", looks=looks))


def _cells(results: Results, one: Specification, layers: Sequence[Multiverse]) -> list[Content]:
    """The numbers of a specification in its layer, and in how many layers it has the study's sign and claims it."""
    ways = [other for entry in layers for other in entry.specifications]
    same = [other for other in ways if (other.metric, other.heads) == (one.metric, one.heads)]
    claimed = [other for other in same if other.same_sign and other.survives(results.alpha)]
    return [
        text.change(one.difference, "" if one.unit == "1" else one.unit),
        text.number(one.dz),
        text.p_value(one.p_max_t),
        text.p_value(one.p_joint),
        f"{sum(other.same_sign for other in same)} of {len(same)}",
        f"{len(claimed)} of {len(same)}",
    ]
