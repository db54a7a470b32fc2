"""Does a change in attention go with a change in the prediction? Rank correlations over images, family-wise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.polynomial.legendre import legvander
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.arrays import BLOCK_BYTES, Floats, count_reaching

MIN_DF = 4
"""Residual degrees of freedom below which nothing is tested."""
SLOPE = 6
"""Images of a stratum that has slopes of its own; smaller strata share theirs."""
# Equal statistics differ by about 1e-15, and so does from 0 what is left of ranks that are wholly explained.
_TIE, _NOTHING = 1e-10, 1e-9


def correlate_over_images(
    changes: xr.DataArray,
    outcome: Any,
    *,
    baseline: xr.DataArray | None = None,
    covariates: Sequence[Any] = (),
    strata: Any = None,
    permutations: int = 9999,
    seed: int = 0,
) -> xr.Dataset:
    """Spearman's correlation over images of every element of `changes` with one outcome, adjusted for what is given.

    Adjusted (rank analysis of covariance): the ranks of both, over the images that have a value in the element, are
    centred within strata and freed of the covariates' ranks by least squares: of a line in each stratum, and of squares
    and cubes over all images, since the ranks of a change do not lie on a line over the ranks of the value that it
    started from. `rho` is the correlation of what is left.

    Under the null hypothesis what strata and covariates leave of the outcome could as well have been in another order
    within strata: it is permuted (Freedman and Lane), whole images at a time and the same for all elements, which keeps
    the dependence between the tests. An element's own covariate is taken out in its statistic. With covariates the
    statistic is Σxy/√Σx²y² of what is left, so that x and y need not scatter alike in all images (DiCiccio and Romano);
    without any it is ρ√n, and the test is exact. Either has a variance of about 1, whatever n. `p_max_r` is the share
    of permutations whose greatest |statistic| over all elements reaches a test's own.

    Args:
        changes: [image, ...], the leading dimension called `image`; an image without a value in an element is left out
            of that element.
        outcome: [image], without NaN.
        baseline: of the dimensions of `changes`: a covariate of each element's own.
        covariates: those of all elements, each [image], without NaN.
        strata: labels [image]; None: one stratum. An image alone in its stratum says nothing.
        permutations: random ones (B); p = (b + 1)/(B + 1).

    Returns:
        Dataset over the trailing axes: `rho`, `rho_raw` (Spearman's ρ of the same images, not adjusted), `n` (images),
        `df` (residual degrees of freedom), `p` (this test alone), `p_max_r` (over all elements). Where df is below
        `MIN_DF`, or strata and covariates leave nothing of one of the two, there is no test: `rho` and both p are NaN;
        attribute `family_size`, the elements tested.

    Raises:
        ValueError: shapes that do not belong together, NaN in what is [image], fewer than 1 permutation.
    Source:
        Quade (1967), doi:10.1080/01621459.1967.10500925; Freedman and Lane (1983), doi:10.2307/1391660; Winkler et al.
        (2014), doi:10.1016/j.neuroimage.2014.01.060; DiCiccio and Romano (2017), doi:10.1080/01621459.2016.1202117.
    """
    x = changes.transpose("image", ...)
    y, *shared = (_of_images(given, len(x)) for given in (outcome, *covariates))
    labels = np.zeros(len(x)) if strata is None else np.asarray(strata)
    if labels.shape != y.shape:
        raise ValueError(f"the strata have the shape {labels.shape}; expected one label for each of {len(x)} images")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; found {permutations}")
    codes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    by_stratum = np.argsort(codes, kind="stable")
    values, *own = (
        array.transpose(*x.dims).values.astype(np.float64).reshape(len(x), -1)[by_stratum]
        for array in ((x,) if baseline is None else (x, baseline))
    )
    codes, y, shared = codes[by_stratum], y[by_stratum], [covariate[by_stratum] for covariate in shared]

    defined = np.logical_and.reduce([np.isfinite(array) for array in (values, *own)])
    found = {name: np.full(values.shape[1], np.nan) for name in ("rho", "rho_raw", "p", "p_max_r")}
    df = np.zeros(values.shape[1], dtype=np.int64)
    groups = []
    for present in np.unique(defined[:, defined.any(axis=0)], axis=1).T:
        columns = np.flatnonzero((defined == present[:, None]).all(axis=0))
        group = _adjust(values, y, codes, shared, own, present, columns)
        groups.append(group)
        found["rho"][columns], found["rho_raw"][columns], df[columns] = group.rho, group.rho_raw, group.df
    tested = np.isfinite(found["rho"])
    if tested.any():
        p, p_max = _permute(groups, codes, values.shape[1], permutations, seed)
        found["p"][tested], found["p_max_r"][tested] = p[tested], p_max[tested]
    arrays = found | {"n": defined.sum(axis=0), "df": df}
    return xr.Dataset(
        {name: (x.dims[1:], array.reshape(x.shape[1:])) for name, array in arrays.items()},
        coords={name: coord for name, coord in x.coords.items() if "image" not in coord.dims},
        attrs={"family_size": int(tested.sum()), "permutations": permutations, "seed": seed},
    )


@dataclass(frozen=True)
class _Adjusted:
    """Elements that have values in the same images, freed of strata and covariates; arrays are of those images."""

    present: NDArray[np.bool_]  # of all images, stratum by stratum
    columns: NDArray[np.intp]  # of all elements
    rho: Floats  # [element], NaN where there is no test
    rho_raw: Floats  # [element], NaN where one side does not vary
    df: NDArray[np.int64]  # [element]
    statistic: Floats  # [element]
    outcome: Floats  # [image], what strata and shared covariates leave of its ranks, of unit length
    x: Floats  # [image, element], of unit length; 0 where there is no test
    weights: Floats  # [image, element], of the squared outcomes under a statistic's root


def _adjust(
    values: Floats,
    outcome: Floats,
    codes: NDArray[np.int64],
    shared: Sequence[Floats],
    own: Sequence[Floats],
    present: NDArray[np.bool_],
    columns: NDArray[np.intp],
) -> _Adjusted:
    """The elements `columns` over the images `present`; `own` is empty or one covariate [image, element]."""
    values, outcome, codes = values[present][:, columns], outcome[present], codes[present]
    shared, own = [covariate[present] for covariate in shared], [covariate[present][:, columns] for covariate in own]
    ranks, target = _ranks(values), _ranks(outcome)[:, None]
    rho_raw = (_unit(target) * _unit(ranks)).sum(axis=0)
    common = _Covariates.of(codes)
    for covariate in shared:
        common = common.plus(covariate)
    explained = [common.plus(column) for column in own[0].T] if own else [common] * ranks.shape[1]
    left = [each.leave(np.column_stack([rank, target])) for each, rank in zip(explained, ranks.T, strict=True)]
    x, y = (_unit(np.column_stack([pair[:, side] for pair in left])) for side in (0, 1))
    free = len(outcome) - common.terms
    own_terms = np.array([each.terms for each in explained]) - common.terms
    df = free - own_terms - 1
    tested = (df >= MIN_DF) & x.any(axis=0) & y.any(axis=0)
    x[:, ~tested] = 0
    squares = x**2 if shared or own else np.full(x.shape, 1 / len(x))
    return _Adjusted(
        present=present,
        columns=columns,
        rho=np.where(tested, (x * y).sum(axis=0), np.nan),
        rho_raw=np.where((np.ptp(values, axis=0) > 0) & (np.ptp(outcome) > 0), rho_raw, np.nan),
        df=df,
        statistic=_statistic((x * y).sum(axis=0), (squares * y**2).sum(axis=0)),
        outcome=_unit(common.leave(target))[:, 0],
        x=x,
        # A permuted outcome still holds what the element's own covariate explains by chance.
        weights=squares * (1 - own_terms / max(free, 1)),
    )


def _permute(
    groups: Sequence[_Adjusted], codes: NDArray[np.int64], elements: int, permutations: int, seed: int
) -> tuple[Floats, Floats]:
    """p of each test alone and over all elements, [element] each."""
    limits = np.zeros(elements)
    for group in groups:
        limits[group.columns] = group.statistic - _TIE
    generator = np.random.default_rng(seed)
    reached, greatest = np.zeros(elements), []
    rows = max(1, BLOCK_BYTES // (8 * (4 * codes.size + 2 * elements)))
    for start in range(0, permutations, rows):
        # Images stand stratum by stratum, so sorting random numbers that are larger in each next one permutes within.
        keys = generator.random((min(rows, permutations - start), codes.size)) + codes
        orders = keys.argsort(axis=1)
        block = np.zeros((len(orders), elements))
        for group in groups:
            kept = orders[group.present[orders]].reshape(len(orders), -1)
            permuted = group.outcome[(np.cumsum(group.present) - 1)[kept]]
            block[:, group.columns] = _statistic(permuted @ group.x, permuted**2 @ group.weights)
        reached += (block >= limits).sum(axis=0)
        greatest.append(block.max(axis=1))
    return (reached + 1) / (permutations + 1), (count_reaching(greatest, limits) + 1) / (permutations + 1)


def _statistic(products: Floats, squares: Floats) -> Floats:
    return np.asarray(np.abs(products) / np.sqrt(np.maximum(squares, _NOTHING**2)))


def _of_images(given: Any, images: int) -> Floats:
    values = np.asarray(given, dtype=np.float64)
    if values.shape != (images,):
        raise ValueError(
            f"the shape of an outcome or covariate is {values.shape}; expected a value of each of {images} images"
        )
    if missing := int((~np.isfinite(values)).sum()):
        raise ValueError(f"the outcome or a covariate is not finite in {missing} images; leave them out of all")
    return values


def _ranks(values: Floats) -> Floats:
    """Ranks of each column's values, evenly from −1 to 1 about a mean of 0."""
    return np.asarray((2 * stats.rankdata(values, axis=0) - len(values) - 1) / len(values))


@dataclass(frozen=True)
class _Covariates:
    """What ranks are freed of: the means of strata, a line by each covariate in each stratum, and curves over all."""

    strata: NDArray[np.int64]
    slopes: NDArray[np.int64]  # the strata that have a slope of their own, and one more for the others
    lines: tuple[Floats, ...]  # [image] each, orthogonal to each other and the strata's means in every one of `slopes`
    curves: Floats  # [image, curve], orthonormal, and orthogonal to the lines

    @classmethod
    def of(cls, codes: NDArray[np.int64]) -> _Covariates:
        """Strata alone."""
        strata = np.unique(codes, return_inverse=True)[1].astype(np.int64)
        images = np.bincount(strata)
        slopes = np.where(images[strata] >= SLOPE, strata, images.size)
        return cls(strata, slopes, (), np.empty((codes.size, 0)))

    def plus(self, covariate: Floats) -> _Covariates:
        """These and one more covariate, [image]."""
        powers = self._straighten(np.asarray(legvander(_ranks(covariate), 3)[:, 1:], dtype=np.float64))
        wider = replace(self, lines=(*self.lines, powers[:, 0]))
        left, sizes, _ = np.linalg.svd(wider._straighten(np.hstack([self.curves, powers[:, 1:]])), full_matrices=False)
        return replace(wider, curves=left[:, sizes > _NOTHING * np.sqrt(len(left))])

    @property
    def terms(self) -> int:
        """How many degrees of freedom they take."""
        slopes = [int((self._sums(line, line[:, None]) > _NOTHING**2).sum()) for line in self.lines]
        return int(self.strata.max()) + 1 + sum(slopes) + int(self.curves.shape[1])

    def leave(self, values: Floats) -> Floats:
        """What they leave of values [image, column]."""
        straight = self._straighten(values)
        return np.asarray(straight - self.curves @ (self.curves.T @ straight))

    def _straighten(self, values: Floats) -> Floats:
        """What strata and lines leave."""
        means = _sums(values, self.strata) / np.bincount(self.strata)[:, None]
        values = values - means[self.strata]
        for line in self.lines:
            squares = np.maximum(self._sums(line, line[:, None]), _NOTHING**2)
            values = values - line[:, None] * (self._sums(line, values) / squares)[self.slopes]
        return values

    def _sums(self, line: Floats, values: Floats) -> Floats:
        """Sums of products with a line over the images of one slope, [slope, column]."""
        return _sums(line[:, None] * values, self.slopes)


def _sums(values: Floats, codes: NDArray[np.int64]) -> Floats:
    """Sums of values [image, column] over the images of each code, [code, column]."""
    sums = np.zeros((codes.max() + 1, values.shape[1]))
    np.add.at(sums, codes, values)
    return sums


def _unit(values: Floats) -> Floats:
    """Columns of unit length; 0 where nothing is left of them."""
    length = np.sqrt((values**2).sum(axis=0))
    return np.asarray(values / np.where(length > _NOTHING * np.sqrt(len(values)), length, np.inf))
