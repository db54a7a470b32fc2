"""Does a change in attention go with a change in the prediction? Of every head, over images."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from engine.relevance.results import HeadAssociation, Outcome, PredictionLink
from engine.statistics import Floats, build, correlate_over_images, metric_series


def prediction_link(
    table: xr.Dataset,
    logits: Mapping[str, Floats],
    labels: Mapping[str, NDArray[np.int64]],
    *,
    against: str,
    permutations: int,
    seed: int,
) -> list[PredictionLink]:
    """Does a head's change go with a change in the prediction? Spearman's correlations over images.

    One result per condition and outcome: the change (condition − against) of the true class's logit, or of being right
    (−1, 0, 1), with every metric's change in every layer and head, seeds averaged. The family is metric × layer × head.
    It is an association over images of these checkpoints: that the attention's change brings about the other is not
    tested. Images whose class one of the two heads does not have are left out.

    Args:
        table: metrics over (condition, seed, image, layer, head[, region]).
        logits: condition -> [image, class of its own head], seeds averaged, of the table's images; a condition whose
            classes are not known is not there and has no result.
        labels: condition -> the true class's place in its logits, [image]; −1 where its head does not have it.
        against, permutations, seed: see `correlate_over_images`.
    """
    links: list[PredictionLink] = []
    compared = [str(name) for name in table["condition"].values if name != against and name in logits]
    for condition in compared if against in logits else ():
        rows = np.flatnonzero((labels[condition] >= 0) & (labels[against] >= 0))
        if not len(rows):
            continue
        changes = _changes(table, condition, against).isel(image=rows)
        after, before = (_outcomes(logits[name][rows], labels[name][rows]) for name in (condition, against))
        for outcome in after:
            change = after[outcome] - before[outcome]
            result = correlate_over_images(changes, change, permutations=permutations, seed=seed)
            cells = result.stack(cell=("metric", "layer", "head"))
            cells = cells.isel(cell=np.isfinite(cells["rho"].values))
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
                    tests=tuple(tests),
                )
            )
    return links


def _changes(table: xr.Dataset, condition: str, against: str) -> xr.DataArray:
    """Condition − against of every metric, or "metric[region]", [metric, image, layer, head], seeds averaged."""
    names, changes = [], []
    for metric, region, values in metric_series(table):
        means = values.mean("seed", skipna=False)
        names.append(metric if region is None else f"{metric}[{region}]")
        changes.append(means.sel(condition=condition, drop=True) - means.sel(condition=against, drop=True))
    return xr.concat(changes, dim="metric", coords="minimal", compat="override").assign_coords(metric=names)


def _outcomes(logits: Floats, labels: NDArray[np.int64]) -> dict[Outcome, Floats]:
    correct = (logits.argmax(axis=1) == labels).astype(np.float64)
    return {"logit": logits[np.arange(len(labels)), labels], "correct": correct}
