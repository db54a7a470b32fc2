"""What identifies a metric's numbers in a store, and which of them this version of the code left there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine import __version__
from engine.config import load_metrics
from kernels import MetricSpec
from store import AttentionStore


def metric_parameters(spec: MetricSpec, backend: str, other: AttentionStore | None = None) -> dict[str, Any]:
    """What identifies a metric's numbers in a store: its unit, the backend and the code that made them.

    Of a user's metric, the code is that of its reference's module, too: changed, it is measured again.

    Args:
        other: the store that a pair metric compares with; its name and its capture's hash are among them.
    """
    parameters: dict[str, Any] = {"unit": spec.unit, "backend": backend, "code_version": __version__}
    if not spec.is_builtin:
        parameters["definition"] = spec.definition()
    if spec.inputs != "pair" or other is None:
        return parameters
    return parameters | {"against": {"store": other.path.name, "capture": other.digest}}


def stored_parameters(
    store: AttentionStore, spec: MetricSpec, other: AttentionStore | None = None
) -> dict[str, Any] | None:
    """Parameters of the metric's values that this version of the code left in the store, by whatever backend."""
    for parameters in store.metric_params(spec.name):
        if metric_parameters(spec, parameters["backend"], other) == parameters:
            return parameters
    return None


def definitions(metrics: Sequence[str]) -> dict[str, str]:
    """Name -> `definition` of the users' metrics among these; those of kernels have the code version."""
    return {spec.name: spec.definition() for spec in load_metrics(metrics) if not spec.is_builtin}
