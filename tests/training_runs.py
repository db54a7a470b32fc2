"""Training runs for tests: numbers by name, whichever section they stand in; nothing is augmented unless said."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import train.loop
import train.state
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


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Inside, training saves its state at every step, and is interrupted before this one."""
    real = train.loop.learning_rate

    def interrupt(number: int, *rest: Any) -> float:
        if number == step:
            raise KeyboardInterrupt
        return real(number, *rest)

    monkeypatch.setattr(train.state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(train.state, "SAVE_SHARE", 1e9)
    with monkeypatch.context() as patch:
        patch.setattr(train.loop, "learning_rate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            yield
