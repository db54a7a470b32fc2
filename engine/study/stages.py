"""The study in order: check → images → conditions → capture → store → table → statistics → report.

Each stage is one call, says what it needs and what it leaves, and is skipped when its inputs, by content hash, are
those of the last time and its outputs are as it left them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import __version__
from engine.capture import (
    SampleMaps,
    capture_to_store,
    choose_samples,
    definitions,
)
from engine.config import StudyConfig, study_toml
from engine.measure import build_table, measure_store, prefix_mass_warning, read_table, write_table
from engine.progress import reason_of, say
from engine.relevance import PredictionLink, choose_classes, explain_study, prediction_link, samples_folder
from engine.report import write_report
from engine.statistics import Settings, analyse, write_comparison
from engine.study.check import check_study, one_torch_thread
from engine.study.controls import Contender, Control, negative_controls
from engine.study.data import Start, StudyData, check_class_files, prepare_data
from engine.study.journal import Journal, digest_path
from engine.study.model import checkpoint_of, model_info, model_source, with_present_name
from engine.study.one_capture import capture_settings, manifest_dict
from engine.study.outputs import OutputsFolder, resolve_device
from engine.study.training import Run, train_runs
from kernels import load_metric
from store import AttentionStore
from train.models import build_model
from train.parallel import Workers, joined
from train.processes import first_process
from train.training import versions
from train.whole_files import write_json

STAGES = ("train", "capture", "controls", "measure", "statistics", "relevance", "report")

# What all processes of torchrun do together; the first one does the rest alone.
SHARED_STAGES = ("train", "capture")

# What the report can do without: where one of these fails, the others go on, and the report says what it lacks.
SEPARATE_STAGES = ("controls", "relevance")

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
        Exception: what a stage ended in; of `SEPARATE_STAGES` the first, after the other stages.
    """
    # What is mistaken is found before anything is trained.
    check_class_files(config)
    study = Study(config)
    stages = STAGES[: STAGES.index(last) + 1]
    with study.opened() as folder:
        with joined(study.device):
            study.check(stages)
            if folder is not None:
                folder.begin()
            for stage in stages:
                if stage in SHARED_STAGES:
                    getattr(study, stage)()
        errors = []
        for stage in stages if first_process() else ():
            if stage in SEPARATE_STAGES:
                errors += study.attempt(stage)
            elif stage not in SHARED_STAGES:
                getattr(study, stage)()
        if errors:
            if "report" in stages:
                errors[0].add_note(f"the report, without what failed: {study.outputs / 'report.html'}")
            raise errors[0]
    return study.outputs


