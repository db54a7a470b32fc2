"""Relevance maps: how faithful they are, where they point, in charts, tables and words, and pictures of a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.config import BASELINES
from engine.relevance import CONTROL, ILLUSTRATIVE, MapMean, MapTest, PredictionLink, RelevanceResults, parse_relevance
from engine.report import text
from engine.report.document import (
    Block,
    Bullets,
    Content,
    Figure,
    Group,
    Heading,
    Picture,
    ReportedStudy,
    Span,
    Table,
    Text,
    section,
)
from engine.report.inputs import GradcamSample, Results, load_json
from engine.report.marks import PALETTE
from engine.report.plots import Chart, Line
from engine.report.viewer import data_uri
from engine.statistics import FEWEST

RELEVANCE = Path("metrics/relevance.json")
PANELS = Path("visualizations/relevance")
PANEL_BUDGET = 800_000
GRADCAM_BUDGET = 1_300_000
"""Bytes of pictures in the page."""

COLUMNS = {
    "faithfulness_normalised": "faithfulness",
    "deletion_auc_normalised": "deletion",
    "insertion_auc_normalised": "insertion",
    "class_rank_correlation": "rank correlation, classes",
    "image_rank_correlation": "rank correlation, images",
    "class_ssim": "SSIM, classes",
    "image_ssim": "SSIM, images",
    "total_variation": "total variation",
    "total_variation_other": "total variation, other class",
}
TARGETS = {
    "true": "the true class of each, in every condition",
    "predicted": "the class of each that one of the conditions predicts, in every condition",
    "own": "the class of each that the condition's own model predicts",
}
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


@section("Relevance maps", page=50, anchor="relevance", name="Relevance")
def relevance(study: ReportedStudy) -> Iterator[Block]:
    measured = load_relevance(study.results)
    if measured is None:
        return
    sentences = relevance_sentences(study.results, measured)
    cautions = [Text(line, "scope") for line in rollout_cautions(measured)]
    panels = _panels(study.results, measured.document.target)
    methods = measured.methods()
    if not methods:
        said = [line for title, lines in sentences.items() if title != "Where rollout points" for line in lines]
        yield from (*map(Text, said), *cautions)
        yield from panels
        return
    yield Text(_introduction(measured))
    legend: list[Content] = [Span(name, "swatch", n % len(PALETTE)) for n, name in enumerate(methods)]
    yield Bullets(legend, "legend")
    yield Group("charts", list(_charts(measured, methods)))
    rows: list[list[Content]] = [
        [study.swatch(condition), method, *(_cell(measured.mean(condition, method, measure)) for measure in COLUMNS)]
        for condition in measured.conditions
        for method in measured.methods(condition)
    ]
    yield Table(["condition", "method", *COLUMNS.values()], rows, "Means with intervals over images")
    yield Group("details", _in_words(measured, sentences), "In words, with the tests")
    yield from cautions
    yield from panels
    last = (
        "Other images lie in visualizations/relevance; every image's numbers in metrics/relevance.csv. That a map is "
        "faithful says which patches the prediction depends on, not that the model is right to use them."
    )
    yield Text(last, "scope")


@section("Relevance maps", summary=70)
def relevance_in_words(study: ReportedStudy) -> list[Block]:
    measured = load_relevance(study.results)
    return _in_words(measured, relevance_sentences(study.results, measured)) if measured is not None else []


def _in_words(measured: Relevance, sentences: dict[str, list[str]]) -> list[Block]:
    blocks: list[Block] = []
    if sentences.keys() - {"Not computed", "Where rollout points"}:
        images = text.count(measured.document.images, "image")
        said = f"Maps of {images} in each condition's first training run. Tests of relevance maps are exploratory."
        if 0 < measured.document.images < FEWEST:
            said += (
                f" Of fewer than {FEWEST} images they flip signs: a small p comes too easily where values are skewed."
            )
        blocks.append(Text(said))
    for title, lines in sentences.items():
        blocks += [Heading(title), Bullets(lines)]
    return blocks


def _introduction(measured: Relevance) -> str:
    document = measured.document
    method = "bootstrap" if document.images >= FEWEST else "Student's"
    return " ".join(
        (
            f"Maps of {text.count(document.images, 'image')} for {TARGETS[document.target]}.",
            *document.left_out,
            "A map is faithful when taking away the patches it marks takes the class away (deletion, or positive "
            "perturbation: lower is better) and putting them back brings it back (insertion, or negative perturbation "
            "read backwards: higher is better); a patch that is taken away shows "
            f"{BASELINES[document.baseline]}, the same in every condition. Curves are of the probability, which is as "
            "high as a model is confident; areas are shares of its rise from none of the patches to all (means over "
            "images), which conditions can be compared by. Intervals: "
            f"{text.percent(document.confidence)}, {method} over images. The unit of inference is the "
            f"{document.unit_of_inference} (each condition's first training run).",
        )
    )


def _cell(entry: MapMean | None) -> str:
    return "" if entry is None else estimate(entry)


def _charts(measured: Relevance, methods: Sequence[str]) -> Iterator[Figure]:
    """A deletion and an insertion chart for every condition, one line per method."""
    for condition in measured.conditions:
        for kind, done in (("deletion", "taken away"), ("insertion", "put back")):
            lines = [
                Line(
                    curve.method,
                    methods.index(curve.method) % len(PALETTE),
                    [100 * fraction for fraction in curve.fractions],
                    np.array(curve.deletion if kind == "deletion" else curve.insertion, dtype=np.float64),
                )
                for curve in measured.document.curves
                if curve.condition == condition
            ]
            chart = Chart(
                title=f"{condition}: {kind}",
                lines=lines,
                x_label=f"most relevant patches {done} (%)",
                y_label="probability of the class",
                x_ticks=[0, 25, 50, 75, 100],
                y_range=(0.0, 1.0),
            )
            yield Figure(chart)


def _panels(results: Results, target: str) -> Iterator[Picture]:
    """The first panel of each method, as far as the budget of a page goes; Grad-CAM has a section of its own."""
    used = 0
    folder = results.outputs / PANELS
    methods = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    classes = "its own class and another one" if target == "true" else "a predicted class"
    for method in (name for name in methods if results.record.usable(folder / name)):
        first = next(iter(sorted((folder / method).glob("*_panel.png"))), None)
        if first is not None and used + first.stat().st_size <= PANEL_BUDGET:
            used += first.stat().st_size
            shows = f"{method} maps of one image in every condition, for {classes}"
            caption = f"{method}: one image; in each condition one scale of colours, up to its strongest relevance"
            yield Picture(data_uri("image/png", first.read_bytes()), shows, caption, wide=True)


@section("Grad-CAM, for illustration", page=60, anchor="gradcam", name="Grad-CAM")
def gradcam(study: ReportedStudy) -> Iterator[Block]:
    """Pictures of as many images as fit the budget whole: half an image's conditions compare with nothing."""
    results = study.results
    order = {name: index for index, name in enumerate(results.conditions)}
    groups: list[Block] = []
    remaining, used = len(results.gradcam), 0
    for image in dict.fromkeys(sample.image for sample in results.gradcam):
        pictures = [(sample, sample.file.read_bytes()) for sample in results.gradcam if sample.image == image]
        used += sum(len(content) for _, content in pictures)
        if used > GRADCAM_BUDGET:
            break
        remaining -= len(pictures)
        pictures.sort(key=lambda pair: order.get(pair[0].condition, len(order)))
        roles = dict.fromkeys(sample.role for sample in results.gradcam if sample.image == image)
        rows = [[_picture(study, *pair) for pair in pictures if pair[0].role == role] for role in roles]
        groups.append(Group("group", [Group("pictures", row) for row in rows], image))
    if not groups:
        return
    yield Text(
        "Where a class score responds to features, for a few images picked by seed. These pictures illustrate; no "
        "claim of this report rests on them."
    )
    yield Group("gallery", groups)
    if remaining:
        yield Text(f"{remaining} more lie in visualizations/gradcam_samples.", "scope")


