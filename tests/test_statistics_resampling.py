"""Sign flips and bootstraps: against enumeration, scipy, closed forms, and under simulated null hypotheses."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from engine.statistics import compare_paired
from engine.statistics.bootstrap import bca_bounds, bootstrap_interval
from engine.statistics.permutation import sign_flip

EIGHT = np.array([0.3, -0.1, 0.5, 0.2, 0.4, 0.15, -0.05, 0.6])


def enumerated(d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p and max-T p of d [unit, test] by scipy's t of every sign pattern, one at a time; NaN left out test by test."""

    def t(values: np.ndarray) -> np.ndarray:
        return np.abs(scipy.stats.ttest_1samp(values, 0, nan_policy="omit").statistic)

    observed = t(d) * (1 - 1e-9)
    patterns = [t(d * np.array(signs)[:, None]) for signs in itertools.product([1, -1], repeat=len(d))]
    each = np.array([pattern >= observed for pattern in patterns])
    family = np.array([pattern.max() >= observed for pattern in patterns])
    return each.mean(axis=0), family.mean(axis=0)


class TestSignFlip:
    def test_known_exact_p(self) -> None:
        flips = sign_flip(EIGHT[:, None])
        assert flips.patterns.exact
        assert flips.patterns.count == 256
        assert flips.patterns.floor == 2 / 256
        assert flips.p[0] == flips.p_max_t[0] == 0.0390625  # 10 of 256

    def test_exact_family_equals_enumeration_with_t(self) -> None:
        d = np.random.default_rng(4).normal([0.9, 0.5, 0.1, -0.6], 1, size=(8, 4))
        flips = sign_flip(d, permutations=255)
        p, p_max_t = enumerated(d)
        np.testing.assert_array_equal(flips.p, p)
        np.testing.assert_array_equal(flips.p_max_t, p_max_t)
        assert (p_max_t > p).any()

    def test_exact_family_of_unequal_counts_equals_enumeration_with_t(self) -> None:
        """With missing pairs the tests have different n, and the greatest r is no longer the greatest t."""
        d = np.random.default_rng(5).normal([1.5, 0.5, 1.0], 1, size=(8, 3))
        d[[0, 1], 0] = np.nan
        d[4, 2] = np.nan
        flips = sign_flip(d)
        p, p_max_t = enumerated(d)
        np.testing.assert_array_equal(flips.p, p)
        np.testing.assert_array_equal(flips.p_max_t, p_max_t)

    def test_enumerates_when_that_is_no_more_work(self) -> None:
        d = np.random.default_rng(6).normal(size=(8, 2))
        assert sign_flip(d, permutations=255).patterns.exact
        assert not sign_flip(d, permutations=254).patterns.exact
        d[0] = np.nan  # a unit without any value is no unit
        assert sign_flip(d, permutations=127).patterns.exact

    def test_random_p_counts_the_observed_pattern(self) -> None:
        flips = sign_flip(np.full((50, 1), 1.0) + np.random.default_rng(7).normal(size=(50, 1)) * 0.01, permutations=99)
        assert not flips.patterns.exact
        assert flips.p_max_t[0] == 1 / 100 == flips.patterns.floor

    def test_random_p_approaches_the_exact_one(self) -> None:
        d = np.random.default_rng(8).normal(0.4, 1, size=(14, 3))
        exact = sign_flip(d, permutations=2**14 - 1)
        drawn = sign_flip(d, permutations=16_000, seed=1)
        assert exact.patterns.exact
        assert not drawn.patterns.exact
        # Five standard errors of a share of 16,000.
        tolerance = 5 * np.sqrt(exact.p_max_t * (1 - exact.p_max_t) / 16_000) + 1e-4
        assert (np.abs(drawn.p_max_t - exact.p_max_t) < tolerance).all()

    @pytest.mark.parametrize("n", [10, 64, 65, 200])
    @pytest.mark.parametrize("missing", [0.0, 0.1])
    def test_blocks_do_not_change_the_result(self, n: int, missing: float) -> None:
        rng = np.random.default_rng(n)
        d = rng.normal(0.1, 1, size=(n, 5))
        d[rng.random(d.shape) < missing] = np.nan
        whole = sign_flip(d, permutations=1500)
        for block_bytes in (1, 50_000):  # one pattern a block; a few hundred
            blocks = sign_flip(d, permutations=1500, block_bytes=block_bytes)
            np.testing.assert_array_equal(blocks.p, whole.p)
            np.testing.assert_array_equal(blocks.p_max_t, whole.p_max_t)

    def test_ties_by_rounding_count_as_equal(self) -> None:
        """Tenths are not representable: patterns with the same sum differ in the last bit."""
        tenths = np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.7, -0.1])[:, None]
        assert sign_flip(tenths).p[0] == sign_flip(np.round(tenths * 10)).p[0]


