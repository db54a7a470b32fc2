"""What the tests share of arrays."""

from __future__ import annotations

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
