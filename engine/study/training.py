"""The study's conditions: what is trained, and where the checkpoints lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import TRAINING, run_name
from engine.progress import say
from engine.study.data import StudyData
from engine.study.journal import digest, digest_path
from engine.study.model import captured_seeds, checkpoint_of, trained_here, trained_seeds
from engine.study.start import Start
from train.checkpoint import history_path, read_metadata, sidecar_path, tensorboard_writer
from train.model_source import ModelSource
from train.recipes import RECIPES
from train.settings import TrainingRun
from train.training import train_condition


@dataclass(frozen=True)
class Run:
    """One trained model: a condition at a seed.

    A checkpoint that somebody trained has the first of `train.seeds`, and no accuracies. Of runs that are
    `seed_invariant`, whose attention no seed can change, the first one is `captured`.
    """

    condition: str
    seed: int
    recipe: str
    model: ModelSource  # its weights are the checkpoint
    seed_invariant: bool = False
    captured: bool = True
    validation_accuracy: float | None = None
    test_accuracy: float | None = None

    @property
    def name(self) -> str:
        return run_name(self.condition, self.seed)

    @property
    def checkpoint(self) -> Path:
        return Path(self.model.adapter or self.model.weights)

    @property
    def digest(self) -> str:
        """Hash of the files, which of the weights in them are meant, and what the model is built from them."""
        model = self.model
        return digest([model.name, *map(digest_path, model.files), model.state, dict(model.arguments)])


def train_runs(start: Start, data: StudyData, *, device: str) -> list[Run]:
    """Train every condition at every seed, or take the checkpoints that were given.

    Probes come first: the other conditions start from a probe's head, so that all of them begin as the same function.
    The runs are given in the order of the configuration, seeds inside conditions.
    """
    config = start.config
    recipes = {name: RECIPES[condition.recipe] for name, condition in config.conditions.items()}
    if not any(recipe.train for recipe in recipes.values()):
        seed = config.train.seeds[0]
        return [
            Run(name, seed, condition.recipe, checkpoint_of(config, name))
            for name, condition in config.conditions.items()
        ]
    runs: list[Run] = []
    results: dict[str, dict[str, Any]] = {}
    probes: dict[int, Path] = {}  # seed → a finished probe of its images
    for name in sorted(recipes, key=lambda name: not recipes[name].seed_invariant):
        condition, invariant = config.conditions[name], recipes[name].seed_invariant
        captured = captured_seeds(config, name)
        for seed in trained_seeds(config, name):
            training = TrainingRun(condition=condition, shared=config.train, seed=seed)
            path = start.outputs / "checkpoints" / f"{run_name(name, seed)}.safetensors"
            seconds = _train_run(start, data, name, training, path, probes.get(seed), device)
            sidecar = read_metadata(path)
            model, accuracies = trained_here(config, path), (sidecar["validation_accuracy"], sidecar["test_accuracy"])
            runs.append(Run(name, seed, condition.recipe, model, invariant, seed in captured, *accuracies))
            kept = ("history", "validation_accuracy", "test_accuracy", "trainable_parameters", "merge_difference")
            entry = results.setdefault(name, {"recipe": condition.recipe, "seed_invariant": invariant, "seeds": {}})
            entry["seeds"][str(seed)] = {key: sidecar[key] for key in kept} | {"seconds": seconds}
            for other in ([seed] if config.train.resplit else config.train.seeds) if invariant else ():
                probes.setdefault(other, path)
    order = list(config.conditions)
    if start.workers.first:
        document = {name: results[name] for name in order}
        content = json.dumps(document, indent=1, allow_nan=False) + "\n"
        start.journal.write(start.outputs / TRAINING, content.encode())
    return sorted(runs, key=lambda run: order.index(run.condition))


def _train_run(
    start: Start, data: StudyData, name: str, run: TrainingRun, path: Path, probe: Path | None, device: str
) -> float | None:
    """One condition at one seed: `path` and its sidecar. Returns the seconds that it took when it was done."""
    config, workers = start.config, start.workers
    inputs = {
        "recipe": run.condition.recipe,
        "seed": run.seed,
        "hyperparameters": run.values(),
        "pretrained": data.pretrained_digest,
        "data": data.digest,
        "img_size": config.model.img_size,
        "arguments": config.model.arguments,
        "deterministic": config.train.deterministic,
        "device": device,
    }
    if config.train.resplit:
        inputs["resplit"] = True
    curves = config.train.tensorboard and workers.first

    def work() -> dict[str, Any]:
        result = train_condition(
            run,
            model=trained_here(config, start.pretrained_path),
            data=data.splits_of(run.seed),
            checkpoint=path,
            probe_checkpoint=probe,
            device=device,
            on_epoch=tensorboard_writer(start.outputs / "tensorboard" / path.stem) if curves else None,
            name=name,
            workers=workers,
        )
        if not workers.first:
            return {}
        difference = result.merge_difference
        merged = "" if difference is None else f", merging moved no logit by more than {difference:.1e}"
        validation, test = result.validation_accuracy, result.test_accuracy
        say(f"{name} seed {run.seed}: validation {validation:.1%}, test {test:.1%}{merged}")
        return {"validation_accuracy": validation, "test_accuracy": test}

    stage, outputs = f"train {name} seed {run.seed}", [path, sidecar_path(path), history_path(path)]
    start.journal.stage(stage, inputs, outputs, work, workers=workers, shared=True)
    return start.journal.stage_seconds().get(stage)
