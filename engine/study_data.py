"""The study's images in their splits, and the model that its conditions start from or the checkpoints it was given."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm

from engine import __version__
from engine.classes import HeadClasses, check_shared_names, folder_classes, named_classes, read_class_names
from engine.config import StudyConfig
from engine.journal import Journal, digest, digest_path
from engine.model import checkpoint_of, model_source, trained_here
from engine.progress import say
from train.checkpoint import save_checkpoint, sidecar_path
from train.data import DataSplits, ImageSet, Preprocessing
from train.datasets import DataKind, build_manifest
from train.embedded import prepare_digits
from train.errors import InputError
from train.files import id_of
from train.folders import prepare_folder
from train.listing import files_below
from train.manifest import Manifest
from train.model_source import ModelSource
from train.models import build_model, preprocessing_of
from train.pretrain import pretrain_digits

__all__ = ["StudyData", "check_class_files", "image_kind", "prepare_data"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyData:
    """The images in their splits, and the pretrained model that every condition starts from.

    Args:
        splits: train, validation and test images with their manifest.
        preprocessing: read off the model.
        pretrained_digest: hash of the pretrained weights; "" where only given checkpoints are compared.
        pretrained_model: builds the pretrained model.
        heads: condition → the classes of its head, where checkpoints were given.
    """

    splits: DataSplits
    preprocessing: Preprocessing
    pretrained_digest: str
    pretrained_model: Callable[[], torch.nn.Module]
    heads: Mapping[str, HeadClasses] = field(default_factory=dict)

    @property
    def test(self) -> ImageSet:
        return self.splits.test

    @property
    def digest(self) -> str:
        """Hash of every image, label and split, and of how images are prepared for the model."""
        return digest([self.splits.manifest.sha256, self.preprocessing.to_dict()])

    def head(self, condition: str) -> HeadClasses:
        """The classes of a condition's head: those of the data where it is trained here."""
        names = self.splits.class_names
        return self.heads.get(condition) or HeadClasses(len(names), names)

    def info(self, split: str) -> dict[str, Any]:
        """Provenance of one split: {id, split, sha256}."""
        manifest = self.splits.manifest
        return {"id": manifest.kind, "split": f"{manifest.rule}/{split}", "sha256": manifest.sha256}

    def summary(self) -> dict[str, Any]:
        """What the report says of the data: counts, splits, and every file that was left out with its reason."""
        manifest = self.splits.manifest
        splits = {"train": self.splits.train, "validation": self.splits.validation, "test": self.splits.test}
        return {
            "kind": manifest.kind,
            "images": sum(len(images) for images in splits.values()),
            "classes": len(manifest.class_names),
            "splits": {name: len(images) for name, images in splits.items()},
            "split": manifest.rule,
            "dropped": [
                {"id": record.id, "status": record.status} for record in manifest.records if record.status != "ok"
            ],
            "same_file_in_several_splits": [list(ids) for ids in manifest.leaks()],
            "sha256": manifest.sha256,
        }


def prepare_data(config: StudyConfig, outputs: Path, journal: Journal, *, device: str) -> StudyData:
    """Images in their splits, and the pretrained weights, made or fetched once.

    Raises:
        InputError: no such folder, no readable image, no test image, an unknown model, no weights to be had.
    """
    given = [name for name, condition in config.conditions.items() if condition.recipe == "checkpoint"]
    if not config.conditions:
        raise InputError("the study has no conditions; name at least one, as in [conditions.baseline]")
    if given and len(given) < len(config.conditions):
        other = next(name for name in config.conditions if name not in given)
        raise InputError(
            f"condition {given[0]} is a given checkpoint and {other} is trained here; their starting points cannot be "
            "known to be the same, so train all conditions or give all as checkpoints"
        )
    if given:
        return _given_checkpoints(config, outputs, journal)
    if config.data.prepare_as:
        raise InputError(
            "data.prepare_as is for given checkpoints; conditions that are trained here share their images"
        )
    return (
        _digits(config, outputs, journal, device) if config.data.kind == "digits" else _folder(config, outputs, journal)
    )


