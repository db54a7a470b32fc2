"""`compare_paired` against scipy, statsmodels and values known in closed form."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from engine.statistics import compare_paired
from engine.statistics.multiplicity import benjamini_hochberg, holm, holm_over_families

P_VALUES = ("p_t", "p_wilcoxon", "p_resampled", "p_max_t", "p_holm", "p_bh")


def pair(n: int, *trailing: int, seed: int = 0, shift: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Two conditions whose images differ in level, [image, ...]; differences are skewed."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, *trailing)) + rng.normal(size=(n, *[1] * len(trailing)))
    return a, a + shift + 0.5 * rng.gamma(2.0, size=(n, *trailing)) - 1.0


def known() -> tuple[np.ndarray, np.ndarray]:
    k = np.arange(1, 41)
    a = np.sin(k) + 0.3 * np.cos(2.3 * k)
    return a, a + 0.15 + 0.4 * np.sin(1.7 * k)


def test_known_values_of_a_small_study() -> None:
    result = compare_paired(*known())
    assert float(result.t) == pytest.approx(3.23675900238656, rel=1e-12)
    assert float(result.p_t) == pytest.approx(0.00246855450902966, rel=1e-10)
    assert float(result.p_wilcoxon) == pytest.approx(0.0063717446501, rel=1e-10)
    assert float(result.dz) == pytest.approx(0.511776534229795, rel=1e-12)
    assert float(result.gz) == pytest.approx(0.501860474254, rel=1e-11)
    # The t interval is (.0555, .2404); BCa's lies close to it at 40 images.
    assert float(result.ci_low) == pytest.approx(0.0555015099959, abs=0.015)
    assert float(result.ci_high) == pytest.approx(0.24043743237, abs=0.015)
    assert int(result.n) == 40
    assert int(result.missing) == 0


def test_t_and_wilcoxon_equal_scipy_in_every_element() -> None:
    a, b = pair(33, 3, 4)
    result = compare_paired(a, b, permutations=99)
    expected = scipy.stats.ttest_rel(b, a)
    np.testing.assert_allclose(result.t, expected.statistic, rtol=1e-11)
    np.testing.assert_allclose(result.p_t, expected.pvalue, rtol=1e-9)
    np.testing.assert_allclose(result.difference, (b - a).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(result.sd, (b - a).std(axis=0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(result.skewness, scipy.stats.skew(b - a, axis=0), rtol=1e-9)
    for layer, head in np.ndindex(3, 4):
        wilcoxon = scipy.stats.wilcoxon(b[:, layer, head], a[:, layer, head])
        assert float(result.p_wilcoxon[layer, head]) == pytest.approx(wilcoxon.pvalue, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 9, 13, 14, 50, 51, 80])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros"])
def test_wilcoxon_equals_scipy_at_every_sample_size(n: int, kind: str) -> None:
    d = np.random.default_rng(n).permutation(np.arange(1.0, n + 1)) - 0.4 * n - 0.05
    if kind != "distinct":
        d = np.round(d / 3) + 5 * (kind == "ties")
    expected = scipy.stats.wilcoxon(d).pvalue if np.any(d) else 1.0
    result = compare_paired(np.zeros(n), d, permutations=1)
    assert float(result.p_wilcoxon) == pytest.approx(expected, rel=1e-9)


def test_holm_and_benjamini_hochberg_equal_statsmodels() -> None:
    p = np.random.default_rng(3).uniform(size=(4, 9)) ** 2
    p[1, 2] = p[2, 1]  # a tie
    np.testing.assert_allclose(holm(p).ravel(), multipletests(p.ravel(), method="holm")[1], rtol=1e-12)
    np.testing.assert_allclose(benjamini_hochberg(p).ravel(), multipletests(p.ravel(), method="fdr_bh")[1], rtol=1e-12)


def test_adjusted_p_values_ignore_tests_that_were_not_made() -> None:
    p = np.array([0.01, np.nan, 0.03, 0.5])
    for method, name in ((holm, "holm"), (benjamini_hochberg, "fdr_bh")):
        adjusted = method(p)
        assert math.isnan(adjusted[1])
        np.testing.assert_allclose(adjusted[[0, 2, 3]], multipletests(p[[0, 2, 3]], method=name)[1], rtol=1e-12)
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, 1.2])


def test_holm_over_families_equals_the_closed_test() -> None:
    """A test's p is the greatest over all sets of null hypotheses with it: their least p times their families."""
    rng = np.random.default_rng(3)
    families = np.array([0, 1, 1, 2, 2, 2])
    subsets = [np.array(chosen) for size in range(1, 7) for chosen in itertools.combinations(range(6), size)]
    for _ in range(50):
        p = rng.choice([*rng.random(4), 1e-4, 2e-4], 6) ** 2
        closed = [
            max(p[subset].min() * np.unique(families[subset]).size for subset in subsets if test in subset)
            for test in range(6)
        ]
        np.testing.assert_allclose(holm_over_families(p, families), np.minimum(closed, 1))
    np.testing.assert_allclose(holm_over_families(p, np.arange(6)), multipletests(p, method="holm")[1])
    np.testing.assert_array_equal(holm_over_families(p, np.zeros(6, dtype=np.int64)), p)


