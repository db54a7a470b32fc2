"""Training on a GPU: the same bits every time and after an interruption, and what a CPU computes.

Without a GPU the same tests are slow ones and run on a CPU, where all of it is tested elsewhere, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.capture import evaluating
from tests.training_runs import interrupted, training_run
from train.augment import Augmentation
from train.checkpoint import read_checkpoint
from train.data.images import DataSplits, ImageSet
from train.data.manifest import Manifest, Record
from train.errors import TrainingDivergedError
from train.model_source import ModelSource
from train.models import build_model, preprocessing_of
from train.precision import float32_convolutions, resolve_precision, training_mode
from train.probe import fit_probe
from train.training import TrainResult, train_condition

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
pytestmark = [] if DEVICE.type == "cuda" else [pytest.mark.slow]
MODEL = ModelSource("test_vit", img_size=64)
SHADES = ("dark", "middle", "light")


class Shades(ImageSet):
    """Noise of three shades."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(len(SHADES), size=count)
        self.ids, self.class_names = tuple(f"{seed}/{place}" for place in range(count)), SHADES
        self.preprocessing = preprocessing_of(build_model(MODEL, num_classes=3))
        noise = rng.integers(0, 90, size=(count, 3, 64, 64))
        self._pixels = (noise + 60 * self.labels[:, None, None, None]).astype(np.uint8)

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._pixels[np.asarray(indices)]


@pytest.fixture(scope="module")
def data() -> DataSplits:
    train, validation, test = (Shades(count, seed) for seed, count in enumerate((20, 8, 8)))
    records = tuple(Record(id, 0, "dark", "train", "ok", "") for id in train.ids)
    return DataSplits(train, validation, test, Manifest("folder", "", SHADES, records, "all"))


@pytest.fixture
def run(data: DataSplits, tmp_path: Path) -> Callable[..., TrainResult]:
    def run(name: str, recipe: str = "full", device: torch.device = DEVICE, **values: Any) -> TrainResult:
        given = {"epochs": 3, "batch_size": 8, "lr": 1e-3, "rotation_degrees": 5.0, "flip": True, "color_jitter": 0.2}
        return train_condition(
            training_run(recipe, **(given | values)),
            model=MODEL,
            data=data,
            checkpoint=tmp_path / f"{name}.safetensors",
            device=str(device),
        )

    return run


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return read_checkpoint(result.checkpoint).tensors


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recipe", ["full", "lora", "dora"])
def test_the_same_bits_also_after_an_interruption(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch, recipe: str, precision: str
) -> None:
    """After a product on the device that nobody asked to be deterministic."""
    if recipe != "full":
        pytest.importorskip("peft")
    x = torch.ones(64, 64, device=DEVICE)
    assert (x @ x)[0, 0] == 64
    given = {"recipe": recipe, "precision": precision, "ema_decay": 0.5}
    one, two = run("one", **given), run("two", **given)
    assert one.sha256 == two.sha256
    assert one.history == two.history
    with interrupted(monkeypatch, step=4):
        run("cut", **given)
    resumed = run("cut", **given)
    assert resumed.sha256 == one.sha256
    assert resumed.history == one.history


def test_it_trains_as_on_a_cpu(run: Callable[..., TrainResult]) -> None:
    given = {"precision": "fp32", "lr": 1e-4, "own_head": True}
    start = weights(run("start", device=CPU, **given | {"lr": 1e-30}))
    here, there = (run(str(device), device=device, **given) for device in (DEVICE, CPU))
    for one, other in zip(here.history, there.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-3)
    # All together: AdamW makes a whole step of a gradient that is nothing but rounding, as that of a key's bias.
    moved, off = (
        torch.cat([(tensor - other[name]).abs().flatten() for name, tensor in weights(there).items()]).mean()
        for other in (start, weights(here))
    )
    assert off < 0.02 * moved


def test_torch_has_one_thread_on_the_host_while_a_gpu_trains() -> None:
    before = torch.get_num_threads()
    with training_mode(torch.nn.Linear(2, 2), DEVICE, precision="fp32", deterministic=True):
        assert torch.get_num_threads() == (1 if DEVICE.type == "cuda" else before)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads()
    assert torch.get_num_threads() == before


def test_the_probe_is_that_of_a_cpu(data: DataSplits) -> None:
    found = []
    for device in (DEVICE, CPU):
        torch.manual_seed(0)
        model = build_model(MODEL, num_classes=3).to(device)
        history = fit_probe(model, data.train, data.validation, label_smoothing=0.1, device=device)
        with torch.no_grad():
            found.append((history, model(data.test.batch(range(8), device)).softmax(dim=1).cpu()))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=0.02, rtol=0)


def test_augmentation_is_that_of_a_cpu() -> None:
    images = torch.rand(6, 3, 20, 24)
    augment = Augmentation(flip=True, rotation_degrees=10, color_jitter=0.2)
    here, there = (augment.apply(images.to(d), seed=1, epoch=2, indices=range(6)).cpu() for d in (DEVICE, CPU))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=0)


def test_divergence_is_said_of_its_step(run: Callable[..., TrainResult]) -> None:
    with pytest.raises(TrainingDivergedError, match=r"at step 1 \(epoch 0, images 0/"):
        run("a", lr=1e30, clip_norm=0.0, warmup_fraction=0.0, precision="fp32")


def test_float32_is_float32_in_convolutions_too() -> None:
    torch.manual_seed(0)
    model = build_model(MODEL, num_classes=3).to(DEVICE)
    patches, images = model.patch_embed, torch.randn(2, 3, 64, 64, device=DEVICE)
    with torch.no_grad():
        with evaluating(model):
            found = patches(images).cpu().double()
        expected = patches.to(CPU).double()(images.cpu().double())
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_what_somebody_set_for_convolutions_stays() -> None:
    """Which torch does not say in the older way."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        with float32_convolutions():
            assert convolutions.fp32_precision == "ieee"
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before
    assert torch.backends.cudnn.allow_tf32


def test_bfloat16_is_the_choice_of_a_gpu_that_has_it() -> None:
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability(DEVICE) >= (8, 0):
        assert resolve_precision("auto", DEVICE) == "bf16"
