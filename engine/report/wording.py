"""Sentences made of the numbers, and the cautions that go with them. Plain text: whoever prints it escapes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engine.report.findings import SEEDS_NEEDED, Change, Comparison, Relation, layer_curve, survives, training_runs
from engine.report.inputs import PairedTest, Results

__all__ = [
    "accuracy_sentence",
    "change_sentence",
    "comparison_sentence",
    "count",
    "headline",
    "how_to_read",
    "interval",
    "leaks_sentence",
    "limits",
    "listing",
    "not_measured",
    "number",
    "p_value",
    "percent",
    "plain",
    "quantity",
    "relation_sentence",
    "scope_sentences",
    "signed",
    "trend_sentence",
    "what",
]


_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float | None, digits: int = 3) -> str:
    """A number in three significant digits, with a true minus; "undefined" for None and NaN."""
    if value is None or math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-4 or size >= 1e6:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        text = f"{size:.{decimals}f}"
    return f"−{text}" if value < 0 else text


def signed(value: float | None) -> str:
    """A number with its sign, for differences."""
    text = number(value)
    return f"+{text}" if value is not None and value > 0 else text


def quantity(value: float | None, unit: str, *, difference: bool = False) -> str:
    """A number with its unit."""
    text = signed(value) if difference else number(value)
    return f"{text} {unit}" if unit and text != "undefined" else text


def p_value(value: float | None) -> str:
    """Two significant digits; below 1e-4 only that, for no model is right to more."""
    if value is None:
        return "undefined"
    return "1" if value >= 0.9995 else "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def interval(test: PairedTest) -> str:
    """ "low to high" of a test's interval, or "" where it has none."""
    low, high = test.ci
    return "" if low is None or high is None else f"{number(low)} to {number(high)}"


def plain(value: Any) -> str:
    """A recorded value of whatever kind as text; numbers as `number` writes them, counts with separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def listing(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def percent(level: float) -> str:
    """0.95 as "95 %"."""
    return f"{100 * level:g} %"


def where(test: PairedTest) -> str:
    """ "layer 2 (blocks.2.attn), head 1"."""
    site = f" ({test.site})" if test.site else ""
    head = "" if test.head is None else f", head {test.head}"
    return f"layer {test.layer}{site}{head}"


def what(metric: str, region: str | None) -> str:
    """ "region_mass on small digit"."""
    return metric if region is None else f"{metric} on {region}"


def count(n: int, noun: str) -> str:
    """ "1 image", "1,024 images"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def headline(results: Results, found: Sequence[Comparison]) -> str:
    """The study in a sentence or two, from what survives the family-wise test, or the lack of it."""
    if not found:
        return "One condition was measured, so nothing is compared."
    if all(comparison.identical for comparison in found):
        names = listing([comparison.condition for comparison in found])
        return (
            f"Every measured value of {names} equals that of {found[0].against} exactly: the attention did not change."
        )
    regional = _region_headline(results, found)
    if regional:
        return regional
    best = max(
        ((comparison, change) for comparison in found for change in comparison.changes if change.strongest),
        key=lambda pair: abs((pair[1].strongest and pair[1].strongest.dz) or 0.0),
        default=None,
    )
    if best is None:
        return _null_headline(results, found)
    comparison, change = best
    test = change.strongest
    assert test is not None  # chosen for having one
    return (
        f"The clearest change is in {what(change.metric, change.region)}, {where(test)}: "
        f"from {quantity(test.mean_against, change.unit)} in {comparison.against} to "
        f"{quantity(test.mean_condition, change.unit)} in {comparison.condition} "
        f"({_effect(results, test, change.unit)})."
    )


def _region_headline(results: Results, found: Sequence[Comparison]) -> str:
    """Where attention on annotated regions moved most, in every condition; "" if no such change survives."""
    candidates = [
        test
        for comparison in found
        for change in comparison.changes
        for test in change.layers
        if change.region is not None and survives(test, results.alpha)
    ]
    if not candidates:
        return ""
    best = max(candidates, key=lambda test: abs(test.difference or 0.0))
    if best.layer is None:
        return ""
    row = results.layers.index(best.layer)
    parts = []
    for region in results.regions:
        shares = {
            condition: float(layer_curve(results, best.metric, condition, region).mean[row])
            for condition in results.conditions
        }
        parts.append(f"on {region}, {listing([f'{number(share, 2)} in {name}' for name, share in shares.items()])}")
    return (
        f"Attention on the annotated regions differs most in {where(best)}. {_lead(results, best.metric)} "
        f"{'; '.join(parts)}."
    )


def _lead(results: Results, metric: str) -> str:
    title = results.title(metric)
    return f"{title[:1].upper()}{title[1:]}:"


def _null_headline(results: Results, found: Sequence[Comparison]) -> str:
    sentences = []
    for comparison in found:
        survived = comparison.survived
        if survived:
            sentences.append(
                f"{survived} of {comparison.cells} layer × head × metric cells differ between {comparison.condition} "
                f"and {comparison.against} after the family-wise correction, but no layer as a whole does."
            )
        else:
            sentences.append(
                f"No difference between {comparison.condition} and {comparison.against} survives the family-wise test "
                f"(0 of {comparison.cells} layer × head × metric cells at α = {results.alpha:g})."
            )
    return " ".join(sentences)


