"""One training loop for every condition and for pretraining: resumable, and the same bits every time.

Everything random is a pure function of (seed, epoch) or (seed, step): the data order, augmentation
and dropout. So a run that was killed goes on to the weights of a run that was not.

On a GPU nothing in a step waits for it: a step's loss is looked at while the next one runs, and before anything is
kept: an epoch's end and every saved state come after all steps before them were found finite.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from train.compiled import compiled_blocks
from train.data import ImageSet, read_ahead
from train.errors import TrainingDivergedError
from train.evaluation import Evaluation
from train.parallel import SINGLE, Workers
from train.precision import forward_precision
from train.settings import TrainingRun
from train.state import StateFile, TrainingState, trained_tensors
from train.transfer import HostCopy, downloaded, pinned, uploaded

logger = logging.getLogger(__name__)

# Steps launched before the loss of the first of them is looked at: one keeps a GPU busy meanwhile.
LOOK_LATER = {"cpu": 0, "cuda": 1}


class Objective(Protocol):
    """What a run is trained for, and how well it does."""

    def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss and logits [image, class] of images and their indices in the training split."""

    def validate(self) -> Evaluation:
        """On the validation split, after each epoch; the first epoch of the best accuracy is kept."""


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch's images, int64 [image]: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch, 0]).permutation(count)


def learning_rate(step: int, steps: int, peak: float, warmup_fraction: float) -> float:
    """The rate of step 0 … steps − 1: linear up to the peak, then a cosine down to 0."""
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    *,
    train: ImageSet,
    run: TrainingRun,
    state_file: StateFile,
    device: torch.device,
    on_epoch: Callable[[Sequence[dict[str, Any]]], None] | None = None,
    workers: Workers = SINGLE,
    label: str = "training",
) -> list[dict[str, Any]]:
    """Train to the end and leave the weights of the best epoch in `module`.

    At ends of epochs, and about every minute, the state goes to `state_file`; a later call with the same
    key goes on from there. The caller removes the file once the result is saved.

    The last batch of an epoch may be smaller. With `accumulate` the result is the same up to rounding. Early on the
    decay of a moving average is (1 + step) / (10 + step) if that is less, so that the start is forgotten.

    `module` is all that is trained; its parameters without gradients are taken to be as at the start. The optimizer's
    groups may have `lr_scale`. `on_epoch` gets the history so far, after each epoch and when a run goes on; what it
    raises ends the run. The precision of `run` is decided. Returns one dict per epoch: epoch, loss, train_accuracy,
    validation_loss, validation_accuracy, lr (the last step's).
    """
    shared = run.shared
    steps_per_epoch = math.ceil(len(train) / shared.batch_size)
    steps = steps_per_epoch * run.epochs
    augmentation = run.augmentation
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    state = TrainingState(module, optimizer)
    state_file.restore(state)
    progress = state.progress
    if progress.step:
        logger.info("%s: going on at step %d of %d", label, progress.step, steps)
    if shared.ema_decay and not state.average:
        state.average = {name: tensor.clone() for name, tensor in trained_tensors(module).items()}
    if on_epoch is not None and progress.history:
        on_epoch(progress.history)
    _train_mode(module)
    launched: deque[_Step] = deque()  # not looked at yet
    later = LOOK_LATER[device.type]

    def read(planned: tuple[int, np.ndarray]) -> torch.Tensor:
        batch = planned[1]
        indices = workers.share(batch)
        # A worker without a part of a small last batch reads a picture that it does not use.
        return pinned(train.pixels(indices if len(indices) else batch[:1]), device)

    def look(at: _Step) -> None:
        value, hits, gradient_norm = at.numbers.wait().tolist()
        if not (math.isfinite(value) and math.isfinite(gradient_norm)):
            raise TrainingDivergedError(
                f"{label}: loss {value:g} and gradient norm {gradient_norm:g} at step {at.step} (epoch {at.epoch}, "
                f"images {', '.join(train.ids[int(i)] for i in at.indices[:3])}, …); {_ADVICE}"
            )
        progress.loss_sum += value * at.count
        progress.hits += round(hits)
        progress.seen += at.count
        bar.update(at.count)

    bar = tqdm(
        total=run.epochs * len(train),
        initial=progress.step // steps_per_epoch * len(train) + progress.seen,
        desc=label,
        unit=" images",
        disable=None if workers.first else True,
    )
    plan = _plan(run, len(train), progress.step)
    with (
        bar,
        contextlib.closing(read_ahead(read, plan)) as batches,
        compiled_blocks(module, shared.compile == "on") as blocks,
    ):
        while progress.step < steps and not (0 < shared.patience <= progress.epochs_since_best()):
            (step, batch), pixels = next(batches)
            count, indices = len(batch), workers.share(batch)
            epoch = step // steps_per_epoch
            rate = learning_rate(step, steps, run.condition.lr, shared.warmup_fraction)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("lr_scale", 1.0)
            entropy = [run.seed, step, 2, *([workers.rank] if workers.rank else [])]
            torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))  # dropout, stochastic depth
            optimizer.zero_grad(set_to_none=True)
            blocks.use(count == shared.batch_size)
            tally = torch.zeros(2, device=device, dtype=torch.float64)  # mean loss, hits
            for place in _parts(len(indices), shared.accumulate):
                chosen = indices[place]
                scaled = augmentation.apply(
                    pixels[place].to(device, non_blocking=True).float().div_(255),
                    seed=run.seed,
                    epoch=epoch,
                    indices=chosen,
                )
                with forward_precision(shared.precision, device):
                    loss, logits = objective.loss(train.preprocessing.normalize(scaled), chosen)
                share = len(chosen) / count
                (loss * share).backward()
                labels = uploaded(torch.from_numpy(train.labels[chosen]), device)
                tally += torch.stack([loss.detach().double() * share, (logits.argmax(dim=1) == labels).sum().double()])
            workers.sum_gradients(trained)
            norm = nn.utils.clip_grad_norm_(trained, shared.clip_norm or math.inf)
            numbers = torch.cat([workers.add_up(tally), norm.detach().double().view(1)])
            launched.append(_Step(step, epoch, count, indices, downloaded(numbers)))
            while len(launched) > later:
                look(launched.popleft())
            optimizer.step()
            if shared.ema_decay:
                _average(state, min(shared.ema_decay, (1 + step) / (10 + step)))

            progress.step = step + 1
            ends = progress.step % steps_per_epoch == 0
            saves = state_file.due(epoch_ends=ends)
            while launched and (ends or saves):
                look(launched.popleft())
            if ends:
                blocks.use(False)
                with _averaged(state):
                    evaluation = objective.validate()
                    _train_mode(module)
                    _end_epoch(state, evaluation, epoch, rate, label)
                bar.set_postfix(validation=f"{evaluation.accuracy:.3f}")
            if saves:
                state_file.save(state)
            if ends and on_epoch is not None:
                on_epoch(progress.history)
    _copy(state.best, module)
    return progress.history


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was launched: its images of all workers and of this one, and its loss, hits and gradient norm."""

    step: int
    epoch: int
    count: int
    indices: np.ndarray
    numbers: HostCopy


_ADVICE = "lower the learning rate, or train with --train.precision fp32"


def _end_epoch(state: TrainingState, evaluation: Evaluation, epoch: int, rate: float, label: str) -> None:
    """The epoch into the history, and its weights kept when it is the best so far."""
    progress = state.progress
    if not math.isfinite(evaluation.loss):
        raise TrainingDivergedError(
            f"{label}: validation loss {evaluation.loss:g} after step {progress.step - 1} (epoch {epoch}); {_ADVICE}"
        )
    progress.history.append(
        {
            "epoch": epoch,
            "loss": progress.loss_sum / progress.seen,
            "train_accuracy": progress.hits / progress.seen,
            "validation_loss": evaluation.loss,
            "validation_accuracy": evaluation.accuracy,
            "lr": rate,
        }
    )
    if evaluation.accuracy > progress.best:
        progress.best = evaluation.accuracy
        state.best = {name: tensor.clone() for name, tensor in trained_tensors(state.module).items()}
    progress.loss_sum, progress.hits, progress.seen = 0.0, 0, 0


def _train_mode(module: nn.Module) -> None:
    """Training mode, except of batch norms whose weights are frozen: their statistics stay as they are, too."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not any(p.requires_grad for p in layer.parameters()):
            layer.eval()


