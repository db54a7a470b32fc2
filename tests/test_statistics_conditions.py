"""`compare_conditions`, trends and relations between metrics, on tables whose answers are known."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from engine.statistics import (
    PairedTest,
    Settings,
    compare_conditions,
    compare_paired,
    layer_trend,
    minimum_detectable_effect,
)
from engine.statistics.bootstrap import bootstrap_interval
from train.errors import InputError

CONDITIONS, SEEDS, IMAGES, LAYERS, HEADS = ("baseline", "finetuned", "dora"), (42, 43, 44), 12, 4, 3
Result = TypeVar("Result")
FAST = Settings(permutations=199)


def make_table() -> xr.Dataset:
    """Three conditions, three seeds, two metrics; the baseline is stored for its first seed alone."""
    rng = np.random.default_rng(0)
    shape = (len(CONDITIONS), len(SEEDS), IMAGES, LAYERS, HEADS)
    distance = rng.normal(size=(1, 1, IMAGES, 1, 1)) + 0.1 * rng.normal(size=shape)
    distance[1] += 0.2 * np.arange(LAYERS)[:, None]  # grows with depth
    region_mass = rng.uniform(0.1, 0.4, size=(*shape, 2))
    distance[0, 1:] = np.nan
    region_mass[0, 1:] = np.nan
    dims = ("condition", "seed", "image", "layer", "head")
    return xr.Dataset(
        {
            "distance": (dims, distance.astype(np.float32), {"units": "image diagonals"}),
            "region_mass": ((*dims, "region"), region_mass.astype(np.float32), {"units": "1"}),
        },
        coords={
            "condition": list(CONDITIONS),
            "seed": list(SEEDS),
            "image": [f"{i}.png" for i in range(IMAGES)],
            "layer": np.arange(LAYERS),
            "site": ("layer", [f"blocks.{i}.attn" for i in range(LAYERS)]),
            "head": np.arange(HEADS),
            "region": ["target_digit", "other_digit"],
            "class_name": ("image", ["a", "b", "c"] * (IMAGES // 3)),
            "seed_invariant": ("condition", [True, False, False]),
        },
    )


@pytest.fixture(scope="module")
def table() -> xr.Dataset:
    return make_table()


@pytest.fixture(scope="module")
def tests(table: xr.Dataset) -> list[PairedTest]:
    return compare_conditions(table, FAST)


def pick(results: list[Result], **wanted: Any) -> list[Result]:
    return [result for result in results if all(getattr(result, key) == value for key, value in wanted.items())]


def test_every_family_is_complete(tests: list[PairedTest]) -> None:
    columns = 3  # distance, and region_mass in two regions
    found = Counter((test.condition, test.level) for test in tests)
    sizes = {
        "head": LAYERS * HEADS * columns,
        "layer": LAYERS * columns,
        "class": LAYERS * columns,
        "layer_means": columns,
        "seed": LAYERS * columns,
    }
    assert found == {(condition, level): n for condition in ("finetuned", "dora") for level, n in sizes.items()}
    primary = pick(tests, role="primary")  # distance in every layer of both conditions
    assert {test.family_size for test in primary} == {len(primary)} == {2 * LAYERS}
    for test in pick(tests, role="exploratory"):
        assert test.family_size == sizes[test.level] - LAYERS * (test.level == "layer")
    assert len({test.family for test in tests}) == 11
    assert {test.against for test in tests} == {"baseline"}


def test_head_level_is_the_paired_test_of_seed_means(table: xr.Dataset, tests: list[PairedTest]) -> None:
    against = table.distance.sel(condition="baseline", seed=42).astype(np.float64)
    condition = table.distance.sel(condition="finetuned").astype(np.float64).mean("seed")
    expected = scipy.stats.ttest_rel(condition, against)
    for test in pick(tests, condition="finetuned", level="head", metric="distance"):
        cell = test.layer, test.head
        assert test.t == pytest.approx(expected.statistic[cell], rel=1e-9)
        assert test.p == pytest.approx(expected.pvalue[cell], rel=1e-8)
        assert test.site == f"blocks.{test.layer}.attn"
        assert (test.unit, test.region) == ("image diagonals", None)
        assert test.mean_condition == pytest.approx(float(condition[:, *cell].mean()))
        assert test.mean_condition - test.mean_against == pytest.approx(test.difference)
        assert test.ci[0] < test.difference < test.ci[1]
        assert test.seeds == SEEDS
        assert test.unit_of_inference == "image, given these checkpoints"


def test_head_level_is_one_family_over_metrics_and_regions(table: xr.Dataset, tests: list[PairedTest]) -> None:
    condition = table.sel(condition="dora").astype(np.float64).mean("seed")
    against = table.sel(condition="baseline", seed=42).astype(np.float64)
    columns = [
        np.concatenate(
            [
                x.distance.values.reshape(IMAGES, -1),
                *(x.region_mass.values[..., i].reshape(IMAGES, -1) for i in (0, 1)),
            ],
            1,
        )
        for x in (against, condition)
    ]
    whole = compare_paired(*columns, permutations=199)
    entries = pick(tests, condition="dora", level="head")
    for name in ("p_max_t", "p_holm", "p_bh"):
        np.testing.assert_allclose([getattr(test, name) for test in entries], whole[name], rtol=1e-9)
    assert [test.region for test in entries[12::12]] == ["target_digit", "other_digit"]


def many_images(table: xr.Dataset, images: int = 40) -> xr.Dataset:
    """The table with enough images to resample."""
    rng = np.random.default_rng(12)
    drawn = table.isel(image=rng.integers(0, IMAGES, images)).drop_vars("image", errors="ignore")
    noise = {name: 0.05 * rng.normal(size=values.shape) for name, values in drawn.items()}
    return drawn.assign({name: values + noise[name] for name, values in drawn.items()}).assign_attrs(table.attrs)


def test_the_primary_family_is_of_all_conditions_and_gates_its_heads(table: xr.Dataset) -> None:
    drawn = many_images(table)
    for name in drawn:
        drawn[name].attrs = table[name].attrs
    tests = compare_conditions(drawn, FAST)
    primary = pick(tests, role="primary")
    assert {(test.level, test.metric) for test in primary} == {("layer", "distance")}
    assert {test.condition for test in primary} == {"finetuned", "dora"}
    assert {test.family for test in primary} == {"primary, against baseline: condition × layer × metric"}
    against = drawn.distance.sel(condition="baseline", seed=42).mean("head")
    both = [drawn.distance.sel(condition=name).mean("seed").mean("head") for name in ("finetuned", "dora")]
    stacked = xr.concat(both, dim="condition").transpose("image", ...)
    whole = compare_paired(
        xr.concat([against, against], dim="condition").transpose("image", ...).assign_coords(condition=[0, 1]),
        stacked.assign_coords(condition=[0, 1]),
        metric="condition",
        permutations=199,
    )
    np.testing.assert_allclose([test.p_max_t for test in primary], whole.p_max_t.values.ravel())
    heads = pick(tests, level="head", metric="distance")
    of_layer = {(test.condition, test.layer): test.p_max_t for test in primary}
    for test in heads:
        assert test.p_gated == max(test.p_max_t, of_layer[test.condition, test.layer])
    assert {test.p_gated for test in tests if test.level != "head" or test.metric != "distance"} == {None}


def test_a_metric_is_a_family_and_metrics_are_adjusted_by_holm() -> None:
    rng = np.random.default_rng(3)
    d = rng.normal([0.9, 0.0, 0.0, 0.5, 0.0, 0.0], 1, size=(40, 6)).reshape(40, 2, 3)
    metrics = xr.DataArray(d, dims=("image", "metric", "layer"), coords={"metric": ["entropy", "distance"]})
    together = compare_paired(0 * metrics, metrics, metric="metric", permutations=999)
    alone = [compare_paired(0 * d[:, i], d[:, i], permutations=999).p_max_t.values for i in (0, 1)]
    # Both metrics count until all tests of one are rejected: here not before the last ones.
    np.testing.assert_allclose(together.p_max_t, np.minimum(2 * np.stack(alone), 1))
    assert (together.p_max_t <= 0.05).sum() == 2
    assert together.attrs["p_floor"] == 2 * 2 / 1000


def test_layer_level_averages_heads(table: xr.Dataset, tests: list[PairedTest]) -> None:
    mass = table.region_mass.sel(region="other_digit").astype(np.float64).mean("head")
    expected = scipy.stats.ttest_rel(mass.sel(condition="dora").mean("seed"), mass.sel(condition="baseline", seed=42))
    found = pick(tests, condition="dora", level="layer", region="other_digit")
    np.testing.assert_allclose([test.t for test in found], expected.statistic, rtol=1e-9)
    assert [test.layer for test in found] == list(range(LAYERS))
    assert {test.head for test in found} == {None}


def test_layer_means_are_the_published_test_and_say_what_is_wrong_with_it(
    table: xr.Dataset, tests: list[PairedTest]
) -> None:
    means = table.distance.astype(np.float64).mean(("seed", "image", "head"))
    expected = scipy.stats.ttest_rel(means.sel(condition="finetuned"), means.sel(condition="baseline"))
    (test,) = pick(tests, condition="finetuned", level="layer_means", metric="distance")
    assert test.t == pytest.approx(expected.statistic, rel=1e-9)
    assert test.p == pytest.approx(expected.pvalue, rel=1e-8)
    interval = expected.confidence_interval(0.95)
    assert test.ci == pytest.approx([interval.low, interval.high], rel=1e-8)
    assert test.n == LAYERS
    assert (test.layer, test.site, test.head) == (None, None, None)
    assert "not independent samples" in test.unit_of_inference


def test_class_level_counts_every_class_alike(table: xr.Dataset) -> None:
    uneven = table.assign_coords(class_name=("image", ["a"] * 7 + ["b"] * 3 + ["c"] * 2))
    d = (table.sel(condition="finetuned").mean("seed") - table.sel(condition="baseline", seed=42)).distance
    means = d.astype(np.float64).mean("head").groupby(uneven.class_name).mean()
    expected = scipy.stats.ttest_1samp(means, 0)
    found = pick(compare_conditions(uneven, FAST), condition="finetuned", level="class", metric="distance")
    np.testing.assert_allclose([test.difference for test in found], means.mean("class_name"), rtol=1e-5)
    np.testing.assert_allclose([test.t for test in found], expected.statistic, rtol=1e-4)
    assert {(test.n, test.p_floor) for test in found} == {(3, 2 / 8)}
    assert all(test.mde_dz is None for test in found)  # three classes cannot give a p of .05
    assert "class" in found[0].unit_of_inference
    unnamed = compare_conditions(table.drop_vars("class_name"), FAST)
    assert not pick(unnamed, level="class")


def test_nested_interval_resamples_classes_and_images_of_the_same_cells(
    table: xr.Dataset, tests: list[PairedTest]
) -> None:
    found = pick(tests, condition="finetuned", level="layer", metric="distance")
    assert {test.nested_levels for test in found} == {"class > image"}
    d = (table.sel(condition="finetuned").mean("seed") - table.sel(condition="baseline", seed=42)).distance
    values = d.astype(np.float64).mean("head").transpose("image", "layer").values
    codes = (np.arange(IMAGES) % 3)[:, None]
    bounds = bootstrap_interval(values, resamples=199, confidence=0.95, seed=0, groups=codes)
    np.testing.assert_allclose([test.ci_nested for test in found], bounds.T, rtol=1e-4, atol=1e-8)
    assert found[0].ci_nested[0] < found[0].difference < found[0].ci_nested[1]
    (neither, *_) = pick(compare_conditions(table.drop_vars("class_name"), FAST), level="layer")
    assert neither.ci_nested is neither.nested_levels is None


def test_minimum_detectable_effect_is_of_this_n_spread_and_family(tests: list[PairedTest]) -> None:
    (test,) = pick(tests, condition="dora", level="head", metric="distance", layer=1, head=0)
    expected = minimum_detectable_effect(IMAGES, family_size=test.family_size)
    assert test.mde_dz == pytest.approx(expected)
    assert test.mde == pytest.approx(expected * test.difference / test.dz)
    assert {test.mde for test in pick(tests, level="seed")} == {None}  # three runs cannot give a p of .05


def test_equivalence_is_tested_where_a_bound_is_set(table: xr.Dataset) -> None:
    tests = compare_conditions(table, replace(FAST, equivalence={"distance": 0.3}))
    (test,) = pick(tests, condition="dora", level="layer", metric="distance", layer=2)
    against, condition = (
        table.distance.sel(condition=name).astype(np.float64).mean("seed").mean("head").sel(layer=2)
        for name in ("baseline", "dora")
    )
    assert test.p_tost == pytest.approx(ttost_paired(condition.values, against.values, -0.3, 0.3)[0], rel=1e-6)
    family = pick(tests, role="primary")
    assert {(test.condition, test.metric) for test in family} == {("finetuned", "distance"), ("dora", "distance")}
    adjusted = multipletests([test.p_tost for test in family], method="holm")[1]
    np.testing.assert_allclose([test.p_tost_holm for test in family], adjusted)
    assert {test.p_tost for test in pick(tests, metric="region_mass")} == {None}
    assert {test.p_tost for test in pick(tests, level="layer_means")} == {None}
    with pytest.raises(InputError, match="bound for 'entropy'"):
        compare_conditions(table, replace(FAST, equivalence={"entropy": 0.3}))


def test_seed_level_flips_runs_and_states_the_least_p(table: xr.Dataset, tests: list[PairedTest]) -> None:
    found = pick(tests, condition="finetuned", level="seed", metric="distance")
    runs = table.distance.astype(np.float64).mean(("image", "head"))
    d = runs.sel(condition="finetuned") - runs.sel(condition="baseline", seed=42, drop=True)
    for layer, test in enumerate(found):
        assert test.difference == pytest.approx(float(d[:, layer].mean()), rel=1e-6)
        assert test.unit_of_inference == "training run (seed), given these images"
        assert test.test == "sign flip over training runs"
        assert test.resampling == "exact sign flips, max-T"
        assert test.n == 3
        assert test.p_floor == 2 / 8
    assert found[3].p == 2 / 8  # the same sign in every run: as small as three runs allow
    t = [test.t for test in pick(tests, condition="finetuned", level="seed")]
    p = 2 * scipy.stats.t.sf(np.abs(t), 2)  # Student's: a sign flip's p over few runs cannot survive an adjustment
    holm = [test.p_holm for test in pick(tests, condition="finetuned", level="seed")]
    np.testing.assert_allclose(holm, multipletests(p, method="holm")[1])


def test_six_seeds_can_reach_five_percent() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(2, 6, 5, 1, 1)) * 0.01
    values[1] += 1
    table = xr.Dataset(
        {"entropy": (("condition", "seed", "image", "layer", "head"), values, {"units": "nat"})},
        coords={
            "condition": ["baseline", "full"],
            "seed": range(6),
            "layer": [0],
            "site": ("layer", ["blocks.0.attn"]),
        },
    )
    tests = compare_conditions(table, FAST)
    (test,) = pick(tests, level="seed")
    assert test.p == test.p_floor == 2 / 64
    assert not pick(tests, level="layer_means")  # a single layer has no layers to pair


def test_one_seed_makes_no_claim_about_training(table: xr.Dataset) -> None:
    tests = compare_conditions(table.isel(seed=[0]), FAST)
    assert {test.level for test in tests} == {"head", "layer", "class", "layer_means"}


def test_a_condition_that_no_seed_changes_has_no_seed_level(table: xr.Dataset) -> None:
    same = table.sel(condition=["baseline", "baseline"]).assign_coords(condition=["baseline", "again"])
    tests = compare_conditions(same, FAST)
    assert {test.level for test in tests} == {"head", "layer", "class", "layer_means"}
    for test in tests:
        assert test.difference == 0
        assert test.t == 0
        assert test.p == test.p_max_t == test.p_wilcoxon == 1
        assert test.ci == (0, 0)
        assert test.dz is None
        assert test.degenerate == "all differences are exactly 0: dz and gz are not defined"


def test_runs_of_the_same_seed_are_paired_where_both_conditions_change(table: xr.Dataset) -> None:
    without = table.copy(deep=True)
    without["distance"][{"condition": 2, "seed": 1}] = np.nan
    without["region_mass"][{"condition": 2, "seed": 1}] = np.nan
    tests = compare_conditions(without, replace(FAST, against="dora"), metrics=["distance"])
    (test,) = pick(tests, condition="finetuned", level="head", layer=1, head=2)
    assert test.seeds == (42, 44)
    pairs = table.distance.sel(seed=[42, 44]).astype(np.float64).mean("seed").isel(layer=1, head=2)
    expected = scipy.stats.ttest_rel(pairs.sel(condition="finetuned"), pairs.sel(condition="dora"))
    assert test.t == pytest.approx(expected.statistic, rel=1e-9)
    # The baseline never changes: its one run stands against each of dora's.
    assert pick(tests, condition="baseline", level="seed")[0].seeds == (42, 44)


def test_missing_values_leave_their_own_pairs_out(table: xr.Dataset) -> None:
    broken = table.copy(deep=True)
    broken["distance"][{"condition": 1, "seed": 1, "image": 3, "layer": 2, "head": 1}] = np.nan
    broken["distance"][{"condition": 0, "seed": 0, "image": 5, "layer": 2, "head": 1}] = np.inf
    tests = compare_conditions(broken, FAST, ["distance"])
    counts = {
        (test.layer, test.head): (test.n, test.missing) for test in pick(tests, condition="finetuned", level="head")
    }
    assert counts.pop((2, 1)) == (10, 2)
    assert set(counts.values()) == {(12, 0)}
    # The layer's mean is over the heads both conditions have: no image is lost, and none compares 3 heads with 2.
    layer = pick(tests, condition="finetuned", level="layer", layer=2)[0]
    assert (layer.n, layer.missing) == (12, 0)
    x = table.distance.astype(np.float64).sel(layer=2)
    d = (x.sel(condition="finetuned").mean("seed") - x.sel(condition="baseline", seed=42)).values
    d[[3, 5], 1] = np.nan
    assert layer.difference == pytest.approx(np.nanmean(d, axis=1).mean(), rel=1e-9)


def test_layers_with_fewer_heads_have_fewer_tests(table: xr.Dataset) -> None:
    padded = table.copy(deep=True)
    for name in padded.data_vars:
        padded[name][{"layer": 3, "head": 2}] = np.nan
    tests = compare_conditions(padded, FAST)
    assert not pick(tests, layer=3, head=2)
    assert len(pick(tests, condition="dora", level="head", metric="distance")) == LAYERS * HEADS - 1
    assert all(test.degenerate is None for test in tests)


def test_a_metric_without_values_in_a_head_that_exists_says_so(table: xr.Dataset) -> None:
    undefined = table.copy(deep=True)
    undefined["distance"][{"layer": 0, "head": 0}] = np.nan
    tests = compare_conditions(undefined, FAST)
    (test,) = pick(tests, condition="dora", level="head", metric="distance", layer=0, head=0)
    assert (test.n, test.missing) == (0, IMAGES)
    assert test.p is test.difference is test.ci is None
    assert test.degenerate == "0 complete pairs: a test needs at least 2"
    assert test.family_size == LAYERS * HEADS * 3 - 1


def test_constant_differences_are_null_in_json_with_their_reason(table: xr.Dataset) -> None:
    shifted = table.isel(condition=[0, 1], seed=[0]).astype(np.float64)
    shifted["distance"][{"condition": 0}] = 0.0
    shifted["distance"][{"condition": 1}] = 0.5
    (test,) = pick(compare_conditions(shifted, FAST), level="head", metric="distance", layer=0, head=0)
    assert (test.t, test.dz, test.gz) == (None, None, None)
    assert (test.difference, test.p, test.ci) == (0.5, 0, (0.5, 0.5))
    assert "infinite" in test.degenerate


def test_bad_tables_are_refused(table: xr.Dataset) -> None:
    with pytest.raises(InputError, match="no condition is called 'base'; did you mean baseline"):
        compare_conditions(table, Settings(against="base"))
    with pytest.raises(InputError, match="no metric 'distnce'; did you mean distance"):
        compare_conditions(table, metrics=["distnce"])
    with pytest.raises(InputError, match="no dimension 'seed'"):
        compare_conditions(table.isel(seed=0, drop=True))
    with pytest.raises(InputError, match="no coordinate 'site'"):
        compare_conditions(table.drop_vars("site"))
    unitless = table.copy()
    unitless["distance"] = unitless.distance.drop_attrs()
    with pytest.raises(InputError, match="'distance' of the table has no attribute 'units'"):
        compare_conditions(unitless)
    apart = table.sel(condition=["finetuned", "dora"])
    apart = apart.where((apart.condition == "dora") == (apart.seed == 42))
    with pytest.raises(InputError, match="'finetuned' has runs of the seeds 43, 44 and 'dora' of 42"):
        compare_conditions(apart, Settings(against="dora"))
    empty = table.where(table.condition != "dora")
    with pytest.raises(InputError, match="'dora' holds no finite value"):
        compare_conditions(empty)


class TestLayerTrend:
    def test_change_that_grows_with_depth(self, table: xr.Dataset) -> None:
        (trend,) = pick(layer_trend(table, FAST), condition="finetuned", metric="distance")
        x = table.distance.astype(np.float64)
        d = (x.sel(condition="finetuned").mean("seed") - x.sel(condition="baseline", seed=42)).mean("head")
        shallow, deep = d[:, :2].mean("layer"), d[:, 2:].mean("layer")
        expected = scipy.stats.ttest_rel(deep, shallow)
        assert trend.shallow == pytest.approx(float(shallow.mean()))
        assert trend.deep == pytest.approx(float(deep.mean()))
        assert trend.difference == pytest.approx(0.4, abs=0.1)
        assert trend.t == pytest.approx(expected.statistic, rel=1e-9)
        assert trend.p == pytest.approx(expected.pvalue, rel=1e-8)
        assert trend.depth_rho == pytest.approx(1)
        assert (trend.shallow_layers, trend.deep_layers) == ((0, 1), (2, 3))

    def test_middle_layer_belongs_to_neither_half(self, table: xr.Dataset) -> None:
        trend = layer_trend(table.isel(layer=[0, 1, 2]), FAST, ["distance"])[0]
        assert (trend.shallow_layers, trend.deep_layers) == ((0,), (2,))

    def test_single_layer_has_no_trend(self, table: xr.Dataset) -> None:
        assert layer_trend(table.isel(layer=[0]), FAST) == []

    def test_one_trend_per_condition_and_metric(self, table: xr.Dataset) -> None:
        assert len(layer_trend(table, FAST)) == 6


def test_d_av_is_the_difference_in_standard_deviations_between_images(table: xr.Dataset) -> None:
    """Against NumPy, with a pair missing; null where images do not differ; pairs that are alike do not enlarge it."""
    changed = table.copy(deep=True)
    changed["distance"][1, :, 3, 2] = np.nan
    changed["distance"][:, :, :, 3] = np.float32(0.7)
    changed["distance"][1, :, :, 3] += np.float32(1e-3)
    tests = pick(compare_conditions(changed, FAST, ["distance"]), level="layer", condition="finetuned")
    values = changed["distance"].astype(float).mean("head")
    a = values.sel(condition="baseline", layer=2).isel(seed=0).values
    b = values.sel(condition="finetuned", layer=2).mean("seed").values
    known = np.isfinite(b)
    spread = math.sqrt((a[known].var(ddof=1) + b[known].var(ddof=1)) / 2)
    assert tests[2].d_av == pytest.approx((b - a)[known].mean() / spread, rel=1e-9)
    assert abs(tests[2].dz) > 3 * abs(tests[2].d_av)
    assert tests[3].difference == pytest.approx(1e-3, rel=1e-4)
    assert tests[3].d_av is None
