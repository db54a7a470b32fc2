"""From the table of metrics to pairs: which runs, images and heads of two conditions stand against each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from train.errors import InputError

Floats = NDArray[np.float64]

_AXES = ("seed", "image", "layer", "head")


@dataclass(frozen=True)
class MetricPairs:
    """One metric (of one region) in two conditions, pair by pair.

    Attributes:
        metric, region, unit: what was measured; region None for metrics without regions.
        seeds: the runs paired, in the table's order. A condition that no seed changes is paired with every run of the
            other; else only seeds that both have.
        against, condition: [seed, image, layer, head], NaN in both where either has no finite value.
        changing: whether a seed changes either condition, so that runs are units of their own.
    """

    metric: str
    region: str | None
    unit: str
    seeds: tuple[Any, ...]
    against: Floats
    condition: Floats
    changing: bool

    def over_seeds(self) -> tuple[Floats, Floats]:
        """Means over seeds, [image, layer, head]: NaN where any run has no value, so that all share their runs."""
        return self.against.mean(axis=0), self.condition.mean(axis=0)

    def over_heads(self) -> tuple[Floats, Floats]:
        """Means over seeds, then over the heads that have a pair, [image, layer]: both over the same heads."""
        against, condition = self.over_seeds()
        return defined_mean(against, axis=2), defined_mean(condition, axis=2)

    def over_images(self) -> tuple[Floats, Floats]:
        """Means over heads, then over images, run by run, [seed, layer]."""
        against, condition = (defined_mean(defined_mean(x, axis=3), axis=1) for x in (self.against, self.condition))
        return against, condition

    def over_classes(self, classes: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Means over seeds, heads, then over the images of each class that have a pair, [class, layer].

        Args:
            classes: class of each image, from 0 without gaps, [image].
        """
        of = [np.flatnonzero(classes == code) for code in range(int(classes.max()) + 1)]
        against, condition = (np.stack([defined_mean(x[rows], axis=0) for rows in of]) for x in self.over_heads())
        return against, condition

    def image_differences(self) -> Floats:
        """Condition − against, seeds and heads averaged, [image, layer]."""
        against, condition = self.over_heads()
        return condition - against

    def run_differences(self) -> Floats:
        """Condition − against of every run and image, heads averaged, [seed, image, layer]."""
        return defined_mean(self.condition, axis=3) - defined_mean(self.against, axis=3)

    def cell_differences(self) -> Floats:
        """Condition − against, seeds and images averaged, [layer, head]."""
        against, condition = self.over_seeds()
        return defined_mean(condition - against, axis=0)

    def identity(self) -> dict[str, Any]:
        """What was measured, as every entry of the results names it."""
        return {"metric": self.metric, "unit": self.unit, "region": self.region}


def defined_mean(values: Floats, axis: int | tuple[int, ...]) -> Floats:
    """Mean of the values that are not NaN; NaN where there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    result: Floats = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return result


def check_table(table: xr.Dataset, against: str, metrics: Sequence[str] | None) -> list[str]:
    """The metrics to compare, all of the table's when None.

    Raises:
        InputError: the table lacks a dimension, coordinate or unit, or holds no condition `against` or no such metric.
    """
    for name in ("condition", *_AXES):
        if name not in table.dims:
            raise InputError(f"the table has no dimension {name!r}; expected condition, {', '.join(_AXES)}")
    if "site" not in table.coords:
        raise InputError("the table has no coordinate 'site' on its layers; expected the module's name of each layer")
    present = [str(name) for name in table["condition"].values]
    if against not in present:
        raise InputError(
            f"no condition is called {against!r}{_nearest(against, present)} (there are {', '.join(present)})"
        )
    held = [str(name) for name in table.data_vars]
    for metric in metrics or ():
        if metric not in held:
            raise InputError(
                f"the table holds no metric {metric!r}{_nearest(metric, held)} (it holds {', '.join(held)})"
            )
    names = list(metrics) if metrics is not None else held
    for metric in names:
        if not isinstance(table[metric].attrs.get("units"), str):
            raise InputError(
                f"metric {metric!r} of the table has no attribute 'units'; expected its unit, such as 'nat'"
            )
    return names


def _nearest(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def other_conditions(table: xr.Dataset, against: str) -> list[str]:
    """The conditions to compare with `against`, in the table's order."""
    return [str(name) for name in table["condition"].values if name != against]


