"""What the tests share of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BLOCK_BYTES = 32 * 2**20
"""Working memory of one block of resamples or permutations, whatever the number of images."""


def defined_mean(values: Floats, axis: int | tuple[int, ...]) -> Floats:
    """Mean of the values that are not NaN; NaN where there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    result: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result


def sole_value(values: Floats) -> Floats:
    """The value that all of a column's elements equal exactly, missing ones apart, [column]; NaN where they differ."""
    least = np.fmin.reduce(values, axis=0)
    return np.where(least == np.fmax.reduce(values, axis=0), least, np.nan)


def count_reaching(statistics: Sequence[Floats], limits: Floats) -> NDArray[np.intp]:
    """How many of the statistics, given in blocks, reach each limit."""
    ranked = np.sort(np.concatenate(statistics))
    return ranked.size - np.searchsorted(ranked, limits, side="left")
