"""What `metrics/relevance.json` holds of relevance maps, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.relevance import CONTROL, ILLUSTRATIVE, MapMean, MapTest, RelevanceResults, parse_relevance
from engine.report import text
from engine.report.inputs import Results
from engine.report.reading import load_json

RELEVANCE = Path("metrics/relevance.json")
NOTHING = "No map was measured: relevance.measured is 0."


@dataclass(frozen=True, slots=True)
class Relevance:
    """The document of the relevance stage, looked up by what a sentence needs."""

    document: RelevanceResults

    @property
    def conditions(self) -> list[str]:
        return list(dict.fromkeys(entry.condition for entry in self.document.means))

    def methods(self, condition: str | None = None) -> list[str]:
        """Methods that were measured, in one condition or in any."""
        return list(dict.fromkeys(e.method for e in self.document.means if condition in (None, e.condition)))

    def mean(self, condition: str, method: str, measure: str) -> MapMean | None:
        """The mean of a measure with its interval; None where there is none."""
        where = (condition, method, measure)
        return next(
            (e for e in self.document.means if (e.condition, e.method, e.measure) == where and e.mean is not None), None
        )


def load_relevance(results: Results) -> Relevance | None:
    """What the relevance stage left; None where it measured nothing.

    Raises:
        InputError: the file cannot be read or is not as the stage writes it.
    """
    path = results.outputs / RELEVANCE
    if not results.record.usable(path):
        return None
    return Relevance(parse_relevance(load_json(path, "written by the relevance stage"), path))


def relevance_sentences(results: Results, measured: Relevance) -> dict[str, list[str]]:
    """Heading -> sentences, in order; headings without a sentence are left out."""
    parts = {
        "Faithfulness": list(_faithfulness(results, measured)),
        "Where maps point": list(_places(results, measured)),
        "Where rollout points": list(rollout_cautions(measured)),
        "How much maps depend on the class": list(_classes(results, measured)),
        "Attention and the prediction": list(_link(results, measured)),
        "Not computed": [
            *(measured.document.left_out or ([] if measured.document.images else [NOTHING])),
            *(f"{entry.method} of {entry.condition}: {entry.reason}." for entry in measured.document.refused),
        ],
    }
    return {heading: sentences for heading, sentences in parts.items() if sentences}


def estimate(entry: MapMean | None) -> str:
    """A mean with its interval."""
    if entry is None:
        return "undefined"
    return text.number(entry.mean, 2) + (f" ({text.interval(entry.ci)})" if entry.ci else "")


def _faithfulness(results: Results, measured: Relevance) -> Iterator[str]:
    """Each condition's order of methods, and which of the expected steps hold."""
    for condition in measured.conditions:
        ranked = []
        for measure, sign, name in (
            ("deletion_auc", 1, "deletion (least first)"),
            ("insertion_auc", -1, "insertion (greatest first)"),
            ("faithfulness", -1, "the area between them (greatest first)"),
        ):
            means = {method: measured.mean(condition, method, measure) for method in measured.methods(condition)}
            known = sorted((sign * e.mean, m) for m, e in means.items() if e and e.mean is not None)
            order = ", ".join(f"{method} {text.number(sign * value, 2)}" for value, method in known)
            ranked.append(f"by {name}: {order}")
        yield f"{condition}, areas under the curves, {'; '.join(ranked)}."
        against = [test for test in measured.document.methods if test.condition == condition]
        for than in dict.fromkeys(test.than for test in against):
            left_out = () if than == CONTROL else ILLUSTRATIVE  # these are not held against another method
            verdicts = []
            for measure, sign in (("deletion_auc", -1), ("insertion_auc", 1), ("faithfulness", 1)):
                groups: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
                for test in _matching(against, than=than, measure=measure):
                    if test.method not in left_out:
                        groups[_verdict(test, sign, results.alpha)].append(test.method)
                if words := [f"{text.listing(names)} {what}" for what, names in groups.items() if names]:
                    label = {"deletion_auc": "deletion", "insertion_auc": "insertion"}.get(measure, "the area")
                    verdicts.append(f"by {label} {', '.join(words)}")
            if verdicts:
                base = "a random order" if than == CONTROL else than
                yield f"{condition}, against {base} (max-T at {results.alpha:g}): {'; '.join(verdicts)}."


