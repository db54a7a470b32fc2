"""How small an effect a comparison could have found: what a result without a finding means."""

from __future__ import annotations

import math
from functools import cache

from scipy import optimize, stats


@cache
def minimum_detectable_effect(n: int, *, alpha: float = 0.05, power: float = 0.8, family_size: int = 1) -> float:
    """The dz that a two-sided paired t-test of n pairs finds with probability `power`.

    The level is Bonferroni's, alpha / family_size. Where the tests of a family are correlated, max-T finds somewhat
    smaller effects, so this is the careful side for it.

    Args:
        n: pairs.
        alpha: family-wise level.
        power: probability of finding the effect, at least 0.5.
        family_size: number of tests in the family.
    Returns:
        dz (mean difference / standard deviation of the differences); times that standard deviation it is in the
        metric's unit. NaN below 2 pairs.
    Raises:
        ValueError: alpha not between 0 and 1, power not from 0.5 to below 1, or a family without a test.
    Source:
        The noncentral t distribution; Cohen (1988), Statistical power analysis, §2.
    """
    if not (0 < alpha < 1 and 0.5 <= power < 1):
        raise ValueError(f"expected alpha between 0 and 1, power from 0.5 to below 1; found {alpha} and {power}")
    if family_size < 1:
        raise ValueError(f"a family has at least 1 test; found {family_size}")
    if n < 2:
        return math.nan
    critical = float(stats.t.isf(alpha / family_size / 2, n - 1))

    def excess(dz: float) -> float:
        # At a power of .5 or more the other tail is below 1e-8, and scipy's value of it is NaN in places.
        return float(stats.nct.sf(critical, n - 1, dz * math.sqrt(n)) - power)

    # The noncentral t is about normal around the shift: from well below to well above where the power is reached.
    greatest = (critical + 10) * math.sqrt(2 / n) * 2
    while excess(greatest) < 0:
        greatest *= 2
    return float(optimize.brentq(excess, 0.0, greatest, xtol=1e-10))
