"""The conditions of a study: one way of fine-tuning, one seed, one checkpoint."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.adapters import add_adapters, merge_adapters
from train.augment import Augmentation
from train.checkpoint import read_checkpoint, read_metadata, save_checkpoint, sidecar_path, state_digest
from train.data import DataSplits
from train.digits_vit import TRAINING_THREADS
from train.errors import DamagedFileError, InputError
from train.loop import Schedule, accuracy, fit, resolve_precision, settings_key, training_mode
from train.models import build_model, classifier_name
from train.probe import fit_probe

__all__ = ["RECIPES", "Hyperparameters", "TrainResult", "finished_metadata", "train_condition", "versions"]

logger = logging.getLogger(__name__)

Recipe = Literal["probe", "full", "lora", "dora"]
RECIPES = ("probe", "full", "lora", "dora")
SEED_INVARIANT = frozenset({"probe"})  # recipes that no seed can change

_MERGE_IMAGES = 8  # on which merging is checked, in float64

# Enters every key: a change of what training computes makes older results another thing.
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Numbers of one condition; those that a recipe does not use have no effect on it.

    Args:
        epochs, batch_size, lr, warmup_fraction, clip_norm, precision: see `train.loop.Schedule`; precision
            may be "auto".
        weight_decay: AdamW's, of matrices (timm leaves biases, norms and position embeddings out); none on adapters.
        label_smoothing: mass moved from the true class to all, in the probe too.
        layer_decay: full: each block's rate is this times the rate of the block above it.
        rank, alpha, targets: lora, dora; see `train.adapters.add_adapters`.
        augmentation: of every recipe but the probe, whose features are computed once.
    """

    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    label_smoothing: float = 0.1
    layer_decay: float = 0.75
    rank: int = 8
    alpha: float = 16.0
    targets: str = r"blocks\.\d+\.attn\.(qkv|proj)"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a condition came to.

    Args:
        checkpoint: the saved weights, a plain timm model (adapters merged).
        sha256: of that file.
        validation_accuracy, test_accuracy: of the saved model in float32; test was looked at once.
        trainable_parameters: how many numbers were trained.
        history: one dict an epoch; for the probe one a penalty.
        merge_difference: largest logit difference that merging made; None without adapters.
        seed_invariant: no seed can change it.
        seconds: wall time of this call.
        reused: nothing was trained, the checkpoint was there.
    """

    recipe: str
    seed: int
    checkpoint: Path
    sha256: str
    validation_accuracy: float
    test_accuracy: float
    trainable_parameters: int
    history: list[dict[str, Any]]
    merge_difference: float | None
    seed_invariant: bool
    seconds: float
    reused: bool


def train_condition(
    *,
    recipe: Recipe,
    model_name: str,
    data: DataSplits,
    checkpoint: str | Path,
    seed: int = 42,
    weights: str | Path = "",
    pretrained: bool = False,
    img_size: int = 0,
    hyperparameters: Hyperparameters | None = None,
    probe_checkpoint: str | Path | None = None,
    device: str = "cpu",
    deterministic: bool = True,
    name: str = "",
) -> TrainResult:
    """Train one condition from the pretrained backbone to a checkpoint.

    All recipes read out as the model does (a ViT with a class token: from that token) through one linear
    classifier, and all but the probe start from the probe's. A finished checkpoint of the same inputs is
    taken as it is; an interrupted run goes on from its training state, and a Ctrl-C leaves that state.

    Args:
        data: train, validation and test images; the best epoch is chosen on validation.
        checkpoint: the `.safetensors` file to write; a `.json` sidecar and, while it runs, a
            `.state.safetensors` lie beside it.
        weights, pretrained, img_size: the start, as for `train.models.build_model`.
        probe_checkpoint: a finished probe of the same backbone and data, so that it is not fitted again.
        device: "cpu" or "cuda".
        name: the condition's name in progress bars; the recipe when empty.

    Raises:
        InputError: unknown recipe, a split without images, a probe of another backbone, bad weights.
        TrainingDivergedError: NaN or Inf in the loss, with the step.
        MergeError: merging the adapters changed the logits.
    """
    began = time.monotonic()
    hyper = hyperparameters or Hyperparameters()
    path, where = Path(checkpoint), torch.device(device)
    _check(recipe, data, hyper)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # weights that come from no file
        model = build_model(
            model_name, num_classes=len(data.class_names), pretrained=pretrained, weights=weights, img_size=img_size
        )
    backbone = _backbone_digest(model)
    hyper_used = {**asdict(hyper), "precision": resolve_precision(hyper.precision, where)}
    key = settings_key(
        version=_VERSION,
        recipe=recipe,
        model=model_name,
        backbone=backbone,
        dataset=data.manifest.sha256,
        preprocessing=data.train.preprocessing.to_dict(),
        seed=None if recipe in SEED_INVARIANT else seed,
        hyperparameters=_used_by(recipe, hyper_used),
        deterministic=deterministic,
        device=where.type,
    )
    if (done := finished_metadata(path, key)) is not None:
        return _result(path, done, began, reused=True)

    model.to(where)
    label = f"{name or recipe} seed {seed}"
    history: list[dict[str, Any]]
    state_path = path.with_suffix(".state.safetensors")
    difference: float | None = None
    threads = TRAINING_THREADS if model_name == "digits_vit" else 0
    with training_mode(model, where, precision=hyper_used["precision"], deterministic=deterministic, threads=threads):
        if recipe == "probe" or probe_checkpoint is None:
            history = fit_probe(model, data.train, data.validation, label_smoothing=hyper.label_smoothing, device=where)
        else:
            _take_head(model, Path(probe_checkpoint), backbone)
        if recipe == "probe":
            trainable = sum(parameter.numel() for parameter in _head(model).parameters())
        else:
            module, optimizer = _prepare(model, recipe, hyper, seed)
            trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            history = _fit(module, optimizer, data, hyper, hyper_used["precision"], seed, state_path, key, where, label)
            if recipe != "full":
                count = min(_MERGE_IMAGES, len(data.validation))
                model, difference = merge_adapters(module, data.validation.batch(range(count)).to(where))
            else:
                model = module
        model.eval()
        validation_accuracy = accuracy(model, data.validation, where)
        test_accuracy = accuracy(model, data.test, where)
    if recipe == "probe" and _backbone_digest(model) != backbone:
        raise RuntimeError(f"{label}: the frozen backbone changed while the probe was fitted")

    metadata = {
        "model": model_name,
        "img_size": img_size,
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "recipe": recipe,
        "seed": seed,
        "seed_invariant": recipe in SEED_INVARIANT,
        "hyperparameters": _used_by(recipe, hyper_used),
        "dataset": {"kind": data.manifest.kind, "sha256": data.manifest.sha256},
        "preprocessing": data.train.preprocessing.to_dict(),
        "backbone": backbone,
        "validation_accuracy": validation_accuracy,
        "test_accuracy": test_accuracy,
        "trainable_parameters": trainable,
        "merge_difference": difference,
        "history": history,
        "versions": versions(),
        "key": key,
    }
    metadata["sha256"] = save_checkpoint(path, model.state_dict(), metadata)
    state_path.unlink(missing_ok=True)
    return _result(path, metadata, began, reused=False)


def _check(recipe: str, data: DataSplits, hyper: Hyperparameters) -> None:
    if recipe not in RECIPES:
        raise InputError(f"unknown recipe {recipe!r}; expected one of {', '.join(RECIPES)}")
    for split, images in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if not len(images):
            raise InputError(
                f"the {split} split has no images, and training needs all three; use --data.split stratified, or "
                "folders with train, val and test"
            )
    if hyper.epochs < 1 or hyper.batch_size < 1:
        raise InputError(f"epochs {hyper.epochs} and batch_size {hyper.batch_size} must both be at least 1")


def _used_by(recipe: str, hyper: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters that a recipe's result depends on."""
    if recipe == "probe":
        return {"label_smoothing": hyper["label_smoothing"]}
    others = {"rank", "alpha", "targets"} if recipe == "full" else {"layer_decay", "weight_decay"}
    return {name: value for name, value in hyper.items() if name not in others}


