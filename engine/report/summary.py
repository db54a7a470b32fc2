"""summary.md: what was observed, how sure it is, and what it does not mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.report import wording
from engine.report.findings import Comparison, comparisons, metric_relations, training_runs
from engine.report.inputs import Results

__all__ = ["summary_markdown"]

DROPPED_SHOWN = 20


def summary_markdown(results: Results) -> str:
    """The whole of `summary.md`; no date and no path in it, so the same results give the same bytes."""
    found = comparisons(results)
    sections = [
        ("# Summary", [*_alarm(results), _text(wording.headline(results, found))]),
        ("## What was compared", _compared(results, found)),
        ("## Observed patterns", _observed(results, found)),
        ("## Tests", _tests(results, found)),
        ("## Shallow and deep layers", _trends(results, found)),
        ("## Between metrics", _relations(results, found)),
        ("## Negative controls", _controls(results)),
        ("## Data", _data(results)),
        ("## The t-test over layer means", _layer_means(results, found)),
        ("## Limits", _bullets(wording.limits(results, found))),
        ("## What the metrics do not measure", _bullets(wording.not_measured())),
        ("## How to read the numbers", _bullets(wording.how_to_read())),
    ]
    blocks = ["\n\n".join([title, *body]) for title, body in sections if body]
    return "\n\n".join(blocks) + "\n"


def _alarm(results: Results) -> list[str]:
    failed = sum(not control.get("held") for control in results.controls)
    if not failed:
        return []
    of = f"{failed} of {len(results.controls)} negative controls failed"
    return [f"**{of}: do not trust the other numbers before this is explained.**"]


def _compared(results: Results, found: Sequence[Comparison]) -> list[str]:
    model, dataset = results.attribute("model"), results.attribute("dataset")
    rows = []
    for condition in results.conditions:
        recipe = str((results.training or {}).get(condition, {}).get("recipe", "")) or "given checkpoint"
        runs = training_runs(results, condition)
        note = "; no seed changes its attention" if results.seed_invariant(condition) else ""
        rows.append([condition, recipe, f"{runs}{note}"])
    lines = [
        _text(
            f"Model: {model.get('name', 'not recorded')}. Data: {dataset.get('id', 'not recorded')}"
            + (f", split {dataset['split']}" if dataset.get("split") else "")
            + f", {wording.count(results.num_images, 'image')}. {wording.count(len(results.sites), 'layer')}, "
            f"{wording.count(int(results.table.sizes['head']), 'head')} a layer. "
            f"Forward pass in {results.table.attrs.get('precision', 'a precision that was not recorded')}."
        ),
        _table(["condition", "recipe", "training runs"], rows),
    ]
    accuracy = wording.accuracy_sentence(results)
    if accuracy:
        lines.append(_text(accuracy))
    lines += [_text(sentence) for sentence in wording.scope_sentences(results, found)]
    return lines


def _observed(results: Results, found: Sequence[Comparison]) -> list[str]:
    lines = []
    for comparison in found:
        lines.append(f"### {_text(comparison.condition)} against {_text(comparison.against)}")
        lines += _bullets(wording.change_sentence(results, comparison, change) for change in comparison.changes)
    return lines


def _tests(results: Results, found: Sequence[Comparison]) -> list[str]:
    lines: list[str] = []
    for comparison in found:
        lines.append(_text(wording.comparison_sentence(results, comparison)))
        rows = []
        for change in comparison.changes:
            for test in change.layers:
                rows.append(
                    [
                        wording.what(change.metric, change.region),
                        str(test.layer),
                        wording.quantity(test.difference, change.unit, difference=True),
                        wording.interval(test),
                        "" if test.dz is None else wording.number(test.dz),
                        wording.p_value(test.p_max_t),
                        wording.p_value(test.p_holm),
                        wording.p_value(test.p_bh),
                    ]
                )
        if rows:
            confidence = wording.percent(results.confidence)
            header = ["metric", "layer", "difference", f"{confidence} CI", "dz", "p max-T", "p Holm", "p BH"]
            lines.append(
                f"Layer by layer, {_text(comparison.condition)} − {_text(comparison.against)} "
                "(mean over heads, paired by image):"
            )
            lines.append(_table(header, rows))
        lines += _seed_level(results, comparison)
    return lines


def _seed_level(results: Results, comparison: Comparison) -> list[str]:
    tests = comparison.seed_tests
    if not tests:
        return []
    runs = max((test.n or 0 for test in tests), default=0)
    surviving = [test for test in tests if test.p_max_t is not None and test.p_max_t <= results.alpha]
    sentence = (
        f"Over {wording.count(runs, 'training run')}, {len(surviving)} of {len(tests)} seed-level tests of "
        f"{comparison.condition} against {comparison.against} survive at α = {results.alpha:g}."
    )
    if not comparison.speaks_of_runs:
        sentence += f" With {runs} runs the smallest p that can occur is {2.0 ** (1 - runs):.3g}."
    return [_text(sentence)]


def _trends(results: Results, found: Sequence[Comparison]) -> list[str]:
    lines = []
    for comparison in found:
        sentences = [wording.trend_sentence(results, change) for change in comparison.changes]
        if any(sentences):
            lines.append(
                f"{_text(comparison.condition)} − {_text(comparison.against)}, mean over the lower and the upper half "
                "of the layers (descriptive):"
            )
            lines += _bullets(sentence for sentence in sentences if sentence)
    return lines


def _relations(results: Results, found: Sequence[Comparison]) -> list[str]:
    lines = []
    for comparison in found:
        relations = metric_relations(results, comparison.condition, comparison.against)
        if relations:
            lines.append(
                f"Differences {_text(comparison.condition)} − {_text(comparison.against)}. Cells of one model are not "
                "independent, so no p-value is given:"
            )
            lines += _bullets(wording.relation_sentence(relation) for relation in relations)
    return lines


def _controls(results: Results) -> list[str]:
    if not results.controls:
        return ["No negative control was recorded, so nothing here vouches for the pipeline."]
    failed = [str(control.get("title", control.get("name"))) for control in results.controls if not control.get("held")]
    total = len(results.controls)
    verdict = f"{total} of {total} negative controls held."
    if failed:
        verdict = (
            f"{len(failed)} of {total} negative controls FAILED ({'; '.join(failed)}): do not trust the other numbers "
            "before this is explained."
        )
    rows = [
        [
            str(control.get("title") or control.get("name")),
            str(control.get("expectation", "")),
            wording.plain(control.get("value")),
            "yes" if control.get("held") else "NO",
            str(control.get("detail") or ""),
        ]
        for control in results.controls
    ]
    return [_text(verdict), _table(["control", "expected", "found", "held", "detail"], rows)]


def _data(results: Results) -> list[str]:
    data = results.data
    splits: Mapping[str, Any] = data.get("splits") or {}
    lines = []
    facts = [wording.count(results.num_images, "image") + " measured"]
    if data.get("classes") is not None:
        facts.append(f"{data['classes']} classes")
    if splits:
        facts.append("splits: " + ", ".join(f"{name} {wording.plain(size)}" for name, size in splits.items()))
    lines.append(_text("; ".join(facts) + "."))
    dropped: Sequence[Mapping[str, Any]] = data.get("dropped") or ()
    if dropped:
        lines.append(_text(f"{wording.count(len(dropped), 'file')} could not be used and left out of every condition:"))
        lines += _bullets(f"{entry.get('id')}: {entry.get('status')}" for entry in dropped[:DROPPED_SHOWN])
        if len(dropped) > DROPPED_SHOWN:
            lines.append(f"… and {len(dropped) - DROPPED_SHOWN} more, listed in metrics/attention_comparison.json.")
    else:
        lines.append("No file had to be left out.")
    undefined = [
        f"{metric} in {condition}: {wording.count(int(rows), 'row')} without a value, left out of the means"
        for metric, by_condition in results.undefined.items()
        for condition, rows in by_condition.items()
        if rows
    ]
    if undefined:
        lines += _bullets(undefined)
    leaks = wording.leaks_sentence(results)
    if leaks:
        lines.append(_text(leaks))
    if results.prefix_mass_warning:
        lines.append(_text(results.prefix_mass_warning))
    return lines


def _layer_means(results: Results, found: Sequence[Comparison]) -> list[str]:
    rows = [
        [
            f"{comparison.condition} − {comparison.against}",
            wording.what(test.metric, test.region),
            str(test.n if test.n is not None else ""),
            wording.quantity(test.difference, results.unit(test.metric), difference=True),
            wording.number(test.t),
            wording.p_value(test.p),
        ]
        for comparison in found
        for test in comparison.layer_means
    ]
    if not rows:
        return []
    return [
        "**Not valid inference.** Some publications test the layer means of two models with a paired t-test over "
        "layers. Layers of one network are not independent samples: with neighbouring layers correlated at .5 to .9, a "
        "test at 5 % rejects a true null in 25 to 68 % of cases, and opposite changes in low and high layers cancel. "
        "It is given for comparison with such work and for nothing else.",
        _table(["comparison", "metric", "layers", "mean difference", "t", "p (not valid)"], rows),
    ]


def _bullets(sentences: Iterable[str]) -> list[str]:
    lines = [f"- {_text(sentence)}" for sentence in sentences]
    return ["\n".join(lines)] if lines else []


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_text(cell) for cell in header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


_MARKDOWN = str.maketrans(
    {
        "\\": "\\\\",
        "|": "\\|",
        "<": "&lt;",
        ">": "&gt;",
        "&": "&amp;",
        "`": "\\`",
        "*": "\\*",
        "[": "\\[",
        "]": "\\]",
    }
)


def _text(text: str) -> str:
    """Plain text for Markdown: names of images and classes come from file systems and may hold anything."""
    return "".join(character if character.isprintable() else " " for character in text).translate(_MARKDOWN)
