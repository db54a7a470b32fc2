"""What was found, at a glance (which layers changed, by how much, and is it shown), and what was compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.report import text, wording
from engine.report.document import Bars, Block, Content, Group, Heading, Span, Study, Table, Text, section
from engine.report.findings import Change, Comparison, training_runs
from engine.report.inputs import Results
from engine.report.sections.curves import curve


@section("Summary", summary=0)
def summary(study: Study) -> list[Block]:
    """What the reader must know before all else, and the study in a sentence."""
    results = study.results
    alarms = [
        f"Stage {stage} failed, and nothing of it is in this report: {reason.removesuffix('.')}. The command that made "
        "this folder tries it again."
        for stage, reason in results.failed.items()
    ]
    if failed := _failed_controls(results):
        alarms.append(f"{failed} of {len(results.document.controls)} negative controls failed: {wording.DISTRUST}")
    headline = Text(wording.headline(results, study.comparisons), "headline")
    return [*(Text(Span(alarm, "strong"), "alarm") for alarm in alarms), headline]


@section("What was compared", summary=10)
def compared(study: Study) -> list[Block]:
    results = study.results
    model, dataset = results.attribute("model"), results.attribute("dataset")
    split = f", split {dataset['split']}" if dataset.get("split") else ""
    facts = (
        f"Model: {model.get('name', 'not recorded')}. Data: {dataset.get('id', 'not recorded')}{split}, "
        f"{text.count(results.num_images, 'image')}. {text.count(len(results.document.layers), 'layer')}, "
        f"{text.count(len(results.heads), 'head')} a layer. "
        f"Forward pass in {results.table.attrs.get('precision', 'a precision that was not recorded')}."
    )
    rows = []
    for condition in results.conditions:
        recipe = str((results.training or {}).get(condition, {}).get("recipe", "")) or "given checkpoint"
        note = "; no seed changes its attention" if results.seed_invariant(condition) else ""
        rows.append([condition, recipe, f"{training_runs(results, condition)}{note}"])
    accuracy = wording.accuracy_sentence(results)
    said = [accuracy] if accuracy else []
    said += [*wording.classifier_sentences(results), *wording.scope_sentences(results, study.comparisons)]
    return [Text(facts), Table(["condition", "recipe", "training runs"], rows), *map(Text, said)]


@section("Overview", page=0, anchor="overview")
def overview(study: Study) -> list[Block]:
    results = study.results
    blocks = [*summary(study), Group("cards", list(_cards(study)))]
    blocks += [Text(sentence, "scope") for sentence in wording.classifier_sentences(results)]
    for comparison in study.comparisons:
        if comparison.changes:
            blocks += _verdict_table(study, comparison)
    blocks += [Text(sentence, "scope") for sentence in wording.scope_sentences(results, study.comparisons)]
    regional = [metric for metric in results.metrics if results.regions_of(metric) != (None,)]
    for metric in regional:
        figures = [curve(study, metric, region) for region in results.regions]
        blocks += [Heading(results.title(metric)), study.legend(), Group("charts", figures)]
    return blocks


def _failed_controls(results: Results) -> int:
    return sum(not control.get("held") for control in results.document.controls)


def _cards(study: Study) -> Iterator[Group]:
    results = study.results
    for pair in study.comparisons:
        said = (
            "layer × head × metric cells differ after the family-wise correction (max-T, α = "
            f"{results.alpha:g}, n = {text.count(pair.n, 'image')})"
        )
        if pair.negligible:
            said += f"; {pair.negligible} more differ within the bounds set beforehand: real but negligible"
        yield Group(
            "card",
            [_big(pair.changed, pair.cells), Text(said)],
            (study.swatch(pair.condition), f" against {pair.against}"),
        )
    if accuracy := wording.accuracies(results):
        blocks: list[Block] = [Bars([(study.swatch(name), test, chance) for name, test, chance, _ in accuracy])]
        levels = dict.fromkeys(str(round(chance, 1)) for _, _, chance, _ in accuracy if chance is not None)
        if levels:
            marks = " % and ".join(levels)
            means = " Means over training runs." if accuracy[0][3] > 1 or accuracy[-1][3] > 1 else ""
            blocks.append(Text(f"The stroke marks chance, {marks} %.{means}"))
        if results.training is None:
            blocks.append(Text(wording.HELD_OUT_UNKNOWN))
        yield Group("card", blocks, wording.accuracy_title(results))
    dropped = len(results.document.data.get("dropped") or ())
    left_out = (
        f"{text.count(dropped, 'file') if dropped else 'No file'} had to be ",
        Span("left out", "link", "#data"),
        ".",
    )
    blocks = [Text(("No negative control was recorded. ", *left_out))]
    if total := len(results.document.controls):
        held = Span("negative controls", "link", "#controls")
        blocks = [_big(total - _failed_controls(results), total), Text((held, " held. ", *left_out))]
    yield Group("card", blocks, "Can it be trusted?")


def _big(part: int, whole: int) -> Text:
    return Text((str(part), Span(f" of {whole}", "small")), "big")


def _verdict_table(study: Study, comparison: Comparison) -> list[Block]:
    """A row per metric: which layers changed, by how much, and whether that is shown."""
    results = study.results
    bounded = any(test.tost_bound is not None for test in results.document.tests)
    if comparison.changed or comparison.layers_changed:
        outcome = "what changed"
    elif comparison.negligible or comparison.layers_negligible:
        outcome = "no change beyond the bounds is shown"
    else:
        outcome = "no change is shown"
    caption = (
        f"Mean over heads, paired by image, n = {text.count(comparison.n, 'image')}. Shown: survives max-T over all "
        "layers and metrics"
    )
    caption += ", and is not shown to lie within the bound set beforehand" if bounded else ""
    caption += "; that speaks of these checkpoints."
    if comparison.seed_tests:
        caption += " Over runs: the layers that survive sign flips of whole training runs; that speaks of the training."
    over_runs = [f"over {comparison.runs} runs"] if comparison.seed_tests else []
    header = ["metric", "layers that changed", "largest change", f"difference ({text.percent(results.confidence)} CI)"]
    rows, looks = [], []
    for row in verdicts(results, comparison):
        difference = (row.difference, " ", Span(row.interval, "small")) if row.interval else row.difference
        runs = [row.runs] if comparison.seed_tests else []
        buttons: tuple[str | Span, ...] = ()
        if row.layer is not None:
            goal = {"metric": row.metric, "region": row.region, "layer": str(row.layer)}
            buttons = (Span("Map", "button", f"Show the map of {row.name}", {"show": "map"} | goal),)
            if study.viewer:
                name = f"Show attention in layer {row.layer}"
                buttons += (" ", Span("Attention", "button", name, {"show": "attention"} | goal))
        rows.append([row.name, row.layers, row.change, difference, row.verdict, *runs, buttons])
        looks.append("sure" if row.certain else "negligible" if row.negligible else "")
    title = (study.swatch(comparison.condition), f" against {comparison.against}: {outcome}")
    columns: list[Content] = [*header, "shown?", *over_runs, Span("look", "hidden")]
    return [Heading(title), Table(columns, rows, caption, "verdicts", looks)]


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