def _given_checkpoints(config: StudyConfig, outputs: Path, journal: Journal) -> StudyData:
    """Data for checkpoints that somebody trained; all get the same pixels."""
    prepared: dict[str, Preprocessing] = {}
    outputs_of: dict[str, int] = {}
    named: dict[str, HeadClasses | None] = {}
    for name, condition in config.conditions.items():
        if not condition.checkpoint:
            raise InputError(f"condition {name} names no file; give conditions.{name}.checkpoint")
        # Every file is loaded once before any work, so that a wrong one is found at once.
        file = condition.classes or config.model.classes
        try:
            model = build_model(checkpoint_of(config, name), num_classes=None)
        except InputError as error:
            raise type(error)(f"condition {name}: {error}") from error
        prepared[name] = preprocessing_of(model)
        outputs_of[name] = int(cast(Any, model).num_classes)
        named[name] = named_classes(outputs_of[name], condition=name, checkpoint=Path(condition.checkpoint), file=file)
    preprocessing = _common_preprocessing(config, prepared)
    splits = _folder_splits(config, outputs, journal, preprocessing)
    heads = {
        name: found
        or folder_classes(outputs_of[name], splits.class_names, config.data.class_order, f"conditions.{name}.classes")
        for name, found in named.items()
    }
    for name, condition in config.conditions.items():
        check_shared_names(heads[name], splits.class_names, condition.classes or config.model.classes)
        say(heads[name].origin(name))

    def no_pretrained() -> torch.nn.Module:
        raise InputError("given checkpoints say nothing of the pretrained model that they started from")

    return StudyData(splits, preprocessing, "", no_pretrained, heads)


def check_class_files(config: StudyConfig) -> None:
    """Read every file of class names, before anything is loaded.

    Raises:
        InputError: one cannot be read, or is given for a head that is trained here.
    """
    for name, condition in config.conditions.items():
        file = condition.classes or config.model.classes
        if file and condition.recipe != "checkpoint":
            raise InputError(
                f"class names {file} are given, but condition {name} is trained here, on the class folders; leave them "
                "out, or give a checkpoint"
            )
        if file:
            read_class_names(Path(file))


def _common_preprocessing(config: StudyConfig, prepared: Mapping[str, Preprocessing]) -> Preprocessing:
    """How the images of given checkpoints are prepared: as each was trained, which must be the same for all.

    Raises:
        InputError: they were trained at different sizes and `model.img_size` names none, or on images prepared in
            different ways and `data.prepare_as` does not choose; it names no condition.
    """
    first, of_first = next(iter(prepared.items()))
    for name, other in prepared.items():
        if (other.height_px, other.width_px) != (of_first.height_px, of_first.width_px):
            raise InputError(
                f"condition {first} takes images of {of_first.height_px}×{of_first.width_px} px and {name} of "
                f"{other.height_px}×{other.width_px} px; to be compared they must see the same pixels: give the size "
                "for both with --model.img_size"
            )
        if other.channels != of_first.channels:
            raise InputError(
                f"condition {first} takes images of {of_first.channels} channel(s) and {name} of {other.channels}; to "
                "be compared they must see the same pixels: give checkpoints of models with the same in_chans"
            )
    chosen = config.data.prepare_as
    if chosen == "model":
        arguments = checkpoint_of(config, first).completed().arguments
        own = preprocessing_of(build_model(ModelSource(config.model.name, arguments=arguments), num_classes=2))
        return replace(own, height_px=of_first.height_px, width_px=of_first.width_px)
    if chosen and chosen not in prepared:
        raise InputError(f"data.prepare_as is {chosen!r}; expected model, or a condition ({', '.join(prepared)})")
    for name, other in prepared.items() if not chosen else ():
        if other != of_first:
            raise InputError(
                f"condition {first} was trained on images prepared as {of_first}, and {name} as {other}; to be "
                f"compared they must see the same pixels: choose with --data.prepare_as {first}, {name} or model"
            )
    return prepared[chosen or first]


def _folder(config: StudyConfig, outputs: Path, journal: Journal) -> StudyData:
    """A folder of images, and timm's (or the user's) pretrained weights with a head for its classes."""
    if config.model.name == "digits_vit":
        raise InputError(
            "digits_vit is the embedded study's model for 48×48 scenes; name a timm model with --model.name"
        )
    source = model_source(config)
    # Weights in a file are read before any picture, so that a bad file is found at once.
    looked_at = source if source.weights else replace(source, pretrained=False)
    preprocessing = preprocessing_of(build_model(looked_at, num_classes=None if source.weights else 2))
    splits = _folder_splits(config, outputs, journal, preprocessing)
    path = outputs / "checkpoints" / "pretrained.safetensors"
    classes = len(splits.class_names)
    model = dataclasses.asdict(config.model)

    def work() -> None:
        torch.manual_seed(config.data.seed)  # the head of a new task starts at random
        built = build_model(source, num_classes=classes)
        facts = {
            "model": source.name,
            "arguments": dict(source.completed().arguments),
            "num_classes": classes,
            "img_size": source.completed().img_size,
            "preprocessing": preprocessing.to_dict(),
        }
        save_checkpoint(path, built.state_dict(), facts)

    inputs = {
        "model": model,
        "preprocessing": preprocessing.to_dict(),
        "weights": digest_path(source.file) if source.file else "",
        "classes": classes,
        "version": __version__,
    }
    pretrained = journal.stage("pretrained", inputs, [path, sidecar_path(path)], work)
    return StudyData(
        splits, preprocessing, pretrained, partial(build_model, trained_here(config, path), num_classes=None)
    )


