"""Capture: what measuring adds to a forward pass, and how fast attention streams to the disk."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.pictures import Pictures, vit
from benchmarks.gpu.profiles import Profile
from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import device_of
from engine.capture import AttentionTap, Capture, capture_to_store, discover
from engine.capture.sinks import MetricsSink
from engine.capture.stream import BatchPass
from kernels import METRICS
from store.arrays import attention_arrays
from train.transfer import HostCopies

__all__ = ["measure_overhead", "measure_profile", "measure_streaming"]

CORE = ("distance", "entropy", "morans_i")


class Passes:
    """Forward passes of a model over the same images, in as many batches: plain, tapped and measured."""

    def __init__(self, model: torch.nn.Module, images: torch.Tensor, batches: int) -> None:
        self.model, self.images, self.batches = model, images, batches
        self.regions = dict.fromkeys(site.layer for site in discover(model, images[:1]).sites)
        self.copies = HostCopies(images.device)
        self.specs = [METRICS[name] for name in CORE]

    def tap(self) -> AttentionTap:
        return AttentionTap(self.model, lambda *call: None)

    def plain(self) -> None:
        for _ in range(self.batches):
            self.model(self.images)

    def tapped(self) -> None:
        tap = self.tap()
        with tap.prepared():
            for _ in range(self.batches):
                self.launch_tapped(tap)

    def launch_tapped(self, tap: AttentionTap) -> Any:
        with tap:
            return self.model(self.images)

    def launch(self, tap: AttentionTap, backend: str) -> BatchPass:
        """A batch under the metrics sink, as `engine.capture.stream` does it."""
        launched = BatchPass(0, [MetricsSink(self.specs, backend, self.regions)], self.copies)
        tap.on_attention = launched.on_attention
        launched.launched(self.launch_tapped(tap))
        return launched

    def measured(self, backend: str) -> None:
        """A batch is launched before the one before is waited for."""
        before, tap = None, self.tap()
        with tap.prepared():
            for _ in range(self.batches):
                launched = self.launch(tap, backend)
                if before is not None:
                    before.finish()
                before = launched
        if before is not None:
            before.finish()

    def host_seconds(self, launch: Callable[[], Any]) -> float:
        """From an idle device until all of a batch is launched; least of five."""
        found = []
        for _ in range(6):  # the first warms up
            _synchronize(self.images.device)
            began = time.perf_counter()
            kept = launch()
            found.append(time.perf_counter() - began)
            if isinstance(kept, BatchPass):
                kept.finish()
        return min(found[1:])


def _passes(small: bool, batches: int) -> Passes:
    """Of ViT-B/16 in bfloat16, batches of 128."""
    device, (size, batch) = device_of(small), (64, 2) if small else (224, 128)
    model = vit(small, 10, device).to(torch.bfloat16).eval()
    images = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)
    return Passes(model, images, 2 if small else batches)


def _backends(small: bool) -> tuple[str, ...]:
    return ("torch",) if small else ("triton", "torch")


def measure_overhead(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """Batches with the metrics sink between batches without, wall time."""
    runs = _passes(small, 8)
    contenders: dict[str, Callable[[], Any]] = {
        f"metrics sink, {backend}": partial(runs.measured, backend) for backend in _backends(small)
    }
    contenders["tap alone"] = runs.tapped
    batch = len(runs.images)
    with torch.inference_mode():
        ratios, forward = _between(runs.plain, contenders, runs.images.device, 2 if small else 5)
    rate = batch * runs.batches / forward
    yield Row(name=f"plain forward, bf16, batch {batch}", value=rate, unit="images/s", key="forward")
    for name, ratio in ratios.items():
        yield Row(name=name, value=ratio, unit="× forward", note=f"{rate / ratio:,.0f} images/s")
    for name, seconds in _host_times(runs, _backends(small)[0]).items():
        yield Row(name=f"host's time to launch a batch, {name}", value=1e3 * seconds, unit="ms")


def _host_times(runs: Passes, backend: str) -> dict[str, float]:
    """What a batch takes of the host: all that must be less than the device's time."""
    with torch.inference_mode():
        times = {"plain forward": runs.host_seconds(partial(runs.model, runs.images))}
        tap = runs.tap()
        with tap.prepared():
            times["tap alone"] = runs.host_seconds(partial(runs.launch_tapped, tap))
            times[f"metrics sink, {backend}"] = runs.host_seconds(partial(runs.launch, tap, backend))
    return times


