"""Equivalence, power, clusters along layers and Moran's inference, each against a package that others rely on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from statsmodels.stats.power import TTestPower
from statsmodels.stats.weightstats import ttost_paired

from engine.statistics import (
    Settings,
    analyse,
    compare_paired,
    layer_clusters,
    minimum_detectable_effect,
    morans_inference,
)
from engine.statistics.bootstrap import _unit_weights
from engine.statistics.clusters import cluster_test
from engine.statistics.conditions import check_bounds, check_primary
from engine.statistics.permutation import sign_flip
from train.errors import InputError


@pytest.fixture(scope="module")
def mne() -> Iterator[Any]:
    import mne as module  # a second of imports, for the tests that need it

    level = module.set_log_level("ERROR", return_old_level=True)
    yield module
    module.set_log_level(level)


def known() -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(1, 41)
    a = np.sin(k) + 0.3 * np.cos(2.3 * k)
    return a, a + 0.15 + 0.4 * np.sin(1.7 * k)


class TestEquivalence:
    def test_known_value(self) -> None:
        result = compare_paired(*known(), permutations=9, equivalence=0.3)
        assert float(result.p_tost) == pytest.approx(0.0009649695830812, rel=1e-10)
        assert float(result.p_tost_holm) == float(result.p_tost)

    def test_differences_of_any_size_leave_no_warning(self) -> None:
        a, b = known()
        assert float(compare_paired(a * 1e-310, b * 1e-310, permutations=9, equivalence=1e3).p_tost) == 0

    @pytest.mark.parametrize("bound", [0.05, 0.2, 0.5])
    def test_equals_statsmodels(self, bound: float) -> None:
        rng = np.random.default_rng(1)
        a, b = rng.normal(size=(2, 25, 4)) + np.linspace(-0.3, 0.3, 4)
        result = compare_paired(a, b, permutations=9, equivalence=bound)
        for column in range(4):
            expected = ttost_paired(b[:, column], a[:, column], -bound, bound)[0]
            assert float(result.p_tost[column]) == pytest.approx(expected, rel=1e-9)

    def test_is_the_90_percent_interval_within_the_bounds(self) -> None:
        rng = np.random.default_rng(2)
        for shift in np.linspace(-0.4, 0.4, 21):
            d = shift + rng.normal(size=60)
            interval = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.90)
            p = float(compare_paired(np.zeros(60), d, permutations=9, equivalence=0.3).p_tost)
            assert (p <= 0.05) == (interval.low >= -0.3 and interval.high <= 0.3)

    def test_differences_without_spread_leave_no_doubt(self) -> None:
        d = np.array([0.0, 0.1, 0.25, -0.3]) * np.ones((8, 1))
        result = compare_paired(np.zeros_like(d), d, permutations=9, equivalence=0.25)
        assert result.p_tost.values.tolist() == [0, 0, 0.5, 1]

    def test_bounds_of_some_tests_only_are_a_family_of_their_own(self) -> None:
        rng = np.random.default_rng(3)
        d = rng.normal(size=(30, 3))
        d[2:, 2] = np.nan
        few = compare_paired(np.zeros_like(d), d, permutations=9, equivalence=[0.8, np.nan, 0.8])
        assert math.isnan(few.p_tost[1])
        assert math.isnan(few.p_tost_holm[1])
        assert float(few.p_tost_holm[0]) == pytest.approx(min(1, 2 * float(few.p_tost[[0, 2]].min())))

    def test_bounds_of_a_study_are_checked_by_name(self) -> None:
        check_bounds({"distance": 0.1}, ["distance", "entropy"])
        with pytest.raises(InputError, match=r"'distnce', .* metrics measured .*; did you mean distance\?"):
            check_bounds({"distnce": 0.1}, ["distance"])
        with pytest.raises(InputError, match="distance is -1"):
            check_bounds({"distance": -1.0}, ["distance"])
        with pytest.raises(InputError, match=r"'entropi', .* metrics measured .*; did you mean entropy\?"):
            check_primary(["entropi"], ["distance", "entropy"])

    @pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, [1.0, 2.0]])
    def test_bad_bounds_are_refused(self, bound: Any) -> None:
        with pytest.raises(ValueError, match="equivalence"):
            compare_paired(np.zeros((5, 3)), np.ones((5, 3)), equivalence=bound)


class TestMinimumDetectableEffect:
    @pytest.mark.parametrize("n", [3, 5, 10, 40, 1340, 2343])
    @pytest.mark.parametrize("family_size", [1, 432])
    def test_equals_statsmodels(self, n: int, family_size: int) -> None:
        found = minimum_detectable_effect(n, family_size=family_size)
        # One-sided, for statsmodels' other tail is NaN in places, as scipy's is; it adds less than 1e-8.
        power = TTestPower().power(found, n, 0.025 / family_size, alternative="larger")
        assert power == pytest.approx(0.8, abs=1e-6)

    @pytest.mark.parametrize(
        ("n", "family_size", "dz"),
        [(3, 1, 3.26), (5, 1, 1.68), (10, 1, 1.00), (1340, 1, 0.077), (1340, 432, 0.128), (2343, 432, 0.097)],
    )
    def test_known_values(self, n: int, family_size: int, dz: float) -> None:
        assert minimum_detectable_effect(n, family_size=family_size) == pytest.approx(dz, abs=0.006)

    def test_an_effect_of_that_size_is_found_that_often(self) -> None:
        dz = minimum_detectable_effect(20, alpha=0.05, power=0.7)
        d = dz + np.random.default_rng(0).normal(size=(20, 20_000))
        found = scipy.stats.ttest_1samp(d, 0).pvalue <= 0.05
        assert found.mean() == pytest.approx(0.7, abs=0.01)

    def test_bad_settings_are_refused(self) -> None:
        assert math.isnan(minimum_detectable_effect(1))
        for wrong in ({"power": 0.01}, {"alpha": 0.0}, {"family_size": 0}):
            with pytest.raises(ValueError, match=r"expected|at least"):
                minimum_detectable_effect(10, **wrong)  # type: ignore[arg-type]


def autocorrelated(units: int, layers: int, seed: int, lines: int = 1) -> np.ndarray:
    """Differences [unit, line, layer] whose neighbouring layers are correlated at .7."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=(units, lines, layers))
    for layer in range(1, layers):
        d[..., layer] = 0.7 * d[..., layer - 1] + np.sqrt(1 - 0.49) * d[..., layer]
    return d


