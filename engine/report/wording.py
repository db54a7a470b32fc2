"""Sentences made of the numbers. Plain text: whoever prints it escapes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from engine.report import text
from engine.report.findings import (
    Change,
    PairFindings,
    clearest_change,
    largest_layers,
    layer_curve,
    regional_change,
)
from engine.report.inputs import Results
from engine.statistics import PairedTest

DISTRUST = "do not trust the other numbers before this is explained."
HELD_OUT_UNKNOWN = "Whether given checkpoints were trained on some of these images is not known."
_SMALL = 0.01  # standard deviations between images: a copy with 1e-6 of noise in its weights stays below


def headline(results: Results, comparisons: Sequence[PairFindings]) -> tuple[str, ...]:
    """The study in a few sentences, from what survives the family-wise test, or the lack of it; the surest first."""
    if not comparisons:
        return ("One condition was measured, so nothing is compared.",)
    if all(comparison.identical for comparison in comparisons):
        names = text.listing([comparison.condition for comparison in comparisons])
        return (
            f"Every measured value of {names} equals that of {comparisons[0].against} exactly: on these images, "
            "nothing that was measured changed.",
        )
    first = clearest_change(comparisons, primary=True)
    other = regional_change(comparisons) or (None if first else clearest_change(comparisons, primary=False))
    sentences = [] if results.primary else [primary_sentence(results)]
    if first:
        sentences.append(_claim(results, comparisons, first))
    elif results.primary or not other:
        sentences.append(_null_headline(results, comparisons))
    if other and not (first and first.region is not None):
        claim = _claim(results, comparisons, other)
        exploratory = bool(results.primary) and not other.primary
        sentences.append(f"Exploratory: {claim[:1].lower()}{claim[1:]}" if exploratory else claim)
    return tuple(sentences)


def primary_sentence(results: Results) -> str:
    """Which tests were named beforehand, and what that makes of the others."""
    if not results.primary:
        named = text.listing(results.document.settings.primary) or "none is named"
        return f"No metric of the primary family was measured ({named}), so everything said here is exploratory."
    record, named = results.document.primary, ""
    if record is not None:
        named = " The primary family was named before anything was captured (metrics/primary.json)."
        if not record.before:
            named = (
                " But it was named after the first capture, when the data could have been seen (metrics/primary.json)."
            )
    return (
        f"Primary family: the layer means of {text.listing(results.primary)}, of all comparisons together. All else is "
        f"exploratory: not named beforehand, and each family of tests holds the level by itself.{named}"
    )


def _claim(results: Results, comparisons: Sequence[PairFindings], change: Change) -> str:
    """The change that a headline names."""
    if change.region is not None:
        return _region_headline(results, comparisons)
    test, unit = change.shown, change.unit
    assert test is not None, "a change has a layer that changed"
    before, after = _means(test, unit)
    size = small = ""
    if test.d_av is not None:
        size = f"; {text.number(abs(test.d_av), 2)} standard deviations between images, the largest estimate of the "
        size += "family" if change.primary else "metrics"
        if abs(test.d_av) < _SMALL:
            small = (
                " That is less than a hundredth of what images differ by; rounding alone, as on another device, can "
                "make a difference of such a size."
            )
    return (
        f"{'Primary family: ' if change.primary else ''}{change.name} differs most in "
        f"{_most(results, test, change.largest, explained=True)}: from {before} in {test.against} to {after} in "
        f"{test.condition} ({_effect(results, test, unit)}{size}).{small}"
    )


def _most(results: Results, shown: PairedTest, largest: Sequence[int], explained: bool = False) -> str:
    """The layer of the largest difference, and those that may be it instead."""
    others = alternative(results, shown, largest)
    why = " (their intervals do not tell them apart)" if others and explained else ""
    return f"{text.where(shown)}{f', {others}' if others else ''}{why}"


def alternative(results: Results, shown: PairedTest, largest: Sequence[int]) -> str:
    """ "or one of layers 1–3": those that may have the largest difference instead of the one shown; or ""."""
    others = [layer for layer in largest if layer != shown.layer]
    if len(others) == len(results.layers) - 1 > 1:
        return "or any other layer"
    return f"or {'one of ' if len(others) > 1 else ''}{text.span(others)}" if others else ""


def _means(test: PairedTest, unit: str) -> list[str]:
    """Both means, with the decimals that their difference takes."""
    shown = text.decimals(test.difference)
    return [text.quantity(mean, unit, decimals=shown) for mean in (test.mean_against, test.mean_condition)]


def _region_headline(results: Results, comparisons: Sequence[PairFindings]) -> str:
    """Where attention on annotated regions differs most, in every condition; "" if no such change survives."""
    change = regional_change(comparisons)
    best = None if change is None else change.shown
    if best is None or best.layer is None:
        return ""
    regional = (test for pair in comparisons for c in pair.changes if c.metric == best.metric for test in c.layers)
    most = _most(results, best, largest_layers(regional), explained=True)
    row, shown, title = results.layers.index(best.layer), text.decimals(best.difference), results.title(best.metric)
    parts = []
    for region in results.regions:
        area, each = results.region_area(region), []
        for name in results.conditions:
            mean = float(layer_curve(results, best.metric, name, region).mean[row])
            lift = text.times_area(area, mean)
            each.append(f"{text.number(mean, 2, shown)} in {name}" + (f" ({lift})" if lift else ""))
        parts.append(f"on {region}{text.of_area(area)}, {text.listing(each)}")
    return (
        f"Attention on the annotated regions differs most in {most}. {title[:1].upper()}{title[1:]}: "
        f"{'; '.join(parts)} (on {best.region}, {best.condition} against {best.against}: "
        f"{_effect(results, best, results.unit(best.metric))})."
    )


def _null_headline(results: Results, comparisons: Sequence[PairFindings]) -> str:
    """That no layer mean differs, of the primary family where one was measured, and what single heads do."""
    primary = bool(results.primary)
    sentences = []
    nothing: dict[str, list[str]] = {}  # pairs of which the same can be said share their sentence
    for comparison in comparisons:
        pair = f"{comparison.condition} and {comparison.against}"
        cells = f"{comparison.changed} of {comparison.cells} {comparison.cells_named}"
        family = [change for change in comparison.changes if change.primary is primary]
        if within := sum(change.layers_negligible for change in family):
            bounds = [
                f"{change.name} ±{text.quantity(change.bound, change.unit)}"
                for change in family
                if change.bound is not None and change.layers_negligible
            ]
            sentences.append(
                f"What differs between {pair} in the {'primary family' if primary else 'layer means'} is real but "
                f"negligible: {text.count(within, 'layer mean')} survive{'s' if within == 1 else ''} the family-wise "
                f"correction, and each is shown to lie within its bound ({', '.join(bounds)})."
            )
        else:
            layers = sum(len(change.layers) for change in family)
            where = "in the primary family" if primary else "the family-wise test"
            said = (
                f"survives {where} (0 of {layers} layer means at α = {results.alpha:g})"
                f"{_power_clause(results, comparison, primary)}."
            )
            nothing.setdefault(said, []).append(pair)
        if comparison.changed and not comparison.layers_changed:
            called = "Exploratory: " if primary else ""
            beyond = " beyond its bound" if comparison.layers_negligible else ""
            sentences.append(f"{called}{cells} differ between {pair}, but no layer mean does{beyond}.")
    return " ".join(
        [*(f"No difference between {', or '.join(pairs)} {said}" for said, pairs in nothing.items()), *sentences]
    )


def _power_clause(results: Results, comparison: PairFindings, primary: bool) -> str:
    """How large an effect on a layer would have been found, so that finding none has a meaning."""
    if 0 < comparison.n < comparison.runs_needed:
        images = text.count(comparison.n, "image")
        return f"; nothing can, over {images}: exact sign flips need {comparison.runs_needed}"
    layers = [test for change in comparison.changes if change.primary is primary for test in change.layers]
    effects = [test.mde_dz for test in layers if test.mde_dz is not None]
    if not effects:
        return ""
    return (
        f"; a layer's effect of dz {text.number(max(effects), 2)} or more would have been found with a power of "
        f"{text.percent(results.power)}"
    )


def _effect(results: Results, test: PairedTest, unit: str) -> str:
    """The effect first, chosen among layers: difference with simultaneous interval, dz, then the adjusted p-value."""
    parts = [f"difference {text.change(test.difference, unit)}"]
    if interval := text.interval(test.ci_simultaneous):
        parts.append(f"{text.percent(results.confidence)} simultaneous CI {interval}")
    if test.dz is not None:
        parts.append(f"dz {text.number(test.dz)}")
    if test.p_max_t is not None:
        parts.append(f"max-T p {text.p_value(test.p_max_t)}")
    return ", ".join(parts)


def comparison_sentence(results: Results, comparison: PairFindings) -> str:
    """How many cells survive for one pair, or that none does."""
    if comparison.identical:
        return (
            f"{comparison.condition} and {comparison.against} do not differ at all: every difference is exactly 0 in "
            f"{text.count(comparison.n, 'image')}."
        )
    if not comparison.cells:
        return f"No layer × head test of {comparison.pair} is defined."
    cells = f"{comparison.changed} of {comparison.cells} {comparison.cells_named}"
    if comparison.gated:
        cells += f", {comparison.gated} of them heads whose layer survives in the primary family"
    primary, others = ("{} of {}".format(*comparison.layers(family)) for family in (True, False))
    has_primary, has_others = (comparison.layers(family)[1] > 0 for family in (True, False))
    exploratory = ([f"{others} {'other ' if has_primary else ''}layer means"] if has_others else []) + [cells]
    verdict = f"{text.listing(exploratory)} differ"
    if has_primary:
        verdict = f"{primary} layer means of the primary family differ; exploratory: {text.listing(exploratory)}"
    images = text.count(comparison.n, "image")
    said = [f"{comparison.pair}: {verdict} (family-wise level α = {results.alpha:g}, n = {images})."]
    if within := _negligible(comparison):
        said.append(f"Different, but within the bound (real but negligible): {within}.")
    for reason, counts in comparison.untested.items():
        nouns = zip(counts, ("cell", "layer mean"), strict=True)
        listed = text.listing([text.count(n, noun) for n, noun in nouns if n])
        said.append(f"{listed} {'was' if sum(counts) == 1 else 'were'} not tested: {reason}.")
    return " ".join(said)


def change_sentence(results: Results, comparison: PairFindings, change: Change) -> str:
    """One metric in one comparison: size first, then how much of it survives."""
    name = change.name
    if change.identical:
        return f"{name}: no difference at all (exactly 0 in every layer and head)."
    if change.shown is None:
        return f"{name}: undefined in both conditions or in too few images to compare."
    test = change.shown
    area = None if change.region is None else results.region_area(change.region)
    if test.survives(results.alpha):
        size = f"{name}{text.of_area(area)} differs most in {_most(results, test, change.largest)}: "
    else:
        size = f"{name}{text.of_area(area)}: the largest estimate is in {text.where(test)}: "
    if test.mean_against is not None and test.mean_condition is not None:
        lift = text.times_area(area, test.mean_against, test.mean_condition)
        size += f"from {' to '.join(_means(test, change.unit))}{f' ({lift})' if lift else ''}; "
    size += _effect(results, test, change.unit)
    tail = _equivalence(change)
    if within := _negligible(change):
        tail = f" Real but negligible: {within}.{tail}"
    parts = []
    if change.layers:
        parts.append(f"{change.layers_changed} of {len(change.layers)} layers")
    if change.heads:
        directions = [f"{n} {way}" for n, way in ((change.risen, "higher"), (change.fallen, "lower")) if n]
        detail = f" ({text.listing(directions)})" if directions else ""
        parts.append(f"{change.changed} of {change.defined} layer × head cells{detail}")
    counts = "; exploratory: ".join(parts) if change.primary else text.listing(parts)
    if change.changed or change.layers_changed:
        beyond = "" if change.bound is None else " and not shown to lie within the bound"
        return f"{size}. Surviving max-T{beyond}: {counts}.{tail}"
    if within:
        return f"{size}.{tail}"
    detectable = ""
    if change.detectable is not None:
        least, power = text.quantity(change.detectable, change.unit), text.percent(results.power)
        detectable = f"; a change of {least} in a layer would have been found with a power of {power}"
    return f"{size}. Nothing survives max-T ({text.listing(parts)}), so no change is claimed{detectable}.{tail}"


def _negligible(counted: PairFindings | Change) -> str:
    """How much survives and is shown to lie within the bounds; "" where nothing does."""
    counts = ((counted.negligible, "layer × head cell"), (counted.layers_negligible, "layer mean"))
    return text.listing([text.count(n, noun) for n, noun in counts if n])


def _equivalence(change: Change) -> str:
    """Where the difference is shown to be smaller than the bound, with a space before it; "" without a bound."""
    if change.bound is None or change.equivalent is None:
        return ""
    layers, bound = len(change.layers), text.quantity(change.bound, change.unit)
    if change.equivalent == 0:
        return f" No layer is shown to lie within ±{bound}."
    return f" Shown to lie within ±{bound}: {text.share(change.equivalent, layers)} layers."


def trend_sentence(results: Results, change: Change) -> str:
    """Deep half of the layers against the shallow half; "" where there are no halves."""
    trend = change.trend
    if trend is None or trend.difference is None or change.identical:
        return ""
    shallow, deep, between = (text.change(v, change.unit) for v in (trend.shallow, trend.deep, trend.difference))
    halves = f"{change.name}: {text.span(trend.shallow_layers)} {shallow}, {text.span(trend.deep_layers)} {deep}"
    size = f"deep − shallow {between}"
    if text.interval(trend.ci):
        size += f", {text.percent(results.confidence)} CI {text.interval(trend.ci)}"
    size += f", max-T p {text.p_value(trend.p_max_t)}"
    if not trend.survives(results.alpha):
        return f"{halves}; {size}: no evidence that the change differs with depth."
    opposite = (trend.shallow or 0.0) * (trend.deep or 0.0) < 0
    tail = "; the estimates of the halves have opposite signs, so they cancel in a mean over layers" if opposite else ""
    return f"{halves}; {size}{tail}."


def cluster_sentence(change: Change) -> str:
    """Where along the layers a metric changes, cluster by cluster; "" where nothing survives."""
    if not change.clusters:
        return ""
    parts = [f"{c.direction} in {text.span(c.layers)} (cluster p {text.p_value(c.p)})" for c in change.clusters]
    return f"{change.name}: {text.listing(parts)}."


def class_sentence(results: Results, change: Change) -> str:
    """Whether the layers that survive over images also do when every class counts alike; "" without classes."""
    over_classes = {test.layer: test for test in change.classes if test.difference is not None}
    surviving = [test for test in change.layers if test.survives(results.alpha) and test.layer in over_classes]
    if not surviving:
        return ""
    same = [test for test in surviving if (test.difference or 0.0) * (over_classes[test.layer].difference or 0.0) > 0]
    also = [test for test in surviving if over_classes[test.layer].survives(results.alpha)]
    classes = max(over_classes[test.layer].n or 0 for test in surviving)
    layers = f"{text.count(len(surviving), 'layer')} that differ{_s(surviving)} over images"
    sentence = (
        f"{change.name}: of {layers}, {len(same)} keep{_s(same)} the sign when each of {classes} classes counts alike"
    )
    floor = over_classes[surviving[0].layer].p_floor
    if floor is not None and floor > results.alpha:
        return f"{sentence}; {classes} classes are too few for a test (its least p is {text.p_value(floor)})."
    return f"{sentence}, and {len(also)} survive{_s(also)} max-T over classes."


def _s(subjects: Sequence[PairedTest]) -> str:
    """The end of a verb."""
    return "s" if len(subjects) == 1 else ""


def accuracy_title(results: Results) -> str:
    """What the accuracy is of: only of models trained here is it known that the images measured were held out."""
    return "Test accuracy" if results.training is not None else "Accuracy on these images"


def accuracies(results: Results) -> list[tuple[str, float, float, int]]:
    """(condition, accuracy and chance in percent, training runs) of what was classified; means over runs."""
    rows = []
    for condition in results.conditions:
        if runs := list(results.document.accuracy.get(condition, {}).values()):
            rows.append((condition, 100 * sum(run.test for run in runs) / len(runs), 100 * runs[0].chance, len(runs)))
    return rows


def accuracy_sentences(results: Results) -> Iterator[str]:
    """Accuracy on the images measured, mean over runs; none where nothing was classified."""
    rows = accuracies(results)
    if not rows:
        return
    means = {name: f"{name} {test:.1f} %" + (f" (mean of {n} runs)" if n > 1 else "") for name, test, _, n in rows}
    said = f"{text.listing(list(means.values()))}; chance is {rows[0][2]:.1f} %"
    if len({chance for _, _, chance, _ in rows}) > 1:  # heads of different sizes
        said = "; ".join(f"{means[name]}, chance {chance:.1f} %" for name, _, chance, _ in rows)
    unknown = "" if results.training is not None else f" {HELD_OUT_UNKNOWN}"
    yield f"{accuracy_title(results)}: {said}.{unknown}"


def classifier_sentences(results: Results) -> list[str]:
    """What a reader must know of the models' classes, by condition; nothing of heads that were trained here."""
    classifiers = results.document.classifiers
    return [classifiers[name].note for name in results.conditions if name in classifiers and classifiers[name].note]
