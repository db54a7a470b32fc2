"""Metrics of stored attention: which, over which units, on how many machines; and the table of them all.

A name is imported when it is used: the report reads the table without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import imported_when_used

if TYPE_CHECKING:
    from engine.measure.heads import head_divergence
    from engine.measure.store import measure_store
    from engine.measure.table import build_table, prefix_mass_warning, read_table, write_table

__all__, __getattr__, __dir__ = imported_when_used(__name__, __file__)
