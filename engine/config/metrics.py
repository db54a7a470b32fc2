"""The metrics that a configuration names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.errors import InputError

if TYPE_CHECKING:
    import xarray

    from engine.config.study import MeasureConfig
    from kernels import MetricSpec

TABLE_AXES = ("condition", "seed", "image", "layer", "head")  # of every metric in a table; `region` comes after them
# What a table has besides metrics.
TABLE_COORDINATES = {*TABLE_AXES, "region", "region_area", "site", "label", "class_name", "seed_invariant"}


def load_metrics(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names.

    Raises:
        MetricError: no such metric, two of one name, or one with the name of a coordinate.
    """
    import kernels  # lazy: `--help` needs none

    return kernels.load_metrics(metrics, TABLE_COORDINATES)


def conventions(measure: MeasureConfig) -> tuple[str, ...] | None:
    """The metrics that are measured beside those asked for, as other conventions of them; None: none were asked for.

    Raises:
        MetricError: as of `load_metrics`.
    """
    if not measure.conventions:
        return None
    import kernels

    return tuple(spec.name for spec in kernels.other_conventions(load_metrics(measure.metrics)))


def all_metrics(measure: MeasureConfig) -> tuple[str, ...]:
    """Every metric that is measured: those asked for, and other conventions of them.

    Raises:
        MetricError: as of `load_metrics`.
    """
    return (*measure.metrics, *(conventions(measure) or ()))


def chosen_metrics(table: xarray.Dataset) -> xarray.Dataset:
    """A table without the metrics that were measured as other `conventions`: what was asked for is what is tested."""
    others = json.loads(table.attrs.get("conventions", "[]"))
    return table[[name for name in table.data_vars if name not in others]]


def metrics_of_one_capture(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names, all of which can be computed from one capture.

    Raises:
        MetricError: as of `load_metrics`.
        InputError: one that compares two captures.
    """
    specs = load_metrics(metrics)
    for spec in specs:
        if spec.inputs == "pair":
            raise InputError(
                f"{spec.name} compares two captures, and each condition is measured alone; leave it out here, store "
                "two captures (capture --store) and measure one of them with --against the other"
            )
    return specs
