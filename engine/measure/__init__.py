"""Metrics of stored attention: which, over which units, on how many machines; and the table of them all."""

from engine.measure.store import measure_store
from engine.measure.table import build_table, prefix_mass_warning, read_table, write_table

__all__ = [
    "build_table",
    "measure_store",
    "prefix_mass_warning",
    "read_table",
    "write_table",
]
