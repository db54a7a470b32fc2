"""Every comparison of a study, head by head, layer by layer and run by run: `tests` of attention_comparison.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.bootstrap import bootstrap_interval
from engine.statistics.multiplicity import benjamini_hochberg, holm
from engine.statistics.paired import compare_paired, paired_columns
from engine.statistics.pairing import ConditionPairs, MetricPairs, check_table, paired_conditions
from engine.statistics.power import minimum_detectable_effect
from engine.statistics.results import CLASSES, DEFAULTS, IMAGES, LAYERS, RUNS, PairedTest, Settings, build
from train.errors import InputError

# Level -> (unit of inference, what its family is over).
_LEVELS = {
    "head": (IMAGES, "layer × head × metric"),
    "layer": (IMAGES, "layer × metric"),
    "class": (CLASSES, "layer × metric"),
    "layer_means": (LAYERS, "metric"),
    "seed": (RUNS, "layer × metric"),
}
# Positions of a layer and a head; None: over all of them.
_Place = tuple[int | None, int | None]


def compare_conditions(
    table: xr.Dataset, settings: Settings = DEFAULTS, metrics: Sequence[str] | None = None
) -> list[PairedTest]:
    """Compare every condition of a table with one of them, in up to five families of tests each.

    | level       | unit of inference | family                | pairs                                               |
    |-------------|-------------------|-----------------------|-----------------------------------------------------|
    | head        | image             | layer × head × metric | images; seeds averaged first                        |
    | layer       | image             | layer × metric        | images; seeds, then heads averaged first            |
    | class       | class of images   | layer × metric        | classes, all counting alike; seeds, heads, images   |
    |             |                   |                       | averaged first; ≥ 3 classes                         |
    | layer_means | layer             | metric                | layers; seeds, heads and images averaged first      |
    | seed        | training run      | layer × metric        | seeds; heads, then images averaged first; ≥ 2 seeds |

    A metric with regions counts once per region in its family. Image-level tests speak of the checkpoints at hand; only
    the seed level speaks of fine-tuning. The class level asks whether a finding depends on a few large classes. A pair
    missing on either side is left out of both means.

    Args:
        table: metrics as variables over (condition, seed, image, layer, head[, region]), attribute `units`;
            coordinates condition, seed, layer, site [layer], head, region, and `seed_invariant` [condition] (bool)
            where some conditions are the same for every seed: these are stored for one seed and paired with every
            run of the others. Otherwise runs of the same seed are paired. `class_name` [image] names the classes.
        settings: which condition the others are compared with, resamples, confidence, level and power, bounds of the
            equivalence tests, seed.
        metrics: names of the variables to compare; all when None.
    Returns:
        One result per test; where a number is not defined it is None, for the reason under `degenerate`. `p` is that
        of the test named under `test`: the paired t-test, or for the seed level the sign flip over runs, whose
        least attainable value is `p_floor` (2/2^runs where exact). `p_holm` and `p_bh` adjust `p`; `p_floor` bounds
        `p_max_t` in every entry. `d_av` is the difference in standard deviations between units (images, at the image
        levels), the two conditions' variances averaged: a size that does not grow with how alike the pairs are, as
        `dz` does; null where units do not differ. `ci` comes from the method named under `ci_method`; `mean_against`
        and `mean_condition` are over the pairs of this test. `mde_dz`, and `mde` in the metric's unit, is the effect
        that such a test finds with the given power (`minimum_detectable_effect` at this n, `sd` and family size);
        null where no p can fall to alpha. `p_tost` tests equivalence within ± `tost_bound`, `p_tost_holm` in this
        family. The layer level has a second interval, `ci_nested`, of all runs' pairs, resampled by the
        `nested_levels`.
    Raises:
        InputError: a dimension, coordinate, condition or metric is not there, two conditions share no run, or as
            `check_bounds`.
    """
    check_bounds(settings.equivalence, check_table(table, settings.against, metrics))
    tests: list[PairedTest] = []
    for paired in paired_conditions(table, settings.against, metrics):
        for level, compared, values, places in _families(paired):
            tests += _test_family(paired, level, compared, np.concatenate(values, axis=2), places, settings)
    return tests


def check_bounds(equivalence: Mapping[str, float] | None, metrics: Sequence[str]) -> None:
    """Raises InputError for a bound of a metric that is not compared, or that is not positive.

    A study asks before it trains anything.
    """
    for metric, bound in (equivalence or {}).items():
        if metric not in metrics:
            raise InputError(
                f"statistics.equivalence sets a bound for {metric!r}; the metrics compared are {', '.join(metrics)}"
            )
        if not (np.isfinite(bound) and bound > 0):
            raise InputError(f"statistics.equivalence: {metric} is {bound}; expected a positive number in its unit")


def _families(paired: ConditionPairs) -> Iterator[tuple[str, Sequence[MetricPairs], list[Floats], list[_Place]]]:
    """Level, metrics, their values [side, unit, place] and the places; none where there are too few units."""
    metrics, layers = paired.metrics, paired.layers
    by_layer: list[_Place] = [(int(layer), None) for layer in layers]
    cells: list[_Place] = [(int(layer), int(head)) for layer, head in np.argwhere(paired.heads)]
    yield "head", metrics, [metric.over_seeds()[:, :, paired.heads] for metric in metrics], cells

    by_image = [metric.over_heads() for metric in metrics]
    yield "layer", metrics, [values[:, :, layers] for values in by_image], by_layer

    if paired.classes is not None:
        yield "class", metrics, [metric.over_classes(paired.classes)[:, :, layers] for metric in metrics], by_layer

    means = [defined_mean(values, axis=1)[:, layers, None] for values in by_image]
    if layers.size >= 2:
        yield "layer_means", metrics, means, [(None, None)]

    by_run = [metric for metric in metrics if metric.changing and len(metric.seeds) >= 2]
    if by_run:
        yield "seed", by_run, [metric.over_images()[:, :, layers] for metric in by_run], by_layer


def _test_family(
    paired: ConditionPairs,
    level: str,
    metrics: Sequence[MetricPairs],
    values: Floats,
    places: Sequence[_Place],
    settings: Settings,
) -> list[PairedTest]:
    """One result per metric and place, all adjusted as one family."""
    unit, over = _LEVELS[level]
    a, b = np.ascontiguousarray(values)
    rows = [
        {
            **metric.identity,
            "layer": None if layer is None else paired.layer_ids[layer],
            "site": None if layer is None else paired.sites[layer],
            "head": None if head is None else paired.head_ids[head],
            "seeds": metric.seeds,
        }
        for metric in metrics
        for layer, head in places
    ]
    # Bounds are of an effect on images or runs; over layers there is no inference that they could belong to.
    bounds = {} if level == "layer_means" else settings.equivalence
    tost_bound = np.array([bounds.get(row["metric"], np.nan) for row in rows])
    # A handful of layers, classes or runs cannot be resampled into an interval: theirs is Student's.
    resampling = settings.resampling() | ({} if unit == IMAGES else {"bootstrap": 0})
    result = compare_paired(a, b, **resampling, equivalence=tost_bound)
    columns = paired_columns(result)
    ci_method = "BCa bootstrap over images" if settings.bootstrap else "none"
    if unit != IMAGES:
        ci_method, columns["ci"] = "Student's t", _student_interval(b - a, settings.confidence)
    test = "paired t-test"
    if level == "seed":
        columns["p"] = columns["p_sign_flip"]
        columns["p_holm"], columns["p_bh"] = holm(columns["p"]), benjamini_hochberg(columns["p"])
        test = f"sign flip over training runs ({result.attrs['sign_flip']})"
    nothing = np.full((len(rows), 2), np.nan), None
    columns["ci_nested"], nested_levels = _nested_intervals(paired, settings) if level == "layer" else nothing

    size, floor = result.attrs["family_size"], result.attrs["p_floor"]
    power = {"alpha": settings.alpha, "power": settings.power, "family_size": max(size, 1)}
    columns["mde_dz"] = np.full(len(rows), np.nan)
    if floor <= settings.alpha:  # else no p can fall to alpha
        columns["mde_dz"][:] = [minimum_detectable_effect(int(n), **power) for n in columns["n"]]
    complete = np.isfinite(b - a)
    a, b = np.where(complete, a, np.nan), np.where(complete, b, np.nan)
    columns |= {
        "mean_against": defined_mean(a, axis=0),
        "mean_condition": defined_mean(b, axis=0),
        "d_av": _between_units(a, b, columns["difference"]),
        "mde": columns["mde_dz"] * columns["sd"],
        "tost_bound": tost_bound,
    }
    return build(
        PairedTest,
        rows,
        columns,
        level=level,
        unit_of_inference=unit,
        family=paired.family(f"by {level}: {over}"),
        family_size=size,
        ci_method=ci_method,
        nested_levels=nested_levels,
        test=test,
        p_floor=floor,
    )


def _between_units(a: Floats, b: Floats, difference: Floats) -> Floats:
    """Cohen's d of the averaged variances, [column]; NaN where the values differ by no more than float32 rounds."""
    variances = [defined_mean((values - defined_mean(values, axis=0)) ** 2, axis=0) for values in (a, b)]
    n = np.isfinite(a).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((variances[0] + variances[1]) / 2 * n / (n - 1))
        resolved = spread > np.finfo(np.float32).eps * np.abs(defined_mean(a, axis=0))
        return np.where(resolved, difference / spread, np.nan)


