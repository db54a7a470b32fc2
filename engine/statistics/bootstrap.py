"""Bootstrap of paired differences, many tests at once: studentised max-T over families, BCa and nested intervals.

Resampled sums are matrix products of how often each unit is drawn and the values, so that the same resamples serve
every test, its interval and its family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr, ndtri

from engine.statistics.arrays import BLOCK_BYTES, Floats, defined_mean, sole_value

FEWEST = 20
"""Units below which nothing is resampled: intervals are Student's and tests flip signs."""
INFORMATIVE = 10
"""Pairs off their most frequent value that a resampled test takes: fewer do not tell its variance."""
_ALIKE = 0.01
"""In units of the range: values within it are one value, or rounding would make informative pairs of equal ones."""
_COLUMN_BYTES = 256 * 2**20
# Resamples drawn from one generator of the nested bootstrap; fixed, so that results do not depend on memory.
_NESTED_BLOCK = 128
# Means closer than this, in units of the greatest deviation, differ by rounding only.
_TIE = 1e-12
# So do t values closer than this in proportion.
_TIE_T = 1e-6
# Least variance of a resample, in units of the greatest squared deviation: what is drawn may be all one value.
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class Bootstrap:
    """What resampling says of every test, [test], or of its bounds, [bound, test]; NaN where nothing is tested."""

    p: Floats  # of each test by itself
    p_max_t: Floats  # over its family
    interval: Floats  # BCa, of each mean by itself
    simultaneous: Floats  # all of a family's, and of all families together, cover at once
    floor: float  # least p
    families: int  # that share the simultaneous intervals' level


@dataclass(frozen=True)
class _Columns:
    """Some tests' differences, centred and scaled to a greatest deviation of 1."""

    values: Floats  # [unit, test]; 0 where missing
    valid: NDArray[np.bool_]  # [unit, test]
    mean: Floats  # [test]
    scale: Floats  # [test]

    @classmethod
    def of(cls, differences: Floats) -> _Columns:
        valid = ~np.isnan(differences)
        mean = defined_mean(differences, axis=0)
        centred = np.where(valid, differences - mean, 0.0)
        scale = np.abs(centred).max(axis=0)
        scale[scale == 0] = 1
        return cls(centred / scale, valid, mean, scale)

    def bounds(self, scaled: Floats, differences: Floats) -> Floats:
        """Bounds [bound, test] in the differences' unit: their value where all are equal, NaN below 2 of them."""
        sole = sole_value(differences)
        bounds = np.where(np.isnan(sole), self.mean + self.scale * scaled, sole)
        return np.where(self.valid.sum(axis=0) < 2, np.nan, bounds)

    def resampled(self, weights: Floats) -> tuple[Floats, Floats]:
        """Means and t [resample, test] of resamples that hold every unit as often as `weights` [resample, unit] say.

        A mean of no pair is NaN; a t of fewer than 2 is 0, which reaches nothing.
        """
        gaps = ~self.valid.all(axis=0)
        counts = np.repeat(weights.sum(axis=1, keepdims=True), gaps.size, axis=1)
        if gaps.any():
            counts[:, gaps] = weights @ self.valid[:, gaps].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            means = (weights @ self.values) / counts
            # Squares in float32, which costs half: a t is off by 1e-6 of itself at the most.
            squares = weights.astype(np.float32) @ np.square(self.values).astype(np.float32)
            variance = np.maximum(squares / counts - means * means, _NO_VARIANCE)
            t = np.where(counts >= 2, np.sqrt(counts - 1) * means / np.sqrt(variance), 0.0)
        return means, t