@torch.no_grad()
def _average(state: TrainingState, decay: float) -> None:
    for name, tensor in trained_tensors(state.module).items():
        if tensor.is_floating_point():
            state.average[name].lerp_(tensor, 1 - decay)
        else:
            state.average[name].copy_(tensor)


@contextlib.contextmanager
def _averaged(state: TrainingState) -> Iterator[None]:
    """The module with the average of its weights, where there is one, and with its own again after it."""
    if not state.average:
        yield
        return
    before = {name: tensor.clone() for name, tensor in trained_tensors(state.module).items()}
    try:
        _copy(state.average, state.module)
        yield
    finally:
        _copy(before, state.module)


@torch.no_grad()
def _copy(tensors: dict[str, torch.Tensor], module: nn.Module) -> None:
    for name, tensor in trained_tensors(module).items():
        tensor.copy_(tensors[name])


def _parts(count: int, parts: int) -> list[slice]:
    """`count` images in at most `parts` slices of nearly the same length; none of none."""
    edges = np.linspace(0, count, min(parts, count) + 1).round().astype(int)
    return [slice(int(start), int(end)) for start, end in itertools.pairwise(edges)]


def _plan(run: TrainingRun, count: int, first_step: int) -> Iterator[tuple[int, np.ndarray]]:
    """(step, indices of its images) from `first_step` to the end, of `count` images."""
    size = run.shared.batch_size
    steps = math.ceil(count / size)  # of an epoch
    for epoch in range(first_step // steps, run.epochs):
        order = epoch_order(run.seed, epoch, count)
        for step in range(max(first_step, epoch * steps), (epoch + 1) * steps):
            place = step - epoch * steps
            yield step, order[place * size : (place + 1) * size]
