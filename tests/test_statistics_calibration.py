"""Null studies: tests hold their level, intervals their coverage, and the level is that of the right unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from benchmarks import calibrate_statistics as calibration
from benchmarks.calibrate_statistics import band
from engine.statistics import Settings, compare_columns, compare_conditions

DOCS = Path(__file__).parents[1] / "docs"


def holds(rate: float, studies: int, nominal: float = 0.05) -> bool:
    low, high = band(studies, nominal)
    return low <= rate <= high


def check_images(results: dict[str, float], studies: int) -> None:
    """The family-wise error is that of max-T and of clusters; without a correction most studies "find" something."""
    for method in ("one t-test", "max_t", "clusters"):
        assert holds(results[method], studies), (method, results)
    assert results["holm"] <= band(studies)[1]
    assert results["uncorrected"] > 0.5
    assert holds(results["bca_coverage"], studies, 0.95), results


def check_runs(results: dict[str, float], studies: int, runs: int) -> None:
    """With run noise image-level tests reject far too often; sign flips over runs and Student's interval hold."""
    assert results["images_of_one_run"] > 0.4
    assert results["images_of_one_run_family"] > 0.6
    # The p-values of few runs are coarse: the level is the greatest one that does not pass 5 %.
    patterns = 2**runs
    level = 2 * (0.05 * patterns // 2) / patterns
    assert holds(results["over_runs"], studies, level), results
    assert results["over_runs_family"] <= band(studies)[1]
    assert holds(results["student_coverage"], studies, 0.95), results
    assert results["bca_of_one_run_coverage"] < 0.7


def test_levels_and_coverage_over_images() -> None:
    check_images(calibration.image_level(150, seed=11, flips=199), 150)


@pytest.mark.parametrize("images", [20, 50])
def test_skewed_differences_of_few_images_hold_the_level(images: int) -> None:
    found = 0
    for study in range(150):
        d = calibration.null_differences(np.random.default_rng([21, images, study]), images, skewed=True)
        d = d.reshape(images, -1)
        families = np.arange(d.shape[1]) % calibration.METRICS
        compared = compare_columns(
            np.zeros_like(d), d, families=families, permutations=399, seed=study, confidence=0.95
        )
        found += bool((compared.columns["p_max_t"] <= 0.05).any())
    assert found / 150 <= band(150)[1]


def test_two_conditions_without_effect_are_rarely_told_apart_by_the_primary_family() -> None:
    primary, anything = 0, 0
    for study in range(100):
        d = calibration.null_differences(np.random.default_rng([22, study]), 40)
        values = np.moveaxis(np.stack([np.zeros_like(d), d])[:, None], -1, 0)
        dims = ("condition", "seed", "image", "layer", "head")
        table = xr.Dataset(
            {f"metric_{i}": (dims, of_metric, {"units": "1"}) for i, of_metric in enumerate(values)},
            coords={
                "condition": ["baseline", "finetuned"],
                "seed": [0],
                "layer": range(d.shape[1]),
                "head": range(d.shape[2]),
                "site": ("layer", [f"blocks.{i}" for i in range(d.shape[1])]),
            },
        )
        settings = Settings(permutations=199, primary=tuple(map(str, table.data_vars))[:2], seed=study)
        tests = compare_conditions(table, settings)
        claimed = {test.role for test in tests if test.survives(0.05)}
        claimed |= {"primary" for test in tests if test.p_gated is not None and test.p_gated <= 0.05}
        primary += "primary" in claimed
        anything += bool(claimed)
    assert primary / 100 <= band(100)[1] < anything / 100


def test_with_run_noise_only_the_seed_level_holds() -> None:
    check_runs(calibration.run_noise(150, 12, images=100, runs=6, flips=99), 150, 6)


@pytest.mark.slow
def test_levels_and_coverage_in_a_thousand_studies() -> None:
    check_images(calibration.image_level(1000, seed=13), 1000)
    check_runs(calibration.run_noise(1000, 14, images=200, runs=10), 1000, 10)


def test_a_t_test_over_layers_does_not_hold() -> None:
    rates = [calibration.layer_means(4000, 15, rho) for rho in (0.0, 0.5, 0.9)]
    assert holds(rates[0], 4000)
    assert rates[1] > 0.2
    assert rates[2] > 0.6


@pytest.fixture(scope="module")
def documented() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DOCS / "statistics_calibration.json").read_text(encoding="utf-8"))
    return loaded


def test_the_documented_numbers_lie_within_their_bands(documented: dict[str, Any]) -> None:
    images = documented["image_level"]
    assert images["studies"] >= 1000
    check_images(images, images["studies"])
    for entry in documented["run_noise"]:
        assert entry["studies"] >= 1000
        if entry["images"] >= 200:
            check_runs(entry, entry["studies"], entry["runs"])
    large = [entry for entry in documented["bca_coverage"] if entry["images"] >= 200]
    assert all(holds(entry["rate"], entry["studies"], 0.95) for entry in large)


def test_the_page_shows_the_documented_numbers(documented: dict[str, Any]) -> None:
    """docs/statistics.md is written by hand; its table must be what the JSON says."""
    page = (DOCS / "statistics.md").read_text(encoding="utf-8")
    images, skewed = documented["image_level"], documented["image_level_skewed"]
    for method in ("uncorrected", "benjamini_hochberg", "holm", "max_t", "clusters"):
        assert f"| {100 * images[method]:.1f} % | {100 * skewed[method]:.1f} % |" in page, method
    for entry in documented["run_noise"]:
        if entry["runs"] == 6:
            shares = " | ".join(
                f"{100 * entry[key]:.0f} %" for key in ("images_of_one_run", "images_of_all_runs", "over_runs")
            )
            assert f"| {entry['images']:,} | {shares} |" in page
