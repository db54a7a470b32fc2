"""The study in order: images → conditions → capture → store → table → statistics → report.

Each stage is one call, says what it needs and what it leaves, and is skipped when its inputs, by content hash, are
those of the last time and its outputs are as it left them.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xarray
from tqdm import tqdm

from engine import __version__
from engine.config import StudyConfig, study_toml
from engine.controls import Control, hybrid_control, hybrid_state, lockstep, same_attention_control
from engine.journal import Journal, digest_path
from engine.measure import build_table, measure_store, read_table, write_table
from engine.relevance.samples import choose_targets, explain_samples, samples_folder, write_samples
from engine.report import write_report
from engine.report.comparison import comparison_document, write_comparison
from engine.samples import add_sample_maps, choose_samples, start_samples
from engine.sinks import PREFIX_MASS_WARNING, Capture, capture_to_store
from engine.statistics import compare_conditions
from engine.training import Run, StudyData, prepare_data, train_runs
from kernels import load_metric
from store import AttentionStore
from train.checkpoint import write_atomically
from train.conditions import versions
from train.data import prepare_folder
from train.errors import InputError
from train.manifest import Manifest
from train.models import build_model, load_checkpoint, preprocessing_of

__all__ = ["STAGES", "Study", "capture_folder", "run_study"]

STAGES = ("train", "capture", "control", "measure", "compare", "explain", "report")

# Controls look at every image of a small test split and at a seeded sample of a large one.
CONTROL_IMAGES = 256


def run_study(config: StudyConfig, last: str = "report") -> Path:
    """Run the study through the stage `last`, doing only what is not done yet.

    Args:
        config: see `engine.config`.
        last: one of `STAGES`.

    Returns:
        The outputs folder.

    Raises:
        InputError: whatever the configuration asks for that cannot be had, with what to do.
    """
    study = Study(config)
    with study.opened():
        for stage in STAGES[: STAGES.index(last) + 1]:
            getattr(study, stage)()
    return study.outputs


class Study:
    """One outputs folder and the configuration that fills it.

    Attributes:
        outputs: the folder.
        runs: every trained model, known after `train`.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.outputs = Path(config.outputs)
        self.device = resolve_device(config.device)
        self.journal = Journal(self.outputs / "run.jsonl")
        self.runs: list[Run] = []
        self._captured: dict[Run, str] = {}

    # ------------------------------------------------------------------------------------------------ the stages

    def train(self) -> None:
        """Needs: images. Leaves: checkpoints/<condition>_seed<k>.safetensors, metrics/training.json."""
        self.runs = train_runs(self.config, self.data, self.journal, self.outputs, device=self.device)

    def capture(self) -> None:
        """Needs: checkpoints, test images. Leaves: captures/<condition>_seed<k>.zarr, samples.zarr."""
        samples = self.outputs / "samples.zarr"
        boxes = getattr(self.data.test, "boxes", None)
        self.journal.stage(
            "samples",
            {"data": self.data.digest, "rows": self.sample_rows, "version": __version__},
            [samples / "images"],
            lambda: start_samples(samples, self.data.test, self.sample_rows, boxes),
        )
        for run in self.runs:
            self._captured[run] = self.journal.stage(
                f"capture {run.name}",
                self._capture_inputs(run),
                [self._store_path(run), samples / run.name],
                lambda run=run: self._capture_run(run),  # type: ignore[misc]
            )

    def control(self) -> None:
        """Needs: checkpoints, test images. Leaves: metrics/controls.json, comparisons whose true answer is zero."""
        path = self.outputs / "metrics" / "controls.json"
        inputs = {
            "checkpoints": {run.name: digest_path(run.checkpoint) for run in self.runs},
            "pretrained": self.data.pretrained_digest,
            "data": self.data.digest,
            "rows": self.control_rows,
            "metrics": self._row_metrics(),
            "version": __version__,
        }

        def work() -> None:
            controls = [control.to_dict() for control in self._controls()]
            _write_json(path, controls)

        self.journal.stage("controls", inputs, [path], work)
        for control in json.loads(path.read_text()):
            if not control["held"]:
                tqdm.write(f"CONTROL DID NOT HOLD: {control['title']}: {control['detail']}")

    def measure(self) -> None:
        """Needs: captures. Leaves: metrics/attention_metrics.zarr, .h5 and .csv, one row a map."""
        config = self.config
        folder = self.outputs / "metrics"
        outputs = [folder / f"attention_metrics{suffix}" for suffix in (".zarr", ".h5", ".csv")]
        inputs = {
            "captures": {run.name: self._captured[run] for run in self.runs},
            "metrics": config.measure.metrics,
            "backend": config.measure.backend,
            "version": __version__,
        }

        def work() -> None:
            stores = {}
            for run in self.runs:
                path = self._store_path(run)
                stores[run.condition, run.seed] = measure_store(path, config.measure.metrics, config.measure.backend)
            invariant = [run.condition for run in self.runs if run.seed_invariant]
            table = build_table(
                stores, config.measure.metrics, seed_invariant=invariant, attributes=self._table_attributes()
            )
            write_table(table, folder)

        self.journal.stage("measure", inputs, outputs, work)

    def compare(self) -> None:
        """Needs: the table, controls. Leaves: metrics/attention_comparison.json."""
        config = self.config.statistics
        folder = self.outputs / "metrics"
        path = folder / "attention_comparison.json"
        inputs = {
            "table": digest_path(folder / "attention_metrics.zarr"),
            "controls": digest_path(folder / "controls.json"),
            "statistics": dataclasses.asdict(config),
            "version": __version__,
        }

        def work() -> None:
            table = read_table(folder / "attention_metrics.zarr")
            tests = []
            if table.sizes["condition"] > 1:
                tests = compare_conditions(
                    table,
                    against=self.against,
                    permutations=config.permutations,
                    bootstrap=config.bootstrap,
                    confidence=config.confidence,
                    seed=config.seed,
                )
            extra = {
                "accuracy": self._accuracy(),
                "controls": json.loads((folder / "controls.json").read_text()),
                "data": self.data.summary(),
                "undefined": json.loads(table.attrs["undefined"]),
                "prefix_mass_warning": prefix_mass_warning(table),
            }
            write_comparison(path, comparison_document(table, tests, extra))

        self.journal.stage("statistics", inputs, [path], work)

    def explain(self) -> None:
        """Needs: checkpoints, test images. Leaves: visualizations/gradcam_samples/ and relevance/."""
        config = self.config.relevance
        rows = self.sample_rows[: config.images]
        if not rows:
            return
        folders = {method: samples_folder(self.outputs, method) for method in config.methods}
        inputs = {
            "checkpoints": {run.name: digest_path(run.checkpoint) for run in self.runs},
            "data": self.data.digest,
            "rows": rows,
            "methods": config.methods,
            "seed": self.config.data.seed,
            "version": __version__,
        }

        def work() -> None:
            targets: dict[str, np.ndarray] = {}
            classes = len(self.data.test.class_names)
            if self._labels_are_classes() and classes > 1:
                labels = np.asarray(self.data.test.labels)[rows]
                targets = {"true": labels, "other": choose_targets(labels, classes, self.config.data.seed)}
            for method, folder in folders.items():
                explained = []
                for run in self._first_runs().values():
                    explained += explain_samples(
                        self._model(run), run.condition, self.data.test, rows, targets, method, device=self.device
                    )
                write_samples(folder, method, self.data.test, explained)

        self.journal.stage("relevance", inputs, list(folders.values()), work)

    def report(self) -> None:
        """Needs: every file above. Leaves: visualizations/figures/, summary.md, report.html."""
        tqdm.write("report")
        write_report(self.outputs)
        tqdm.write(f"open {self.outputs / 'report.html'}; the same in words: {self.outputs / 'summary.md'}")

    # ------------------------------------------------------------------------------------------- what they share

    @cached_property
    def data(self) -> StudyData:
        """The images in their splits, prepared once."""
        return prepare_data(self.config, self.outputs, self.journal, device=self.device)

    @cached_property
    def sample_rows(self) -> list[int]:
        """Rows of the test split whose whole maps are kept."""
        return choose_samples(self.config.capture.samples, len(self.data.test), self.config.data.seed)

    @cached_property
    def control_rows(self) -> list[int]:
        """Rows of the test split that the controls look at."""
        return choose_samples(CONTROL_IMAGES, len(self.data.test), self.config.data.seed)

    @property
    def against(self) -> str:
        """The condition that the others are compared with: `baseline`, or else the first one named."""
        names = list(self.config.conditions)
        return "baseline" if "baseline" in names else names[0]

    def opened(self) -> _OpenedFolder:
        """Makes the outputs folder this process's own for the length of a `with` block."""
        return _OpenedFolder(self.outputs, study_toml(self.config))

    def _store_path(self, run: Run) -> Path:
        return self.outputs / "captures" / f"{run.name}.zarr"

    def _model(self, run: Run) -> torch.nn.Module:
        model = load_checkpoint(self.config.model.name, run.checkpoint, self.config.model.img_size)
        return model.to(self.device).eval()

    def _first_runs(self) -> dict[str, Run]:
        """Each condition's first run, in the order of the configuration."""
        first: dict[str, Run] = {}
        for run in self.runs:
            first.setdefault(run.condition, run)
        return first

    def _row_metrics(self) -> list[str]:
        return [name for name in self.config.measure.metrics if load_metric(name).inputs == "rows"]

    def _capture_inputs(self, run: Run) -> dict[str, Any]:
        return {
            "checkpoint": digest_path(run.checkpoint),
            "data": self.data.digest,
            "preprocessing": self.data.preprocessing.to_dict(),
            "capture": dataclasses.asdict(self.config.capture),
            "metrics": self.config.measure.metrics if "metrics" in self.config.capture.sinks else [],
            "backend": self.config.measure.backend,
            "img_size": self.config.model.img_size,
            "samples": self.sample_rows,
            "device": self.device,
            "version": __version__,
        }

    def _capture_run(self, run: Run) -> dict[str, Any]:
        config = self.config
        model = self._model(run)
        store = capture_to_store(
            model,
            self.data.test,
            self._store_path(run),
            capture_settings(config, self.device),
            model_info=model_info(config.model.name, run.checkpoint),
            dataset_info=self.data.info("test"),
            preprocessing=self.data.preprocessing.to_dict(),
            manifest=manifest_dict(self.data.splits.manifest),
            label=f"capture {run.name}",
            replace=True,
        )
        samples = self.outputs / "samples.zarr"
        add_sample_maps(samples, run.name, model, self.data.test, self.sample_rows, device=self.device)
        return {"images": len(store.image_ids), "layers": len(store.layers)}

    def _controls(self) -> list[Control]:
        """The frozen backbone, a condition against itself, and a hybrid of two conditions."""
        rows = self.control_rows
        first_of = self._first_runs()
        against = first_of[self.against]

        def pair(first: torch.nn.Module, second: torch.nn.Module, label: str) -> Any:
            return lockstep(
                first,
                second,
                self.data.test,
                rows,
                metrics=self._row_metrics(),
                batch_size=self.config.capture.batch_size,
                device=self.device,
                label=f"control: {label}",
            )

        controls = []
        for run in first_of.values():
            if run.recipe == "probe":
                layers = pair(self.data.pretrained_model().to(self.device), self._model(run), f"{run.condition} frozen")
                controls.append(
                    same_attention_control(
                        f"frozen_{run.condition}",
                        f"{run.condition}'s backbone is the pretrained one",
                        "a frozen backbone attends exactly as the pretrained model, bit for bit",
                        layers,
                        len(rows),
                    )
                )
        for run in first_of.values():
            if run == against and len(first_of) > 1:
                continue
            layers = pair(self._model(run), self._model(run), f"{run.condition} against itself")
            controls.append(
                same_attention_control(
                    f"itself_{run.condition}",
                    f"{run.condition} against itself",
                    "loaded twice, measured twice: exactly 0 in every layer",
                    layers,
                    len(rows),
                )
            )
            if run == against:
                continue
            lower, upper = self._model(against), self._model(run)
            blocks = len(getattr(lower, "blocks", ()))
            if blocks < 2:
                tqdm.write(f"hybrid control left out: {self.config.model.name} has no row of blocks to divide")
                continue
            middle = blocks // 2
            states = lower.state_dict(), upper.state_dict()
            changed = [key for key in states[0] if states[0][key].shape == states[1][key].shape]
            differs = any(
                not torch.equal(states[0][key], states[1][key])
                for key in changed
                if key.startswith(tuple(f"blocks.{block}." for block in range(middle, blocks)))
            )
            upper.load_state_dict(hybrid_state(*states, middle))
            layers = pair(lower, upper, f"hybrid with {run.condition}")
            controls.append(
                hybrid_control(run.condition, against.condition, layers, middle, len(rows), differs=differs)
            )
        return controls

    def _table_attributes(self) -> dict[str, Any]:
        return {
            "model": {"name": self.config.model.name, "img_size": self.config.model.img_size},
            "dataset": self.data.info("test"),
            "precision": "float32",
            "preprocessing": self.data.preprocessing.to_dict(),
            "versions": versions(),
            "code_version": __version__,
        }

    def _labels_are_classes(self) -> bool:
        """Whether the models' outputs are the data set's classes, so that a label can be looked up in the logits."""
        return all(
            AttentionStore.open(self._store_path(run)).schema.num_classes == len(self.data.test.class_names)
            for run in self.runs
        )

    def _accuracy(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """condition → seed → {validation, test, chance}; nothing where labels are not the models' classes."""
        if not self._labels_are_classes():
            return {}
        accuracy: dict[str, dict[str, dict[str, float | None]]] = {}
        for run in self.runs:
            store = AttentionStore.open(self._store_path(run))
            correct = store.read_logits().argmax(axis=1) == store.labels
            accuracy.setdefault(run.condition, {})[str(run.seed)] = {
                "validation": run.validation_accuracy,
                "test": float(correct.mean()),
                "chance": 1.0 / len(store.class_names),
            }
        return accuracy


def capture_folder(config: StudyConfig) -> AttentionStore:
    """One model's attention on a folder of images, into the store `capture.store`; see `capture_to_store`."""
    path = Path(config.capture.store)
    device = resolve_device(config.device)
    if config.model.weights:
        model = load_checkpoint(config.model.name, config.model.weights, config.model.img_size)
    else:
        model = build_model(
            config.model.name, num_classes=1000, pretrained=config.model.pretrained, img_size=config.model.img_size
        )
    preprocessing = preprocessing_of(model)
    splits = prepare_folder(
        config.data.root, preprocessing=preprocessing, split=config.data.split, seed=config.data.seed
    )
    manifest = splits.manifest
    if manifest.dropped:
        reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
        tqdm.write(f"left out: {reasons}")
    store = capture_to_store(
        model.to(device).eval(),
        splits.test,
        path,
        capture_settings(config, device),
        model_info=model_info(config.model.name, Path(config.model.weights) if config.model.weights else None),
        dataset_info={"id": manifest.kind, "split": f"{config.data.split}/test", "sha256": manifest.sha256},
        preprocessing=preprocessing.to_dict(),
        manifest=manifest_dict(manifest),
        label=f"capture {path.name}",
    )
    samples = path.with_name("samples.zarr")
    rows = choose_samples(config.capture.samples, len(splits.test), config.data.seed)
    start_samples(samples, splits.test, rows, None)
    add_sample_maps(samples, path.name.removesuffix(".zarr"), model, splits.test, rows, device=device)
    return store


def capture_settings(config: StudyConfig, device: str) -> Capture:
    """The capture that a configuration asks for."""
    return Capture(
        sinks=config.capture.sinks,
        metrics=config.measure.metrics,
        encoding=config.capture.encoding,
        batch_size=config.capture.batch_size,
        layers=config.capture.layers,
        backend=config.measure.backend,
        device=device,
    )


def manifest_dict(manifest: Manifest) -> dict[str, Any]:
    """Every file with its status, as plain values; without the folder's own place on this machine."""
    return {"kind": manifest.kind, "records": [dataclasses.asdict(record) for record in manifest.records]}


class _OpenedFolder:
    """The outputs folder, made, written to and locked; a second process is told to wait."""

    def __init__(self, outputs: Path, study: str) -> None:
        self._outputs = outputs
        self._study = study
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
        write_atomically(self._outputs / "study.toml", self._study.encode())

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()


def resolve_device(device: str) -> str:
    """ "auto" is cuda where there is one.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch finds no CUDA device here; use --device cpu or auto")
    return device


def model_info(name: str, weights: Path | None) -> dict[str, Any]:
    """Provenance of a model: its name, the hash of its weights' file, and the versions that ran it."""
    return {"name": name, "weights_sha256": digest_path(weights) if weights is not None else "", **versions()}


def prefix_mass_warning(table: xarray.Dataset) -> str:
    """A sentence on the layers whose patches get almost nothing, or "" when there are none."""
    if "prefix_mass" not in table:
        return ""
    means = table["prefix_mass"].mean(["seed", "image", "head"])
    high = means.where(means > PREFIX_MASS_WARNING, drop=True)
    layers = ", ".join(
        f"layer {int(layer)} of {condition.item()} ({float(high.sel(condition=condition, layer=layer)):.2f})"
        for condition in high["condition"]
        for layer in high["layer"].values
        if np.isfinite(high.sel(condition=condition, layer=layer))
    )
    if not layers:
        return ""
    return (
        f"Prefix tokens take more than {PREFIX_MASS_WARNING} of the attention in {layers}: there the metrics describe "
        "how the small remainder is spread over the patches."
    )


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())
