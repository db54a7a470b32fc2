"""Relevance maps: how faithful they are, where they point, and pictures of a few."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from engine.report import text
from engine.report.document import (
    Block,
    Bullets,
    Content,
    Figure,
    Group,
    Heading,
    Picture,
    Span,
    Study,
    Table,
    Text,
    section,
)
from engine.report.inputs import Results
from engine.report.kept import GradcamSample
from engine.report.marks import PALETTE
from engine.report.plots import Chart, Line
from engine.report.relevance import Relevance, estimate, load_relevance, relevance_sentences, rollout_cautions
from engine.report.viewer import data_uri

PANELS = Path("visualizations/relevance")
PANEL_BUDGET = 800_000
GRADCAM_BUDGET = 1_300_000
"""Bytes of pictures in the page."""

COLUMNS = {
    "faithfulness": "faithfulness",
    "deletion_auc": "deletion",
    "insertion_auc": "insertion",
    "class_rank_correlation": "rank correlation, classes",
    "class_ssim": "SSIM, classes",
    "total_variation": "total variation",
    "total_variation_other": "total variation, other class",
}
TARGETS = {
    "true": "the true class of each, in every condition",
    "predicted": "the class of each that one of the conditions predicts, in every condition",
    "own": "the class of each that the condition's own model predicts",
}
BASELINES = {"blur": "the blurred image", "mean": "the data set's mean"}


@section("Relevance maps", page=50, anchor="relevance", name="Relevance")
def relevance(study: Study) -> list[Block]:
    measured = load_relevance(study.results)
    sentences = relevance_sentences(study.results, measured) if measured is not None else {}
    if measured is None or not sentences:
        return []
    cautions = list(rollout_cautions(measured))
    panels = list(_panels(study.results, measured.document.target))
    methods = measured.methods()
    if not methods:
        said = [line for title, lines in sentences.items() if title != "Where rollout points" for line in lines]
        return [*map(Text, said), *(Text(line, "scope") for line in cautions), *panels]
    blocks: list[Block] = [Text(_introduction(measured))]
    if charts := list(_charts(measured, methods)):
        legend: list[Content] = [Span(name, "swatch", n % len(PALETTE)) for n, name in enumerate(methods)]
        blocks += [Bullets(legend, "legend"), Group("charts", charts)]
    rows: list[list[Content]] = [
        [study.swatch(condition), method, *(_cell(measured, condition, method, measure) for measure in COLUMNS)]
        for condition in measured.conditions
        for method in measured.methods(condition)
    ]
    blocks.append(Table(["condition", "method", *COLUMNS.values()], rows, "Means with intervals over images"))
    blocks.append(Group("details", _in_words(sentences), "In words, with the tests"))
    last = (
        "Other images lie in visualizations/relevance; every image's numbers in metrics/relevance.csv. That a map is "
        "faithful says which patches the prediction hangs on, not that the model is right to use them."
    )
    return [*blocks, *(Text(line, "scope") for line in cautions), *panels, Text(last, "scope")]


@section("Relevance maps", summary=70)
def relevance_in_words(study: Study) -> list[Block]:
    measured = load_relevance(study.results)
    return _in_words(relevance_sentences(study.results, measured)) if measured is not None else []


def _in_words(sentences: dict[str, list[str]]) -> list[Block]:
    return [block for title, lines in sentences.items() for block in (Heading(title), Bullets(lines))]


def _introduction(measured: Relevance) -> str:
    document = measured.document
    return " ".join(
        (
            f"Maps of {text.count(document.images, 'image')} for {TARGETS[document.target]}.",
            *document.left_out,
            "A map is faithful when taking away the patches it marks takes the class away (deletion, or positive "
            "perturbation: lower is better) and putting them back brings it back (insertion, or negative perturbation "
            "read backwards: higher is better); a patch that is taken away shows "
            f"{BASELINES[document.baseline]}, the same in every condition. Intervals: "
            f"{text.percent(document.confidence)}, bootstrap over images. The unit of inference is the "
            f"{document.unit_of_inference}.",
        )
    )


def _cell(measured: Relevance, condition: str, method: str, measure: str) -> str:
    entry = measured.mean(condition, method, measure)
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
            caption = f"{method}: one image, one scale of colours over conditions and classes"
            yield Picture(data_uri("image/png", first.read_bytes()), shows, caption, wide=True)


@section("Grad-CAM, for illustration", page=60, anchor="gradcam", name="Grad-CAM")
def gradcam(study: Study) -> list[Block]:
    """Pictures of as many images as fit the budget whole: half an image's conditions compare with nothing."""
    results = study.results
    order = {name: index for index, name in enumerate(results.conditions)}
    groups: list[Block] = []
    left, used = len(results.gradcam), 0
    for image in dict.fromkeys(sample.image for sample in results.gradcam):
        pictures = [(sample, sample.file.read_bytes()) for sample in results.gradcam if sample.image == image]
        used += sum(len(content) for _, content in pictures)
        if used > GRADCAM_BUDGET:
            break
        left -= len(pictures)
        pictures.sort(key=lambda pair: order.get(pair[0].condition, len(order)))
        roles = dict.fromkeys(sample.role for sample in results.gradcam if sample.image == image)
        rows = [[_picture(study, *pair) for pair in pictures if pair[0].role == role] for role in roles]
        groups.append(Group("group", [Group("pictures", row) for row in rows], image))
    if not groups:
        return []
    said = (
        "Where a class score responds to features, for a few images picked by seed. These pictures illustrate; no "
        "claim of this report rests on them."
    )
    more = [Text(f"{left} more lie in visualizations/gradcam_samples.", "scope")] if left else []
    return [Text(said), Group("gallery", groups), *more]


def _picture(study: Study, sample: GradcamSample, content: bytes) -> Picture:
    aim = f"{sample.role} class {sample.target}"
    probability = "" if sample.probability is None else f", p\u00a0=\u00a0{sample.probability:.2f}"
    caption = (study.swatch(sample.condition), Span(f"{aim}{probability}", "break"))
    shows = f"Grad-CAM of {sample.image} in {sample.condition} for {aim}"
    return Picture(data_uri("image/png", content), shows, caption)
