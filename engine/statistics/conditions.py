"""Every comparison of a study, head by head, layer by layer and run by run: `tests` of attention_comparison.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.bootstrap import bootstrap_interval
from engine.statistics.entries import interval, number, numbers, why_degenerate
from engine.statistics.multiplicity import benjamini_hochberg, holm
from engine.statistics.paired import compare_paired
from engine.statistics.pairing import (
    MetricPairs,
    check_table,
    defined_mean,
    existing_heads,
    other_conditions,
    paired_metrics,
)
from engine.statistics.power import minimum_detectable_effect
from train.errors import InputError

Floats = NDArray[np.float64]

# Units of inference, as the report words them.
IMAGES = "image, given these checkpoints"
CLASSES = "class of images (the mean over its images), given these checkpoints"
RUNS = "training run (seed)"
LAYERS = "layer (layers are not independent samples; shown for comparison with published practice)"


@dataclass(frozen=True)
class _Column:
    """One test of a family: what is compared, and the values of both conditions, [unit]."""

    pairs: MetricPairs
    layer: int | None
    head: int | None
    against: Floats
    condition: Floats


@dataclass(frozen=True)
class _Settings:
    permutations: int
    bootstrap: int
    confidence: float
    seed: int
    alpha: float
    power: float
    equivalence: Mapping[str, float] = field(default_factory=dict)


def compare_conditions(
    table: xr.Dataset,
    *,
    against: str = "baseline",
    metrics: Sequence[str] | None = None,
    permutations: int = 9999,
    bootstrap: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
    alpha: float = 0.05,
    power: float = 0.8,
    equivalence: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Compare every condition of a table with one of them, in up to five families of tests each.

    | level       | unit of inference | family                | pairs                                               |
    |-------------|-------------------|-----------------------|-----------------------------------------------------|
    | head        | image             | layer × head × metric | images; seeds averaged first                        |
    | layer       | image             | layer × metric        | images; seeds, then heads averaged first            |
    | class       | class of images   | layer × metric        | classes, all counting alike; seeds, heads, images   |
    |             |                   |                       | averaged first; ≥ 3 classes                         |
    | layer_means | layer             | metric                | layers; seeds, heads and images averaged first      |
    | seed        | training run      | layer × metric        | seeds; heads, then images averaged first; ≥ 2 seeds |

    A metric with regions counts once a region in its family. Image-level tests speak of the checkpoints at hand; only
    the seed level speaks of fine-tuning. The class level asks whether a finding hangs on a few large classes. A pair
    missing on either side is left out of both means.

    Args:
        table: metrics as variables over (condition, seed, image, layer, head[, region]), attribute `units`;
            coordinates condition, seed, layer, site [layer], head, region, and `seed_invariant` [condition] (bool)
            where some conditions are the same for every seed: these are stored for one seed and paired with every
            run of the others. Otherwise runs of the same seed are paired. `class_name` [image] names the classes.
        against: the condition that the others are compared with.
        metrics: names of the variables to compare; all when None.
        permutations, bootstrap, confidence, seed: as in `compare_paired`.
        alpha, power: level (of a whole family) and power of the minimum detectable effect.
        equivalence: metric -> bound of its TOST equivalence test in the metric's unit, set before looking.
    Returns:
        One dict a test, ready for JSON: no NaN or infinity, null instead with the reason under `degenerate`. `p` is
        that of the test named under `test`: the paired t-test, or for the seed level the sign flip over runs, whose
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
    names = check_table(table, against, metrics)
    table = table[names]
    check_bounds(equivalence, names)
    settings = _Settings(permutations, bootstrap, confidence, seed, alpha, power, dict(equivalence or {}))
    heads = existing_heads(table)
    tests: list[dict[str, Any]] = []
    for condition in other_conditions(table, against):
        pairs = list(paired_metrics(table, condition, against, names))
        comparison = {"condition": condition, "against": against}
        for level, columns in _families(table, pairs, heads):
            if columns:
                tests += _test_family(table, comparison, level, columns, settings)
    return tests


def check_bounds(equivalence: Mapping[str, float] | None, metrics: Sequence[str]) -> None:
    """Whether bounds can be used; a study asks before it trains anything.

    Raises:
        InputError: a bound of a metric that is not compared, or that is not positive.
    """
    for metric, bound in (equivalence or {}).items():
        if metric not in metrics:
            raise InputError(
                f"statistics.equivalence sets a bound for {metric!r}; the metrics compared are {', '.join(metrics)}"
            )
        if not (np.isfinite(bound) and bound > 0):
            raise InputError(f"statistics.equivalence: {metric} is {bound}; expected a positive number in its unit")


def _families(
    table: xr.Dataset, pairs: Sequence[MetricPairs], heads: NDArray[np.bool_]
) -> Iterator[tuple[str, list[_Column]]]:
    """The tests of each family; none where there are too few units for any."""
    layer_ids = [int(layer) for layer in table["layer"].values]
    head_ids = [int(head) for head in table["head"].values]
    layers = np.flatnonzero(heads.any(axis=1))
    classes = _classes(table)

    columns = []
    for metric in pairs:
        a, b = metric.over_seeds()
        for i, j in np.argwhere(heads):
            columns.append(_Column(metric, layer_ids[i], head_ids[j], a[:, i, j], b[:, i, j]))
    yield "head", columns

    by_layer = [(metric, *metric.over_heads()) for metric in pairs]
    yield "layer", [_Column(metric, layer_ids[i], None, a[:, i], b[:, i]) for metric, a, b in by_layer for i in layers]

    by_class = [(metric, *metric.over_classes(classes)) for metric in pairs] if classes is not None else []
    yield "class", [_Column(metric, layer_ids[i], None, a[:, i], b[:, i]) for metric, a, b in by_class for i in layers]

    columns = [
        _Column(metric, None, None, defined_mean(a, axis=0)[layers], defined_mean(b, axis=0)[layers])
        for metric, a, b in by_layer
    ]
    yield "layer_means", columns if layers.size >= 2 else []

    by_run = [(metric, *metric.over_images()) for metric in pairs if metric.changing and len(metric.seeds) >= 2]
    yield "seed", [_Column(metric, layer_ids[i], None, a[:, i], b[:, i]) for metric, a, b in by_run for i in layers]


def _classes(table: xr.Dataset) -> NDArray[np.int64] | None:
    """Class of each image as a number from 0; None where classes have no names or are fewer than 3."""
    if "class_name" not in table.coords:
        return None
    # Plain text, whatever type the store has strings of.
    names, codes = np.unique([str(name) for name in table["class_name"].values], return_inverse=True)
    return codes.astype(np.int64) if len(names) >= 3 else None


_UNITS = {"head": IMAGES, "layer": IMAGES, "class": CLASSES, "layer_means": LAYERS, "seed": RUNS}
_FAMILIES = {
    "head": "layer × head × metric",
    "layer": "layer × metric",
    "class": "layer × metric",
    "layer_means": "metric",
    "seed": "layer × metric",
}


def _test_family(
    table: xr.Dataset, comparison: dict[str, str], level: str, columns: Sequence[_Column], settings: _Settings
) -> list[dict[str, Any]]:
    """One entry a column, all adjusted as one family."""
    a = np.stack([column.against for column in columns], axis=1)
    b = np.stack([column.condition for column in columns], axis=1)
    over_images = _UNITS[level] == IMAGES
    # Bounds are of an effect on images or runs; over layers there is no inference that they could belong to.
    bounds = [settings.equivalence.get(column.pairs.metric, np.nan) for column in columns]
    bounds = bounds if level != "layer_means" else [np.nan] * len(columns)
    result = compare_paired(
        a,
        b,
        permutations=settings.permutations,
        seed=settings.seed,
        confidence=settings.confidence,
        # A handful of layers, classes or runs cannot be resampled into an interval: theirs is Student's.
        bootstrap=settings.bootstrap if over_images else 0,
        equivalence=bounds,
    )
    values = {str(name): result[name].values for name in result.data_vars}
    if over_images:
        ci_method = "BCa bootstrap over images" if settings.bootstrap else "none"
    else:
        values["ci_low"], values["ci_high"] = _student_interval(b - a, settings.confidence)
        ci_method = "Student's t"
    if level == "seed":
        values["p"] = values["p_sign_flip"]
        values["p_holm"], values["p_bh"] = holm(values["p"]), benjamini_hochberg(values["p"])
        test = f"sign flip over training runs ({result.attrs['sign_flip']})"
    else:
        values["p"] = values["p_t"]
        test = "paired t-test"

    attainable = result.attrs["p_floor"] <= settings.alpha
    size = max(result.attrs["family_size"], 1)
    values["mde_dz"] = np.array(
        [
            minimum_detectable_effect(int(n), alpha=settings.alpha, power=settings.power, family_size=size)
            if attainable
            else np.nan
            for n in values["n"]
        ]
    )
    values["mde"] = values["mde_dz"] * values["sd"]
    nested, nested_levels = _nested_intervals(table, columns, settings) if level == "layer" else ({}, None)

    paired = np.isfinite(b - a)
    values["d_av"] = _between_units(np.where(paired, a, np.nan), np.where(paired, b, np.nan), values["difference"])
    values["mean_against"] = defined_mean(np.where(paired, a, np.nan), axis=0)
    values["mean_condition"] = defined_mean(np.where(paired, b, np.nan), axis=0)
    sites = {int(layer): str(site) for layer, site in zip(table["layer"].values, table["site"].values, strict=True)}
    return [
        {
            **comparison,
            "metric": column.pairs.metric,
            "unit": column.pairs.unit,
            "region": column.pairs.region,
            "level": level,
            "unit_of_inference": _UNITS[level],
            "family": f"{comparison['condition']} against {comparison['against']}, by {level}: {_FAMILIES[level]}",
            "family_size": result.attrs["family_size"],
            "layer": column.layer,
            "site": None if column.layer is None else sites[column.layer],
            "head": column.head,
            "seeds": list(column.pairs.seeds),
            "n": int(values["n"][i]),
            "missing": int(values["missing"][i]),
            **numbers(
                values, i, ("mean_against", "mean_condition", "difference", "sd", "skewness", "dz", "gz", "d_av")
            ),
            "ci": interval(values, i),
            "ci_method": ci_method,
            "ci_nested": interval(nested, i) if nested else None,
            "nested_levels": nested_levels,
            "test": test,
            **numbers(values, i, ("t", "p", "p_wilcoxon", "p_max_t", "p_holm", "p_bh")),
            "tost_bound": number(bounds[i]),
            **numbers(values, i, ("p_tost", "p_tost_holm")),
            **numbers(values, i, ("mde_dz", "mde")),
            "p_floor": result.attrs["p_floor"],
            "degenerate": why_degenerate(values, i),
        }
        for i, column in enumerate(columns)
    ]


def _between_units(a: Floats, b: Floats, difference: Floats) -> Floats:
    """Cohen's d of the averaged variances, [column]; NaN where the values differ by no more than float32 rounds."""
    variances = [defined_mean((values - defined_mean(values, axis=0)) ** 2, axis=0) for values in (a, b)]
    n = np.isfinite(a).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt((variances[0] + variances[1]) / 2 * n / (n - 1))
        resolved = spread > np.finfo(np.float32).eps * np.abs(defined_mean(a, axis=0))
        return np.where(resolved, difference / spread, np.nan)