def existing_heads(table: xr.Dataset) -> NDArray[np.bool_]:
    """Which cells [layer, head] any metric has a value in: layers with fewer heads are padded with NaN."""
    found = np.zeros((table.sizes["layer"], table.sizes["head"]), dtype=bool)
    for variable in table.data_vars.values():
        over = [dim for dim in variable.dims if dim not in ("layer", "head")]
        finite = xr.apply_ufunc(np.isfinite, variable).any(over)
        found |= finite.transpose("layer", "head").values
    return found


def paired_metrics(table: xr.Dataset, condition: str, against: str, metrics: Sequence[str]) -> Iterator[MetricPairs]:
    """Each metric, and each region of a metric with regions, of `condition` paired with `against`.

    Raises:
        InputError: the two conditions have no run in common.
    """
    runs_against, runs_condition, seeds = _paired_runs(table, condition, against)
    changing = not (_seed_invariant(table, condition) and _seed_invariant(table, against))
    for metric in metrics:
        variable = table[metric]
        parts: list[tuple[str | None, xr.DataArray]]
        if "region" in variable.dims:
            parts = [(str(region), variable.isel(region=i)) for i, region in enumerate(variable["region"].values)]
        else:
            parts = [(None, variable)]
        for region, part in parts:
            a, b = (
                np.asarray(part.sel(condition=name).isel(seed=runs).transpose(*_AXES).values, dtype=np.float64)
                for name, runs in ((against, runs_against), (condition, runs_condition))
            )
            paired = np.isfinite(a) & np.isfinite(b)
            yield MetricPairs(
                metric=metric,
                region=region,
                unit=variable.attrs["units"],
                seeds=seeds,
                against=np.where(paired, a, np.nan),
                condition=np.where(paired, b, np.nan),
                changing=changing,
            )


def _paired_runs(table: xr.Dataset, condition: str, against: str) -> tuple[list[int], list[int], tuple[Any, ...]]:
    """Positions along `seed` of the runs of `against` and of `condition`, pair by pair, and their seeds."""
    present = {name: _runs(table, name) for name in (against, condition)}
    for name, runs in present.items():
        if not runs:
            raise InputError(f"condition {name!r} holds no finite value of any metric; measure it first")
    first, second = present[against], present[condition]
    fixed_first, fixed_second = _seed_invariant(table, against), _seed_invariant(table, condition)
    if fixed_first and fixed_second:
        pairs = [(first[0], second[0])]
    elif fixed_first:
        pairs = [(first[0], run) for run in second]
    elif fixed_second:
        pairs = [(run, second[0]) for run in first]
    else:
        pairs = [(run, run) for run in first if run in second]
    seeds = table["seed"].values if "seed" in table.coords else np.arange(table.sizes["seed"])
    if not pairs:
        of = {name: ", ".join(str(seeds[run]) for run in runs) for name, runs in present.items()}
        raise InputError(
            f"{condition!r} has runs of the seeds {of[condition]} and {against!r} of {of[against]}: train a common seed"
        )
    chosen = [second_run if fixed_first else first_run for first_run, second_run in pairs]
    return [a for a, _ in pairs], [b for _, b in pairs], tuple(seeds[run].item() for run in chosen)


def _runs(table: xr.Dataset, condition: str) -> list[int]:
    """Positions along `seed` where the condition has any value."""
    found = np.zeros(table.sizes["seed"], dtype=bool)
    for variable in table.data_vars.values():
        finite = xr.apply_ufunc(np.isfinite, variable.sel(condition=condition))
        found |= finite.any([dim for dim in finite.dims if dim != "seed"]).values
    return [int(run) for run in np.flatnonzero(found)]


def _seed_invariant(table: xr.Dataset, condition: str) -> bool:
    """Whether no seed changes the condition, by the coordinate `seed_invariant` [condition]; absent means none is."""
    if "seed_invariant" not in table.coords:
        return False
    return bool(table["seed_invariant"].sel(condition=condition))