def _effect(results: Results, test: PairedTest, unit: str) -> str:
    """The effect first: difference with interval, dz, then the adjusted p-value."""
    parts = [f"difference {quantity(test.difference, unit, difference=True)}"]
    if interval(test):
        parts.append(f"{percent(results.confidence)} CI {interval(test)}")
    if test.dz is not None:
        parts.append(f"dz {number(test.dz)}")
    if test.p_max_t is not None:
        parts.append(f"max-T p {p_value(test.p_max_t)}")
    return ", ".join(parts)


def comparison_sentence(results: Results, comparison: Comparison) -> str:
    """How many cells survive for one pair, or that none does."""
    if comparison.identical:
        return (
            f"{comparison.condition} and {comparison.against} do not differ at all: every difference is exactly 0 in "
            f"{count(comparison.n, 'image')}."
        )
    survived, cells = comparison.survived, comparison.cells
    if not cells:
        return f"No layer × head test of {comparison.condition} against {comparison.against} is defined."
    layers = sum(len(change.layers) for change in comparison.changes)
    if not survived and not comparison.layers_survived:
        verdict = f"none of the {cells} layer × head × metric cells" + (f" and {layers} layer means" if layers else "")
        verdict += " differs"
    else:
        verdict = f"{survived} of {cells} layer × head × metric cells ({100 * survived / cells:.0f} %)"
        verdict += (f" and {comparison.layers_survived} of {layers} layer means" if layers else "") + " differ"
    return (
        f"{comparison.condition} against {comparison.against}: {verdict} at the family-wise level α = "
        f"{results.alpha:g} (sign-flip max-T, cells and layer means each a family; n = {count(comparison.n, 'image')})."
    )


def change_sentence(results: Results, comparison: Comparison, change: Change) -> str:
    """One metric in one comparison: size first, then how much of it survives."""
    name = what(change.metric, change.region)
    if change.identical:
        return f"{name}: no difference at all (exactly 0 in every layer and head)."
    if change.largest is None:
        return f"{name}: undefined in both conditions or in too few images to compare."
    test = change.largest
    values = ""
    if test.mean_against is not None and test.mean_condition is not None:
        values = f"from {quantity(test.mean_against, change.unit)} to {quantity(test.mean_condition, change.unit)} in "
    size = f"{name}: largest difference {values}{where(test)}; {_effect(results, test, change.unit)}"
    if not change.survived and not change.layers_survived:
        return f"{size}. Nothing survives max-T ({_tested(change)}), so no change is claimed."
    parts = []
    if change.layers:
        parts.append(f"{change.layers_survived} of {len(change.layers)} layers")
    if change.cells:
        directions = [f"{n} {way}" for n, way in ((change.risen, "higher"), (change.fallen, "lower")) if n]
        detail = f" ({listing(directions)})" if directions else ""
        parts.append(f"{change.survived} of {change.defined} layer × head cells{detail}")
    return f"{size}. Surviving max-T: {listing(parts)}."


def _tested(change: Change) -> str:
    layers = [f"0 of {len(change.layers)} layers"] if change.layers else []
    return listing([*layers, *([f"0 of {change.defined} layer × head cells"] if change.cells else [])])


def trend_sentence(results: Results, change: Change) -> str:
    """Lower against upper half of the layers; "" where there are no halves."""
    if change.shallow is None or change.deep is None or change.identical:
        return ""
    layers, half = results.layers, len(results.layers) // 2
    same = change.shallow * change.deep >= 0
    tail = "" if same else "; the sign turns with depth, so a mean over layers hides it"
    if change.layers_survived == 0:
        tail = "; no layer survives max-T, so this is no evidence of a trend"
    return (
        f"{what(change.metric, change.region)}: "
        f"{_span(layers[:half])} {quantity(change.shallow, change.unit, difference=True)}, "
        f"{_span(layers[-half:])} {quantity(change.deep, change.unit, difference=True)}{tail}."
    )


def _span(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}–{layers[-1]}"


def relation_sentence(relation: Relation) -> str:
    """Two metrics' differences over the cells, in words that fit the coefficient."""
    size = abs(relation.rho)
    if size < 0.3:
        verdict = "change largely apart from each other"
    elif relation.rho > 0:
        verdict = "tend to rise and fall together" if size < 0.7 else "rise and fall together"
    else:
        verdict = "tend to move in opposite directions" if size < 0.7 else "move in opposite directions"
    return (
        f"{relation.first} and {relation.second} {verdict} "
        f"(Spearman ρ = {relation.rho:+.2f} over {relation.cells} layer × head cells).".replace("-", "−")
    )


