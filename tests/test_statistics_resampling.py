"""Sign flips and bootstraps: against enumeration, scipy, closed forms, and under simulated null hypotheses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr

from engine.statistics import bootstrap, compare_paired
from engine.statistics.bootstrap import (
    _unit_weights,
    bca_bounds,
    bootstrap_interval,
    bootstrap_max_t,
    student_interval,
)
from engine.statistics.multiplicity import holm_over_families
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
    def test_without_any_pair_there_is_no_p(self) -> None:
        flips = sign_flip(np.full((8, 2), np.nan))
        assert np.isnan([flips.p, flips.p_max_t]).all()
        assert flips.patterns.floor == 1

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

    def test_below_twenty_pairs_it_is_students(self) -> None:
        d = np.random.default_rng(5).exponential(size=(40, 1))
        for pairs in (2, 5, 19):
            known = np.where(np.arange(40)[:, None] < pairs, d, np.nan)
            interval = scipy.stats.t.interval(0.9, pairs - 1, d[:pairs].mean(), scipy.stats.sem(d[:pairs]))
            found = bootstrap_interval(known, resamples=99, confidence=0.9, seed=0)
            np.testing.assert_allclose(found, interval, rtol=1e-12)
        low, high = bootstrap_interval(d[:20], resamples=999, confidence=0.9, seed=0)[:, 0]
        assert high - d[:20].mean() > 1.1 * (d[:20].mean() - low)  # skewed as the differences are

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


def looped(
    d: np.ndarray, families: np.ndarray, *, resamples: int, confidence: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """p [test], p_max_t [test] and simultaneous intervals [2, test], one resample and one test at a time."""
    columns = [column[~np.isnan(column)] for column in d.T]
    observed = np.array([scipy.stats.ttest_1samp(column, 0).statistic for column in columns])
    drawn = np.concatenate(list(_unit_weights(len(d), resamples, 7, seed))).astype(int)
    t = np.empty((resamples, len(columns)))
    for row, counts in enumerate(drawn):
        for test, column in enumerate(d.T):
            resample = np.repeat(column - columns[test].mean(), counts)
            t[row, test] = scipy.stats.ttest_1samp(resample[~np.isnan(resample)], 0).statistic

    def two_tails(high: np.ndarray, low: np.ndarray) -> np.ndarray:
        reached = np.minimum((high >= observed).sum(axis=0), (low <= observed).sum(axis=0))
        return np.minimum(2 * (1 + reached) / (resamples + 1), 1)

    high, low = (np.empty_like(t) for _ in range(2))
    for family in np.unique(families):
        of = families == family
        high[:, of], low[:, of] = t[:, of].max(axis=1, keepdims=True), t[:, of].min(axis=1, keepdims=True)
    tail = (1 - confidence) / 2 / np.unique(families).size
    outermost = resamples + 1 - round((1 - tail) * (resamples + 1))  # counted from the greatest
    mean, error = (np.array([f(column) for column in columns]) for f in (np.mean, scipy.stats.sem))
    ends = np.sort(high, axis=0)[-outermost], np.sort(low, axis=0)[outermost - 1]
    return two_tails(t, t), two_tails(high, low), np.stack([mean - end * error for end in ends])


def skewed_differences(images: int, tests: int, missing: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(images)
    d = rng.exponential(size=(images, 1)) + rng.exponential(size=(images, tests)) - np.linspace(1.2, 2.6, tests)
    d[rng.random(d.shape) < missing] = np.nan
    return d


class TestBootstrapMaxT:
    FAMILIES = np.array([4, 0, 4, 4, 0, 7])  # in any order, of three, two and one

    @pytest.mark.parametrize("missing", [0.0, 0.25])
    def test_equals_a_loop_over_the_same_resamples(self, missing: float) -> None:
        d = skewed_differences(30, 6, missing)
        settings: dict[str, Any] = {"resamples": 299, "confidence": 0.9, "seed": 5}
        found = bootstrap_max_t(d, self.FAMILIES, **settings)
        p, p_max_t, simultaneous = looped(d, self.FAMILIES, **settings)
        np.testing.assert_array_equal(found.p, p)
        np.testing.assert_array_equal(found.p_max_t, p_max_t)
        np.testing.assert_allclose(found.simultaneous, simultaneous, rtol=1e-5)
        assert len(np.unique(p_max_t)) > 3  # not all at the least or the greatest p
        assert found.floor == 2 / 300

    @pytest.mark.parametrize("missing", [0.0, 0.25])
    def test_blocks_do_not_change_the_result(self, missing: float) -> None:
        d = skewed_differences(37, 6, missing)
        settings: dict[str, Any] = {"resamples": 300, "confidence": 0.95, "seed": 0}
        whole = bootstrap_max_t(d, self.FAMILIES, **settings)
        for block_bytes in (1, 20_000):  # one resample a block; some tens
            blocks = bootstrap_max_t(d, self.FAMILIES, **settings, block_bytes=block_bytes)
            np.testing.assert_array_equal(blocks.p, whole.p)
            np.testing.assert_array_equal(blocks.p_max_t, whole.p_max_t)
            np.testing.assert_allclose(blocks.interval, whole.interval, rtol=1e-9)
            np.testing.assert_allclose(blocks.simultaneous, whole.simultaneous, rtol=1e-5)

    def test_columns_a_part_at_a_time_do_not_change_the_result(self, monkeypatch: pytest.MonkeyPatch) -> None:
        d = skewed_differences(37, 6, 0.1)
        settings: dict[str, Any] = {"resamples": 300, "confidence": 0.95, "seed": 0}
        whole = bootstrap_max_t(d, self.FAMILIES, **settings)
        monkeypatch.setattr(bootstrap, "_COLUMN_BYTES", 2 * 8 * 300)  # two columns
        parts = bootstrap_max_t(d, self.FAMILIES, **settings)
        np.testing.assert_array_equal(parts.p_max_t, whole.p_max_t)
        np.testing.assert_allclose(parts.simultaneous, whole.simultaneous, rtol=1e-5)
        np.testing.assert_allclose(parts.interval, whole.interval, rtol=1e-9)

    def test_the_unit_of_a_metric_does_not_matter(self) -> None:
        d = skewed_differences(40, 6, 0.1)
        scales = 2.0 ** np.array([0, 400, -400, 3, -3, 1])
        plain, scaled = (
            bootstrap_max_t(values, self.FAMILIES, resamples=300, confidence=0.9, seed=0) for values in (d, d * scales)
        )
        np.testing.assert_array_equal(scaled.p_max_t, plain.p_max_t)
        np.testing.assert_array_equal(scaled.simultaneous, plain.simultaneous * scales)
        np.testing.assert_allclose(scaled.interval, plain.interval * scales, rtol=1e-12)

    def test_the_other_direction_has_the_same_p_and_mirrored_bounds(self) -> None:
        d = skewed_differences(40, 6)
        there, back = (
            bootstrap_max_t(values, self.FAMILIES, resamples=599, confidence=0.9, seed=0) for values in (d, -d)
        )
        np.testing.assert_array_equal(back.p_max_t, there.p_max_t)
        np.testing.assert_allclose(back.simultaneous, -there.simultaneous[::-1], rtol=1e-5)

    @pytest.mark.parametrize("rounding", [0.0, 1e-12, 1e-4])
    @pytest.mark.parametrize("informative", [0, 1, 2, 9])
    def test_a_test_of_few_informative_pairs_takes_no_part(self, informative: int, rounding: float) -> None:
        rng = np.random.default_rng(informative)
        rounded = rng.normal(0, rounding, (200, 1)) * (informative > 0)
        d = np.concatenate([skewed_differences(200, 3), rounded], axis=1)
        d[:informative, 3] = rng.normal(3, 1, informative)
        families = np.zeros(4, dtype=np.int64)
        beside = bootstrap_max_t(d, families, resamples=300, confidence=0.95, seed=0)
        alone = bootstrap_max_t(d[:, :3], families[:3], resamples=300, confidence=0.95, seed=0)
        assert np.isnan([beside.p[3], beside.p_max_t[3], *beside.simultaneous[:, 3]]).all()
        np.testing.assert_array_equal(beside.p_max_t[:3], alone.p_max_t)
        np.testing.assert_allclose(beside.simultaneous[:, :3], alone.simultaneous, rtol=1e-5)
        d[:10, 3] = rng.normal(3, 1, 10)
        assert np.isfinite(bootstrap_max_t(d, families, resamples=300, confidence=0.95, seed=0).p_max_t[3])

    def test_two_equal_differences_do_not_hide_an_effect(self) -> None:
        d = np.full((200, 2), np.nan)
        d[:, 0] = np.random.default_rng(0).normal(1, 1, 200)
        d[:2, 1] = 0.3
        found = compare_paired(np.zeros_like(d), d, permutations=999)
        assert float(found.p_max_t[0]) == found.attrs["p_floor"] == 2 / 1000
        assert np.isnan(found.p_max_t[1])

    def test_outcomes_that_are_0_or_1_flip_signs(self) -> None:
        rng = np.random.default_rng(1)
        a = np.concatenate([rng.normal(size=(60, 2)), rng.random((60, 2)) < 0.4], axis=1)
        b = np.concatenate([rng.normal(0.4, 1, (60, 2)), rng.random((60, 2)) < 0.6], axis=1)
        metric = xr.Variable("metric", ["mass", "mass", "hit", "hit"])
        first, second = (xr.DataArray(x, dims=("image", "metric"), coords={"metric": metric}) for x in (a, b))
        found = compare_paired(first, second, metric="metric", permutations=599)
        flips, draws = (int(word) for word in np.random.SeedSequence(0).generate_state(2, np.uint64))
        hits = sign_flip((b - a)[:, 2:], permutations=599, seed=flips)
        families = np.array([0, 0, 1, 1])
        masses = bootstrap_max_t((b - a)[:, :2], families[:2], resamples=599, confidence=0.95, seed=draws)
        expected = holm_over_families(np.concatenate([masses.p_max_t, hits.p_max_t]), families)
        np.testing.assert_array_equal(found.p_max_t, expected)
        np.testing.assert_array_equal(found.p_resampled, np.concatenate([masses.p, hits.p]))
        assert "sign flips of differences that are −1, 0 and 1" in found.attrs["resampling"]
        # Each of the two families has half of what the intervals may miss; the two hits share theirs.
        together = np.stack([found.ci_low_simultaneous, found.ci_high_simultaneous])
        half = bootstrap_max_t((b - a)[:, :2], families[:2], resamples=599, confidence=0.975, seed=draws)
        np.testing.assert_array_equal(together[:, :2], half.simultaneous)
        np.testing.assert_allclose(together[:, 2:], student_interval((b - a)[:, 2:], 0.975, 2), rtol=1e-12)

    def test_intervals_at_once_are_of_the_tests_that_are_made(self) -> None:
        d = skewed_differences(12, 3)
        d[5:, 2] = np.nan  # too few to flip
        found = compare_paired(np.zeros_like(d), d)
        together = np.stack([found.ci_low_simultaneous, found.ci_high_simultaneous])
        np.testing.assert_allclose(together[:, :2], student_interval(d[:, :2], 0.95, 2), rtol=1e-12)
        assert np.isnan([*together[:, 2], found.p_max_t[2]]).all()
        assert np.isfinite(found.ci_low[2])

    def test_bounds_too_far_out_for_the_resamples_are_nan(self) -> None:
        d = skewed_differences(30, 6)
        for resamples, defined in ((118, False), (119, True)):  # of three families each tail is 1/120
            found = bootstrap_max_t(d, self.FAMILIES, resamples=resamples, confidence=0.95, seed=0)
            assert np.isfinite(found.simultaneous).all() == defined
            assert np.isfinite(found.p_max_t).all()

    def test_a_single_test_agrees_with_the_t_test_of_normal_differences(self) -> None:
        d = np.random.default_rng(2).normal([0.0, 0.1, 0.2, 0.25], 1, size=(150, 4))
        found = bootstrap_max_t(d, np.arange(4), resamples=20_000, confidence=0.95, seed=0)
        np.testing.assert_allclose(found.p, scipy.stats.ttest_1samp(d, 0).pvalue, atol=0.03)
        np.testing.assert_array_equal(found.p, found.p_max_t)