class TestBootstrap:
    def test_bca_equals_scipy_on_the_same_resamples(self) -> None:
        d = np.random.default_rng(0).gamma(1.5, size=35)
        oracle = scipy.stats.bootstrap((d,), np.mean, n_resamples=3000, method="BCa", rng=np.random.default_rng(1))
        centred = (d - d.mean())[:, None]
        resampled = oracle.bootstrap_distribution[None] - d.mean()
        low, high = d.mean() + bca_bounds(resampled, centred, 0.95)[:, 0]
        assert low == pytest.approx(oracle.confidence_interval.low, rel=1e-12)
        assert high == pytest.approx(oracle.confidence_interval.high, rel=1e-12)

    @pytest.mark.parametrize("confidence", [0.9, 0.99])
    def test_interval_agrees_with_scipys_of_other_resamples(self, confidence: float) -> None:
        d = np.random.default_rng(2).gamma(1.5, size=(40, 2))
        low, high = bootstrap_interval(d, resamples=30_000, confidence=confidence, seed=0)
        oracle = scipy.stats.bootstrap(
            (d,), np.mean, n_resamples=30_000, method="BCa", confidence_level=confidence, rng=np.random.default_rng(3)
        ).confidence_interval
        # The Monte Carlo error of a 0.5 % quantile of 30,000 resamples is about .05 standard errors of the mean.
        error = d.std(axis=0) / np.sqrt(40)
        assert (np.abs(low - oracle.low) < 0.15 * error).all()
        assert (np.abs(high - oracle.high) < 0.15 * error).all()

    def test_skewed_differences_give_a_skewed_interval(self) -> None:
        d = np.random.default_rng(4).gamma(0.3, size=(60, 1))
        low, high = bootstrap_interval(d, resamples=4000, confidence=0.95, seed=0)
        assert high - d.mean() > 1.15 * (d.mean() - low)

    @pytest.mark.parametrize("missing", [0.0, 0.2])
    def test_blocks_do_not_change_the_result(self, missing: float) -> None:
        rng = np.random.default_rng(5)
        d = rng.normal(size=(37, 4))
        d[rng.random(d.shape) < missing] = np.nan
        whole = bootstrap_interval(d, resamples=300, confidence=0.95, seed=0)
        blocks = bootstrap_interval(d, resamples=300, confidence=0.95, seed=0, block_bytes=1)
        np.testing.assert_allclose(blocks, whole, rtol=1e-12)

    def test_a_test_with_few_of_many_pairs_has_an_interval(self) -> None:
        d = np.full((30, 2), np.nan)
        d[:, 0] = np.random.default_rng(6).normal(size=30)
        d[:2, 1] = 0.0, 1.0  # one resample in eight holds neither pair
        low, high = bootstrap_interval(d, resamples=500, confidence=0.95, seed=0)
        half = scipy.stats.t.ppf(0.975, 1) * 0.5  # Student's: two pairs are too few to resample
        assert (low[1], high[1]) == pytest.approx((0.5 - half, 0.5 + half))

    def test_groups_of_one_image_resample_like_images(self) -> None:
        d = np.random.default_rng(7).normal(size=(50, 1))
        low, high = bootstrap_interval(
            d, resamples=20_000, confidence=0.95, seed=0, groups=np.arange(50, dtype=np.int64)[:, None]
        )
        half = scipy.stats.norm.ppf(0.975) * d.std() / np.sqrt(50)
        assert high[0] - low[0] == pytest.approx(2 * half, rel=0.03)

    @pytest.mark.parametrize("levels", [1, 2])
    def test_variance_of_nested_resampling_is_the_closed_form(self, levels: int) -> None:
        """Balanced groups, resampled level by level: the mean's variance is Σ over levels of (biased) Var / count."""
        rng = np.random.default_rng(8)
        values = rng.normal(size=(6, 1, 1)) * 2 + rng.normal(size=(6, 5, 1)) + rng.normal(size=(6, 5, 4))
        outer, inner = np.indices((6, 5, 4))[:2]
        groups = np.stack([outer.ravel(), inner.ravel()][:levels], axis=1).astype(np.int64)
        variance = values.mean(axis=(1, 2)).var() / 6
        if levels == 2:
            variance += values.mean(axis=2).var(axis=1).mean() / 30 + values.var(axis=2).mean() / 120
        else:
            variance += values.reshape(6, 20).var(axis=1).mean() / 120
        # At 68.27 % an interval of a nearly normal distribution is two standard deviations wide.
        low, high = bootstrap_interval(
            values.reshape(-1, 1), resamples=40_000, confidence=0.6827, seed=0, groups=groups
        )
        assert (high - low)[0] / 2 == pytest.approx(np.sqrt(variance), rel=0.04)

    def test_groups_widen_the_interval_of_grouped_images_only(self) -> None:
        rng = np.random.default_rng(9)
        labels = np.repeat(["a", "b", "c", "d", "e"], 20)
        d = np.stack([np.repeat(rng.normal(size=5), 20), np.zeros(100)], axis=1) + 0.3 * rng.normal(size=(100, 2))
        plain = compare_paired(np.zeros_like(d), d, permutations=9)
        nested = compare_paired(np.zeros_like(d), d, permutations=9, groups=labels)
        ratio = (nested.ci_high - nested.ci_low) / (plain.ci_high - plain.ci_low)
        assert float(ratio[0]) > 2
        assert 0.6 < float(ratio[1]) < 2
        assert nested.attrs["interval"] == "nested percentile bootstrap"
        assert (nested.p_max_t == plain.p_max_t).all()