def test_effects_of_other_families_leave_the_error_of_holm_over_families_at_the_level() -> None:
    """Six families, each with an effect that is always found beside a true null hypothesis."""
    rng = np.random.default_rng(4)
    families = np.repeat(np.arange(6), 2)
    found = 0
    for _ in range(2000):
        p = np.stack([np.full(6, 1e-6), rng.random(6)], axis=1).ravel()
        found += bool((holm_over_families(p, families)[1::2] <= 0.05).any())
    assert found <= scipy.stats.binom.ppf(0.999, 2000, 0.05)


def test_adjusted_p_values_of_a_comparison_are_those_of_its_t_tests() -> None:
    a, b = pair(20, 5)
    result = compare_paired(a, b, permutations=99)
    np.testing.assert_allclose(result.p_holm, multipletests(result.p_t.values, method="holm")[1])
    np.testing.assert_allclose(result.p_bh, multipletests(result.p_t.values, method="fdr_bh")[1])


class TestDegenerate:
    """Zero and constant differences, and too few pairs, beside a healthy test that must not notice."""

    @pytest.fixture(params=[6, 40], ids=["exact", "random"])
    def columns(self, request: pytest.FixtureRequest) -> np.ndarray:
        healthy = np.random.default_rng(1).normal(0.8, 1, size=request.param)
        d = np.zeros((request.param, 4))
        d[:, 0] = healthy
        d[:, 2] = 0.1  # constant: its mean in floating point is not 0.1 for every n
        d[1:, 3] = np.nan
        return d

    def test_all_zero(self, columns: np.ndarray) -> None:
        zero = compare_paired(columns * 0, np.where(np.isnan(columns), 0, columns)).isel(axis_1=1)
        assert float(zero.difference) == 0
        assert float(zero.t) == 0
        for name in P_VALUES:
            assert float(zero[name]) == 1, name
        assert math.isnan(zero.dz)
        assert math.isnan(zero.gz)
        assert (float(zero.ci_low), float(zero.ci_high)) == (0, 0)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_constant_and_not_zero(self, columns: np.ndarray, sign: int) -> None:
        constant = compare_paired(np.zeros_like(columns), sign * columns).isel(axis_1=2)
        assert float(constant.difference) == sign * 0.1
        assert float(constant.t) == sign * np.inf
        assert float(constant.dz) == float(constant.gz) == sign * np.inf
        assert float(constant.p_t) == 0
        assert (float(constant.ci_low), float(constant.ci_high)) == (sign * 0.1, sign * 0.1)
        for name in ("p_resampled", "p_max_t"):
            if len(columns) == 6:  # only the patterns of one sign reach an infinite t: 2 of 64
                assert float(constant[name]) == pytest.approx(2 / 64)
            else:  # no resample tells a variance
                assert math.isnan(constant[name])

    def test_too_few_pairs(self, columns: np.ndarray) -> None:
        few = compare_paired(np.zeros_like(columns), columns).isel(axis_1=3)
        assert int(few.n) == 1
        assert int(few.missing) == len(columns) - 1
        assert float(few.difference) == columns[0, 3]
        for name in (*P_VALUES, "t", "dz", "gz", "ci_low", "ci_high"):
            assert math.isnan(few[name]), name

    def test_no_other_test_changes(self, columns: np.ndarray) -> None:
        together = compare_paired(np.zeros_like(columns), columns).isel(axis_1=0)
        alone = compare_paired(np.zeros_like(columns[:, 0]), columns[:, 0])
        for name in ("difference", "t", "dz", "gz", "ci_low", "ci_high", "p_t", "p_wilcoxon", "p_resampled"):
            assert float(together[name]) == pytest.approx(float(alone[name]), rel=1e-12), name
        assert 0 < float(together.p_max_t) <= 1
        # The zero column adds nothing to the family's greatest t; the constant one only its own two patterns.
        assert float(together.p_max_t) == pytest.approx(float(alone.p_max_t), abs=2 / 64 + 1e-12)

    def test_no_pair_at_all(self) -> None:
        b = np.full((5, 2), np.nan)
        b[:, 0] = np.arange(5.0)
        result = compare_paired(np.zeros((5, 2)), b)
        assert result.n.values.tolist() == [5, 0]
        assert math.isnan(result.difference[1])
        assert math.isnan(result.p_max_t[1])
        assert result.attrs["family_size"] == 1


