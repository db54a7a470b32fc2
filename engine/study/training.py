"""The study's conditions: what is trained, and where the checkpoints lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import __version__
from engine.config import StudyConfig
from engine.progress import say
from engine.study.data import StudyData
from engine.study.journal import Journal, digest_path
from engine.study.model import checkpoint_of, trained_here
from train.checkpoint import history_path, read_metadata, sidecar_path, tensorboard_writer
from train.model_source import ModelSource
from train.parallel import SINGLE, Workers
from train.recipes import RECIPES
from train.settings import TrainingRun
from train.training import train_condition


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


def train_runs(
    config: StudyConfig, data: StudyData, journal: Journal, outputs: Path, *, device: str, workers: Workers = SINGLE
) -> list[Run]:
    """Train every condition at every seed, or take the checkpoints that were given.

    Probes come first: the other conditions start from a probe's head, so that all of them begin as the same function.

    Returns:
        The runs in the order of the configuration, seeds inside conditions.
    """
    recipes = {name: RECIPES[condition.recipe] for name, condition in config.conditions.items()}
    if not any(recipe.train for recipe in recipes.values()):
        seed = config.train.seeds[0]
        return [
            Run(name, seed, condition.recipe, checkpoint_of(config, name))
            for name, condition in config.conditions.items()
        ]
    runs: list[Run] = []
    results: dict[str, dict[str, Any]] = {}
    probe: Path | None = None
    for name in sorted(recipes, key=lambda name: not recipes[name].seed_invariant):
        recipe, invariant = config.conditions[name].recipe, recipes[name].seed_invariant
        for seed in config.train.seeds[:1] if invariant else config.train.seeds:
            path = outputs / "checkpoints" / f"{name}_seed{seed}.safetensors"
            stage = f"train {name} seed {seed}"
            _train_run(config, data, journal, stage, name, seed, path, probe, outputs, device, workers)
            sidecar = read_metadata(path)
            runs.append(Run(name, seed, recipe, trained_here(config, path), invariant, sidecar["validation_accuracy"]))
            kept = ("history", "validation_accuracy", "test_accuracy", "trainable_parameters", "merge_difference")
            entry = results.setdefault(name, {"recipe": recipe, "seed_invariant": invariant, "seeds": {}})
            entry["seeds"][str(seed)] = {key: sidecar[key] for key in kept} | {"seconds": journal.seconds(stage)}
            if invariant and probe is None:
                probe = path
    order = list(config.conditions)
    if workers.first:
        document = {name: results[name] for name in order}
        content = json.dumps(document, indent=1, allow_nan=False) + "\n"
        journal.write(outputs / "metrics" / "training.json", content.encode())
    return sorted(runs, key=lambda run: order.index(run.condition))


def _train_run(
    config: StudyConfig,
    data: StudyData,
    journal: Journal,
    stage: str,
    name: str,
    seed: int,
    path: Path,
    probe: Path | None,
    outputs: Path,
    device: str,
    workers: Workers,
) -> None:
    """One condition at one seed: `path` and its sidecar."""
    run = TrainingRun(condition=config.conditions[name], shared=config.train, seed=seed)
    inputs = {
        "recipe": run.condition.recipe,
        "seed": seed,
        "hyperparameters": run.values(),
        "pretrained": data.pretrained_digest,
        "data": data.digest,
        "img_size": config.model.img_size,
        "arguments": config.model.arguments,
        "deterministic": config.train.deterministic,
        "device": device,
        "version": __version__,
    }
    curves = config.train.tensorboard and workers.first

    def work() -> dict[str, Any]:
        result = train_condition(
            run,
            model=trained_here(config, outputs / "checkpoints" / "pretrained.safetensors"),
            data=data.splits,
            checkpoint=path,
            probe_checkpoint=probe,
            device=device,
            on_epoch=tensorboard_writer(outputs / "tensorboard" / path.stem) if curves else None,
            name=name,
            workers=workers,
        )
        if not workers.first:
            return {}
        difference = result.merge_difference
        merged = "" if difference is None else f", merging moved no logit by more than {difference:.1e}"
        say(f"{name} seed {seed}: validation {result.validation_accuracy:.1%}, test {result.test_accuracy:.1%}{merged}")
        return {"validation_accuracy": result.validation_accuracy, "test_accuracy": result.test_accuracy}

    journal.stage(stage, inputs, [path, sidecar_path(path), history_path(path)], work, workers=workers, shared=True)
