"""Training runs and images crossed: against statsmodels, closed forms and simulated studies."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.api as sm
import xarray as xr
from statsmodels.formula.api import ols
from statsmodels.stats.multitest import multipletests

from benchmarks import calibrate_runs as calibration
from benchmarks.calibrate_runs import SIMULATED, Design
from engine.statistics import Settings, analyse, compare_conditions, compare_runs, control_runs, planned_power
from engine.statistics import crossed as crossed_module
from engine.statistics.crossed import crossed_interval, crossed_table, crossed_test, images_needed, runs_needed

DOCS = Path(__file__).parents[1] / "docs"
FAST = Settings(permutations=99)


def drawn(seed: int, runs: int, images: int, tests: int = 1, run: float = 0.5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    d = rng.normal(size=(images, tests)) + run * rng.normal(size=(runs, 1, tests))
    return np.asarray(d + 0.3 * rng.normal(size=d.shape) + 0.4)


class TestMeanSquares:
    def test_equal_the_analysis_of_variance_of_statsmodels(self) -> None:
        d = drawn(0, 5, 12)
        run, image = (index.ravel() for index in np.indices(d.shape[:2]))
        data = pd.DataFrame({"d": d.ravel(), "run": run, "image": image})
        anova = sm.stats.anova_lm(ols("d ~ C(run) + C(image)", data).fit())
        expected = anova.sum_sq / anova.df
        table = crossed_table(d)
        found = [table.run[0], table.image[0], table.residual[0]]
        np.testing.assert_allclose(np.array(found) * table.scale[0] ** 2, expected, rtol=1e-10)
        sds = table.components()
        assert sds[0][0] ** 2 == pytest.approx((expected["C(image)"] - expected["Residual"]) / 5)
        assert sds[1][0] ** 2 == pytest.approx((expected["C(run)"] - expected["Residual"]) / 12)

    def test_shares_are_those_of_the_variance_of_the_mean(self) -> None:
        table = crossed_table(drawn(1, 4, 30, tests=3))
        image, run, residual = table.components()
        parts = np.stack([image**2 / 30, run**2 / 4, residual**2 / 120])
        np.testing.assert_allclose(table.shares(), parts / parts.sum(axis=0))

    def test_images_that_a_run_lacks_are_left_out_of_their_test(self) -> None:
        d = drawn(2, 3, 10, tests=2)
        whole = crossed_table(np.delete(d, [1, 7], axis=1))
        d[0, 1, 0], d[2, 7, 0] = np.nan, np.inf
        table = crossed_table(d)
        assert table.images.tolist() == [8, 10]
        for name in ("difference", "image", "run", "residual"):
            unit = 1 if name == "difference" else table.scale[0] ** 2 / whole.scale[0] ** 2
            assert unit * getattr(table, name)[0] == pytest.approx(getattr(whole, name)[0], rel=1e-12)

    @pytest.mark.parametrize("unit", [1e-200, 1e200])
    def test_any_unit_gives_the_same_t(self, unit: float) -> None:
        d = drawn(3, 4, 20, tests=5)
        plain, scaled = crossed_table(d), crossed_table(unit * d)
        np.testing.assert_allclose(crossed_test(scaled).t, crossed_test(plain).t, rtol=1e-9)
        for a, b in zip(crossed_interval(scaled, 0.95)[:2], crossed_interval(plain, 0.95)[:2], strict=True):
            np.testing.assert_allclose(a, unit * b, rtol=1e-9)


class TestInterval:
    def test_is_students_over_runs_where_nothing_else_varies(self) -> None:
        values = np.random.default_rng(4).normal(size=6)
        low, high, df = crossed_interval(crossed_table(np.repeat(values[:, None, None], 50, axis=1)), 0.9)
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.9)
        assert (low[0], high[0]) == pytest.approx(tuple(expected))
        assert df[0] == pytest.approx(5)

    def test_is_students_over_images_where_runs_are_copies(self) -> None:
        values = np.random.default_rng(5).normal(size=25)
        low, high, df = crossed_interval(crossed_table(np.repeat(values[None, :, None], 4, axis=0)), 0.95)
        expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert (low[0], high[0]) == pytest.approx(tuple(expected))
        assert df[0] == pytest.approx(24)

    def test_counts_images_once_however_many_runs_see_them(self) -> None:
        """The nested interval, which redraws images within runs, would be √50 times as narrow."""
        d = np.random.default_rng(6).normal(size=(1, 40, 1)) + 0.01 * np.random.default_rng(7).normal(size=(50, 40, 1))
        low, high, _ = crossed_interval(crossed_table(d), 0.95)
        over_images = scipy.stats.ttest_1samp(d.mean(axis=0)[:, 0], 0).confidence_interval(0.95)
        assert high[0] - low[0] == pytest.approx(over_images.high - over_images.low, rel=0.01)


class TestFamily:
    def test_a_single_test_is_students(self) -> None:
        """No other test lends anything: t over runs where runs are all that varies."""
        values = np.random.default_rng(8).normal(1, 1, size=5)
        tested = crossed_test(crossed_table(np.repeat(values[:, None, None], 30, axis=1)))
        expected = scipy.stats.ttest_1samp(values, 0)
        assert (tested.t[0], tested.df[0], tested.p[0]) == pytest.approx((expected.statistic, 4, expected.pvalue))

    def test_prior_is_that_of_the_ratios(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """MS_run/MS_image ~ r0 F(S − 1, d0): limma's estimates find both."""
        monkeypatch.setattr(crossed_module, "MOST_PRIOR_DF", np.inf)
        ratio = 3 * scipy.stats.f.rvs(4, 8, size=200_000, random_state=9)
        prior_df, prior_ratio = crossed_module._prior(ratio, np.full(ratio.size, 4))
        assert float(prior_df) == pytest.approx(8, rel=0.05)
        assert float(prior_ratio) == pytest.approx(3, rel=0.02)

    def test_moderated_t_written_out(self) -> None:
        table = crossed_table(drawn(10, 4, 30, tests=12))
        tested = crossed_test(table)
        d0, r0 = tested.prior_df, tested.prior_ratio
        assert 0 < d0 <= crossed_module.MOST_PRIOR_DF
        for test in range(12):
            image, run, residual = table.image[test], table.run[test], table.residual[test]
            shrunk = (d0 * r0 + 3 * run / image) / (d0 + 3) * image
            variance = (max(image, residual) + max(shrunk, residual) - residual) / (4 * 30) * table.scale[test] ** 2
            df = min(3 + d0 * min(1, r0 / (run / image)), 29)
            t = table.difference[test] / np.sqrt(variance)
            assert (tested.t[test], tested.df[test]) == pytest.approx((t, df))
            assert tested.p[test] == pytest.approx(2 * scipy.stats.t.sf(abs(t), df))
        np.testing.assert_allclose(tested.p_holm, multipletests(tested.p, method="holm")[1])

    def test_tests_whose_runs_differ_more_than_others_borrow_less(self) -> None:
        d = drawn(11, 5, 200, tests=30, run=0.1)
        d[:, :, 7] += 5 * np.random.default_rng(12).normal(size=(5, 1))
        tested = crossed_test(crossed_table(d))
        assert tested.df[7] < 4.2 < np.median(tested.df)

    def test_degenerate_tests_keep_their_meaning_and_touch_no_other(self) -> None:
        d = drawn(13, 2, 15, tests=9)
        alone = crossed_test(crossed_table(d))
        d = np.concatenate([d, np.zeros((2, 15, 1)), np.full((2, 15, 1), 0.1), np.full((2, 15, 1), np.nan)], axis=2)
        d[1, 1:, 11] = 1.0  # one image in both runs: none to compare
        d[0, 0, 11] = d[1, 0, 11] = 1.0
        table = crossed_table(d)
        tested = crossed_test(table)
        np.testing.assert_array_equal(tested.t[:9], alone.t)
        assert (tested.t[9], tested.p[9]) == (0, 1)
        assert (tested.t[10], tested.p[10]) == (np.inf, 0)
        assert np.isnan([tested.t[11], tested.p[11], tested.p_holm[11]]).all()
        low, high, _ = crossed_interval(table, 0.95)
        assert low[10] == high[10] == 0.1 == table.difference[10]
        assert np.isnan([low[11], table.shares()[0, 9]]).all()

    def test_runs_that_are_copies_in_some_tests(self) -> None:
        d = drawn(14, 4, 25, tests=10)
        alone = crossed_test(crossed_table(d[:, :, 2:]))
        d[:, :, :2] = d[:1, :, :2]
        tested = crossed_test(crossed_table(d))
        np.testing.assert_allclose(tested.t[2:], alone.t)
        assert np.isfinite(tested.t).all()


