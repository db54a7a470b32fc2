"""The commands: what each does, which keys it reads, which flags it has. What it needs is imported when it runs."""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import JOURNAL, StudyConfig, all_metrics
from train.processes import first_process

# Keys that only a command with a flag of its own for them reads.
_OF_ONE_STORE = ("capture.store", "measure.store", "measure.against")


@dataclass(frozen=True)
class Command:
    """One command."""

    help: str
    run: Callable[[StudyConfig, argparse.Namespace], int | None]  # returns the exit code where it may be another than 0
    uses: tuple[str, ...] = ()  # sections and keys that it reads; a flag of another is refused, not ignored
    flags: Mapping[str, str] = field(default_factory=dict)  # short flag -> configuration key
    positional: str = ""  # the file it may name
    shared: bool = False  # torchrun's processes divide its work; otherwise the first one does it
    defaults: Mapping[str, Any] = field(default_factory=dict)  # configuration key -> value, where no file is given
    required: tuple[str, ...] = ()  # flags that must be given then
    writes: tuple[str, ...] = ()  # keys that name what it writes; with `outputs`, that folder's study.toml too
    continues: bool = False  # without a file it goes on with the study.toml of its outputs folder

    def reads(self, key: str) -> bool:
        """Whether a key changes anything that it does; where outputs go, and on which device, does everywhere."""
        named = (*self.uses, *self.flags.values(), "outputs", "device")
        return key in named or (key not in _OF_ONE_STORE and key.partition(".")[0] in named)


def _stages(config: StudyConfig, arguments: argparse.Namespace, last: str) -> None:
    from engine.study import run_study

    run_study(config, last=last)


