"""The study's model and the checkpoints of it: from the configuration to what they are built from."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.capture import Capture
from engine.config import StudyConfig, all_metrics
from engine.study.journal import digest, digest_path
from train.adapter_files import adapter_files, holds_adapters_alone
from train.data import HeadClasses, named_classes
from train.model_source import ModelSource
from train.recipes import RECIPES
from train.training import versions


def model_source(config: StudyConfig) -> ModelSource:
    """What `[model]` says; its keys and those of a source have the same names."""
    keys = {key.name for key in dataclasses.fields(ModelSource)}
    return ModelSource(**{name: value for name, value in vars(config.model).items() if name in keys})


def with_present_name(config: StudyConfig) -> StudyConfig:
    """With timm's present name of the model, which is the one that everything the study writes records."""
    return replace(config, model=replace(config.model, name=model_source(config).name))


def given_conditions(config: StudyConfig) -> list[str]:
    """The conditions that are not trained here: checkpoints that somebody trained."""
    return [name for name, condition in config.conditions.items() if RECIPES[condition.recipe].train is None]


def reference_condition(config: StudyConfig) -> str:
    """The condition that the others are compared with: `baseline`, or else the first one named."""
    return "baseline" if "baseline" in config.conditions else next(iter(config.conditions))


def checkpoint_of(config: StudyConfig, condition: str) -> ModelSource:
    """A condition's model, where it is a checkpoint that somebody trained, or adapters of the model's weights."""
    given, source = config.conditions[condition], model_source(config)
    if not given.state and holds_adapters_alone(Path(given.checkpoint)):
        return replace(source, adapter=given.checkpoint)
    return replace(source, weights=given.checkpoint, adapter="", state=given.state or source.state)


def trained_here(config: StudyConfig, path: Path) -> ModelSource:
    """A model that this study saved: the pretrained one, or a condition's."""
    return replace(model_source(config), weights=str(path), adapter="", state="")


def captured_seeds(config: StudyConfig, condition: str) -> tuple[int, ...]:
    """Those at which a condition is captured: the first one where no seed changes attention, or nothing is trained."""
    recipe = RECIPES[config.conditions[condition].recipe]
    return config.train.seeds if recipe.train and not recipe.seed_invariant else config.train.seeds[:1]


def trained_seeds(config: StudyConfig, condition: str) -> tuple[int, ...]:
    """Those at which a condition is trained: each where each has its own images, for a readout is fitted to these."""
    return config.train.seeds if config.train.resplit else captured_seeds(config, condition)


def named_head(config: StudyConfig, outputs: int) -> HeadClasses | None:
    """The classes of the head that `[model]` comes with, where they are named; see `named_classes`."""
    source = model_source(config)
    file = None if source.adapter else source.file
    return named_classes(outputs, condition="", checkpoint=file, file=config.model.classes)


def capture_settings(config: StudyConfig, device: str) -> Capture:
    """The capture that a configuration asks for; its keys and those of `Capture` have the same names."""
    keys = vars(config.capture) | vars(config.measure) | {"metrics": all_metrics(config.measure)}
    names = {declared.name for declared in dataclasses.fields(Capture)} & keys.keys()
    return Capture(**{name: keys[name] for name in names}, device=device)


def model_info(source: ModelSource) -> dict[str, Any]:
    """Provenance of a model: its name and arguments, hash of its weights' file and which of it, and the versions."""
    source = source.completed()
    sha256 = digest_path(source.file) if source.file else ""
    info: dict[str, Any] = {"name": source.name, "weights_sha256": sha256, **versions()}
    if source.adapter:
        info["adapter_sha256"] = digest([digest_path(file) for file in adapter_files(Path(source.adapter))])
    if source.arguments:
        info["arguments"] = dict(source.arguments)
    return info | {"weights_state": source.state} if source.state else info