class TestPlan:
    @pytest.mark.parametrize(("runs", "images"), [(3, 40), (6, 200)])
    def test_power_is_that_of_simulated_studies(self, runs: int, images: int) -> None:
        rates = calibration.family(150, 15, Design(images, runs, SIMULATED["mild runs"]))
        assert rates["planned"] == pytest.approx(rates["power"], abs=0.05)

    def test_without_run_effects_it_grows_with_images_alone(self) -> None:
        """Runs that are copies: the power of a t-test with at most n − 1 degrees of freedom."""
        power = planned_power(0.5, 1.0, 0.0, 0.0, runs=40, images=20, draws=4000)
        t = scipy.stats.t.isf(0.025, 19)
        expected = scipy.stats.nct.sf(t, 19, 0.5 * np.sqrt(20)) + scipy.stats.nct.cdf(-t, 19, 0.5 * np.sqrt(20))
        assert power[0] == pytest.approx(expected, abs=0.01)

    def test_numbers_needed_reach_the_power_and_may_not_exist(self) -> None:
        plan: dict[str, Any] = {"effect": np.array([0.1, 0.05, 0.001]), "sd_image": 0.1, "sd_run": 0.03}
        plan |= {"sd_residual": 0.05}
        needed = runs_needed(0.8, images=100, **plan)
        assert needed[2] == np.inf  # 100 images have a standard error of .01, however many runs there are
        for test, runs in enumerate(needed[:2].astype(int)):
            assert planned_power(**plan, runs=runs, images=100)[test] >= 0.8
            assert planned_power(**plan, runs=runs - 1, images=100)[test] < 0.8 or runs == 2
        images = images_needed(0.8, runs=6, **plan)
        assert np.isfinite(images[0])
        assert (images[1:] == np.inf).all()  # 6 runs have a standard error of .012

    def test_any_unit_gives_the_same_power(self) -> None:
        sds = np.array([0.1, 0.03, 0.05])
        power = planned_power(0.07, *sds, runs=4, images=50)
        assert planned_power(0.07e-200, *1e-200 * sds, runs=4, images=50) == pytest.approx(power)

    def test_bad_plans_are_refused(self) -> None:
        for wrong in ({"runs": 1}, {"images": 1}, {"alpha": 0.0}, {"sd_run": -1.0}):
            with pytest.raises(ValueError, match="plan"):
                planned_power(
                    **({"effect": 1, "sd_image": 1, "sd_run": 1, "sd_residual": 1, "runs": 3, "images": 9} | wrong)
                )


