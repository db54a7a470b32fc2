"""What training runs say: conditions over runs and images like these, and how far runs of one condition lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, islice
from typing import Literal

import numpy as np
import xarray as xr
from tqdm import tqdm

from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.crossed import (
    CrossedTable,
    crossed_interval,
    crossed_table,
    crossed_test,
    images_needed,
    join,
    runs_needed,
)
from engine.statistics.paired import compare_columns
from engine.statistics.pairing import ConditionPairs, MetricPairs, measured_runs, paired_conditions, seed_invariant
from engine.statistics.results import (
    CROSSED,
    DEFAULTS,
    IMAGES,
    CrossedTest,
    RunControl,
    RunSpread,
    Settings,
    build,
    finite,
)

MOST_PAIRS = 15
"""Pairs of runs of one condition that are tested against each other: all those of six runs."""
_DRAWS = 200  # of a plan: its power is right within about .02
_CI_METHOD = "Student's t over runs and images, Satterthwaite's degrees of freedom"


def compare_runs(table: xr.Dataset, settings: Settings = DEFAULTS) -> tuple[list[CrossedTest], list[RunSpread]]:
    """Compare conditions over training runs and images like these, and set the runs' spread beside the difference.

    Two families for each condition with 2 runs or more: layer × head × metric, and layer × metric (heads averaged).

    Args:
        table, settings: as in `compare_conditions`.
    Returns:
        One `CrossedTest` per test (`crossed_test`, `crossed_interval`). `runs_needed` and `images_needed` are what this
        difference takes to be found with the power of the settings, at the components of this study (the runs' shrunk
        as in the test) and with as many images, or runs, as here; None where no number up to 1,000 runs or a million
        images suffices. One `RunSpread` per condition.
    Raises:
        InputError: as `compare_conditions`.
    """
    tests: list[CrossedTest] = []
    spreads: list[RunSpread] = []
    for paired in paired_conditions(table, settings.against, None):
        metrics = [metric for metric in paired.metrics if metric.changing and len(metric.seeds) >= 2]
        if not metrics:
            continue
        cells, layers, by_run = [], [], []
        for metric in metrics:
            d = metric.run_differences()
            cells.append(crossed_table(d[:, :, paired.heads]))
            layers.append(crossed_table(defined_mean(d, axis=3)[:, :, paired.layers]))
            by_run.append(defined_mean(d, axis=1)[:, paired.heads])
        tests += _test_family(paired, "head", metrics, cells, settings)
        tests += _test_family(paired, "layer", metrics, layers, settings)
        spreads.append(_spread(paired, metrics, by_run))
    return tests, spreads


def control_runs(table: xr.Dataset, settings: Settings = DEFAULTS) -> list[RunControl]:
    """Test two runs of one condition against each other, as `compare_conditions` does two conditions, for every pair.

    None of a condition that no seed changes, or with one run; of those with more than `MOST_PAIRS` pairs the first
    ones in the table's order.

    Args:
        table, settings: as in `compare_conditions`.
    """
    pairs = []
    for condition in (str(name) for name in table["condition"].values):
        runs = [] if seed_invariant(table, condition) else measured_runs(table, condition)
        pairs += [(condition, pair) for pair in islice(combinations(runs, 2), MOST_PAIRS)]
    shown = tqdm(pairs, desc="runs against each other", unit="pair", disable=None)
    return [_control(table, condition, pair, settings) for condition, pair in shown]


def _test_family(
    paired: ConditionPairs,
    level: Literal["head", "layer"],
    metrics: Sequence[MetricPairs],
    tables: Sequence[CrossedTable],
    settings: Settings,
) -> list[CrossedTest]:
    """One result per metric and place, all adjusted as one family."""
    places: list[tuple[int, int | None]] = [(int(layer), None) for layer in paired.layers]
    if level == "head":
        places = [(int(layer), int(head)) for layer, head in np.argwhere(paired.heads)]
    table = join(tables)
    tested = crossed_test(table)
    low, high, ci_df = crossed_interval(table, settings.confidence)
    sd_image, sd_run, sd_residual = table.components()
    image, run, residual = table.shares()
    with np.errstate(divide="ignore", invalid="ignore"):
        d_run = table.difference / sd_run
    needed, at = np.full((2, len(table.difference)), np.inf), table.defined
    if at.any():
        plan = {
            "effect": table.difference[at],
            "sd_image": sd_image[at],
            "sd_run": tested.sd_run[at],
            "sd_residual": sd_residual[at],
            "alpha": settings.alpha,
            "draws": _DRAWS,
            "seed": settings.seed,
        }
        needed[0, at] = runs_needed(settings.power, images=table.images[at], **plan)
        needed[1, at] = images_needed(settings.power, runs=int(table.runs[at].min()), **plan)
    columns = {
        **{name: getattr(table, name) for name in ("difference", "runs", "images")},
        **{name: getattr(tested, name) for name in ("t", "df", "p", "p_holm")},
        "missing": metrics[0].sides.shape[2] - table.images,
        "ci": np.stack([low, high], axis=1),
        "ci_df": ci_df,
        "sd_run": sd_run,
        "sd_image": sd_image,
        "sd_residual": sd_residual,
        "share_run": run,
        "share_image": image,
        "share_residual": residual,
        "d_run": d_run,
        "runs_needed": [int(n) if np.isfinite(n) else None for n in needed[0]],
        "images_needed": [int(n) if np.isfinite(n) else None for n in needed[1]],
        "degenerate": list(map(_why_degenerate, table.images, tested.t)),
    }
    over = {"head": "layer × head × metric", "layer": "layer × metric"}[level]
    return build(
        CrossedTest,
        [paired.row(metric, *place) for metric in metrics for place in places],
        columns,
        level=level,
        unit_of_inference=CROSSED,
        family=paired.family(f"runs × images, by {level}: {over}"),
        family_size=int(np.isfinite(tested.p).sum()),
        ci_method=_CI_METHOD,
    )


def _why_degenerate(images: int, t: float) -> str | None:
    if images < 2:
        return f"{images} images of which every run has a value: a test needs at least 2"
    if np.isinf(t):
        return "all differences are equal and not 0: t is infinite"
    return "all differences are exactly 0: no component is defined" if t == 0 else None


def _spread(paired: ConditionPairs, metrics: Sequence[MetricPairs], by_run: Sequence[Floats]) -> RunSpread:
    """`by_run`: each metric's differences between the conditions, [run, cell], images averaged."""
    apart, size, opposite = [], [], []
    for d in by_run:
        apart.append(np.mean([np.abs(first - second) for first, second in combinations(d, 2)], axis=0))
        size.append(np.abs(d.mean(axis=0)))
        opposite.append((d.min(axis=0) < 0) & (d.max(axis=0) > 0))
    runs, difference = np.concatenate(apart), np.concatenate(size)
    compared = np.isfinite(difference) & (runs + difference > 0)
    with np.errstate(divide="ignore"):
        ratios = runs[compared] / difference[compared]
    return RunSpread(
        condition=paired.condition,
        against=paired.against,
        seeds=max((metric.seeds for metric in metrics), key=len),
        cells=int(np.isfinite(difference).sum()),
        ratio=finite(np.median(ratios)) if ratios.size else None,
        cells_wider=int((ratios > 1).sum()),
        cells_opposite=int(np.concatenate(opposite).sum()),
    )


