"""The stages of a study, and the commands beside it. A name is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import imported_when_used

if TYPE_CHECKING:
    from engine.study.hdf5 import export_hdf5, import_hdf5
    from engine.study.journal import Journal
    from engine.study.one_capture import capture_folder
    from engine.study.outputs import keep_edited, require_apart, written_study
    from engine.study.stages import run_study
    from engine.study.sweep import run_sweep

__all__, __getattr__, __dir__ = imported_when_used(__name__, __file__)
