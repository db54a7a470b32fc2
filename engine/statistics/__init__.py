"""Paired comparisons: what is tested, what it is claimed of, and how large it is."""

from engine.statistics.conditions import compare_conditions
from engine.statistics.paired import compare_paired
from engine.statistics.patterns import cross_metric_correlation, layer_trend

__all__ = ["compare_conditions", "compare_paired", "cross_metric_correlation", "layer_trend"]
