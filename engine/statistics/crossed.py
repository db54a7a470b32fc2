"""Inference over training runs and images at once: both are samples, and every run sees the same images.

d[run, image] = μ + run effect + image effect + residual, all three random. More images narrow the image term alone,
more runs the run term alone: images redrawn within each run, or held fixed, make the mean look surer than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from engine.statistics.arrays import Floats, sole_value
from engine.statistics.multiplicity import holm

MOST_PRIOR_DF = 6.0
"""Degrees of freedom that a family may lend to each of its tests. Its tests are correlated, so that they tell less of
their spread than as many independent ones, and what limma infers from them is too much."""

_ROUNDING = 1e-12  # in units of the greatest deviation: runs that are copies differ by less
RUNS_PLANNED = (*range(2, 21), 25, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000)
IMAGES_PLANNED = (*(factor * 10**power for power in range(1, 6) for factor in (1, 2, 3, 5)), 1_000_000)
"""The numbers of runs and images among which a plan looks for the least that suffices."""


@dataclass(frozen=True)
class CrossedTable:
    """Mean squares of differences crossed over runs and images, [test], in units of `scale`²; NaN where undefined.

    Their expectations are, with S runs and n images, σ_residual² + S σ_image², σ_residual² + n σ_run² and σ_residual².
    """

    difference: Floats  # mean over runs and images, in the unit of the differences
    runs: NDArray[np.int64]
    images: NDArray[np.int64]  # those of which every run has a value
    image: Floats
    run: Floats
    residual: Floats
    scale: Floats  # so that squares neither overflow nor vanish

    @property
    def defined(self) -> NDArray[np.bool_]:
        """Where there are 2 runs of 2 images whose differences are not all equal."""
        result: NDArray[np.bool_] = self.image + self.run + self.residual > 0
        return result

    def components(self) -> tuple[Floats, Floats, Floats]:
        """Standard deviations of images, runs and residuals in the unit of the differences; 0 where estimated below."""
        image = np.sqrt(np.maximum(self.image - self.residual, 0) / self.runs)
        run = np.sqrt(np.maximum(self.run - self.residual, 0) / self.images)
        return self.scale * image, self.scale * run, self.scale * np.sqrt(self.residual)

    def shares(self) -> Floats:
        """What images, runs and residuals contribute to the variance of the mean, [3, test], sum 1."""
        parts = np.stack(
            [
                np.maximum(self.image - self.residual, 0),
                np.maximum(self.run - self.residual, 0),
                np.where(np.isfinite(self.difference), self.residual, np.nan),
            ]
        )
        with np.errstate(invalid="ignore"):  # 0/0 of equal differences
            result: Floats = parts / parts.sum(axis=0)
        return result


def crossed_table(differences: Floats) -> CrossedTable:
    """Two-way random-effects analysis of variance without replication of differences [run, image, test].

    An image of which a run has no value (NaN) leaves its test: all runs are compared on the same images.

    Source:
        Searle, Casella and McCulloch (1992), Variance components, §4.4.
    """
    complete = np.isfinite(differences).all(axis=0)
    d = np.where(complete, differences, np.nan)
    runs, images = len(d), complete.sum(axis=0)
    count = np.maximum(images, 1)
    sole = sole_value(d.reshape(-1, d.shape[2]))
    d = np.where(complete, d, 0)
    by_run = d.sum(axis=1) / count
    mean = np.where(np.isnan(sole), by_run.mean(axis=0), sole)
    d = np.where(complete, d - mean, 0)
    scale = np.abs(d).max(axis=(0, 1), initial=0)
    scale[scale == 0] = 1
    d /= scale
    of_image, of_run = d.mean(axis=0), d.sum(axis=1) / count
    d -= np.where(complete, of_image + of_run[:, None], 0)
    sums = np.stack(
        [
            runs * np.einsum("ij,ij->j", of_image, of_image),
            images * np.einsum("ij,ij->j", of_run, of_run),
            np.einsum("sij,sij->j", d, d),
        ]
    )
    sums[(sums < _ROUNDING**2) | ~np.isnan(sole)] = 0
    df = np.array([images - 1, np.full_like(images, runs - 1), (images - 1) * (runs - 1)])
    with np.errstate(divide="ignore", invalid="ignore"):
        image, run, residual = np.where(df[2] >= 1, sums / df, np.nan)
    return CrossedTable(
        np.where(images > 0, mean, np.nan),
        np.full(len(images), runs),
        images,
        image,
        run,
        residual,
        scale,
    )


def join(tables: Sequence[CrossedTable]) -> CrossedTable:
    """The tests of several tables, one after the other."""
    return CrossedTable(*(np.concatenate([getattr(t, field.name) for t in tables]) for field in fields(CrossedTable)))


def crossed_interval(table: CrossedTable, confidence: float) -> tuple[Floats, Floats, Floats]:
    """Bounds of the mean over runs and images like these, and their degrees of freedom, [test].

    Student's interval with the variance (MS_image + MS_run − MS_residual)/(nS), in which no component is below 0, and
    Satterthwaite's degrees of freedom, at least those of the rarer of runs and images. The value itself where all
    differences are equal.

    Source:
        Satterthwaite (1946), Biometrics Bulletin 2:110–114; the same quasi-F as a test: Clark (1973), Journal of Verbal
        Learning and Verbal Behavior 12:335–359.
    """
    runs, images = table.runs - 1.0, table.images - 1.0
    total = _total(table.image, table.run, table.residual)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = table.image**2 / images + table.run**2 / runs + table.residual**2 / (images * runs)
        df = np.maximum(total**2 / spread, np.minimum(runs, images))
        half = special.stdtrit(df, (1 + confidence) / 2) * table.scale * np.sqrt(total / (table.images * table.runs))
    half = np.where(total == 0, 0, half)
    return table.difference - half, table.difference + half, df


@dataclass(frozen=True)
class CrossedP:
    """t, its degrees of freedom, p and Holm's adjusted p, [test]; what the family lent, see `crossed_test`."""

    t: Floats
    df: Floats
    p: Floats
    p_holm: Floats
    sd_run: Floats  # standard deviation of run effects, shrunk as in the test
    prior_df: float
    prior_ratio: float