def bootstrap_max_t(
    differences: Floats,
    families: NDArray[np.int64],
    *,
    resamples: int,
    confidence: float,
    seed: int,
    beside: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> Bootstrap:
    """Studentised bootstrap test of every column's mean, with max-T over each family, and all their intervals.

    Units are resampled, all tests together, from the centred differences, which satisfy the null hypothesis and keep
    the dependence between tests; every resample is studentised by its own standard deviation, so that the skewness of
    the differences is in the reference distribution. Upper and lower tail are taken each at half the level, because
    skewed differences have unequal tails: p is twice the smaller tail's share. A test takes part with at least
    `INFORMATIVE` pairs off their most frequent value; the others have intervals and no p.

    Args:
        differences: float64 [unit, test]; NaN marks a missing pair.
        families: [test], the family of each as a number; its p_max_t is over that family alone.
        resamples: B; p = 2 min(tails), each tail (b + 1)/(B + 1).
        confidence: of each interval, and of all simultaneous ones together (Bonferroni over families); these are NaN
            where B is too small to have a resample so far out.
        seed: of the resamples, which do not depend on `block_bytes`, the working memory of a block of them.
        beside: families tested otherwise that the simultaneous intervals share their level with.
    Source:
        Westfall and Young (1993), Resampling-based multiple testing; Romano and Wolf (2005), Econometrica 73:1237–1282;
        equal tails and the studentised mean: Hall (1992), The bootstrap and Edgeworth expansion, §3.
    """
    n_units, n_tests = differences.shape
    tested = informative_pairs(differences) >= INFORMATIVE
    present = np.unique(families[tested])
    upper, lower = np.full((2, resamples, present.size), -np.inf)
    t, error, p, p_max_t = np.full((4, n_tests), np.nan)
    interval, simultaneous = np.full((2, 2, n_tests), np.nan)

    width = max(1, _COLUMN_BYTES // (8 * max(resamples, n_units)))
    rows = max(1, block_bytes // (8 * (2 * n_units + 4 * min(width, n_tests))))
    for start in range(0, n_tests, width):
        part = slice(start, start + width)
        columns = _Columns.of(differences[:, part])
        counts = columns.valid.sum(axis=0)
        spread = np.sqrt(np.square(columns.values).sum(axis=0) / np.maximum(counts, 1))
        error[part] = columns.scale * spread / np.sqrt(np.maximum(counts - 1, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            t[part] = np.where(tested[part], columns.mean / error[part], np.nan)
        members = [np.flatnonzero(tested[part] & (families[part] == family)) for family in present]
        reach = _TIE_T * (1 + np.abs(t[part]))
        above, below = np.zeros((2, counts.size), dtype=np.int64)
        means = np.empty((counts.size, resamples))
        row = 0
        for weights in _unit_weights(n_units, resamples, rows, seed):
            block = slice(row, row + len(weights))
            of_means, of_t = columns.resampled(weights)
            means[:, block] = of_means.T
            above += (of_t >= t[part] - reach).sum(axis=0)
            below += (of_t <= t[part] + reach).sum(axis=0)
            for family, of in enumerate(members):
                if of.size:
                    np.maximum(upper[block, family], of_t[:, of].max(axis=1), out=upper[block, family])
                    np.maximum(lower[block, family], -of_t[:, of].min(axis=1), out=lower[block, family])
            row += len(weights)
        p[part] = np.where(tested[part], _two_tails(above, below, resamples), np.nan)
        bounds = bca_bounds(means, columns.values, confidence)
        interval[:, part] = columns.bounds(bounds, differences[:, part])

    mean = defined_mean(differences, axis=0)
    together = max(present.size + beside, 1)
    tail = (1 - confidence) / 2 / together
    place = int(np.ceil((1 - tail) * (resamples + 1) - 1e-9)) - 1
    for family, (high, low) in enumerate(zip(np.sort(upper, axis=0).T, np.sort(lower, axis=0).T, strict=True)):
        of = np.flatnonzero(tested & (families == present[family]))
        reach = _TIE_T * (1 + np.abs(t[of]))
        above = resamples - np.searchsorted(high, t[of] - reach, side="left")
        below = resamples - np.searchsorted(low, -t[of] - reach, side="left")
        p_max_t[of] = _two_tails(above, below, resamples)
        if place < resamples:
            simultaneous[:, of] = mean[of] - high[place] * error[of], mean[of] + low[place] * error[of]
    return Bootstrap(p, p_max_t, interval, simultaneous, 2 / (resamples + 1), together)


def resampled_t(differences: Floats, *, resamples: int, seed: int, block_bytes: int = BLOCK_BYTES) -> Iterator[Floats]:
    """t of every test in every resample of the centred differences [unit, test]: [resample, test] in blocks.

    They are those that `bootstrap_max_t` takes the greatest of.
    """
    columns = _Columns.of(differences)
    rows = max(1, block_bytes // (8 * (2 * len(differences) + 4 * differences.shape[1])))
    for weights in _unit_weights(len(differences), resamples, rows, seed):
        yield columns.resampled(weights)[1]


def resampled_means(values: Floats, *, resamples: int, seed: int, block_bytes: int = BLOCK_BYTES) -> Floats:
    """Means of every column of values [unit, test] in every resample of the units, [resample, test].

    NaN where a resample holds none of a column's values.
    """
    columns = _Columns.of(values)
    rows = max(1, block_bytes // (8 * (2 * len(values) + 2 * values.shape[1])))
    means = _resampled_means(columns, _unit_weights(len(values), resamples, rows, seed), resamples)
    return columns.mean + columns.scale * means.T


def bootstrap_interval(
    differences: Floats,
    *,
    resamples: int,
    confidence: float,
    seed: int,
    groups: NDArray[np.int64] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Floats:
    """Interval of every column's mean: lower and upper bounds, [2, test].

    Without groups: units are resampled, the interval is BCa; of fewer than `FEWEST` pairs it is Student's. With groups:
    groups of the outermost level are resampled, within each the groups of the next level, and so on to the units; the
    interval is the percentile one, since the jackknife behind BCa's acceleration has no single unit to leave out.

    Args:
        differences: float64 [unit, test]; NaN marks a missing pair. A resample's mean is over the pairs it holds;
            a resample that holds none of a test's pairs is left out for that test.
        confidence: coverage, between 0 and 1.
        seed: of the resamples, which do not depend on `block_bytes`.
        groups: integer codes [unit, level], the outermost level first; codes of a level count within the level above.
        block_bytes: working memory of one block of resamples.
    Returns:
        The value itself where all differences of a test are equal, NaN with fewer than 2 pairs.
    Source:
        Efron (1987), JASA 82:171–185; nested resampling: Davison and Hinkley (1997), Bootstrap methods, §3.8.
    """
    n_units, n_tests = differences.shape
    interval = np.full((2, n_tests), np.nan)
    width = max(1, _COLUMN_BYTES // (8 * max(resamples, n_units)))
    rows = max(1, block_bytes // (8 * (2 * n_units + 2 * min(width, n_tests))))
    for start in range(0, n_tests, width):
        part = slice(start, start + width)
        columns = _Columns.of(differences[:, part])
        if groups is None:
            means = _resampled_means(columns, _unit_weights(n_units, resamples, rows, seed), resamples)
            bounds = bca_bounds(means, columns.values, confidence)
        else:
            means = _resampled_means(columns, _nested_weights(groups, resamples, seed), resamples)
            bounds = _quantiles(means, np.repeat(_tails(confidence), len(means), axis=1))
        interval[:, part] = columns.bounds(bounds, differences[:, part])
    return interval if groups is not None else with_few(interval, differences, confidence)


def with_few(interval: Floats, differences: Floats, confidence: float) -> Floats:
    """The interval [2, test], Student's where a test has fewer than `FEWEST` pairs: there BCa is too short."""
    few = (~np.isnan(differences)).sum(axis=0) < FEWEST
    return np.where(few, student_interval(differences, confidence), interval)


def student_interval(differences: Floats, confidence: float, tests: int = 1) -> Floats:
    """Student's interval [2, test] of the mean of each column of [unit, test]; of all of `tests` at once (Bonferroni).

    The value itself where all differences of a test are equal, NaN with fewer than 2.
    """
    columns = _Columns.of(differences)
    n = columns.valid.sum(axis=0)
    spread = np.sqrt(np.square(columns.values).sum(axis=0) / np.maximum(n - 1, 1))
    half = stats.t.isf((1 - confidence) / 2 / tests, np.maximum(n - 1, 1)) * spread / np.sqrt(np.maximum(n, 1))
    return columns.bounds(np.stack([-half, half]), differences)


def informative_pairs(differences: Floats) -> NDArray[np.int64]:
    """How many pairs of each test lie off their most frequent value, [test]; NaN is a missing pair.

    Values that lie within a hundredth of their range count as one.
    """
    off = np.zeros(differences.shape[1], dtype=np.int64)
    for test, ranked in enumerate(np.sort(differences, axis=0).T):
        known = ranked[~np.isnan(ranked)]
        if known.size:
            alike = known / 2 + (known[-1] / 2 - known[0] / 2) * _ALIKE  # halves, which do not overflow
            off[test] = known.size - (np.searchsorted(known / 2, alike, side="right") - np.arange(known.size)).max()
    return off


def bca_bounds(means: Floats, deviations: Floats, confidence: float) -> Floats:
    """Bias-corrected and accelerated bounds [2, test] from means [test, resample] of resampled deviations [unit, test].

    The jackknife means of a sample mean deviate from their average in proportion to −(d_i − d̄), so the acceleration
    has a closed form: a = Σ(d_i − d̄)³ / (6 (Σ(d_i − d̄)²)^1.5). Missing deviations are 0; a mean of no pair is NaN.
    """
    defined = np.maximum((~np.isnan(means)).sum(axis=1), 1)
    below = (means < -_TIE).sum(axis=1) + 0.5 * (np.abs(means) <= _TIE).sum(axis=1)
    bias = ndtri(np.clip(below / defined, 0.5 / defined, 1 - 0.5 / defined))
    squares = np.einsum("ij,ij->j", deviations, deviations)
    cubes = np.einsum("ij,ij,ij->j", deviations, deviations, deviations)
    acceleration = cubes / (6 * np.where(squares > 0, squares, 1) ** 1.5)

    shifted = bias + ndtri(_tails(confidence))
    # |a| ≤ 1/6, so the denominator can only vanish for resamples all on one side at a very high confidence.
    denominator = 1 - acceleration * shifted
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = ndtr(np.where(denominator > 0, bias + shifted / denominator, np.copysign(np.inf, shifted)))
    return _quantiles(means, levels)


def _two_tails(above: NDArray[Any], below: NDArray[Any], resamples: int) -> Floats:
    """Equal-tailed p from how many resamples reach the statistic from either side."""
    return np.asarray(np.minimum(2 * (1 + np.minimum(above, below)) / (resamples + 1), 1.0))


def _tails(confidence: float) -> Floats:
    """Levels [2, 1] of the lower and the upper bound."""
    return np.array([[(1 - confidence) / 2], [(1 + confidence) / 2]])


def _resampled_means(columns: _Columns, weights: Iterator[Floats], resamples: int) -> Floats:
    """Weighted means [test, resample] of the pairs that are there; NaN where the weights leave none."""
    complete = bool(columns.valid.all())
    present = columns.valid.astype(np.float64)
    means = np.empty((columns.values.shape[1], resamples))
    row = 0
    for block in weights:
        total = block.sum(axis=1, keepdims=True) if complete else block @ present
        with np.errstate(divide="ignore", invalid="ignore"):
            means[:, row : row + len(block)] = ((block @ columns.values) / total).T
        row += len(block)
    return means


def _quantiles(samples: Floats, levels: Floats) -> Floats:
    """Quantiles [level, test] of samples [test, resample] with linear interpolation; NaN samples are left out."""
    samples.sort(axis=1)  # in place, for they are many; NaN goes last
    defined = (~np.isnan(samples)).sum(axis=1)
    position = levels * np.maximum(defined - 1, 0)
    floor = np.floor(position).astype(np.intp)
    ceiling = np.minimum(floor + 1, np.maximum(defined - 1, 0))
    lower, upper = (np.take_along_axis(samples, place.T, axis=1).T for place in (floor, ceiling))
    result: Floats = lower + (upper - lower) * (position - floor)
    return result


def _unit_weights(n_units: int, resamples: int, rows: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn, [resample, unit] in blocks; the stream of draws does not depend on the blocks."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        drawn = (generator.random((size, n_units)) * n_units).astype(np.intp)
        drawn += np.arange(size)[:, None] * n_units
        yield np.bincount(drawn.ravel(), minlength=size * n_units).reshape(size, n_units).astype(np.float64)


def _nested_weights(groups: NDArray[np.int64], resamples: int, seed: int) -> Iterator[Floats]:
    """How often each unit is drawn when groups are drawn first, [resample, unit] in blocks."""
    streams = np.random.SeedSequence(seed).spawn(-(-resamples // _NESTED_BLOCK))
    for block, stream in enumerate(streams):
        size = min(_NESTED_BLOCK, resamples - block * _NESTED_BLOCK)
        weights = np.zeros((size, len(groups)))
        _draw(groups, np.arange(len(groups)), np.ones(size, dtype=np.int64), np.random.default_rng(stream), weights)
        yield weights


def _draw(
    groups: NDArray[np.int64],
    members: NDArray[np.intp],
    copies: NDArray[np.int64],
    generator: np.random.Generator,
    weights: Floats,
) -> None:
    """Add the draws of `copies` [resample] independent resamplings of these members to `weights`, level by level."""
    # A group drawn m times is resampled m times independently: its K members together get m·K draws, so one multinomial
    # per group and level does for all its copies.
    if groups.shape[1] == 0:
        shares = np.full(members.size, 1 / members.size)
        weights[:, members] += generator.multinomial(copies * members.size, shares)
        return
    codes = groups[members, 0]
    present = np.unique(codes)
    drawn = generator.multinomial(copies * present.size, np.full(present.size, 1 / present.size))
    for column, code in enumerate(present):
        _draw(groups[:, 1:], members[codes == code], drawn[:, column], generator, weights)
