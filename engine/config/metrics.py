"""The metrics that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.errors import InputError

if TYPE_CHECKING:
    from kernels import MetricSpec

TABLE_AXES = ("condition", "seed", "image", "layer", "head")  # of every metric in a table; `region` comes after them
# What a table has besides metrics.
TABLE_COORDINATES = {*TABLE_AXES, "region", "site", "label", "class_name", "seed_invariant"}


def load_metrics(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names.

    Raises:
        MetricError: no such metric, two of one name, or one with the name of a coordinate.
    """
    import kernels  # lazy: `--help` needs none

    return kernels.load_metrics(metrics, TABLE_COORDINATES)


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
