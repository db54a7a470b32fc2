"""p-values adjusted for the number of tests in a family, of any shape; NaN is a test that was not made."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.arrays import Floats


def holm(p: Any) -> Floats:
    """Holm's step-down adjustment: controls the chance of any false positive, whatever the dependence.

    Source:
        Holm (1979), Scandinavian Journal of Statistics 6:65–70.
    """
    return _adjust(p, lambda ranked: np.maximum.accumulate(ranked * np.arange(ranked.size, 0, -1)))


def benjamini_hochberg(p: Any) -> Floats:
    """Benjamini and Hochberg's step-up adjustment: controls the false discovery rate.

    Source:
        Benjamini and Hochberg (1995), Journal of the Royal Statistical Society B 57:289–300.
    """
    return _adjust(p, stats.false_discovery_control)


def holm_over_families(p: Floats, families: NDArray[np.int64]) -> Floats:
    """p-values [test] that hold within their families, adjusted over the families by each one's least (Holm).

    A test's p is multiplied by the number of families whose least p is not below its family's least, and is never below
    what a family with a lesser least p came to.
    """
    adjusted = np.full(p.shape, np.nan)
    made = np.isfinite(p)
    present = np.unique(families[made])
    least = np.array([p[made & (families == family)].min() for family in present])
    floor = 0.0
    for rank, place in enumerate(np.argsort(least, kind="stable")):
        members = made & (families == present[place])
        factor = present.size - rank
        adjusted[members] = np.maximum(np.minimum(p[members] * factor, 1.0), floor)
        floor = max(floor, min(least[place] * factor, 1.0))
    return adjusted


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
