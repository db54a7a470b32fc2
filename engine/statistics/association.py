"""Does a change in attention go with a change in the prediction? Rank correlations over images, family-wise."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from engine.statistics.arrays import BLOCK_BYTES, Floats, count_reaching, defined_mean

# Permuted sums that equal the observed one differ by rounding, about 1e-15 of a correlation.
_TIE = 1e-10


def correlate_over_images(
    changes: xr.DataArray, outcome: Any, *, permutations: int = 9999, seed: int = 0
) -> xr.Dataset:
    """Spearman's correlation over images of every trailing element of `changes` with one outcome.

    Under the null hypothesis that attention's change says nothing about the outcome's, the images' outcomes could as
    well have been in another order: whole permutations of the images, which keep the dependence between the tests.
    A sign flip would not do: it keeps |x| and |y| of an image together. p_max_r is the share of permutations whose
    greatest |ρ| over all elements reaches a test's own.

    An image without a value in an element counts there with the mean rank, which adds nothing to the sum; `n` says how
    many have one. The unit of inference is the image, given these checkpoints.

    Args:
        changes: [image, ...], the leading dimension called `image`.
        outcome: [image], without NaN.
        permutations: random ones of the images (B); p = (b + 1)/(B + 1).

    Returns:
        Dataset over the trailing axes: `rho`, `n`, `p` (this test alone), `p_max_r` (over all elements). NaN where
        fewer than 4 images have a value, or where they, or the outcome, are all equal: no test, and no member of the
        family; attribute `family_size`.

    Raises:
        ValueError: shapes that do not belong together, NaN in the outcome, fewer than 1 permutation.
    Source:
        Westfall & Young (1993); permutations of a correlation: Legendre & Legendre (2012), Numerical ecology, §1.2.
    """
    x = changes.transpose("image", ...)
    values = x.values.reshape(len(x), -1).astype(np.float64)
    y = np.asarray(outcome, dtype=np.float64)
    if y.shape != (len(values),):
        raise ValueError(f"the outcome has the shape {y.shape}; expected one value for each of {len(values)} images")
    if not np.isfinite(y).all():
        raise ValueError(f"the outcome is not finite in {int((~np.isfinite(y)).sum())} images; leave them out of both")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; found {permutations}")
    defined = np.isfinite(values)
    n = defined.sum(axis=0)
    ranks = _unit_ranks(np.where(defined, values, np.nan))
    target = _unit_ranks(y[:, None])[:, 0]
    tested = (n >= 4) & (np.abs(ranks).max(axis=0, initial=0) > 0) & bool(np.abs(target).max(initial=0) > 0)
    rho, p, p_max = np.full((3, values.shape[1]), np.nan)
    z = ranks[:, tested]
    rho[tested] = target @ z
    if tested.any():
        observed = np.abs(rho[tested])
        threshold = observed - _TIE
        reached, greatest = np.zeros(z.shape[1], dtype=np.int64), []
        generator = np.random.default_rng(seed)
        rows = max(1, BLOCK_BYTES // (8 * (z.shape[0] + z.shape[1])))
        for start in range(0, permutations, rows):
            size = min(rows, permutations - start)
            permuted = generator.permuted(np.broadcast_to(target, (size, target.size)), axis=1)
            sums = np.abs(permuted @ z)
            reached += (sums >= threshold).sum(axis=0)
            greatest.append(sums.max(axis=1))
        p[tested] = (reached + 1) / (permutations + 1)
        p_max[tested] = (count_reaching(greatest, threshold) + 1) / (permutations + 1)
    arrays = {"rho": rho, "n": n, "p": p, "p_max_r": p_max}
    return xr.Dataset(
        {name: (x.dims[1:], array.reshape(x.shape[1:])) for name, array in arrays.items()},
        coords={name: coord for name, coord in x.coords.items() if "image" not in coord.dims},
        attrs={"family_size": int(tested.sum()), "permutations": permutations, "seed": seed},
    )


def _unit_ranks(values: Floats) -> Floats:
    """Ranks of each column's values, centred and of unit length; 0 for missing ones and for constant columns."""
    ranks = stats.rankdata(values, axis=0, nan_policy="omit")
    with np.errstate(invalid="ignore"):
        centred = np.nan_to_num(ranks - defined_mean(ranks, axis=0), nan=0.0)
    norm = np.sqrt((centred * centred).sum(axis=0))
    return np.asarray(centred / np.where(norm > 1e-9, norm, np.inf))
