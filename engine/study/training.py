"""The study's conditions: what is trained, and where the checkpoints lie."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from engine import __version__
from engine.config import StudyConfig
from engine.study.data import StudyData
from engine.study.journal import Journal, digest_path
from engine.study.model import checkpoint_of, trained_here
from train.augment import Augmentation
from train.checkpoint import read_metadata, sidecar_path
from train.conditions import train_condition
from train.history import history_path, tensorboard_writer
from train.hyperparameters import Hyperparameters
from train.model_source import ModelSource
from train.parallel import Workers


@dataclass(frozen=True)
class Run:
    """One trained model: a condition at a seed.

    Args:
        condition: its name in the configuration.
        seed: of the training run; for a checkpoint that somebody trained, the first of `train.seeds`.
        recipe: how it was trained.
        model: what it is; its weights are the checkpoint.
        seed_invariant: no seed can change its attention, so it is captured once.
        validation_accuracy: of the checkpoint kept; None where nothing was trained.
    """

    condition: str
    seed: int
    recipe: str
    model: ModelSource
    seed_invariant: bool = False
    validation_accuracy: float | None = None

    @property
    def name(self) -> str:
        return f"{self.condition}_seed{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return Path(self.model.adapter or self.model.weights)

    @property
    def digest(self) -> str:
        """Hash of the files, which of the weights in them are meant, and what the model is built with."""
        arguments = json.dumps(self.model.arguments, sort_keys=True) if self.model.arguments else ""
        return " ".join(filter(None, (*map(digest_path, self.model.files), self.model.state, arguments)))


def train_runs(config: StudyConfig, data: StudyData, journal: Journal, outputs: Path, *, device: str) -> list[Run]:
    """Train every condition at every seed, or take the checkpoints that were given.

    Probes come first: the other conditions start from a probe's head, so that all of them begin as the same function.

    Returns:
        The runs in the order of the configuration, seeds inside conditions.
    """
    if all(condition.recipe == "checkpoint" for condition in config.conditions.values()):
        seed = config.train.seeds[0]
        return [
            Run(name, seed, condition.recipe, checkpoint_of(config, name))
            for name, condition in config.conditions.items()
        ]
    probes = [name for name, condition in config.conditions.items() if condition.recipe == "probe"]
    others = [name for name in config.conditions if name not in probes]
    runs: list[Run] = []
    results: dict[str, dict[str, Any]] = {}
    probe: Path | None = None
    for name in [*probes, *others]:
        invariant = name in probes
        for seed in config.train.seeds[:1] if invariant else config.train.seeds:
            path = outputs / "checkpoints" / f"{name}_seed{seed}.safetensors"
            _train_run(config, data, journal, name, seed, path, probe, outputs, device)
            sidecar = read_metadata(path)
            model = trained_here(config, path)
            runs.append(Run(name, seed, sidecar["recipe"], model, invariant, sidecar["validation_accuracy"]))
            kept = ("history", "validation_accuracy", "test_accuracy", "trainable_parameters", "merge_difference")
            entry = results.setdefault(name, {"recipe": sidecar["recipe"], "seed_invariant": invariant, "seeds": {}})
            entry["seeds"][str(seed)] = {key: sidecar[key] for key in kept} | {
                "seconds": journal.seconds(f"train {name} seed {seed}")
            }
            if invariant and probe is None:
                probe = path
    order = list(config.conditions)
    if Workers.current().first:
        document = {name: results[name] for name in order}
        content = json.dumps(document, indent=1, allow_nan=False) + "\n"
        journal.write(outputs / "metrics" / "training.json", content.encode())
    return sorted(runs, key=lambda run: order.index(run.condition))


def shared_hyperparameters(config: StudyConfig) -> Hyperparameters:
    """Those of `[train]`, which all conditions share."""
    shared = config.train
    return Hyperparameters(
        epochs=shared.epochs,
        batch_size=shared.batch_size,
        accumulate=shared.accumulate,
        weight_decay=shared.weight_decay,
        warmup_fraction=shared.warmup_fraction,
        clip_norm=shared.clip_norm,
        ema_decay=shared.ema_decay,
        patience=shared.patience,
        label_smoothing=shared.label_smoothing,
        precision=shared.precision,
        augmentation=Augmentation(
            flip=shared.flip, rotation_degrees=shared.rotation_degrees, color_jitter=shared.color_jitter
        ),
    )


def _train_run(
    config: StudyConfig,
    data: StudyData,
    journal: Journal,
    name: str,
    seed: int,
    path: Path,
    probe: Path | None,
    outputs: Path,
    device: str,
) -> None:
    """One condition at one seed: `path` and its sidecar."""
    condition, shared = config.conditions[name], config.train
    hyperparameters = dataclasses.replace(
        shared_hyperparameters(config),
        epochs=condition.epochs or shared.epochs,
        lr=condition.lr,
        layer_decay=condition.layer_decay,
        rank=condition.rank,
        alpha=condition.alpha,
        targets=condition.targets,
        init=condition.init,
    )
    inputs = {
        "recipe": condition.recipe,
        "seed": seed,
        "hyperparameters": dataclasses.asdict(hyperparameters),
        "pretrained": data.pretrained_digest,
        "data": data.digest,
        "img_size": config.model.img_size,
        "arguments": config.model.arguments,
        "deterministic": shared.deterministic,
        "device": device,
        "version": __version__,
    }

    tensorboard = shared.tensorboard and Workers.current().first

    def work() -> dict[str, Any]:
        result = train_condition(
            recipe=cast(Any, condition.recipe),
            model=trained_here(config, outputs / "checkpoints" / "pretrained.safetensors"),
            data=data.splits,
            checkpoint=path,
            seed=seed,
            hyperparameters=hyperparameters,
            probe_checkpoint=probe,
            device=device,
            deterministic=shared.deterministic,
            on_epoch=tensorboard_writer(outputs / "tensorboard" / path.stem) if tensorboard else None,
            name=name,
        )
        if not Workers.current().first:
            return {}
        merged = (
            ""
            if result.merge_difference is None
            else f", merging moved no logit by more than {result.merge_difference:.1e}"
        )
        tqdm.write(
            f"{name} seed {seed}: validation {result.validation_accuracy:.1%}, test {result.test_accuracy:.1%}{merged}"
        )
        return {"validation_accuracy": result.validation_accuracy, "test_accuracy": result.test_accuracy}

    left = [path, sidecar_path(path), history_path(path)]
    journal.stage(f"train {name} seed {seed}", inputs, left, work, shared=True)
