"""The stages of a study, and the commands beside it. A name is imported when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.study.hdf5 import export_hdf5 as export_hdf5
    from engine.study.hdf5 import import_hdf5 as import_hdf5
    from engine.study.journal import Journal as Journal
    from engine.study.one_capture import capture_folder as capture_folder
    from engine.study.outputs import require_apart as require_apart
    from engine.study.stages import run_study as run_study
    from engine.study.sweep import run_sweep as run_sweep

_HOMES = {
    "Journal": "engine.study.journal",
    "capture_folder": "engine.study.one_capture",
    "export_hdf5": "engine.study.hdf5",
    "import_hdf5": "engine.study.hdf5",
    "require_apart": "engine.study.outputs",
    "run_study": "engine.study.stages",
    "run_sweep": "engine.study.sweep",
}

__all__ = ["Journal", "capture_folder", "export_hdf5", "import_hdf5", "require_apart", "run_study", "run_sweep"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
