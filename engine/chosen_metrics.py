"""The metrics that a configuration names, and what identifies their numbers in a store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import __version__
from kernels import MetricSpec, load_metric
from store import AttentionStore
from train.errors import InputError

__all__ = ["load_metrics", "metric_parameters", "metrics_of_one_capture"]


def load_metrics(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names.

    Raises:
        InputError: no such metric.
    """
    try:
        return [metric if isinstance(metric, MetricSpec) else load_metric(metric) for metric in metrics]
    except ValueError as error:
        raise InputError(str(error)) from error


def metrics_of_one_capture(metrics: Sequence[str | MetricSpec]) -> list[MetricSpec]:
    """The metrics of these names, all of which can be computed from one capture.

    Raises:
        InputError: no such metric, or one that compares two captures.
    """
    specs = load_metrics(metrics)
    for spec in specs:
        if spec.inputs == "pair":
            raise InputError(
                f"{spec.name} compares two captures, and here there is one; leave it out, or measure stored captures "
                "with --against"
            )
    return specs


def metric_parameters(spec: MetricSpec, backend: str, other: AttentionStore | None = None) -> dict[str, Any]:
    """What identifies a metric's numbers in a store: its unit, the backend and the code that made them.

    Args:
        other: the store that a pair metric compares with; its name and its capture's hash are among them.
    """
    parameters = {"unit": spec.unit, "backend": backend, "code_version": __version__}
    if spec.inputs != "pair" or other is None:
        return parameters
    return parameters | {"against": {"store": other.path.name, "capture": other.digest}}
