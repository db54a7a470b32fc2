"""The metrics that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.errors import InputError

if TYPE_CHECKING:
    from kernels import MetricSpec

# What a table of metrics has besides metrics; see `engine.measure.table`.
_COORDINATES = {
    *("condition", "seed", "image", "layer", "head", "region"),
    *("site", "label", "class_name", "seed_invariant"),
}


def load_metrics(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names.

    Raises:
        InputError: no such metric, two of one name, or one with the name of a coordinate.
        MetricError: a metric of the user's own is declared in a wrong way.
    """
    from kernels import MetricSpec, load_metric  # lazy: `--help` needs none

    try:
        specs = [metric if isinstance(metric, MetricSpec) else load_metric(metric) for metric in metrics]
    except ValueError as error:
        raise InputError(str(error)) from error
    named: dict[str, tuple[MetricSpec, str | MetricSpec]] = {}
    for spec, metric in zip(specs, metrics, strict=True):
        other, first = named.setdefault(spec.name, (spec, metric))
        if spec.name in _COORDINATES:
            raise InputError(f"{metric} is called {spec.name!r}, as a coordinate of the table is; give it another name")
        if other is not spec:
            raise InputError(f"{first} and {metric} are both called {spec.name!r}; give each a name of its own")
    return [spec for spec, _ in named.values()]


def metrics_of_one_capture(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names, all of which can be computed from one capture.

    Raises:
        InputError: no such metric, or one that compares two captures.
    """
    specs = load_metrics(metrics)
    for spec in specs:
        if spec.inputs == "pair":
            raise InputError(
                f"{spec.name} compares two captures, and each condition is measured alone; leave it out here, store "
                "two captures (capture --store) and measure one of them with --against the other"
            )
    return specs
