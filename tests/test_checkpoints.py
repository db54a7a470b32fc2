"""What checkpoints and the files beside them say is checked: any changed bit is named, or the file made again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from train.checkpoint import (
    checked_json,
    has_sidecar,
    parse_checked_json,
    read_metadata,
    save_checkpoint,
    sidecar_path,
)
from train.conditions import TrainResult, train_condition
from train.data import DataSplits
from train.embedded import prepare_digits
from train.errors import DamagedFileError
from train.history import history_path
from train.hyperparameters import Hyperparameters
from train.manifest import Manifest, Record
from train.models import build_model, load_checkpoint, preprocessing_of
from train.state import StateFile, TrainingState

TINY = "test_vit"


def flips(content: bytes, count: int = 0) -> Iterator[bytes]:
    """The content with one bit flipped: every bit, or `count` seeded ones."""
    places = range(len(content) * 8)
    for place in random.Random(0).sample(places, count) if count else places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


# ------------------------------------------------------------------------------------------------ files beside weights


def test_checked_json_is_one_text_for_one_value() -> None:
    document = {"b": [1, 0.1, None, "é\udcff"], "a": {"z": 1e-300, "y": True}}
    content = checked_json(document)
    assert parse_checked_json(content) == document
    assert checked_json(dict(reversed(document.items()))) == content
    with pytest.raises(ValueError, match="JSON compliant"):
        checked_json({"a": float("nan")})
    for other in (b"[]", b"{}", b'"a"', b"[" * 100_000, content.replace(b"0.1", b"NaN"), content + b" "):
        with pytest.raises(ValueError, match=r"^(is not readable JSON|holds no checksum|changed after)"):
            parse_checked_json(other)


def test_every_flipped_bit_of_a_sidecar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"weight": torch.ones(2)}, {"model": TINY, "test_accuracy": 0.09, "history": [{"loss": 206}]})
    for damaged in [*flips(sidecar_path(path).read_bytes()), b""]:
        sidecar_path(path).write_bytes(damaged)
        assert has_sidecar(path), "not taken for somebody else's file"
        with pytest.raises(DamagedFileError, match=r"a\.json .*; train its checkpoint again, or delete a\.json"):
            read_metadata(path)
    with pytest.raises(DamagedFileError, match=r"a\.json"):
        load_checkpoint(TINY, path)


def test_a_foreign_json_file_beside_weights_is_no_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    sidecar_path(path).write_text('{"architecture": "vit", "sha256": "0"}')
    assert not has_sidecar(path)


def test_every_flipped_bit_of_a_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    Manifest("folder", "/photos", ("a",), (Record("a/1.png", 0, "a", "test", "ok", "f0"),), "all", {}).save(path)
    for damaged in flips(path.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"manifest .*manifest\.json .*; delete it"):
            Manifest.load(path)


# ------------------------------------------------------------------------------------------------ within a study


@pytest.fixture(scope="module")
def data() -> DataSplits:
    preprocessing = preprocessing_of(build_model("digits_vit", num_classes=10))
    return prepare_digits(preprocessing=preprocessing, train_scenes=10, validation_scenes=4, test_scenes=4)


@pytest.fixture(scope="module")
def train_probe(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TrainResult]:
    path = tmp_path_factory.mktemp("probe") / "probe.safetensors"

    def run() -> TrainResult:
        return train_condition(
            recipe="probe",
            model_name="digits_vit",
            data=data,
            checkpoint=path,
            hyperparameters=Hyperparameters(epochs=1, batch_size=8, lr=1e-3, precision="fp32"),
        )

    return run


def test_a_damaged_sidecar_is_trained_again_and_a_damaged_history_written_again(
    train_probe: Callable[[], TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    path = train_probe().checkpoint
    assert train_probe().reused
    sidecar, history = (file.read_bytes() for file in (sidecar_path(path), history_path(path)))
    sidecar_path(path).write_bytes(sidecar.replace(b'"test_accuracy"', b'"test_accurqcy"'))
    assert not train_probe().reused
    assert "probe.json changed after it was written" in caplog.text
    assert sidecar_path(path).read_bytes() == sidecar
    for damaged in flips(history, 20):
        history_path(path).write_bytes(damaged)
        assert train_probe().reused
        assert history_path(path).read_bytes() == history
    history_path(path).unlink()
    assert train_probe().reused
    assert history_path(path).read_bytes() == history


def test_every_flipped_bit_of_a_training_state_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def state() -> TrainingState:
        module = nn.Linear(2, 1)
        nn.init.zeros_(module.weight)
        return TrainingState(module, torch.optim.SGD(module.parameters()))

    saved = state()
    saved.progress.step, saved.progress.loss_sum = 7, 1.25
    file = StateFile(tmp_path / "a.state.safetensors", "key")
    file.save(saved)
    for damaged in flips(file.path.read_bytes()):
        file.path.write_bytes(damaged)
        found = state()
        caplog.clear()
        file.restore(found)
        assert found.progress.step == 0
        assert "a.state.safetensors is damaged" in caplog.text
    file.save(saved)
    file.restore(found)
    assert found.progress == saved.progress
