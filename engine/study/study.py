"""What the stages of a study share: its configuration, its folder, and what the stages before have found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from engine.capture import choose_samples
from engine.config import JOURNAL, METRICS_TABLE, SAMPLES, StudyConfig, load_metrics, study_toml
from engine.statistics import SCHEMA, Accuracy, Classifier, HeadPairing, PrimaryFamily, Settings
from engine.study.data import StudyData
from engine.study.journal import Journal
from engine.study.model import given_conditions, reference_condition, trained_here, with_present_name
from engine.study.outputs import OutputsFolder, resolve_device
from engine.study.start import Start
from engine.study.training import Run
from store import AttentionStore
from train.models import build_model
from train.processes import first_process

# Controls look at every image of a small test split and at a seeded sample of a large one.
CONTROL_IMAGES = 256


class Study:
    """One outputs folder and the configuration that fills it."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = with_present_name(config)
        self.outputs = Path(config.outputs)
        self.metrics = self.outputs / "metrics"  # tables and results
        self.table = self.outputs / METRICS_TABLE  # one row per map, of all metrics
        self.samples = self.outputs / SAMPLES  # whole maps of a few images
        self.device = resolve_device(config.device)
        self.journal = Journal(self.outputs / JOURNAL)
        self.start: Start  # known after `check`
        self.data: StudyData  # known after `train`
        self.trained: list[Run] = []  # known after `train`
        self.captures: dict[Run, str] = {}  # run -> hash of its capture, known after `capture`

    def opened(self) -> AbstractContextManager[OutputsFolder | None]:
        """Makes the outputs folder this run's own for the length of a `with` block; the first process holds it."""
        toml = study_toml(self.config)
        return OutputsFolder(self.outputs, toml, self.journal) if first_process() else nullcontext()

    def store(self, run: Run) -> Path:
        """The capture of a run."""
        return self.outputs / "captures" / f"{run.name}.zarr"

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
        """The condition that the others are compared with."""
        return reference_condition(self.config)

    @property
    def settings(self) -> Settings:
        """Of the tests and intervals."""
        return Settings(against=self.against, **dataclasses.asdict(self.config.statistics))

    @property
    def primary(self) -> Path:
        """What the study names as its primary family."""
        return self.metrics / "primary.json"

    def name_primary(self) -> None:
        """Record the primary family, and with it the bounds and levels that its tests are read by."""
        settings = self.settings
        measured = [spec.name for spec in load_metrics(self.config.measure.metrics)]
        named = {
            "schema": SCHEMA,
            "metrics": [name for name in settings.primary if name in measured],
            "level": "layer means",
            "against": settings.against,
            "conditions": [name for name in self.config.conditions if name != settings.against],
            "alpha": settings.alpha,
            "equivalence": settings.equivalence,
        }
        self.journal.write(self.primary, (json.dumps(named, indent=1) + "\n").encode())

    def primary_family(self) -> PrimaryFamily:
        """The primary family as it was named, and whether that was before anything was captured."""
        content = self.primary.read_bytes()
        before = self.journal.precedes(self.primary, "capture")
        sha256 = hashlib.sha256(content).hexdigest()
        return PrimaryFamily(metrics=tuple(json.loads(content)["metrics"]), before=before, sha256=sha256)

    @property
    def runs(self) -> list[Run]:
        """Those that are captured: not the later ones of a condition whose attention no seed changes."""
        return [run for run in self.trained if run.captured]

    @property
    def first_runs(self) -> dict[str, Run]:
        """Each condition's first run, in the order of the configuration."""
        first: dict[str, Run] = {}
        for run in self.runs:
            first.setdefault(run.condition, run)
        return first

    def model(self, run: Run) -> torch.nn.Module:
        """A trained model, in evaluation mode on the device."""
        return build_model(run.model, num_classes=None).to(self.device).eval()

    def pretrained_model(self) -> torch.nn.Module:
        """The model that every condition trained here starts from, in evaluation mode on the device."""
        return build_model(trained_here(self.config, self.start.pretrained_path), num_classes=None).to(self.device)

    def logits(self, run: Run) -> np.ndarray:
        """What a model's head says of every test image, [image, output]."""
        return AttentionStore.open(self.store(run)).read_logits()

    def row_metrics(self) -> list[str]:
        """The metrics that are taken of a map alone."""
        names = self.config.measure.metrics
        return [name for name, spec in zip(names, load_metrics(names), strict=True) if spec.inputs == "rows"]

    def outputs_of_labels(self, condition: str) -> np.ndarray:
        """The output of a condition's head that stands for each test image's class, [image]; −1 where there is none."""
        return self.data.head(condition).outputs_of(self.data.test.labels, self.data.test.class_names)

    def classifiers(self) -> dict[str, Classifier]:
        """condition -> what its outputs stand for, and what a reader must know of it."""
        classifiers = {}
        for condition in self.config.conditions:
            head = self.data.head(condition)
            of_labels = self.outputs_of_labels(condition)
            said = head.origin(condition), head.consequences(len(of_labels), int((of_labels < 0).sum()))
            classifiers[condition] = Classifier(
                outputs=head.outputs, classes=head.names if head.known else None, note=" ".join(filter(None, said))
            )
        return classifiers

    def head_pairing(self) -> dict[str, HeadPairing]:
        """Given checkpoint -> whether its heads are those of `against` by their numbers."""
        if not given_conditions(self.config):
            return {}
        layers = AttentionStore.open(self.store(self.runs[0])).schema.layers
        return self.start.head_pairing([layer.site for layer in layers])

    def accuracy(self) -> dict[str, dict[str, Accuracy]]:
        """condition -> seed -> accuracy, over the images whose class the head has.

        Of a run that is not captured: as it was found when it was trained.
        """
        accuracy: dict[str, dict[str, Accuracy]] = {}
        for run in self.trained:
            expected = self.outputs_of_labels(run.condition)
            rows = np.flatnonzero(expected >= 0)
            if not len(rows):
                continue
            test = run.test_accuracy
            if run.captured:
                predicted = self.logits(run).argmax(axis=1)
                test = float((predicted[rows] == expected[rows]).mean())
            assert test is not None, "given checkpoints are captured"
            accuracy.setdefault(run.condition, {})[str(run.seed)] = Accuracy(
                validation=run.validation_accuracy,
                test=test,
                chance=1.0 / self.data.head(run.condition).outputs,
                images=len(rows),
            )
        return accuracy
