"""Measures how fine-tuning changes the attention structure of Vision Transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"


def imported_when_used(
    room: str, names: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """A room's `__all__`, `__getattr__` and `__dir__`: a name is imported when it is used, as not all need torch.

    Args:
        room: e.g. "engine.capture".
        names: module of the room -> what it gives to others, between spaces; type checkers read the room's imports.
    """
    modules = {name: module for module, given in names.items() for name in given.split()}

    def imported(name: str) -> Any:
        if name in modules:
            return getattr(importlib.import_module(f"{room}.{modules[name]}"), name)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    return sorted(modules), imported, lambda: sorted(modules)
