"""The relevance stage of a study: pictures of a few images, measurements on more, and both into the outputs folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.capture import CaptureError
from engine.config import RelevanceConfig
from engine.relevance.choice import ClassChoice, find_targets
from engine.relevance.comparison import relevance_document, write_relevance
from engine.relevance.evaluation import Evaluation, evaluate_maps
from engine.relevance.rollout_peaks import rollout_peaks
from engine.relevance.samples import Explained, explain_samples, samples_folder, write_samples
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
    against: str,
    heads: Mapping[str, HeadClasses],
    choice: ClassChoice,
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
        heads: condition -> the classes of its head; one without a head is left out.
        choice: which classes are explained.
        settings: permutations, bootstrap, confidence and seed of the tests.
        link: entries of `prediction_link`.
        seed: of the other classes, the random control and ties.
        device: where the models run.
    """
    explained: dict[str, list[Explained]] = {method: [] for method in config.methods}
    refused: dict[str, dict[str, str]] = {condition: {} for condition in models}
    evaluations: dict[str, dict[str, Evaluation]] = {condition: {} for condition in models}
    peaks: list[dict[str, Any]] = []
    of_drawn, of_measured = (
        find_targets(
            choice,
            heads,
            images,
            rows,
            seed,
            against=against,
            predict=lambda condition, rows=rows: _predicted(models[condition], images, rows, device),  # type: ignore[misc]
        )
        for rows in (drawn, measured)
    )
    for condition, load in models.items():
        if condition not in of_measured:
            refused[condition] = dict.fromkeys(config.methods, "it has no head, and a relevance map is of a class")
            continue
        model = load()
        for method in config.methods if drawn else ():
            try:
                explained[method] += explain_samples(
                    model, condition, images, drawn, of_drawn[condition], method, device=device
                )
            except CaptureError as error:
                refused[condition][method] = str(error)
        if drawn and "rollout" in config.methods and "rollout" not in refused[condition]:
            ours = {item.image: item.map for item in explained["rollout"] if item.condition == condition}
            pixels = images.batch(list(drawn)).to(device)
            peaks.append({"condition": condition} | rollout_peaks(model, pixels, [ours[row] for row in drawn]))
        methods = [method for method in config.methods if method not in refused[condition]]
        evaluations[condition], reasons = evaluate_maps(
            model,
            images,
            measured,
            of_measured[condition],
            methods,
            baseline=config.baseline,
            steps=config.steps,
            seed=seed,
            device=device,
            label=condition,
        )
        refused[condition] |= reasons
    for method in config.methods:
        write_samples(samples_folder(outputs, method), method, images, explained[method])
    document = relevance_document(
        evaluations,
        refused,
        choice,
        images=len(measured),
        against=against,
        baseline=config.baseline,
        steps=config.steps,
        settings=settings,
    )
    document["rollout_peaks"] = peaks
    document["link"] = list(link)
    write_relevance(outputs / "metrics", document, evaluations, of_measured, [images.ids[row] for row in measured])


def _predicted(load: Loader, images: ImageSet, rows: Sequence[int], device: str) -> NDArray[np.int64]:
    """The output of the model that is greatest, [row]."""
    predicted: list[NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    model = load() if rows else None
    with torch.inference_mode():
        for start in range(0, len(rows), 32):
            assert model is not None
            output = model(images.batch(rows[start : start + 32]).to(device))
            predicted.append(getattr(output, "logits", output).argmax(dim=-1).cpu().numpy())
    return np.concatenate(predicted)
