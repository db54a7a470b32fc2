"""How metrics change together, over cells and over images, and what other images would give: scipy, coverage."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics import Relation, Settings, cross_metric_correlation
from engine.statistics.bootstrap import resampled_means
from engine.statistics.rank_correlation import spearman, spearman_interval

Floats = NDArray[np.float64]
FAST = Settings(permutations=299)


def table_of(**changes: Floats) -> xr.Dataset:
    """A baseline of zeros and a condition with these values, [image, layer, head] each."""
    dims = ("condition", "seed", "image", "layer", "head")
    images, layers, heads = next(iter(changes.values())).shape
    return xr.Dataset(
        {
            name: (dims, np.stack([np.zeros_like(values), values])[:, None], {"units": "1"})
            for name, values in changes.items()
        },
        coords={
            "condition": ["baseline", "finetuned"],
            "seed": [0],
            "image": np.arange(images),
            "layer": np.arange(layers),
            "site": ("layer", [f"blocks.{layer}.attn" for layer in range(layers)]),
            "head": np.arange(heads),
        },
    )


def noisy(
    seed: int, images: int = 60, layers: int = 4, heads: int = 4, rho: float = 0.6, noise: float = 1.0
) -> list[Floats]:
    """Two metrics' differences: cells that correlate at about rho, and images' deviations that do at .5."""
    random = np.random.default_rng(seed)
    one, chance = random.standard_normal((2, 1, layers, heads))
    deviations = random.standard_normal((2, images, layers, heads)) + random.standard_normal((2, images, 1, 1))
    deviations[1] = 0.5 * deviations[0] + math.sqrt(0.75) * deviations[1]
    return [one + noise * deviations[0], rho * one + math.sqrt(1 - rho**2) * chance + noise * deviations[1]]


def of_cells(relations: list[Relation]) -> Relation:
    (relation,) = (relation for relation in relations if relation.over == "cells")
    return relation


def test_correlations_are_scipys_over_cells_and_within_layers() -> None:
    one, other = noisy(0)
    relations = cross_metric_correlation(table_of(distance=one, entropy=other, bits=-2 * other), FAST)
    assert len(relations) == 3 * (1 + 4)
    first = relations[:5]
    assert [(relation.over, relation.layer, relation.n) for relation in first] == [
        ("cells", None, 16),
        *(("images", layer, 60) for layer in range(4)),
    ]
    expected = stats.spearmanr(one.mean(axis=0).ravel(), other.mean(axis=0).ravel()).statistic
    assert first[0].rho == pytest.approx(expected, abs=1e-12)
    for layer in range(4):
        expected = stats.spearmanr(one[:, layer].mean(axis=1), other[:, layer].mean(axis=1)).statistic
        assert first[1 + layer].rho == pytest.approx(expected, abs=1e-12)
    assert all(relation.ci is not None for relation in relations)
    # Of the same resamples: a metric turned round has the other's relation turned round.
    turned = relations[5]
    assert (turned.metric, turned.with_metric) == ("distance", "bits")
    assert turned.rho == pytest.approx(-first[0].rho)
    assert turned.ci == pytest.approx((-first[0].ci[1], -first[0].ci[0]))
    opposite = relations[10]
    assert (opposite.rho, opposite.ci) == (pytest.approx(-1), pytest.approx((-1, -1)))


def test_interval_over_cells_is_that_of_resampled_images() -> None:
    """Images drawn, cells averaged and ranked anew; as far to both sides as the farther percentile."""
    one, other = noisy(1)
    random, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        rows = random.integers(60, size=60)
        drawn.append(stats.spearmanr(one[rows].mean(axis=0).ravel(), other[rows].mean(axis=0).ravel()).statistic)
    found = of_cells(cross_metric_correlation(table_of(distance=one, entropy=other), Settings(permutations=1999)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    reach = max(high - found.rho, found.rho - low)
    assert found.ci == pytest.approx((found.rho - reach, found.rho + reach), abs=0.03)
    wider = of_cells(cross_metric_correlation(table_of(distance=one, entropy=other), Settings(confidence=0.99)))
    assert wider.ci[0] < found.ci[0] < found.ci[1] < wider.ci[1]


def test_missing_values_and_what_has_no_interval() -> None:
    one, other = noisy(2)
    one[:, 0, 0] = np.nan  # a cell that one metric does not have
    other[:50, 1, 1] = np.nan
    other[:30] = np.nan  # images that the other does not have: 30 are left
    relations = cross_metric_correlation(table_of(distance=one, entropy=other), FAST)
    assert (relations[0].n, relations[1].n) == (15, 30)
    both = np.isfinite(one[0])
    means = [np.nanmean(np.where(both, values, 0), axis=0)[both] for values in (one, other)]
    assert relations[0].rho == pytest.approx(stats.spearmanr(*means).statistic)
    assert relations[0].ci is not None
    other[:42] = np.nan
    few = cross_metric_correlation(table_of(distance=one, entropy=other), FAST)
    assert [relation.ci for relation in few] == [None] * 5, "18 images"
    assert all(relation.rho is not None for relation in few)
    flat = cross_metric_correlation(table_of(distance=one, entropy=np.ones_like(one)), FAST)
    assert all(relation.rho is None is relation.ci for relation in flat)
    one, other = noisy(2, layers=5, heads=5)
    one[np.arange(60)[:, None, None] != np.arange(25).reshape(5, 5)] = np.nan  # each cell in an image of its own
    rare = of_cells(cross_metric_correlation(table_of(distance=one, entropy=other), FAST))
    assert rare.rho is not None
    assert rare.ci is None, "no resample holds all cells"


def test_resampled_means_are_of_the_values_that_are_drawn() -> None:
    random = np.random.default_rng(3)
    values = random.standard_normal((40, 3)) + np.array([0, 5, 100])
    values[:39, 1] = np.nan
    found = resampled_means(values, resamples=500, seed=1)
    assert found.shape == (500, 3)
    assert np.nanmean(found, axis=0) == pytest.approx(np.nanmean(values, axis=0), abs=0.05)
    assert found[:, 2].std() == pytest.approx(values[:, 2].std() / math.sqrt(40), rel=0.1)
    drawn = np.isfinite(found[:, 1])
    assert 0.5 < drawn.mean() < 0.75, "1 − 1/e of the resamples hold the only value"
    assert found[drawn, 1] == pytest.approx(values[39, 1])
    assert np.array_equal(found, resampled_means(values, resamples=500, seed=1, block_bytes=4096), equal_nan=True)


def test_error_over_images_is_the_jackknifes() -> None:
    """Of ρ with each image left out in turn, ties among the values."""
    random = np.random.default_rng(4)
    x = np.round(random.standard_normal(200), 1)
    y = np.round(x + random.standard_normal(200) * np.abs(x), 0)
    rho, n = spearman(x, y)
    assert (rho, n) == (pytest.approx(stats.spearmanr(x, y).statistic), 200)
    without = np.array([stats.spearmanr(np.delete(x, i), np.delete(y, i)).statistic for i in range(200)])
    error = math.sqrt(199 / 200 * ((without - without.mean()) ** 2).sum())
    low, high = spearman_interval(x, y, 0.95)
    half = (math.atanh(high) - math.atanh(low)) / 2
    assert half * (1 - rho**2) / stats.t.isf(0.025, 198) == pytest.approx(error, rel=0.02)
    assert math.atanh(low) + math.atanh(high) == pytest.approx(2 * math.atanh(rho))
    assert spearman_interval(x, 3 * x + 1, 0.95) == pytest.approx((1, 1))
    assert math.isnan(spearman_interval(x, np.ones(200), 0.95)[0])


def covered_over_images(studies: int, images: int) -> float:
    """Share of intervals that hold ρ, where the spread of one metric grows with the other."""

    def draw(random: np.random.Generator, n: int) -> tuple[Floats, Floats]:
        x, noise = random.standard_normal((2, n))
        return x, 0.5 * x + noise * np.abs(x)

    true = stats.spearmanr(*draw(np.random.default_rng(99), 200_000)).statistic
    intervals = [spearman_interval(*draw(np.random.default_rng([5, i]), images), 0.95) for i in range(studies)]
    return sum(low <= true <= high for low, high in intervals) / studies


def covered_over_cells(studies: int, *, images: int, side: int, noise: float) -> float:
    """Share of intervals that hold the ρ of the cells' true means, `side`² of them."""
    covered = 0
    for study in range(studies):
        without, given = (noisy(study, images, side, side, 0.8, amount) for amount in (0.0, noise))
        true = spearman(*(values[0].ravel() for values in without))[0]
        interval: Any = of_cells(cross_metric_correlation(table_of(a=given[0], b=given[1]), FAST)).ci
        covered += interval[0] <= true <= interval[1]
    return covered / studies


def test_intervals_cover() -> None:
    """Over images where normal theory is too short; over few and many cells, whose means have errors of a seventh."""
    assert 0.92 <= covered_over_images(400, 100) <= 0.98
    assert covered_over_cells(100, images=50, side=4, noise=1.0) >= 0.9
    assert covered_over_cells(40, images=50, side=12, noise=1.0) >= 0.85


@pytest.mark.slow
@pytest.mark.parametrize("images", [20, 50, 200])
@pytest.mark.parametrize("side", [4, 12])
def test_intervals_over_cells_cover_more_often_than_they_say(images: int, side: int) -> None:
    """Where cells' means differ by four of their errors or more; not where they lie within their errors."""
    covered = covered_over_cells(300, images=images, side=side, noise=math.sqrt(images) / 4 / math.sqrt(2))
    print(images, side, covered)
    assert covered >= 0.92