def crossed_test(table: CrossedTable) -> CrossedP:
    """Whether the mean over runs and images like these is 0, for all tests of the table as one family (Holm).

    A few runs say little of how much runs differ: the ratio MS_run/MS_image has S − 1 degrees of freedom, and by
    accident it is near 0 in some test of a large family. So the ratios of a family are shrunk towards each other by
    limma's empirical Bayes: with d0 prior degrees of freedom and prior ratio r0, (d0 r0 + (S − 1) r)/(d0 + S − 1). t
    has S − 1 + d0 min(1, r0/r) degrees of freedom, at most n − 1: a test whose runs differ more than those of its
    family borrows less from it. d0 is limma's estimate at the upper 95 % limit of how much the ratios scatter, at most
    `MOST_PRIOR_DF`; with one test it is 0.

    Run effects are taken to be normal: with few runs nothing in them can show that they are not. All differences
    exactly 0 give t 0 and p 1; all equal and not 0 an infinite t and p 0; without 2 runs of 2 images there is no p.

    Source:
        Smyth (2004), Statistical Applications in Genetics and Molecular Biology 3:3, `fitFDist`; outlying tests borrow
        less: after Phipson et al. (2016), Annals of Applied Statistics 10:946–963.
    """
    t, df, sd_run = np.full((3, len(table.difference)), np.nan)
    equal = table.image + table.run + table.residual == 0
    with np.errstate(divide="ignore"):
        t[equal] = np.where(table.difference[equal] == 0, 0, np.copysign(np.inf, table.difference[equal]))
    df[equal], sd_run[equal] = np.minimum(table.runs, table.images)[equal] - 1, 0
    prior = 0.0, 1.0
    if (at := table.defined).any():
        runs, images, residual = table.runs[at], table.images[at], table.residual[at]
        moderated = _moderated(table.image[at], table.run[at], residual, runs, images)
        df[at] = moderated.df
        t[at] = table.difference[at] / table.scale[at] / np.sqrt(moderated.variance)
        sd_run[at] = table.scale[at] * np.sqrt(np.maximum(moderated.run - residual, 0) / images)
        prior = float(moderated.prior_df), float(moderated.prior_ratio)
    p = 2 * special.stdtr(df, -np.abs(t))
    return CrossedP(t, df, p, holm(p), sd_run, *prior)


