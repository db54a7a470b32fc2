"""The outputs folder as a place: made, locked, written to whole."""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Collection
from contextlib import AbstractContextManager
from functools import reduce
from operator import attrgetter
from pathlib import Path
from typing import IO

from engine.config import JOURNAL, STUDY, StudyConfig
from engine.study.journal import Journal
from store import StoreError
from store.disk import disk_error, writing
from store.removal import named, remove
from store.schema import MARK
from store.system import lock_file
from train.errors import InputError

# Where a study writes under fixed names; captures and samples.zarr say themselves whose they are.
_NAMES = (
    JOURNAL.name,
    STUDY.name,
    "summary.md",
    "report.html",
    "manifest.json",
    "splits",
    "checkpoints",
    "metrics",
    "visualizations",
    "sweep",
)

_OURS = f"{MARK}\n".encode()  # in the file .lock: a run of this program made the folder its own


class OutputsFolder(AbstractContextManager["OutputsFolder"]):
    """The outputs folder, made and locked; a second process has to wait. What ends before `begin` leaves nothing.

    Where no run has been before, files of others under the names that a study gives are not overwritten. The text
    `study` becomes `study.toml`; the journal records it, so that a change of it by anything else is noticed.
    """

    def __init__(self, outputs: Path, study: str, journal: Journal) -> None:
        self._outputs = outputs
        self._study = study
        self._journal = journal
        self._lock: IO[bytes] | None = None
        self._begun = False
        self._made: list[Path] = []  # by this run, the innermost first

    def __enter__(self) -> OutputsFolder:
        lock = self._outputs / ".lock"
        self._made = [path for path in (lock, self._outputs, *self._outputs.parents) if not os.path.lexists(path)]
        try:
            self._outputs.mkdir(parents=True, exist_ok=True)
            if os.path.lexists(lock) and not lock.is_file():
                raise InputError(f"{lock} is a folder, a device or a link to nowhere; move it away")
            if not (lock.is_file() and lock.read_bytes() == _OURS) and not self._journal.is_ours:
                for name in _NAMES:
                    if os.path.lexists(self._outputs / name):
                        raise InputError(
                            f"{self._outputs / name} is there, and no run of this program wrote it; move it away, or "
                            "give another folder with --outputs"
                        )
            self._lock = open(lock, "ab")
        except OSError as error:
            self.__exit__()
            clause = f"outputs folder {self._outputs} (--outputs) cannot be written"
            raise InputError(str(disk_error(clause, error))) from error
        try:
            lock_file(self._lock)
        except (BlockingIOError, FileNotFoundError) as error:  # its holder, just now, left nothing
            self._lock.close()
            raise InputError(
                f"another run is writing to {self._outputs}; wait for it or give another folder with --outputs"
            ) from error
        if not os.path.getsize(lock):
            with writing(lock):
                self._lock.write(_OURS)
                self._lock.flush()
        self._refuse_another_study()
        return self

    def begin(self) -> None:
        """Leave `metrics/` and `study.toml`: what is asked for was found possible, and its stages begin."""
        self._begun = True
        (self._outputs / "metrics").mkdir(exist_ok=True)
        self._journal.write(self._outputs / STUDY, self._study.encode())

    def _refuse_another_study(self) -> None:
        """A study of another model, other data or other recipes would replace hours of work of the one before."""
        path = self._outputs / STUDY
        if {stage.split()[0] for stage in self._journal.stage_seconds()} <= {"check", "data"}:
            return
        try:
            before = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # none, or a damaged one, which is written again
            return
        now = tomllib.loads(self._study)
        recipes = (("conditions", name, "recipe") for name in now.get("conditions", {}))
        for key in (("model", "name"), ("data", "kind"), *recipes):
            was, is_ = (reduce(lambda table, part: table.get(part, {}), key, toml) for toml in (before, now))
            if was and was != is_:
                self.__exit__()
                raise InputError(
                    f"{self._outputs} holds a study with {'.'.join(key)} {was}, and this one has {is_}: it would "
                    "replace the other's results; give another folder with --outputs, or the study that is there with "
                    f"--config {path}"
                )

    def __exit__(self, *exception: object) -> None:
        if not self._begun:
            for path in self._made:
                with contextlib.suppress(OSError, StoreError):  # something else came to lie there
                    remove(path, named(r"\.lock"))
        if self._lock is not None:
            self._lock.close()


def require_apart(config: StudyConfig, keys: Collection[str]) -> None:
    """Check that nothing that the dotted `keys` name is written where it does not belong.

    That is the root of the file system, and where the data set's classes are looked for: the next run would take it for
    one.

    Raises:
        InputError: one of them lies there.
    """
    outputs = Path(os.path.realpath(config.outputs))
    if "outputs" in keys and outputs == outputs.parent:
        raise InputError(f"outputs is {config.outputs}, which holds the whole system; give a folder of its own")
    kind, rule = config.data.kind, config.data.split
    if kind == "digits" or not config.data.root:
        return
    root = Path(os.path.realpath(config.data.root))
    for key in keys:
        place = str(attrgetter(key)(config))
        path = Path(os.path.realpath(place))
        if not place or "://" in place or not path.is_relative_to(root):
            continue
        first = path.relative_to(root).parts[0] if path != root else ""
        if kind == "indoor67":
            taken = first == "Images"
        elif kind == "sports100" or rule == "folders":
            from train.data import SPLIT_FOLDERS  # lazy: torch comes along

            taken = first.lower() in SPLIT_FOLDERS
        else:
            taken = not first.startswith(".")
        if taken:
            raise InputError(
                f"{key} is {place}, where data.root {config.data.root} has its class folders: what is written there "
                "would be taken for one; give a place outside it"
            )


def written_study(outputs: Path) -> Path | None:
    """The study.toml with which an outputs folder was made; None where it holds none.

    Raises:
        InputError: it is not the one that the study wrote; an edited one is given with --config.
    """
    path = outputs / STUDY
    Journal(outputs / JOURNAL).require(path)
    return path if path.is_file() else None


def keep_edited(outputs: Path, given: Path | None) -> None:
    """A study.toml that was edited since a study wrote it is not written over by a command that does not read it.

    Raises:
        InputError: the folder holds such a file, and it is not the configuration `given`.
    """
    path = outputs / STUDY
    if path.is_file() and not (given is not None and given.is_file() and path.samefile(given)):
        try:
            Journal(outputs / JOURNAL).usable(path)
        except InputError as error:
            raise InputError(f"{error}; to go on without it, delete it") from error


def resolve_device(device: str) -> str:
    """ "auto" is cuda where there is one."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no CUDA device here; use --device cpu or auto")
    return device