def _nested_intervals(paired: ConditionPairs, settings: Settings) -> tuple[Floats, str | None]:
    """Intervals [test, 2] of the mean over all runs and images when runs, then classes, then images are resampled."""
    by_run = [metric.run_differences() for metric in paired.metrics]
    seeds, images, _ = by_run[0].shape
    levels: dict[str, NDArray[np.int64]] = {}
    if seeds > 1:
        levels["seed"] = np.repeat(np.arange(seeds), images)
    if paired.classes is not None:
        levels["class"] = np.tile(paired.classes, seeds)
    if not levels or not settings.bootstrap:  # without levels it would be the interval over images again
        return np.full((len(by_run) * paired.layers.size, 2), np.nan), None
    bounds = bootstrap_interval(
        np.stack([d[..., layer].ravel() for d in by_run for layer in paired.layers], axis=1),
        resamples=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
        groups=np.stack(list(levels.values()), axis=1),
    )
    return np.stack(bounds, axis=1), " > ".join([*levels, "image"])


def _student_interval(d: Floats, confidence: float) -> Floats:
    """Student's interval [test, 2] of the mean of each column of d [unit, test]; NaN with fewer than 2 values."""
    bounds = np.full((d.shape[1], 2), np.nan)
    for column in range(d.shape[1]):
        values = d[np.isfinite(d[:, column]), column]
        if values.size >= 2 and values.min() == values.max():
            bounds[column] = values[0]  # exactly, where the rounded mean could be off it
        elif values.size >= 2:
            half = stats.t.ppf((1 + confidence) / 2, values.size - 1) * stats.sem(values)
            bounds[column] = values.mean() - half, values.mean() + half
    return bounds
