"""The state of a training run between two steps: written now and then, so that a killed run goes on to the same bits.

Everything random is a function of seed, epoch and step, so weights, the optimizer's moments and the step are all.
Two files are kept, the last state and the one before it: damage to the last costs the steps since the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from store.removal import named, put, remove
from train.checkpoint import state_digest
from train.errors import DamagedFileError
from train.whole_files import write_atomically

logger = logging.getLogger(__name__)

_IS_STATE = named(r".+\.state(\.previous)?\.safetensors")  # beside a checkpoint of ours

SAVE_SECONDS = 60.0  # between saves of the training state …
SAVE_SHARE = 0.02  # … or more where a save is slow: this share of the time at most
# An epoch's end is saved sooner than that, but not where epochs take little longer than saves: on a GPU, epochs of some
# seconds end with a state of ViT-B of 1.4 GB.
EPOCH_SAVE_SHARE = 0.1


@dataclass
class Progress:
    """Where a run stands: steps done, sums over the epoch's images so far, best accuracy, history."""

    step: int = 0
    loss_sum: float = 0.0
    hits: int = 0
    seen: int = 0
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def epochs_since_best(self) -> int:
        """Epochs since the first best one; 0 before the first."""
        scores = [entry["validation_accuracy"] for entry in self.history]
        return len(scores) - 1 - scores.index(max(scores)) if scores else 0


@dataclass
class TrainingState:
    """All that a run needs to go on: weights, moments, the best epoch's weights, their average if any."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress = field(default_factory=Progress)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    average: dict[str, torch.Tensor] = field(default_factory=dict)


def trained_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes: parameters with gradients, and buffers."""
    tensors = {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}
    return tensors | dict(module.named_buffers())


def settings_key(**settings: Any) -> str:
    """sha256 of JSON values, whatever order they are given in."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


class StateFile:
    """A training state on disk: safetensors whose header holds key, progress and a digest of it all.

    A state of another `key` (of everything the result depends on) is left aside; only the process that `writes` writes.
    """

    def __init__(self, path: Path, key: str, *, writes: bool = True) -> None:
        self.path, self.key, self.writes = path, key, writes
        self._last = time.monotonic()
        self._cost = 0.0  # seconds of the last save

    @property
    def previous(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.previous{self.path.suffix}")

    def due(self, *, epoch_ends: bool = False) -> bool:
        """Whether it is time for another save, so that saving takes 2 % of the time at most, 10 % at ends of epochs."""
        wait = max(SAVE_SECONDS, self._cost / SAVE_SHARE)
        if epoch_ends:
            wait = min(wait, self._cost / EPOCH_SAVE_SHARE)
        return self.writes and time.monotonic() - self._last >= wait

    def save(self, state: TrainingState) -> None:
        """Write the state; the last one becomes the one before, which is still there after a DiskError."""
        if not self.writes:
            return
        start = time.monotonic()
        parts = {"module": trained_tensors(state.module), "best": state.best, "average": state.average}
        tensors = {f"{part}/{name}": tensor for part, inside in parts.items() for name, tensor in inside.items()}
        for index, moments in state.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(tensor) for name, tensor in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {"key": self.key, "progress": json.dumps(asdict(state.progress))}
        content = safetensors.torch.save(tensors, metadata=header | {"digest": _digest(header, tensors)})
        if self.path.is_file():
            put(self.path, self.previous, _IS_STATE)
        write_atomically(self.path, content)
        self._last = time.monotonic()
        self._cost = self._last - start

    def restore(self, state: TrainingState) -> None:
        """Put the last sound state of this key into `state`; without one, leave it as it is, at the beginning."""
        for path, otherwise in ((self.path, "the state before it is taken"), (self.previous, "training begins again")):
            if not path.is_file():
                continue
            try:
                header, tensors = _read(path)
            except DamagedFileError as error:
                logger.warning("%s; %s", error, otherwise if self.previous.is_file() else "training begins again")
                continue
            if header["key"] != self.key:
                logger.info("training state %s is of other settings or data; training begins again", path)
                return
            _put(state, json.loads(header["progress"]), tensors)
            return

    def remove(self) -> None:
        if self.writes:
            remove(self.path, _IS_STATE)
            remove(self.previous, _IS_STATE)


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise DamagedFileError(f"training state {path} is damaged ({error})") from error
    if header.pop("digest", "") != _digest(header, tensors):
        raise DamagedFileError(f"training state {path} is damaged (its digest differs)")
    return header, tensors


def _digest(header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """Of all that a state file holds: its tensors, and the key and the progress beside them."""
    return settings_key(header=dict(header), tensors=state_digest(tensors))


def _put(state: TrainingState, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "best": {}, "average": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    trained = trained_tensors(state.module)
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(parts["module"][name])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, moment = name.partition("/")
        moments.setdefault(int(index), {})[moment] = tensor
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
    state.progress = Progress(**progress)
    state.best = {name: tensor.to(trained[name].device) for name, tensor in parts["best"].items()}
    state.average = {name: tensor.to(trained[name].device) for name, tensor in parts["average"].items()}
