"""Does the change grow with depth?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from engine.statistics.arrays import defined_mean
from engine.statistics.paired import compare_columns
from engine.statistics.pairing import paired_conditions
from engine.statistics.rank_correlation import spearman
from engine.statistics.results import DEFAULTS, IMAGES, Settings, Trend, build


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
            "depth_rho": np.array([spearman(layers.astype(np.float64), means)[0] for means in by_layer]),
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
