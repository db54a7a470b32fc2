"""Measures how fine-tuning changes the attention structure of Vision Transformers."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def imported_when_used(room: str, file: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """A room's `__all__`, `__getattr__` and `__dir__`: a name is imported when it is used, as not all need torch.

    Args:
        room: e.g. "engine.capture".
        file: the room's `__init__`; the names are those that it imports of the room, where type checkers read them.
    """
    imports = [node for node in ast.walk(ast.parse(Path(file).read_bytes())) if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: node.module or "" for node in imports for alias in node.names}
    names = sorted(name for name, module in modules.items() if module.startswith(f"{room}."))

    def imported(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(modules[name]), name)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    return names, imported, names.copy