# ------------------------------------------------------------------------------------------------------- of a table


@pytest.fixture
def table() -> xr.Dataset:
    """A baseline that no seed changes, a condition with four runs and one with three of them."""
    rng = np.random.default_rng(16)
    shape = (3, 4, 24, 3, 2)
    values = rng.normal(size=(1, 1, *shape[2:])) + 0.3 * rng.normal(size=(3, 4, 1, 3, 2)) + 0.2 * rng.normal(size=shape)
    values[1:] += 0.5
    values[0, 1:] = values[2, 3:] = np.nan
    dims = ("condition", "seed", "image", "layer", "head")
    return xr.Dataset(
        {
            "entropy": (dims, values, {"units": "nat"}),
            "distance": (dims, values**2, {"units": "1"}),
        },
        coords={
            "condition": ["baseline", "finetuned", "dora"],
            "seed": [1, 2, 3, 4],
            "layer": [0, 1, 2],
            "head": [0, 1],
            "site": ("layer", ["a", "b", "c"]),
            "seed_invariant": ("condition", [True, False, False]),
        },
    )


def pick(results: Any, **wanted: Any) -> list[Any]:
    return [result for result in results if all(getattr(result, key) == value for key, value in wanted.items())]


def test_a_table_is_compared_cell_by_cell_and_layer_by_layer(table: xr.Dataset) -> None:
    tests, _ = compare_runs(table, FAST)
    d = (table.sel(condition="finetuned") - table.sel(condition="baseline", seed=1)).transpose("seed", "image", ...)
    names = ["entropy", "distance"]
    for level, each in (("head", d), ("layer", d.mean("head"))):
        expected = crossed_table(np.concatenate([each[name].values.reshape(4, 24, -1) for name in names], axis=2))
        found = pick(tests, condition="finetuned", level=level)
        np.testing.assert_allclose([test.difference for test in found], expected.difference)
        np.testing.assert_allclose([test.p_holm for test in found], crossed_test(expected).p_holm)
        np.testing.assert_allclose([test.ci for test in found], np.stack(crossed_interval(expected, 0.95)[:2], axis=1))
        np.testing.assert_allclose([test.sd_run for test in found], expected.components()[1])
        assert {test.family_size for test in found} == {len(found)}
        assert {(test.runs, test.images, test.missing, test.seeds) for test in found} == {(4, 24, 0, (1, 2, 3, 4))}
    assert {test.runs for test in pick(tests, condition="dora")} == {3}
    one = pick(tests, condition="finetuned", level="layer", metric="entropy", layer=1)[0]
    assert one.d_run == pytest.approx(one.difference / one.sd_run)
    assert one.share_run + one.share_image + one.share_residual == pytest.approx(1)
    assert not compare_runs(table.isel(seed=[0]), FAST)[0]