def planned_power(
    effect: Any,
    sd_image: Any,
    sd_run: Any,
    sd_residual: Any,
    *,
    runs: int,
    images: Any,
    alpha: float = 0.05,
    correlation: Any = 0.0,
    draws: int = 400,
    seed: int = 0,
) -> Floats:
    """How likely `crossed_test` finds each effect of a family, [test], with this many runs and images.

    Mean squares are drawn from their χ² distributions, each draw is tested as `crossed_test` does, and the mean, which
    is normal and independent of them, is integrated out. The level of each test is α divided by the number of tests,
    so that where several effects are there, Holm finds somewhat more.

    Args:
        effect, sd_image, sd_run, sd_residual: mean difference and standard deviations of the components, [test], all
            tests of the family, in one unit each; numbers where they are the same for all.
        runs, images: of the study that is planned, at least 2 each; images may differ between tests, [test].
        alpha: family-wise level.
        correlation: of run effects between tests, a number or [test, test]; 0 is the careful side.
        draws, seed: of the mean squares; with 400 the power is right within about .02.
    Raises:
        ValueError: fewer than 2 runs or images, a negative standard deviation, or alpha out of range.
        numpy.linalg.LinAlgError: no run effects can be correlated in this way.
    """
    if runs < 2 or np.min(images) < 2:
        raise ValueError(f"a plan takes at least 2 runs and 2 images; found {runs} and {np.min(images)}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha of a plan lies between 0 and 1; found {alpha}")
    shift, *sds = (
        np.atleast_1d(np.asarray(x, float)) for x in np.broadcast_arrays(effect, sd_image, sd_run, sd_residual)
    )
    if any((sd < 0).any() for sd in sds):
        raise ValueError("standard deviations of a plan must not be negative")
    scale = np.max(sds, axis=0)
    scale[scale == 0] = 1
    shift, of_image, of_run, residual = shift / scale, *((sd / scale) ** 2 for sd in sds)
    generator, size = np.random.default_rng(seed), (draws, shift.size)

    def chi_square(df: Any) -> Floats:
        return generator.chisquare(df, size)

    own = chi_square(runs - 1)
    if np.any(correlation):
        mix = np.linalg.cholesky(np.where(np.eye(shift.size) == 1, 1.0, correlation)).T
        own = np.zeros(size)
        for _ in range(runs - 1):
            own += (generator.normal(size=size) @ mix) ** 2
    run_square = (residual + images * of_run) * own / (runs - 1)
    image_square = (residual + runs * of_image) * chi_square(images - 1) / (images - 1)
    residual_square = residual * chi_square((images - 1) * (runs - 1)) / ((images - 1) * (runs - 1))

    moderated = _moderated(image_square, run_square, residual_square, np.full(shift.size, runs), images)
    limit = -special.stdtrit(moderated.df, alpha / shift.size / 2) * np.sqrt(moderated.variance)
    error = np.sqrt(of_image / images + of_run / runs + residual / (images * runs))
    result: Floats = (special.ndtr((shift - limit) / error) + special.ndtr((-shift - limit) / error)).mean(axis=0)
    return result


