"""From a model to a checkpoint: what every recipe does, pretraining included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.checkpoint import read_checkpoint, read_metadata, save_checkpoint, state_digest
from train.data import DataSplits
from train.digits_vit import TRAINING_THREADS
from train.errors import InputError
from train.evaluation import Evaluation, evaluate
from train.history import write_history
from train.loop import Objective, epoch_order, fit
from train.models import classifier_name
from train.parallel import SINGLE, Workers
from train.precision import training_mode
from train.probe import fit_probe
from train.settings import TrainingRun
from train.state import StateFile
from train.transfer import uploaded

OnEpoch = Callable[[Sequence[Mapping[str, Any]]], None]


@dataclass(frozen=True)
class Trained:
    """What a recipe came to.

    Args:
        model: a plain timm model (adapters merged).
        history: one dict an epoch; for a probe one a penalty.
        facts: what the sidecar says of it besides.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a recipe is given to train a model with.

    Args:
        run: its precision decided.
        data: the images.
        device: where the model is.
        state_file: of the run, while it lasts.
        label: of the run, in progress bars and messages.
        backbone: digest of all weights but the classifier's.
        probe: a finished probe of the same backbone and data, whose head is taken; None: one is fitted.
        history_of: the checkpoint beside which the history is written; None: it is not.
        on_epoch: gets the history so far after each epoch.
        workers: the processes that train together.
    """

    run: TrainingRun
    data: DataSplits
    device: torch.device
    state_file: StateFile
    label: str
    backbone: str = ""
    probe: Path | None = None
    history_of: Path | None = None
    on_epoch: OnEpoch | None = None
    workers: Workers = SINGLE

    def fit_head(self, model: nn.Module) -> list[dict[str, Any]]:
        """Fit the classifier to the frozen backbone; its history."""
        smoothing = self.run.shared.label_smoothing
        return fit_probe(model, self.data.train, self.data.validation, label_smoothing=smoothing, device=self.device)

    def begin_with_head(self, model: nn.Module) -> None:
        """Give the model the probe's classifier, fitted or taken, unless it begins with its own.

        Raises:
            InputError: a probe of another backbone or of other classes.
        """
        if self.run.own_head:
            return
        if self.probe is None:
            self.fit_head(model)
            return
        probe = read_checkpoint(self.probe)
        if not probe.metadata.get("seed_invariant") or probe.metadata.get("backbone") != self.backbone:
            raise InputError(f"checkpoint {self.probe} is not a probe of the same backbone; expected one, or none")
        if probe.metadata.get("class_names") != list(self.data.class_names):
            raise InputError(
                f"checkpoint {self.probe} is a probe of other classes than the data set's; expected one of these"
            )
        prefix = classifier_name(model) + "."
        with torch.no_grad():
            for name, parameter in head_of(model).named_parameters():
                parameter.copy_(probe.tensors[prefix + name])

    def first_batches(self, count: int) -> list[torch.Tensor]:
        """The first batches of training images, float32 [image, channel, row, col] each, on the device."""
        size = self.run.shared.batch_size
        order = epoch_order(self.run.seed, 0, len(self.data.train))[: count * size]
        return [self.data.train.batch(part).to(self.device) for part in np.array_split(order, -(-len(order) // size))]

    def fit(self, module: nn.Module, groups: Any, objective: Objective | None = None) -> Trained:
        """Train the parameters that have gradients, to the best epoch.

        Args:
            module: all that is trained.
            groups: of AdamW, with `lr_scale` where a rate is not the schedule's.
            objective: None: the classes of the images.
        """
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
    """Train a model on the task's device, look at it, and save it; the state of the run is removed then.

    Args:
        key: hash of all that the result depends on.
        train: of a recipe.
        facts: what is known of the result beforehand, for the sidecar.

    Returns:
        The sidecar.
    """
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
        found = {
            "validation_accuracy": validation.accuracy,
            "test_accuracy": test.accuracy,
            "history": trained.history,
            "versions": versions(),
            "key": key,
        }
        save_checkpoint(path, trained.model.state_dict(), {**facts, **trained.facts, **found})
        task.state_file.remove()
    task.workers.wait()
    return read_metadata(path)


def head_of(model: nn.Module) -> nn.Module:
    """The classifier."""
    return model.get_submodule(classifier_name(model))


def backbone_digest(model: nn.Module) -> str:
    """sha256 of every tensor but the classifier's."""
    prefix = classifier_name(model) + "."
    return state_digest({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)})


def versions() -> dict[str, str]:
    """Of what decides the weights' bits."""
    import timm

    return {"torch": torch.__version__, "timm": timm.__version__}
