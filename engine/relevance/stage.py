"""The relevance stage of a study: pictures of a few images, measurements on more, and both into the outputs folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from engine.capture import CaptureError
from engine.config import RelevanceConfig
from engine.relevance.choice import ClassChoice, Targets, find_targets
from engine.relevance.evaluation import Evaluation, evaluate_maps
from engine.relevance.explained import Explained, explain_samples, write_samples
from engine.relevance.inference import relevance_results, write_relevance
from engine.relevance.results import PredictionLink, RolloutPeaks, samples_folder
from engine.relevance.rollout_peaks import rollout_peaks
from engine.relevance.targets import device_of, image_logits
from engine.statistics import Settings
from train.data import HeadClasses, ImageSet

Loader = Callable[[], torch.nn.Module]


def explain_study(
    outputs: Path,
    models: Mapping[str, Loader],
    images: ImageSet,
    drawn: Sequence[int],
    measured: Sequence[int],
    config: RelevanceConfig,
    *,
    heads: Mapping[str, HeadClasses],
    choice: ClassChoice,
    settings: Settings,
    link: Sequence[PredictionLink],
    seed: int,
    batch_size: int,
) -> None:
    """Leaves visualizations/gradcam_samples/ and relevance/<method>/, metrics/relevance.json and .csv.

    A method that cannot be computed for a model is left out there and named in relevance.json with the reason; so is a
    condition without a head.

    Args:
        outputs: the study's folder.
        models: condition -> what loads its model, in evaluation mode on its device.
        images: the test split; drawn, measured: its rows to draw and to measure.
        choice: of `choose_classes`, from the same `heads` (condition -> the classes of its head).
        link: of `prediction_link`.
        seed: of the other classes, the random control and ties.
        batch_size: images in memory at a time.
    """
    explained: dict[str, list[Explained]] = {method: [] for method in config.methods}
    refused: dict[str, dict[str, str]] = {condition: {} for condition in models}
    evaluations: dict[str, dict[str, Evaluation]] = {condition: {} for condition in models}
    peaks: list[RolloutPeaks] = []

    def targets_of(rows: Sequence[int]) -> dict[str, Targets]:
        def predict(condition: str) -> NDArray[np.int64]:
            if not rows:
                return np.zeros(0, dtype=np.int64)
            return image_logits(models[condition](), images, rows, batch_size).argmax(dim=-1).cpu().numpy()

        return find_targets(choice, heads, images, rows, seed, against=settings.against, predict=predict)

    drawn_targets, measured_targets = targets_of(drawn), targets_of(measured)
    for condition, load in models.items():
        if condition not in measured_targets:
            refused[condition] = dict.fromkeys(config.methods, "it has no head, and a relevance map is of a class")
            continue
        model = load()
        shown: dict[str, list[Explained]] = {}
        for method in config.methods if drawn else ():
            try:
                shown[method] = explain_samples(
                    model, condition, images, drawn, drawn_targets[condition], method, batch_size
                )
            except CaptureError as error:
                refused[condition][method] = str(error)
        targets = measured_targets[condition]
        methods = [method for method in config.methods if method not in refused[condition]]
        evaluations[condition], reasons = evaluate_maps(
            model, images, measured, targets, methods, config, seed=seed, batch_size=batch_size, label=condition
        )
        refused[condition] |= reasons
        for method in [name for name in shown if name not in reasons]:
            explained[method] += shown[method]
            if method == "rollout":
                pixels = images.batch(list(drawn)).to(device_of(model))
                by_row = {item.image: item.map for item in shown[method]}
                peaks.append(rollout_peaks(condition, model, pixels, [by_row[row] for row in drawn]))
    for method in config.methods:
        write_samples(samples_folder(outputs, method), method, images, explained[method])
    results = relevance_results(
        evaluations, refused, choice, config, settings, images=len(measured), rollout_peaks=peaks, link=link
    )
    write_relevance(outputs / "metrics", results, evaluations, measured_targets, [images.ids[row] for row in measured])
