"""Spearman's rank correlation of two series with gaps, and its interval over their units."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from engine.statistics.arrays import Floats


def spearman(first: Floats, second: Floats) -> tuple[float, int]:
    """Spearman's rank correlation over the units that both have, and how many these are; NaN where undefined."""
    both = np.isfinite(first) & np.isfinite(second)
    n = int(both.sum())
    if n < 3:
        return math.nan, n
    ranks = [stats.rankdata(values[both]) for values in (first, second)]
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan, n
    return float(np.corrcoef(*ranks)[0, 1]), n


def spearman_interval(first: Floats, second: Floats, confidence: float) -> tuple[float, float]:
    """Interval of Spearman's ρ over the units that both have, as other units would give it; NaN where it is undefined.

    Student's interval on Fisher's scale, with the error of the infinitesimal jackknife: what ρ changes by with a unit's
    weight, the shift of all others' ranks included. It is the error that resampling the units tends to, and assumes
    neither normality nor an even spread.

    Source:
        Efron (1982), The jackknife, the bootstrap and other resampling plans, §6.
    """
    rho, n = spearman(first, second)
    if math.isnan(rho) or abs(rho) > 1 - 1e-12:
        return rho, rho
    both = np.isfinite(first) & np.isfinite(second)
    influence = _influence(first[both], second[both])
    error = math.sqrt(float(influence @ influence) / (n * (n - 1))) / (1 - rho**2)
    half = float(stats.t.isf((1 - confidence) / 2, n - 2)) * error
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _influence(first: Floats, second: Floats) -> Floats:
    """Derivative of ρ by the weight of each unit, times the number of units, [unit]."""
    x, y = (stats.rankdata(values) / len(values) for values in (first, second))
    x, y = x - x.mean(), y - y.mean()

    def of_product(one: Floats, other: Floats) -> Floats:
        # More weight on a unit lifts the ranks of those above it.
        derivative = one * other + _above(one, other) + _above(other, one)
        return np.asarray(derivative - derivative.mean())

    xx, yy, xy = x @ x / len(x), y @ y / len(x), x @ y / len(x)
    own = of_product(x, x) / xx + of_product(y, y) / yy
    return np.asarray((of_product(x, y) - xy / 2 * own) / math.sqrt(xx * yy))


def _above(ranks: Floats, values: Floats) -> Floats:
    """Mean over all units of the values of those with a greater rank, of ties a half, [unit]."""
    order = np.argsort(ranks, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(values[order])])
    least, most = (np.searchsorted(ranks[order], ranks, side=side) for side in ("left", "right"))
    return np.asarray((sums[-1] - (sums[least] + sums[most]) / 2) / len(ranks))
