"""Which layers changed, by how much, and is it shown: one row per metric, for the reader with a minute."""

from __future__ import annotations

from dataclasses import dataclass

from engine.report import text
from engine.report.findings import Change, Comparison
from engine.report.inputs import Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One metric of one comparison in words; `layer` is where its largest change is, None where there is none.

    `certain`: it changed in some layer; `negligible`: it differs, and lies within the bound in every layer.
    `runs` says in how many layers the change survives the sign flip over training runs; "" where there is one run.
    """

    metric: str
    region: str
    name: str
    layers: str = "–"
    change: str = "undefined"
    difference: str = "–"
    interval: str = ""
    verdict: str = "nothing to test"
    runs: str = ""
    certain: bool = False
    negligible: bool = False
    layer: int | None = None


def verdicts(results: Results, comparison: Comparison) -> list[Verdict]:
    """The rows of a comparison: metrics that changed first, each by its own largest change."""
    rows = [_verdict(results, comparison, change) for change in comparison.changes]
    return sorted(rows, key=lambda row: not row.certain)


def _verdict(results: Results, comparison: Comparison, change: Change) -> Verdict:
    name, region = results.heading(change.metric, change.region), change.region or ""
    test = change.shown
    if test is None or test.difference is None:
        return Verdict(metric=change.metric, region=region, name=name)
    changed = [test.layer for test in change.layers if test.layer is not None and test.changed(results.alpha)]
    shown = text.decimals(test.difference)
    after = text.quantity(test.mean_condition, change.unit, decimals=shown)
    return Verdict(
        metric=change.metric,
        region=region,
        name=name,
        layers=_layers(changed, len(change.layers)),
        change=f"layer {test.layer}: {text.number(test.mean_against, decimals=shown)} → {after}",
        difference=text.change(test.difference),
        interval=text.interval(test.ci),
        verdict=_certainty(results, change, test.p_max_t),
        runs=_over_runs(results, comparison, change),
        certain=bool(changed),
        negligible=not changed and change.within and bool(change.layers_negligible),
        layer=test.layer,
    )


def _layers(changed: list[int], count: int) -> str:
    if not changed:
        return f"none of {count}"
    return f"all {count}" if len(changed) == count > 1 else f"{text.span(sorted(changed))} ({len(changed)} of {count})"


def _over_runs(results: Results, comparison: Comparison, change: Change) -> str:
    tests = [t for t in comparison.seed_tests if t.metric == change.metric and t.region == change.region]
    if not tests:
        return ""
    if not comparison.speaks_of_runs:
        return f"{comparison.runs} are too few"
    return f"{text.share(sum(test.survives(results.alpha) for test in tests), len(tests))} layers"


def _certainty(results: Results, change: Change, p: float | None) -> str:
    if change.identical:
        return "exactly the same"
    if change.layers_changed:
        verdict = f"yes, p {text.p_value(p)}"
    elif change.layers_negligible:
        layers = [test.layer for test in change.layers if test.layer is not None and test.negligible(results.alpha)]
        where = "" if change.within else f" in {text.span(layers)}"
        verdict = f"real but negligible{where}, p {text.p_value(p)}"
    else:
        verdict = f"not shown, p {text.p_value(p)}"
    if not change.layers_changed and change.changed:
        verdict += f"; but {text.count(change.changed, 'single head')}"
    if change.equivalent and change.bound is not None:
        verdict += f"; within ±{text.number(change.bound)} in {text.share(change.equivalent, len(change.layers))}"
    return verdict