def _control(table: xr.Dataset, condition: str, runs: tuple[int, int], settings: Settings) -> RunControl:
    """Runs at these positions stand as two conditions of one seed."""
    names = [f"run {position}" for position in runs]
    both = table.sel(condition=condition, drop=True).isel(seed=list(runs))
    both = both.drop_vars([name for name, labels in both.coords.items() if "seed" in labels.dims])
    both = both.rename_dims(seed="condition").assign_coords(condition=names).expand_dims("seed")
    (paired,) = paired_conditions(both, names[0], None)
    counts = []
    for places, values in (
        (paired.heads, [metric.over_seeds() for metric in paired.metrics]),
        (paired.layers, [metric.over_heads() for metric in paired.metrics]),
    ):
        a, b = np.concatenate([value[:, :, places] for value in values], axis=2)
        families = np.repeat([metric.identity["metric"] for metric in paired.metrics], a.shape[1] // len(values))
        columns = compare_columns(a, b, families=families, **settings.resampling()).columns
        differ = np.isfinite(columns["difference"]) & (columns["p_max_t"] <= settings.alpha)
        counts.append((int(np.isfinite(columns["difference"]).sum()), int(differ.sum())))
    seeds = table["seed"].values if "seed" in table.coords else np.arange(table.sizes["seed"])
    first, second = (seeds[run].item() for run in runs)
    return RunControl(
        condition=condition,
        seeds=(first, second),
        unit_of_inference=IMAGES,
        n=int(columns["n"].max()),
        cells=counts[0][0],
        cells_differ=counts[0][1],
        layers=counts[1][0],
        layers_differ=counts[1][1],
    )