def runs_needed(power: float, images: Any, **plan: Any) -> Floats:
    """The least of `RUNS_PLANNED` runs that find each effect with this power, [test]; infinite where none does.

    `plan` is what `planned_power` takes: where the images' share of the variance is too large, no number suffices.
    """
    return _least(power, RUNS_PLANNED, lambda runs: planned_power(runs=runs, images=images, **plan))


def images_needed(power: float, runs: int, **plan: Any) -> Floats:
    """The least of `IMAGES_PLANNED` images that find each effect, [test]; infinite where the runs alone are too few."""
    return _least(power, IMAGES_PLANNED, lambda images: planned_power(runs=runs, images=images, **plan))


def _least(power: float, sizes: Sequence[int], reached: Callable[[int], Floats]) -> Floats:
    """The least of the sizes, which ascend, by which each test has `reached` the power; infinite where none does."""
    possible = reached(sizes[-1]) >= power
    least = np.where(possible, float(sizes[-1]), np.inf)
    for size in sizes[:-1]:
        if not (wanted := least == sizes[-1]).any():
            break
        least[wanted & (reached(size) >= power)] = size
    return least


def _total(image: Floats, run: Floats, residual: Floats) -> Floats:
    """nS times the variance of the mean, no component of it below 0."""
    result: Floats = np.maximum(image, residual) + np.maximum(run, residual) - residual
    return result


class _Moderated(NamedTuple):
    variance: Floats  # of the mean, [..., test]
    df: Floats  # [..., test]
    run: Floats  # mean square of runs, shrunk, [..., test]
    prior_df: Floats  # [...]
    prior_ratio: Floats  # [...]


def _moderated(image: Floats, run: Floats, residual: Floats, runs: NDArray[np.int64], images: Any) -> _Moderated:
    """What `crossed_test` makes of mean squares [..., test] of a family; `runs` [test]."""
    own = runs - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(image > 0, run / image, np.inf)
        prior_df, prior = _prior(ratio, own)
        weight, centre = prior_df[..., None], prior[..., None]
        borrowed = weight * np.where(ratio > centre, centre / ratio, 1)
        shrunk = np.where(image > 0, (weight * centre * image + own * run) / (weight + own), run)
    variance = _total(image, shrunk, residual) / (images * runs)
    return _Moderated(variance, np.minimum(own + borrowed, images - 1), shrunk, prior_df, prior)


def _prior(ratio: Floats, df: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """limma's fitFDist of ratios [..., test] ~ r0 F(df, d0): d0 (see `crossed_test`) and r0, [...]."""
    usable = ((ratio > 0) & (ratio < np.inf)).reshape(-1, ratio.shape[-1]).all(axis=0)
    ratio, half = ratio[..., usable], df[usable] / 2
    tests = ratio.shape[-1]
    if tests < 2:
        return np.zeros(ratio.shape[:-1]), np.ones(ratio.shape[:-1])
    ratio = np.maximum(ratio, 1e-5 * np.median(ratio, axis=-1, keepdims=True))
    logarithm = np.log(ratio) - special.digamma(half) + np.log(half)
    centre, spread = logarithm.mean(axis=-1), logarithm.var(axis=-1, ddof=1)
    spread = spread * (tests - 1) / stats.chi2.ppf(0.05, tests - 1) - special.polygamma(1, half).mean()
    half = _inverse_trigamma(np.maximum(spread, 1e-6))
    shift = np.where(spread > 0, special.digamma(half) - np.log(half), 0)
    return np.minimum(2 * half, MOST_PRIOR_DF), np.exp(centre + shift)


def _inverse_trigamma(value: Floats) -> Floats:
    """y with trigamma(y) = value, by Newton's method on 1/trigamma, which is convex (Smyth 2004, appendix)."""
    y = 0.5 + 1 / value
    for _ in range(20):
        trigamma = special.polygamma(1, y)
        y = y + trigamma * (1 - trigamma / value) / special.polygamma(2, y)
    return np.asarray(y)
