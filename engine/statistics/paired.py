"""Paired comparison of two arrays over images: effect sizes, intervals and tests, one of each per trailing element."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import special, stats

from engine.statistics.arrays import Floats, defined_mean, sole_value
from engine.statistics.bootstrap import (
    FEWEST,
    INFORMATIVE,
    bootstrap_interval,
    bootstrap_max_t,
    student_interval,
    with_few,
)
from engine.statistics.multiplicity import benjamini_hochberg, holm, holm_over_families
from engine.statistics.permutation import FEWEST_PAIRS, sign_flip

Unit = Literal["images", "runs"]
"""What the pairs of a comparison are: images are resampled, training runs (or classes) flipped."""


@dataclass(frozen=True)
class PairedColumns:
    """A comparison, test by test: `columns` as `compare_paired` describes them, and how they were made."""

    columns: dict[str, NDArray[Any]]  # name -> [test]
    family_size: int  # tests that were made
    resampling: str  # what p_resampled and p_max_t come from
    interval: str  # what ci_low and ci_high are
    p_floor: float  # least p_max_t

    def results(self) -> dict[str, Any]:
        """The tests as columns of results (`results.build`).

        `ci` and `ci_simultaneous` [test, 2], `p` of the t-test, and under `degenerate` why a test lacks a number, or
        None.
        """
        columns: dict[str, Any] = dict(self.columns)
        for name, suffix in (("ci", ""), ("ci_simultaneous", "_simultaneous")):
            columns[name] = np.stack([columns[f"ci_{side}{suffix}"] for side in ("low", "high")], axis=1)
        columns["p"] = columns["p_t"]
        reasons = (columns[name] for name in ("n", "t", "dz", "gz", "p_max_t"))
        columns["degenerate"] = list(map(_why_degenerate, *reasons))
        return columns


def compare_paired(
    a: Any,
    b: Any,
    unit: Unit = "images",
    metric: str | None = None,
    permutations: int = 9999,
    seed: int = 0,
    groups: Any = None,
    confidence: float = 0.95,
    equivalence: Any = None,
) -> xr.Dataset:
    """Compare two conditions measured on the same images; b − a is tested in every element of the trailing axes.

    From 20 images on, images are resampled: p comes from the studentised bootstrap with max-T over each family and Holm
    over the families (`bootstrap_max_t`), which holds the level for skewed differences, too. Fewer units, training runs
    and differences that are −1, 0 and 1 flip signs (`sign_flip`), which is exact for few and asks for symmetry. The
    attribute `resampling` says which. With images as units the numbers speak of these two checkpoints, not of
    fine-tuning; with runs, of runs like these on these images.

    A pair with a NaN or an infinity on either side is left out of its own test only, and counted in `missing`.
    Degenerate tests keep their meaning and touch no other test:

    - all differences exactly 0: t 0, every p 1, dz and gz NaN, intervals [0, 0];
    - all differences equal and not 0: t, dz and gz ±inf, p_t 0, the interval that one value; signs are flipped as they
      come, but no bootstrap tells a variance: p_max_t NaN;
    - fewer than 10 pairs off the most frequent value, where values within a hundredth of the range are one (for flips:
      fewer pairs than 6 and than other tests have): no p_max_t, and no part in a family's;
    - fewer than 2 pairs: everything but `difference`, `n` and `missing` is NaN.

    Args:
        a, b: NumPy or xarray, [image or run, ...], of equal shape and in one unit, any. An xarray input keeps its
            trailing dimensions and coordinates; its leading dimension is the one called `image`, else the first.
        unit: what the leading axis holds: "images", or "runs", each a mean over the same images.
        metric: the coordinate (or trailing axis) whose labels are the families of `p_max_t`, where images are
            resampled; None: all tests are one family. Sign flips always have one.
        permutations: resamples, and sign flips; all 2^n are enumerated when that is not more.
        seed: of flips and resamples.
        groups: labels [image] or [image, level], the outermost level first (such as class): `ci` is then the percentile
            interval of the nested bootstrap. The p-values do not use them.
        confidence: coverage of the intervals.
        equivalence: bounds of the TOST equivalence test in the unit of the input, set before looking: a positive number
            or an array of the trailing shape, NaN where there is none. None: no such test, `p_tost` is NaN.
    Returns:
        Dataset over the trailing axes: `difference` (mean of b − a), its interval `ci_low`, `ci_high` (BCa; Student's
        below 20 pairs), `ci_low_simultaneous`, `ci_high_simultaneous` (all tests' at once, from the resamples of
        p_max_t; where signs are flipped Student's with Bonferroni's level), `sd` (standard deviation of the
        differences) in the unit of the input; `skewness` of the differences; `dz` (difference / sd), `gz` (dz with
        Hedges' correction, NaN below 3 pairs), `t`, `n`, `missing`; `p_t` (paired t-test), `p_wilcoxon` (signed ranks,
        zeros dropped; exact up to 13 pairs, and up to 50 without ties and zeros, else the normal approximation
        corrected for ties), `p_resampled` (bootstrap or flips, this test alone), `p_max_t` (the same, family-wise over
        all tests), `p_holm` and `p_bh` (both of p_t), `p_tost` (that the difference lies beyond the bound) and
        `p_tost_holm`. All tests of a difference are two-sided. The attributes say how it was computed; `p_floor` is the
        least value that p_max_t can take.
    Raises:
        ValueError: shapes, dimensions or coordinates of a and b differ; fewer than 2 images; groups of another length;
            no such metric axis; a parameter out of range.
    Source:
        dz, Hedges' J: Hedges (1981), doi:10.3102/10769986006002107; resampling: see `bootstrap_max_t`, `sign_flip`.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1; found {permutations}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, for example 0.95; found {confidence}")
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be one of {', '.join(get_args(Unit))}; found {unit!r}")
    first, second, dims, coords = _aligned(a, b)
    if first.shape[0] < 2:
        raise ValueError(f"a paired comparison needs at least 2 pairs; found {first.shape[0]}: give more images")
    shape = first.shape[1:]
    compared = compare_columns(
        first.reshape(len(first), -1),
        second.reshape(len(second), -1),
        families=_families(metric, dims, shape, coords),
        unit=unit,
        permutations=permutations,
        seed=seed,
        groups=None if groups is None else _group_codes(groups, first.shape[0]),
        confidence=confidence,
        bounds=_equivalence_bounds(equivalence, shape),
    )
    return xr.Dataset(
        {name: (dims, values.reshape(shape)) for name, values in compared.columns.items()},
        coords=coords,
        attrs={
            "unit": unit,
            "family_size": compared.family_size,
            "resampling": compared.resampling,
            "permutations": permutations,
            "p_floor": compared.p_floor,
            "interval": compared.interval,
            "confidence": confidence,
            "seed": seed,
        },
    )


