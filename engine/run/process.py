"""How this process was started: by which name, beside which files, with which streams. Nothing heavy is imported."""

from __future__ import annotations

import importlib.util
import os
import select
import sys
from pathlib import Path
from typing import TextIO

_ROOT = Path(__file__).resolve().parents[2]


def foreign_package() -> str:
    """What lies where this program's other packages are looked for, in a sentence; "" where all is as it should be.

    Their names are common: many a folder has a train.py, and PyPI a package kernels. Nothing foreign is run to see it.
    """
    if record := next((record for folder in sys.path for record in Path(folder).glob("kernels-*.dist-info")), None):
        return (
            f"Hugging Face's package kernels is installed too ({record}), and has the name of a package of "
            "vit-attention-engine: neither works beside the other; install each in an environment of its own"
        )
    for name in ("kernels", "store", "train"):
        spec = importlib.util.find_spec(name)
        found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != _ROOT / name / "__init__.py":
            return (
                f"{found or f'a folder {name}'} is taken for this program's package {name}, as Python looks there "
                "first; rename it, or start vit-attention in another folder and without PYTHONPATH"
            )
    return ""


def open_streams() -> None:
    """Let everything be printed: to nowhere where a stream was closed, and as escapes where it is not Unicode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def find_modules_here() -> None:
    """Let a metric of the user's own be found in the working directory; last, so that no file there hides a package.

    Raises:
        FileNotFoundError: the directory is gone.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def reader_left() -> bool:
    """Whether the program that reads what is printed has ended; what is still to be written goes nowhere then."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
    for stream in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return bool(gone)


def _reader_is_gone(stream: TextIO) -> bool:
    if not hasattr(select, "poll"):  # on Windows: of a broken pipe nothing more is known
        return True
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
