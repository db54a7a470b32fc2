"""What a configuration names, looked at before anything heavy is imported: a wrong name or file is said at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.config import StudyConfig, load_metrics, metrics_of_one_capture
from train.errors import InputError
from train.files import what_lies_at


def check_arguments(config: StudyConfig, reads: Callable[[str], bool]) -> None:
    """Check the names of metrics, and that the files and folders are there, of the keys that the command `reads`.

    Raises:
        InputError: no such metric, file or folder.
        MetricError: a metric of the user's own is declared in a wrong way.
    """
    if reads("measure.against"):
        load_metrics(config.measure.metrics)
    elif reads("measure.metrics"):
        names = [spec.name for spec in metrics_of_one_capture(config.measure.metrics)]
        if reads("statistics.equivalence") and config.statistics.equivalence:
            from engine.statistics import check_bounds

            check_bounds(config.statistics.equivalence, names)
    for key, place in _inputs(config):
        if place and reads(key) and not Path(place).exists():
            raise InputError(f"{key} is {place}, which {what_lies_at(Path(place))}; give a path that is there")


def _inputs(config: StudyConfig) -> Iterator[tuple[str, str]]:
    """Key and place of every file and folder that is read."""
    for name, condition in config.conditions.items():
        yield f"conditions.{name}.checkpoint", condition.checkpoint
        yield f"conditions.{name}.classes", condition.classes
    yield "model.weights", config.model.weights
    yield "model.adapter", config.model.adapter
    yield "model.classes", config.model.classes
    if config.data.kind == "folder":  # of the others it is said where to get them
        yield "data.root", config.data.root
