"""Every comparison of a study, head by head, layer by layer and run by run: `tests` of attention_comparison.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.bootstrap import FEWEST, bootstrap_interval
from engine.statistics.paired import Unit, compare_columns
from engine.statistics.pairing import ConditionPairs, MetricPairs, check_table, paired_conditions
from engine.statistics.power import minimum_detectable_effect
from engine.statistics.results import CLASSES, DEFAULTS, IMAGES, LAYERS, RUNS, PairedTest, Settings, build
from train.errors import InputError, nearest

# Level -> (unit of inference, what its pairs are, what its family is over).
_LEVELS: Mapping[str, tuple[str, Unit, str]] = {
    "head": (IMAGES, "images", "layer × head × metric"),
    "layer": (IMAGES, "images", "layer × metric"),
    "class": (CLASSES, "runs", "layer × metric"),
    "layer_means": (LAYERS, "runs", "metric"),
    "seed": (RUNS, "runs", "layer × metric"),
}
# Positions of a layer and a head; None: over all of them.
_Place = tuple[int | None, int | None]


@dataclass(frozen=True)
class _Block:
    """One metric of one condition, at the places of a level."""

    paired: ConditionPairs
    metric: MetricPairs
    values: Floats  # [side, unit, place], against, then condition
    places: Sequence[_Place]

    @property
    def name(self) -> str:
        return str(self.metric.identity["metric"])

    def rows(self) -> list[dict[str, Any]]:
        """What each test is of."""
        return [self.paired.row(self.metric, layer, head) for layer, head in self.places]


def compare_conditions(
    table: xr.Dataset, settings: Settings = DEFAULTS, metrics: Sequence[str] | None = None
) -> list[PairedTest]:
    """Compare every condition of a table with one of them: one primary family, and up to five others per condition.

    | level       | unit of inference | family                | pairs                                               |
    |-------------|-------------------|-----------------------|-----------------------------------------------------|
    | head        | image             | layer × head × metric | images; seeds averaged first                        |
    | layer       | image             | layer × metric        | images; seeds, then heads averaged first            |
    | class       | class of images   | layer × metric        | classes, all counting alike; seeds, heads, images   |
    |             |                   |                       | averaged first; ≥ 3 classes                         |
    | layer_means | layer             | metric                | layers; seeds, heads and images averaged first      |
    | seed        | training run      | layer × metric        | seeds; heads, then images averaged first; ≥ 2 seeds |

    The layer means of the metrics named as `settings.primary` are the primary family, over all conditions at once: what
    it finds holds at the level for the whole table. All else is exploratory, each family by itself. A head of a primary
    metric has `p_gated`, the greater of its own p and its layer's: heads speak where their layer does.

    A metric with regions counts once per region in its family. Image-level tests speak of the checkpoints at hand; the
    seed level of training runs like these on these very images. The class level asks whether a finding depends on a few
    large classes. A pair missing on either side, or in one of the runs, is left out of all means: all numbers of a row
    are of the same images, heads and runs.

    Args:
        table: metrics as variables over (condition, seed, image, layer, head[, region]), attribute `units`;
            coordinates condition, seed, layer, site [layer], head, region, and `seed_invariant` [condition] (bool)
            where some conditions are the same for every seed: these are stored for one seed and paired with every
            run of the others. Otherwise runs of the same seed are paired. `class_name` [image] names the classes.
        settings: which condition the others are compared with, resamples, confidence, level and power, bounds of the
            equivalence tests, seed.
        metrics: names of the variables to compare; all when None.
    Returns:
        One result per test, by condition, level and metric; where a number is not defined it is None, for the reason
        under `degenerate`. `resampling` says what `p_max_t` comes from, and `p_floor` is the least it can be. `p` is
        that of the test named under `test`: the paired t-test, or for the seed level the sign flip over runs. `p_holm`
        and `p_bh` adjust Student's p. `ci` comes from the method named under `ci_method`; all `ci_simultaneous` of a
        family cover at once. `d_av` is the difference in standard deviations between units (images, at the image
        levels), the two conditions' variances averaged: a size that does not grow with how alike the pairs are, as
        `dz` does; None where units do not differ. `mean_against` and `mean_condition` are over the pairs of this test.
        `mde_dz`, and `mde` in the metric's unit, is the effect that such a test finds with the given power
        (`minimum_detectable_effect` at this n, `sd` and family size); None where no p can fall to alpha. What is shown
        to lie within ± `tost_bound` (`PairedTest.within`) follows from `ci_simultaneous`; `p_tost`, and `p_tost_holm`
        in this family, are the usual test of it and for comparison. The layer level has a second interval,
        `ci_nested`, for which classes, then their images are resampled.
    Raises:
        InputError: a dimension, coordinate, condition or metric is not there, two conditions share no run, or as
            `check_bounds`.
    """
    names = check_table(table, settings.against, metrics)
    check_bounds(settings.equivalence, names)
    primary: list[_Block] = []
    tests: list[PairedTest] = []
    for paired in paired_conditions(table, settings.against, metrics):
        for level, blocks in _families(paired):
            named = settings.primary if level == "layer" else ()
            primary += [block for block in blocks if block.name in named]
            if others := [block for block in blocks if block.name not in named]:
                name = paired.family(f"by {level}: {_LEVELS[level][2]}")
                tests += _test_family(level, "exploratory", name, others, settings)
    if primary:
        name = f"primary, against {settings.against}: condition × layer × metric"
        tests += _test_family("layer", "primary", name, primary, settings)
    conditions = [str(condition) for condition in table["condition"].values]
    tests.sort(key=lambda t: (conditions.index(t.condition), list(_LEVELS).index(t.level), names.index(t.metric)))
    return _gated(tests)


def _gated(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests, with `p_gated` of the heads whose layer is in the primary family."""
    layers = {(t.condition, t.metric, t.region, t.layer): t.p_max_t for t in tests if t.role == "primary"}
    gated = []
    for test in tests:
        of_layer = layers.get((test.condition, test.metric, test.region, test.layer))
        if test.level == "head" and test.p_max_t is not None and of_layer is not None:
            test = replace(test, p_gated=max(test.p_max_t, of_layer))
        gated.append(test)
    return gated