def compare_columns(
    a: Floats,
    b: Floats,
    *,
    families: NDArray[Any] | None = None,
    unit: Unit = "images",
    permutations: int,
    seed: int,
    confidence: float,
    groups: NDArray[np.int64] | None = None,
    bounds: Floats | None = None,
) -> PairedColumns:
    """`compare_paired` of arrays [unit, test]; `families` [test] labels the family of each."""
    with np.errstate(invalid="ignore", over="ignore"):  # inf − inf is a missing pair, not an accident
        d = b - a
    d[~np.isfinite(d)] = np.nan
    flip_seed, bootstrap_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2, np.uint64))
    resampled: dict[str, Any] = {"resamples": permutations, "confidence": confidence, "seed": bootstrap_seed}
    flipped: dict[str, Any] = {"permutations": permutations, "seed": flip_seed}
    if unit == "runs" or (~np.isnan(d)).any(axis=1).sum() < FEWEST:
        flips = sign_flip(d, **flipped)
        p, p_max_t, floor = flips.p, flips.p_max_t, flips.patterns.floor
        made = int(np.isfinite(p).sum())
        together = np.where(np.isfinite(p), student_interval(d, confidence, max(made, 1)), np.nan)
        how = f"{'exact' if flips.patterns.exact else 'random'} sign flips, max-T"
        interval, name = student_interval(d, confidence), "Student's t"
    else:
        family = np.zeros(d.shape[1], int) if families is None else np.unique(families, return_inverse=True)[1]
        # Of outcomes that are 0 or 1 the null hypothesis is symmetry, and few of them differ: these flip signs.
        signs = ((d == 0) | (np.abs(d) == 1) | np.isnan(d)).all(axis=0) & (np.abs(d) == 1).any(axis=0)
        family = 2 * family.reshape(-1) + signs
        flipping = np.unique(family[signs])
        drawn = bootstrap_max_t(np.where(signs, np.nan, d), family, beside=flipping.size, **resampled)
        p, p_max_t, together = drawn.p, drawn.p_max_t, drawn.simultaneous
        interval, name = with_few(drawn.interval, d, confidence), f"BCa bootstrap; Student's t below {FEWEST} pairs"
        how, floor = "studentised bootstrap, each tail at half the level", drawn.floor
        if signs.any():
            of = np.flatnonzero(signs)
            interval[:, of] = bootstrap_interval(d[:, of], **resampled)
            for code in flipping:
                members = np.flatnonzero(family == code)
                flips = sign_flip(d[:, members], **flipped)
                p[members], p_max_t[members] = flips.p, flips.p_max_t
                floor = min(floor, flips.patterns.floor)
                together[:, members] = student_interval(d[:, members], confidence, drawn.families * members.size)
            together[:, np.isnan(p)] = np.nan
            how += "; sign flips of differences that are −1, 0 and 1"
        p_max_t = holm_over_families(p_max_t, family)
        made = len(np.unique(family[np.isfinite(p_max_t)]))
        floor = min(1.0, floor * max(made, 1))
        how += "; max-T" + (f" within each of {made} families, Holm over them" if made > 1 else "")
    if groups is not None:
        interval, name = bootstrap_interval(d, **resampled, groups=groups), "nested percentile bootstrap"
    result = _summary(d)
    nothing = (result["difference"] == 0) & (result["sd"] == 0)
    p[nothing] = p_max_t[nothing] = 1
    together[:, nothing] = 0
    result |= {"ci_low": interval[0], "ci_high": interval[1]}
    result |= {"ci_low_simultaneous": together[0], "ci_high_simultaneous": together[1]}
    result |= {"p_wilcoxon": _wilcoxon(d), "p_resampled": p, "p_max_t": p_max_t}
    result |= {"p_holm": holm(result["p_t"]), "p_bh": benjamini_hochberg(result["p_t"])}
    bounds = np.full(d.shape[1], np.nan) if bounds is None else bounds
    result["p_tost"] = tost(result["difference"], result["sd"], result["n"], bounds)
    result["p_tost_holm"] = holm(result["p_tost"])
    return PairedColumns(result, int(np.isfinite(p_max_t).sum()), how, name, floor)


