"""The relevance stage of a study: pictures of a few images, measurements on more, and both into the outputs folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import RelevanceConfig
from engine.layouts import CaptureError
from engine.relevance.comparison import relevance_document, write_relevance
from engine.relevance.evaluation import Evaluation, Targets, evaluate_maps
from engine.relevance.samples import Explained, choose_targets, explain_samples, samples_folder, write_samples
from train.data import ImageSet

__all__ = ["explain_study"]

Loader = Callable[[], torch.nn.Module]


def explain_study(
    outputs: Path,
    models: Mapping[str, Loader],
    images: ImageSet,
    drawn: Sequence[int],
    measured: Sequence[int],
    config: RelevanceConfig,
    *,
    against: str,
    labels_are_classes: bool,
    settings: Mapping[str, Any],
    link: Sequence[Mapping[str, Any]],
    seed: int,
    device: str,
) -> None:
    """Leaves visualizations/gradcam_samples/ and relevance/<method>/, metrics/relevance.json and .csv.

    A method that cannot be computed for a model is left out there and named in relevance.json with the reason.

    Args:
        outputs: the study's folder.
        models: condition -> what loads its model, in evaluation mode on `device`.
        images: the test split; drawn, measured: its rows to draw and to measure.
        config: the methods, and how faithfulness is measured.
        against: the condition that the others are compared with.
        labels_are_classes: whether a label can be looked up in the logits; else maps are of predicted classes, for the
            measurements of the class that `against` predicts.
        settings: permutations, bootstrap, confidence and seed of the tests.
        link: entries of `prediction_link`.
        seed: of the other classes, the random control and ties.
        device: where the models run.
    """
    explained: dict[str, list[Explained]] = {method: [] for method in config.methods}
    refused: dict[str, dict[str, str]] = {condition: {} for condition in models}
    evaluations: dict[str, dict[str, Evaluation]] = {}
    labels = np.asarray(images.labels)
    classes = len(images.class_names)
    roles: dict[str, NDArray[np.int64]] = {}
    if labels_are_classes and classes > 1:
        roles = {"true": labels[list(drawn)], "other": choose_targets(labels[list(drawn)], classes, seed)}
    targets = _targets(models[against], images, measured, classes if roles else 0, seed, device)
    for condition, load in models.items():
        model = load()
        for method in config.methods if drawn else ():
            try:
                explained[method] += explain_samples(model, condition, images, drawn, roles, method, device=device)
            except CaptureError as error:
                refused[condition][method] = str(error)
        methods = [method for method in config.methods if method not in refused[condition]]
        evaluations[condition], reasons = evaluate_maps(
            model,
            images,
            measured,
            targets,
            methods,
            baseline=config.baseline,
            steps=config.steps,
            seed=seed,
            device=device,
            label=condition,
        )
        refused[condition] |= reasons
    for method in config.methods if drawn else ():
        write_samples(samples_folder(outputs, method), method, images, explained[method])
    document = relevance_document(
        evaluations,
        refused,
        targets,
        against=against,
        baseline=config.baseline,
        steps=config.steps,
        settings=settings,
    )
    document["link"] = list(link)
    write_relevance(outputs / "metrics", document, evaluations, targets, [images.ids[row] for row in measured])


def _targets(load: Loader, images: ImageSet, rows: Sequence[int], num_classes: int, seed: int, device: str) -> Targets:
    """True classes and others; without known classes (0), those that the model behind `load` predicts, and others."""
    if num_classes:
        labels = np.asarray(images.labels, dtype=np.int64)[list(rows)]
        return Targets("true", labels, choose_targets(labels, num_classes, seed))
    predicted: list[NDArray[np.int64]] = []
    if rows:
        model = load()
        with torch.inference_mode():
            for start in range(0, len(rows), 32):
                output = model(images.batch(rows[start : start + 32]).to(device))
                logits = getattr(output, "logits", output)
                num_classes = logits.shape[-1]
                predicted.append(logits.argmax(dim=-1).cpu().numpy())
    of_model = np.concatenate(predicted) if predicted else np.zeros(0, dtype=np.int64)
    return Targets("predicted", of_model, choose_targets(of_model, max(num_classes, 2), seed))