def check_bounds(equivalence: Mapping[str, float] | None, metrics: Sequence[str]) -> None:
    """Raises InputError for a bound of a metric that is not compared, or that is not positive.

    A study asks before it trains anything.
    """
    for metric, bound in (equivalence or {}).items():
        if metric not in metrics:
            raise InputError(
                f"statistics.equivalence sets a bound for {metric!r}, which is none of the metrics measured "
                f"({', '.join(metrics)}){nearest(metric, metrics)}"
            )
        if not (np.isfinite(bound) and bound > 0):
            raise InputError(f"statistics.equivalence: {metric} is {bound}; expected a positive number in its unit")


def check_primary(primary: Sequence[str], metrics: Sequence[str]) -> None:
    """Raises InputError for a primary metric that is not measured; of the default ones those that are stay.

    A study asks before it trains anything.
    """
    for metric in primary if tuple(primary) != DEFAULTS.primary else ():
        if metric not in metrics:
            raise InputError(
                f"statistics.primary names {metric!r}, which is none of the metrics measured "
                f"({', '.join(metrics)}){nearest(metric, metrics)}"
            )


def _families(paired: ConditionPairs) -> Iterator[tuple[str, list[_Block]]]:
    """Level and its metrics, in turn; none where there are too few units."""
    metrics, layers = paired.metrics, paired.layers
    by_layer: list[_Place] = [(int(layer), None) for layer in layers]
    cells: list[_Place] = [(int(layer), int(head)) for layer, head in np.argwhere(paired.heads)]
    yield "head", [_Block(paired, metric, metric.over_seeds()[:, :, paired.heads], cells) for metric in metrics]

    by_image = [metric.over_heads() for metric in metrics]
    yield (
        "layer",
        [_Block(paired, m, values[:, :, layers], by_layer) for m, values in zip(metrics, by_image, strict=True)],
    )

    if (classes := paired.classes) is not None:
        yield "class", [_Block(paired, m, m.over_classes(classes)[:, :, layers], by_layer) for m in metrics]

    if layers.size >= 2:
        means = [defined_mean(values, axis=1)[:, layers, None] for values in by_image]
        yield "layer_means", [_Block(paired, m, mean, [(None, None)]) for m, mean in zip(metrics, means, strict=True)]

    by_run = [metric for metric in metrics if metric.changing and len(metric.seeds) >= 2]
    if by_run:
        yield "seed", [_Block(paired, metric, metric.over_images()[:, :, layers], by_layer) for metric in by_run]