class TestClusters:
    @pytest.mark.parametrize("spread", [0.0, 1e-9, 3e-8, 1e-7, 1e-6])
    def test_differences_that_are_almost_equal_have_the_least_p(self, spread: float) -> None:
        for seed, images in itertools.product(range(4), (6, 11)):
            d = 1 + spread * np.random.default_rng(seed).normal(size=(images, 1, 3))
            assert [stretch.p for stretch in cluster_test(d)] == [2 / 2**images], (seed, images)

    @pytest.mark.parametrize("seed", range(6))
    def test_equals_mne_when_every_pattern_is_enumerated(self, mne: Any, seed: int) -> None:
        d = autocorrelated(9, 14, seed)[:, 0] + 0.7 * np.sin(np.arange(14) / 2)
        threshold = scipy.stats.t.isf(0.05, 8)
        t, masks, p, _ = mne.stats.permutation_cluster_1samp_test(
            d, threshold=threshold, n_permutations="all", tail=0, out_type="mask", seed=0
        )
        found = cluster_test(d[:, None], cluster_alpha=0.10, permutations=2**9)
        assert len(found) == len(masks) > 0
        expected = {
            mask[0].start: (mask[0].stop - 1, t[mask].sum(), value) for mask, value in zip(masks, p, strict=True)
        }
        for cluster in found:
            last, mass, value = expected[cluster.first]
            assert cluster.last == last
            assert cluster.mass == pytest.approx(mass, rel=1e-9)
            # mne counts the observed pattern and half of the others, which is the same share of all patterns.
            assert cluster.p == pytest.approx(value, abs=1 / 256)
            assert cluster.floor == 2 / 2**9

    def test_agrees_with_mne_on_random_patterns(self, mne: Any) -> None:
        d = autocorrelated(19, 20, 7)[:, 0] + 0.3 * (np.arange(20) > 9)
        _, masks, p, _ = mne.stats.permutation_cluster_1samp_test(
            d, threshold=scipy.stats.t.isf(0.025, 18), n_permutations=5000, tail=0, out_type="mask", seed=0
        )
        found = cluster_test(d[:, None], permutations=5000)
        assert [cluster.first for cluster in found] == [mask[0].start for mask in masks]
        # Two draws of 5,000: standard error of a difference of p near .5 is .01.
        np.testing.assert_allclose([cluster.p for cluster in found], p, atol=0.04)

    def test_equals_enumeration_with_missing_pairs_and_several_lines(self) -> None:
        d = autocorrelated(8, 6, 1, lines=3) + 0.9
        d[2, 0, 3] = d[5, 1, :] = np.nan
        d[1:, 2, 2] = np.nan  # one pair: no t, so no cluster crosses this layer

        def masses(values: np.ndarray) -> dict[tuple[int, int], float]:
            found = {}
            for line in range(3):
                with np.errstate(invalid="ignore", divide="ignore"):
                    t = scipy.stats.ttest_1samp(values[:, line], 0, nan_policy="omit").statistic
                n = np.isfinite(values[:, line]).sum(axis=0)
                t = np.where((n >= 2) & (np.abs(np.nan_to_num(np.asarray(t))) > scipy.stats.t.isf(0.025, n - 1)), t, 0)
                for sign, run in itertools.groupby(range(6), key=lambda layer: np.sign(t[layer])):
                    layers = list(run)
                    if sign:
                        found[line, layers[0]] = float(np.sum(t[layers]))
            return found

        observed = masses(d)
        null = [
            max(map(abs, masses(d * np.array(signs)[:, None, None]).values()), default=0.0)
            for signs in itertools.product([1, -1], repeat=8)
        ]
        found = cluster_test(d, permutations=256)
        assert {(c.line, c.first): pytest.approx(c.mass) for c in found} == observed
        for cluster in found:
            reached = np.mean([greatest >= abs(cluster.mass) * (1 - 1e-9) for greatest in null])
            assert cluster.p == pytest.approx(reached)
        assert not any(c.line == 2 and c.first <= 2 <= c.last for c in found)

    def test_blocks_do_not_change_the_result(self) -> None:
        d = autocorrelated(30, 12, 3, lines=4) + 0.4
        assert cluster_test(d, permutations=499, block_bytes=1) == cluster_test(d, permutations=499)

    def test_opposite_signs_are_two_clusters(self) -> None:
        d = 0.1 * np.random.default_rng(0).normal(size=(20, 1, 6)) + np.array([1, 1, 1, -1, -1, -1.0])
        found = cluster_test(d, permutations=499)
        assert [(c.first, c.last, np.sign(c.mass)) for c in found] == [(0, 2, 1), (3, 5, -1)]
        assert {c.p for c in found} == {2 / 500}

    def test_resampled_masses_equal_a_plain_loop_over_the_same_resamples(self) -> None:
        """Of 20 units on: each direction against the greatest mass of its own in resamples of centred differences."""
        d = np.exp(autocorrelated(30, 6, 11, lines=2)) - 1.3
        d[:3, 0, 2] = np.nan
        found = cluster_test(d, permutations=60, seed=4)
        centred = d - np.nanmean(d, axis=0)
        greatest = np.zeros((2, 60))
        for row, weights in enumerate(np.concatenate(list(_unit_weights(30, 60, 60, 4)))):
            drawn = np.repeat(centred, weights.astype(int), axis=0)
            n = np.isfinite(drawn).sum(axis=0)
            t = np.sqrt(n - 1) * np.nanmean(drawn, axis=0) / np.nanstd(drawn, axis=0)
            t[np.abs(t) <= scipy.stats.t.isf(0.025, np.isfinite(d).sum(axis=0) - 1)] = 0
            for line in range(2):
                for _, run in itertools.groupby(t[line], key=np.sign):
                    mass = sum(run)
                    greatest[int(mass < 0), row] = max(greatest[int(mass < 0), row], abs(mass))
        assert found
        for cluster in found:
            reached = (greatest[int(cluster.mass < 0)] >= abs(cluster.mass) * (1 - 1e-9)).sum()
            assert cluster.p == pytest.approx(min(1, 2 * (reached + 1) / 61))
            assert cluster.floor == 2 / 61

    def test_skewed_differences_do_not_make_clusters(self) -> None:
        """Sign flips find one in a sixth of such studies."""
        rng, studies = np.random.default_rng(8), 150
        rejected = 0
        for study in range(studies):
            d = np.exp(rng.normal(size=(20, 1, 1)) * 0.9 + 0.4 * rng.normal(size=(20, 2, 6))) - np.exp(0.485)
            rejected += any(cluster.p <= 0.05 for cluster in cluster_test(d, permutations=99, seed=study))
        assert rejected <= scipy.stats.binom.isf(0.005, studies, 0.05)

    def test_nothing_to_cluster(self) -> None:
        assert cluster_test(np.zeros((10, 2, 4))) == []
        assert cluster_test(np.full((10, 2, 4), np.nan)) == []

    def test_differences_without_spread_are_null_in_json_with_their_reason(self) -> None:
        table = small_table()
        table["entropy"][{"condition": 1}] = table["entropy"][{"condition": 0}] + 1
        (cluster,) = layer_clusters(table, Settings(permutations=99))
        assert (cluster.layers, cluster.mass, cluster.p) == ((0, 1, 3), None, 0.01)
        assert "equal" in cluster.degenerate

    def test_entries_name_layers_unit_and_family(self) -> None:
        clusters = layer_clusters(small_table(shift=2.0), Settings(permutations=99))
        (cluster,) = clusters
        assert cluster.layers == (0, 1, 3)  # as the model numbers them
        assert cluster.direction == "higher"
        assert cluster.unit_of_inference == "image, given these checkpoints"
        assert "clusters along the layers" in cluster.family
        assert (cluster.n, cluster.family_size, cluster.p) == (10, 1, cluster.p_floor)

    def test_the_level_holds_with_correlated_layers(self) -> None:
        studies = 400
        rejected = 0
        for study in range(studies):
            found = cluster_test(autocorrelated(25, 12, 1000 + study, lines=2), permutations=199, seed=study)
            rejected += any(cluster.p <= 0.05 for cluster in found)
        least, greatest = scipy.stats.binom.interval(0.99, studies, 0.05)
        assert least <= rejected <= greatest, f"{rejected} of {studies}"


