"""On a GPU, nothing waits for it within a forward pass under the metrics sink, nor within a training step.

Without a GPU: tensors without data on a device called cuda. Looking at one (`.item()`, `bool()`, `.numpy()`, a shape
that depends on data) is an error, and copies between it and the host are recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.capture import AttentionTap
from engine.capture.sinks import MapsSink, MetricsSink, Sink
from engine.capture.stream import BatchPass
from kernels import METRICS, measure_attention, measure_qk, torch_ops
from kernels.cuda import triton_gpu, triton_maps, triton_qk, triton_rows
from kernels.cuda.rows import _starts, distances
from tests.cases import layout
from train.augment import Augmentation, _luma
from train.data.images import Preprocessing, _channels

CORE = tuple(METRICS[name] for name in ("distance", "entropy", "morans_i"))
OF = layout(4, 4, 1)


class Crossings(TorchDispatchMode):
    """Operations that make the host wait for the device: copies from one to the other, and looks at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        devices = {value.device.type for value in (*args, result) if isinstance(value, torch.Tensor)}
        if "_local_scalar_dense" in name or "nonzero" in name or {"cpu", "cuda"} <= devices:
            self.found.append(name)
        return result


class Operations(TorchDispatchMode):
    """Operations that launch something: all but views of memory and new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if not func.is_view and name not in ("empty", "detach", "device"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device called cuda without a driver; what is kept for it is forgotten afterwards."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    kept: tuple[Any, ...] = (torch_ops._new_distances, distances, _starts, _channels, _luma)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", 0)
    for cache in kept:
        cache.cache_clear()


class Copies:
    """`HostCopies` without a stream: what is on its way has not arrived as long as nobody waits."""

    depth = 4

    def __init__(self) -> None:
        self.waited = 0

    def start(self, values: torch.Tensor, precision: Any = None, *, shared: bool = False) -> Copy:
        return Copy(self, values)

    def start_all(self, tensors: Any) -> Copy:
        return Copy(self, torch.stack([values.sum() for values in tensors]))


class Copy:
    """A `HostCopy` that counts who waits for it."""

    def __init__(self, copies: Copies, values: torch.Tensor) -> None:
        self.copies, self.values = copies, values

    def wait(self) -> torch.Tensor:
        self.copies.waited += 1
        return self.values


@pytest.fixture
def model() -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=6).eval()


def on(device: torch.device, model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device=device))
    return model


class Launches:
    """In a Triton kernel's place: notes that it was launched."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.count += 1

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What the `triton` backend does on the host, without its kernels."""
    recorder = Launches()
    for name in ("attention_rows", "exact_rows"):
        monkeypatch.setattr(triton_maps, name, recorder)
    monkeypatch.setattr(triton_qk, "qk_rows", recorder)
    monkeypatch.setattr(triton_rows, "means_of_rows", recorder)
    monkeypatch.setattr(triton_gpu, "_current_device", lambda tensor: nullcontext())
    return recorder


class Writer:
    """Takes layers, and keeps nothing."""

    def add_attention(self, batch: int, layer: int, attention: Any) -> None:
        pass


def batch_pass(encoding: str, copies: Any, backend: str) -> BatchPass:
    sinks: list[Sink] = [MetricsSink(CORE, backend, dict.fromkeys(range(6)))]
    if encoding:
        sinks.append(MapsSink(Writer(), 0, copies, encoding))  # type: ignore[arg-type]
    return BatchPass(0, sinks, copies)


@contextmanager
def crossings() -> Iterator[list[str]]:
    with Crossings() as seen:
        yield seen.found


@pytest.mark.parametrize("encoding", ["", "fp16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forward_pass_under_the_sinks(
    model: torch.nn.Module, launches: Launches, gpu: torch.device, backend: str, encoding: str
) -> None:
    on(gpu, model)
    images = torch.empty(2, 3, 64, 64, device=gpu)
    for turn in range(2):  # the first brings the table of distances to the device
        copies = Copies()
        launched = batch_pass(encoding, copies, backend)
        with crossings() as found, torch.inference_mode(), AttentionTap(model, launched.on_attention):
            logits = model(images)
            waited = copies.waited
            launched.launched(logits)
        if turn:
            assert found == []
            # Maps: all but the last four layers have been waited for, each while four more were being computed.
            assert waited == copies.waited == (2 if encoding else 0)
    # Six layers, twice: the pass, and the means of all metrics.
    assert launches.count == (2 * 6 * 2 if backend == "triton" else 0)


def test_the_metrics_sink_launches_two_kernels_a_layer_and_nothing_else(
    model: torch.nn.Module, launches: Launches, gpu: torch.device
) -> None:
    on(gpu, model)
    images = torch.empty(2, 3, 64, 64, device=gpu)
    found = []
    for tapped in (False, True, True):
        launched = batch_pass("", Copies(), "triton")
        tap = AttentionTap(model, launched.on_attention)
        with torch.inference_mode(), tap if tapped else nullcontext(), Operations() as seen:
            model(images)
        found.append(seen.found)
    assert found[0] == found[-1]
    assert launches.count == 2 * 6 * 2


def test_measuring_looks_only_when_asked_to(gpu: torch.device) -> None:
    attention, factor = torch.empty(2, 3, 17, 17, device=gpu), torch.empty(2, 3, 17, 8, device=gpu)
    bias = torch.empty(3, 17, 17, device=gpu)
    for _ in range(2):
        with crossings() as found:
            measure_attention(attention, OF, CORE, "torch", "mask")
            of_factors = measure_qk(factor, factor, OF, CORE, bias=bias, backend="torch", invalid="mask")
    assert found == []
    with pytest.raises(DataDependentOutputException):
        _ = of_factors.undefined
    with pytest.raises(DataDependentOutputException):
        measure_attention(attention, OF, CORE, "torch")


def test_augmentation_and_normalisation(gpu: torch.device) -> None:
    preprocessing = Preprocessing(
        channels=3,
        height_px=16,
        width_px=16,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        crop_pct=0.9,
        crop_mode="center",
    )
    augmentation = Augmentation(flip=True, rotation_degrees=10, color_jitter=0.2)
    scaled = torch.empty(2, 3, 16, 16, device=gpu)
    for _ in range(2):
        with crossings() as found:
            moved = augmentation.apply(scaled, seed=0, epoch=0, indices=np.arange(2))
            preprocessing.normalize(moved)
    assert set(found) <= {"aten._to_copy.default"}
    assert len(found) == 1, "the draws go up, pinned; nothing else crosses"