def _families(
    metric: str | None, dims: tuple[Hashable, ...], shape: tuple[int, ...], coords: Mapping[Hashable, Any]
) -> NDArray[Any] | None:
    """The label of each test's family, [test]."""
    if metric is None:
        return None
    along: tuple[Hashable, ...] = coords[metric].dims if metric in coords else (metric,) if metric in dims else ()
    if len(along) != 1:
        raise ValueError(
            f"metric is {metric!r}; expected a trailing axis or its coordinate (there are {', '.join(map(str, dims))})"
        )
    axis = dims.index(along[0])
    labels = np.asarray(coords[metric].values) if metric in coords else np.arange(shape[axis])
    return np.broadcast_to(labels.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape).reshape(-1)


def _why_degenerate(n: int, t: float, dz: float, gz: float, p_max_t: float) -> str | None:
    if n < 2:
        return f"{n} complete pairs: a test needs at least 2"
    if np.isinf(t):
        return "all differences are equal and not 0: t, dz and gz are infinite"
    if np.isnan(p_max_t):
        if n < FEWEST_PAIRS:
            return f"fewer than {FEWEST_PAIRS} complete pairs"
        return f"fewer than {INFORMATIVE} pairs differ from the most frequent value"
    if np.isnan(dz):
        return "all differences are exactly 0: dz and gz are not defined"
    return "2 pairs: gz is not defined" if np.isnan(gz) else None


