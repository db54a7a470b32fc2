"""Training: the loop against a bare one, and an epoch of pictures from the cache against one that decodes JPEGs.

    python -m benchmarks.test_bench_train            both ratios, interleaved in one process, one thread
    python -m pytest benchmarks/test_bench_train.py  the pictures alone, statistics by pytest-benchmark

Not part of CI. CPU time of the whole process, medians over rounds in which every contender runs once, so that a busy
machine slows all of them alike.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import train.state
from tests.photographs import sources
from train.augment import Augmentation
from train.checkpoint import state_digest
from train.data.datasets import build_manifest, prepare_folder
from train.data.images import DataSplits
from train.evaluation import Evaluation
from train.loop import epoch_order, fit
from train.models import build_model, preprocessing_of
from train.precision import forward_precision, resolve_precision, training_mode
from train.settings import ConditionConfig, TrainConfig, TrainingRun
from train.state import StateFile, TrainingState, trained_tensors

CPU = torch.device("cpu")
MODEL = "vit_small_patch16_224"
BATCH = 32
STEPS = 4  # of a round; the first is not timed
AUGMENTATION = Augmentation(flip=True, rotation_degrees=10, color_jitter=0.2)
PICTURE_PX = (500, 375)  # about the median picture of Indoor-67


def write_pictures(root: Path, count: int) -> None:
    """Crops of photographs as JPEGs, in class folders."""
    generator = np.random.default_rng(0)
    pictures = list(sources().items())
    for number in range(count):
        name, picture = pictures[number % len(pictures)]
        large = picture.resize((700, 700 * picture.height // picture.width))
        left, top = (int(generator.integers(0, max(1, room))) for room in (700 - PICTURE_PX[0], large.height - 375))
        (root / name).mkdir(parents=True, exist_ok=True)
        crop: Image.Image = large.crop((left, top, left + PICTURE_PX[0], top + PICTURE_PX[1]))
        crop.save(root / name / f"{number}.jpg", quality=90)


def prepared(root: Path, cache: Path | None) -> DataSplits:
    preprocessing = preprocessing_of(build_model(MODEL, num_classes=1))
    return prepare_folder(build_manifest(root, split="all"), preprocessing=preprocessing, cache=cache)


def epoch_of_pictures(data: DataSplits, epoch: int, augmentation: Augmentation) -> torch.Tensor:
    """All that an epoch does but the model: read, augment, normalise."""
    images, total = data.test, torch.zeros(())
    order = epoch_order(0, epoch, len(images))
    for start in range(0, len(order), BATCH):
        indices = order[start : start + BATCH]
        scaled = augmentation.apply(images.pixels(indices).float().div_(255), seed=0, epoch=epoch, indices=indices)
        total += images.preprocessing.normalize(scaled)[0, 0, 0, 0]
    return total


def start() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_model(MODEL, num_classes=3)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True)


def the_loop(data: DataSplits, precision: str) -> tuple[float, str]:
    """`fit` as the recipe `full` calls it; (CPU seconds of the steps after the first, digest of the weights)."""
    model, optimizer = start()
    labels = torch.from_numpy(data.test.labels)
    times: list[float] = []

    class Timed:
        def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            times.append(time.process_time())
            logits = model(images)
            target = labels[torch.from_numpy(indices)]
            return functional.cross_entropy(logits.float(), target, label_smoothing=0.1), logits

        def validate(self) -> Evaluation:
            return Evaluation(0.0, 0.0)

    with training_mode(model, CPU, precision=precision, deterministic=True), tempfile.TemporaryDirectory() as folder:
        fit(
            model,
            optimizer,
            Timed(),
            train=data.test,
            run=TrainingRun(
                condition=ConditionConfig(),
                shared=TrainConfig(epochs=1, batch_size=BATCH, precision=cast(Any, precision)),
                seed=0,
            ),
            state_file=StateFile(Path(folder) / "state.safetensors", "benchmark"),
            device=CPU,
        )
    return times[-1] - times[0], state_digest(model.state_dict())


def saving(data: DataSplits, folder: Path) -> float:
    """CPU seconds of one save: weights, the best weights, and AdamW's moments."""
    model, optimizer = start()
    functional.cross_entropy(model(data.test.batch([0])), torch.zeros(1, dtype=torch.long)).backward()
    optimizer.step()
    state = TrainingState(model, optimizer, best={n: t.clone() for n, t in trained_tensors(model).items()})
    began = time.process_time()
    StateFile(folder / "state.safetensors", "benchmark").save(state)
    return time.process_time() - began