def _test_family(
    level: str, role: Literal["primary", "exploratory"], family: str, blocks: Sequence[_Block], settings: Settings
) -> list[PairedTest]:
    """One result per metric and place, adjusted as one family: max-T within a condition's metric, Holm over these."""
    inference, unit, _ = _LEVELS[level]
    rows = [row for block in blocks for row in block.rows()]
    a, b = np.concatenate([block.values for block in blocks], axis=2)
    # Bounds are of an effect on images or runs; over layers there is no inference that they could belong to.
    bounds = {} if level == "layer_means" else settings.equivalence
    tost_bound = np.array([bounds.get(row["metric"], np.nan) for row in rows])
    families = [(row["condition"], row["metric"]) for row in rows]
    compared = compare_columns(
        a,
        b,
        families=np.array([*map(list(dict.fromkeys(families)).index, families)]),
        unit=unit,
        bounds=tost_bound,
        **settings.resampling(),
    )
    columns = compared.results()
    test = "paired t-test"
    if level == "seed":
        columns["p"] = columns["p_resampled"]
        test = "sign flip over training runs"
    if unit == "images":
        few = "Student's t: too few images to resample"
        columns["ci_method"] = [few if n < FEWEST else "BCa bootstrap over images" for n in columns["n"]]
    else:
        columns["ci_method"] = ["Student's t"] * len(rows)
    columns["ci_nested"] = np.full((len(rows), 2), np.nan)
    classes = blocks[0].paired.classes  # of the table's images: the same for every condition
    if level == "layer" and classes is not None:
        columns["ci_nested"] = _nested_interval(b - a, classes, settings)

    power = {"alpha": settings.alpha, "power": settings.power, "family_size": max(compared.family_size, 1)}
    columns["mde_dz"] = np.full(len(rows), np.nan)
    if compared.p_floor <= settings.alpha:  # else no p can fall to alpha
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
        role=role,
        unit_of_inference=inference,
        family=family,
        family_size=compared.family_size,
        nested_levels="class > image" if np.isfinite(columns["ci_nested"]).any() else None,
        test=test,
        resampling=compared.resampling,
        p_gated=None,
        p_floor=compared.p_floor,
    )


def _between_units(a: Floats, b: Floats, difference: Floats) -> Floats:
    """Cohen's d of the averaged variances, [column]; NaN where the values differ by no more than float32 rounds."""
    variances = [defined_mean((values - defined_mean(values, axis=0)) ** 2, axis=0) for values in (a, b)]
    n = np.isfinite(a).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((variances[0] + variances[1]) / 2 * n / (n - 1))
        resolved = spread > np.finfo(np.float32).eps * np.abs(defined_mean(a, axis=0))
        return np.where(resolved, difference / spread, np.nan)


def _nested_interval(differences: Floats, classes: NDArray[np.int64], settings: Settings) -> Floats:
    """Intervals [test, 2] of the means of [image, test] when classes, then their images are resampled."""
    return bootstrap_interval(
        differences,
        resamples=settings.permutations,
        confidence=settings.confidence,
        seed=settings.seed,
        groups=classes[:, None],
    ).T