def small_table(shift: float = 0.0) -> xr.Dataset:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 5, size=(1, 1, 10, 3, 2)) + np.zeros((2, 1, 1, 1, 1))
    values = values + shift * np.arange(2).reshape(2, 1, 1, 1, 1) * rng.uniform(0.9, 1.1, size=values.shape)
    dims = ("condition", "seed", "image", "layer", "head")
    coords = {
        "condition": ["baseline", "full"],
        "seed": [0],
        "layer": [0, 1, 3],
        "head": [0, 1],
        "site": ("layer", [f"blocks.{i}.attn" for i in (0, 1, 3)]),
    }
    return xr.Dataset({"entropy": (dims, values, {"units": "nat"})}, coords)


def test_max_t_equals_mnes_on_the_three_column_example(mne: Any) -> None:
    d = np.array([0.3, -0.1, 0.5, 0.2, 0.4, 0.15, -0.05, 0.6])
    columns = np.stack([d, d[::-1] - 0.1, np.roll(d, 3) - 0.22], axis=1)
    _, p, _ = mne.stats.permutation_t_test(columns, n_permutations="all", tail=0)
    ours = sign_flip(columns, permutations=255).p_max_t
    np.testing.assert_allclose(ours, p, atol=1 / 127)  # mne leaves the observed pattern out: a share of 127, not 128