def a_bare_loop(data: DataSplits, pixels: torch.Tensor, precision: str) -> tuple[float, str]:
    """What one writes first, on tensors that are already in memory: the same steps, and nothing around them."""
    from train.loop import learning_rate

    model, optimizer = start()
    labels = torch.from_numpy(data.test.labels)
    order = epoch_order(0, 0, len(labels))
    times = []
    with training_mode(model, CPU, precision=precision, deterministic=True):
        model.train()
        for step in range(STEPS):
            indices = order[step * BATCH : (step + 1) * BATCH]
            scaled = AUGMENTATION.apply(pixels[indices].float().div_(255), seed=0, epoch=0, indices=indices)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, STEPS, 1e-4, 0.1)
            images = data.test.preprocessing.normalize(scaled)
            times.append(time.process_time())
            with forward_precision(precision, CPU):
                logits = model(images)
                loss = functional.cross_entropy(logits.float(), labels[indices], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return times[-1] - times[0], state_digest(model.state_dict())


def pictures(folder: Path, count: int) -> dict[str, Callable[[int], Any]]:
    """The epochs that are compared, by name."""
    write_pictures(folder / "pictures", count)
    decoded, cached = prepared(folder / "pictures", None), prepared(folder / "pictures", folder / "cache")
    none = Augmentation()
    return {
        "decoded": lambda epoch: epoch_of_pictures(decoded, epoch, none),
        "from the cache": lambda epoch: epoch_of_pictures(cached, epoch, none),
        "decoded, augmented": lambda epoch: epoch_of_pictures(decoded, epoch, AUGMENTATION),
        "from the cache, augmented": lambda epoch: epoch_of_pictures(cached, epoch, AUGMENTATION),
    }


def test_an_epoch_of_pictures(benchmark: Any, tmp_path: Path) -> None:
    runs = pictures(tmp_path, 64)
    runs["from the cache"](0)
    benchmark(lambda: runs["from the cache"](1))


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    wait, train.state.SAVE_SECONDS = train.state.SAVE_SECONDS, math.inf  # a round is too short for its saves
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = pictures(folder, BATCH * STEPS)
        seconds: dict[str, list[float]] = {run: [] for run in runs}
        for epoch in range(rounds + 1):
            for run, function in runs.items():
                began = time.process_time()
                function(epoch)
                if epoch:  # the first makes the cache
                    seconds[run].append(time.process_time() - began)
        medians = {run: float(np.median(times)) for run, times in seconds.items()}
        print(f"an epoch of {BATCH * STEPS} pictures of {PICTURE_PX[0]}×{PICTURE_PX[1]} px at 224 px, without a model")
        for run, median in medians.items():
            print(f"{run:28}{1e3 * median / (BATCH * STEPS):8.2f} ms an image")
        for suffix in ("", ", augmented"):
            print(f"cache{suffix}: {medians['decoded' + suffix] / medians['from the cache' + suffix]:.1f} × decoding")

        data = prepared(folder / "pictures", folder / "cache")
        pixels = data.test.pixels(range(len(data.test)))
        precision = resolve_precision("auto", CPU)
        loops: list[tuple[float, float]] = []
        for _ in range(rounds):
            (own, digest), (bare, same) = the_loop(data, precision), a_bare_loop(data, pixels, precision)
            loops.append((own, bare))
            equal = "the same weights to the bit" if digest == same else "OTHER WEIGHTS"
            print(f"{STEPS - 1} steps of {MODEL}, {precision}: {own:.2f} s, bare {bare:.2f} s; {equal}", flush=True)
        ratios = [bare / own for own, bare in loops]
        rounds_text = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(
            f"throughput of the loop: {np.median(ratios):.3f} of a bare one, saves of its state apart ({rounds_text})"
        )
        spent = saving(data, folder)
        wait = max(wait, spent / train.state.SAVE_SHARE)
        print(f"a save of the state: {spent:.2f} s, every {wait:.0f} s or more: {spent / wait:.1%} of the time at most")


if __name__ == "__main__":
    main()
