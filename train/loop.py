"""One training loop for every condition and for pretraining: resumable, and the same bits every time.

Everything random is a pure function of (seed, epoch) or (seed, step): the data order, augmentation
and dropout. So a state file needs the weights, the optimizer's moments and the step, and a run that
was killed goes on to the weights of a run that was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from train.augment import Augmentation
from train.checkpoint import state_digest, write_atomically
from train.data import ImageSet
from train.errors import TrainingDivergedError

__all__ = [
    "Schedule",
    "accuracy",
    "epoch_order",
    "fit",
    "forward_precision",
    "learning_rate",
    "resolve_precision",
    "training_mode",
]

logger = logging.getLogger(__name__)

SAVE_SECONDS = 20.0  # between saves of the training state …
SAVE_SHARE = 0.05  # … or more where a save is slow: this share of the time at most

LossFunction = Callable[[torch.Tensor, np.ndarray], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Args:
        epochs: passes over the training images.
        batch_size: images a step; the last batch of an epoch may be smaller.
        lr: peak learning rate, times `lr_scale` of a parameter group.
        warmup_fraction: share of the steps in linear warm-up; cosine to 0 after it.
        clip_norm: gradient norm above which gradients are scaled down; 0: never.
        precision: "bf16" (autocast) or "fp32".
        seed: of data order, augmentation and dropout.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    precision: str = "fp32"
    seed: int = 42


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's images, int64 [image]: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """The rate of step 0 … steps − 1: linear up to the peak, then a cosine down to 0."""
    warmup = max(1, round(steps * schedule.warmup_fraction))
    if step < warmup:
        return schedule.lr * (step + 1) / warmup
    return schedule.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` → "bf16" where the device multiplies it in hardware, else "fp32"; others as they are."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if _cpu_multiplies_bf16() else "fp32"


def _cpu_multiplies_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux: no way to ask that every torch ≥ 2.10 has
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def forward_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def training_mode(
    model: nn.Module, device: torch.device, *, precision: str, deterministic: bool, threads: int = 0
) -> Iterator[None]:
    """What holds during training alone and is put back after it.

    In bf16 on a CPU attention runs in separate operations: forward and backward are 2.4 times as fast as
    with the fused kernel at 65 tokens and 1.4 times at 197 (ViT-S/16); in fp32 the two are alike. Everywhere:
    deterministic algorithms on request, `threads` of torch's (0: as many as it has), and the caller's random
    state untouched. (Flushing denormal numbers
    to zero made no difference to the speed, and would depend on which threads exist when it is set.)
    """
    separate = device.type == "cpu" and precision == "bf16"
    fused = [module for module in model.modules() if separate and getattr(module, "fused_attn", False) is True]
    before, had_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            for module in fused:
                cast(Any, module).fused_attn = False
            torch.set_num_threads(threads or had_threads)
            torch.use_deterministic_algorithms(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
        finally:
            for module in fused:
                cast(Any, module).fused_attn = True
            torch.set_num_threads(had_threads)
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@torch.no_grad()
def accuracy(
    model: nn.Module, images: ImageSet, device: torch.device, *, precision: str = "fp32", batch_size: int = 256
) -> float:
    """Share of images whose largest logit is their label."""
    training = model.training
    model.eval()
    hits = 0
    for start in range(0, len(images), batch_size):
        indices = np.arange(start, min(start + batch_size, len(images)))
        with forward_precision(precision, device):
            logits = model(images.batch(indices).to(device))
        hits += int((logits.argmax(dim=1).cpu().numpy() == images.labels[indices]).sum())
    model.train(training)
    return hits / len(images)


@dataclass
class _Progress:
    """Where a run stands, besides the tensors."""

    step: int = 0  # steps done
    loss_sum: float = 0.0  # over the images of this epoch
    hits: int = 0
    seen: int = 0
    best: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: LossFunction,
    *,
    train: ImageSet,
    validate: Callable[[], float],
    schedule: Schedule,
    state_path: Path,
    key: str,
    device: torch.device,
    augmentation: Augmentation | None = None,
    label: str = "training",
) -> list[dict[str, Any]]:
    """Train to the end and leave the weights of the best epoch in `module`.

    Every epoch, and about every 20 seconds, the state goes to `state_path`; a later call with the same
    `key` goes on from there. The caller removes the file once the result is saved.

    Args:
        module: all that is trained; its parameters without gradients are taken to be as at the start.
        optimizer: groups may have `lr_scale`.
        loss_of: (images, indices into `train`) → mean loss, logits [image, class].
        validate: accuracy on the validation split, after each epoch; the first best epoch is kept.
        key: of everything the result depends on; a state of another key is left aside.

    Returns:
        One dict an epoch: epoch, loss, train_accuracy, validation_accuracy, lr (the last step's).

    Raises:
        TrainingDivergedError: a loss or gradient that is NaN or infinite, with its step.
    """
    steps_per_epoch = math.ceil(len(train) / schedule.batch_size)
    steps = steps_per_epoch * schedule.epochs
    augmentation = augmentation or Augmentation()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    progress, best = _load_state(state_path, key, module, optimizer)
    if progress.step:
        logger.info("%s: going on at step %d of %d", label, progress.step, steps)
    module.train()
    bar = tqdm(
        total=steps * schedule.batch_size,
        initial=progress.step * schedule.batch_size,
        desc=label,
        unit=" images",
        disable=None,
    )
    saver = _Saver(state_path, key, module, optimizer)
    with bar:
        for step, indices, pixels in _batches(train, schedule, progress.step, steps_per_epoch):
            epoch = step // steps_per_epoch
            scaled = augmentation.apply(
                pixels.to(device, non_blocking=True).float() / 255, seed=schedule.seed, epoch=epoch, indices=indices
            )
            rate = learning_rate(step, steps, schedule)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            torch.manual_seed(_step_seed(schedule.seed, step))  # dropout and stochastic depth
            with forward_precision(schedule.precision, device):
                loss, logits = loss_of(train.preprocessing.normalize(scaled), indices)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained, schedule.clip_norm or math.inf)
            value = loss.item()
            if not (math.isfinite(value) and math.isfinite(norm.item())):
                raise TrainingDivergedError(
                    f"{label}: loss {value:g} and gradient norm {norm.item():g} at step {step} (epoch {epoch}, images "
                    f"{', '.join(train.ids[int(i)] for i in indices[:3])}, …); lower the learning rate, or train with "
                    "--train.precision fp32"
                )
            optimizer.step()

            progress.step = step + 1
            progress.loss_sum += value * len(indices)
            progress.hits += int((logits.detach().argmax(dim=1).cpu().numpy() == train.labels[indices]).sum())
            progress.seen += len(indices)
            bar.update(len(indices))
            if progress.step % steps_per_epoch == 0:
                score = validate()
                module.train()
                progress.history.append(
                    {
                        "epoch": epoch,
                        "loss": progress.loss_sum / progress.seen,
                        "train_accuracy": progress.hits / progress.seen,
                        "validation_accuracy": score,
                        "lr": rate,
                    }
                )
                bar.set_postfix(validation=f"{score:.3f}")
                if score > progress.best:
                    progress.best = score
                    best = {name: tensor.clone() for name, tensor in _trained_state(module).items()}
                progress.loss_sum, progress.hits, progress.seen = 0.0, 0, 0
                saver.save(progress, best)
            elif saver.due():
                saver.save(progress, best)
    with torch.no_grad():
        for name, tensor in _trained_state(module).items():
            tensor.copy_(best[name])
    return progress.history


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step, 2]).generate_state(1)[0])


def _batches(
    train: ImageSet, schedule: Schedule, first_step: int, steps_per_epoch: int
) -> Iterator[tuple[int, np.ndarray, torch.Tensor]]:
    """(step, indices, pixels) from `first_step` to the end, the next batch read while this one is used."""

    def plan() -> Iterator[tuple[int, np.ndarray]]:
        for epoch in range(first_step // steps_per_epoch, schedule.epochs):
            order = epoch_order(schedule.seed, epoch, len(train))
            for place in range(steps_per_epoch):
                step = epoch * steps_per_epoch + place
                if step >= first_step:
                    yield step, order[place * schedule.batch_size : (place + 1) * schedule.batch_size]

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        waiting = None
        for step, indices in plan():
            coming = (step, indices, pool.submit(train.pixels, indices))
            if waiting is not None:
                yield waiting[0], waiting[1], waiting[2].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1], waiting[2].result()


def _trained_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes: parameters with gradients, and buffers."""
    tensors = {name: parameter.data for name, parameter in module.named_parameters() if parameter.requires_grad}
    return tensors | dict(module.named_buffers())


class _Saver:
    """Writes the training state: one safetensors file whose header holds key, progress and a digest of the tensors."""

    def __init__(self, path: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.path, self.key, self.module, self.optimizer = path, key, module, optimizer
        self._last = time.monotonic()
        self._wait = SAVE_SECONDS

    def due(self) -> bool:
        return time.monotonic() - self._last >= self._wait

    def save(self, progress: _Progress, best: Mapping[str, torch.Tensor]) -> None:
        from safetensors.torch import save

        start = time.monotonic()
        tensors = {f"module/{name}": tensor for name, tensor in _trained_state(self.module).items()}
        tensors |= {f"best/{name}": tensor for name, tensor in best.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(tensor) for name, tensor in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        header = {"key": self.key, "progress": json.dumps(vars(progress)), "tensors": state_digest(tensors)}
        write_atomically(self.path, save(tensors, metadata=header))
        self._last = time.monotonic()
        self._wait = max(SAVE_SECONDS, (self._last - start) / SAVE_SHARE)


def _load_state(
    path: Path, key: str, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[_Progress, dict[str, torch.Tensor]]:
    """The state of an interrupted run with this key, put into module and optimizer; or the beginning."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return _Progress(), {}
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        logger.warning("training state %s is damaged (%s); training begins anew", path, error)
        return _Progress(), {}
    if header.get("tensors") != state_digest(tensors):
        logger.warning("training state %s is damaged (its digest differs); training begins anew", path)
        return _Progress(), {}
    if header.get("key") != key:
        logger.info("training state %s is of other settings or data; training begins anew", path)
        return _Progress(), {}
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "best": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    with torch.no_grad():
        for name, tensor in _trained_state(module).items():
            tensor.copy_(parts["module"][name])
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, moment = name.partition("/")
        moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    return _Progress(**json.loads(header["progress"])), parts["best"]


def settings_key(**settings: Any) -> str:
    """sha256 of JSON values, whatever order they are given in."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
