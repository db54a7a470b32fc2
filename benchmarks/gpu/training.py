"""Training of ViT-B/16 as the recipe `full` does it, and the time of a whole study of Indoor-67's size from it.

`measure`: as `train` does it by default. `measure_compiled`: with `train.compile`. `measure_variants`: what determinism
costs. `measure_whole`: the whole model compiled, which takes a minute to begin.
"""

from __future__ import annotations

import copy
import cProfile
import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.host_time import call_rows, parts
from benchmarks.gpu.pictures import Pictures, vit
from benchmarks.gpu.profiles import Profile
from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import device_of
from engine.capture import Capture, capture_to_store
from engine.statistics import compare_paired
from train.checkpoint import state_digest
from train.choices import Compile, Precision
from train.data.images import ImageSet
from train.evaluation import Evaluation, evaluate
from train.loop import fit
from train.precision import training_mode
from train.probe import cached_features, fit_classifier
from train.recipes import layerwise_groups
from train.settings import ConditionConfig, TrainConfig, TrainingRun
from train.state import EPOCH_SAVE_SHARE, SAVE_SECONDS, StateFile, TrainingState
from train.transfer import uploaded
from train.whole_files import write_atomically

__all__ = ["measure", "measure_compiled", "measure_variants", "measure_whole"]