class Study:
    """One outputs folder and the configuration that fills it.

    Attributes:
        outputs: the folder.
        start: what it starts from, known after `check`.
        runs: every trained model, known after `train`.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = with_present_name(config)
        self.outputs = Path(config.outputs)
        self.device = resolve_device(config.device)
        self.journal = Journal(self.outputs / "run.jsonl")
        self.start: Start
        self.runs: list[Run] = []
        self._captured: dict[Run, str] = {}

    def attempt(self, stage: str) -> list[Exception]:
        """Run a stage that the others can do without; what it ended in, if it failed, for the caller to raise."""
        try:
            getattr(self, stage)()
        except BrokenPipeError:  # the reader of what is said has left, which is no fault of the stage
            raise
        except Exception as error:
            reason = reason_of(error)
            self.journal.fail(stage, reason)
            say(f"{stage} failed and is left out: {reason}")
            return [error]
        return []

    # ------------------------------------------------------------------------------------------------ the stages

    def check(self, stages: Sequence[str]) -> None:
        """Needs: models or checkpoints, the data set's files. Leaves: nothing; says what cannot be had, of `stages`."""
        config = self.config
        with one_torch_thread():
            self.start = Start(config, self.outputs, self.journal)
            model = self.start.take_model()
            given = [checkpoint_of(config, name) for name, of in config.conditions.items() if of.recipe == "checkpoint"]
            files = [file for source in given or [model_source(config)] for file in source.files]
            inputs = {
                "study": dataclasses.asdict(config),
                "stages": stages,
                "weights": [digest_path(file) for file in files],
                "data": self.start.data_inputs if self.start.listed is not None else {},
                "definitions": definitions(config.measure.metrics),
                "device": self.device,
                "version": __version__,
            }
            self.journal.stage("check", inputs, [], lambda: check_study(self.start, model, self.device, stages))

    def train(self) -> None:
        """Needs: images. Leaves: checkpoints/<condition>_seed<k>.safetensors, metrics/training.json."""
        self.runs = train_runs(self.config, self.data, self.journal, self.outputs, device=self.device)

    def capture(self) -> None:
        """Needs: checkpoints, test images. Leaves: captures/<condition>_seed<k>.zarr, samples.zarr if any are kept."""
        samples = self.outputs / "samples.zarr"

        def begin_samples() -> None:
            SampleMaps.create(samples, self.data.test, self.sample_rows)

        if self.sample_rows:
            self.journal.stage(
                "samples",
                {"data": self.data.digest, "rows": self.sample_rows, "version": __version__},
                [samples / "zarr.json", samples / "images"],
                begin_samples,
            )
        for run in self.runs:
            self._captured[run] = self.journal.stage(
                f"capture {run.name}",
                self._capture_inputs(run),
                [self._store_path(run), *([samples / run.name] if self.sample_rows else [])],
                lambda run=run: self._capture_run(run),  # type: ignore[misc]
                reads=[run.checkpoint],
                shared=True,
            )

    def controls(self) -> None:
        """Needs: checkpoints, test images. Leaves: metrics/controls.json, comparisons whose true answer is zero."""
        path = self.outputs / "metrics" / "controls.json"
        inputs = {
            "checkpoints": {run.name: run.digest for run in self.runs},
            "pretrained": self.data.pretrained_digest,
            "data": self.data.digest,
            "rows": self.control_rows,
            "against": self.against,
            "metrics": self._row_metrics(),
            "batch_size": self.config.capture.batch_size,
            "device": self.device,
            "version": __version__,
        }

        def work() -> None:
            controls = [control.to_dict() for control in self._controls()]
            write_json(path, controls)

        self.journal.stage("controls", inputs, [path], work, reads=[run.checkpoint for run in self.runs])
        for control in json.loads(path.read_bytes()):
            if not control["held"]:
                say(f"CONTROL DID NOT HOLD: {control['title']}: {control['detail']}")

    def measure(self) -> None:
        """Needs: captures. Leaves: metrics/attention_metrics.zarr, .h5 and .csv, one row a map."""
        config = self.config
        folder = self.outputs / "metrics"
        outputs = [folder / f"attention_metrics{suffix}" for suffix in (".zarr", ".h5", ".csv")]
        inputs = {
            "captures": {run.name: self._captured[run] for run in self.runs},
            "metrics": config.measure.metrics,
            "definitions": definitions(config.measure.metrics),
            "backend": config.measure.backend,
            "version": __version__,
        }

        def work() -> None:
            stores = {}
            for run in self.runs:
                store = stores[run.condition, run.seed] = AttentionStore.open(self._store_path(run))
                measure_store(store, config.measure.metrics, config.measure.backend, scheduler=config.measure.scheduler)
            invariant = [run.condition for run in self.runs if run.seed_invariant]
            table = build_table(
                stores, config.measure.metrics, seed_invariant=invariant, attributes=self._table_attributes()
            )
            write_table(table, folder)

        self.journal.stage("measure", inputs, outputs, work, reads=[self._store_path(run) for run in self.runs])

    def statistics(self) -> None:
        """Needs: the table, controls. Leaves: metrics/attention_comparison.json."""
        config = self.config.statistics
        folder = self.outputs / "metrics"
        path = folder / "attention_comparison.json"
        table_path, controls_path = folder / "attention_metrics.zarr", folder / "controls.json"
        controlled = self.journal.usable(controls_path)
        inputs = {
            "table": digest_path(table_path),
            "controls": digest_path(controls_path) if controlled else "",
            "statistics": dataclasses.asdict(config),
            "classifiers": self._classifiers(),
            "version": __version__,
        }

        def work() -> None:
            table = read_table(table_path)
            comparison = dataclasses.replace(
                analyse(table, self._statistics_settings()),
                accuracy=self._accuracy(),
                classifiers=self._classifiers(),
                controls=tuple(json.loads(controls_path.read_bytes())) if controlled else (),
                data=self.data.summary(),
                undefined=json.loads(table.attrs["undefined"]),
                prefix_mass_warning=prefix_mass_warning(table),
            )
            write_comparison(path, comparison)

        self.journal.stage("statistics", inputs, [path], work, reads=[table_path, controls_path])

    def relevance(self) -> None:
        """Needs: checkpoints, captures, the table, test images. Leaves: metrics/relevance.json and .csv, pictures.

        The pictures are visualizations/gradcam_samples/ and visualizations/relevance/<method>/.
        """
        config = self.config.relevance
        folder = self.outputs / "metrics"
        heads = {name: self.data.head(name) for name in self.config.conditions}
        choice = choose_classes(heads, self.data.test, self.against)
        drawn = [row for row in self.sample_rows if row in choice.rows][: config.images]
        chosen = choose_samples(config.measured, len(choice.rows), self.config.data.seed)
        measured = [choice.rows[position] for position in chosen]
        settings = self._statistics_settings()
        inputs = {
            "checkpoints": {run.name: run.digest for run in self.runs},
            "captures": {run.name: self._captured[run] for run in self.runs},
            "table": digest_path(folder / "attention_metrics.zarr"),
            "data": self.data.digest,
            "rows": [drawn, measured],
            "relevance": dataclasses.asdict(config),
            "settings": {name: getattr(settings, name) for name in ("permutations", "bootstrap", "confidence", "seed")},
            "against": self.against,
            "classifiers": self._classifiers(),
            "seed": self.config.data.seed,
            "version": __version__,
        }
        left = [folder / "relevance.json", folder / "relevance.csv"]
        left += [samples_folder(self.outputs, method) for method in config.methods]

        def work() -> None:
            explain_study(
                self.outputs,
                {name: partial(self._model, run) for name, run in self._first_runs().items()},
                self.data.test,
                drawn,
                measured,
                config,
                heads=heads,
                choice=choice,
                settings=settings,
                link=self._prediction_link(),
                seed=self.config.data.seed,
                device=self.device,
            )

        reads = [folder / "attention_metrics.zarr", *(run.checkpoint for run in self.runs)]
        self.journal.stage("relevance", inputs, left, work, reads=reads)

    def report(self) -> None:
        """Needs: every file above. Leaves: visualizations/figures/, summary.md, report.html."""
        outputs = self.outputs
        inputs = {
            "metrics": digest_path(outputs / "metrics"),
            "samples": digest_path(outputs / "samples.zarr"),
            "gradcam": digest_path(samples_folder(outputs, "gradcam")),
            "relevance": digest_path(outputs / "visualizations" / "relevance"),
            "study": digest_path(outputs / "study.toml"),
            "failed": self.journal.failed(),
            "version": __version__,
        }
        page, summary = outputs / "report.html", outputs / "summary.md"
        left = [page, summary, outputs / "visualizations" / "figures"]

        def work() -> None:
            write_report(outputs, self.journal)

        self.journal.stage("report", inputs, left, work)
        say(f"open {page}; the same in words: {summary}")

    # ------------------------------------------------------------------------------------------- what they share

    @cached_property
    def data(self) -> StudyData:
        """The images in their splits, prepared once."""
        return prepare_data(self.start, device=self.device)

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

    def opened(self) -> AbstractContextManager[OutputsFolder | None]:
        """Makes the outputs folder this run's own for the length of a `with` block; the first process holds it."""
        toml = study_toml(self.config)
        return OutputsFolder(self.outputs, toml, self.journal) if first_process() else nullcontext()

    def _store_path(self, run: Run) -> Path:
        return self.outputs / "captures" / f"{run.name}.zarr"

    def _model(self, run: Run) -> torch.nn.Module:
        return build_model(run.model, num_classes=None).to(self.device).eval()

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
            "checkpoint": run.digest,
            "data": self.data.digest,
            "preprocessing": self.data.preprocessing.to_dict(),
            "capture": dataclasses.asdict(self.config.capture),
            "metrics": self.config.measure.metrics if "metrics" in self.config.capture.sinks else [],
            "definitions": definitions(self.config.measure.metrics) if "metrics" in self.config.capture.sinks else {},
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
            model_info=model_info(run.model),
            dataset_info=self.data.info("test"),
            preprocessing=self.data.preprocessing.to_dict(),
            manifest=manifest_dict(self.data.splits.manifest),
            label=f"capture {run.name}",
            replace=True,
            workers=Workers.current(),
        )
        samples = self.outputs / "samples.zarr"
        if self.sample_rows and Workers.current().first:
            kept = SampleMaps.open(samples)
            kept.add(run.name, model, self.data.test, self.sample_rows, device=self.device)
        return {"images": len(store.image_ids), "layers": len(store.layers)}

    def _controls(self) -> list[Control]:
        """The frozen backbone, a condition against itself, and a hybrid of two conditions."""
        first = self._first_runs()
        return negative_controls(
            {name: Contender(partial(self._model, run), frozen=run.seed_invariant) for name, run in first.items()},
            self.against,
            lambda: self.data.pretrained_model().to(self.device),
            self.data.test,
            self.control_rows,
            metrics=self._row_metrics(),
            batch_size=self.config.capture.batch_size,
            device=self.device,
        )

    def _table_attributes(self) -> dict[str, Any]:
        model = self.config.model
        arguments = {"arguments": model.arguments} if model.arguments else {}
        return {
            "model": {"name": model.name, "img_size": model.img_size, **arguments},
            "dataset": self.data.info("test"),
            "preprocessing": self.data.preprocessing.to_dict(),
            "versions": versions(),
            "code_version": __version__,
        }

    def _outputs_of_labels(self, condition: str) -> np.ndarray:
        """The output of a condition's head that stands for each test image's class, [image]; −1 where there is none."""
        return self.data.head(condition).outputs_of(self.data.test.labels, self.data.test.class_names)

    def _classifiers(self) -> dict[str, dict[str, Any]]:
        """condition → what its outputs stand for, and what a reader must know of it."""
        classifiers = {}
        for condition in self.config.conditions:
            head = self.data.head(condition)
            of_labels = self._outputs_of_labels(condition)
            said = head.origin(condition), head.consequences(len(of_labels), int((of_labels < 0).sum()))
            classifiers[condition] = {
                "outputs": head.outputs,
                "classes": list(head.names) if head.known else None,
                "note": " ".join(filter(None, said)),
            }
        return classifiers

    def _statistics_settings(self) -> Settings:
        return Settings(against=self.against, **dataclasses.asdict(self.config.statistics))

    def _prediction_link(self) -> list[PredictionLink]:
        """Do heads' changes go with changes of the prediction? Of the conditions whose classes are known."""
        logits: dict[str, list[np.ndarray]] = {}
        for run in self.runs:
            if self.data.head(run.condition).known:
                logits.setdefault(run.condition, []).append(AttentionStore.open(self._store_path(run)).read_logits())
        return prediction_link(
            read_table(self.outputs / "metrics" / "attention_metrics.zarr"),
            {condition: np.mean(of_runs, axis=0) for condition, of_runs in logits.items()},
            {condition: self._outputs_of_labels(condition) for condition in logits},
            against=self.against,
            permutations=self.config.statistics.permutations,
            seed=self.config.statistics.seed,
        )

    def _accuracy(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """condition → seed → {validation, test, chance, images}, over the images whose class the head has."""
        accuracy: dict[str, dict[str, dict[str, float | None]]] = {}
        for run in self.runs:
            expected = self._outputs_of_labels(run.condition)
            rows = np.flatnonzero(expected >= 0)
            if not len(rows):
                continue
            predicted = AttentionStore.open(self._store_path(run)).read_logits().argmax(axis=1)
            accuracy.setdefault(run.condition, {})[str(run.seed)] = {
                "validation": run.validation_accuracy,
                "test": float((predicted[rows] == expected[rows]).mean()),
                "chance": 1.0 / self.data.head(run.condition).outputs,
                "images": len(rows),
            }
        return accuracy