def _nested_intervals(
    table: xr.Dataset, columns: Sequence[_Column], settings: _Settings
) -> tuple[dict[str, Floats], str | None]:
    """Intervals of the mean over all runs and images when runs, then classes, then images are resampled.

    None where there is one run and no class to nest images in: then it would be the interval over images again.
    """
    pairs = columns[0].pairs
    seeds, images = len(pairs.seeds), pairs.against.shape[1]
    classes = _classes(table)
    levels: dict[str, NDArray[np.int64]] = {}
    if seeds > 1:
        levels["seed"] = np.repeat(np.arange(seeds), images)
    if classes is not None:
        levels["class"] = np.tile(classes, seeds)
    if not levels or not settings.bootstrap:
        return {}, None
    rows = {int(layer): row for row, layer in enumerate(table["layer"].values)}
    differences = {id(column.pairs): column.pairs.run_differences() for column in columns}
    d = np.stack([differences[id(c.pairs)][..., rows[int(c.layer or 0)]].ravel() for c in columns], axis=1)
    low, high = bootstrap_interval(
        d,
        resamples=settings.bootstrap,
        confidence=settings.confidence,
        seed=settings.seed,
        groups=np.stack(list(levels.values()), axis=1),
    )
    return {"ci_low": low, "ci_high": high}, " > ".join([*levels, "image"])


def _student_interval(d: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Student's interval of the mean of each column of d [unit, test]; NaN with fewer than 2 values."""
    low, high = np.full((2, d.shape[1]), np.nan)
    for column in range(d.shape[1]):
        values = d[np.isfinite(d[:, column]), column]
        if values.size < 2:
            continue
        if values.min() == values.max():  # exactly, where the rounded mean could be off it
            low[column] = high[column] = values[0]
            continue
        half = stats.t.ppf((1 + confidence) / 2, values.size - 1) * stats.sem(values)
        low[column], high[column] = values.mean() - half, values.mean() + half
    return low, high
