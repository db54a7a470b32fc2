"""Spatial metrics of attention maps: one pass over the data, every backend, one set of definitions."""

from kernels.backends import BACKENDS, BackendSpec, BackendUnavailableError, resolve
from kernels.layout import TokenLayout
from kernels.metrics import METRICS, Measurement, MetricSpec, load_metric

__all__ = [
    "BACKENDS",
    "METRICS",
    "BackendSpec",
    "BackendUnavailableError",
    "Measurement",
    "MetricSpec",
    "TokenLayout",
    "load_metric",
    "resolve",
]