def test_a_condition_against_itself_differs_by_exactly_zero() -> None:
    a, _ = pair(30, 2, 3)
    result = compare_paired(a, a.copy(), permutations=999)
    for name in ("difference", "t", "ci_low", "ci_high"):
        assert (result[name] == 0).all(), name
    for name in P_VALUES:
        assert (result[name] == 1).all(), name


def test_missing_pairs_are_masked_test_by_test_and_counted() -> None:
    a, b = pair(40, 3)
    b[[2, 5, 7], 0] = np.nan
    a[[5, 9], 0] = np.nan
    a[4, 1] = b[4, 1] = np.inf  # inf − inf
    b[6, 1] = -np.inf
    result = compare_paired(a, b, permutations=499)
    assert result.missing.values.tolist() == [4, 2, 0]
    assert result.n.values.tolist() == [36, 38, 40]
    for column in range(3):
        kept = np.isfinite(a[:, column]) & np.isfinite(b[:, column])
        expected = scipy.stats.ttest_rel(b[kept, column], a[kept, column])
        assert float(result.t[column]) == pytest.approx(expected.statistic, rel=1e-11)
        assert float(result.p_t[column]) == pytest.approx(expected.pvalue, rel=1e-9)
        wilcoxon = scipy.stats.wilcoxon(b[kept, column], a[kept, column])
        assert float(result.p_wilcoxon[column]) == pytest.approx(wilcoxon.pvalue, rel=1e-12)
        assert float(result.ci_low[column]) < float(result.difference[column]) < float(result.ci_high[column])


def test_labels_of_the_trailing_axes_are_kept() -> None:
    a, b = pair(12, 2, 3)
    coords = {"image": [f"{i}.png" for i in range(12)], "layer": [0, 1], "site": ("layer", ["blocks.0", "blocks.1"])}
    first = xr.DataArray(a, dims=("image", "layer", "head"), coords=coords)
    second = xr.DataArray(b, dims=("image", "layer", "head"), coords=coords).transpose("head", "layer", "image")
    result = compare_paired(first, second, permutations=99)
    assert result.difference.dims == ("layer", "head")
    assert result.site.values.tolist() == ["blocks.0", "blocks.1"]
    assert "image" not in result.coords
    xr.testing.assert_equal(
        result.drop_vars(("layer", "site")).rename(layer="axis_1", head="axis_2"),
        compare_paired(a, b, permutations=99),
    )


