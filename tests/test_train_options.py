"""What the loop offers beside the plain run: parts of a batch, averages, early ends, older states, adapters' inits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import train.state
from tests.miniatures import write_sports100
from tests.training_runs import Plain, training_run
from train.adapters import add_adapters
from train.checkpoint import history_path, read_checkpoint
from train.choices import TARGETS
from train.data.datasets import build_manifest, prepare_folder
from train.data.digits import prepare_digits
from train.data.images import DataSplits, FolderImages
from train.errors import InputError, TrainingDivergedError
from train.evaluation import Evaluation, evaluate
from train.loop import fit
from train.model_source import ModelSource
from train.models import build_model, preprocessing_of
from train.state import StateFile
from train.training import OnEpoch, TrainResult, train_condition

CPU = torch.device("cpu")
HYPER: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 1e-3, "precision": "fp32"}


@pytest.fixture(scope="module")
def data() -> DataSplits:
    preprocessing = preprocessing_of(build_model("digits_vit", num_classes=10))
    return prepare_digits(preprocessing=preprocessing, train_scenes=20, validation_scenes=8, test_scenes=8)


@pytest.fixture(scope="module")
def backbone(data: DataSplits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "probe.safetensors"
    train_condition(training_run("probe", **HYPER), model="digits_vit", data=data, checkpoint=path)
    return path


@pytest.fixture
def run(data: DataSplits, backbone: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    def run(name: str = "a", recipe: str = "full", on_epoch: OnEpoch | None = None, **values: Any) -> TrainResult:
        return train_condition(
            training_run(recipe, **(HYPER | values)),
            model=ModelSource("digits_vit", weights=backbone),
            data=data,
            checkpoint=tmp_path / f"{name}.safetensors",
            probe_checkpoint=backbone,
            on_epoch=on_epoch,
        )

    return run


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return read_checkpoint(result.checkpoint).tensors


def test_parts_of_a_batch_give_the_same_up_to_rounding(run: Callable[..., TrainResult]) -> None:
    whole, parts = (run(f"parts{n}", accumulate=n, lr=1e-4) for n in (1, 3))
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, atol=2e-5, rtol=0)
    for one, other in zip(whole.history, parts.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["train_accuracy"] == other["train_accuracy"]


def test_the_average_of_the_weights_is_what_is_kept(data: DataSplits, tmp_path: Path) -> None:
    """One weight that rises by 1 a step: its average is known."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

    module = Counter()

    def loss_of(images: torch.Tensor, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return -module.weight, torch.zeros(len(indices), 10)

    seen: list[float] = []

    def validate() -> Evaluation:
        seen.append(module.weight.item())
        return Evaluation(len(seen) / 10, 0.0)

    fit(
        module,
        torch.optim.SGD(module.parameters(), lr=1.0),
        Plain(loss_of, validate),
        train=data.train,
        run=training_run(epochs=2, batch_size=10, lr=1.0, ema_decay=0.5, warmup_fraction=0.0, clip_norm=0.0),
        state_file=StateFile(tmp_path / "s.safetensors", "key"),
        device=CPU,
    )
    value, average, expected = 0.0, 0.0, []
    for step in range(4):
        value += 0.5 * (1 + math.cos(math.pi * max(0, step - 1) / 3)) if step else 1.0
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
        expected.append(average)
    assert seen == pytest.approx([expected[1], expected[3]], abs=1e-6)
    assert module.weight.item() == pytest.approx(expected[3], abs=1e-6)


def test_an_averaged_run_resumes_to_the_same_bytes(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = {"ema_decay": 0.9}
    whole = run("whole", **hyper)
    assert whole.sha256 != run("plain").sha256

    def stop(history: Sequence[Any]) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("cut", **hyper, on_epoch=stop)
    resumed = run("cut", **hyper)
    assert resumed.sha256 == whole.sha256
    assert resumed.history == whole.history


def test_training_ends_early_and_stays_ended(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.state, "EPOCH_SAVE_SHARE", 1e9)  # save at every end of an epoch
    scores = {"given": iter([0.5, 0.9, 0.9, 0.1, 0.2, 0.0, 0.0])}
    monkeypatch.setattr("train.training.evaluate", lambda *arguments, **options: Evaluation(next(scores["given"]), 1.0))
    result = run(epochs=20, patience=2)
    assert [entry["validation_accuracy"] for entry in result.history] == [0.5, 0.9, 0.9, 0.1]
    scores["given"] = iter([0.5, 0.9, 0.9, 0.1])

    def stop(history: Sequence[Any]) -> None:
        if len(history) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("cut", epochs=20, patience=2, on_epoch=stop)
    scores["given"] = iter([0.0, 0.0])  # nothing is trained any more, so only the result is looked at
    assert run("cut", epochs=20, patience=2).sha256 == result.sha256


def interrupted_after(run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """A run named `cut` that saved at every step and was cut after some."""
    monkeypatch.setattr(train.state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(train.state, "SAVE_SHARE", 1e9)
    real, saves = StateFile.save, 0

    def stop_after_saving(self: StateFile, *arguments: Any) -> None:
        nonlocal saves
        real(self, *arguments)
        saves += 1
        if saves == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(StateFile, "save", stop_after_saving)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(StateFile, "save", real)


@pytest.mark.parametrize("damage", ["flip", "both", "gone"])
def test_a_damaged_state_falls_back_to_the_one_before_and_says_so(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    whole = run("whole")
    interrupted_after(run, monkeypatch, 5)
    last = whole.checkpoint.with_name("cut.state.safetensors")
    before = whole.checkpoint.with_name("cut.state.previous.safetensors")
    content = bytearray(last.read_bytes())
    content[-50] ^= 1
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(content)
    if damage == "both":
        before.write_bytes(b"no state")
    caplog.set_level("INFO", logger="train")
    resumed = run("cut")
    assert resumed.sha256 == whole.sha256
    assert resumed.history == whole.history
    assert not last.exists()
    assert not before.exists()
    if damage == "both":
        assert "cut.state.safetensors is damaged (its digest differs); the state before it is taken" in caplog.text
        assert "cut.state.previous.safetensors is damaged" in caplog.text
        assert "; training begins again" in caplog.text
    else:
        assert "full seed 42: going on at step 4 of 9" in caplog.text
        assert ("the state before it is taken" in caplog.text) == (damage != "gone")


def test_history_is_json_lines_and_is_whole_after_a_resume(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    lines = [json.loads(line) for line in history_path(whole.checkpoint).read_text().splitlines()]
    assert lines == whole.history
    assert set(lines[0]) == {"epoch", "loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"}
    interrupted_after(run, monkeypatch, 4)
    resumed = run("cut")
    assert history_path(resumed.checkpoint).read_bytes() == history_path(whole.checkpoint).read_bytes()


def test_tensorboard_gets_every_epoch_once(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from train.checkpoint import tensorboard_writer

    result = run()
    for end in (2, 3):  # a run that is cut, and goes on in another process
        write = tensorboard_writer(tmp_path / "events")
        write(result.history[: end - 1])
        write(result.history[:end])
    tensorboard_writer(tmp_path / "events")  # a run that was finished already
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = events.Scalars("loss")
    assert [event.step for event in found] == [0, 1, 2]
    np.testing.assert_allclose([event.value for event in found], [entry["loss"] for entry in result.history], rtol=1e-6)


def test_weights_that_diverge_after_the_last_step_are_not_kept(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.training.evaluate", lambda *arguments, **options: Evaluation(0.9, math.nan))
    with pytest.raises(TrainingDivergedError, match=r"validation loss nan after step 2 \(epoch 0\); lower"):
        run()


def test_evaluation_is_accuracy_and_cross_entropy(data: DataSplits) -> None:
    torch.manual_seed(0)
    model = build_model("digits_vit", num_classes=10).eval()
    found = evaluate(model, data.test, CPU, batch_size=3, label_smoothing=0.1)
    logits, labels = model(data.test.batch(range(8))), torch.from_numpy(data.test.labels)
    assert found.accuracy == float((logits.argmax(1) == labels).double().mean())
    assert found.loss == pytest.approx(
        nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).item(), abs=1e-6
    )


def test_pissa_takes_the_principal_part_and_eva_the_inputs(data: DataSplits) -> None:
    torch.manual_seed(0)
    model = build_model("digits_vit", num_classes=10).eval()
    weight = model.get_submodule("blocks.0.attn.qkv").weight.detach().clone()
    inputs: list[torch.Tensor] = []
    images = data.train.batch(range(20))
    hook = model.get_submodule("blocks.0.attn.qkv").register_forward_pre_hook(
        lambda layer, given: inputs.append(given[0].flatten(0, 1))
    )
    model(images)
    hook.remove()
    arguments: dict[str, Any] = {"dora": False, "rank": 4, "alpha": 4, "targets": r"blocks\.0\.attn\.qkv", "seed": 0}
    import copy

    adapted = add_adapters(copy.deepcopy(model), init="pissa", **arguments)
    parts = {name.split(".")[-3]: p for name, p in adapted.named_parameters() if "lora_" in name}
    left, values, right = torch.linalg.svd(weight)
    principal = left[:, :4] @ values[:4].diag() @ right[:4]
    torch.testing.assert_close(parts["lora_B"] @ parts["lora_A"], principal, atol=1e-4, rtol=0)

    adapted = add_adapters(copy.deepcopy(model), init="eva", batches=[images[:10], images[10:]], **arguments)
    directions = next(p for name, p in adapted.named_parameters() if "lora_A" in name)
    centred = inputs[0] - inputs[0].mean(dim=0)
    _, _, expected = torch.linalg.svd(centred, full_matrices=False)
    overlap = torch.linalg.svdvals(nn.functional.normalize(directions) @ expected[:4].T)
    assert overlap.min() > 0.95, "the same four directions"
    with pytest.raises(InputError, match="init eva cannot be computed on 0 training images"):
        add_adapters(copy.deepcopy(model), init="eva", **arguments)


def test_the_readers_workers_and_the_cache_change_nothing(tmp_path: Path) -> None:
    write_sports100(tmp_path / "sports", train=6, held_out=3)
    preprocessing = preprocessing_of(build_model(ModelSource("test_vit", img_size=32), num_classes=1))
    plain = prepare_folder(build_manifest(tmp_path / "sports", kind="sports100"), preprocessing=preprocessing)
    cached = prepare_folder(plain.manifest, preprocessing=preprocessing, cache=tmp_path)
    records, names = plain.manifest.split("train"), plain.class_names
    sources = {
        "one": replace(plain, train=FolderImages(plain.manifest.root, records, names, preprocessing, workers=1)),
        "seven": replace(plain, train=FolderImages(plain.manifest.root, records, names, preprocessing, workers=7)),
        "cached": cached,
    }
    values = HYPER | {"epochs": 1, "batch_size": 5, "flip": True, "rotation_degrees": 10.0, "color_jitter": 0.2}
    strides: set[tuple[int, ...]] = set()

    def see(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d):
            strides.add(inputs[0].stride())

    with torch.nn.modules.module.register_module_forward_pre_hook(see):
        digests = {
            train_condition(
                training_run("lora", **values),
                model=ModelSource("test_vit", img_size=32),
                data=source,
                checkpoint=tmp_path / f"{name}.safetensors",
            ).sha256
            for name, source in sources.items()
        }
    assert strides == {(3 * 32 * 32, 32 * 32, 32, 1)}, "one layout in memory: the digests of two differ on some CPUs"
    assert len(digests) == 1


def test_a_frozen_batch_norm_keeps_its_statistics(tmp_path: Path) -> None:
    write_sports100(tmp_path / "sports", train=4, held_out=2)
    preprocessing = preprocessing_of(build_model("test_resnet", num_classes=1))
    data = prepare_folder(build_manifest(tmp_path / "sports", kind="sports100"), preprocessing=preprocessing)
    torch.manual_seed(0)
    start = build_model("test_resnet", num_classes=3)
    from safetensors.torch import save_file

    save_file(start.state_dict(), tmp_path / "start.safetensors")
    arguments: dict[str, Any] = {
        "model": ModelSource("test_resnet", weights=tmp_path / "start.safetensors"),
        "data": data,
    }
    values = HYPER | {"epochs": 1}
    own = training_run("lora", **values, targets="fc", rank=2, own_head=True)
    adapted = train_condition(own, checkpoint=tmp_path / "a.safetensors", **arguments)
    changed = {n for n, t in start.state_dict().items() if not torch.equal(t, weights(adapted)[n])}
    assert changed == {"fc.weight"}, "the head's bias and every statistic are frozen"
    full = train_condition(training_run(**values), checkpoint=tmp_path / "b.safetensors", **arguments)
    assert not torch.equal(start.state_dict()["bn1.running_mean"], weights(full)["bn1.running_mean"])


def test_compression_needs_adapters(run: Callable[..., TrainResult]) -> None:
    with pytest.raises(InputError, match="compression int1 is of weights below adapters; recipe full has none"):
        run(compression="int1")
    assert TARGETS["block9_fc1"] == r"blocks\.9\.mlp\.fc1"


KILLED = """
import os, sys
import train.state
from pathlib import Path
from train.training import train_condition
from train.data.digits import prepare_digits
from train.models import build_model, preprocessing_of
from train.settings import ConditionConfig, TrainConfig, TrainingRun
from train.state import StateFile

folder, stop = Path(sys.argv[1]), int(sys.argv[2])
train.state.SAVE_SECONDS, train.state.SAVE_SHARE = 0.0, 1e9
written = 0
real = os.replace

def replace(*arguments):
    global written
    written += 1
    if written == stop:
        os.kill(os.getpid(), 9)
    real(*arguments)

os.replace = replace
data = prepare_digits(preprocessing=preprocessing_of(build_model("digits_vit", num_classes=10)), train_scenes=20,
                      validation_scenes=8, test_scenes=8)
run = TrainingRun(condition=ConditionConfig(recipe="dora", lr=1e-3),
                  shared=TrainConfig(epochs=3, batch_size=8, flip=False, precision="fp32"))
result = train_condition(run, model="digits_vit", data=data, checkpoint=folder / "a.safetensors")
print(result.sha256, written)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_any_write_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    def start(folder: str, stop: int) -> subprocess.CompletedProcess[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, "-c", KILLED, str(tmp_path / folder), str(stop)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    whole = start("whole", 0)
    assert whole.returncode == 0, whole.stderr
    content = (tmp_path / "whole" / "a.safetensors").read_bytes(), (tmp_path / "whole" / "a.json").read_bytes()
    sha256, writes = whole.stdout.split()
    for stop in (2, int(writes) // 2, int(writes)):
        killed = start(f"cut{stop}", stop)
        assert killed.returncode == -9, f"{stop}: {killed.stdout} {killed.stderr}"
        again = start(f"cut{stop}", 0)
        assert again.stdout.split()[0] == sha256, again.stderr
        folder = tmp_path / f"cut{stop}"
        assert ((folder / "a.safetensors").read_bytes(), (folder / "a.json").read_bytes()) == content
