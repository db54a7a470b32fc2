"""Spatial metrics of attention maps: one pass over the data, every backend, one set of definitions."""

from kernels.backends import BACKENDS, BackendSpec, BackendUnavailableError, resolve
from kernels.checks import InvalidAttentionError
from kernels.layout import TokenLayout
from kernels.measure import measure_attention, measure_pair, measure_qk
from kernels.metrics import METRICS, Measurement, MetricError, MetricSpec, load_metric

__all__ = [
    "BACKENDS",
    "METRICS",
    "BackendSpec",
    "BackendUnavailableError",
    "InvalidAttentionError",
    "Measurement",
    "MetricError",
    "MetricSpec",
    "TokenLayout",
    "load_metric",
    "measure_attention",
    "measure_pair",
    "measure_qk",
    "resolve",
]
