"""From the table of metrics to pairs: which runs, images and heads of two conditions stand against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from engine.statistics.arrays import Floats, defined_mean
from train.errors import InputError, nearest

_AXES = ("seed", "image", "layer", "head")


@dataclass(frozen=True)
class MetricPairs:
    """One metric (of one region) in two conditions, pair by pair.

    Attributes:
        identity: fields of `Compared`: the conditions' names and what was measured.
        seeds: the runs paired, in the table's order. A condition that no seed changes is paired with every run of the
            other; else only seeds that both have.
        sides: [side, seed, image, layer, head], against first, then condition; NaN in both where either has no finite
            value.
        changing: whether a seed changes either condition, so that runs are units of their own.
    """

    identity: Mapping[str, Any]
    seeds: tuple[Any, ...]
    sides: Floats
    changing: bool

    def over_seeds(self) -> Floats:
        """Means over seeds, [side, image, layer, head]: NaN where a run has no value, so that all share their runs."""
        return np.asarray(self.sides.mean(axis=1))

    def over_heads(self) -> Floats:
        """Means over seeds, then over the heads that have a pair, [side, image, layer]: both over the same heads."""
        return defined_mean(self.over_seeds(), axis=3)

    def over_images(self) -> Floats:
        """Means over heads, then over images, run by run, [side, seed, layer]."""
        return defined_mean(defined_mean(self.sides, axis=4), axis=2)

    def over_classes(self, classes: NDArray[np.int64]) -> Floats:
        """Means over seeds, heads, then over the images of each class that have a pair, [side, class, layer].

        Args:
            classes: class of each image, from 0 without gaps, [image].
        """
        members = [np.flatnonzero(classes == code) for code in range(int(classes.max()) + 1)]
        return np.stack([[defined_mean(side[rows], axis=0) for rows in members] for side in self.over_heads()])

    def image_differences(self) -> Floats:
        """Condition − against, seeds and heads averaged, [image, layer]."""
        against, condition = self.over_heads()
        return np.asarray(condition - against)

    def run_differences(self) -> Floats:
        """Condition − against of every run and image, heads averaged, [seed, image, layer]."""
        against, condition = defined_mean(self.sides, axis=4)
        return np.asarray(condition - against)

    def cell_differences(self) -> Floats:
        """Condition − against, seeds and images averaged, [layer, head]."""
        against, condition = self.over_seeds()
        return defined_mean(condition - against, axis=0)


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
            f"no condition is called {against!r}{nearest(against, present)} (there are {', '.join(present)})"
        )
    held = [str(name) for name in table.data_vars]
    for metric in metrics or ():
        if metric not in held:
            raise InputError(
                f"the table holds no metric {metric!r}{nearest(metric, held)} (it holds {', '.join(held)})"
            )
    names = list(metrics) if metrics is not None else held
    for metric in names:
        if not isinstance(table[metric].attrs.get("units"), str):
            raise InputError(
                f"metric {metric!r} of the table has no attribute 'units'; expected its unit, such as 'nat'"
            )
    return names


@dataclass(frozen=True)
class ConditionPairs:
    """A condition paired with the one that it is compared with.

    Attributes:
        condition, against: their names.
        metrics: each metric, and each region of a metric with regions.
        layer_ids, sites, head_ids: of the axes `layer` and `head`; a site is a module's name.
        heads: [layer, head], which cells any metric of the table has a value in.
        classes: class of each image as a number from 0, [image]; None where classes have no names or are fewer than 3.
    """

    condition: str
    against: str
    metrics: Sequence[MetricPairs]
    layer_ids: Sequence[int]
    sites: Sequence[str]
    head_ids: Sequence[int]
    heads: NDArray[np.bool_]
    classes: NDArray[np.int64] | None

    @property
    def layers(self) -> NDArray[np.intp]:
        """Positions of the layers that have a value."""
        return np.flatnonzero(self.heads.any(axis=1))

    def family(self, over: str) -> str:
        """The name of a family of tests over these things."""
        return f"{self.condition} against {self.against}, {over}"


def paired_conditions(table: xr.Dataset, against: str, metrics: Sequence[str] | None) -> Iterator[ConditionPairs]:
    """Every other condition of a table paired with `against`, in the table's order.

    Raises:
        InputError: as `check_table`, or two conditions have no run in common.
    """
    names = check_table(table, against, metrics)
    table = table[names]
    for condition in (str(name) for name in table["condition"].values if name != against):
        yield ConditionPairs(
            condition=condition,
            against=against,
            metrics=list(_paired_metrics(table, condition, against)),
            layer_ids=[int(layer) for layer in table["layer"].values],
            sites=[str(site) for site in table["site"].values],
            head_ids=[int(head) for head in table["head"].values],
            heads=_existing_heads(table),
            classes=_classes(table),
        )


def _existing_heads(table: xr.Dataset) -> NDArray[np.bool_]:
    """Which cells [layer, head] any metric has a value in: layers with fewer heads are padded with NaN."""
    exists = np.zeros((table.sizes["layer"], table.sizes["head"]), dtype=bool)
    for variable in table.data_vars.values():
        over = [dim for dim in variable.dims if dim not in ("layer", "head")]
        finite = xr.apply_ufunc(np.isfinite, variable).any(over)
        exists |= finite.transpose("layer", "head").values
    return exists


def _classes(table: xr.Dataset) -> NDArray[np.int64] | None:
    if "class_name" not in table.coords:
        return None
    # Plain text, whatever type the store has strings of.
    names, codes = np.unique([str(name) for name in table["class_name"].values], return_inverse=True)
    return codes.astype(np.int64) if len(names) >= 3 else None


def metric_series(table: xr.Dataset) -> Iterator[tuple[str, str | None, xr.DataArray]]:
    """(metric, region, values) of each metric, one per region where it has regions; region None where it has none."""
    for name, variable in table.data_vars.items():
        regions = variable["region"].values if "region" in variable.dims else ()
        for i, region in enumerate(regions):
            yield str(name), str(region), variable.isel(region=i, drop=True)
        if "region" not in variable.dims:
            yield str(name), None, variable


def _paired_metrics(table: xr.Dataset, condition: str, against: str) -> Iterator[MetricPairs]:
    runs_against, runs_condition, seeds = _paired_runs(table, condition, against)
    changing = not (_seed_invariant(table, condition) and _seed_invariant(table, against))
    for metric, region, values in metric_series(table):
        sides = np.stack(
            [
                values.sel(condition=name).isel(seed=runs).transpose(*_AXES).values.astype(np.float64)
                for name, runs in ((against, runs_against), (condition, runs_condition))
            ]
        )
        unit = table[metric].attrs["units"]
        yield MetricPairs(
            identity={"condition": condition, "against": against, "metric": metric, "unit": unit, "region": region},
            seeds=seeds,
            sides=np.where(np.isfinite(sides).all(axis=0), sides, np.nan),
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
        listed = {name: ", ".join(str(seeds[run]) for run in runs) for name, runs in present.items()}
        raise InputError(
            f"{condition!r} has runs of the seeds {listed[condition]} and {against!r} of {listed[against]}: "
            "train a common seed"
        )
    chosen = [second_run if fixed_first else first_run for first_run, second_run in pairs]
    return [a for a, _ in pairs], [b for _, b in pairs], tuple(seeds[run].item() for run in chosen)


def _runs(table: xr.Dataset, condition: str) -> list[int]:
    """Positions along `seed` where the condition has any value."""
    measured = np.zeros(table.sizes["seed"], dtype=bool)
    for variable in table.data_vars.values():
        finite = xr.apply_ufunc(np.isfinite, variable.sel(condition=condition))
        measured |= finite.any([dim for dim in finite.dims if dim != "seed"]).values
    return [int(run) for run in np.flatnonzero(measured)]


def _seed_invariant(table: xr.Dataset, condition: str) -> bool:
    """Whether no seed changes the condition, by the coordinate `seed_invariant` [condition]; absent means none is."""
    if "seed_invariant" not in table.coords:
        return False
    return bool(table["seed_invariant"].sel(condition=condition))