def _picture(study: ReportedStudy, sample: GradcamSample, content: bytes) -> Picture:
    aim = f"{sample.role} class {sample.target}"
    probability = "" if np.isnan(sample.probability) else f", probability\u00a0{sample.probability:.2f}"
    caption = (study.swatch(sample.condition), Span(f"{aim}{probability}", "break"))
    shows = f"Grad-CAM of {sample.image} in {sample.condition} for {aim}"
    return Picture(data_uri("image/png", content), shows, caption)


# ------------------------------------------------------------------------------------------------------- in words


def load_relevance(results: Results) -> Relevance | None:
    """What the relevance stage left; None where there was none."""
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


_AREAS = (  # measure, whether more or less is better, in words
    ("deletion_auc", -1, "deletion", "deletion (least first)"),
    ("insertion_auc", 1, "insertion", "insertion (greatest first)"),
    ("faithfulness", 1, "the area", "the area between them (greatest first)"),
)


def _faithfulness(results: Results, measured: Relevance) -> Iterator[str]:
    """Each condition's order of methods, which of the expected steps hold, and what differs between conditions."""
    for condition in measured.conditions:
        yield _order(measured, condition)
        against = [test for test in measured.document.methods if test.condition == condition]
        for than in dict.fromkeys(test.than for test in against):
            left_out = () if than == CONTROL else ILLUSTRATIVE  # these are not held against another method
            tests = [test for test in against if test.than == than and test.method not in left_out]
            verdicts = []
            for measure, sign, label, _ in _AREAS:
                groups: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
                for test in tests:
                    if test.measure == measure:
                        groups[_verdict(test, sign, results.alpha)].append(test.method)
                if words := [f"{text.listing(names)} {what}" for what, names in groups.items() if names]:
                    verdicts.append(f"by {label} {', '.join(words)}")
            if verdicts:
                base = "a random order" if than == CONTROL else than
                yield f"{condition}, against {base} (max-T at {results.alpha:g}): {'; '.join(verdicts)}."
    for method in measured.methods():
        if differences := _differences(results, measured, method, "faithfulness_normalised"):
            yield f"{method}, the area as a share of the rise, {differences}."


