"""Bootstrap intervals of means, for many tests at once: resampled means are a matrix product of counts and values."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from engine.statistics.arrays import BLOCK_BYTES, Floats, defined_mean, sole_value

_COLUMN_BYTES = 256 * 2**20
# Resamples drawn from one generator of the nested bootstrap; fixed, so that results do not depend on memory.
_NESTED_BLOCK = 128
# Means closer than this, in units of the greatest deviation, differ by rounding only.
_TIE = 1e-12


def bootstrap_interval(
    differences: Floats,
    *,
    resamples: int,
    confidence: float,
    seed: int,
    groups: NDArray[np.int64] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> tuple[Floats, Floats]:
    """Bootstrap interval of every column's mean.

    Without groups: units are resampled, the interval is BCa. With groups: groups of the outermost level are resampled,
    within each the groups of the next level, and so on to the units; the interval is the percentile one, since the
    jackknife behind BCa's acceleration has no single unit to leave out. The same resamples serve all columns.

    Args:
        differences: float64 [unit, test]; NaN marks a missing pair. A resample's mean is over the pairs it holds;
            a resample that holds none of a test's pairs is left out for that test.
        confidence: coverage, between 0 and 1.
        seed: of the resamples, which do not depend on `block_bytes`.
        groups: integer codes [unit, level], the outermost level first; codes of a level count within the level above.
        block_bytes: working memory of one block of resamples.
    Returns:
        Lower and upper bounds, [test]: the value itself where all differences of a test are equal, NaN with fewer
        than 2 pairs.
    Source:
        Efron (1987), JASA 82:171–185; nested resampling: Davison and Hinkley (1997), Bootstrap methods, §3.8.
    """
    n_units, n_tests = differences.shape
    low, high = np.full((2, n_tests), np.nan)
    width = max(1, _COLUMN_BYTES // (8 * max(resamples, n_units)))
    rows = max(1, block_bytes // (8 * (2 * n_units + 2 * min(width, n_tests))))
    for start in range(0, n_tests, width):
        columns = slice(start, start + width)
        d = differences[:, columns]
        valid = ~np.isnan(d)
        mean = defined_mean(d, axis=0)
        centred = np.where(valid, d - mean, 0)
        scale = np.abs(centred).max(axis=0)
        scale[scale == 0] = 1
        centred /= scale
        if groups is None:
            weights = _unit_weights(n_units, resamples, rows, seed)
            bounds = bca_bounds(_resampled_means(centred, valid, weights, resamples), centred, confidence)
        else:
            means = _resampled_means(centred, valid, _nested_weights(groups, resamples, seed), resamples)
            bounds = _quantiles(means, np.repeat(_tails(confidence), d.shape[1], axis=1))
        sole = sole_value(d)
        bounds = np.where(np.isnan(sole), mean + scale * bounds, sole)
        low[columns], high[columns] = np.where(valid.sum(axis=0) < 2, np.nan, bounds)
    return low, high


def bca_bounds(means: Floats, deviations: Floats, confidence: float) -> Floats:
    """Bias-corrected and accelerated bounds [2, test] from means [resample, test] of resampled deviations [unit, test].

    The jackknife means of a sample mean deviate from their average in proportion to −(d_i − d̄), so the acceleration
    has a closed form: a = Σ(d_i − d̄)³ / (6 (Σ(d_i − d̄)²)^1.5). Missing deviations are 0; a mean of no pair is NaN.
    """
    defined = np.maximum((~np.isnan(means)).sum(axis=0), 1)
    below = (means < -_TIE).sum(axis=0) + 0.5 * (np.abs(means) <= _TIE).sum(axis=0)
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


def _tails(confidence: float) -> Floats:
    """Levels [2, 1] of the lower and the upper bound."""
    return np.array([[(1 - confidence) / 2], [(1 + confidence) / 2]])


def _resampled_means(values: Floats, valid: NDArray[np.bool_], weights: Iterator[Floats], resamples: int) -> Floats:
    """Weighted means [resample, test] of the pairs that are there; NaN where the weights leave none."""
    complete = bool(valid.all())
    present = valid.astype(np.float64)
    means = np.empty((resamples, values.shape[1]))
    row = 0
    for block in weights:
        total = block.sum(axis=1, keepdims=True) if complete else block @ present
        with np.errstate(divide="ignore", invalid="ignore"):
            means[row : row + len(block)] = (block @ values) / total
        row += len(block)
    return means


def _quantiles(samples: Floats, levels: Floats) -> Floats:
    """Quantiles [level, test] of samples [resample, test] with linear interpolation; NaN samples are left out."""
    ranked = np.sort(samples, axis=0)  # NaN goes last
    defined = (~np.isnan(samples)).sum(axis=0)
    position = levels * np.maximum(defined - 1, 0)
    floor = np.floor(position).astype(np.intp)
    ceiling = np.minimum(floor + 1, np.maximum(defined - 1, 0))
    lower = np.take_along_axis(ranked, floor, axis=0)
    upper = np.take_along_axis(ranked, ceiling, axis=0)
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