def _prepare(
    model: nn.Module, recipe: str, hyper: Hyperparameters, seed: int
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What is trained and its optimizer."""
    groups: list[Any]
    if recipe == "full":
        from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

        groups = param_groups_layer_decay(
            model,
            weight_decay=hyper.weight_decay,
            no_weight_decay_list=cast(Any, model).no_weight_decay(),
            layer_decay=hyper.layer_decay,
        )
        module = model
    else:
        head = _head(model)
        module = add_adapters(model, kind=recipe, rank=hyper.rank, alpha=hyper.alpha, targets=hyper.targets, seed=seed)
        head.requires_grad_(True)
        groups = [
            {"params": [parameter for parameter in module.parameters() if parameter.requires_grad], "weight_decay": 0.0}
        ]
    # The rate of every step is set by the loop. β₂ .98: runs of a few hundred steps have no time for .999.
    return module, torch.optim.AdamW(groups, lr=hyper.lr, betas=(0.9, 0.98), fused=True)


def _fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DataSplits,
    hyper: Hyperparameters,
    precision: str,
    seed: int,
    state_path: Path,
    key: str,
    device: torch.device,
    label: str,
) -> list[dict[str, Any]]:
    labels = torch.from_numpy(data.train.labels).to(device)

    def loss_of(images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits = module(images)
        target = labels[torch.from_numpy(indices).to(device)]
        return functional.cross_entropy(logits.float(), target, label_smoothing=hyper.label_smoothing), logits

    return fit(
        module,
        optimizer,
        loss_of,
        train=data.train,
        validate=lambda: accuracy(module, data.validation, device, precision=precision),
        schedule=Schedule(
            epochs=hyper.epochs,
            batch_size=hyper.batch_size,
            lr=hyper.lr,
            warmup_fraction=hyper.warmup_fraction,
            clip_norm=hyper.clip_norm,
            precision=precision,
            seed=seed,
        ),
        state_path=state_path,
        key=key,
        device=device,
        augmentation=hyper.augmentation,
        label=label,
    )


def _head(model: nn.Module) -> nn.Module:
    return model.get_submodule(classifier_name(model))


def _backbone_digest(model: nn.Module) -> str:
    """sha256 of every tensor but the classifier's."""
    prefix = classifier_name(model) + "."
    return state_digest({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)})


def _take_head(model: nn.Module, path: Path, backbone: str) -> None:
    probe = read_checkpoint(path)
    if probe.metadata.get("recipe") != "probe" or probe.metadata.get("backbone") != backbone:
        raise InputError(f"checkpoint {path} is not a probe of the same backbone; expected one, or none")
    prefix = classifier_name(model) + "."
    with torch.no_grad():
        for name, parameter in _head(model).named_parameters():
            parameter.copy_(probe.tensors[prefix + name])


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


def _result(path: Path, metadata: dict[str, Any], began: float, *, reused: bool) -> TrainResult:
    return TrainResult(
        checkpoint=path,
        seconds=time.monotonic() - began,
        reused=reused,
        **{
            name: metadata[name]
            for name in (
                "recipe",
                "seed",
                "sha256",
                "validation_accuracy",
                "test_accuracy",
                "trainable_parameters",
                "history",
                "merge_difference",
                "seed_invariant",
            )
        },
    )


def versions() -> dict[str, str]:
    """Of what decides the weights' bits."""
    import timm

    return {"torch": torch.__version__, "timm": timm.__version__}