def _order(measured: Relevance, condition: str) -> str:
    """How far the images raise the probability, and the methods by their areas as shares of that."""
    whole, none = (measured.mean(condition, CONTROL, name) for name in ("p_whole", "p_none"))
    rise = f"probability of the class {estimate(none)} without the patches and {estimate(whole)} with all"
    ranked = []
    for measure, sign, _, name in _AREAS:
        means = {m: measured.mean(condition, m, f"{measure}_normalised") for m in measured.methods(condition)}
        known = sorted((-sign * e.mean, m) for m, e in means.items() if e and e.mean is not None)
        if known:
            ranked.append(f"by {name}: " + ", ".join(f"{m} {text.number(-sign * value, 2)}" for value, m in known))
    if ranked:
        return f"{condition}, {rise}; areas under the curves as shares of this rise, {'; '.join(ranked)}."
    return f"{condition}, {rise}: no clear rise, so areas under the curves are not compared with other conditions."


def _verdict(test: MapTest, sign: int, alpha: float) -> str:
    if test.difference is None or not test.survives(alpha):
        return "not told apart"
    return "better" if sign * test.difference > 0 else "worse"


def _places(results: Results, measured: Relevance) -> Iterator[str]:
    for region in results.regions:
        for method in (name for name in measured.methods() if name != CONTROL):  # a random map's share is the area
            area: float | None = None
            parts = []
            for condition in measured.conditions:
                names = (f"region_{what}[{region}]" for what in ("share", "hit", "area"))
                share, hit, covered = (measured.mean(condition, method, name) for name in names)
                if share is not None and hit is not None and hit.mean is not None:
                    area = None if covered is None else covered.mean
                    lift = text.times_area(area, share.mean)
                    peak = f"peak on it in {text.number(100 * hit.mean, 2)} %"
                    parts.append(", ".join(filter(None, (f"{condition} {estimate(share)}", lift, peak))))
            if parts:
                yield f"{method}, share of the map on {region}{text.of_area(area)}: {'; '.join(parts)}."


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
    for method in measured.methods():
        for likeness, name in (("rank_correlation", "rank correlation"), ("ssim", "SSIM")):
            measures = (f"class_{likeness}", f"image_{likeness}", f"class_{likeness}_excess")
            of_classes, of_images, excess = (_in_conditions(measured, method, measure) for measure in measures)
            if of_classes:
                parts = [f"{method}, {name} of an image's maps of its own and another class: {of_classes}"]
                if excess:
                    parts += [f"of maps of different images: {of_images}", f"the excess over these: {excess}"]
                parts.append(_differences(results, measured, method, measures[-1]))
                yield f"{'; '.join(filter(None, parts))}."
        for condition in measured.conditions:
            for test in measured.document.classes:
                ours = (test.condition, test.method, test.measure) == (condition, method, "total_variation")
                if ours and test.difference is not None and test.survives(results.alpha):
                    more = "noisier" if test.difference > 0 else "smoother"
                    yield (
                        f"{method}, {condition}: maps of another class are {more} than those of the image's own (total "
                        f"variation {text.change(test.difference)}, max-T p {text.p_value(test.p_max_t)})."
                    )


