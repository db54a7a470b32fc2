"""What was found, at a glance (which layers changed, by how much, and is it shown), and what was compared."""

from __future__ import annotations

from collections.abc import Iterator

from engine.report import run_words, text, wording
from engine.report.document import Bars, Block, Content, Group, Heading, ReportedStudy, Span, Table, Text, section
from engine.report.findings import Change, PairFindings, training_runs
from engine.report.inputs import Results, matches
from engine.report.sections.curves import curve
from engine.statistics import PairedTest, Verdict


@section("Summary", summary=0)
def summary(study: ReportedStudy) -> Iterator[Block]:
    """What the reader must know before all else, and the study in a sentence."""
    results = study.results
    for stage, reason in results.failed.items():
        alarm = (
            f"Stage {stage} failed, and nothing of it is in this report: {reason.removesuffix('.')}. The command that "
            "made this folder tries it again."
        )
        yield Text(Span(alarm, "strong"), "alarm")
    if failed := _failed_controls(results):
        alarm = f"{failed} of {len(results.document.controls)} negative controls failed: {wording.DISTRUST}"
        yield Text(Span(alarm, "strong"), "alarm")
    first, *others = wording.headline(results, study.comparisons)
    yield Text(first, "headline")
    yield from map(Text, filter(None, (run_words.runs_sentence(results, pair) for pair in study.comparisons)))
    yield from map(Text, others)


