"""Paired comparisons: what is tested, what it is claimed of, and how large it is."""

from engine.statistics.analysis import analyse
from engine.statistics.clusters import layer_clusters
from engine.statistics.conditions import compare_conditions
from engine.statistics.morans import MoransInference, morans_inference
from engine.statistics.paired import compare_paired
from engine.statistics.patterns import cross_metric_correlation, layer_trend
from engine.statistics.power import minimum_detectable_effect

__all__ = [
    "MoransInference",
    "analyse",
    "compare_conditions",
    "compare_paired",
    "cross_metric_correlation",
    "layer_clusters",
    "layer_trend",
    "minimum_detectable_effect",
    "morans_inference",
]