def image_kind(config: StudyConfig) -> DataKind:
    """The layout of the pictures on disk that the study names.

    Raises:
        InputError: the study names none.
    """
    if config.data.kind == "digits":
        raise InputError("data.kind is digits, which has no pictures on disk; use --data.kind folder")
    return config.data.kind


def _folder_splits(config: StudyConfig, outputs: Path, journal: Journal, preprocessing: Preprocessing) -> DataSplits:
    """The manifest of the folder, built anew when a file was added, removed or touched, and its splits."""
    path = outputs / "manifest.json"
    root = Path(config.data.root)
    inputs = {
        "kind": config.data.kind,
        "root": id_of(os.path.realpath(root)),
        "files": _listing(root, config.data.follow_links),
        "split": config.data.split,
        "seed": config.data.seed,
        "follow_links": config.data.follow_links,
        "version": __version__,
    }

    def work() -> None:
        manifest = build_manifest(
            config.data.root,
            kind=image_kind(config),
            split=config.data.split,
            seed=config.data.seed,
            follow_links=config.data.follow_links,
        )
        manifest.save(path)

    journal.stage("data", inputs, [path], work)
    cache = (config.data.cache_folder or outputs / "cache") if config.data.cache else None
    splits = prepare_folder(config.data.root, preprocessing=preprocessing, manifest=Manifest.load(path), cache=cache)
    if len(splits.test) < 2:
        raise InputError(
            f"{root} gives {len(splits.test) or 'no'} test image with split {splits.manifest.rule}, and conditions are "
            "compared over two at least; add images, or use --data.split all"
        )
    logger.info("%s takes %s", config.model.name, preprocessing)
    return splits


def _listing(root: Path, follow_links: bool) -> str:
    """Hash of the names, sizes and times of a data set's files: a change of one builds the manifest anew."""
    if not root.is_dir():
        return ""
    files = sorted(path for path in files_below(root, follow_links=follow_links) if path.is_file())
    return digest([[id_of(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files])


def _digits(config: StudyConfig, outputs: Path, journal: Journal, device: str) -> StudyData:
    """Scenes of the target task, and the backbone pretrained on the source task."""
    if config.model.name != "digits_vit":
        raise InputError(
            f"the digit scenes are 48×48 and grey, made for digits_vit; {config.model.name} needs --data.kind folder"
        )
    if config.model.arguments:
        raise InputError(
            "model.arguments are for a timm model; digits_vit is pretrained here as it is, on the digit scenes: leave "
            "them out"
        )
    path = outputs / "checkpoints" / "pretrained.safetensors"
    settings = dataclasses.asdict(config.pretrain) | {
        "data_seed": config.data.seed,
        "validation_scenes": config.data.validation_scenes,
        "test_scenes": config.data.test_scenes,
        "precision": config.train.precision,
        "deterministic": config.train.deterministic,
        "device": device,
    }

    def work() -> dict[str, Any]:
        result = pretrain_digits(checkpoint=path, **settings)
        tqdm.write(
            f"pretrained: source task, validation {result.validation_accuracy:.1%}, test {result.test_accuracy:.1%}"
        )
        return {"validation_accuracy": result.validation_accuracy, "test_accuracy": result.test_accuracy}

    pretrained = journal.stage("pretrain", settings | {"version": __version__}, [path, sidecar_path(path)], work)
    preprocessing = preprocessing_of(build_model(config.model.name, num_classes=2))
    splits = prepare_digits(
        preprocessing=preprocessing,
        seed=config.data.seed,
        train_scenes=config.data.train_scenes,
        validation_scenes=config.data.validation_scenes,
        test_scenes=config.data.test_scenes,
    )
    return StudyData(
        splits, preprocessing, pretrained, partial(build_model, trained_here(config, path), num_classes=None)
    )
