"""Spatial metrics of attention maps: one pass over the data, every backend, one set of definitions."""

import sys
from pathlib import Path

# Hugging Face's package kernels on PyPI: installed into one environment, the two write over each other's files.
if _record := next((record for folder in sys.path for record in Path(folder).glob("kernels-*.dist-info")), None):
    raise ImportError(
        f"Hugging Face's package kernels is installed too ({_record}), and has the name of a package of "
        "vit-attention-engine: neither works beside the other; install each in an environment of its own"
    )

from kernels.backends import BACKENDS, Backend, BackendSpec, resolve
from kernels.errors import BackendUnavailableError, InvalidAttentionError, MetricError, OptionError
from kernels.layout import TokenLayout
from kernels.measure import CORE_METRICS, Measurement, check_metrics, measure_attention, measure_pair, measure_qk
from kernels.metrics import METRICS, MetricSpec, load_metric, load_metrics, other_conventions

__all__ = [
    "BACKENDS",
    "CORE_METRICS",
    "METRICS",
    "Backend",
    "BackendSpec",
    "BackendUnavailableError",
    "InvalidAttentionError",
    "Measurement",
    "MetricError",
    "MetricSpec",
    "OptionError",
    "TokenLayout",
    "check_metrics",
    "load_metric",
    "load_metrics",
    "measure_attention",
    "measure_pair",
    "measure_qk",
    "other_conventions",
    "resolve",
]
