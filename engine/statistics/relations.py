"""Do metrics change together, over the cells of a model and over images?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.bootstrap import FEWEST, resampled_means
from engine.statistics.pairing import paired_conditions
from engine.statistics.rank_correlation import spearman, spearman_interval
from engine.statistics.results import DEFAULTS, Interval, Relation, Settings, finite


def cross_metric_correlation(
    table: xr.Dataset, settings: Settings = DEFAULTS, metrics: Sequence[str] | None = None
) -> list[Relation]:
    """Do two metrics change together? Spearman's correlation of their differences.

    Twice: over the layer × head cells (each the mean over images), and layer by layer over images (each the mean over
    heads). Intervals are over images in both. Over cells: images are resampled, the same for all metrics, and cells
    ranked by their means in each resample; the interval reaches to both sides as far as the farther percentile. Not
    only to that side: resampled means scatter twice as much about the true ones as the means themselves, which pulls
    resampled ρ towards 0 or to where the scatter of two metrics goes together. Cells stay as they are: the interval
    says what other images would give in these cells, not what other heads or models would. Over images: see
    `spearman_interval`.

    Args:
        table, settings, metrics: as in `compare_conditions`.
    Returns:
        One result per condition and pair of metrics (or regions): `rho` over `over`, "cells" (layer None) or "images";
        `n` cells or images where both have a difference; rho is None below 3 of them or where one does not vary, `ci`
        below `FEWEST` images.
    Raises:
        InputError: as `compare_conditions`.
    """
    relations: list[Relation] = []
    for paired in paired_conditions(table, settings.against, metrics):
        cells = [_Cells(metric.differences()[:, paired.heads], settings) for metric in paired.metrics]
        images = [metric.image_differences() for metric in paired.metrics]
        for first, second in combinations(range(len(paired.metrics)), 2):
            one, other = (paired.metrics[i].identity for i in (first, second))
            which: dict[str, Any] = {"condition": paired.condition, "against": paired.against}
            which |= {"metric": one["metric"], "region": one["region"]}
            which |= {"with_metric": other["metric"], "with_region": other["region"]}
            rho, n = spearman(cells[first].means, cells[second].means)
            ci = cells[first].interval(cells[second], rho, settings.confidence)
            relations.append(Relation(**which, over="cells", layer=None, rho=finite(rho), ci=ci, n=n))
            for i in paired.layers:
                pair = images[first][:, i], images[second][:, i]
                rho, n = spearman(*pair)
                ci = spearman_interval(*pair, settings.confidence) if n >= FEWEST and np.isfinite(rho) else None
                layer = paired.layer_ids[i]
                relations.append(Relation(**which, over="images", layer=layer, rho=finite(rho), ci=ci, n=n))
    return relations


class _Cells:
    """One metric's differences [image, cell]: their means, and those of resampled images."""

    def __init__(self, differences: Floats, settings: Settings) -> None:
        self.present = np.isfinite(differences).any(axis=1)
        self.means = defined_mean(differences, axis=0)
        self._drawn = np.empty((0, self.means.size))
        if self.present.sum() >= FEWEST:
            self._drawn = resampled_means(differences, resamples=settings.permutations, seed=settings.seed)
        self._ranks: dict[bytes, Floats] = {}

    def interval(self, other: _Cells, rho: float, confidence: float) -> Interval:
        """Of the correlation `rho` with another metric; None with too few images that both have, or no resample."""
        if np.isnan(rho) or (self.present & other.present).sum() < FEWEST:
            return None
        both = np.isfinite(self.means) & np.isfinite(other.means)
        drawn = (self._ranks_among(both) * other._ranks_among(both)).sum(axis=1)
        if np.isnan(drawn).all():
            return None
        low, high = np.nanquantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        reach = float(max(high - rho, rho - low))
        return max(-1.0, rho - reach), min(1.0, rho + reach)

    def _ranks_among(self, cells: NDArray[np.bool_]) -> Floats:
        """Ranks among these cells in each resample, centred and of unit length; NaN where one is missing or all tie."""
        key = cells.tobytes()
        if key not in self._ranks:
            ranks = stats.rankdata(self._drawn[:, cells], axis=1, nan_policy="propagate")
            ranks -= ranks.mean(axis=1, keepdims=True)
            length = np.sqrt((ranks**2).sum(axis=1, keepdims=True))
            self._ranks[key] = ranks / np.where(length > 0, length, np.nan)
        return self._ranks[key]
