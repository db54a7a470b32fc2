"""Association over images: known correlations, other packages' numbers, missing values, levels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics import correlate_over_images
from engine.statistics.association import MIN_DF

Floats = NDArray[np.float64]


def elements(values: Floats) -> xr.DataArray:
    return xr.DataArray(values, dims=("image", "layer", "head")[: values.ndim])


def test_equals_scipys_correlation_and_finds_what_is_there() -> None:
    random = np.random.default_rng(0)
    values, outcome = random.standard_normal((60, 3, 4)), random.standard_normal(60)
    values[:, 1, 2] += 1.5 * outcome
    values[:10, 0, 0] = np.nan
    values[:, 2, 3] = 5.0
    found = correlate_over_images(elements(values), outcome, permutations=999)
    expected = stats.spearmanr(values[:, 1, 1], outcome)
    np.testing.assert_allclose(found["rho"][1, 1], expected.statistic, atol=1e-12)
    np.testing.assert_allclose(found["p"][1, 1], expected.pvalue, atol=0.05)
    assert float(found["p_max_r"][1, 2]) == 1 / 1000
    assert int((found["p_max_r"] < 0.05).sum()) == 1
    assert int(found["n"][0, 0]) == 50
    assert np.isnan(found["rho"][2, 3])
    assert found.attrs["family_size"] == 11
    assert (found["p_max_r"].fillna(1) >= found["p"].fillna(0)).all()


def test_missing_values_leave_spearman_of_the_others() -> None:
    """Against scipy on the pairs that are there, ties among them; a pair that is monotone has ρ 1, however few."""
    random = np.random.default_rng(2)
    outcome = np.round(random.standard_normal(40), 1)
    values = np.round(random.standard_normal((40, 6)), 1)
    values[:, 3:] = outcome[:, None] ** 3
    values[random.random(values.shape) < 0.4] = np.nan
    values[:, 5] = np.nan
    few = random.permutation(40)[:6]
    values[few, 5] = outcome[few]
    found = correlate_over_images(elements(values), outcome, permutations=1999)
    for column, there in enumerate(np.isfinite(values).T):
        expected = stats.spearmanr(values[there, column], outcome[there])
        assert float(found["rho"][column]) == pytest.approx(expected.statistic, abs=1e-12)
        assert float(found["rho_raw"][column]) == pytest.approx(expected.statistic, abs=1e-12)
        assert int(found["n"][column]) == there.sum()
        if column < 3:
            assert float(found["p"][column]) == pytest.approx(expected.pvalue, abs=0.05)
    np.testing.assert_allclose(found["rho"][3:], 1, atol=1e-12)
    # Of the 720 orders of six images two are as extreme, and a few more with the outcome's ties.
    assert int(found["n"][5]) == 6
    assert 1 / 2000 <= float(found["p"][5]) < 0.02


def test_elements_without_many_values_do_not_decide_the_familys_greatest() -> None:
    """Of 6 images ρ = 1 comes by chance; the statistic is of one variance whatever the number of images."""
    random = np.random.default_rng(3)
    values, outcome = random.standard_normal((200, 30)), random.standard_normal(200)
    values[:, 0] += 0.4 * outcome
    alone = correlate_over_images(elements(values[:, :1]), outcome, permutations=999)
    values[6:, 1:] = np.nan
    together = correlate_over_images(elements(values), outcome, permutations=999)
    assert float(alone["p_max_r"][0]) == float(together["p_max_r"][0]) == 1 / 1000
    assert (together["n"][1:] == 6).all()


def example(seed: int, images: int = 48, columns: int = 4) -> dict[str, Any]:
    """Changes and an outcome that go with baseline values and class, with ties; the last of four classes is small."""
    random = np.random.default_rng(seed)
    classes = random.permutation(np.r_[np.full(4, 3), np.arange(images - 4) % 3])
    before = np.round(random.standard_normal((images, columns)), 1)
    logit = np.round(before[:, 0] + random.standard_normal(images) + classes, 1)
    common = random.standard_normal(images)
    changes = classes[:, None] - before + 0.7 * common[:, None] + random.standard_normal(before.shape)
    outcome = common - logit + 0.5 * before[:, 1] + random.standard_normal(images)
    return {
        "changes": elements(changes),
        "outcome": outcome,
        "baseline": elements(before),
        "covariates": [logit],
        "strata": classes,
    }


def design(given: dict[str, Any], column: int) -> Floats:
    """Class dummies, the ranks of both baselines in each class, one slope for classes below six images, and curves."""
    classes, images = np.unique(given["strata"], return_counts=True)
    dummies = (given["strata"][:, None] == classes).astype(float)
    small = dummies[:, images < 6].sum(axis=1, keepdims=True)
    slopes = np.hstack([dummies[:, images >= 6], small[:, : int(small.any())]])
    ranks = [stats.rankdata(v) / len(v) for v in (given["covariates"][0], given["baseline"].values[:, column])]
    lines = [slopes * rank[:, None] for rank in ranks]
    return np.column_stack([dummies, *lines, *(rank**power for rank in ranks for power in (2, 3))])


def test_adjusted_correlation_is_the_partial_one_of_a_regression() -> None:
    """Of statsmodels' t of the change in a regression of ranks: r² = t²/(t² + df)."""
    given = example(0)
    found = correlate_over_images(**given, permutations=9)
    for column in range(found.sizes["layer"]):
        x = stats.rankdata(given["changes"].values[:, column])
        fit = sm.OLS(stats.rankdata(given["outcome"]), np.column_stack([x, design(given, column)])).fit()
        partial = fit.tvalues[0] / np.sqrt(fit.tvalues[0] ** 2 + fit.df_resid)
        assert float(found["rho"][column]) == pytest.approx(partial, abs=1e-9)
        assert float(found["df"][column]) == fit.df_resid == 48 - 4 - 2 * (3 + 1) - 4 - 1