def _equivalence_bounds(equivalence: Any, shape: tuple[int, ...]) -> Floats:
    """One bound per test, [test]; NaN for none."""
    bounds = np.asarray(np.nan if equivalence is None else equivalence, dtype=np.float64)
    if bounds.shape not in ((), shape):
        raise ValueError(f"equivalence has the shape {bounds.shape}; expected one number or the trailing shape {shape}")
    if (bounds <= 0).any() or np.isinf(bounds).any():
        raise ValueError("equivalence bounds must be positive numbers, in the unit of the values; found others")
    return np.broadcast_to(bounds, shape).reshape(-1)


def _aligned(a: Any, b: Any) -> tuple[Floats, Floats, tuple[Hashable, ...], dict[Hashable, Any]]:
    """Both inputs as float64 with the pairs leading, and names and coordinates of the trailing axes."""
    if isinstance(a, xr.DataArray) and isinstance(b, xr.DataArray):
        if set(a.dims) != set(b.dims):
            raise ValueError(f"a has the dimensions {a.dims} and b has {b.dims}; expected the same")
        try:
            b = xr.align(a, b.transpose(*a.dims), join="exact")[1]
        except ValueError as error:
            raise ValueError(
                f"a and b are not the same images, layers or heads: their coordinates differ ({error})"
            ) from error
    labelled = [x for x in (a, b) if isinstance(x, xr.DataArray)]
    if labelled and labelled[0].dims:
        dims = labelled[0].dims
        pairs = "image" if "image" in dims else dims[0]
        a, b = (x.transpose(pairs, ...) if isinstance(x, xr.DataArray) else x for x in (a, b))
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has the shape {first.shape} and b has {second.shape}; expected the same, [image, ...]")
    if first.ndim == 0:
        raise ValueError("a and b are single numbers; expected arrays [image, ...]")
    if not labelled:
        return first, second, tuple(f"axis_{i}" for i in range(1, first.ndim)), {}
    # A label that differs, such as the condition's name, is true of one side only: it cannot label the difference.
    sides = [x for x in (a, b) if isinstance(x, xr.DataArray)]
    kept = {
        name: coord.variable  # without the other labels that a coordinate carries
        for name, coord in sides[0].coords.items()
        if pairs not in coord.dims
        and all(name in side.coords and side.coords[name].variable.equals(coord.variable) for side in sides)
    }
    return first, second, sides[0].dims[1:], kept


def _group_codes(groups: Any, n_images: int) -> NDArray[np.int64]:
    """Labels [image] or [image, level] as integer codes [image, level]."""
    labels = np.asarray(groups)
    labels = labels[:, None] if labels.ndim == 1 else labels
    if labels.ndim != 2 or labels.shape[0] != n_images or labels.shape[1] == 0:
        raise ValueError(
            f"groups has the shape {np.shape(groups)}; expected [image] or [image, level] with {n_images} images"
        )
    codes = [np.unique(level, return_inverse=True)[1].reshape(-1) for level in labels.T]
    return np.stack(codes, axis=1).astype(np.int64)


