"""Pretraining of the embedded study's backbone: the source task of digit scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from torch import nn
from torch.nn import functional

from train.choices import Precision
from train.data import DigitScenes, prepare_digits
from train.evaluation import Evaluation, evaluate
from train.models import build_model, preprocessing_of, seeded
from train.precision import resolve_precision
from train.settings import ConditionConfig, PretrainConfig, TrainConfig, TrainingRun
from train.state import StateFile, settings_key
from train.training import Task, Trained, TrainResult, finished_metadata, train_to_file
from train.transfer import uploaded

MODEL_NAME = "digits_vit"
BACKGROUND_WEIGHT = 0.15  # of a background token's loss; a digit's is 1
_VERSION = 2


class _TwoHeads(nn.Module):
    """The model and a head for every token, which is thrown away."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model = model
        self.token_head = nn.Linear(cast(Any, model).embed_dim, classes + 1)  # the last class is background

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = cast(Any, self.model)
        tokens = model.forward_features(images)
        patches = tokens[:, model.num_prefix_tokens :]
        return model.forward_head(tokens), self.token_head(patches)


class _SceneTask:
    """The loss of the class token, which names the large digit, and of every patch token."""

    def __init__(self, module: _TwoHeads, task: Task) -> None:
        self.module, self.task = module, task
        train, embed = cast(DigitScenes, task.data.train), cast(Any, module.model).patch_embed
        self.labels = torch.from_numpy(train.labels).to(task.device)
        targets = token_targets(train, embed.grid_size, embed.patch_size[0])
        self.tokens = torch.from_numpy(targets).to(task.device)
        self.token_weights = torch.ones(module.token_head.out_features, device=task.device)
        self.token_weights[-1] = BACKGROUND_WEIGHT

    def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits, token_logits = self.module(images)
        chosen = uploaded(torch.from_numpy(indices), self.task.device)
        smoothing = self.task.run.shared.label_smoothing
        loss = functional.cross_entropy(logits.float(), self.labels[chosen], label_smoothing=smoothing)
        per_token = functional.cross_entropy(
            token_logits.float().flatten(0, 1), self.tokens[chosen].flatten(), weight=self.token_weights
        )
        return loss + per_token, logits

    def validate(self) -> Evaluation:
        precision = self.task.run.shared.precision
        return evaluate(self.module.model, self.task.data.validation, self.task.device, precision=precision)


def _train(module: nn.Module, task: Task) -> Trained:
    """All weights, with weight decay on matrices alone, as timm does it."""
    module = cast(_TwoHeads, module)
    kept_out = [f"model.{name}" for name in cast(Any, module.model).no_weight_decay()]
    plain, decayed = param_groups_weight_decay(module, task.run.shared.weight_decay, no_weight_decay_list=kept_out)
    return Trained(module.model, task.fit(module, [decayed, plain], _SceneTask(module, task)).history)


def token_targets(scenes: DigitScenes, grid: Sequence[int], patch_px: int) -> np.ndarray:
    """The digit whose box holds each patch's centre, else the number of classes, int64 [scene, patch]."""
    rows, cols = (np.arange(count) * patch_px + patch_px / 2 for count in grid)
    targets = np.full((len(scenes), len(rows), len(cols)), len(scenes.class_names), dtype=np.int64)
    for region in range(scenes.boxes.shape[1]):
        row0, col0, row1, col1 = (scenes.boxes[:, region, side, None] for side in range(4))
        inside = ((rows >= row0) & (rows < row1))[:, :, None] & ((cols >= col0) & (cols < col1))[:, None, :]
        targets = np.where(inside, scenes.both_labels[:, region, None, None], targets)
    return targets.reshape(len(scenes), -1)


def pretrain_digits(
    pretrain: PretrainConfig,
    *,
    checkpoint: str | Path,
    data_seed: int = 42,
    validation_scenes: int = 1024,
    test_scenes: int = 1024,
    precision: Precision = "auto",
    device: str = "cpu",
    deterministic: bool = True,
) -> TrainResult:
    """Train `digits_vit` to name the large digit of a scene, and write it to `checkpoint`.

    To the classification loss of the class token a loss of every patch token is added (which digit, of
    either size, its centre lies on, or background) through a head that is thrown away: with the class
    loss alone nothing is learned in the study's time. So the patch tokens know both digits, while the
    class token, which every condition reads out from, was only asked for the large one.
    """
    path, where, seed = Path(checkpoint), torch.device(device), pretrain.seed
    shared = TrainConfig(
        epochs=pretrain.epochs,
        batch_size=pretrain.batch_size,
        label_smoothing=0.05,
        flip=False,  # every scene is composed with its own rotation, shear and brightness
        rotation_degrees=0.0,
        color_jitter=0.0,
        precision=resolve_precision(precision, where),
        deterministic=deterministic,
    )
    run = TrainingRun(condition=ConditionConfig(recipe="pretrain", lr=pretrain.lr), shared=shared, seed=seed)
    settings = asdict(pretrain) | {
        "scenes": [pretrain.scenes, validation_scenes, test_scenes],
        "data_seed": data_seed,
        "weight_decay": shared.weight_decay,
        "label_smoothing": shared.label_smoothing,
        "precision": shared.precision,
        "deterministic": deterministic,
    }
    key = settings_key(version=_VERSION, recipe="pretrain", device=where.type, **settings)
    if (metadata := finished_metadata(path, key)) is not None:
        return TrainResult.of_sidecar(path, metadata, reused=True)

    with seeded(seed):
        module = _TwoHeads(build_model(MODEL_NAME, num_classes=10), 10)
    preprocessing = preprocessing_of(module.model)
    data = prepare_digits(
        preprocessing=preprocessing,
        task="source",
        seed=data_seed,
        train_scenes=pretrain.scenes,
        validation_scenes=validation_scenes,
        test_scenes=test_scenes,
    )
    state_file = StateFile(path.with_suffix(".state.safetensors"), key)
    task = Task(run=run, data=data, device=where, state_file=state_file, label="pretraining")
    facts = {
        "model": MODEL_NAME,
        "num_classes": 10,
        "class_names": list(data.class_names),
        "recipe": "pretrain",
        "seed": seed,
        "hyperparameters": settings,
        "dataset": {"kind": "digits", "task": "source", "sha256": data.manifest.sha256},
        "preprocessing": preprocessing.to_dict(),
    }
    return TrainResult.of_sidecar(path, train_to_file(path, key, _train, module, task, facts), reused=False)
