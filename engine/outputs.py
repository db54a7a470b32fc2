"""The outputs folder as a place: made, locked, written to whole."""

from __future__ import annotations

import fcntl
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from engine.journal import Journal
from train.checkpoint import write_atomically
from train.errors import InputError

__all__ = ["OutputsFolder", "resolve_device", "write_json"]


class OutputsFolder(AbstractContextManager[None]):
    """The outputs folder, made, written to and locked; a second process is told to wait.

    Args:
        outputs: the folder.
        study: the configuration of this run, which becomes `study.toml`.
        journal: of the folder; it records `study.toml`, so that a change of it by anything else is noticed.
    """

    def __init__(self, outputs: Path, study: str, journal: Journal) -> None:
        self._outputs = outputs
        self._study = study
        self._journal = journal
        self._lock: IO[str] | None = None

    def __enter__(self) -> None:
        try:
            self._outputs.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._outputs / ".lock", "w")
        except OSError as error:
            raise InputError(
                f"outputs folder {self._outputs} cannot be written ({error.strerror}); give another with --outputs"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InputError(
                f"another run is writing to {self._outputs}; wait for it or give another folder with --outputs"
            ) from error
        (self._outputs / "metrics").mkdir(exist_ok=True)
        self._journal.write(self._outputs / "study.toml", self._study.encode())

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()


def resolve_device(device: str) -> str:
    """ "auto" is cuda where there is one.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no CUDA device here; use --device cpu or auto")
    return device


def write_json(path: Path, value: Any) -> None:
    """Write JSON values, all of them or nothing; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
