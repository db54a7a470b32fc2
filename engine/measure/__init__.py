"""Metrics of stored attention: which, over which units, on how many machines; and the table of them all.

A name is imported when it is used: the report reads the table without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.measure.store import measure_store
    from engine.measure.table import build_table, prefix_mass_warning, read_table, write_table

__all__ = ["build_table", "measure_store", "prefix_mass_warning", "read_table", "write_table"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(
            importlib.import_module(f"engine.measure.{'store' if name == 'measure_store' else 'table'}"), name
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
