"""Metrics of stored attention: which, over which units, on how many machines; and the table of them all."""

from engine.measure.store import measure_store, missing_metrics
from engine.measure.table import build_table, prefix_mass_warning, read_table, write_table

__all__ = [
    "build_table",
    "measure_store",
    "missing_metrics",
    "prefix_mass_warning",
    "read_table",
    "write_table",
]