def freedman_lane(given: dict[str, Any], permutations: int, seed: int) -> tuple[Floats, Floats]:
    """p alone and over all elements, by the definition: each element's own residuals, its own model fitted anew."""
    random = np.random.default_rng(seed)
    outcome, changes = stats.rankdata(given["outcome"]), stats.rankdata(given["changes"].values, axis=0)

    def statistics(order: NDArray[np.intp]) -> Floats:
        found = []
        for column, x in enumerate(changes.T):
            model = design(given, column)
            projection = model @ np.linalg.pinv(model)
            permuted = projection @ outcome + (outcome - projection @ outcome)[order]
            left_x, left_y = (v - projection @ v for v in (x, permuted))
            found.append(abs(left_x @ left_y) / np.sqrt((left_x**2 * left_y**2).sum()))
        return np.array(found)

    observed = statistics(np.arange(len(outcome)))
    orders = np.tile(np.arange(len(outcome)), (permutations, 1))
    for stratum in np.unique(given["strata"]):
        members = np.flatnonzero(given["strata"] == stratum)
        orders[:, members] = random.permuted(orders[:, members], axis=1)
    null = np.array([statistics(order) for order in orders])
    return (null >= observed).mean(axis=0), (null.max(axis=1)[:, None] >= observed).mean(axis=0)


def test_p_is_that_of_freedman_and_lanes_residuals_of_each_element() -> None:
    given = example(4)
    found = correlate_over_images(**given, permutations=9999)
    alone, over_all = freedman_lane(given, 1000, 0)
    assert alone.min() < 0.03 < 0.2 < over_all.max()
    np.testing.assert_allclose(found["p"], alone, atol=0.05)
    np.testing.assert_allclose(found["p_max_r"], over_all, atol=0.06)


def test_images_alone_in_their_stratum_change_nothing() -> None:
    given = example(5)
    before = correlate_over_images(**given | {"covariates": (), "baseline": None}, permutations=99)
    values = np.concatenate([given["changes"].values, np.full((2, 4), 99.0)])
    strata = np.concatenate([given["strata"], [7, 8]])
    outcome = np.concatenate([given["outcome"], [99.0, 98.0]])
    after = correlate_over_images(elements(values), outcome, strata=strata, permutations=99)
    np.testing.assert_allclose(after["rho"], before["rho"], atol=1e-12)
    np.testing.assert_array_equal(after["df"], before["df"])
    alone = correlate_over_images(elements(values), outcome, strata=np.arange(50), permutations=99)
    assert alone.attrs["family_size"] == 0
    assert np.isnan(alone["rho"]).all()
    assert np.isfinite(alone["rho_raw"]).all()


def test_what_strata_and_covariates_explain_has_no_test() -> None:
    """A change that its baseline value or the class fixes, too few degrees of freedom, an outcome that classes fix."""
    given = example(6)
    values, before = given["changes"].values.copy(), given["baseline"].values
    values[:, 0] = -before[:, 0]
    values[:, 1] = given["strata"]
    values[15:, 2] = np.nan
    found = correlate_over_images(**given | {"changes": elements(values)}, permutations=99)
    assert np.isnan(found["rho"]).values.tolist() == [True, True, True, False]
    assert np.isnan(found["p"]).values.tolist() == [True, True, True, False]
    assert np.isnan(found["p_max_r"]).values.tolist() == [True, True, True, False]
    assert 0 < int(found["df"][2]) < MIN_DF < int(found["df"][3])
    assert np.isfinite(found["rho_raw"]).all()
    assert found.attrs["family_size"] == 1
    fixed = correlate_over_images(**given | {"outcome": given["strata"]}, permutations=99)
    assert fixed.attrs["family_size"] == 0
    constant = correlate_over_images(given["changes"], np.ones(48), permutations=99)
    assert np.isnan(constant["rho_raw"]).all()
    empty = correlate_over_images(**given | {"changes": elements(np.full((48, 4), np.nan))}, permutations=99)
    assert (empty["n"] == 0).all()