def test_every_row_of_a_place_is_of_the_same_cells(table: xr.Dataset) -> None:
    """Where a run lacks values, over images, over runs and over both: one difference, which its intervals hold."""
    broken = table.copy(deep=True)
    values = broken["entropy"].values
    values[1, 0, :12, 1, 0] = np.nan  # half of the images of one run lack a head
    values[1, 2, 3, 2] = np.nan  # an image of another lacks a layer
    values[1, :, :, 1, 0] += 3.0  # so that it matters which cells are averaged
    tests = compare_conditions(broken, FAST)
    crossed, _ = compare_runs(broken, FAST)
    for layer, images in enumerate((24, 24, 23)):
        where = {"condition": "finetuned", "metric": "entropy", "layer": layer}
        (over_images,), (over_both,) = pick(tests, level="layer", **where), pick(crossed, level="layer", **where)
        (over_runs,) = pick(tests, level="seed", **where)
        assert over_both.images == over_images.n == images
        assert over_both.difference == pytest.approx(over_images.difference, rel=1e-12)
        assert over_both.ci[0] < over_both.difference < over_both.ci[1]
        assert over_runs.difference == pytest.approx(over_images.difference, rel=1e-12)


def test_a_run_without_values_of_a_metric_is_left_out_of_it(table: xr.Dataset) -> None:
    without = table.copy(deep=True)
    without["entropy"].values[1, 2] = np.nan
    tests, spreads = compare_runs(without, FAST)
    assert {t.seeds for t in pick(tests, condition="finetuned", metric="entropy")} == {(1, 2, 4)}
    assert {t.seeds for t in pick(tests, condition="finetuned", metric="distance")} == {(1, 2, 3, 4)}
    assert all(test.p is not None for test in tests)
    assert spreads[0].seeds == (1, 2, 3, 4)
    image_level = pick(compare_conditions(without, FAST), condition="finetuned", metric="entropy", level="head")
    assert {(test.seeds, test.n) for test in image_level} == {((1, 2, 4), 24)}


