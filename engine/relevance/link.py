"""Does a change in attention go with a change in the prediction? Of every head, over images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from engine.config import chosen_metrics
from engine.relevance.results import HeadAssociation, Outcome, PredictionLink
from engine.statistics import (
    ConditionPairs,
    Floats,
    build,
    correlate_over_images,
    finite,
    paired_conditions,
    series_name,
    spearman,
)


def prediction_link(
    table: xr.Dataset,
    logits: Mapping[str, Floats],
    labels: Mapping[str, NDArray[np.int64]],
    *,
    against: str,
    permutations: int,
    seed: int,
) -> list[PredictionLink]:
    """Does a head's change go with a change in the prediction? Spearman's correlations over images, adjusted.

    One result per condition and outcome, the change (condition − against) of the true class's logit, or of being right
    (−1, 0, 1), with every metric's change in every layer and head, runs averaged. The family is metric × layer × head.

    Both changes depend on where they start: what is high by chance falls, what is low rises, and a head's value and the
    logit start together. So both are adjusted for the image's class, the logit and the head's value in `against`;
    being right for having been right, too, which with the class makes the strata that outcomes are permuted in: what is
    left is whether the condition is right among images of one class that both were right, or both wrong, in `against`.
    It stays beside the logit since a logit may rise without any prediction changing.

    It is an association over images of these checkpoints: that the attention's change brings about the other is not
    tested. What one network alone gave an image, in attention and logit, and fine-tuning takes away, is not told from
    it: there is one value of each to adjust for. Images whose class one of the two heads does not have are left out.

    Args:
        table: metrics over (condition, seed, image, layer, head[, region]).
        logits: condition -> [image, class of its own head], runs averaged, of the table's images; a condition whose
            classes are not known is not there and has no result.
        labels: condition -> the true class's place in its logits, [image]; −1 where its head does not have it.
        against, permutations, seed: see `correlate_over_images`.
    """
    links: list[PredictionLink] = []
    for pairs in paired_conditions(chosen_metrics(table), against, None) if against in logits else ():
        condition = pairs.condition
        if condition not in logits:
            continue
        rows = np.flatnonzero((labels[condition] >= 0) & (labels[against] >= 0))
        if not len(rows):
            continue
        before, after = (_outcomes(logits[name][rows], labels[name][rows]) for name in (against, condition))
        values, changes = (sides.isel(image=rows) for sides in _values_and_changes(pairs))
        classes = labels[against][rows]
        strata: dict[Outcome, NDArray[np.int64]] = {"logit": classes, "correct": 2 * classes + (before["correct"] > 0)}
        for outcome in after:
            change = after[outcome] - before[outcome]
            result = correlate_over_images(
                changes,
                change,
                baseline=values,
                covariates=[before["logit"]],
                strata=strata[outcome],
                permutations=permutations,
                seed=seed,
            )
            cells = result.stack(cell=("metric", "layer", "head"))
            cells = cells.isel(cell=cells["n"].values > 0)
            tests = build(
                HeadAssociation,
                [{"metric": str(m), "layer": int(layer), "head": int(head)} for m, layer, head in cells["cell"].values],
                {str(name): cells[name].values for name in cells.data_vars},
            )
            links.append(
                PredictionLink(
                    condition=condition,
                    against=against,
                    outcome=outcome,
                    family_size=result.attrs["family_size"],
                    permutations=permutations,
                    images=len(rows),
                    alone=int((np.unique(strata[outcome], return_counts=True)[1] == 1).sum()),
                    rho_start=finite(spearman(change, before[outcome])[0]),
                    tests=tuple(tests),
                )
            )
    return links


def _values_and_changes(pairs: ConditionPairs) -> tuple[xr.DataArray, xr.DataArray]:
    """In `against`, and condition − against, of each metric or "metric[region]", [metric, image, layer, head] each."""
    sides = np.stack([metric.over_seeds() for metric in pairs.metrics])  # [metric, side, image, layer, head]
    names = [series_name(metric.identity["metric"], metric.identity["region"]) for metric in pairs.metrics]
    coords = {"metric": names, "layer": list(pairs.layer_ids), "head": list(pairs.head_ids)}
    values = xr.DataArray(sides[:, 0], dims=("metric", "image", "layer", "head"), coords=coords)
    return values, values.copy(data=sides[:, 1] - sides[:, 0])


def _outcomes(logits: Floats, labels: NDArray[np.int64]) -> dict[Outcome, Floats]:
    correct = (logits.argmax(axis=1) == labels).astype(np.float64)
    return {"logit": logits[np.arange(len(labels)), labels], "correct": correct}