def test_bad_requests_are_refused() -> None:
    values = elements(np.arange(8.0)[:, None].repeat(2, axis=1))
    with pytest.raises(ValueError, match="a value of each of 8 images"):
        correlate_over_images(values, np.ones(7))
    with pytest.raises(ValueError, match="not finite in 1 images"):
        correlate_over_images(values, np.array([np.nan, *range(7)]))
    with pytest.raises(ValueError, match="not finite in 1 images"):
        correlate_over_images(values, np.arange(8), covariates=[np.array([np.nan, *range(7)])])
    with pytest.raises(ValueError, match="one label for each of 8 images"):
        correlate_over_images(values, np.arange(8), strata=[1, 2])
    with pytest.raises(ValueError, match="at least 1; found 0"):
        correlate_over_images(values, np.arange(8), permutations=0)


SHAPES = {"normal": lambda z: z, "skewed": np.exp}


def rejected(
    studies: int,
    seed: int,
    *,
    images: int = 300,
    shape: str = "normal",
    kept: float = 0.6,
    icc: float = 0.0,
    true: float = 0.0,
) -> dict[str, float]:
    """Shares of studies with p ≤ .05: a raw and an adjusted test alone, the adjusted family, the truly associated one.

    Ten classes and 12 elements, whose baseline values share .8 of their variance with the baseline logit: changes go
    with the change of the logit since both lead away from a common start. Afterwards `kept` of a value is left, the
    rest is chance; the first element's correlates at `true` with the logit's. With `icc` classes move values, element
    by element and the logit, each on its own.
    """
    found = dict.fromkeys(("raw", "adjusted", "family", "power"), 0.0)
    for study in range(studies):
        random = np.random.default_rng([seed, study])
        normal = random.standard_normal
        classes = random.permutation(np.arange(images) % 10)
        common = normal((images, 1))
        before, logit = (np.sqrt(0.8) * common + np.sqrt(0.2) * normal((images, n)) for n in (12, 1))
        chance, of_logit = normal((images, 12)), normal((images, 1))
        chance[:, :1] = true * of_logit + np.sqrt(1 - true**2) * chance[:, :1]
        moves = [np.sqrt(icc / (1 - icc)) * normal((10, n))[classes] for n in (12, 1)]
        after = kept * before + np.sqrt(1 - kept**2) * chance + moves[0]
        logit_after = kept * logit + np.sqrt(1 - kept**2) * of_logit + moves[1]
        before, logit, after, logit_after = map(SHAPES[shape], (before, logit, after, logit_after))
        changes, outcome = elements(after - before), (logit_after - logit)[:, 0]
        raw = correlate_over_images(changes[:, 1:2], outcome, permutations=199, seed=study)
        adjusted = correlate_over_images(
            changes,
            outcome,
            baseline=elements(before),
            covariates=[logit[:, 0]],
            strata=classes,
            permutations=199,
            seed=study,
        )
        found["raw"] += float(raw["p"][0]) <= 0.05
        found["adjusted"] += float((adjusted["p"][1:] <= 0.05).mean())
        found["family"] += bool((adjusted["p_max_r"][1:] <= 0.05).any())
        found["power"] += float(adjusted["p_max_r"][0]) <= 0.05
    return {name: count / studies for name, count in found.items()}


def test_regression_to_the_mean_is_no_association() -> None:
    """Independent given the baseline: adjusted tests hold 5 %, of skewed values too; raw ones do not."""
    for shape in SHAPES:
        rates = rejected(60, 1, shape=shape)
        assert rates["raw"] > 0.5
        assert rates["adjusted"] < 0.085
        assert rates["family"] <= 0.15


def test_independent_class_effects_are_no_association() -> None:
    rates = rejected(60, 2, kept=0.0, icc=0.5)
    assert rates["adjusted"] < 0.085
    assert rates["family"] <= 0.15


def test_a_true_association_is_found() -> None:
    assert rejected(40, 3, true=0.3)["power"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("images", [60, 1000])
@pytest.mark.parametrize("kept", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("icc", [0.0, 0.5])
def test_adjusted_tests_hold_their_level(images: int, kept: float, shape: str, icc: float) -> None:
    rates = rejected(200, 4, images=images, kept=kept, shape=shape, icc=icc)
    print(images, kept, shape, icc, rates)
    assert rates["adjusted"] < 0.075
    assert rates["family"] <= 0.105, "binomial 99.9 % point of 200 at .05"