def test_runs_without_a_cell_in_common_have_no_test(table: xr.Dataset) -> None:
    apart = table.isel(condition=[0, 1], seed=[0, 1])[["entropy", "distance"]].copy(deep=True)
    apart["entropy"].values[1, 0, :, 1:] = apart["entropy"].values[1, 1, :, :1] = np.nan
    tests = pick(compare_runs(apart, FAST)[0], metric="entropy")
    assert {(test.difference, test.p, test.images) for test in tests} == {(None, None, 0)}
    assert {test.degenerate for test in tests} == {"0 images of which every run has a value: a test needs at least 2"}


def test_runs_of_one_condition_are_tested_as_conditions_are(table: xr.Dataset) -> None:
    controls = control_runs(table, FAST)
    pairs = [("finetuned", pair) for pair in combinations((1, 2, 3, 4), 2)]
    pairs += [("dora", pair) for pair in combinations((1, 2, 3), 2)]
    assert [(control.condition, control.seeds) for control in controls] == pairs
    one = table.sel(condition="finetuned", drop=True)
    two = one.sel(seed=[2, 4]).rename(seed="condition").assign_coords(condition=["a", "b"]).expand_dims("seed")
    tests = compare_conditions(two, replace(FAST, against="a", primary=()))
    (control,) = pick(controls, condition="finetuned", seeds=(2, 4))
    assert (control.cells, control.layers, control.n) == (12, 6, 24)
    assert control.cells_differ == sum(test.survives(0.05) for test in pick(tests, level="head")) > 0
    assert control.layers_differ == sum(test.survives(0.05) for test in pick(tests, level="layer"))
    assert control.unit_of_inference == "image, given these checkpoints"


def test_of_many_runs_the_first_pairs_are_tested(table: xr.Dataset) -> None:
    many = xr.concat([table, table.assign_coords(seed=[5, 6, 7, 8])], "seed", data_vars="all", coords="minimal")
    many = many[["entropy"]].isel(layer=[0], image=slice(6))
    controls = pick(control_runs(many, FAST), condition="finetuned")
    assert [control.seeds for control in controls] == list(combinations(range(1, 9), 2))[:15]
    assert pick(controls, seeds=(1, 5))[0].cells_differ == 0  # the same run


def test_spread_of_runs_beside_the_difference(table: xr.Dataset) -> None:
    (spread, _) = compare_runs(table, FAST)[1]
    d = table.sel(condition="finetuned") - table.sel(condition="baseline", seed=1)
    by_run = np.concatenate([d[name].mean("image").values.reshape(4, -1) for name in ("entropy", "distance")], axis=1)
    apart = np.mean([abs(by_run[i] - by_run[j]) for i, j in combinations(range(4), 2)], axis=0)
    difference = abs(by_run.mean(axis=0))
    assert (spread.condition, spread.against, spread.cells) == ("finetuned", "baseline", 12)
    assert spread.ratio == pytest.approx(np.median(apart / difference))
    assert spread.cells_wider == (apart > difference).sum()
    assert spread.cells_opposite == (abs(np.sign(by_run).sum(axis=0)) < 4).sum()


def test_runs_that_are_copies_do_not_differ(table: xr.Dataset) -> None:
    copies = table.isel(condition=[0, 1]).copy(deep=True)
    for name in copies.data_vars:
        copies[name].values[1] = copies[name].values[1, :1]
    comparison = analyse(copies, FAST)
    assert {(control.cells, control.cells_differ) for control in comparison.run_controls} == {(12, 0)}
    assert {(test.sd_run, test.d_run) for test in comparison.crossed} == {(0, None)}
    assert comparison.run_spreads[0].ratio == 0


