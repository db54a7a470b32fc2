"""`metrics/relevance.json` and `.csv`: what was measured of the maps, and the tests between methods and conditions."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from engine.relevance.choice import ClassChoice, Targets
from engine.relevance.evaluation import CONTROL, Evaluation
from engine.statistics import (
    IMAGES,
    bootstrap_interval,
    compare_paired,
    correlate_over_images,
    interval,
    number,
    numbers,
    why_degenerate,
)
from train.whole_files import write_atomically, write_json

Floats = NDArray[np.float64]
Evaluations = Mapping[str, Mapping[str, Evaluation]]  # condition -> method -> evaluation

_SETTINGS = ("permutations", "bootstrap", "confidence", "seed")


def relevance_document(
    evaluations: Evaluations,
    refused: Mapping[str, Mapping[str, str]],
    choice: ClassChoice,
    *,
    images: int,
    against: str,
    baseline: str,
    steps: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything measured and tested, ready for JSON: null where a number is not defined.

    Three kinds of test, all paired by image, the image being the unit of inference (given these checkpoints); max-T
    holds over each kind's family:

    - `methods`: is one method's map more faithful than another's (rollout's, a random one's)? A family a condition.
    - `conditions`: does a measure differ between a condition and `against`? A family a condition: method × measure.
      Only where both explain the same class of an image.
    - `classes`: is the map of another class noisier than that of the image's class? A family a condition.

    Args:
        evaluations, refused: condition -> method -> evaluation, or the reason why there is none.
        choice: the classes of the maps.
        images: how many are measured.
        against: the condition that the others are compared with.
        baseline, steps: as given to `perturbation_curves`.
        settings: permutations, bootstrap, confidence and seed of `compare_paired`.
    """
    chosen = {name: settings[name] for name in _SETTINGS}
    return {
        "schema": 1,
        "unit_of_inference": IMAGES,
        "images": images,
        "target": choice.role,
        "left_out": list(choice.left_out),
        "baseline": baseline,
        "steps": steps,
        "against": against,
        "confidence": chosen["confidence"],
        "refused": [
            {"condition": condition, "method": method, "reason": reason}
            for condition, methods in refused.items()
            for method, reason in methods.items()
        ],
        "means": list(_means(evaluations, chosen)),
        "curves": [
            {
                "condition": condition,
                "method": method,
                "fractions": _numbers(evaluation.curves.fractions),
                "deletion": _numbers(evaluation.curves.deletion.mean(axis=0)),
                "insertion": _numbers(evaluation.curves.insertion.mean(axis=0)),
            }
            for condition, methods in evaluations.items()
            for method, evaluation in methods.items()
        ],
        "methods": list(_between_methods(evaluations, chosen)),
        "conditions": list(_between_conditions(evaluations, against, chosen)) if choice.same_class else [],
        "classes": list(_between_classes(evaluations, chosen)),
    }


