"""The stages of a study, and the commands beside it. A name is imported when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.study.arguments import check_arguments
    from engine.study.hdf5 import export_hdf5, import_hdf5
    from engine.study.journal import Journal
    from engine.study.one_capture import capture_folder
    from engine.study.outputs import keep_edited, require_apart, written_study
    from engine.study.stages import run_study
    from engine.study.sweep import run_sweep

# module of this room -> what it gives to others
_NAMES = {
    "arguments": "check_arguments",
    "hdf5": "export_hdf5 import_hdf5",
    "journal": "Journal",
    "one_capture": "capture_folder",
    "outputs": "keep_edited require_apart written_study",
    "stages": "run_study",
    "sweep": "run_sweep",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

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
    if name in _HOMES:
        return getattr(importlib.import_module(f"engine.study.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
