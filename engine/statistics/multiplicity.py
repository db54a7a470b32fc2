"""What many tests at once ask for: p-values adjusted for their number, and the set that holds the largest effect."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.arrays import Floats


def holm(p: Any) -> Floats:
    """Holm's step-down adjustment: controls the chance of any false positive, whatever the dependence; NaN: no test.

    Source:
        Holm (1979), Scandinavian Journal of Statistics 6:65–70.
    """
    return _adjust(p, lambda ranked: np.maximum.accumulate(ranked * np.arange(ranked.size, 0, -1)))


def benjamini_hochberg(p: Any) -> Floats:
    """Benjamini and Hochberg's step-up adjustment: controls the false discovery rate; NaN: no test.

    Source:
        Benjamini and Hochberg (1995), Journal of the Royal Statistical Society B 57:289–300.
    """
    return _adjust(p, stats.false_discovery_control)


def holm_over_families(p: Floats, families: NDArray[np.int64]) -> Floats:
    """p-values [test] that hold within their families, adjusted over the families (Holm's step-down); NaN: no test.

    A p is multiplied by the number of families that hold one as great: those not wholly rejected before it. Families
    with a true null hypothesis are among them until the first of these is rejected, so that the chance of any false
    positive is at most the level, whatever effects the families hold besides.
    """
    adjusted = np.full(p.shape, np.nan)
    made = np.isfinite(p)
    tests, of = p[made], families[made]
    greatest = np.array([tests[of == family].max() for family in np.unique(of)])
    order = np.argsort(tests, kind="stable")
    factors = greatest.size - np.searchsorted(np.sort(greatest), tests[order], side="left")
    result = np.empty(tests.size)
    result[order] = np.minimum(np.maximum.accumulate(tests[order] * factors), 1.0)
    adjusted[made] = result
    return adjusted


def may_be_largest(low: Floats, high: Floats) -> NDArray[np.bool_]:
    """Which of several effects may be the one of the greatest size, [effect], from simultaneous intervals of them.

    An effect may be the largest while the greatest |value| of its interval reaches the least |value| of every other
    interval, which is 0 where that holds 0. Where all intervals cover, which simultaneous ones do with their
    confidence, the truly largest effect is in the set. NaN: an effect of which nothing is known may be it, too.

    Args:
        low, high: bounds of the intervals, [effect].
    """
    least = np.maximum(np.maximum(low, -high), 0)
    reached = np.maximum(np.abs(low), np.abs(high))
    return np.asarray(~(reached < np.nan_to_num(least).max(initial=0)))


def _adjust(p: Any, rule: Any) -> Floats:
    """Apply a rule that takes ascending p-values and returns their adjusted values."""
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    made = np.isfinite(values)
    family = values[made]
    if ((family < 0) | (family > 1)).any():
        raise ValueError("p-values must lie between 0 and 1; found some outside")
    order = np.argsort(family, kind="stable")
    result = np.empty(family.size)
    result[order] = np.minimum(rule(family[order]), 1.0)
    adjusted[made] = result
    return adjusted
