"""Patterns across layers and metrics: does the change grow with depth, and do metrics change together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.conditions import IMAGES
from engine.statistics.entries import interval, number, numbers, why_degenerate
from engine.statistics.paired import compare_paired
from engine.statistics.pairing import check_table, defined_mean, existing_heads, other_conditions, paired_metrics

Floats = NDArray[np.float64]


def layer_trend(
    table: xr.Dataset,
    *,
    against: str = "baseline",
    metrics: Sequence[str] | None = None,
    permutations: int = 9999,
    bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Is the change greater in the deep half of the layers than in the shallow half? Paired over images.

    An image's differences (seeds, then heads averaged) are averaged over each half; a middle layer belongs to neither.
    The family is the metrics (and regions) of one condition. An image that misses a value in any layer of either half
    is left out for that metric and counted.

    Args:
        table, against, metrics, permutations, bootstrap, confidence, seed: as in `compare_conditions`.
    Returns:
        One dict a condition and metric, ready for JSON: `shallow` and `deep` are the mean differences (condition −
        against) of the halves over the same images, `difference` is deep − shallow with its tests; `depth_rho` is
        Spearman's correlation of layer and mean difference, a description without a test. Empty with a single layer.
    Raises:
        InputError: as `compare_conditions`.
    """
    names = check_table(table, against, metrics)
    table = table[names]
    layers = np.flatnonzero(existing_heads(table).any(axis=1))
    half = layers.size // 2
    if half == 0:
        return []
    shallow, deep = layers[:half], layers[-half:]
    layer_ids = table["layer"].values
    entries: list[dict[str, Any]] = []
    for condition in other_conditions(table, against):
        pairs = list(paired_metrics(table, condition, against, names))
        differences = [metric.image_differences() for metric in pairs]  # [image, layer]
        a, b = (np.stack([d[:, part].mean(axis=1) for d in differences], axis=1) for part in (shallow, deep))
        result = compare_paired(a, b, permutations=permutations, seed=seed, confidence=confidence, bootstrap=bootstrap)
        values = {str(name): result[name].values for name in result.data_vars}
        paired = np.isfinite(b - a)
        values["shallow"], values["deep"] = (defined_mean(np.where(paired, x, np.nan), axis=0) for x in (a, b))
        for i, (metric, d) in enumerate(zip(pairs, differences, strict=True)):
            entries.append(
                {
                    "condition": condition,
                    "against": against,
                    **metric.identity(),
                    "unit_of_inference": IMAGES,
                    "family": f"{condition} against {against}, deep against shallow layers: metric",
                    "family_size": result.attrs["family_size"],
                    "shallow_layers": [int(layer) for layer in layer_ids[shallow]],
                    "deep_layers": [int(layer) for layer in layer_ids[deep]],
                    "n": int(values["n"][i]),
                    "missing": int(values["missing"][i]),
                    **numbers(values, i, ("shallow", "deep", "difference", "dz", "gz")),
                    "ci": interval(values, i),
                    "p": number(values["p_t"][i]),
                    **numbers(values, i, ("t", "p_max_t", "p_holm", "p_bh")),
                    "depth_rho": number(_spearman(layers.astype(np.float64), defined_mean(d, axis=0)[layers])[0]),
                    "degenerate": why_degenerate(values, i),
                }
            )
    return entries


def cross_metric_correlation(
    table: xr.Dataset, *, against: str = "baseline", metrics: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Do two metrics change together? Spearman's correlation of their differences.

    Twice: over the layer × head cells (each the mean over images), and layer by layer over images (each the mean over
    heads). These describe; neither cells nor metrics of one map are independent, so there is no p-value.

    Args:
        table, against, metrics: as in `compare_conditions`.
    Returns:
        One dict a condition and pair of metrics (or regions): `rho` over `over`, "cells" (layer null) or "images"; `n`
        cells or images where both have a difference; rho is null below 3 of them or where one does not vary.
    Raises:
        InputError: as `compare_conditions`.
    """
    names = check_table(table, against, metrics)
    table = table[names]
    heads = existing_heads(table)
    entries = []
    for condition in other_conditions(table, against):
        pairs = list(paired_metrics(table, condition, against, names))
        cells = [metric.cell_differences()[heads] for metric in pairs]
        images = [metric.image_differences() for metric in pairs]
        for first, second in combinations(range(len(pairs)), 2):
            identity = {
                "condition": condition,
                "against": against,
                "metric": pairs[first].metric,
                "region": pairs[first].region,
                "with_metric": pairs[second].metric,
                "with_region": pairs[second].region,
            }
            rho, n = _spearman(cells[first], cells[second])
            entries.append({**identity, "over": "cells", "layer": None, "rho": number(rho), "n": n})
            for i in np.flatnonzero(heads.any(axis=1)):
                rho, n = _spearman(images[first][:, i], images[second][:, i])
                layer = int(table["layer"].values[i])
                entries.append({**identity, "over": "images", "layer": layer, "rho": number(rho), "n": n})
    return entries


def _spearman(first: Floats, second: Floats) -> tuple[float, int]:
    """Spearman's rank correlation over the elements that both have, and how many these are; NaN where undefined."""
    both = np.isfinite(first) & np.isfinite(second)
    n = int(both.sum())
    if n < 3:
        return float("nan"), n
    ranks = [stats.rankdata(values[both]) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return float("nan"), n
    return float(np.corrcoef(*ranks)[0, 1]), n