def prediction_link(
    table: xr.Dataset,
    logits: Mapping[str, Floats],
    labels: Mapping[str, NDArray[np.int64]],
    *,
    against: str,
    permutations: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Does a head's change go with a change in the prediction? Spearman's correlations over images.

    One entry a condition and outcome: the change (condition − against) of the true class's logit, or of being right
    (−1, 0, 1), with every metric's change in every layer and head, seeds averaged. The family is metric × layer × head.
    It is an association over images of these checkpoints: that the attention's change brings about the other is not
    tested. Images whose class one of the two heads does not have are left out.

    Args:
        table: metrics over (condition, seed, image, layer, head[, region]).
        logits: condition -> [image, class of its own head], seeds averaged, of the table's images; a condition whose
            classes are not known is not there and has no entry.
        labels: condition -> the true class's place in its logits, [image]; −1 where its head does not have it.
        against, permutations, seed: see `correlate_over_images`.
    """
    series = []
    for name in table.data_vars:
        values = table[name].mean("seed", skipna=False)
        parts = (
            [values.sel(region=region, drop=True) for region in table["region"].values]
            if "region" in values.dims
            else [values]
        )
        keys = [f"{name}[{region}]" for region in table["region"].values] if "region" in values.dims else [str(name)]
        series += list(zip(keys, parts, strict=True))
    entries = []
    compared = [str(name) for name in table["condition"].values if name != against and name in logits]
    for condition in compared if against in logits else ():
        rows = np.flatnonzero((labels[condition] >= 0) & (labels[against] >= 0))
        if not len(rows):
            continue
        changes = xr.concat(
            [
                values.sel(condition=condition, drop=True) - values.sel(condition=against, drop=True)
                for _, values in series
            ],
            dim="metric",
            coords="minimal",
            compat="override",
        ).assign_coords(metric=[key for key, _ in series])
        logit, correct = (
            {name: values(logits[name][rows], labels[name][rows]) for name in (condition, against)}
            for values in (_true_logit, _correct)
        )
        outcomes = {
            "logit": logit[condition] - logit[against],
            "correct": correct[condition] - correct[against],
        }
        for outcome, change in outcomes.items():
            found = correlate_over_images(changes.isel(image=rows), change, permutations=permutations, seed=seed)
            cells = found.stack(cell=("metric", "layer", "head"))
            tests = [
                {
                    "metric": str(metric),
                    "layer": int(layer),
                    "head": int(head),
                    "n": int(cells["n"].values[i]),
                    "rho": number(cells["rho"].values[i]),
                    "p": number(cells["p"].values[i]),
                    "p_max_r": number(cells["p_max_r"].values[i]),
                }
                for i, (metric, layer, head) in enumerate(cells["cell"].values)
                if np.isfinite(cells["rho"].values[i])
            ]
            entries.append(
                {
                    "condition": condition,
                    "against": against,
                    "outcome": outcome,
                    "unit_of_inference": IMAGES,
                    "family": "metric × layer × head",
                    "family_size": found.attrs["family_size"],
                    "permutations": permutations,
                    "images": len(rows),
                    "tests": tests,
                }
            )
    return entries


def _true_logit(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    return np.asarray(logits[np.arange(len(labels)), labels])


def _correct(logits: Floats, labels: NDArray[np.int64]) -> Floats:
    return np.asarray(logits.argmax(axis=1) == labels, dtype=np.float64)


def write_relevance(
    folder: Path,
    document: Mapping[str, Any],
    evaluations: Evaluations,
    targets: Mapping[str, Targets],
    ids: Sequence[str],
) -> None:
    """`relevance.json`, and `relevance.csv` with one row a condition, method and image; each whole or not at all."""
    write_json(folder / "relevance.json", document)
    names = list(dict.fromkeys(name for methods in evaluations.values() for e in methods.values() for name in e.values))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["condition", "method", "image", "target", "other", *names])
    for condition, methods in evaluations.items():
        for method, evaluation in methods.items():
            columns = [evaluation.values.get(name) for name in names]
            for i, identity in enumerate(ids):
                numbers_ = ["" if c is None or not np.isfinite(c[i]) else f"{c[i]:.7g}" for c in columns]
                writer.writerow([condition, method, identity, *targets[condition].names(i), *numbers_])
    write_atomically(folder / "relevance.csv", text.getvalue().encode())


def _numbers(values: Floats) -> list[float | None]:
    return [number(value) for value in values]


def _means(evaluations: Evaluations, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Each measure's mean with its interval over images."""
    for condition, methods in evaluations.items():
        for method, evaluation in methods.items():
            values = np.stack(list(evaluation.values.values()), axis=1)
            low, high = bootstrap_interval(
                values, resamples=settings["bootstrap"], confidence=settings["confidence"], seed=settings["seed"]
            )
            for i, measure in enumerate(evaluation.values):
                known = values[np.isfinite(values[:, i]), i]
                bounds = [number(low[i]), number(high[i])]
                yield {
                    "condition": condition,
                    "method": method,
                    "measure": measure,
                    "mean": number(known.mean()) if known.size else None,
                    "ci": None if None in bounds else bounds,
                    "n": int(known.size),
                }


def _tests(
    pairs: Sequence[tuple[dict[str, Any], Floats, Floats]], settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One family: (what it is, values, values of the other side) each, b − a; none over fewer than two images."""
    if not pairs or len(pairs[0][1]) < 2:
        return
    a, b = np.stack([low for _, _, low in pairs], axis=1), np.stack([high for _, high, _ in pairs], axis=1)
    result = compare_paired(a, b, **settings)
    values = {str(name): result[name].values for name in result.data_vars}
    for i, (identity, _, _) in enumerate(pairs):
        yield {
            **identity,
            "n": int(values["n"][i]),
            **numbers(values, i, ("difference", "dz")),
            "ci": interval(values, i),
            "p": number(values["p_t"][i]),
            **numbers(values, i, ("p_max_t",)),
            "family_size": result.attrs["family_size"],
            "degenerate": why_degenerate(values, i),
        }


def _between_methods(evaluations: Evaluations, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for condition, methods in evaluations.items():
        pairs = []
        for than in ("rollout", CONTROL):
            for method in methods:
                if method in (than, CONTROL) or than not in methods:
                    continue
                for measure in ("faithfulness", "deletion_auc", "insertion_auc"):
                    identity = {"condition": condition, "method": method, "than": than, "measure": measure}
                    high, low = (methods[name].values[measure] for name in (method, than))
                    pairs.append((identity, high, low))
        yield from _tests(pairs, settings)


def _between_conditions(
    evaluations: Evaluations, against: str, settings: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for condition, methods in evaluations.items():
        if condition == against:
            continue
        pairs = [
            (
                {"condition": condition, "against": against, "method": method, "measure": measure},
                values,
                evaluations[against][method].values[measure],
            )
            for method, evaluation in methods.items()
            if method != CONTROL and method in evaluations[against]
            for measure, values in evaluation.values.items()
        ]
        yield from _tests(pairs, settings)


def _between_classes(evaluations: Evaluations, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for condition, methods in evaluations.items():
        pairs = [
            (
                {"condition": condition, "method": method, "measure": measure},
                evaluation.values[f"{measure}_other"],
                values,
            )
            for method, evaluation in methods.items()
            for measure, values in evaluation.values.items()
            if f"{measure}_other" in evaluation.values
        ]
        yield from _tests(pairs, settings)
