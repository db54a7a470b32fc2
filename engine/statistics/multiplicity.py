"""p-values adjusted for the number of tests in a family, of any shape; NaN is a test that was not made."""

from __future__ import annotations

from typing import Any

import numpy as np
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
