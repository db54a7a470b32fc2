"""Paired comparisons: what is tested, what it is claimed of, and how large it is."""

from engine.statistics.paired import compare_paired

__all__ = ["compare_paired"]
