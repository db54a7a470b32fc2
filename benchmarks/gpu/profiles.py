"""Where the device's time goes: kernels of forward passes, plain and measured, and of training steps."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.capture import backends, passes
from benchmarks.gpu.pictures import Pictures, vit
from benchmarks.gpu.results import Row, logs
from benchmarks.gpu.timing import device_of
from train.evaluation import Evaluation
from train.loop import fit
from train.precision import training_mode
from train.recipes import layerwise_groups
from train.settings import ConditionConfig, TrainConfig, TrainingRun
from train.state import StateFile
from train.transfer import uploaded

__all__ = ["measure"]

TOP = 15  # kernels
CLASSES = 67
FIRST, STEPS = 4, 3  # training steps before the profile, and in it


class Profile:
    """What ran on the device between start and stop; on a CPU torch's operations, those within others too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity], acc_events=True)
        self.wall = 0.0

    def start(self) -> None:
        self._profile.start()
        self._synchronize()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._synchronize()
        self.wall = time.perf_counter() - self._began
        self._profile.stop()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rows(self, what: str) -> Iterator[Row]:
        """The busy fraction of the wall time, and the kernels that took most, in milliseconds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
            kept = logs(Path(folder)) / f"trace_{what.replace(' ', '_')}.json.gz"
            kept.write_bytes(gzip.compress(trace, 6))
        kinds = ("kernel", "gpu_memcpy", "gpu_memset") if self.device.type == "cuda" else ("cpu_op",)
        events = [event for event in json.loads(trace)["traceEvents"] if event.get("cat") in kinds]
        times: dict[str, list[float]] = defaultdict(list)
        for event in events:
            times[event["name"]].append(event["dur"] / 1e3)
        total = sum(map(sum, times.values()))
        yield Row(
            name=f"{what}: device busy",
            value=_covered([(event["ts"], event["ts"] + event["dur"]) for event in events]) / 1e6 / self.wall,
            unit="of wall",
            note=f"{1e3 * self.wall:.1f} ms of wall time, {total:.1f} ms of kernels, {len(events)} launches",
        )
        for name, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]:
            note = f"{sum(spent) / total:.1%}, {len(spent)} launches"
            yield Row(name=f"{what}: {name.removeprefix('void ')[:140]}", value=sum(spent), unit="ms", note=note)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def measure(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    device = device_of(small)
    runs = passes(small, 2)
    shown: dict[str, Callable[[], Any]] = {"forward": runs.plain}
    for backend in backends(small)[:1]:
        shown[f"metrics sink {backend}"] = partial(runs.measured, backend)
    with torch.inference_mode():
        for what, run in shown.items():
            for _ in range(2):
                run()
            profiled = Profile(device)
            profiled.start()
            run()
            profiled.stop()
            yield from profiled.rows(what)
    yield from _training(small, device).rows("training")


def _training(small: bool, device: torch.device) -> Profile:
    """Three steps of what the section `training` times."""
    size, batch, precision = (64, 4, "fp32") if small else (224, 128, "bf16")
    pictures = Pictures(batch * (FIRST + STEPS + 2), size, CLASSES)
    shared = TrainConfig(epochs=1, batch_size=batch, precision=cast(Any, precision))
    run = TrainingRun(condition=ConditionConfig(), shared=shared)
    model = vit(small, CLASSES, device)
    optimizer = torch.optim.AdamW(layerwise_groups(model, run), betas=(0.9, 0.98), fused=True)
    labels = torch.from_numpy(pictures.labels).to(device)
    profiled = Profile(device)

    class Watched:
        step = 0

        def loss(self, images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            self.step += 1
            if self.step == FIRST:
                profiled.start()
            elif self.step == FIRST + STEPS:
                profiled.stop()
            logits = model(images)
            return functional.cross_entropy(logits.float(), labels[uploaded(torch.from_numpy(indices), device)]), logits

        def validate(self) -> Evaluation:
            return Evaluation(0.0, 0.0)

    with training_mode(model, device, precision=precision, deterministic=True), tempfile.TemporaryDirectory() as folder:
        state_file = StateFile(Path(folder) / "state.safetensors", "profile")
        fit(model, optimizer, Watched(), train=pictures, run=run, state_file=state_file, device=device)
    return profiled
