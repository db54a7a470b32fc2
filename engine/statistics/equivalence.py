"""Equivalence: is a mean difference shown to be smaller than a bound that was set beforehand?"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

from engine.statistics.arrays import Floats


def tost(mean: Any, sd: Any, n: Any, bound: Any) -> Floats:
    """Two one-sided paired t-tests (TOST) of the null hypothesis |mean difference| ≥ bound.

    p ≤ α shows, at level α, that the mean difference lies within ±bound; it is the same as the 1 − 2α t interval lying
    within. A large p shows nothing, least of all a difference.

    Args:
        mean, sd, n: mean and standard deviation (n − 1) of the differences, and their number, of one shape.
        bound: positive, in the unit of the mean; NaN where no bound was set.
    Returns:
        p-values: the greater of the two one-sided ones. NaN without a bound or below 2 pairs. Differences that are all
        equal leave no doubt: 0 within the bound, 1 beyond it, 0.5 exactly on it.
    Source:
        Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15:657–680.
    """
    mean, sd, n, bound = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in (mean, sd, n, bound)))
    error = sd / np.sqrt(np.maximum(n, 1))
    nearest = bound - np.abs(mean)  # of the two bounds the nearer one decides
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(nearest == 0, 0.0, nearest / error)
    p = stats.t.sf(t, np.maximum(n - 1, 1))
    result: Floats = np.where((n >= 2) & np.isfinite(bound), p, np.nan)
    return result