# ---------------------------------------------------------------------------------------------------- null studies


def check_family(entry: dict[str, Any]) -> None:
    """Of a family of 28 tests with normal run effects: error, coverage from six runs on, power, plan."""
    slack = 3 * np.sqrt(0.05 * 0.95 / entry["studies"])
    assert entry["crossed"] <= 0.05 + slack, entry
    if entry["runs"] >= 6:
        assert 0.03 - slack < entry["interval_misses"] < 0.08, entry
    assert entry["planned"] == pytest.approx(entry["power"], abs=0.03 + slack), entry


@pytest.mark.parametrize(("images", "runs", "kind"), [(30, 6, "mild runs"), (200, 3, "large runs")])
def test_error_and_coverage(images: int, runs: int, kind: str) -> None:
    rates = calibration.family(150, 17, Design(images, runs, SIMULATED[kind]))
    check_family({**rates, "images": images, "runs": runs, "studies": 150})


def test_runs_alone_and_images_within_runs_take_the_images_for_more_than_they_are() -> None:
    design = Design(30, 6, SIMULATED["runs that do not differ"])
    assert calibration.family(60, 18, design)["sign_flip"] > 0.2
    assert calibration.nested_misses(100, 19, design) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SIMULATED))
@pytest.mark.parametrize("runs", [3, 5, 6, 12])
def test_error_and_coverage_in_a_thousand_studies(runs: int, kind: str) -> None:
    rates = calibration.family(1000, 20, Design(200, runs, SIMULATED[kind]))
    check_family({**rates, "images": 200, "runs": runs, "studies": 1000})


def test_documented_rates() -> None:
    documented = json.loads((DOCS / "statistics_runs.json").read_text(encoding="utf-8"))
    normal = [entry for entry in documented["families"] if entry["run_effects"] == "normal"]
    assert {entry["images"] for entry in normal} == {30, 50, 100, 200, 1000}
    assert {entry["runs"] for entry in normal} == {2, 3, 5, 6, 10, 12, 20}
    for entry in normal:
        assert entry["studies"] >= 1000
        assert entry["crossed"] <= 0.05, entry
        assert entry["runs"] < 6 or 0.03 <= entry["interval_misses"] <= 0.08, entry
        assert entry["planned"] == pytest.approx(entry["power"], abs=0.03), entry
        if entry["components"] in ("mild runs", "runs that do not differ") and entry["runs"] >= 5:
            assert entry["power"] >= 0.85, entry
    assert all(entry["misses"] > 0.1 for entry in documented["nested"])


def test_the_page_shows_the_documented_rates() -> None:
    families = json.loads((DOCS / "statistics_runs.json").read_text(encoding="utf-8"))["families"]
    page = (DOCS / "statistics.md").read_text(encoding="utf-8")
    names = ("mild runs", "runs that do not differ", "large runs", "measured, finetuned", "measured, dora")
    for name in names:
        normal, exponential = (
            [e for e in families if e["components"] == name and (e["run_effects"] == "normal") is is_normal]
            for is_normal in (True, False)
        )
        many, three = [e for e in normal if e["runs"] >= 6], [e for e in normal if e["runs"] == 3]
        flips = [100 * e["sign_flip"] for e in many]
        misses = [[100 * e["interval_misses"] for e in cells] for cells in (many, three)]
        power = (min(100 * e["power"] for e in normal if e["runs"] == runs) for runs in (3, 5, 6, 12))
        row = [
            *(f"{100 * max(e['crossed'] for e in cells):.1f}" for cells in (normal, exponential)),
            f"{min(flips):.0f} to {max(flips):.0f}",
            *(f"{min(cells):.1f} to {max(cells):.1f}" for cells in misses),
            " / ".join(f"{share:.0f}" for share in power),
        ]
        assert f"| {' | '.join(row)} |" in page, name
