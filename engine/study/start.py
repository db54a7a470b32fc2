"""What a study starts from, looked at before anything is written: its models and the files of its data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from engine import __version__
from engine.config import StudyConfig
from engine.statistics import HeadPairing
from engine.study.head_pairing import Weights, head_pairing, weights_of
from engine.study.journal import Journal, digest
from engine.study.model import checkpoint_of, given_conditions, model_source, reference_condition
from train.data import (
    CLASS_NAMES,
    HeadClasses,
    Listing,
    Manifest,
    Preprocessing,
    check_shared_names,
    files_below,
    folder_classes,
    list_files,
    named_classes,
    read_class_names,
)
from train.errors import InputError
from train.files import id_of
from train.model_source import ModelSource
from train.models import build_model, preprocessing_of
from train.parallel import SINGLE, Workers


class Start:
    """What a study starts from, looked at before anything is written: its models and the files of its data set.

    `listed` are the files of a folder, each taken for a readable picture; None for scenes, which are composed.
    """

    def __init__(self, config: StudyConfig, outputs: Path, journal: Journal, workers: Workers = SINGLE) -> None:
        """List the data set's files, and load every checkpoint that is given."""
        _check_conditions(config)
        _check_class_files(config)
        self.config, self.outputs, self.journal, self.workers = config, outputs, journal, workers
        self.manifest_path = outputs / "manifest.json"
        self.pretrained_path = outputs / "checkpoints" / "pretrained.safetensors"
        self.sweep_probe_path = self.pretrained_path.with_name("sweep_probe.safetensors")
        self._outputs_of: dict[str, int] = {}
        self._named: dict[str, HeadClasses | None] = {}
        self._attention: dict[str, Weights] = {}
        self._model: torch.nn.Module | None = None
        # Weights in a file are read before any picture, so that a bad file is found at once.
        given = given_conditions(config)
        prepared = self._load_given() if given else {}
        self._listing = None if config.data.kind == "digits" else list_images(config)
        self.listed = None if self._listing is None else self._listing.undecoded()
        if given:
            self.preprocessing = _common_preprocessing(config, prepared)
        else:
            self._model = model = self._build_trained()
            self.preprocessing = preprocessing_of(model)

    def take_model(self) -> torch.nn.Module:
        """One of the study's models as it is before any training, one with a head if there is one; given once."""
        model, self._model = self._model, None
        assert model is not None, "the model was taken before"
        return model

    @property
    def cache_folder(self) -> Path | None:
        """Where decoded pictures are kept, if they are."""
        data = self.config.data
        return (Path(data.cache_folder) if data.cache_folder else self.outputs / "cache") if data.cache else None

    @cached_property
    def data_inputs(self) -> dict[str, Any]:
        """What the manifest depends on: a file that was added, removed or touched is seen by its size and time."""
        root, data = Path(self.config.data.root), self.config.data
        files = sorted(path for path in files_below(root, follow_links=data.follow_links) if path.is_file())
        listing = [[id_of(path.relative_to(root)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return {
            "kind": data.kind,
            "root": id_of(os.path.realpath(root)),
            "files": digest(listing),
            "split": data.split,
            "seed": data.seed,
            "follow_links": data.follow_links,
            "version": __version__,
        }

    @cached_property
    def manifest(self) -> Manifest:
        """Every file of the folder, decoded once: as an earlier run recorded it, or now."""
        if self.journal.done("data", self.data_inputs, [self.manifest_path]) is not None:
            return Manifest.load(self.manifest_path)
        assert self._listing is not None, "scenes have no files"
        return self._listing.decoded()

    def heads(self, class_names: Sequence[str]) -> dict[str, HeadClasses]:
        """Condition → the classes of its head, where checkpoints are given; its names must be of the data set's."""
        order = self.config.data.class_order
        heads = {
            name: found or folder_classes(self._outputs_of[name], class_names, order, f"conditions.{name}.classes")
            for name, found in self._named.items()
        }
        for name, head in heads.items():
            check_shared_names(head, class_names, self.config.conditions[name].classes or self.config.model.classes)
        return heads

    def head_pairing(self, sites: Sequence[str]) -> dict[str, HeadPairing]:
        """Given checkpoint → whether its heads in these layers are paired with those of the reference condition."""
        against = reference_condition(self.config)
        others = [name for name in self._attention if name != against]
        return {name: head_pairing(name, against, self._attention, sites) for name in others}

    def _load_given(self) -> dict[str, Preprocessing]:
        """Condition → how its checkpoint's images are prepared; one of the models is kept for the checks."""
        prepared: dict[str, Preprocessing] = {}
        for name, condition in self.config.conditions.items():
            file = condition.classes or self.config.model.classes
            try:
                model = build_model(checkpoint_of(self.config, name), num_classes=None)
            except InputError as error:
                raise type(error)(f"condition {name}: {error}") from error
            prepared[name], self._attention[name] = preprocessing_of(model), weights_of(model)
            outputs = self._outputs_of[name] = int(cast(Any, model).num_classes)
            path = Path(condition.checkpoint)
            self._named[name] = named_classes(outputs, condition=name, checkpoint=path, file=file)
            if self._model is None or (outputs and not cast(Any, self._model).num_classes):
                self._model = model
        return prepared

    def _build_trained(self) -> torch.nn.Module:
        """The model that conditions are trained from, with a head for the classes of the data set."""
        source = model_source(self.config)
        classes = len(CLASS_NAMES if self.listed is None else self.listed.class_names)
        # timm's weights are looked for as long as the study has not saved them; on digit scenes it pretrains its own.
        looked_for = source.pretrained and self.listed is not None and not self.pretrained_path.is_file()
        return build_model(replace(source, pretrained=looked_for), num_classes=classes)


def _check_conditions(config: StudyConfig) -> None:
    """Whether the conditions go together, with each other and with the data."""
    given = given_conditions(config)
    if given and len(given) < len(config.conditions):
        other = next(name for name in config.conditions if name not in given)
        raise InputError(
            f"condition {given[0]} is a given checkpoint and {other} is trained here; their starting points cannot be "
            "known to be the same, so train all conditions or give all as checkpoints"
        )
    for name in given:
        if not config.conditions[name].checkpoint:
            raise InputError(f"condition {name} names no file; give conditions.{name}.checkpoint")
    if given:
        image_kind(config)
        _check_use(config)
        if config.train.resplit:
            raise InputError(
                "train.resplit is true, and the conditions are given as checkpoints, which are trained on no images "
                "here; leave it out"
            )
        return
    if config.data.prepare_as:
        raise InputError(
            "data.prepare_as is for given checkpoints; conditions that are trained here share their images"
        )
    embedded = config.model.name == "digits_vit"
    if config.data.kind != "digits" and embedded:
        raise InputError(
            "digits_vit is the embedded study's model for 48×48 scenes; name a timm model with --model.name"
        )
    if config.data.kind == "digits" and not embedded:
        raise InputError(
            f"the digit scenes are 48×48 and grey, made for digits_vit; {config.model.name} needs --data.kind folder"
        )
    if config.data.kind == "digits" and config.model.arguments:
        raise InputError(
            "model.arguments are for a timm model; digits_vit is pretrained here as it is, on the digit scenes: leave "
            "them out"
        )


def _check_use(config: StudyConfig) -> None:
    """Whether a model that is named beside given checkpoints is part of one of them: nothing else would use it."""
    if config.model.adapter:
        raise InputError(
            f"model.adapter is {config.model.adapter}, and the conditions are given as checkpoints, which it is not "
            "merged into; give the adapters as a condition's checkpoint, and with --model.weights what they were "
            "trained on"
        )
    if config.model.weights and not any(checkpoint_of(config, name).adapter for name in config.conditions):
        raise InputError(
            f"model.weights is {config.model.weights}, and the conditions are given as checkpoints of whole models, "
            "which make no use of it; leave it out, or give a condition's checkpoint as adapters of these weights"
        )


def _check_class_files(config: StudyConfig) -> None:
    """Read every file of class names, before anything is loaded."""
    given = given_conditions(config)
    for name, condition in config.conditions.items():
        file = condition.classes or config.model.classes
        if file and name not in given:
            raise InputError(
                f"class names {file} are given, but condition {name} is trained here, on the class folders; leave them "
                "out, or give a checkpoint"
            )
        if file:
            read_class_names(Path(file))


def _common_preprocessing(config: StudyConfig, prepared: Mapping[str, Preprocessing]) -> Preprocessing:
    """How the images of given checkpoints are prepared: as each was trained, which must be the same for all."""
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
        usual = preprocessing_of(build_model(ModelSource(config.model.name, arguments=arguments), num_classes=2))
        return replace(usual, height_px=of_first.height_px, width_px=of_first.width_px)
    if chosen and chosen not in prepared:
        raise InputError(f"data.prepare_as is {chosen!r}; expected model, or a condition ({', '.join(prepared)})")
    for name, other in prepared.items() if not chosen else ():
        if other != of_first:
            raise InputError(
                f"condition {first} was trained on images prepared as {of_first}, and {name} as {other}; to be "
                f"compared they must see the same pixels: choose with --data.prepare_as {first}, {name} or model"
            )
    return prepared[chosen or first]


def image_kind(config: StudyConfig) -> str:
    """The layout of the pictures on disk that the study names; raises InputError where it names none."""
    if config.data.kind == "digits":
        raise InputError("data.kind is digits, which has no pictures on disk; use --data.kind folder")
    return config.data.kind


def list_images(config: StudyConfig) -> Listing:
    """The pictures on disk that the study names, not opened yet."""
    data = config.data
    return list_files(
        data.root, kind=image_kind(config), split=data.split, seed=data.seed, follow_links=data.follow_links
    )