def test_max_t_agrees_with_mnes_on_random_patterns(mne: Any) -> None:
    rng = np.random.default_rng(5)
    d = rng.normal(size=(50, 1)) * 0.7 + rng.normal(size=(50, 8)) + np.linspace(0, 0.6, 8)
    _, p, _ = mne.stats.permutation_t_test(d, n_permutations=5000, tail=0, seed=1)
    np.testing.assert_allclose(sign_flip(d, permutations=5000).p_max_t, p, atol=0.04)


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    """A smooth field whose Moran's I and variances are known, and two maps of noise."""
    i, j = np.indices((14, 14))
    field = np.sin(i / 2) * np.cos(j / 3) + 0.01 * ((7 * i + 13 * j) % 11)
    noise = np.random.default_rng(0).gamma(0.5, size=(2, 14, 14))
    return np.stack([field, *noise])


class TestMoransInference:
    def test_known_values(self, maps: np.ndarray) -> None:
        found = morans_inference(maps[0], permutations=0)
        assert float(found.morans_i) == pytest.approx(0.935882019404389, rel=1e-13)
        assert found.expectation == pytest.approx(-0.00512820512820513, rel=1e-14)
        assert found.variance_normality == pytest.approx(0.00269314588601, rel=1e-11)
        assert float(found.variance_randomisation) == pytest.approx(0.00270207388456, rel=1e-11)
        assert math.isnan(found.p_permutation)
        three = morans_inference(np.arange(1.0, 10).reshape(3, 3), permutations=0)
        assert (three.variance_normality, float(three.variance_randomisation)) == pytest.approx((0.053125, 0.0596875))

    @pytest.mark.parametrize("shape", [(14, 14), (3, 7), (1, 9)])
    def test_equals_esda(self, shape: tuple[int, int]) -> None:
        import esda
        import libpysal

        weights = libpysal.weights.lat2W(*shape)
        for values in np.random.default_rng(3).gamma(0.7, size=(4, *shape)):
            oracle = esda.Moran(values.ravel(), weights, transformation="B", permutations=0, two_tailed=True)
            found = morans_inference(values, permutations=0)
            assert float(found.morans_i) == pytest.approx(oracle.I, rel=1e-11)
            assert found.expectation == pytest.approx(oracle.EI, rel=1e-12)
            assert found.variance_normality == pytest.approx(oracle.VI_norm, rel=1e-10)
            assert float(found.variance_randomisation) == pytest.approx(oracle.VI_rand, rel=1e-10)
            assert float(found.p_normality) == pytest.approx(oracle.p_norm, rel=1e-8)
            assert float(found.p_randomisation) == pytest.approx(oracle.p_rand, rel=1e-8)

    def test_permutation_p_is_esdas_made_two_sided(self, maps: np.ndarray) -> None:
        import esda
        import libpysal

        i, j = np.indices((14, 14))
        values = maps[1] + 0.04 * (i + j)
        np.random.seed(0)  # noqa: NPY002 - esda draws from the global generator
        oracle = esda.Moran(values.ravel(), libpysal.weights.lat2W(14, 14), transformation="B", permutations=9999)
        null = np.abs(oracle.sim - oracle.EI) >= abs(oracle.I - oracle.EI)
        found = morans_inference(values, permutations=9999)
        assert 0.001 < float(found.p_permutation) < 0.5
        assert float(found.p_permutation) == pytest.approx((null.sum() + 1) / 10_000, abs=0.02)

    def test_mean_and_variance_of_permuted_maps_are_the_closed_forms(self, maps: np.ndarray) -> None:
        rng = np.random.default_rng(1)
        permuted = rng.permuted(np.broadcast_to(maps[1].ravel(), (20_000, 196)), axis=1).reshape(-1, 14, 14)
        found = morans_inference(permuted, permutations=0)
        standard_error = np.sqrt(float(found.variance_randomisation[0]) / 20_000)
        assert found.morans_i.mean() == pytest.approx(found.expectation, abs=4 * standard_error)
        assert found.morans_i.var() == pytest.approx(float(found.variance_randomisation[0]), rel=0.05)

    def test_all_three_p_values_hold_their_level_on_noise(self) -> None:
        noise = np.random.default_rng(2).normal(size=(2000, 8, 8))
        found = morans_inference(noise, permutations=199)
        least, greatest = scipy.stats.binom.interval(0.999, 2000, 0.05)
        for p in (found.p_normality, found.p_randomisation, found.p_permutation):
            assert least <= (p <= 0.05).sum() <= greatest

    def test_constant_and_missing_maps_are_nan_and_touch_no_other(self, maps: np.ndarray) -> None:
        broken = np.concatenate([maps, np.full((1, 14, 14), 0.3), maps[:1]])
        broken[4, 2, 2] = np.nan
        found, sound = morans_inference(broken, permutations=99), morans_inference(maps, permutations=99)
        for name in ("morans_i", "variance_randomisation", "p_normality", "p_randomisation", "p_permutation"):
            assert np.isnan(getattr(found, name)[3:]).all(), name
            np.testing.assert_array_equal(getattr(found, name)[:3], getattr(sound, name))

    def test_shape_blocks_and_bad_grids(self, maps: np.ndarray) -> None:
        nested = morans_inference(maps[None, :, None], permutations=99, block_bytes=1)
        assert nested.p_permutation.shape == (1, 3, 1)
        np.testing.assert_array_equal(
            nested.p_permutation.ravel(), morans_inference(maps, permutations=99).p_permutation
        )
        with pytest.raises(ValueError, match="at least 4 patches"):
            morans_inference(np.zeros((5, 1, 3)))


def test_everything_of_a_study_names_its_unit_and_family() -> None:
    settings = Settings(permutations=49, equivalence={"entropy": 0.5})
    results = analyse(small_table(shift=1.0), settings)
    assert results.settings == settings
    for part in (results.tests, results.trends, results.clusters):
        assert part
        assert all(entry.unit_of_inference and entry.family for entry in part)
    by_level = {test.level: test for test in results.tests}
    assert by_level["layer"].tost_bound == by_level["head"].tost_bound == 0.5
    assert by_level["layer_means"].tost_bound is None
