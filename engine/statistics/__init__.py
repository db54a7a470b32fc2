"""Paired comparisons: what is tested, what it is claimed of, and how large it is."""

from engine.statistics.analysis import analyse
from engine.statistics.association import correlate_over_images
from engine.statistics.bootstrap import bootstrap_interval
from engine.statistics.clusters import layer_clusters
from engine.statistics.conditions import IMAGES, check_bounds, compare_conditions
from engine.statistics.document import comparison_document, write_comparison
from engine.statistics.entries import interval, number, numbers, why_degenerate
from engine.statistics.morans import MoransInference, morans_inference
from engine.statistics.paired import compare_paired
from engine.statistics.patterns import cross_metric_correlation, layer_trend
from engine.statistics.power import minimum_detectable_effect
from engine.statistics.results import SKEWED, Analyses, Cluster, Interval, PairedTest, Relation, Trend, load_analyses

__all__ = [
    "IMAGES",
    "SKEWED",
    "Analyses",
    "Cluster",
    "Interval",
    "MoransInference",
    "PairedTest",
    "Relation",
    "Trend",
    "analyse",
    "bootstrap_interval",
    "check_bounds",
    "compare_conditions",
    "compare_paired",
    "comparison_document",
    "correlate_over_images",
    "cross_metric_correlation",
    "interval",
    "layer_clusters",
    "layer_trend",
    "load_analyses",
    "minimum_detectable_effect",
    "morans_inference",
    "number",
    "numbers",
    "why_degenerate",
    "write_comparison",
]