def measure_profile(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """Two batches, plain and with the metrics sink."""
    runs = _passes(small, 2)
    backend = _backends(small)[0]
    with torch.inference_mode():
        for what, run in (("forward", runs.plain), (f"sink {backend}", partial(runs.measured, backend))):
            for _ in range(2):
                run()
            profiled = Profile(runs.images.device)
            profiled.start()
            run()
            profiled.stop()
            yield from profiled.rows(what)


def _between(
    plain: Callable[[], None], contenders: dict[str, Callable[[], Any]], device: torch.device, rounds: int
) -> tuple[dict[str, float], float]:
    """(median ratio of each to the plain runs before and after it, median seconds of those)."""

    def seconds(run: Callable[[], Any]) -> float:
        began = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - began

    for run in (plain, *contenders.values()):
        seconds(run)
    ratios: dict[str, list[float]] = {name: [] for name in contenders}
    plain_seconds = [seconds(plain)]
    for _ in range(rounds):
        for name, run in contenders.items():
            spent = seconds(run)
            plain_seconds.append(seconds(plain))
            ratios[name].append(2 * spent / (plain_seconds[-2] + plain_seconds[-1]))
    return {name: float(np.median(found)) for name, found in ratios.items()}, float(np.median(plain_seconds))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Narrow(torch.nn.Module):
    """A model in bfloat16 whose input is float32, as data sets give it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.to(torch.bfloat16)

    def forward(self, images: torch.Tensor) -> Any:
        return self.model(images.to(torch.bfloat16))


def measure_streaming(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """A whole capture into a store, commits and all, by encoding; and which of the limits binds."""
    device = device_of(small)
    size, batch, count = (64, 2, 4) if small else (224, 64, 512)
    model = Narrow(vit(small, 10, device)).eval()
    pictures = Pictures(count, size, 10)
    for encoding in ("fp16", "bf16", "qk"):
        folder = Path(tempfile.mkdtemp())
        try:
            seconds, raw, kept = _capture(model, pictures, folder, encoding, batch, device)
        finally:
            shutil.rmtree(folder)
        costs = {  # what an image takes of each, in the ceiling's unit
            "link to the host": ("to_the_host", raw / 1e9),
            "codec": ("codec", raw / 1e9),
            "disk": ("disk", kept / 1e9),
            "forward pass": ("forward", 1.0),
        }
        limits = {name: ceilings[key] / cost for name, (key, cost) in costs.items() if key in ceilings}
        binding = min(limits, key=limits.__getitem__, default="")
        yield Row(
            name=f"capture to the store, {encoding}",
            value=count / seconds,
            unit="images/s",
            limit=limits.get(binding),
            bound_by=binding,
            note=f"{raw * count / seconds / 1e9:.2f} GB/s raw, {kept / raw:.2f} of the bytes kept",
        )


def _capture(
    model: torch.nn.Module, pictures: Pictures, folder: Path, encoding: str, batch: int, device: torch.device
) -> tuple[float, float, float]:
    """(seconds, raw bytes an image, bytes on disk an image); a first capture of two batches warms up."""
    settings = Capture(sinks=("store",), encoding=encoding, batch_size=batch, device=str(device))
    about: dict[str, Any] = {"model_info": {}, "dataset_info": {}, "preprocessing": {}}
    few = Pictures(2 * batch, pictures.preprocessing.height_px, len(pictures.class_names))
    capture_to_store(model, few, folder / "warm.zarr", settings, **about)
    began = time.perf_counter()
    store = capture_to_store(model, pictures, folder / "maps.zarr", settings, **about)
    seconds = time.perf_counter() - began
    raw = sum(array.row_bytes for array in attention_arrays(store.schema))
    kept = sum(file.stat().st_size for file in (folder / "maps.zarr" / "attention").rglob("*") if file.is_file())
    return seconds, raw, kept / len(pictures)