def _report(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from engine.report import write_report
    from engine.study import Journal

    for path in write_report(config.outputs, Journal(Path(config.outputs) / JOURNAL)):
        print(path)


def _capture(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from engine.study import capture_folder

    capture_folder(config)
    if first_process():
        from store.verify import info

        store = info(config.capture.store)
        layers, attention = store["layers"], store["attention"]["bytes"]
        kept = f"{attention / 1e6:,.1f} MB of attention" if attention else "metrics, and no attention"
        print(f"{store['path']}: {store['images']:,} images, {len(layers)} layers, {kept}")


def _measure(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from store import AttentionStore

    keys = config.measure
    store = AttentionStore.open(keys.store)
    against = AttentionStore.open(keys.against) if keys.against else None

    from engine.measure import measure_store

    metrics = all_metrics(keys)
    measured = measure_store(store, metrics, keys.backend, against, keys.scheduler)
    already = f" holds {', '.join(metrics)} already"
    print(f"{store.path}" + (f": measured {', '.join(measured)}" if measured else already))


def _sweep(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from engine.study import run_sweep

    run_sweep(config)


def _export(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from engine.study import export_hdf5

    print(export_hdf5(config))


def _import(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from engine.study import import_hdf5

    store = import_hdf5(config)
    print(f"{store.path}: {len(store.image_ids)} images, {len(store.layers)} layers")


def _verify(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from store.storage import location_of
    from store.verify import verify

    damages = verify(arguments.store)
    for damage in damages:
        print(damage)
    if not damages:
        print(f"{location_of(arguments.store)} is sound")
    return 1 if damages else 0


def _info(config: StudyConfig, arguments: argparse.Namespace) -> None:
    from store.verify import info

    unicode = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    print(json.dumps(info(arguments.store), indent=2, ensure_ascii=not unicode))


TRAINING = ("model", "data", "pretrain", "train", "conditions")
_STATISTICS = ("capture", "measure", "statistics")
_COMPARE_CONDITIONS = {name: {"recipe": "checkpoint", "checkpoint": ""} for name in ("baseline", "finetuned")}
_STUDY_FILES = ("outputs", "data.cache_folder")
_ALL_IMAGES = {"data.kind": "folder", "data.split": "all"}


def _up_to(last: str, help: str, uses: tuple[str, ...], **more: Any) -> Command:
    """The command that runs the stages of a study through `last`."""
    return Command(help, partial(_stages, last=last), uses, shared=True, writes=_STUDY_FILES, **more)


COMMANDS: dict[str, Command] = {
    "study": _up_to(
        "report",
        "train the conditions, capture, measure, test and report (the default)",
        (*TRAINING, *_STATISTICS, "relevance"),
    ),
    "train": _up_to("train", "the study up to the trained checkpoints", TRAINING),
    "compare": _up_to(
        "report",
        "two checkpoints of one model on a folder of images, through the same stages",
        ("model", "data", "train.seeds", "conditions", *_STATISTICS, "relevance"),
        flags={
            "--baseline": "conditions.baseline.checkpoint",
            "--finetuned": "conditions.finetuned.checkpoint",
            "--classes": "model.classes",
            "--baseline-classes": "conditions.baseline.classes",
            "--finetuned-classes": "conditions.finetuned.classes",
        },
        defaults={**_ALL_IMAGES, "conditions": _COMPARE_CONDITIONS, "train.seeds": ["0"]},
        required=("--baseline", "--finetuned", "--model.name", "--data.root"),
    ),
    "capture": Command(
        "one model's attention on a folder of images, into a store",
        _capture,
        ("model", "data", "capture", "measure.metrics", "measure.conventions", "measure.backend"),
        shared=True,
        flags={
            "--store": "capture.store",
            "--encoding": "capture.encoding",
            "--batch-size": "capture.batch_size",
            "--classes": "model.classes",
        },
        defaults={**_ALL_IMAGES, "capture.sinks": ["store", "metrics"]},
        required=("--store", "--model.name", "--data.root"),
        writes=("capture.store",),
    ),
    "measure": Command(
        "metrics of a stored capture; needs neither model nor images",
        _measure,
        ("measure",),
        flags={
            "--store": "measure.store",
            "--metrics": "measure.metrics",
            "--against": "measure.against",
            "--scheduler": "measure.scheduler",
        },
        defaults={"data.kind": "folder"},  # the metrics of any study, not those of the embedded one
        required=("--store",),
    ),
    "export": Command(
        "a store's attention as one HDF5 file",
        _export,
        flags={"--store": "measure.store", "--hdf5": "hdf5.file"},
        defaults={"data.kind": "folder"},
        required=("--store", "--hdf5"),
    ),
    "import": Command(
        "a store of the attention in an HDF5 file of your own: a dataset [image, head, query, key] for each layer, …",
        _import,
        ("hdf5",),
        flags={
            "--hdf5": "hdf5.file",
            "--store": "capture.store",
            "--axes": "hdf5.axes",
            "--grid": "hdf5.grid",
            "--encoding": "capture.encoding",
            "--batch-size": "capture.batch_size",
        },
        defaults={"data.kind": "folder"},
        required=("--hdf5", "--store"),
    ),
    "stats": _up_to("statistics", "the study up to the paired comparisons", (*TRAINING, *_STATISTICS), continues=True),
    "relevance": _up_to(
        "relevance",
        "the study up to the relevance samples",
        (*TRAINING, *_STATISTICS, "relevance"),
        continues=True,
    ),
    "report": Command("figures, summary and page once more, from the tables and samples of an outputs folder", _report),
    "sweep": Command(
        "adapters of several ranks on a plain, a pruned and a binarised backbone, their hyper-parameters by Optuna",
        _sweep,
        ("model", "data", "train", "sweep"),
        shared=True,  # it refuses several processes itself
        flags={"--init": "sweep.init"},
        defaults={"data.kind": "folder", "model.name": "resnet18", "train.epochs": "10"},
        required=("--data.root",),
        writes=_STUDY_FILES,
    ),
    "verify": Command(
        "check a store: exit code 0 when sound, 1 with a line for each damaged unit", _verify, positional="store"
    ),
    "info": Command("what a store holds", _info, positional="store"),
}
