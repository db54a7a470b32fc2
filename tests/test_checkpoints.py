"""What checkpoints and the files beside them say is checked: any changed bit is named, or the file made again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.trial import TrialState
from safetensors.torch import save_file
from torch import nn

from engine.config import load_study
from engine.study.data import StudyData, prepare_data
from engine.study.journal import Journal
from engine.study.start import Start
from engine.study.training import train_runs
from tests.photographs import write_photographs
from tests.training_runs import training_run
from train.checkpoint import (
    has_sidecar,
    history_path,
    read_checkpoint,
    read_metadata,
    save_checkpoint,
    sidecar_path,
    state_digest,
)
from train.data.digits import prepare_digits
from train.data.images import DataSplits, Preprocessing
from train.data.manifest import Manifest, Record
from train.errors import DamagedFileError, InputError
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint, preprocessing_of
from train.state import StateFile, TrainingState
from train.sweep import TrialsFile
from train.training import TrainResult, train_condition
from train.weights import read_state_dict
from train.whole_files import checked_json, parse_checked_json

TINY = "test_vit"


def flips(content: bytes, count: int) -> Iterator[bytes]:
    """The content with one bit flipped, at `count` seeded places."""
    for place in random.Random(0).sample(range(len(content) * 8), count):
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


def test_a_flipped_bit_of_a_sidecar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"weight": torch.ones(2)}, {"model": TINY, "test_accuracy": 0.09, "history": [{"loss": 206}]})
    for damaged in [*flips(sidecar_path(path).read_bytes(), 300), b""]:
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


def test_a_sidecar_of_other_weights_is_called_that_and_nothing_is_to_be_deleted_with_it(tmp_path: Path) -> None:
    for name, value in (("a", 0.0), ("b", 1.0)):
        save_checkpoint(tmp_path / f"{name}.safetensors", {"w": torch.full((3,), value)}, {"model": "m"})
    (tmp_path / "a.json").write_bytes((tmp_path / "b.json").read_bytes())
    with pytest.raises(DamagedFileError, match=r"a\.json beside it was written for b\.safetensors, with other weights"):
        read_checkpoint(tmp_path / "a.safetensors")
    for suffix in (".safetensors", ".json"):  # both renamed: still one another's
        (tmp_path / f"c{suffix}").write_bytes((tmp_path / f"b{suffix}").read_bytes())
    assert read_checkpoint(tmp_path / "c.safetensors").tensors["w"].sum() == 3


def test_a_flipped_bit_of_a_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    Manifest("folder", "/photos", ("a",), (Record("a/1.png", 0, "a", "test", "ok", "f0"),), "all", {}).save(path)
    for damaged in flips(path.read_bytes(), 200):
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"manifest .*manifest\.json .*; delete it"):
            Manifest.load(path)


def optuna_study(path: Path, name: str) -> optuna.Study:
    storage = JournalStorage(TrialsFile(path, name))
    return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)


def test_a_flipped_bit_of_the_trials_costs_one_study_the_trials_after_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "trials.jsonl"

    def run(name: str, count: int) -> None:
        study = optuna_study(path, name)
        for number in range(count):
            trial = study.ask()
            value = trial.suggest_float("lr", 1e-4, 1e-1) + number
            trial.report(value, 0)
            study.tell(trial, value)

    def outcomes(name: str) -> list[tuple[Any, ...]]:
        trials = optuna_study(path, name).get_trials(states=(TrialState.COMPLETE,))
        return [(trial.params, trial.value, trial.intermediate_values) for trial in trials]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for name, count in (("a", 3), ("b", 3), ("a", 2)):
        run(name, count)
    whole, expected = path.read_bytes(), {name: outcomes(name) for name in "ab"}
    assert [len(expected[name]) for name in "ab"] == [5, 3]
    for damaged in [*flips(whole, 20), whole[:-20]]:
        path.write_bytes(damaged)
        caplog.clear()
        found = {name: outcomes(name) for name in "ab"}
        assert "trials.jsonl: line " in caplog.text
        assert all(found[name] == expected[name][: len(found[name])] for name in "ab")
        if damaged.count(b"\n") == whole.count(b"\n"):  # otherwise two lines became one
            assert found["a"] == expected["a"] or found["b"] == expected["b"]
        caplog.clear()
        run("a", 5 - len(found["a"]))
        assert outcomes("a")[: len(found["a"])] == found["a"]
        assert len(outcomes("a")) == 5, "what was cut off does not come back"
        assert not caplog.text


# ------------------------------------------------------------------------------------------------ weights of any origin


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(TINY, num_classes=3).eval()


def test_a_flipped_bit_of_a_torch_file_is_named_or_changes_no_weight(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    saved = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    torch.save({"model": saved, "epoch": 3}, path)
    content, named = path.read_bytes(), []
    start = content.index(saved["a"].numpy().tobytes())
    for damaged in [*flips(content, 500), content[:start] + b"\1" + content[start + 1 :]]:
        path.write_bytes(damaged)
        try:
            found = read_state_dict(path)
        except InputError as error:
            named.append("a.pth" in str(error))
        else:
            assert state_digest(found) == state_digest(saved)
    assert all(named)
    assert len(named) > 100
    with pytest.raises(DamagedFileError, match=r"a\.pth is damaged: its record a/data/0 is not as it was saved"):
        read_state_dict(path)


def test_torch_files_without_checksums_are_read_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="train")
    saved = {"a": torch.arange(6.0)}
    torch.save(saved, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(saved, tmp_path / "bare.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    for name, reason in (("old", "holds no checksum"), ("bare", "was saved without checksums")):
        for _ in range(2):
            assert state_digest(read_state_dict(tmp_path / f"{name}.pth")) == state_digest(saved)
        assert len([line for line in caplog.messages if f"{name}.pth" in line and reason in line]) == 1


# ------------------------------------------------------------------------------------------------ own facts

OTHER = Preprocessing(
    channels=3,
    height_px=96,
    width_px=96,
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="squash",
)


def save_trained(path: Path, preprocessing: Preprocessing = OTHER, img_size: int = 96) -> Path:
    """A checkpoint as our training saves it."""
    torch.manual_seed(0)
    state = build_model(ModelSource(TINY, img_size=img_size), num_classes=2).state_dict()
    facts = {"model": f"{TINY}.r160_in1k", "img_size": img_size, "preprocessing": preprocessing.to_dict()}
    save_checkpoint(path, state, facts)
    return path


def test_size_and_preprocessing_of_a_sidecar_are_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="train")
    path = save_trained(tmp_path / "a.safetensors")
    for model in (load_checkpoint(TINY, path), build_model(ModelSource(TINY, weights=path), num_classes=5)):
        assert preprocessing_of(model) == OTHER
        assert model.get_parameter("pos_embed").shape == (1, 37, 64)
    assert "resized" not in caplog.text
    larger = load_checkpoint(ModelSource(TINY, img_size=112), path)
    assert preprocessing_of(larger) == replace(OTHER, height_px=112, width_px=112)
    assert "a.safetensors was trained at 96×96 px and is used at model.img_size 112" in caplog.text
    sidecar_path(path).unlink()
    assert preprocessing_of(load_checkpoint(TINY, path)).height_px == 160
    with pytest.raises(InputError, match=r"is of model test_vit\.r160_in1k, as its sidecar says, .*give --model\.name"):
        load_checkpoint("vit_tiny_patch16_224", save_trained(path))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photographs(root, per_class=2)
    return root


def compared(photos: Path, folder: Path, a: Path, b: Path, **keys: str) -> StudyData:
    given = {"data.kind": "folder", "data.split": "all", "data.root": str(photos), "model.name": TINY}
    conditions = {name: {"recipe": "checkpoint", "checkpoint": str(path)} for name, path in (("a", a), ("b", b))}
    config = load_study(None, {**given, "conditions": conditions, **keys})
    return prepare_data(Start(config, folder, Journal(folder / "run.jsonl")), device="cpu")


def test_compared_checkpoints_see_the_same_pixels(tmp_path: Path, photos: Path) -> None:
    a = save_trained(tmp_path / "a.safetensors")
    b = save_trained(tmp_path / "b.safetensors")
    assert compared(photos, tmp_path, a, b).preprocessing == OTHER
    own = preprocessing_of(build_model(ModelSource(TINY, img_size=96), num_classes=2))
    save_trained(b, own)
    with pytest.raises(
        InputError, match=r"condition a was .*squash.*, and b as .*center.*choose with --data\.prepare_as a"
    ):
        compared(photos, tmp_path, a, b)
    for chosen, expected in (("a", OTHER), ("b", own), ("model", own)):
        assert compared(photos, tmp_path, a, b, **{"data.prepare_as": chosen}).preprocessing == expected
    with pytest.raises(InputError, match=r"data\.prepare_as is 'c'; expected model, or a condition \(a, b\)"):
        compared(photos, tmp_path, a, b, **{"data.prepare_as": "c"})
    save_trained(b, replace(OTHER, height_px=112, width_px=112), img_size=112)
    with pytest.raises(InputError, match=r"a takes images of 96×96 px and b of 112×112 px; .* --model\.img_size"):
        compared(photos, tmp_path, a, b)
    data = compared(photos, tmp_path, a, b, **{"model.img_size": "80"})
    assert data.preprocessing == replace(OTHER, height_px=80, width_px=80)
    assert data.test.batch([0]).shape == (1, 3, 80, 80)


def test_each_condition_may_choose_its_weights(tmp_path: Path, photos: Path, model: nn.Module) -> None:
    path = tmp_path / "a.pth"
    average = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": average}, path)
    conditions = {name: {"recipe": "checkpoint", "checkpoint": str(path)} for name in ("plain", "average")}
    conditions["average"]["state"] = "model_ema"
    given = {"data.kind": "folder", "data.split": "all", "data.root": str(photos), "model.name": TINY}
    config = load_study(None, given | {"conditions": conditions})
    journal = Journal(tmp_path / "run.jsonl")
    begun = Start(config, tmp_path, journal)
    runs = train_runs(begun, prepare_data(begun, device="cpu"), device="cpu")
    assert [run.model.state for run in runs] == ["", "model_ema"]
    assert runs[0].digest != runs[1].digest, "one file, two models"
    with pytest.raises(InputError, match=r"data\.prepare_as is for given checkpoints"):
        prepare_data(Start(load_study(None, {**given, "data.prepare_as": "a"}), tmp_path, journal), device="cpu")
    with pytest.raises(InputError, match=r"model\.state is 'ema', .*give --model\.weights"):
        build_model(ModelSource(TINY, state="ema"), num_classes=2)


def test_a_bad_file_is_named_with_its_condition_before_any_picture_is_read(
    tmp_path: Path, model: nn.Module, photos: Path
) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    state["head.bias"][0] = torch.nan
    save_file(state, tmp_path / "b.safetensors")
    nowhere = tmp_path / "nowhere"
    with pytest.raises(InputError, match=r"^condition b: checkpoint .*b\.safetensors: head\.bias\[0\] is nan"):
        compared(nowhere, tmp_path, tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    config = load_study(
        None,
        {
            "data.kind": "folder",
            "data.root": str(photos),
            "data.split": "all",
            "model.name": TINY,
            "model.weights": str(tmp_path / "b.safetensors"),
        },
    )
    with pytest.raises(InputError, match=r"head\.bias\[0\] is nan"):
        prepare_data(Start(config, tmp_path, Journal(tmp_path / "run.jsonl")), device="cpu")


def test_training_from_a_checkpoint_of_ours_keeps_its_facts(tmp_path: Path, photos: Path) -> None:
    path = save_trained(tmp_path / "a.safetensors")
    given = {"data.kind": "folder", "data.root": str(photos), "data.split": "all", "model.name": TINY}
    config = load_study(None, {**given, "model.weights": str(path)})
    data = prepare_data(Start(config, tmp_path, Journal(tmp_path / "run.jsonl")), device="cpu")
    assert data.preprocessing == OTHER
    start = tmp_path / "checkpoints" / "pretrained.safetensors"
    facts = read_metadata(start)
    assert (facts["img_size"], facts["preprocessing"]) == (96, OTHER.to_dict())
    assert preprocessing_of(build_model(ModelSource(TINY, weights=str(start)), num_classes=None)) == OTHER
    assert ModelSource(TINY, weights=start).completed().img_size == 96
    assert ModelSource(TINY, weights=start, img_size=80).completed().img_size == 80
    sidecar = sidecar_path(start).read_bytes()
    sidecar_path(start).write_bytes(sidecar.replace(b"96", b"97", 1))
    prepare_data(Start(config, tmp_path, Journal(tmp_path / "run.jsonl")), device="cpu")
    assert sidecar_path(start).read_bytes() == sidecar, "made again, not blessed"


# ------------------------------------------------------------------------------------------------ within a study


@pytest.fixture(scope="module")
def data() -> DataSplits:
    preprocessing = preprocessing_of(build_model("digits_vit", num_classes=10))
    return prepare_digits(preprocessing=preprocessing, train_scenes=10, validation_scenes=4, test_scenes=4)


@pytest.fixture(scope="module", params=["probe", "full"])
def train_once(
    data: DataSplits, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[], TrainResult]:
    path = tmp_path_factory.mktemp(request.param) / "run.safetensors"

    def run() -> TrainResult:
        values = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "precision": "fp32"}
        return train_condition(training_run(request.param, **values), model="digits_vit", data=data, checkpoint=path)

    return run


def test_a_damaged_sidecar_is_trained_again_and_a_damaged_history_written_again(
    train_once: Callable[[], TrainResult], caplog: pytest.LogCaptureFixture
) -> None:
    path = train_once().checkpoint
    assert train_once().reused
    sidecar, history = (file.read_bytes() for file in (sidecar_path(path), history_path(path)))
    sidecar_path(path).write_bytes(sidecar.replace(b'"test_accuracy"', b'"test_accurqcy"'))
    assert not train_once().reused
    assert "run.json changed after it was written" in caplog.text
    assert sidecar_path(path).read_bytes() == sidecar
    for damaged in flips(history, 20):
        history_path(path).write_bytes(damaged)
        assert train_once().reused
        assert history_path(path).read_bytes() == history
    history_path(path).unlink()
    assert train_once().reused
    assert history_path(path).read_bytes() == history


def test_a_flipped_bit_of_a_training_state_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def state() -> TrainingState:
        module = nn.Linear(2, 1)
        nn.init.zeros_(module.weight)
        return TrainingState(module, torch.optim.SGD(module.parameters()))

    saved = state()
    saved.progress.step, saved.progress.loss_sum = 7, 1.25
    file = StateFile(tmp_path / "a.state.safetensors", "key")
    file.save(saved)
    for damaged in flips(file.path.read_bytes(), 200):
        file.path.write_bytes(damaged)
        found = state()
        caplog.clear()
        file.restore(found)
        assert found.progress.step == 0
        assert "a.state.safetensors is damaged" in caplog.text
    file.save(saved)
    file.restore(found)
    assert found.progress == saved.progress
