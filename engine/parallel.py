"""Training in several processes: `torchrun --nproc-per-node N -m engine.run train` (or `study`).

The first process writes and decides what is done already; the others do the same training runs with it and leave
when all are trained. What follows the training is the first one's alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.config import StudyConfig, study_toml
from engine.journal import Journal, digest, digest_path
from engine.outputs import OutputsFolder, resolve_device
from engine.training import prepare_data, train_runs
from train.parallel import Workers, joined

__all__ = ["several_processes", "train_together"]


def several_processes() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def train_together(config: StudyConfig) -> bool:
    """The train stage of a study in all processes of torchrun; whether this is the first one.

    Raises:
        InputError: as of `engine.training.prepare_data` and `train_runs`.
    """
    outputs, device = Path(config.outputs), resolve_device(config.device)
    with joined(device) as workers:
        if workers.first:
            with OutputsFolder(outputs, study_toml(config)):
                _train(config, _LeadingJournal(outputs / "run.jsonl", workers), outputs, device)
        else:
            for package in ("engine", "train"):
                logging.getLogger(package).setLevel(logging.ERROR)  # the first process says it
            _train(config, _FollowingJournal(outputs / "run.jsonl", workers), outputs, device)
    return workers.first


def _train(config: StudyConfig, journal: Journal, outputs: Path, device: str) -> None:
    data = prepare_data(config, outputs, journal, device=device)
    train_runs(config, data, journal, outputs, device=device)


class _LeadingJournal(Journal):
    """Tells the others whether a stage is done, and waits for them at its end."""

    def __init__(self, path: Path, workers: Workers) -> None:
        super().__init__(path)
        self._workers = workers

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], Mapping[str, Any] | None],
    ) -> str:
        self._workers.tell(self.done(name, inputs, outputs) is None)
        result = super().stage(name, inputs, outputs, work)
        self._workers.wait()
        return result


class _FollowingJournal(Journal):
    """Does the training runs that the first process does, and waits while it does anything else."""

    def __init__(self, path: Path, workers: Workers) -> None:
        super().__init__(path)
        self._workers = workers

    def stage(
        self,
        name: str,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], Mapping[str, Any] | None],
    ) -> str:
        if self._workers.tell(False) and name.startswith("train "):
            work()
        self._workers.wait()
        return digest({self._name(path, self.path.parent): digest_path(path) for path in outputs})
