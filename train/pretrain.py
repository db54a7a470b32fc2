"""Pretraining of the embedded study's backbone: the source task of digit scenes."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.checkpoint import save_checkpoint
from train.conditions import finished_metadata, versions
from train.data import DigitScenes, prepare_digits
from train.digits_vit import TRAINING_THREADS
from train.evaluation import evaluate
from train.loop import Schedule, fit
from train.models import build_model, preprocessing_of
from train.precision import resolve_precision, training_mode
from train.state import StateFile, settings_key
from train.transfer import uploaded

logger = logging.getLogger(__name__)

MODEL_NAME = "digits_vit"
BACKGROUND_WEIGHT = 0.15  # of a background token's loss; a digit's is 1
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """The pretrained backbone.

    Args:
        checkpoint, sha256: the saved `digits_vit`, its head naming the large digit.
        validation_accuracy, test_accuracy: on the source task, in float32.
        history: one dict an epoch.
        seconds: wall time of this call.
        reused: nothing was trained, the checkpoint was there.
    """

    checkpoint: Path
    sha256: str
    validation_accuracy: float
    test_accuracy: float
    history: list[dict[str, Any]]
    seconds: float
    reused: bool


class _Pretraining(nn.Module):
    """The model and a per-token head that is thrown away."""

    def __init__(self, model: nn.Module, classes: int) -> None:
        super().__init__()
        self.model = model
        self.token_head = nn.Linear(cast(Any, model).embed_dim, classes + 1)  # the last class is background

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        model = cast(Any, self.model)
        tokens = model.forward_features(images)
        patches = tokens[:, model.num_prefix_tokens :]
        return model.forward_head(tokens), self.token_head(patches)


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
    *,
    checkpoint: str | Path,
    data_seed: int = 42,
    scenes: int = 8000,
    validation_scenes: int = 1024,
    test_scenes: int = 1024,
    epochs: int = 3,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.05,
    seed: int = 0,
    precision: Literal["auto", "bf16", "fp32"] = "auto",
    device: str = "cpu",
    deterministic: bool = True,
) -> PretrainResult:
    """Train `digits_vit` to name the large digit of a scene.

    To the classification loss of the class token a loss of every patch token is added (which digit, of
    either size, its centre lies on, or background) through a head that is thrown away: with the class
    loss alone nothing is learned in the study's time. So the patch tokens know both digits, while the
    class token, which every condition reads out from, was only asked for the large one.

    Args:
        checkpoint: the `.safetensors` file to write.
        data_seed: of the scenes; `seed`: of initial weights and data order.

    Raises:
        TrainingDivergedError: NaN or Inf in the loss, with the step.
    """
    began = time.monotonic()
    path, where = Path(checkpoint), torch.device(device)
    precision_used = resolve_precision(precision, where)
    settings = {
        "scenes": [scenes, validation_scenes, test_scenes],
        "data_seed": data_seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "seed": seed,
        "precision": precision_used,
        "deterministic": deterministic,
    }
    key = settings_key(version=_VERSION, recipe="pretrain", device=where.type, **settings)
    if (metadata := finished_metadata(path, key)) is not None:
        return _result(path, metadata, began, reused=True)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(MODEL_NAME, num_classes=10)
        module = _Pretraining(model, 10).to(where)
    preprocessing = preprocessing_of(model)
    data = prepare_digits(
        preprocessing=preprocessing,
        task="source",
        seed=data_seed,
        train_scenes=scenes,
        validation_scenes=validation_scenes,
        test_scenes=test_scenes,
    )
    train = cast(DigitScenes, data.train)
    embed = cast(Any, model).patch_embed
    labels = torch.from_numpy(train.labels).to(where)
    tokens = torch.from_numpy(token_targets(train, embed.grid_size, embed.patch_size[0])).to(where)
    token_weights = torch.ones(11, device=where)
    token_weights[10] = BACKGROUND_WEIGHT

    def loss_of(images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits, token_logits = module(images)
        chosen = uploaded(torch.from_numpy(indices), where)
        loss = functional.cross_entropy(logits.float(), labels[chosen], label_smoothing=label_smoothing)
        per_token = functional.cross_entropy(
            token_logits.float().flatten(0, 1), tokens[chosen].flatten(), weight=token_weights
        )
        return loss + per_token, logits

    groups = _decay_groups(module, cast(Any, model).no_weight_decay(), weight_decay)
    state_file = StateFile(path.with_suffix(".state.safetensors"), key)
    with training_mode(module, where, precision=precision_used, deterministic=deterministic, threads=TRAINING_THREADS):
        history = fit(
            module,
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True),
            loss_of,
            train=train,
            validate=lambda: evaluate(model, data.validation, where, precision=precision_used),
            schedule=Schedule(epochs=epochs, batch_size=batch_size, lr=lr, precision=precision_used, seed=seed),
            state_file=state_file,
            device=where,
            label="pretraining",
        )
        scores = [evaluate(model, images, where).accuracy for images in (data.validation, data.test)]
    metadata = {
        "model": MODEL_NAME,
        "num_classes": 10,
        "class_names": list(data.class_names),
        "recipe": "pretrain",
        "seed": seed,
        "hyperparameters": settings,
        "dataset": {"kind": "digits", "task": "source", "sha256": data.manifest.sha256},
        "preprocessing": preprocessing.to_dict(),
        "validation_accuracy": scores[0],
        "test_accuracy": scores[1],
        "history": history,
        "versions": versions(),
        "key": key,
    }
    metadata["sha256"] = save_checkpoint(path, model.state_dict(), metadata)
    state_file.remove()
    return _result(path, metadata, began, reused=False)


def _decay_groups(module: nn.Module, kept_out: set[str], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices alone, as timm does it."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim <= 1 or name.removeprefix("model.") in kept_out
        (plain if exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _result(path: Path, metadata: dict[str, Any], began: float, *, reused: bool) -> PretrainResult:
    return PretrainResult(
        checkpoint=path,
        sha256=metadata["sha256"],
        validation_accuracy=metadata["validation_accuracy"],
        test_accuracy=metadata["test_accuracy"],
        history=metadata["history"],
        seconds=time.monotonic() - began,
        reused=reused,
    )
