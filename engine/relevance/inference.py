"""Tests between methods, conditions and classes; `metrics/relevance.json` and `.csv`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from engine.config import RelevanceConfig
from engine.relevance.choice import ClassChoice, Targets
from engine.relevance.estimates import comparable, estimates
from engine.relevance.evaluation import Evaluation
from engine.relevance.methods import METHODS
from engine.relevance.results import (
    CONTROL,
    MapCurves,
    MapMean,
    MapTest,
    PredictionLink,
    Refusal,
    RelevanceResults,
    RolloutPeaks,
)
from engine.statistics import (
    Floats,
    Settings,
    bootstrap_interval,
    build,
    compare_columns,
    finite,
    write_document,
)
from train.whole_files import write_atomically

Evaluations = Mapping[str, Mapping[str, Evaluation]]  # condition -> method -> evaluation
Pair = tuple[dict[str, str], Floats, Floats]  # fields of the test, values of the other side, values; [image]


def _each(evaluations: Evaluations) -> Iterator[tuple[str, str, Evaluation]]:
    for condition, methods in evaluations.items():
        for method, evaluation in methods.items():
            yield condition, method, evaluation


def relevance_results(
    evaluations: Evaluations,
    refused: Mapping[str, Mapping[str, str]],
    choice: ClassChoice,
    config: RelevanceConfig,
    settings: Settings,
    *,
    images: int,
    rollout_peaks: Sequence[RolloutPeaks] = (),
    link: Sequence[PredictionLink] = (),
) -> RelevanceResults:
    """Everything measured and tested.

    Three kinds of test, all paired by image, the image being the unit of inference (given these checkpoints); max-T
    holds over each kind's family:

    - `methods`: is one method's map more faithful than another's (a class-free one's, a random one's)? A family per
      condition.
    - `conditions`: does a measure differ between a condition and `against`? A family per condition: method × measure.
      Only where both explain the same class of an image; areas as shares of the rise, how alike maps of two classes
      are as the excess over maps of two images (`estimates`).
    - `classes`: is the map of another class noisier than that of the image's class? A family per condition.
    """
    against = settings.against
    others = {name: methods for name, methods in evaluations.items() if choice.same_class and name != against}
    return RelevanceResults(
        images=images,
        target=choice.role,
        left_out=choice.left_out,
        baseline=config.baseline,
        steps=config.steps,
        against=against,
        confidence=settings.confidence,
        refused=tuple(
            Refusal(condition=condition, method=method, reason=reason)
            for condition, methods in refused.items()
            for method, reason in methods.items()
        ),
        means=tuple(_means(evaluations, settings)),
        curves=tuple(
            MapCurves(
                condition=condition,
                method=method,
                fractions=tuple(evaluation.curves.fractions.tolist()),
                deletion=tuple(map(finite, evaluation.curves.deletion.mean(axis=0))),
                insertion=tuple(map(finite, evaluation.curves.insertion.mean(axis=0))),
            )
            for condition, method, evaluation in _each(evaluations)
        ),
        methods=_tests([_between_methods(*item) for item in evaluations.items()], settings),
        conditions=_tests(
            [_between_conditions(*item, against, evaluations[against]) for item in others.items()], settings
        ),
        classes=_tests([_between_classes(*item) for item in evaluations.items()], settings),
        rollout_peaks=tuple(rollout_peaks),
        link=tuple(link),
    )


def write_relevance(
    folder: Path,
    results: RelevanceResults,
    evaluations: Evaluations,
    targets: Mapping[str, Targets],
    ids: Sequence[str],
) -> None:
    """`relevance.json`, and `relevance.csv` with one row per condition, method and image; each whole or not at all."""
    write_document(folder / "relevance.json", results, indent=2)
    names = list(dict.fromkeys(name for _, _, evaluation in _each(evaluations) for name in evaluation.values))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["condition", "method", "image", "target", "other", *names])
    for condition, method, evaluation in _each(evaluations):
        columns = [evaluation.values.get(name) for name in names]
        for i, identity in enumerate(ids):
            numbers = ["" if c is None or not np.isfinite(c[i]) else f"{c[i]:.7g}" for c in columns]
            writer.writerow([condition, method, identity, *targets[condition].names(i), *numbers])
    write_atomically(folder / "relevance.csv", text.getvalue().encode())


def _means(evaluations: Evaluations, settings: Settings) -> Iterator[MapMean]:
    """Each measure's mean with its interval over images."""
    for condition, method, evaluation in _each(evaluations):
        measures = estimates(evaluation.values)
        values = np.stack(list(measures.values()), axis=1)
        bounds = bootstrap_interval(
            values, resamples=settings.permutations, confidence=settings.confidence, seed=settings.seed
        )
        known = [column[np.isfinite(column)] for column in values.T]
        yield from build(
            MapMean,
            [{"condition": condition, "method": method, "measure": measure} for measure in measures],
            {
                "mean": [finite(column.mean()) if column.size else None for column in known],
                "ci": bounds.T,
                "n": [column.size for column in known],
            },
        )


def _tests(families: Sequence[Sequence[Pair]], settings: Settings) -> tuple[MapTest, ...]:
    """Every family's tests; none over fewer than two images."""
    tests: list[MapTest] = []
    for family in families:
        if not family or len(family[0][1]) < 2:
            continue
        rows, a, b = zip(*family, strict=True)
        measures = np.array([row["measure"] for row in rows])
        compared = compare_columns(np.stack(a, axis=1), np.stack(b, axis=1), families=measures, **settings.resampling())
        tests += build(MapTest, rows, compared.results(), family_size=compared.family_size)
    return tuple(tests)


def _between_methods(condition: str, methods: Mapping[str, Evaluation]) -> list[Pair]:
    class_free = [name for name, method in METHODS.items() if method.class_free]
    return [
        (
            {"condition": condition, "method": method, "than": than, "measure": measure},
            methods[than].values[measure],
            evaluation.values[measure],
        )
        for than in (*class_free, CONTROL)
        for method, evaluation in methods.items()
        if method not in (than, CONTROL) and than in methods
        for measure in ("faithfulness", "deletion_auc", "insertion_auc")
    ]


def _between_conditions(
    condition: str, methods: Mapping[str, Evaluation], against: str, others: Mapping[str, Evaluation]
) -> list[Pair]:
    pairs = {
        method: (estimates(others[method].values), estimates(evaluation.values))
        for method, evaluation in methods.items()
        if method != CONTROL and method in others
    }
    return [
        ({"condition": condition, "against": against, "method": method, "measure": measure}, before[measure], values)
        for method, (before, after) in pairs.items()
        for measure, values in after.items()
        if comparable(measure)
    ]


def _between_classes(condition: str, methods: Mapping[str, Evaluation]) -> list[Pair]:
    return [
        (
            {"condition": condition, "method": method, "measure": measure},
            values,
            evaluation.values[f"{measure}_other"],
        )
        for method, evaluation in methods.items()
        for measure, values in evaluation.values.items()
        if f"{measure}_other" in evaluation.values
    ]
