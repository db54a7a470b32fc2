"""Training of ViT-B/16 as the recipe `full` does it, and the time of a whole study of Indoor-67's size from it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.gpu.pictures import Pictures, vit
from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import device_of
from engine.capture import Capture, capture_to_store
from engine.statistics import compare_paired
from train.data.images import ImageSet
from train.evaluation import Evaluation, evaluate
from train.loop import fit
from train.precision import training_mode
from train.probe import fit_probe
from train.recipes import layerwise_groups
from train.settings import ConditionConfig, TrainConfig, TrainingRun
from train.state import StateFile
from train.transfer import uploaded

__all__ = ["measure", "measure_compiled"]

# The study: Indoor-67, 15,620 images split 70/15/15.
TRAIN_IMAGES, TEST_IMAGES, EPOCHS, CLASSES = 10_934, 2_343, 30, 67
# Products and sums of one image's forward pass, in FLOP: blocks (projections, MLP, attention), patch embedding.
FORWARD_FLOP = 12 * (24 * 197 * 768**2 + 4 * 197**2 * 768) + 2 * 196 * 768 * 768


def measure(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    device, precision = device_of(small), "fp32" if small else "bf16"
    row = _training_row(small, ceilings, compiled=False)
    yield row
    size, batch = (64, 4) if small else (224, 128)
    pictures = Pictures(8 if small else 1280, size, CLASSES)
    model = vit(small, CLASSES, device)
    evaluation = _rate(lambda: evaluate(model, pictures, device, precision=precision), pictures)
    yield Row(name=f"evaluation, {precision}", value=evaluation, unit="images/s")
    probe = _rate(lambda: fit_probe(model, pictures, pictures, label_smoothing=0.1, device=device), pictures)
    yield Row(name="probe: features in fp32, and its fit", value=probe, unit="images/s")
    captured = _capture_rate(model, pictures, device, batch)
    yield Row(name="capture, metrics sink, fp32 model", value=captured, unit="images/s")
    tests = _statistics_seconds(8 if small else TEST_IMAGES, 99 if small else 9999)
    yield Row(name="statistics of one comparison", value=tests, unit="s")
    parts = {
        "train finetuned": EPOCHS * TRAIN_IMAGES / row.value,
        "validate": EPOCHS * TEST_IMAGES / evaluation,
        "train baseline": TRAIN_IMAGES / probe,
        "capture and measure both": 2 * TEST_IMAGES / captured,
        "test": tests,
    }
    yield Row(
        name=f"a study of {TRAIN_IMAGES:,} training images, {EPOCHS} epochs",
        value=sum(parts.values()) / 60,
        unit="min",
        note="extrapolated, decoding and the report's pages apart: "
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items()),
    )


def measure_compiled(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """The same training with the model under torch.compile, which `train` does not do: whether it should."""
    yield _training_row(small, ceilings, compiled=not small)


def _training_row(small: bool, ceilings: dict[str, float], compiled: bool) -> Row:
    size, batch, steps = (64, 4, 2) if small else (224, 128, 30)
    precision = "fp32" if small else "bf16"
    rate = _full(Pictures(batch * steps, size, CLASSES), small, device_of(small), batch, precision, compiled)
    return Row(
        name=f"full, {precision}, batch {batch}" + (", torch.compile" if compiled else ""),
        value=rate,
        unit="images/s",
        limit=None if small else 1e12 * ceilings["bf16"] / (3 * FORWARD_FLOP),
        bound_by="" if small else "bf16 products",
        note="" if small else f"{3 * FORWARD_FLOP * rate / 1e12:.0f} TFLOP/s",
    )


def _full(pictures: ImageSet, small: bool, device: torch.device, batch: int, precision: str, compiled: bool) -> float:
    """Images a second of the second of two epochs, saves of the state included."""
    shared = TrainConfig(epochs=2, batch_size=batch, precision=cast(Any, precision))
    run = TrainingRun(condition=ConditionConfig(), shared=shared)
    model = vit(small, CLASSES, device)
    optimizer = torch.optim.AdamW(layerwise_groups(model, run), betas=(0.9, 0.98), fused=True)
    called: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
    labels = torch.from_numpy(pictures.labels).to(device)
    ends: list[float] = []

    class Timed:
        def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            logits = called(images)
            return functional.cross_entropy(logits.float(), labels[uploaded(torch.from_numpy(indices), device)]), logits

        def validate(self) -> Evaluation:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ends.append(time.perf_counter())
            return Evaluation(0.0, 0.0)

    with training_mode(model, device, precision=precision, deterministic=True), tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            optimizer,
            Timed(),
            train=pictures,
            run=run,
            state_file=StateFile(Path(folder) / "state.safetensors", "benchmark"),
            device=device,
        )
    return len(pictures) / (ends[1] - ends[0])


def _rate(run: object, pictures: ImageSet) -> float:
    """Images a second of a call that ends with a look at its result; the first call warms up."""
    assert callable(run)
    run()
    began = time.perf_counter()
    run()
    return len(pictures) / (time.perf_counter() - began)


def _capture_rate(model: nn.Module, pictures: ImageSet, device: torch.device, batch: int) -> float:
    backend = "torch" if device.type == "cpu" else "auto"  # numba would have to load its loops first
    settings = Capture(sinks=("metrics",), batch_size=batch, device=str(device), backend=backend)
    about: dict[str, dict[str, str]] = {"model_info": {}, "dataset_info": {}, "preprocessing": {}}
    with tempfile.TemporaryDirectory() as folder:
        names = iter(("warm.zarr", "timed.zarr"))
        return _rate(lambda: capture_to_store(model, pictures, Path(folder) / next(names), settings, **about), pictures)


def _statistics_seconds(images: int, permutations: int) -> float:
    """One comparison over images × layers × heads × four metrics."""
    a, b = np.random.default_rng(0).normal(size=(2, images, 12, 12, 4))
    began = time.perf_counter()
    compare_paired(a, b, permutations=permutations)
    return time.perf_counter() - began
