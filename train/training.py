"""From a model to a checkpoint: what every recipe does, and the conditions of a study."""

from __future__ import annotations

import dataclasses
import logging
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional

from train.checkpoint import read_checkpoint, read_metadata, save_checkpoint, sidecar_path, state_digest, write_history
from train.choices import Compression, Init
from train.compiled import require_compiler, resolve_compile
from train.data import DataSplits
from train.digits_vit import TRAINING_THREADS
from train.errors import DamagedFileError, InputError, require_known
from train.evaluation import Evaluation, evaluate
from train.loop import Objective, epoch_order, fit
from train.model_source import ModelSource, source_of
from train.models import build_model, classifier_name, seeded
from train.parallel import SINGLE, Workers
from train.precision import resolve_precision, training_mode
from train.probe import fit_probe
from train.recipes import RECIPES
from train.settings import TrainingRun
from train.state import StateFile, settings_key
from train.transfer import uploaded

logger = logging.getLogger(__name__)

# Enters every key: a change of what training computes makes older results another thing.
_VERSION = 2

OnEpoch = Callable[[Sequence[Mapping[str, Any]]], None]


@dataclass(frozen=True)
class Trained:
    """What a recipe came to: a plain timm model, a dict per epoch or penalty, more for the sidecar."""

    model: nn.Module
    history: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a recipe is given to train a model with."""

    run: TrainingRun  # its precision decided
    data: DataSplits
    device: torch.device  # where the model is
    state_file: StateFile
    label: str  # in progress bars and messages
    backbone: str = ""  # digest of all weights but the classifier's
    probe: Path | None = None  # a finished probe of the same backbone and data, whose head is taken; None: fit one
    history_of: Path | None = None  # the checkpoint beside which the history is written; None: it is not
    on_epoch: OnEpoch | None = None  # gets the history so far after each epoch
    workers: Workers = SINGLE

    def fit_head(self, model: nn.Module) -> list[dict[str, Any]]:
        """Fit the classifier to the frozen backbone; its history."""
        smoothing = self.run.shared.label_smoothing
        return fit_probe(model, self.data.train, self.data.validation, label_smoothing=smoothing, device=self.device)

    def begin_with_head(self, model: nn.Module) -> None:
        """Give the model the probe's classifier, fitted or taken, unless it begins with its own."""
        if self.run.own_head:
            return
        if self.probe is None:
            self.fit_head(model)
            return
        probe = read_checkpoint(self.probe)
        if not probe.metadata.get("seed_invariant") or probe.metadata.get("backbone") != self.backbone:
            raise InputError(f"checkpoint {self.probe} is not a probe of the same backbone; expected one, or none")
        if probe.metadata["dataset"]["sha256"] != self.data.manifest.sha256:
            raise InputError(
                f"checkpoint {self.probe} is a probe of other images, splits or classes than the run's; expected one "
                "of these"
            )
        prefix = classifier_name(model) + "."
        with torch.no_grad():
            for name, parameter in model.get_submodule(classifier_name(model)).named_parameters():
                parameter.copy_(probe.tensors[prefix + name])

    def first_batches(self, count: int) -> list[torch.Tensor]:
        """The first batches of training images, float32 [image, channel, row, col] each, on the device."""
        size = self.run.shared.batch_size
        order = epoch_order(self.run.seed, 0, len(self.data.train))[: count * size]
        return [self.data.train.batch(part).to(self.device) for part in np.array_split(order, -(-len(order) // size))]

    def fit(self, module: nn.Module, groups: Any, objective: Objective | None = None) -> Trained:
        """Train the parameters of AdamW's `groups` to the best epoch; by default on the classes of the images."""
        # The rate of every step is set by the loop. β₂ .98: runs of a few hundred steps have no time for .999.
        optimizer = torch.optim.AdamW(groups, lr=self.run.condition.lr, betas=(0.9, 0.98), fused=True)
        history = fit(
            module,
            optimizer,
            objective or _Classification(module, self),
            train=self.data.train,
            run=self.run,
            state_file=self.state_file,
            device=self.device,
            on_epoch=self._epoch_ended,
            workers=self.workers,
            label=self.label,
        )
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        return Trained(module, history, {"trainable_parameters": count, "merge_difference": None})

    def _epoch_ended(self, history: Sequence[Mapping[str, Any]]) -> None:
        if self.workers.first and self.history_of is not None:
            write_history(self.history_of, history)
        if self.workers.first and self.on_epoch is not None:
            self.on_epoch(history)


class _Classification:
    """Cross-entropy with label smoothing, of the class of each image."""

    def __init__(self, module: nn.Module, task: Task) -> None:
        self.module, self.task = module, task
        self.labels = torch.from_numpy(task.data.train.labels).to(task.device)

    def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.module(images)
        target = self.labels[uploaded(torch.from_numpy(indices), self.task.device)]
        smoothing = self.task.run.shared.label_smoothing
        return functional.cross_entropy(logits.float(), target, label_smoothing=smoothing), logits

    def validate(self) -> Evaluation:
        shared = self.task.run.shared
        return evaluate(
            self.module,
            self.task.data.validation,
            self.task.device,
            precision=shared.precision,
            label_smoothing=shared.label_smoothing,
            workers=self.task.workers,
        )


def train_to_file(
    path: Path,
    key: str,
    train: Callable[[nn.Module, Task], Trained],
    model: nn.Module,
    task: Task,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Train a model on the task's device, look at it, save it with `facts`, remove the run's state; the sidecar."""
    model.to(task.device)
    shared, threads = task.run.shared, TRAINING_THREADS.get(facts["model"], 0)
    with training_mode(
        model, task.device, precision=shared.precision, deterministic=shared.deterministic, threads=threads
    ):
        trained = train(model, task)
        trained.model.eval()
        validation, test = (
            evaluate(trained.model, images, task.device, workers=task.workers)
            for images in (task.data.validation, task.data.test)
        )
    if task.workers.first:
        results = {
            "validation_accuracy": validation.accuracy,
            "test_accuracy": test.accuracy,
            "history": trained.history,
            "versions": versions(),
            "key": key,
        }
        save_checkpoint(path, trained.model.state_dict(), {**facts, **trained.facts, **results})
        task.state_file.remove()
    task.workers.wait()
    return read_metadata(path)


def backbone_digest(model: nn.Module) -> str:
    """sha256 of every tensor but the classifier's."""
    prefix = classifier_name(model) + "."
    return state_digest({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)})


def versions() -> dict[str, str]:
    """Of what decides the weights' bits."""
    return {"torch": torch.__version__, "timm": timm.__version__}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run came to."""

    checkpoint: Path  # the saved weights, a plain timm model (adapters merged)
    sha256: str  # of that file
    validation_accuracy: float  # of the saved model in float32
    test_accuracy: float  # looked at once
    history: list[dict[str, Any]]  # one dict per epoch; for the probe one per penalty
    reused: bool  # nothing was trained, the checkpoint was there
    trainable_parameters: int = 0
    merge_difference: float | None = None  # largest logit difference that merging made; None without adapters
    seed_invariant: bool = False  # no seed can change it

    @classmethod
    def of_sidecar(cls, checkpoint: Path, metadata: dict[str, Any], *, reused: bool) -> TrainResult:
        """As the sidecar of a checkpoint has it."""
        names = {known.name for known in dataclasses.fields(cls)} & metadata.keys()
        return cls(checkpoint=checkpoint, reused=reused, **{name: metadata[name] for name in names})


def train_condition(
    run: TrainingRun,
    *,
    model: ModelSource | str,
    data: DataSplits,
    checkpoint: str | Path,
    probe_checkpoint: str | Path | None = None,
    device: str = "cpu",
    on_epoch: OnEpoch | None = None,
    name: str = "",
    workers: Workers = SINGLE,
) -> TrainResult:
    """Train one condition from the pretrained backbone to a checkpoint.

    All recipes read out as the model does (a ViT with a class token: from that token) through one linear
    classifier, and all but the probe start from the probe's. A finished checkpoint of the same inputs is
    taken as it is; an interrupted run goes on from its training state, and a Ctrl-C leaves that state.

    Args:
        run: the recipe, its numbers and the seed.
        model: the start, as for `train.models.build_model`.
        data: the best epoch is chosen on validation.
        checkpoint: the `.safetensors` file to write; a `.json` sidecar and, while it runs, a
            `.state.safetensors` lie beside it, and `.history.jsonl` with a line per epoch.
        probe_checkpoint: a finished probe of the same backbone and data, so that it is not fitted again.
        on_epoch: gets the history so far after each epoch; what it raises ends the run, which can go on later.
        name: the condition's name in progress bars; the recipe when empty.
        workers: the processes that train together; the first one writes.

    Raises InputError; TrainingDivergedError: NaN or Inf in the loss, with the step; MergeError: merging the adapters
    changed the logits.
    """
    check_run(run, data)
    path, where = Path(checkpoint), torch.device(device)
    recipe = RECIPES[run.condition.recipe]
    assert recipe.train is not None  # as was checked
    run = replace(run, shared=replace(run.shared, precision=resolve_precision(run.shared.precision, where)))
    if run.used_values().get("compile") == "on":
        require_compiler(where)
    source = source_of(model).completed()
    with seeded(run.seed):
        built = build_model(source, num_classes=len(data.class_names))
    steps = run.epochs * math.ceil(len(data.train) / run.shared.batch_size)
    compiled = resolve_compile(run.shared.compile, built, where, steps)
    run = replace(run, shared=replace(run.shared, compile=compiled))
    settings: dict[str, Any] = {
        "recipe": run.condition.recipe,
        "model": source.name,
        "backbone": backbone_digest(built),
        "preprocessing": data.train.preprocessing.to_dict(),
        "hyperparameters": run.used_values(),
    }
    key = settings_key(
        version=_VERSION,
        **settings,
        **({"arguments": dict(source.arguments)} if source.arguments else {}),
        dataset=data.manifest.sha256,
        seed=None if recipe.seed_invariant else run.seed,
        deterministic=run.shared.deterministic,
        device=where.type,
        **({"head": state_digest(built.get_submodule(classifier_name(built)).state_dict())} if run.own_head else {}),
    )
    metadata = finished_metadata(path, key)
    reused = metadata is not None
    if metadata is None:
        task = Task(
            run=run,
            data=data,
            device=where,
            state_file=StateFile(path.with_suffix(".state.safetensors"), key, writes=workers.first),
            label=f"{name or run.condition.recipe} seed {run.seed}",
            backbone=settings["backbone"],
            probe=None if probe_checkpoint is None else Path(probe_checkpoint),
            history_of=path,
            on_epoch=on_epoch,
            workers=workers,
        )
        facts = settings | {
            "arguments": dict(source.arguments),
            "img_size": source.img_size,
            "num_classes": len(data.class_names),
            "class_names": list(data.class_names),
            "seed": run.seed,
            "seed_invariant": recipe.seed_invariant,
            "dataset": {"kind": data.manifest.kind, "sha256": data.manifest.sha256},
        }
        metadata = train_to_file(path, key, recipe.train, built, task, facts)
    if workers.first:
        write_history(path, metadata["history"])
    return TrainResult.of_sidecar(path, metadata, reused=reused)


def check_run(run: TrainingRun, data: DataSplits) -> None:
    """Raise InputError for what cannot be trained: unknown names, a split without images, numbers out of range."""
    name, shared = run.condition.recipe, run.shared
    trained = [known for known, recipe in RECIPES.items() if recipe.train is not None]
    require_known("recipe", name, trained)
    require_known("init", run.condition.init, typing.get_args(Init))
    require_known("compression", run.compression, typing.get_args(Compression))
    if run.compression != "plain" and not RECIPES[name].adapters:
        raise InputError(f"compression {run.compression} is of weights below adapters; recipe {name} has none")
    for split, images in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if not len(images):
            raise InputError(
                f"the {split} split has no images, and training needs all three; use --data.split stratified, or "
                "folders with train, val and test"
            )
    if min(run.epochs, shared.batch_size, shared.accumulate) < 1:
        raise InputError(
            f"epochs {run.epochs}, batch_size {shared.batch_size} and accumulate {shared.accumulate} must each be at "
            "least 1"
        )


def finished_metadata(path: Path, key: str) -> dict[str, Any] | None:
    """The sidecar of an earlier call with the same inputs, if every byte of its checkpoint is as it was saved."""
    if not path.is_file() or not sidecar_path(path).is_file():
        return None
    try:
        metadata = read_metadata(path)
        if metadata.get("key") != key:
            return None
        read_checkpoint(path)
    except DamagedFileError as error:
        logger.warning("%s; training it again", error)
        return None
    return metadata
