"""The conditions of a study: one way of fine-tuning, one seed, one checkpoint."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from train.adapters import TARGETS, add_adapters, merge_adapters
from train.checkpoint import read_checkpoint, read_metadata, save_checkpoint, sidecar_path, state_digest
from train.compress import compress
from train.data import DataSplits
from train.digits_vit import TRAINING_THREADS
from train.errors import DamagedFileError, InputError
from train.evaluation import evaluate
from train.history import write_history
from train.hyperparameters import ADAPTERS, SEED_INVARIANT, Hyperparameters, Recipe, check_condition
from train.loop import epoch_order, fit
from train.model_source import ModelSource, source_of
from train.models import build_model, classifier_name
from train.parallel import Workers
from train.precision import resolve_precision, training_mode
from train.probe import fit_probe
from train.state import StateFile, settings_key
from train.transfer import uploaded

logger = logging.getLogger(__name__)

_MERGE_IMAGES = 8  # on which merging is checked, in float64
_EVA_BATCHES = 4  # of training images whose activations make EVA's directions

# Enters every key: a change of what training computes makes older results another thing.
_VERSION = 2

OnEpoch = Callable[[Sequence[Mapping[str, Any]]], None]


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
    model: ModelSource | str,
    data: DataSplits,
    checkpoint: str | Path,
    seed: int = 42,
    hyperparameters: Hyperparameters | None = None,
    probe_checkpoint: str | Path | None = None,
    device: str = "cpu",
    deterministic: bool = True,
    on_epoch: OnEpoch | None = None,
    name: str = "",
) -> TrainResult:
    """Train one condition from the pretrained backbone to a checkpoint.

    All recipes read out as the model does (a ViT with a class token: from that token) through one linear
    classifier, and all but the probe start from the probe's. A finished checkpoint of the same inputs is
    taken as it is; an interrupted run goes on from its training state, and a Ctrl-C leaves that state.
    The processes of a group that was joined before (torchrun) train together; the first one writes.

    Args:
        model: the start, as for `train.models.build_model`.
        data: train, validation and test images; the best epoch is chosen on validation.
        checkpoint: the `.safetensors` file to write; a `.json` sidecar and, while it runs, a
            `.state.safetensors` lie beside it, and `.history.jsonl` with a line an epoch.
        probe_checkpoint: a finished probe of the same backbone and data, so that it is not fitted again.
        device: "cpu" or "cuda".
        on_epoch: gets the history so far after each epoch; what it raises ends the run, which can go on later.
        name: the condition's name in progress bars; the recipe when empty.

    Raises:
        InputError: unknown recipe, a split without images, a probe of another backbone, bad weights.
        TrainingDivergedError: NaN or Inf in the loss, with the step.
        MergeError: merging the adapters changed the logits.
    """
    began = time.monotonic()
    hyper = hyperparameters or Hyperparameters()
    path, where = Path(checkpoint), torch.device(device)
    check_condition(recipe, data, hyper)
    precision = resolve_precision(hyper.precision, where)
    source = source_of(model).completed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # weights that come from no file
        built = build_model(source, num_classes=len(data.class_names))
    backbone = _backbone_digest(built)
    own_head = recipe != "probe" and hyper.head == "own"
    settings = {
        "recipe": recipe,
        "model": source.name,
        **({"arguments": dict(source.arguments)} if source.arguments else {}),
        "backbone": backbone,
        "dataset": data.manifest.sha256,
        "preprocessing": data.train.preprocessing.to_dict(),
        "seed": None if recipe in SEED_INVARIANT else seed,
        "hyperparameters": hyper.used_by(recipe, precision),
        "deterministic": deterministic,
        "device": where.type,
        **({"head": state_digest(_head(built).state_dict())} if own_head else {}),
    }
    key = settings_key(version=_VERSION, **settings)
    workers = Workers.current()
    if (done := finished_metadata(path, key)) is not None:
        if workers.first:
            write_history(path, done["history"])
        return _result(path, done, began, reused=True)

    built.to(where)
    label = f"{name or recipe} seed {seed}"
    state_file = StateFile(path.with_suffix(".state.safetensors"), key, writes=workers.first)
    threads = TRAINING_THREADS if source.name == "digits_vit" else 0
    difference: float | None = None
    with training_mode(built, where, precision=precision, deterministic=deterministic, threads=threads):
        if not own_head and (recipe == "probe" or probe_checkpoint is None):
            history = fit_probe(built, data.train, data.validation, label_smoothing=hyper.label_smoothing, device=where)
        elif not own_head:
            _take_head(built, Path(cast(Any, probe_checkpoint)), backbone, data.class_names)
        if recipe == "probe":
            trainable = sum(parameter.numel() for parameter in _head(built).parameters())
        else:
            if recipe in ADAPTERS:
                module, optimizer = _adapted(built, recipe, hyper, data, seed, where)
            else:
                module, optimizer = built, _full_optimizer(built, hyper)
            trainable = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

            def each_epoch(history: Sequence[Mapping[str, Any]]) -> None:
                if workers.first:
                    write_history(path, history)
                    if on_epoch is not None:
                        on_epoch(history)

            history = _fit(
                module, optimizer, data, hyper, precision, seed, state_file, where, each_epoch, workers, label
            )
            built = module
            if recipe in ADAPTERS:
                count = min(_MERGE_IMAGES, len(data.validation))
                built, difference = merge_adapters(module, data.validation.batch(range(count)).to(where))
        built.eval()
        validation, test = (evaluate(built, images, where, workers=workers) for images in (data.validation, data.test))
    if recipe == "probe" and _backbone_digest(built) != backbone:
        raise RuntimeError(f"{label}: the frozen backbone changed while the probe was fitted")

    metadata = {
        "model": source.name,
        "arguments": dict(source.arguments),
        "img_size": source.img_size,
        "num_classes": len(data.class_names),
        "class_names": list(data.class_names),
        "recipe": recipe,
        "seed": seed,
        "seed_invariant": recipe in SEED_INVARIANT,
        "hyperparameters": settings["hyperparameters"],
        "dataset": {"kind": data.manifest.kind, "sha256": data.manifest.sha256},
        "preprocessing": data.train.preprocessing.to_dict(),
        "backbone": backbone,
        "validation_accuracy": validation.accuracy,
        "test_accuracy": test.accuracy,
        "trainable_parameters": trainable,
        "merge_difference": difference,
        "history": history,
        "versions": versions(),
        "key": key,
    }
    if workers.first:
        write_history(path, history)
        save_checkpoint(path, built.state_dict(), metadata)
        state_file.remove()
    workers.wait()
    return _result(path, read_metadata(path), began, reused=False)


def _full_optimizer(model: nn.Module, hyper: Hyperparameters) -> torch.optim.Optimizer:
    """Over all weights, with timm's layer-wise rates and its choice of what decays."""
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    kept_out: set[str] = getattr(model, "no_weight_decay", set)()
    groups = param_groups_layer_decay(
        model, weight_decay=hyper.weight_decay, no_weight_decay_list=kept_out, layer_decay=hyper.layer_decay
    )
    return _adamw(groups, hyper.lr)