def scope_sentences(results: Results, found: Sequence[Comparison]) -> tuple[str, ...]:
    """What the tests speak of, these checkpoints or training runs: a sentence for all pairs of which the same holds."""
    groups: dict[tuple[int, bool], list[Comparison]] = {}
    for comparison in found:
        groups.setdefault((comparison.runs, comparison.speaks_of_runs), []).append(comparison)
    return tuple(_scope(runs, of_runs, members) for (runs, of_runs), members in groups.items())


def _scope(runs: int, of_runs: bool, members: Sequence[Comparison]) -> str:
    names = listing([member.condition for member in members])
    pairs = "; ".join(f"{member.condition} and {member.against}" for member in members)
    if of_runs:
        return (
            f"{runs} training runs of {names} were measured: the seed-level tests speak of training runs like these on "
            "this data; the image-level tests speak of these checkpoints."
        )
    if runs >= SEEDS_NEEDED:
        return (
            f"{runs} training runs of {names} were measured but no test was made over them, so what is said holds for "
            "these checkpoints and the kind of image they were given, not for fine-tuning as such."
        )
    if runs > 1:
        return (
            f"{runs} training runs are too few for a seed-level test at .05 (an exact sign flip needs {SEEDS_NEEDED}), "
            f"so what is said of {names} holds for these checkpoints and the kind of image they were given, not for "
            "fine-tuning as such."
        )
    if len(members) == 1:
        return (
            f"What is said of {pairs} holds for these two checkpoints and the kind of image they were given. Another "
            "training run would give other numbers, and nothing here says how different."
        )
    return (
        f"Each comparison is of two checkpoints ({pairs}): what is said "
        "of a pair holds for these two checkpoints and the kind of image they were given. Another training run would "
        "give other numbers, and nothing here says how different."
    )


def accuracy_sentence(results: Results) -> str:
    """Test accuracies, mean over runs; "" where nothing was classified."""
    parts, chance = [], None
    for condition in results.conditions:
        runs = results.accuracy.get(condition) or {}
        tests = [run["test"] for run in runs.values() if run.get("test") is not None]
        values = [value for value in tests if value is not None]
        chances = [run.get("chance") for run in runs.values() if run.get("chance") is not None]
        chance = chance if not chances else chances[0]
        if values:
            runs_note = f" (mean of {len(values)} runs)" if len(values) > 1 else ""
            parts.append(f"{condition} {100 * sum(values) / len(values):.1f} %{runs_note}")
    if not parts:
        return ""
    return f"Test accuracy: {listing(parts)}" + (f"; chance is {100 * chance:.1f} %." if chance is not None else ".")


def leaks_sentence(results: Results) -> str:
    """Images whose bytes stand in more than one split; "" where there are none."""
    leaks = results.data.get("same_file_in_several_splits") or ()
    if not leaks:
        return ""
    first = ", ".join(str(name) for name in leaks[0])
    return (
        f"{count(len(leaks), 'image')} with the same bytes in several splits, so test accuracy is flattered "
        f"(the first: {first})."
    )


def not_measured() -> tuple[str, ...]:
    """What the metrics cannot show, whatever their values."""
    return (
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


def how_to_read() -> tuple[str, ...]:
    """How to use the numbers."""
    return (
        "Read sizes before p-values: with many images the smallest difference is “significant”. The "
        "difference is in the metric's own unit; dz is the mean paired difference over its standard deviation across "
        "images.",
        "A marked cell survives the sign-flip max-T test over its whole family, so the chance of even one false mark "
        "in the family is at most α. An unmarked cell is not shown to be unchanged.",
        "Look at depth: opposite changes in lower and upper layers cancel in a mean over layers.",
        "Look across metrics: distance, entropy and Moran's I of one map are not independent. Agreement between them "
        "is not three pieces of evidence.",
        "Spatial metrics are taken over patches alone, each row renormalised; what goes to class and register tokens "
        "is prefix_mass. Read the two together.",
        "Moran's I is not 0 under no association but −1/(N−1) for N patches.",
        "Check the negative controls first: if one failed, none of the other numbers can be trusted.",
    )


def limits(results: Results, found: Sequence[Comparison]) -> tuple[str, ...]:
    """The limits of this very study."""
    runs = max((training_runs(results, condition) for condition in results.conditions), default=1)
    images = count(results.num_images, "image")
    scope = [
        f"One architecture, one data set, {images}, "
        f"{'one checkpoint' if runs == 1 else f'{runs} training runs'} a condition: nothing here carries over to other "
        "models, data or tasks without being measured there.",
        *scope_sentences(results, found),
        "Intervals and image-level tests treat images as independent draws; images of one scene or class are less "
        "independent than that.",
        "All findings are correlational: the conditions differ in all that training changed, not in attention alone.",
        "Only attention weights after the softmax were analysed, and only of layers whose map is tokens by tokens.",
        "Attention was described after training; it was not a training target.",
    ]
    if len(results.conditions) > 2:
        scope.append(
            "Each condition is tested against the first in a family of its own: the family-wise level holds within a "
            "comparison, not over all of them."
        )
    return tuple(scope)
