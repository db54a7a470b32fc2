"""Controls, data, limits and where the numbers come from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.report import cautions, text, wording
from engine.report.document import Block, Bullets, Content, Group, Heading, Span, Study, Table, Text, section
from engine.report.downloads import downloads
from engine.report.inputs import Results


def controls_and_data(study: Study) -> Iterator[Block]:
    """The page's part on both, below the tests."""
    results = study.results
    yield Heading("Negative controls", "controls")
    if results.document.controls:
        yield _control_table(results, Span("no", "alarm"))
    else:
        yield Text("None was recorded, so nothing here vouches for the pipeline.")
    yield Heading("Data", "data")
    yield Text(_facts(results, ", ", str))
    if dropped := results.document.data.get("dropped") or []:
        items = [(Span(str(entry.get("id")), "code"), f": {entry.get('status')}") for entry in dropped[:50]]
        yield Group("open", [Bullets(items)], _left_out(len(dropped)))
    else:
        yield Text("No file had to be left out.")
    said = (*(f"{line}." for line in wording.undefined_sentences(results)), results.document.prefix_mass_warning)
    yield from (Text(sentence) for sentence in (wording.leaks_sentence(results), *said) if sentence)


def _facts(results: Results, comma: str, write: Callable[[Any], str]) -> str:
    facts = f"{text.count(results.num_images, 'image')} measured"
    if results.document.data.get("classes") is not None:
        facts += f"{comma}{results.document.data['classes']} classes"
    if splits := results.document.data.get("splits"):
        facts += "; splits: " + ", ".join(f"{name} {write(size)}" for name, size in splits.items())
    return f"{facts}."


def _left_out(files: int) -> str:
    return f"{text.count(files, 'file')} could not be used and left out of every condition"


def _control_table(results: Results, no: Content) -> Table:
    rows = [
        [
            str(control.get("title") or control.get("name")),
            str(control.get("expectation", "")),
            text.plain(control.get("value")),
            "yes" if control.get("held") else no,
            str(control.get("detail") or ""),
        ]
        for control in results.document.controls
    ]
    header = ["control", "expected", "found", "held", "detail"]
    return Table(header, rows, "What must come out as nothing, and whether it did")


@section("Negative controls", summary=80)
def controls(study: Study) -> list[Block]:
    results = study.results
    if not results.document.controls:
        return [Text("No negative control was recorded, so nothing here vouches for the pipeline.")]
    failed = [
        str(control.get("title", control.get("name")))
        for control in results.document.controls
        if not control.get("held")
    ]
    total = len(results.document.controls)
    verdict = f"{total} of {total} negative controls held."
    if failed:
        which = f"FAILED ({'; '.join(failed)})"
        verdict = f"{len(failed)} of {total} negative controls {which}: {wording.DISTRUST}"
    return [Text(verdict), _control_table(results, "NO")]


@section("Data", summary=90)
def data(study: Study) -> list[Block]:
    results = study.results
    blocks: list[Block] = [Text(_facts(results, "; ", text.plain))]
    if dropped := results.document.data.get("dropped") or []:
        blocks.append(Text(f"{_left_out(len(dropped))}:"))
        blocks.append(Bullets([f"{entry.get('id')}: {entry.get('status')}" for entry in dropped[:20]]))
        if len(dropped) > 20:
            blocks.append(Text(f"… and {len(dropped) - 20} more, listed in metrics/attention_comparison.json."))
    else:
        blocks.append(Text("No file had to be left out."))
    blocks.append(Bullets(wording.undefined_sentences(results)))
    said = (wording.leaks_sentence(results), results.document.prefix_mass_warning)
    return [*blocks, *(Text(sentence) for sentence in said if sentence)]


@section("What this does and does not mean", page=90, anchor="limits", name="Limits")
def meaning(study: Study) -> list[Block]:
    parts = (
        ("Limits of this study", cautions.limits(study.results, study.comparisons)),
        ("What the metrics do not measure", cautions.not_measured()),
        ("How to read the numbers", cautions.how_to_read()),
    )
    return [Group("columns", [Group("column", [Bullets(sentences)], title) for title, sentences in parts])]


@section("Limits", summary=110)
def limits(study: Study) -> list[Block]:
    return [Bullets(cautions.limits(study.results, study.comparisons))]


@section("What the metrics do not measure", summary=120)
def not_measured(study: Study) -> list[Block]:
    return [Bullets(cautions.not_measured())]


@section("How to read the numbers", summary=130)
def how_to_read(study: Study) -> list[Block]:
    return [Bullets(cautions.how_to_read())]


@section("Provenance and tables", page=100, anchor="provenance", name="Provenance")
def provenance(study: Study) -> list[Block]:
    results = study.results
    files: list[Content] = []
    for name, link, size, place in downloads(results, study.summary):
        if link:
            files.append((Span(name, "download", link), " ", Span(size, "small")))
        else:
            more = f"{size}, too large for a page: {place} in the outputs folder"
            files.append((f"{name} ", Span(more, "small")))
    whole = "The whole table of every image, layer and head is metrics/attention_metrics.zarr in the outputs folder."
    table = Table(["what", "value"], list(_origins(results)), "As recorded by the study", "long")
    blocks: list[Block] = [Bullets(files, "files"), Text(whole, "scope")]
    blocks.append(Group("details", [table], "Where the numbers come from"))
    if results.study_text:
        later = results.later_settings
        inner: list[Block] = []
        if later:
            now = ", ".join(f"{key} {value} (the tests: {before})" for key, (value, before) in later.items())
            inner.append(Text(f"It was written after the tests were made, and says now: {now}.", "scope"))
        inner.append(Text(results.study_text, "verbatim"))
        blocks.append(Group("details", inner, "study.toml" if later else "study.toml as run"))
    return blocks


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
