"""summary.md: what was observed, how sure it is, and what it does not mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.report import cautions, text, wording
from engine.report.findings import Comparison, cell_relations, comparisons, training_runs
from engine.report.inputs import Results
from engine.report.relevance import load_relevance, relevance_sentences

DROPPED_SHOWN = 20


def summary_markdown(results: Results) -> str:
    """The whole of `summary.md`; no date and no path in it, so the same results give the same bytes."""
    found = comparisons(results)
    sections = [
        ("# Summary", [*_alarm(results), _text(wording.headline(results, found))]),
        ("## What was compared", _compared(results, found)),
        ("## Observed patterns", _observed(results, found)),
        ("## Tests", _tests(results, found)),
        ("## Along the layers", _along_layers(results, found)),
        ("## Between metrics", _relations(found)),
        ("## Classes", _sensitivity(results, found)),
        ("## Relevance maps", _relevance(results)),
        ("## Negative controls", _controls(results)),
        ("## Data", _data(results)),
        ("## The t-test over layer means", _layer_means(results, found)),
        ("## Limits", _bullets(cautions.limits(results, found))),
        ("## What the metrics do not measure", _bullets(cautions.not_measured())),
        ("## How to read the numbers", _bullets(cautions.how_to_read())),
    ]
    blocks = ["\n\n".join([title, *body]) for title, body in sections if body]
    return "\n\n".join(blocks) + "\n"


def _alarm(results: Results) -> list[str]:
    failed = sum(not control.get("held") for control in results.controls)
    alarms = [f"**{_text(sentence)}**" for sentence in cautions.failed_stages(results)]
    if failed:
        of = f"{failed} of {len(results.controls)} negative controls failed"
        alarms.append(f"**{of}: do not trust the other numbers before this is explained.**")
    return alarms


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
            + f", {text.count(results.num_images, 'image')}. {text.count(len(results.sites), 'layer')}, "
            f"{text.count(int(results.table.sizes['head']), 'head')} a layer. "
            f"Forward pass in {results.table.attrs.get('precision', 'a precision that was not recorded')}."
        ),
        _table(["condition", "recipe", "training runs"], rows),
    ]
    accuracy = wording.accuracy_sentence(results)
    if accuracy:
        lines.append(_text(accuracy))
    lines += [_text(sentence) for sentence in wording.classifier_sentences(results)]
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
        nested = next((test.nested_levels for change in comparison.changes for test in change.layers), "")
        rows = []
        for change in comparison.changes:
            for test in change.layers:
                rows.append(
                    [
                        text.what(change.metric, change.region),
                        str(test.layer),
                        text.quantity(test.difference, change.unit, difference=True),
                        text.interval(test.ci),
                        *([text.interval(test.ci_nested)] if nested else []),
                        "" if test.dz is None else text.number(test.dz),
                        text.p_value(test.p_max_t),
                        text.p_value(test.p_holm),
                        text.p_value(test.p_bh),
                        "" if test.mde is None else text.number(test.mde),
                    ]
                )
        if rows:
            confidence = text.percent(results.confidence)
            header = [
                "metric",
                "layer",
                "difference",
                f"{confidence} CI",
                *([f"{confidence} CI, nested"] if nested else []),
            ]
            header += ["dz", "p max-T", "p Holm", "p BH", "detectable"]
            lines.append(
                f"Layer by layer, {_text(comparison.condition)} − {_text(comparison.against)} "
                "(mean over heads, paired by image"
                + (f"; nested: {_text(nested)} resampled" if nested else "")
                + f"; detectable: what would have been found with a power of {text.percent(results.power)}):"
            )
            lines.append(_table(header, rows))
        over_runs = wording.seed_sentence(results, comparison)
        if over_runs:
            lines.append(_text(over_runs))
    return lines


def _along_layers(results: Results, found: Sequence[Comparison]) -> list[str]:
    lines = []
    for comparison in found:
        pair = f"{_text(comparison.condition)} − {_text(comparison.against)}"
        clusters = [sentence for change in comparison.changes if (sentence := wording.cluster_sentence(change))]
        if clusters:
            lines.append(
                f"{pair}, runs of neighbouring layers that change in one direction (cluster permutation over images, "
                "heads averaged; a p speaks of the whole run and not of any one layer in it):"
            )
            lines += _bullets(clusters)
        trends = [sentence for change in comparison.changes if (sentence := wording.trend_sentence(results, change))]
        if trends:
            lines.append(f"{pair}, lower against upper half of the layers (paired over images, max-T over metrics):")
            lines += _bullets(trends)
    return lines


def _sensitivity(results: Results, found: Sequence[Comparison]) -> list[str]:
    lines = []
    for comparison in found:
        sentences = [sentence for change in comparison.changes if (sentence := wording.class_sentence(results, change))]
        if sentences:
            lines.append(f"{_text(comparison.condition)} − {_text(comparison.against)}:")
            lines += _bullets(sentences)
    if lines:
        lines.insert(0, "Does a finding hang on a few large classes? Here every class counts alike and is one unit.")
    return lines


def _relations(found: Sequence[Comparison]) -> list[str]:
    lines = []
    for comparison in found:
        sentences = [wording.relation_sentence(*pair) for pair in cell_relations(comparison)]
        if any(sentences):
            lines.append(
                f"Differences {_text(comparison.condition)} − {_text(comparison.against)}. Cells of one model are not "
                "independent, so no p-value is given:"
            )
            lines += _bullets(filter(None, sentences))
    return lines


def _relevance(results: Results) -> list[str]:
    found = load_relevance(results)
    lines: list[str] = []
    for heading, sentences in (relevance_sentences(results, found) if found is not None else {}).items():
        lines += [f"### {heading}", *_bullets(sentences)]
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
            text.plain(control.get("value")),
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
    facts = [text.count(results.num_images, "image") + " measured"]
    if data.get("classes") is not None:
        facts.append(f"{data['classes']} classes")
    if splits:
        facts.append("splits: " + ", ".join(f"{name} {text.plain(size)}" for name, size in splits.items()))
    lines.append(_text("; ".join(facts) + "."))
    dropped: Sequence[Mapping[str, Any]] = data.get("dropped") or ()
    if dropped:
        lines.append(_text(f"{text.count(len(dropped), 'file')} could not be used and left out of every condition:"))
        lines += _bullets(f"{entry.get('id')}: {entry.get('status')}" for entry in dropped[:DROPPED_SHOWN])
        if len(dropped) > DROPPED_SHOWN:
            lines.append(f"… and {len(dropped) - DROPPED_SHOWN} more, listed in metrics/attention_comparison.json.")
    else:
        lines.append("No file had to be left out.")
    undefined = [
        f"{metric} in {condition}: {text.count(int(rows), 'row')} without a value, left out of the means"
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
            text.what(test.metric, test.region),
            str(test.n if test.n is not None else ""),
            text.quantity(test.difference, results.unit(test.metric), difference=True),
            text.number(test.t),
            text.p_value(test.p),
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
        "`": "\\`",
        "*": "\\*",
        "[": "\\[",
        "]": "\\]",
    }
)


def _text(text: str) -> str:
    """Plain text for Markdown: names of images and classes come from file systems and may hold anything."""
    plain = "".join(character if character.isprintable() else " " for character in text).translate(_MARKDOWN)
    # A tag or an entity begins with a letter, "/", "!", "?" or "#" right behind; "p < 0.0001" is read as it is.
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=[A-Za-z#])", "&amp;", plain))
    return re.sub(r"^(\s*)>", r"\1\>", plain)  # at the beginning it would make a quotation