def _adapted(
    model: nn.Module, recipe: str, hyper: Hyperparameters, data: DataSplits, seed: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model with adapters, its frozen weights compressed on request, and an optimizer over what is trained.

    The classifier is trained whole, unless it is itself a target.
    """
    classifier = classifier_name(model)
    head_adapted = re.fullmatch(TARGETS.get(hyper.targets, hyper.targets), classifier) is not None
    compress(model, hyper.compression, sparsity=hyper.sparsity, keep=() if head_adapted else (classifier,))
    batches = []
    if hyper.init == "eva":
        order = epoch_order(seed, 0, len(data.train))[: _EVA_BATCHES * hyper.batch_size]
        parts = np.array_split(order, -(-len(order) // hyper.batch_size))
        batches = [data.train.batch(part).to(device) for part in parts]
    head = model.get_submodule(classifier)
    module = add_adapters(
        model,
        kind=recipe,
        rank=hyper.rank,
        alpha=hyper.alpha,
        targets=hyper.targets,
        seed=seed,
        init=hyper.init,
        batches=batches,
    )
    if not head_adapted:
        head.requires_grad_(True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return module, _adamw([{"params": trained, "weight_decay": 0.0}], hyper.lr)


def _adamw(groups: Any, lr: float) -> torch.optim.Optimizer:
    # The rate of every step is set by the loop. β₂ .98: runs of a few hundred steps have no time for .999.
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def _fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: DataSplits,
    hyper: Hyperparameters,
    precision: str,
    seed: int,
    state_file: StateFile,
    device: torch.device,
    on_epoch: OnEpoch,
    workers: Workers,
    label: str,
) -> list[dict[str, Any]]:
    labels = torch.from_numpy(data.train.labels).to(device)

    def loss_of(images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        logits = module(images)
        target = labels[uploaded(torch.from_numpy(indices), device)]
        return functional.cross_entropy(logits.float(), target, label_smoothing=hyper.label_smoothing), logits

    return fit(
        module,
        optimizer,
        loss_of,
        train=data.train,
        validate=lambda: evaluate(
            module,
            data.validation,
            device,
            precision=precision,
            label_smoothing=hyper.label_smoothing,
            workers=workers,
        ),
        schedule=hyper.schedule(precision, seed),
        state_file=state_file,
        device=device,
        augmentation=hyper.augmentation,
        on_epoch=on_epoch,
        workers=workers,
        label=label,
    )


def _head(model: nn.Module) -> nn.Module:
    return model.get_submodule(classifier_name(model))


def _backbone_digest(model: nn.Module) -> str:
    """sha256 of every tensor but the classifier's."""
    prefix = classifier_name(model) + "."
    return state_digest({name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefix)})


def _take_head(model: nn.Module, path: Path, backbone: str, class_names: tuple[str, ...]) -> None:
    probe = read_checkpoint(path)
    if probe.metadata.get("recipe") != "probe" or probe.metadata.get("backbone") != backbone:
        raise InputError(f"checkpoint {path} is not a probe of the same backbone; expected one, or none")
    if probe.metadata.get("class_names") != list(class_names):
        raise InputError(f"checkpoint {path} is a probe of other classes than the data set's; expected one of these")
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
