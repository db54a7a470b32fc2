"""Training runs for tests: numbers by name, whichever section they stand in; nothing is augmented unless said."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from train.evaluation import Evaluation
from train.settings import ConditionConfig, TrainConfig, TrainingRun

NO_AUGMENTATION = {"flip": False, "rotation_degrees": 0.0, "color_jitter": 0.0}
_CONDITION, _RUN = ({known.name for known in dataclasses.fields(cls)} for cls in (ConditionConfig, TrainingRun))


def training_run(recipe: str = "full", seed: int = 42, **values: Any) -> TrainingRun:
    condition = {name: value for name, value in values.items() if name in _CONDITION - {"epochs"}}
    own = {name: value for name, value in values.items() if name in _RUN}
    shared = {name: value for name, value in values.items() if name not in {*condition, *own}}
    return TrainingRun(
        condition=ConditionConfig(recipe=recipe, **condition),
        shared=TrainConfig(**(NO_AUGMENTATION | shared)),
        seed=seed,
        **own,
    )


class Plain:
    """An objective of two functions."""

    def __init__(self, loss: Any, validate: Any) -> None:
        self._loss, self._validate = loss, validate

    def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        found: tuple[torch.Tensor, torch.Tensor] = self._loss(images, indices)
        return found

    def validate(self) -> Evaluation:
        found: Evaluation = self._validate()
        return found
