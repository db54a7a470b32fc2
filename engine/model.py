"""The study's model and the checkpoints of it: from the configuration to what they are built from."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.config import StudyConfig
from engine.journal import digest_path
from train.conditions import versions
from train.model_source import ModelSource

__all__ = ["checkpoint_of", "model_info", "model_source", "trained_here", "with_present_name"]


def model_source(config: StudyConfig) -> ModelSource:
    """What `[model]` says; its keys and those of a source have the same names.

    Raises:
        InputError: timm has no such model.
    """
    keys = {key.name for key in dataclasses.fields(ModelSource)}
    return ModelSource(**{name: value for name, value in vars(config.model).items() if name in keys})


def with_present_name(config: StudyConfig) -> StudyConfig:
    """With timm's present name of the model, which is the one that everything the study writes records.

    Raises:
        InputError: timm has no such model.
    """
    return replace(config, model=replace(config.model, name=model_source(config).name))


def checkpoint_of(config: StudyConfig, condition: str) -> ModelSource:
    """A condition's model, where it is a checkpoint that somebody trained."""
    given = config.conditions[condition]
    return replace(model_source(config), weights=given.checkpoint, state=given.state or config.model.state)


def trained_here(config: StudyConfig, path: Path) -> ModelSource:
    """A model that this study saved: the pretrained one, or a condition's."""
    return replace(model_source(config), weights=str(path), state="")


def model_info(source: ModelSource) -> dict[str, Any]:
    """Provenance of a model: its name and arguments, hash of its weights' file and which of it, and the versions."""
    source = source.completed()
    sha256 = digest_path(source.file) if source.file else ""
    info: dict[str, Any] = {"name": source.name, "weights_sha256": sha256, **versions()}
    if source.arguments:
        info["arguments"] = dict(source.arguments)
    return info | {"weights_state": source.state} if source.state else info
