"""Does inference over training runs and images do what it says? Studies by the thousand, without an effect and with.

    python -m benchmarks.calibrate_runs [--studies 1000] [--docs docs] [--table metrics/attention_metrics.zarr]

writes docs/statistics_runs.json, the same numbers each time. `--table` takes the components of a measured study with
several runs; without it they are those of the file that is there. `tests/test_statistics_crossed.py` runs some of the
same simulations with fewer studies.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.null_studies import autoregressive, exchangeable
from engine.measure import read_table
from engine.statistics import compare_runs
from engine.statistics.bootstrap import bootstrap_interval
from engine.statistics.crossed import crossed_interval, crossed_table, crossed_test, planned_power
from engine.statistics.permutation import sign_flip

Floats = NDArray[np.float64]

ALPHA = 0.05
LAYERS, METRICS = 4, 7
EFFECT = 6.0  # standard errors of the mean over runs and images
RESAMPLES = 999
# Standard deviations of images, runs and residuals.
SIMULATED = {
    "mild runs": (0.10, 0.02, 0.05),
    "runs that do not differ": (0.10, 0.0, 0.05),
    "large runs": (0.10, 0.10, 0.05),
}
SIZES = [*product((30, 50, 100, 200, 1000), (3, 5, 6, 12)), *product((50, 1000), (2, 10, 20))]  # images, runs
CORRELATION = np.kron(exchangeable(METRICS, 0.6), autoregressive(LAYERS, 0.8))


class Design(NamedTuple):
    """A study: numbers of images and runs, standard deviations of the components, and of what kind runs are."""

    images: int
    runs: int
    components: Any  # [image, run, residual] or [image, run, residual; test]
    skewed: bool = False  # run effects are exponential (skewness 2), not normal

    def error(self) -> Floats:
        """Standard error of the mean over runs and images, [test]."""
        image, run, residual = (np.broadcast_to(sd, len(CORRELATION)) for sd in self.components)
        variance = image**2 / self.images + run**2 / self.runs + residual**2 / (self.images * self.runs)
        return np.asarray(np.sqrt(variance))


def differences(rng: np.random.Generator, design: Design) -> Floats:
    """Differences without an effect, [run, image, test]: 4 layers (.8 from neighbour to neighbour) × 7 metrics (.6)."""
    mix = np.linalg.cholesky(CORRELATION).T
    tests = len(mix)
    of_images = rng.normal(size=(design.images, tests)) @ mix
    draws = rng.normal(size=(design.runs, tests))
    if design.skewed:
        draws = rng.exponential(size=draws.shape) - 1
    of_runs = draws @ mix
    residual = rng.standard_normal((design.runs, design.images, tests), dtype=np.float32) @ mix.astype(np.float32)
    image, run, sd = design.components
    return np.asarray(image * of_images + run * of_runs[:, None] + sd * residual)


def family(studies: int, seed: int, design: Design) -> dict[str, float]:
    """Rates of a family of 28 tests.

    Shares of studies without an effect in which the crossed test, and the sign flip of runs (max-T), find anything;
    share of crossed intervals that miss the truth; with an effect of 6 standard errors in a test, how often it is found
    (Bonferroni), and how often the plan says so.
    """
    found: defaultdict[str, float] = defaultdict(float)
    tests, error = len(CORRELATION), design.error()
    for study in range(studies):
        d = differences(np.random.default_rng([seed, design.images, design.runs, study]), design)
        table = crossed_table(d)
        found["crossed"] += bool((crossed_test(table).p_holm <= ALPHA).any())
        low, high, _ = crossed_interval(table, 1 - ALPHA)
        found["interval_misses"] += float(((low > 0) | (high < 0)).mean())
        with_effect = replace(table, difference=table.difference + EFFECT * error)
        found["power"] += float((crossed_test(with_effect).p * tests <= ALPHA).mean())
        found["sign_flip"] += bool((sign_flip(d.mean(axis=1), seed=study).p_max_t <= ALPHA).any())
    planned = planned_power(
        EFFECT * error,
        *design.components,
        runs=design.runs,
        images=design.images,
        alpha=ALPHA,
        correlation=CORRELATION,
        draws=2000,
    )
    return {name: count / studies for name, count in found.items()} | {"planned": float(planned.mean())}


def nested_misses(studies: int, seed: int, design: Design) -> float:
    """How often an interval misses the truth for which images are redrawn within each run, one test a study."""
    groups = np.repeat(np.arange(design.runs), design.images)[:, None]
    missed = 0
    for study in range(studies):
        rng = np.random.default_rng([seed, design.images, design.runs, study])
        image, run, residual = design.components
        d = image * rng.normal(size=design.images) + run * rng.normal(size=(design.runs, 1))
        d += residual * rng.normal(size=d.shape)
        low, high = bootstrap_interval(
            d.reshape(-1, 1), resamples=RESAMPLES, confidence=1 - ALPHA, seed=study, groups=groups
        )
        missed += not low[0] <= 0 <= high[0]
    return missed / studies


def components(table: Path) -> dict[str, list[list[float]]]:
    """Condition -> standard deviations of images, runs and residuals, [3, test], of the layer means of a study."""
    tests, _ = compare_runs(read_table(table))
    found: dict[str, list[list[float]]] = {}
    for test in tests:
        if test.level == "layer":
            for column, sd in zip(
                found.setdefault(test.condition, [[], [], []]),
                (test.sd_image, test.sd_run, test.sd_residual),
                strict=True,
            ):
                column.append(float(f"{sd or 0:.4g}"))
    return found


def calibrate(studies: int, measured: Mapping[str, Any], seed: int = 1) -> dict[str, Any]:
    """All simulations, as docs/statistics_runs.json holds them; rates are shares of the studies."""
    kinds: dict[str, Any] = {**SIMULATED, **{f"measured, {name}": np.array(sds) for name, sds in measured.items()}}
    families = []
    for (kind, sds), skewed in product(kinds.items(), (False, True)):
        sizes = [*product((30, 200, 1000), (3, 6, 12))] if skewed else SIZES
        for images, runs in sizes:
            of = {"components": kind, "run_effects": "exponential" if skewed else "normal"}
            rates = family(studies, seed, Design(images, runs, sds, skewed))
            families.append({**of, "images": images, "runs": runs, "studies": studies, **rates})
            print(families[-1], flush=True)
    return {
        "alpha": ALPHA,
        "seed": seed,
        "design": {"tests": len(CORRELATION), "effect": EFFECT, "resamples": RESAMPLES},
        "components": {**SIMULATED, "measured": measured},
        "families": families,
        "nested": [
            {
                "components": kind,
                "images": 100,
                "runs": runs,
                "studies": studies,
                "misses": nested_misses(studies, seed + 1, Design(100, runs, SIMULATED[kind])),
            }
            for kind in ("mild runs", "runs that do not differ")
            for runs in (3, 6, 10, 20)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--table", type=Path, help="the table of a study with several runs")
    arguments = parser.parse_args()
    path = arguments.docs / "statistics_runs.json"
    if arguments.table is None:
        measured = json.loads(path.read_text(encoding="utf-8"))["components"]["measured"]
    else:
        measured = components(arguments.table)
    path.write_text(json.dumps(calibrate(arguments.studies, measured), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
