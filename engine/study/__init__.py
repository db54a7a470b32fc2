"""The stages of a study, and the commands beside it. A name is imported when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.study.arguments import check_arguments as check_arguments
    from engine.study.hdf5 import export_hdf5 as export_hdf5
    from engine.study.hdf5 import import_hdf5 as import_hdf5
    from engine.study.journal import Journal as Journal
    from engine.study.one_capture import capture_folder as capture_folder
    from engine.study.outputs import keep_edited as keep_edited
    from engine.study.outputs import require_apart as require_apart
    from engine.study.outputs import written_study as written_study
    from engine.study.stages import run_study as run_study
    from engine.study.sweep import run_sweep as run_sweep

_MODULES = {
    "Journal": "journal",
    "capture_folder": "one_capture",
    "check_arguments": "arguments",
    "export_hdf5": "hdf5",
    "import_hdf5": "hdf5",
    "keep_edited": "outputs",
    "require_apart": "outputs",
    "run_study": "stages",
    "run_sweep": "sweep",
    "written_study": "outputs",
}

__all__ = [
    "Journal",
    "capture_folder",
    "check_arguments",
    "export_hdf5",
    "import_hdf5",
    "keep_edited",
    "require_apart",
    "run_study",
    "run_sweep",
    "written_study",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"engine.study.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