def _summary(d: Floats) -> dict[str, NDArray[Any]]:
    """Mean, effect sizes and the t-test of every column of d [image, test]."""
    valid = ~np.isnan(d)
    n = valid.sum(axis=0)
    enough = n >= 2
    sole = sole_value(d)
    constant = ~np.isnan(sole)

    mean = np.where(constant, sole, defined_mean(d, axis=0))  # a mean of equal numbers can round off them
    deviation = np.where(valid, d - mean, 0)
    greatest = np.abs(deviation).max(axis=0)
    deviation /= np.where(greatest > 0, greatest, 1)  # squares of small numbers vanish, and a vanished sd is no zero
    sd = greatest * np.sqrt(np.einsum("ij,ij->j", deviation, deviation) / np.maximum(n - 1, 1))
    sd[constant] = 0
    moments = [np.einsum("ij->j", deviation**power) / np.maximum(n, 1) for power in (2, 3)]
    skewness = np.where((n >= 3) & ~constant, moments[1] / np.where(moments[0] > 0, moments[0], 1) ** 1.5, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # sd 0: 0/0 is NaN and c/0 is ±inf, as documented
        dz = np.where(enough, mean / sd, np.nan)
    t = np.where(enough & constant & (mean == 0), 0, dz * np.sqrt(n))
    p_t = 2 * stats.t.sf(np.abs(t), np.maximum(n - 1, 1))
    return {
        "difference": mean,
        "sd": np.where(enough, sd, np.nan),
        "skewness": skewness,
        "dz": dz,
        "gz": dz * _hedges_correction(n),
        "t": t,
        "n": n.astype(np.int64),
        "missing": (len(d) - n).astype(np.int64),
        "p_t": p_t,
    }


def tost(mean: Floats, sd: Floats, n: NDArray[np.int64], bound: Floats) -> Floats:
    """p-values of two one-sided paired t-tests (TOST) of |mean difference| ≥ bound: the greater of the two.

    p ≤ α shows, at level α, that the mean difference lies within ±bound; it is the same as the 1 − 2α t interval lying
    within. A large p shows nothing, least of all a difference. NaN without a bound (NaN) or below 2 pairs. Differences
    that are all equal leave no doubt: 0 within the bound, 1 beyond it, 0.5 exactly on it.

    Source:
        Schuirmann (1987), Journal of Pharmacokinetics and Biopharmaceutics 15:657–680.
    """
    error = sd / np.sqrt(np.maximum(n, 1))
    nearest = bound - np.abs(mean)  # of the two bounds the nearer one decides
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t = np.where(nearest == 0, 0.0, nearest / error)
    p = stats.t.sf(t, np.maximum(n - 1, 1))
    return np.where((n >= 2) & np.isfinite(bound), p, np.nan)


def _hedges_correction(n: NDArray[np.int64]) -> Floats:
    """Hedges' J = Γ(m/2) / (√(m/2) Γ((m−1)/2)) with m = n − 1; NaN where m < 2, where dz has no expectation."""
    m = np.maximum(n - 1, 2) / 2
    j = np.exp(special.gammaln(m) - special.gammaln(m - 0.5)) / np.sqrt(m)
    return np.where(n >= 3, j, np.nan)


def _wilcoxon(d: Floats) -> Floats:
    """Two-sided Wilcoxon signed-rank p-values of the columns of d [image, test]; zero differences are dropped."""
    # 1 where there is no difference, or one, which is as extreme with either sign.
    p = np.where((~np.isnan(d)).sum(axis=0) >= 2, 1.0, np.nan)
    ranked = np.flatnonzero((np.nan_to_num(d) != 0).sum(axis=0) >= 2)
    # Up to 50 pairs scipy chooses between exact and approximate by the ties of all that it is given: one at a time.
    for columns in [ranked] if ranked.size and len(d) > 50 else ranked[:, None]:
        p[columns] = stats.wilcoxon(d[:, columns], correction=False, axis=0, nan_policy="omit").pvalue
    return p