def test_labels_of_one_side_only_are_dropped() -> None:
    a, b = pair(12, 2)
    first = xr.DataArray(a, dims=("image", "layer"), coords={"condition": "baseline", "metric": "entropy"})
    second = xr.DataArray(b, dims=("image", "layer"), coords={"condition": "finetuned", "metric": "entropy"})
    result = compare_paired(first, second, permutations=9)
    assert set(result.coords) == {"metric"}
    assert "condition" in compare_paired(first, b, permutations=9).coords


def test_bad_input_is_refused_in_one_sentence() -> None:
    a, b = pair(12, 2)
    with pytest.raises(ValueError, match=r"shape \(12, 2\) and b has \(11, 2\)"):
        compare_paired(a, b[:11])
    with pytest.raises(ValueError, match="at least 2 pairs; found 1"):
        compare_paired(a[:1], b[:1])
    with pytest.raises(ValueError, match="single numbers"):
        compare_paired(1.0, 2.0)
    first = xr.DataArray(a, dims=("image", "layer"), coords={"image": np.arange(12)})
    with pytest.raises(ValueError, match="not the same images"):
        compare_paired(first, first.assign_coords(image=np.arange(1, 13)))
    with pytest.raises(ValueError, match="expected the same"):
        compare_paired(first, first.rename(layer="head"))
    for parameter in ({"permutations": 0}, {"confidence": 1.0}, {"unit": "pixels"}, {"groups": np.zeros(5)}):
        with pytest.raises(ValueError, match=next(iter(parameter))):
            compare_paired(a, b, **parameter)


def test_no_warning_escapes_on_ties_zeros_and_small_samples() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (2, 3, 8, 30, 60):
            d = np.round(np.random.default_rng(n).normal(size=(n, 6)), 0)
            result = compare_paired(np.zeros_like(d), d, permutations=99)
            np.testing.assert_allclose(result.difference, d.mean(axis=0), atol=1e-12)
            for name in P_VALUES:
                assert ((result[name] > 0) & (result[name] <= 1)).all(), name


@pytest.mark.parametrize("unit", [2.0**-600, 2.0**300])
def test_effect_sizes_and_p_values_do_not_depend_on_the_unit(unit: float) -> None:
    a, b = pair(20, 3)
    plain = compare_paired(a, b, permutations=199)
    scaled = compare_paired(a * unit, b * unit, permutations=199)
    for name in ("difference", "ci_low", "ci_high"):
        np.testing.assert_allclose(scaled[name] / unit, plain[name], rtol=1e-12)
    for name in ("dz", "gz", "t", *P_VALUES):
        np.testing.assert_allclose(scaled[name], plain[name], rtol=1e-12)


def test_result_is_decided_by_the_seed() -> None:
    a, b = pair(30, 4)
    first, again, other = (compare_paired(a, b, permutations=299, seed=seed) for seed in (7, 7, 8))
    xr.testing.assert_identical(first, again)
    assert (first.ci_low != other.ci_low).all()
    assert (first.p_max_t != other.p_max_t).any()


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    n=st.integers(2, 9),
    scale=st.sampled_from([1e-200, 1e-3, 1.0, 1e6, 1e150]),
)
def test_whatever_the_numbers_p_values_are_probabilities(data: st.DataObject, n: int, scale: float) -> None:
    values = data.draw(
        st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0, 3.0, np.nan]), min_size=3 * n, max_size=3 * n)
    )
    d = scale * np.array(values).reshape(n, 3)
    result = compare_paired(np.zeros_like(d), d, permutations=63)
    flipped = max(2, min(6, int(result.n.max())))  # a test of fewer pairs than others takes no part
    for column in range(3):
        nothing = float(result.t[column]) == 0 and math.isnan(result.dz[column])
        for name in P_VALUES:
            value = float(result[name][column])
            fewest = flipped if name in ("p_resampled", "p_max_t") and not nothing else 2
            assert (0 <= value <= 1) if int(result.n[column]) >= fewest else math.isnan(value), name
        if int(result.n[column]) >= flipped:
            assert float(result.p_max_t[column]) >= float(result.p_resampled[column])
        if int(result.n[column]) >= 2:
            assert float(result.ci_low[column]) <= float(result.ci_high[column])