def _in_conditions(measured: Relevance, method: str, measure: str) -> str:
    """A measure's mean in every condition; "" where none has one."""
    means = {name: measured.mean(name, method, measure) for name in measured.conditions}
    listed = text.listing([f"{estimate(entry)} in {name}" for name, entry in means.items()])
    return listed if any(means.values()) else ""


def _differences(results: Results, measured: Relevance, method: str, measure: str) -> str:
    """ "against baseline: …"; "" where nothing was tested."""
    parts = []
    for test in measured.document.conditions:
        if (test.method, test.measure) == (method, measure) and test.difference is not None:
            claimed = "" if test.survives(results.alpha) else ", so no difference is claimed"
            p = "not tested" if test.p_max_t is None else f"max-T p {text.p_value(test.p_max_t)}"
            change = f"{text.change(test.difference)} ({p})"
            parts.append(f"{test.condition} {change}{claimed}")
    return f"against {measured.document.against}: {'; '.join(parts)}" if parts else ""


def _link(results: Results, measured: Relevance) -> Iterator[str]:
    """What is adjusted for and what it cannot tell, then each outcome's family."""
    links = measured.document.link
    if any(entry.family_size for entry in links):
        yield (
            "What is high by chance falls, in attention and in the prediction alike: raw ρ of two changes hold that "
            "regression to the mean and are not tested. Adjusted ρ are of the ranks of both changes within classes, "
            f"freed of the logit and of the head's value in {links[0].against} (rank analysis of covariance; whole "
            "images permuted within classes, for being right also within those that were right and those that were "
            "not). They are associations over images of these checkpoints: that one change brings about the other they "
            "do not say, nor do they tell it from what one network alone gave an image and training took away."
        )
    for entry in links:
        yield " ".join(_association(results, entry))


def _association(results: Results, entry: PredictionLink) -> Iterator[str]:
    outcome = {"logit": "the true class's logit", "correct": "being right"}[entry.outcome]
    pair = f"{entry.condition} against {entry.against}: the change of {outcome}"
    tests = [test for test in entry.tests if test.rho is not None]
    if not tests:
        yield (
            f"{pair} cannot be tested: class and values in {entry.against} leave too few of "
            f"{text.count(entry.images, 'image')}, or nothing of one of the two changes."
        )
        return
    sure = [test for test in tests if test.survives(results.alpha)]
    best = max(sure or tests, key=lambda test: abs(test.rho or 0))
    cells = f"{text.share(len(sure), len(tests))} metric × layer × head cells"
    if results.unpaired_note(entry.condition):
        cells += ", whose heads are not paired: see the limits"
    yield (
        f"{pair} goes with the change of a head's metric in {cells} ({text.count(entry.images, 'image')}, "
        f"max-|ρ| over {entry.permutations:,} permutations); the greatest "
        f"{'of these' if sure else 'ρ'} in {best.metric}, layer {best.layer}, head {best.head}: adjusted ρ = "
        f"{text.change(best.rho)}, p {text.p_value(best.p_max_r)}; raw ρ = {text.change(best.rho_raw)}."
    )
    if entry.rho_start is not None:
        yield f"With {outcome} in {entry.against} itself that change goes at ρ = {text.change(entry.rho_start)}."
    if untested := len(entry.tests) - len(tests):
        yield f"No test in {text.count(untested, 'cell')}, where too few images are left or nothing varies."
    if entry.alone:
        kind = {"logit": "its class", "correct": "its class that was right, or wrong, as well"}[entry.outcome]
        yield f"Nothing is said by {text.count(entry.alone, 'image')} without another of {kind}."
