"""From the table of metrics to pairs: which runs, images and heads of two conditions stand against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from engine.config import TABLE_AXES
from engine.statistics.arrays import Floats, defined_mean
from train.errors import InputError, nearest

_AXES = TABLE_AXES[1:]


@dataclass(frozen=True)
class MetricPairs:
    """One metric (of one region) in two conditions, pair by pair."""

    identity: Mapping[str, Any]  # fields of `Compared`
    seeds: tuple[Any, ...]  # of the runs paired that have values, in the table's order
    sides: Floats  # [side, run, image, layer, head], against, then condition; NaN in all runs where one is not finite
    changing: bool  # whether a seed changes either condition, so that runs are units of their own

    def over_seeds(self) -> Floats:
        """Means over runs, [side, image, layer, head]."""
        return defined_mean(self.sides, axis=1)

    def over_heads(self) -> Floats:
        """Means over seeds, then over the heads that have a pair, [side, image, layer]: both over the same heads."""
        return defined_mean(self.over_seeds(), axis=3)

    def over_images(self) -> Floats:
        """Means over heads, then over images, run by run, [side, run, layer]; NaN for a run without values."""
        return defined_mean(defined_mean(self.sides, axis=4), axis=2)

    def over_classes(self, classes: NDArray[np.int64]) -> Floats:
        """Means over seeds, heads, then over the images of each class that have a pair, [side, class, layer]."""
        members = [np.flatnonzero(classes == code) for code in range(int(classes.max()) + 1)]
        return np.stack([[defined_mean(side[rows], axis=0) for rows in members] for side in self.over_heads()])

    def image_differences(self) -> Floats:
        """Condition − against, seeds and heads averaged, [image, layer]."""
        return np.asarray(np.diff(self.over_heads(), axis=0)[0])

    def run_differences(self) -> Floats:
        """Condition − against of every run that has values, and image, [seed, image, layer, head]."""
        d = np.diff(self.sides, axis=0)[0]
        measured = ~np.isnan(d).reshape(len(d), -1).all(axis=1)
        return np.asarray(d[measured] if measured.any() else d[: len(self.seeds)])

    def differences(self) -> Floats:
        """Condition − against, seeds averaged, [image, layer, head]."""
        return np.asarray(np.diff(self.over_seeds(), axis=0)[0])


def check_table(table: xr.Dataset, against: str, metrics: Sequence[str] | None) -> list[str]:
    """The metrics to compare, all of the table's when None. Raises InputError where the table cannot be used."""
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
    names = list(metrics) if metrics is not None else held
    for metric in names:
        if metric not in held:
            raise InputError(
                f"the table holds no metric {metric!r}{nearest(metric, held)} (it holds {', '.join(held)})"
            )
        if not isinstance(table[metric].attrs.get("units"), str):
            raise InputError(
                f"metric {metric!r} of the table has no attribute 'units'; expected its unit, such as 'nat'"
            )
    return names


@dataclass(frozen=True)
class ConditionPairs:
    """A condition paired with the one that it is compared with."""

    condition: str
    against: str
    metrics: Sequence[MetricPairs]  # each metric, and each region of a metric with regions
    layer_ids: Sequence[int]
    sites: Sequence[str]  # module of each layer
    head_ids: Sequence[int]
    heads: NDArray[np.bool_]  # [layer, head], where any metric of the table has a value: some layers have fewer heads
    classes: NDArray[np.int64] | None  # [image], from 0 without gaps; None: no names, or fewer than 3 classes

    @property
    def layers(self) -> NDArray[np.intp]:
        """Positions of the layers that have a value."""
        return np.flatnonzero(self.heads.any(axis=1))

    def row(self, metric: MetricPairs, layer: int | None, head: int | None) -> dict[str, Any]:
        """What a result is of: fields of `Compared`, and which runs at which place; None: over all layers or heads."""
        return {
            **metric.identity,
            "layer": None if layer is None else self.layer_ids[layer],
            "site": None if layer is None else self.sites[layer],
            "head": None if head is None else self.head_ids[head],
            "seeds": metric.seeds,
        }

    def family(self, over: str) -> str:
        """The name of a family of tests over these things."""
        return f"{self.condition} against {self.against}, {over}"