@section("What was compared", summary=10)
def compared(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    model, dataset = results.attribute("model"), results.attribute("dataset")
    split = f", split {dataset['split']}" if dataset.get("split") else ""
    yield Text(
        f"Model: {model.get('name', 'not recorded')}. Data: {dataset.get('id', 'not recorded')}{split}, "
        f"{text.count(results.num_images, 'image')}. {text.count(len(results.document.layers), 'layer')}, "
        f"{text.count(len(results.heads), 'head')} per layer. "
        f"Forward pass in {results.table.attrs.get('precision', 'a precision that was not recorded')}."
    )
    rows: list[list[Content]] = []
    for condition in results.conditions:
        recipe = str((results.training or {}).get(condition, {}).get("recipe", "")) or "given checkpoint"
        note = "; no seed changes its attention" if results.seed_invariant(condition) else ""
        rows.append([condition, recipe, f"{training_runs(results, condition)}{note}"])
    yield Table(["condition", "recipe", "training runs"], rows)
    yield from map(Text, wording.accuracy_sentences(results))
    yield from map(Text, wording.classifier_sentences(results))
    if study.comparisons:
        yield Text(wording.primary_sentence(results))
    yield from map(Text, run_words.scope_sentences(results, study.comparisons))


@section("Overview", page=0, anchor="overview")
def overview(study: ReportedStudy) -> Iterator[Block]:
    results = study.results
    yield from summary(study)
    yield Group("cards", list(_cards(study)))
    yield from (Text(sentence, "scope") for sentence in wording.classifier_sentences(results))
    if study.comparisons:
        yield Text(wording.primary_sentence(results), "scope")
    for comparison in study.comparisons:
        if comparison.changes:
            if comparison.changed or comparison.layers_changed:
                outcome = "what changed"
            elif comparison.negligible or comparison.layers_negligible:
                outcome = "no change beyond the bounds is shown"
            else:
                outcome = "no change is shown"
            yield Heading((study.swatch(comparison.condition), f" against {comparison.against}: {outcome}"))
            yield verdicts(study, comparison)
    yield from (Text(sentence, "scope") for sentence in run_words.scope_sentences(results, study.comparisons))
    for metric in results.metrics:
        if results.has_regions(metric):
            yield Heading(results.title(metric))
            areas = [f"{text.number(a)} on {r}" for r in results.regions if (a := results.region_area(r)) is not None]
            if areas:
                yield Text(f"Attention that is spread evenly has a region's share of the area: {text.listing(areas)}.")
            yield study.legend()
            yield Group("charts", [curve(study, metric, region) for region in results.regions])


def _failed_controls(results: Results) -> int:
    return sum(not control.held for control in results.document.controls)


def _cards(study: ReportedStudy) -> Iterator[Group]:
    results = study.results
    for pair in study.comparisons:
        changed, layers = pair.layers(primary=True)
        cells = f"{pair.changed} of {pair.cells} {pair.cells_named}"
        if pair.gated:
            cells += f", {pair.gated} of them heads whose layer survives in the primary family"
        if pair.negligible:
            cells += f"; {pair.negligible} more differ within the bounds set beforehand: real but negligible"
        corrected = f"after the family-wise correction (α = {results.alpha:g}, n = {text.count(pair.n, 'image')})"
        beyond = " beyond the bounds set beforehand" if pair.layers_negligible else ""
        differ = [_big(changed, layers), Text(f"layer means of the primary family differ{beyond} {corrected}.")]
        differ.append(Text(f"Exploratory: {cells}."))
        if not layers:
            differ = [_big(pair.changed, pair.cells), Text(f"{pair.cells_named} differ {corrected}.")]
        yield Group("card", differ, (study.swatch(pair.condition), f" against {pair.against}"))
    if accuracy := wording.accuracies(results):
        blocks: list[Block] = [Bars([(study.swatch(name), test, chance) for name, test, chance, _ in accuracy])]
        marks = " % and ".join(dict.fromkeys(str(round(chance, 1)) for _, _, chance, _ in accuracy))
        means = " Means over training runs." if any(runs > 1 for *_, runs in accuracy) else ""
        blocks.append(Text(f"The stroke marks chance, {marks} %.{means}"))
        if results.training is None:
            blocks.append(Text(wording.HELD_OUT_UNKNOWN))
        yield Group("card", blocks, wording.accuracy_title(results))
    dropped = len(results.document.data.get("dropped") or ())
    files = text.count(dropped, "file") if dropped else "No file"
    left_out = (f"{files} had to be ", Span("left out", "link", "#data"), ".")
    blocks = [Text(("No negative control was recorded. ", *left_out))]
    if total := len(results.document.controls):
        held = Span("negative controls", "link", "#controls")
        blocks = [_big(total - _failed_controls(results), total), Text((held, " held. ", *left_out))]
    yield Group("card", blocks, "Can it be trusted?")


def _big(part: int, whole: int) -> Text:
    return Text((str(part), Span(f" of {whole}", "small")), "big")


def verdicts(study: ReportedStudy, comparison: PairFindings) -> Table:
    """A row per metric: which layers changed, by how much, and whether that is shown; what changed comes first."""
    results = study.results
    images = text.count(comparison.n, "image")
    caption = f"Mean over heads, paired by image, n = {images}. Shown: survives max-T in its family"
    if any(test.tost_bound is not None for test in results.document.tests):
        caption += ", and is not shown to lie within the bound set beforehand"
    caption += "; that speaks of these checkpoints."
    header = ["metric", "layers that changed", "largest change"]
    header += [f"difference ({text.percent(results.confidence)} simultaneous CI)", "shown?"]
    if comparison.crossed:
        caption += " Over runs and images: the layers whose difference holds for training runs and images like these."
        header.append(f"over {comparison.runs} runs and images")
    ranked = sorted(comparison.changes, key=lambda change: (not change.primary, not change.layers_changed))
    rows = [_verdict(study, comparison, change) for change in ranked]
    columns: list[Content] = [*header, Span("look", "hidden")]
    return Table(columns, [cells for _, cells in rows], caption, "verdicts", [look for look, _ in rows])


def _verdict(study: ReportedStudy, comparison: PairFindings, change: Change) -> tuple[str, list[Content]]:
    """A row's look and its cells; its change is the metric's largest."""
    results, test = study.results, change.shown
    heading = results.heading(change.metric, change.region)
    name: Content = heading
    if results.primary and not change.primary:
        name = (heading, " ", Span("exploratory", "small"))
    runs = [_over_runs(results, comparison, change)] if comparison.crossed else []
    if test is None or test.difference is None:
        return "", [name, "–", "undefined", "–", "nothing to test", *("" for _ in runs), ()]
    changed = _layers_of(results, change, "different")
    shown = text.decimals(test.difference)
    after = text.quantity(test.mean_condition, change.unit, decimals=shown)
    difference: Content = text.change(test.difference)
    if interval := text.interval(test.ci_simultaneous):
        difference = (text.change(test.difference), " ", Span(interval, "small"))
    goal = {"metric": change.metric, "region": change.region or "", "layer": str(test.layer)}
    buttons: tuple[str | Span, ...] = (Span("Map", "button", f"Show the map of {heading}", {"show": "map"} | goal),)
    if study.viewer:
        label = f"Show attention in layer {test.layer}"
        buttons += (" ", Span("Attention", "button", label, {"show": "attention"} | goal))
    means = f"layer {test.layer}: {text.number(test.mean_against, decimals=shown)} → {after}"
    alternative = wording.alternative(results, test, change.largest)
    largest: Content = (means, " ", Span(alternative, "small")) if alternative else means
    cells: list[Content] = [
        name,
        _layers(changed, len(change.layers)),
        largest,
        difference,
        _certainty(results, change, test),
        *runs,
        buttons,
    ]
    return "sure" if changed else "negligible" if change.within and change.layers_negligible else "", cells


def _layers_of(results: Results, change: Change, verdict: Verdict) -> list[int]:
    layers = [test.layer for test in change.layers if test.verdict(results.alpha) == verdict]
    return [layer for layer in layers if layer is not None]


def _layers(changed: list[int], count: int) -> str:
    some = 0 < len(changed) < count or len(changed) == 1
    return f"{text.span(changed)} ({len(changed)} of {count})" if some else text.share(len(changed), count)


def _over_runs(results: Results, comparison: PairFindings, change: Change) -> str:
    """In how many layers a metric's difference survives over runs and images."""
    where = {"level": "layer", "metric": change.metric, "region": change.region}
    tests = [test for test in comparison.crossed if matches(test, where) and test.p is not None]
    return f"{text.share(sum(test.survives(results.alpha) for test in tests), len(tests))} layers" if tests else ""


def _certainty(results: Results, change: Change, shown: PairedTest) -> str:
    p = text.p_value(shown.p_max_t)
    if change.identical:
        return "exactly the same"
    if change.layers_changed:
        verdict = f"yes, p {p}"
    elif change.layers_negligible:
        where = "" if change.within else f" in {text.span(_layers_of(results, change, 'negligible'))}"
        verdict = f"real but negligible{where}, p {p}"
    else:
        verdict = f"not shown, p {p}"
    if not change.layers_changed and change.changed:
        verdict += f"; but {text.count(change.changed, 'single head')}"
    if change.equivalent and change.bound is not None:
        verdict += f"; within ±{text.number(change.bound)} in {text.share(change.equivalent, len(change.layers))}"
    return verdict
