"""The conditions of a study: one way of fine-tuning, one seed, one checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import read_checkpoint, read_metadata, sidecar_path, state_digest
from train.data import DataSplits
from train.errors import DamagedFileError, InputError
from train.history import write_history
from train.model_source import ModelSource, source_of
from train.models import build_model
from train.parallel import SINGLE, Workers
from train.precision import resolve_precision
from train.recipes import RECIPES
from train.settings import Compression, Init, TrainingRun
from train.state import StateFile, settings_key
from train.training import OnEpoch, Task, backbone_digest, head_of, train_to_file

logger = logging.getLogger(__name__)

# Enters every key: a change of what training computes makes older results another thing.
_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training run came to.

    Args:
        checkpoint: the saved weights, a plain timm model (adapters merged).
        sha256: of that file.
        validation_accuracy, test_accuracy: of the saved model in float32; test was looked at once.
        history: one dict an epoch; for the probe one a penalty.
        reused: nothing was trained, the checkpoint was there.
        trainable_parameters: how many numbers were trained.
        merge_difference: largest logit difference that merging made; None without adapters.
        seed_invariant: no seed can change it.
    """

    checkpoint: Path
    sha256: str
    validation_accuracy: float
    test_accuracy: float
    history: list[dict[str, Any]]
    reused: bool
    trainable_parameters: int = 0
    merge_difference: float | None = None
    seed_invariant: bool = False

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
        data: train, validation and test images; the best epoch is chosen on validation.
        checkpoint: the `.safetensors` file to write; a `.json` sidecar and, while it runs, a
            `.state.safetensors` lie beside it, and `.history.jsonl` with a line an epoch.
        probe_checkpoint: a finished probe of the same backbone and data, so that it is not fitted again.
        device: "cpu" or "cuda".
        on_epoch: gets the history so far after each epoch; what it raises ends the run, which can go on later.
        name: the condition's name in progress bars; the recipe when empty.
        workers: the processes that train together; the first one writes.

    Raises:
        InputError: unknown recipe, a split without images, a probe of another backbone, bad weights.
        TrainingDivergedError: NaN or Inf in the loss, with the step.
        MergeError: merging the adapters changed the logits.
    """
    check_run(run, data)
    path, where = Path(checkpoint), torch.device(device)
    recipe = RECIPES[run.condition.recipe]
    assert recipe.train is not None  # as was checked
    run = replace(run, shared=replace(run.shared, precision=resolve_precision(run.shared.precision, where)))
    source = source_of(model).completed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)  # weights that come from no file
        built = build_model(source, num_classes=len(data.class_names))
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
        **({"head": state_digest(head_of(built).state_dict())} if run.own_head else {}),
    )
    metadata = finished_metadata(path, key)
    if reused := metadata is not None:
        result = metadata
    else:
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
        result = train_to_file(path, key, recipe.train, built, task, facts)
    if workers.first:
        write_history(path, result["history"])
    return TrainResult.of_sidecar(path, result, reused=reused)


def check_run(run: TrainingRun, data: DataSplits) -> None:
    """Raise the sentence for what cannot be trained.

    Raises:
        InputError: an unknown recipe, init or compression, a split without images, numbers out of range.
    """
    name, shared = run.condition.recipe, run.shared
    trained = [known for known, recipe in RECIPES.items() if recipe.train is not None]
    for what, value, known in (
        ("recipe", name, trained),
        ("init", run.condition.init, typing.get_args(Init)),
        ("compression", run.compression, typing.get_args(Compression)),
    ):
        if value not in known:
            raise InputError(f"unknown {what} {value!r}; expected one of {', '.join(known)}")
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