def paired_conditions(table: xr.Dataset, against: str, metrics: Sequence[str] | None) -> Iterator[ConditionPairs]:
    """Every other condition of a table paired with `against`, in the table's order.

    Raises InputError as `check_table`, and where two conditions have no run in common.
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
            heads=_has_values(table, "layer", "head"),
            classes=_classes(table),
        )


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
        of_all = variable.drop_vars([key for key, labels in variable.coords.items() if "region" in labels.dims])
        for i, region in enumerate(regions):
            yield str(name), str(region), of_all.isel(region=i)
        if "region" not in variable.dims:
            yield str(name), None, variable


def series_name(metric: str, region: str | None) -> str:
    """Name of a metric, or of one region of it, such as `region_mass[target_digit]`."""
    return metric if region is None else f"{metric}[{region}]"


def _paired_metrics(table: xr.Dataset, condition: str, against: str) -> Iterator[MetricPairs]:
    """Runs of one seed are paired; the only run of a condition that no seed changes, with every run of the other.

    Runs that have no value of a metric are left out of it; images and heads, where one of the others has none.
    """
    names = (against, condition)
    runs = [measured_runs(table, name) for name in names]
    changing = [not seed_invariant(table, name) for name in names]
    first, second = (positions if changes else positions[:1] for positions, changes in zip(runs, changing, strict=True))
    pairs = [(a, b) for a in first for b in second if a == b or not all(changing)]
    seeds = table["seed"].values if "seed" in table.coords else np.arange(table.sizes["seed"])
    if not pairs:
        of_against, of_condition = (", ".join(str(seeds[run]) for run in positions) for positions in runs)
        raise InputError(
            f"{condition!r} has runs of the seeds {of_condition} and {against!r} of {of_against}: train a common seed"
        )
    runs_of = [seeds[a if changing[0] else b].item() for a, b in pairs]
    for metric, region, values in metric_series(table):
        sides = np.stack(
            [
                values.sel(condition=name).isel(seed=list(positions)).transpose(*_AXES).values.astype(np.float64)
                for name, positions in zip(names, zip(*pairs, strict=True), strict=True)
            ]
        )
        complete = np.asarray(np.isfinite(sides).all(axis=0))
        measured = np.asarray(complete.reshape(len(pairs), -1).any(axis=1))
        complete = np.logical_and.outer(measured, complete[measured].all(axis=0))
        unit = table[metric].attrs["units"]
        yield MetricPairs(
            identity={"condition": condition, "against": against, "metric": metric, "unit": unit, "region": region},
            seeds=tuple(seed for seed, has in zip(runs_of, measured, strict=True) if has),
            sides=np.where(complete, sides, np.nan),
            changing=any(changing),
        )


def measured_runs(table: xr.Dataset, condition: str) -> list[int]:
    """Positions along `seed` where the condition has any value."""
    runs = np.flatnonzero(_has_values(table.sel(condition=condition), "seed"))
    if not runs.size:
        raise InputError(f"condition {condition!r} holds no finite value of any metric; measure it first")
    return [int(run) for run in runs]


def _has_values(table: xr.Dataset, *dims: str) -> NDArray[np.bool_]:
    """Where along these dimensions any metric has a finite value."""
    finite = (xr.apply_ufunc(np.isfinite, metric) for metric in table.data_vars.values())
    along = [metric.any([dim for dim in metric.dims if dim not in dims]).transpose(*dims) for metric in finite]
    return np.asarray(np.logical_or.reduce([metric.values for metric in along]))


def seed_invariant(table: xr.Dataset, condition: str) -> bool:
    """Whether no seed changes the condition, by the coordinate `seed_invariant` [condition]; absent means none is."""
    if "seed_invariant" not in table.coords:
        return False
    return bool(table["seed_invariant"].sel(condition=condition))
