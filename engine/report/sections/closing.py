"""Controls, data, limits and other cautions, and where the numbers come from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from engine.report import run_words, text, wording
from engine.report.document import Block, Bullets, Content, Group, ReportedStudy, Span, Table, Text, section
from engine.report.downloads import downloads
from engine.report.families import error_sentence
from engine.report.findings import training_runs
from engine.report.inputs import Results
from engine.report.sections.relevance import load_relevance
from engine.statistics import FEWEST


@section("Negative controls", summary=80)
def controls(study: ReportedStudy) -> Iterator[Block]:
    recorded = study.results.document.controls
    if not recorded:
        yield Text("No negative control was recorded, so nothing here vouches for the pipeline.")
        return
    failed = [control.title for control in recorded if not control.held]
    if failed:
        which = f"FAILED ({'; '.join(failed)})"
        yield Text(f"{len(failed)} of {len(recorded)} negative controls {which}: {wording.DISTRUST}")
    else:
        yield Text(f"{len(recorded)} of {len(recorded)} negative controls held.")
    rows = [
        [
            control.title,
            control.expectation,
            text.plain(control.value),
            "yes" if control.held else Span("NO", "alarm"),
            control.detail,
        ]
        for control in recorded
    ]
    header = ["control", "expected", "found", "held", "detail"]
    yield Table(header, rows, "What must come out as nothing, and whether it did")


@section("Data", summary=90)
def data(study: ReportedStudy) -> Iterator[Block]:
    results, known = study.results, study.results.document.data
    facts = f"{text.count(results.num_images, 'image')} measured"
    if known.get("classes") is not None:
        facts += f"; {known['classes']} classes"
    if splits := known.get("splits"):
        facts += "; splits: " + ", ".join(f"{name} {text.plain(size)}" for name, size in splits.items())
    yield Text(f"{facts}.")
    if dropped := known.get("dropped") or []:
        yield Text(f"{text.count(len(dropped), 'file')} could not be used and left out of every condition:")
        yield Bullets([f"{entry.get('id')}: {entry.get('status')}" for entry in dropped[:20]])
        if len(dropped) > 20:
            yield Text(f"… and {len(dropped) - 20} more, listed in metrics/attention_comparison.json.")
    else:
        yield Text("No file had to be left out.")
    undefined = [
        f"{metric} in {condition}: {text.count(int(rows), 'row')} without a value, left out of the means"
        for metric, by_condition in results.document.undefined.items()
        for condition, rows in by_condition.items()
        if rows
    ]
    if undefined:
        yield Bullets(undefined)
    if leaks := known.get("same_file_in_several_splits"):
        yield Text(
            f"{text.count(len(leaks), 'image')} with the same bytes in several splits, so test accuracy is flattered "
            f"(the first: {', '.join(map(str, leaks[0]))})."
        )
    if results.document.prefix_mass_warning:
        yield Text(results.document.prefix_mass_warning)


@section("Limits", summary=110)
def limits(study: ReportedStudy) -> Iterator[Block]:
    """The limits of this very study."""
    results = study.results
    counts = sorted({training_runs(results, condition) for condition in results.conditions})
    runs = "one checkpoint" if counts[-1] == 1 else f"{counts[-1]} training runs"
    if counts[0] < counts[-1]:
        runs = f"{counts[0]} to {runs}"
    images = text.count(results.num_images, "image")
    scope = [
        f"One architecture, one data set, {images}, {runs} per condition: nothing here carries over to other models, "
        "data or tasks without being measured there.",
        *run_words.scope_sentences(results, study.comparisons),
        "Intervals and image-level tests treat images as independent draws; images of one scene or class are less "
        "independent than that.",
        *_flipped(results),
        *filter(None, map(results.unpaired_note, results.conditions)),
        "All findings are correlational: the conditions differ in all that training changed, not in attention alone.",
        "Only attention weights after the softmax were analysed, and only of layers whose map is tokens by tokens.",
        "Attention was described after training; it was not a training target.",
    ]
    measured = load_relevance(results)
    if error := error_sentence(results, None if measured is None else measured.document):
        scope.insert(0, error)
    yield Bullets(scope)


def _flipped(results: Results) -> tuple[str, ...]:
    """What tests of few images lean on."""
    tests = [*results.select("head"), *results.select("layer")]
    if not any("sign flips, max-T" in test.resampling for test in tests):
        return ()
    return (
        f"With fewer than {FEWEST} images signs are flipped: that asks for differences symmetric about zero, and those "
        "of attention metrics often are not. Where they are skewed a small p comes too easily, in the primary family, "
        "too: read the size.",
    )


@section("What the metrics do not measure", summary=120)
def not_measured(study: ReportedStudy) -> Iterator[Block]:
    """What the metrics cannot show, whatever their values."""
    sentences = (
        "Understanding. A compact or coherent map says where weight lies, not that a model recognises what lies there; "
        "local is not the same as on the object, and coherent is not the same as meaningful.",
        "Correctness. No ground truth says which attention is right. Mass on an annotated region says how much weight "
        "falls in a box, not that it belongs there.",
        "Explanation. Attention weights are one factor of a block. Values, output projections, MLPs and the residual "
        "stream shape the prediction too, and a patch with little weight can still decide it.",
        "Cause. Training changed the weights and the attention changed with them; that a change in attention brings "
        "about a change in accuracy is not tested here. It may be incidental.",
        "Quality. More local, more concentrated or more coherent attention is not better attention.",
        "Grad-CAM pictures show where a class score responds to features, for a few images picked by seed. They "
        "illustrate; no claim of this report rests on them.",
    )
    yield Bullets(sentences)


@section("How to read the numbers", summary=130)
def how_to_read(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    sentences = (
        "Read sizes before p-values: with many images the smallest difference is “significant”. The "
        "difference is in the metric's own unit; dz is the mean paired difference over its standard deviation across "
        "images.",
        "A marked cell survives the max-T test over its whole family: the chance of even one false mark in the family "
        "is at most α. An unmarked cell is not shown to be unchanged.",
        *_methods(results),
        "Look at depth: opposite changes in lower and upper layers cancel in a mean over layers.",
        "Look across metrics: distance, entropy and Moran's I of one map are not independent. Agreement between them "
        "is not three pieces of evidence.",
        "Spatial metrics are taken over patches alone, each row renormalised; what goes to class and register tokens "
        "is prefix_mass. Read the two together.",
        "Moran's I is not 0 under no association but −1/(N−1) for N patches.",
        "Check the negative controls first: if one failed, none of the other numbers can be trusted.",
    )
    yield Bullets(sentences)


def _methods(results: Results) -> Iterator[str]:
    """Where the p-values and intervals of the tests over images come from, and which interval speaks of the largest."""
    tests = [test for level in ("layer", "head") for test in results.select(level)]
    if not tests:
        return
    resampling = text.listing(list(dict.fromkeys(re.split("[;,] max-T", test.resampling)[0] for test in tests)))
    within = any("Holm" in test.resampling for test in tests)
    family = "max-T within a metric, Holm over metrics" if within else "max-T over the family"
    intervals = text.listing(list(dict.fromkeys(test.ci_method for test in tests if test.ci_method)))
    yield f"p max-T: {resampling}; {family}. Intervals of single layers and heads: {intervals}."
    yield (
        "Simultaneous intervals cover all layers of a family at once, so that the one of the largest difference can be "
        "trusted like any other. A layer may be the largest if its interval reaches as far from 0 as every other "
        "surely does; where several may, all are named."
        + (
            " Over metrics these intervals are Bonferroni's and p is Holm's, which is less strict: with a p below α "
            "the interval may still hold 0." * within
        )
    )


@section("What this does and does not mean", page=90, anchor="limits", name="Limits")
def meaning(study: ReportedStudy) -> Iterator[Block]:
    columns = (
        Group("column", list(limits(study)), "Limits of this study"),
        Group("column", list(not_measured(study)), "What the metrics do not measure"),
        Group("column", list(how_to_read(study)), "How to read the numbers"),
    )
    yield Group("columns", columns)


@section("Provenance and tables", page=100, anchor="provenance", name="Provenance")
def provenance(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    files: list[Content] = []
    for name, link, size, place in downloads(results, study.summary):
        if link:
            files.append((Span(name, "download", link), " ", Span(size, "small")))
        else:
            more = f"{size}, too large for a page: {place} in the outputs folder"
            files.append((f"{name} ", Span(more, "small")))
    yield Bullets(files, "files")
    whole = "The whole table of every image, layer and head is metrics/attention_metrics.zarr in the outputs folder."
    yield Text(whole, "scope")
    table = Table(["what", "value"], list(_origins(results)), "As recorded by the study", "long")
    yield Group("details", [table], "Where the numbers come from")
    if results.study_text:
        later = results.later_settings
        inner: list[Block] = []
        if later:
            now = ", ".join(f"{key} {value} (the tests: {before})" for key, (value, before) in later.items())
            inner.append(Text(f"It was written after the tests were made, and says now: {now}.", "scope"))
        inner.append(Text(results.study_text, "verbatim"))
        yield Group("details", inner, "study.toml" if later else "study.toml as run")


def _origins(results: Results) -> Iterator[Sequence[Content]]:
    named = ("model", "dataset", "preprocessing", "undefined")  # undefined rows are among the data's problems
    for name in named[:3]:
        yield from ([f"{name}: {key}", _plain(value)] for key, value in results.attribute(name).items())
    yield from ([str(key), _plain(value)] for key, value in sorted(results.table.attrs.items()) if key not in named)
    backends = {str(values.attrs.get("backend", "")) for values in results.table.data_vars.values()} - {""}
    if backends:
        yield ["metrics computed by", ", ".join(sorted(backends))]
    if results.document.data.get("sha256"):
        yield ["images sha256", _plain(results.document.data["sha256"])]
    if not results.record.exists():
        yield ["record of the files", "none: no run.jsonl vouches that they are as they were written"]
    # By name: a page does not depend on which stage was done again last.
    yield from ([f"stage {name}", f"{seconds:.1f} s"] for name, seconds in sorted(results.stage_seconds.items()))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