# The study: Indoor-67, 15,620 images split 70/15/15.
TRAIN_IMAGES, TEST_IMAGES, EPOCHS, CLASSES = 10_934, 2_343, 30, 67
# Products and sums of one image's forward pass, in FLOP: blocks (projections, MLP, attention), patch embedding.
FORWARD_FLOP = 12 * (24 * 197 * 768**2 + 4 * 197**2 * 768) + 2 * 196 * 768 * 768
STEPS = 20  # that are timed, after as many that are not


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of running the training that `train` does."""

    batch: int = 128
    compiled: str = ""  # "blocks", as `train.compile` does it, "graphs", these as CUDA graphs, or "model"
    deterministic: bool = True
    attention: SDPBackend | None = None  # None: torch's choice

    def __str__(self) -> str:
        parts = (
            f"batch {self.batch}",
            f"{self.compiled} compiled" if self.compiled else "",
            "" if self.deterministic else "not deterministic",
            "" if self.attention is None else self.attention.name.lower().replace("_", " "),
        )
        return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Timing:
    """Seconds of the timed steps, what the steps before them took more, and what they came to."""

    seconds: float
    beginning: float
    peak_bytes: int
    loss: float
    digest: str  # of the trained weights


def measure(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    yield _row(small, ceilings, Variant())[0]
    default = _row(small, ceilings, Variant(batch=TrainConfig().batch_size))[0]
    yield default
    device, precision = device_of(small), _precision(small)
    yield from call_rows(device)
    yield _host_row(small, Variant(batch=2))  # which leaves the device little to do
    yield (save := _save_row(small, device))
    size, batch, images = (64, 4, 8) if small else (224, 128, 1280)
    pictures, model = _pictures(images, size), _model(small, device)
    with training_mode(model, device, precision=precision, deterministic=True):
        evaluation = _rate(lambda: evaluate(model, pictures, device, precision=precision), images)
        final = _rate(lambda: evaluate(model, pictures, device), images)
        features = _rate(lambda: cached_features(model, pictures, device).sum().item(), images)
        fitting = _fit_seconds(80 if small else TRAIN_IMAGES, device)
    yield Row(name=f"evaluation, {precision}, as after each epoch", value=evaluation, unit="images/s")
    bound = "bound by float32 products, which tensor cores do not do"
    yield Row(name="evaluation, fp32, as at the end", value=final, unit="images/s", note=bound)
    yield Row(name="probe's features, fp32", value=features, unit="images/s", note=bound)
    yield Row(name="probe's fit", value=fitting, unit="s", note="features of classes that overlap")
    captured = _capture_rate(model, pictures, device, batch)
    yield Row(name="capture, metrics sink, fp32 model", value=captured, unit="images/s", note=bound)
    tests = _statistics_seconds(8 if small else TEST_IMAGES, 99 if small else 9999)
    yield Row(name="statistics of one comparison", value=tests, unit="s")
    epoch = TRAIN_IMAGES / default.value + TEST_IMAGES / evaluation
    parts = {
        "train finetuned, not compiled": EPOCHS * TRAIN_IMAGES / default.value,
        "validate": EPOCHS * TEST_IMAGES / evaluation,
        "save its state": _saves(epoch, save.value) * save.value,
        "baseline's features": (TRAIN_IMAGES + TEST_IMAGES) / features,
        "its fit": fitting,
        "look at both at the end": 4 * TEST_IMAGES / final,
        "capture and measure both": 2 * TEST_IMAGES / captured,
        "test": tests,
    }
    yield Row(
        name=f"a study of {TRAIN_IMAGES:,} training images, {EPOCHS} epochs, batch {TrainConfig().batch_size}",
        value=sum(parts.values()) / 60,
        unit="min",
        note="extrapolated, decoding and the report's pages apart: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()),
    )


def measure_compiled(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """With the blocks compiled, at two sizes of a batch; and the same bits twice? As CUDA graphs, too."""
    variant = Variant(compiled="" if small else "blocks")
    row, timing = _row(small, ceilings, variant)
    yield row
    yield _again_row(small, variant, timing)
    yield from _profiled(small, variant).rows("training compiled")
    default = replace(variant, batch=TrainConfig().batch_size)
    row, timing = _row(small, ceilings, default)
    yield row
    yield Row(
        name=f"train finetuned of a study, {default}",
        value=max(0.0, timing.beginning) + EPOCHS * TRAIN_IMAGES / row.value,
        unit="s",
        note="to begin and all steps, extrapolated",
    )
    if not small:
        yield _graphs_row(ceilings, replace(default, compiled="graphs"))


def measure_variants(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """What determinism costs."""
    yield _again_row(small, Variant(), _timing(small, Variant()))
    free = Variant(deterministic=False)
    yield _row(small, ceilings, free)[0]
    if not small:
        for attention in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            yield _row(small, ceilings, replace(free, attention=attention))[0]
        yield _row(small, ceilings, replace(free, compiled="blocks"))[0]


def measure_whole(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """With the whole model compiled."""
    yield _row(small, ceilings, Variant(compiled="" if small else "model"))[0]


@cache
def _pictures(count: int, size: int) -> Pictures:
    return Pictures(count, size, CLASSES)


@cache
def _weights(small: bool) -> nn.Module:
    return vit(small, CLASSES, torch.device("cpu"))


def _model(small: bool, device: torch.device) -> nn.Module:
    """The same random weights each time; to draw them takes longer than a variant."""
    return copy.deepcopy(_weights(small)).to(device)


def _again_row(small: bool, variant: Variant, first: Timing) -> Row:
    again, spent = _parts(small, variant)
    return Row(
        name=f"the same bits when run again, {variant}",
        value=1.0,
        unit="",
        note=f"{again.beginning:.1f} s more to begin; {spent}",
        error="" if again.digest == first.digest else "two runs of the same training gave different weights",
    )


def _graphs_row(ceilings: dict[str, float], variant: Variant) -> Row:
    """Launched as CUDA graphs, which `train` does not do: whether it could, and what it would gain."""
    from torch._inductor import config

    try:
        with config.patch({"triton.cudagraphs": True}):
            return _row(False, ceilings, variant)[0]
    except Exception as error:  # of whatever kind: it is an experiment
        return Row(name=f"full, {variant}", value=0.0, unit="images/s", note=f"cannot: {str(error)[:300]}")


def _host_row(small: bool, variant: Variant) -> Row:
    """Milliseconds of a step."""
    value = 1e3 * _timing(small, variant).seconds / _sizes(small, variant)[0]
    return Row(name=f"a step of the host, {variant}", value=value, unit="ms", note=_parts(small, variant)[1])


def _parts(small: bool, variant: Variant) -> tuple[Timing, str]:
    """A run whose second epoch's steps are under Python's profiler, and what it says."""
    profile, steps = cProfile.Profile(), _sizes(small, variant)[0]
    turns = {steps: profile.enable, 2 * steps - 1: profile.disable}
    timing = _timing(small, variant, lambda step: turns.get(step, lambda: None)())
    return timing, f"a step under Python's profiler, ms: {parts(profile, max(1, steps - 1))}"


def _precision(small: bool) -> Precision:
    return "fp32" if small else "bf16"


def _row(small: bool, ceilings: dict[str, float], variant: Variant) -> tuple[Row, Timing]:
    timing = _timing(small, variant)
    steps, batch = _sizes(small, variant)
    rate = steps * batch / timing.seconds
    products = None if small else ceilings.get("bf16")
    flops = "" if small else f"{3 * FORWARD_FLOP * rate / 1e12:.0f} TFLOP/s, "
    row = Row(
        name=f"full, {_precision(small)}, {variant}",
        value=rate,
        unit="images/s",
        limit=None if products is None else 1e12 * products / (3 * FORWARD_FLOP),
        bound_by="" if products is None else "bf16 products",
        note=f"{flops}{1e3 * timing.seconds / steps:.1f} ms a step, {timing.beginning:.1f} s more to begin, "
        f"{timing.peak_bytes / 1e9:.1f} GB at most, loss {timing.loss:.6f}",
    )
    return row, timing


def _sizes(small: bool, variant: Variant) -> tuple[int, int]:
    """(steps, batch)"""
    return (2, 4) if small else (STEPS, variant.batch)


def _timing(small: bool, variant: Variant, watch: Callable[[int], None] | None = None) -> Timing:
    """Of the second of two epochs; no state is saved, which has a row of its own."""
    device, precision = device_of(small), _precision(small)
    steps, batch = _sizes(small, variant)
    pictures = _pictures(batch * steps, 64 if small else 224)
    compiled: Compile = "on" if variant.compiled in ("blocks", "graphs") else "off"
    shared = TrainConfig(epochs=2, batch_size=batch, precision=precision, compile=compiled)
    run = TrainingRun(condition=ConditionConfig(), shared=shared)
    model = _model(small, device)
    optimizer = torch.optim.AdamW(layerwise_groups(model, run), betas=(0.9, 0.98), fused=True)
    called: nn.Module = torch.compile(model) if variant.compiled == "model" else model  # type: ignore[assignment]
    labels = torch.from_numpy(pictures.labels).to(device)
    ends: list[float] = []
    steps_begun = count()

    class Timed:
        def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            if watch is not None:
                watch(next(steps_begun))
            logits = called(images)
            target = labels[uploaded(torch.from_numpy(indices), device)]
            return functional.cross_entropy(logits.float(), target, label_smoothing=shared.label_smoothing), logits

        def validate(self) -> Evaluation:
            _finish(device)
            ends.append(time.perf_counter())
            return Evaluation(len(ends) / 2, 0.0)  # the last epoch's weights are kept

    gc.collect()  # the variant before
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with (
        training_mode(model, device, precision=precision, deterministic=variant.deterministic),
        tempfile.TemporaryDirectory() as folder,
        nullcontext() if variant.attention is None else sdpa_kernel(variant.attention),
    ):
        began = time.perf_counter()
        state_file = StateFile(Path(folder) / "state.safetensors", "benchmark", writes=False)
        history = fit(
            model, optimizer, Timed(), train=pictures, run=run, state_file=state_file, device=device, label=str(variant)
        )
    seconds = ends[1] - ends[0]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Timing(seconds, ends[0] - began - seconds, peak, history[-1]["loss"], state_digest(model.state_dict()))


def _profiled(small: bool, variant: Variant) -> Profile:
    """Three steps of the second epoch."""
    profiled = Profile(device_of(small))
    first = _sizes(small, variant)[0]
    turns = {first: profiled.start, first + (1 if small else 3): profiled.stop}
    _timing(small, variant, lambda step: turns.get(step, lambda: None)())
    return profiled


def _save_row(small: bool, device: torch.device) -> Row:
    """Seconds that training waits for a save of its state."""
    model = _model(small, device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = TrainingState(model, optimizer)
    state.best = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    nbytes = 4 * sum(parameter.nbytes for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = StateFile(Path(folder) / "state.safetensors", "benchmark")
        seconds = _seconds(lambda: file.save(state))
        quarter = {name: tensor.cpu() for name, tensor in state.best.items()}  # a quarter of the state
        digest, content = _seconds(lambda: state_digest(quarter)), bytes(nbytes // 4)
        write = _seconds(lambda: write_atomically(Path(folder) / "file", content))
    note = f"{nbytes / 1e9:.1f} GB; of it {4 * digest:.1f} s a digest, {4 * write:.1f} s writes with fsync"
    return Row(name="save of the training state", value=seconds, unit="s", note=note)


def _fit_seconds(images: int, device: torch.device) -> float:
    """Of features about class means, of which a linear classifier tells four in five right."""
    means = 0.15 * torch.randn(CLASSES, 768, device=device)
    labels, held_out_labels = (torch.randint(CLASSES, (n,), device=device) for n in (images, images // 4))
    features, held_out = (
        means[each] + torch.randn(len(each), 768, device=device) for each in (labels, held_out_labels)
    )

    def fit_it() -> None:
        fit_classifier(features, labels, held_out, held_out_labels, classes=CLASSES, label_smoothing=0.1)

    return _seconds(fit_it)


def _saves(epoch: float, save: float) -> int:
    """How many saves `StateFile.due` allows in the study's training, whose epochs take this many seconds."""
    wait = min(SAVE_SECONDS, save / EPOCH_SAVE_SHARE)
    return 1 + math.floor((EPOCHS - 1) / math.ceil(max(wait / epoch, 1.0)))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], Any]) -> float:
    """Of a call that ends with a look at its result."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def _rate(run: Callable[[], Any], images: int) -> float:
    """Images a second of a call; the first call warms up."""
    run()
    return images / _seconds(run)


def _capture_rate(model: nn.Module, pictures: ImageSet, device: torch.device, batch: int) -> float:
    backend = "torch" if device.type == "cpu" else "auto"  # numba would have to load its loops first
    settings = Capture(sinks=("metrics",), batch_size=batch, device=str(device), backend=backend)
    about: dict[str, dict[str, str]] = {"model_info": {}, "dataset_info": {}, "preprocessing": {}}
    with tempfile.TemporaryDirectory() as folder:
        names = iter(("warm.zarr", "timed.zarr"))
        return _rate(
            lambda: capture_to_store(model, pictures, Path(folder) / next(names), settings, **about), len(pictures)
        )


def _statistics_seconds(images: int, permutations: int) -> float:
    """One comparison over images × layers × heads × four metrics."""
    a, b = np.random.default_rng(0).normal(size=(2, images, 12, 12, 4))
    return _seconds(lambda: compare_paired(a, b, permutations=permutations))
