"""Patterns across layers and metrics: does the change grow with depth, and do metrics change together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.paired import compare_columns
from engine.statistics.pairing import paired_conditions
from engine.statistics.results import DEFAULTS, IMAGES, Relation, Settings, Trend, build, finite


def layer_trend(table: xr.Dataset, settings: Settings = DEFAULTS, metrics: Sequence[str] | None = None) -> list[Trend]:
    """Is the change greater in the deep half of the layers than in the shallow half? Paired over images.

    An image's differences (seeds, then heads averaged) are averaged over each half; a middle layer belongs to neither.
    The family is the metrics (and regions) of one condition. An image that misses a value in any layer of either half
    is left out for that metric and counted.

    Args:
        table, settings, metrics: as in `compare_conditions`.
    Returns:
        One result per condition and metric: `shallow` and `deep` are the mean differences (condition − against) of the
        halves over the same images, `difference` is deep − shallow with its tests; `depth_rho` is Spearman's
        correlation of layer and mean difference, a description without a test. Empty with a single layer.
    Raises:
        InputError: as `compare_conditions`.
    """
    trends: list[Trend] = []
    for paired in paired_conditions(table, settings.against, metrics):
        layers = paired.layers
        half = layers.size // 2
        if not half:
            continue
        differences = [metric.image_differences() for metric in paired.metrics]  # [image, layer]
        shallow, deep = layers[:half], layers[-half:]
        a, b = (np.stack([d[:, part].mean(axis=1) for d in differences], axis=1) for part in (shallow, deep))
        compared = compare_columns(a, b, **settings.resampling())
        complete = np.isfinite(b - a)
        by_layer = [defined_mean(d, axis=0)[layers] for d in differences]
        values = compared.results() | {
            "shallow": defined_mean(np.where(complete, a, np.nan), axis=0),
            "deep": defined_mean(np.where(complete, b, np.nan), axis=0),
            "depth_rho": np.array([_spearman(layers.astype(np.float64), means)[0] for means in by_layer]),
        }
        trends += build(
            Trend,
            [metric.identity for metric in paired.metrics],
            values,
            unit_of_inference=IMAGES,
            family=paired.family("deep against shallow layers: metric"),
            family_size=compared.family_size,
            shallow_layers=tuple(paired.layer_ids[i] for i in shallow),
            deep_layers=tuple(paired.layer_ids[i] for i in deep),
        )
    return trends


def cross_metric_correlation(
    table: xr.Dataset, settings: Settings = DEFAULTS, metrics: Sequence[str] | None = None
) -> list[Relation]:
    """Do two metrics change together? Spearman's correlation of their differences.

    Twice: over the layer × head cells (each the mean over images), and layer by layer over images (each the mean over
    heads). These describe; neither cells nor metrics of one map are independent, so there is no p-value.

    Args:
        table, settings, metrics: as in `compare_conditions`.
    Returns:
        One result per condition and pair of metrics (or regions): `rho` over `over`, "cells" (layer None) or "images";
        `n` cells or images where both have a difference; rho is None below 3 of them or where one does not vary.
    Raises:
        InputError: as `compare_conditions`.
    """
    relations: list[Relation] = []
    for paired in paired_conditions(table, settings.against, metrics):
        cells = [metric.cell_differences()[paired.heads] for metric in paired.metrics]
        images = [metric.image_differences() for metric in paired.metrics]
        for first, second in combinations(range(len(paired.metrics)), 2):
            one, other = (paired.metrics[i].identity for i in (first, second))
            which: dict[str, Any] = {"condition": paired.condition, "against": paired.against}
            which |= {"metric": one["metric"], "region": one["region"]}
            which |= {"with_metric": other["metric"], "with_region": other["region"]}
            rho, n = _spearman(cells[first], cells[second])
            relations.append(Relation(**which, over="cells", layer=None, rho=finite(rho), n=n))
            for i in paired.layers:
                rho, n = _spearman(images[first][:, i], images[second][:, i])
                relations.append(Relation(**which, over="images", layer=paired.layer_ids[i], rho=finite(rho), n=n))
    return relations


def _spearman(first: Floats, second: Floats) -> tuple[float, int]:
    """Spearman's rank correlation over the elements that both have, and how many these are; NaN where undefined."""
    both = np.isfinite(first) & np.isfinite(second)
    n = int(both.sum())
    if n < 3:
        return math.nan, n
    ranks = [stats.rankdata(values[both]) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan, n
    return float(np.corrcoef(*ranks)[0, 1]), n
