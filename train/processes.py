"""This process among those that torchrun started, by its environment. Nothing heavy is imported."""

from __future__ import annotations

import os

_speaks: bool | None = None


def several_processes() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_process() -> bool:
    """Whether this is the first of torchrun's processes, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def speaks() -> bool:
    """Whether this process is the one that says what went wrong.

    Before the processes have joined they all meet the same mistakes, and the first one says it; afterwards the one
    that fails first does (`train.parallel.joined`).
    """
    return first_process() if _speaks is None else _speaks


def let_speak(speaks: bool) -> None:
    """Decide what `speaks` answers."""
    global _speaks
    _speaks = speaks