def _verdict(test: MapTest, sign: int, alpha: float) -> str:
    if test.difference is None or not test.survives(alpha):
        return "not told apart"
    return "better" if sign * test.difference > 0 else "worse"


def _matching(tests: Iterable[MapTest], **where: str | None) -> Iterator[MapTest]:
    return (test for test in tests if all(getattr(test, name) == value for name, value in where.items()))


def _places(results: Results, measured: Relevance) -> Iterator[str]:
    for region in results.regions:
        for method in measured.methods():
            parts = [
                f"{condition} {estimate(share)}, peak on it in {text.number(100 * hit.mean, 2)} %"
                for condition in measured.conditions
                if (share := measured.mean(condition, method, f"region_share[{region}]")) is not None
                and (hit := measured.mean(condition, method, f"region_hit[{region}]")) is not None
                and hit.mean is not None
            ]
            if parts:
                yield f"{method}, share of the map on {region}: {'; '.join(parts)}."


def rollout_cautions(measured: Relevance) -> Iterator[str]:
    """A caution for each condition in which rollout's peak is a patch that dominates a head."""
    for entry in measured.document.rollout_peaks:
        if entry.share is not None:
            yield (
                f"{entry.condition}: in {text.share(entry.at_dominant, entry.images)} images shown, rollout's "
                "peak is the patch that receives most of the attention of one head, up to "
                f"{text.number(100 * entry.share)} % of it (layer {entry.layer}, head {entry.head}). A peak "
                "there says where attention collects, for every class alike, not what the prediction rests on."
            )


def _classes(results: Results, measured: Relevance) -> Iterator[str]:
    against = measured.document.against
    for method in measured.methods():
        for measure, name in (("class_rank_correlation", "rank correlation"), ("class_ssim", "SSIM")):
            means = {c: measured.mean(c, method, measure) for c in measured.conditions}
            if any(means.values()):
                listed = text.listing([f"{estimate(entry)} in {condition}" for condition, entry in means.items()])
                yield (
                    f"{method}, {name} of an image's maps of its own and another class: {listed}."
                    f"{_differences(results, measured, method, measure, against)}"
                )
        for condition in measured.conditions:
            for test in _matching(
                measured.document.classes, condition=condition, method=method, measure="total_variation"
            ):
                if test.difference is not None and test.survives(results.alpha):
                    more = "noisier" if test.difference > 0 else "smoother"
                    yield (
                        f"{method}, {condition}: maps of another class are {more} than those of the image's own (total "
                        f"variation {text.change(test.difference)}, max-T p {text.p_value(test.p_max_t)})."
                    )


def _differences(results: Results, measured: Relevance, method: str, measure: str, against: str) -> str:
    parts = []
    for test in _matching(measured.document.conditions, method=method, measure=measure):
        change = f"{text.change(test.difference)} (max-T p {text.p_value(test.p_max_t)})"
        parts.append(
            f"{test.condition} {change}" + ("" if test.survives(results.alpha) else ", so no difference is claimed")
        )
    return f" Against {against}: {'; '.join(parts)}." if parts else ""


def _link(results: Results, measured: Relevance) -> Iterator[str]:
    words = {"logit": "the true class's logit", "correct": "being right"}
    for entry in measured.document.link:
        tests = entry.tests
        what = f"{entry.condition} against {entry.against}: the change of {words[entry.outcome]}"
        if not tests:
            yield (
                f"{what} cannot be tested: of {text.count(entry.images, 'image')} fewer than 4 have both "
                "changes, or one of the two is the same in all of them."
            )
            continue
        sure = [test for test in tests if test.survives(results.alpha)]
        cells = f"{text.share(len(sure), len(tests))} metric × layer × head cells"
        how = f"Spearman over {entry.images:,} images, max-|ρ| over {entry.permutations:,} permutations"
        lead = f"{what} goes with the change of a head's metric in {cells} ({how})"
        if not sure:
            yield f"{lead}."
            continue
        best = max(sure, key=lambda test: abs(test.rho or 0))
        yield (
            f"{lead}; most in {best.metric}, layer {best.layer}, head {best.head}: ρ = "
            f"{text.change(best.rho)}, p {text.p_value(best.p_max_r)}."
        )
