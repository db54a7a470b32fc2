"""The sweep at a small size: every output that it names, nothing done twice, and the same after an interruption."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import train.sweep
from engine.run import main
from tests.damage import contents, kind_of
from tests.damage_subjects import OUTPUTS, SWEEP
from tests.miniatures import write_sports100
from tests.training_runs import training_run
from train.adapters import compress
from train.checkpoint import read_checkpoint, save_checkpoint
from train.errors import TrainingDivergedError
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint
from train.training import train_condition

NAMES = [f"quant={base}_r={rank}" for base in ("plain", "sparse", "int1") for rank in (1, 2)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("imagenet")
    write_sports100(root / "sports", train=4, held_out=3)
    # ImageNet-val's layout is class folders alone.
    for split in ("train", "valid", "test"):
        for sport in (root / "sports" / split).iterdir():
            for file in sport.iterdir():
                target = root / "val" / sport.name / f"{split}_{file.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(file, target)
    torch.manual_seed(0)
    save_file(build_model(ModelSource("test_vit", img_size=32), num_classes=3).state_dict(), root / "vit.safetensors")
    save_file(build_model("test_resnet", num_classes=3).state_dict(), root / "resnet.safetensors")
    return root


def command(images: Path, outputs: Path, *more: str) -> list[str]:
    """A sweep; what `more` gives is given instead."""
    given = [
        *("--data.root", str(images / "val"), "--outputs", str(outputs), "--model.name", "test_vit"),
        *("--model.weights", str(images / "vit.safetensors"), "--model.img_size", "32", "--sweep.ranks", "1,2"),
        *("--sweep.trials", "2", "--sweep.epochs", "2", "--train.batch_size", "16", "--train.precision", "fp32", *more),
    ]
    flags = dict(zip(given[::2], given[1::2], strict=True))
    return ["sweep", *(part for flag in flags.items() for part in flag)]


@pytest.fixture(scope="module")
def swept(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("sweep") / "out"
    assert main(command(images, outputs, "--init", "svd_init")) == 0
    return outputs / "sweep" / "lora_svd_init"


def test_every_named_output_is_there(swept: Path) -> None:
    rows = list(csv.DictReader((swept / "evaluation.csv").read_text().splitlines()))
    assert [f"quant={row['quant']}_r={row['rank']}" for row in rows] == NAMES
    for name, row in zip(NAMES, rows, strict=True):
        for kind in ("acc", "loss"):
            assert (swept / f"{kind}_{name}.png").read_bytes().startswith(b"\x89PNG")
        page = (swept / f"{name}_optimization_history.html").read_text()
        assert "<svg" in page
        assert page.count("<tr") == 1 + 2
        assert "src=" not in page
        assert "<script" not in page
        assert "href=" not in page.replace('xlink:href="#', "").replace('href="#', "")
        (checkpoint,) = swept.glob(f"{name}_eval_acc=*.safetensors")
        assert checkpoint.name == row["checkpoint"] == f"{name}_eval_acc={float(row['test_accuracy']):.4f}.safetensors"
        model = load_checkpoint(ModelSource("test_vit", img_size=32), checkpoint)
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
        assert read_checkpoint(checkpoint).metadata["test_accuracy"] == float(row["test_accuracy"])
        assert 0 <= float(row["test_accuracy_without_adapters"]) <= 1
        assert int(row["trials_complete"]) + int(row["trials_pruned"]) + int(row["trials_diverged"]) == 2
        # Adapters on qkv (64 → 192) and proj (64 → 64) of each block, and the head.
        blocks = len(load_checkpoint(ModelSource("test_vit", img_size=32), checkpoint).blocks)
        adapters = int(row["rank"]) * blocks * (64 + 192 + 64 + 64)
        assert int(row["trainable_parameters"]) == adapters + 3 * 64 + 3
    assert not list((swept / "trials").glob("*.safetensors")), "trials that were not kept leave nothing"


def test_every_file_is_of_a_kind_that_is_damaged_in_a_test(swept: Path) -> None:
    kinds = {kind_of(name, SWEEP | OUTPUTS) for name in contents(swept.parents[1])}
    assert kinds >= set(SWEEP.values())


def test_the_bases_are_what_they_are_called(swept: Path) -> None:
    def layer(base: str) -> torch.Tensor:
        (checkpoint,) = swept.glob(f"quant={base}_r=1_eval_acc=*.safetensors")
        return read_checkpoint(checkpoint).tensors["blocks.1.mlp.fc1.weight"]

    assert (layer("plain") == 0).sum() == 0
    assert int((layer("sparse") == 0).sum()) == layer("sparse").numel() // 2
    assert all(len(row.abs().unique()) == 1 for row in layer("int1"))


def test_a_second_run_trains_nothing(images: Path, swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in swept.iterdir() if path.suffix not in (".jsonl", "")}

    before = content()

    def no_training(*arguments: object, **more: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(train.sweep, "train_condition", no_training)
    assert main(command(images, swept.parents[1], "--init", "svd_init")) == 0
    assert content() == before


def test_an_interrupted_sweep_ends_like_one_that_was_not(
    images: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--init", "svd_init", "--sweep.bases", "int1", "--sweep.ranks", "2")
    real, calls = train_condition, 0

    def interrupted(run: Any, **arguments: Any) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:

            def stop(history: object) -> None:
                raise KeyboardInterrupt

            arguments["on_epoch"] = stop
        return real(run, **arguments)

    monkeypatch.setattr(train.sweep, "train_condition", interrupted)
    assert main(command(images, tmp_path / "out", *few)) == 130
    monkeypatch.undo()
    assert main(command(images, tmp_path / "out", *few)) == 0
    folder = tmp_path / "out" / "sweep" / "lora_svd_init"
    ends = ("quant=int1_r=2_optimization_history.html", "acc_quant=int1_r=2.png", "loss_quant=int1_r=2.png")
    for name in ends:
        assert (folder / name).read_bytes() == (swept / name).read_bytes()
    (one,), (other,) = (place.glob("quant=int1_r=2_eval_acc=*.safetensors") for place in (folder, swept))
    assert one.name == other.name
    assert one.read_bytes() == other.read_bytes()


def test_the_classifier_of_a_resnet_is_what_is_adapted(images: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "out"
    arguments = ["--model.name", "test_resnet", "--model.weights", str(images / "resnet.safetensors")]
    arguments += ["--model.img_size", "0", "--sweep.bases", "int1", "--sweep.ranks", "2", "--sweep.trials", "1"]
    assert main(command(images, outputs, *arguments, "--sweep.epochs", "1")) == 0
    (checkpoint,) = (outputs / "sweep" / "lora_paper_init").glob("quant=int1_r=2_eval_acc=*.safetensors")
    found, start = read_checkpoint(checkpoint), build_model("test_resnet", num_classes=3)
    start.load_state_dict(load_file(images / "resnet.safetensors"))
    compress(start, "int1", sparsity=0.0)
    changed = {n for n, t in start.state_dict().items() if not torch.equal(t, found.tensors[n])}
    assert changed == {"fc.weight"}
    assert found.metadata["trainable_parameters"] == 2 * (start.fc.in_features + 3)
    assert torch.linalg.matrix_rank(found.tensors["fc.weight"] - start.fc.weight, tol=1e-5) == 2


def test_a_vit_without_a_head_of_its_own_begins_with_a_probe(images: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "out"
    arguments = ["--model.weights", "", "--model.pretrained", "false", "--sweep.bases", "int1", "--sweep.ranks", "2"]
    assert main(command(images, outputs, *arguments, "--sweep.trials", "1")) == 0
    folder = outputs / "sweep" / "lora_paper_init"
    (checkpoint,) = folder.glob("quant=int1_r=2_eval_acc=*.safetensors")
    probe = read_checkpoint(outputs / "checkpoints" / "sweep_probe.safetensors")
    assert probe.metadata["recipe"] == "probe"
    found = read_checkpoint(checkpoint)
    assert found.metadata["hyperparameters"]["targets"] == r"blocks\.\d+\.attn\.(qkv|proj)"
    assert found.metadata["hyperparameters"]["compression"] == "int1"


def test_how_many_trials_there_were_before_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than before: the best of the first ones; more: those of a sweep that began with as many."""
    save_checkpoint(tmp_path / "vit.safetensors", {}, {})
    model = ModelSource("test_vit", img_size=32, weights=tmp_path / "vit.safetensors")
    images: Any = SimpleNamespace(
        manifest=SimpleNamespace(sha256=""), train=SimpleNamespace(preprocessing=SimpleNamespace(to_dict=dict))
    )

    def trained(self: object, params: dict[str, float], position: int, on_epoch: object = None) -> object:
        return SimpleNamespace(validation_accuracy=params["lr"] + params["label_smoothing"])

    numbers = dict.fromkeys(("validation_accuracy", "test_accuracy", "without_adapters", "trainable_parameters"), 0)
    monkeypatch.setattr(train.sweep._RankSweep, "_train", trained)
    monkeypatch.setattr(train.sweep._RankSweep, "_keep", lambda *_: (tmp_path, numbers | {"history": []}))

    def swept(folder: str, trials: int) -> train.sweep.RankResult:
        run = training_run("lora")
        plan = train.sweep.SweepPlan(
            model=model, probe=None, run=run, lr_range=(0.1, 1.0), trials=trials, device="cpu", folder=tmp_path / folder
        )
        return train.sweep.sweep_rank(plan, "plain", 1, images)

    small, large = swept("small", 7), swept("large", 14)
    assert [trial.params for trial in small.trials] == [trial.params for trial in large.trials[:7]]
    assert swept("small", 14) == large
    assert swept("large", 7) == small


def test_trials_that_all_diverge_are_said(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(*arguments: object, **more: object) -> None:
        raise TrainingDivergedError("loss nan at step 3")

    monkeypatch.setattr(train.sweep, "train_condition", diverge)
    assert main(command(images, tmp_path / "out", "--sweep.bases", "plain", "--sweep.ranks", "1")) == 1
    assert "all 2 trials of quant=plain_r=1 ended in NaN or Inf; lower sweep.lr_high" in capsys.readouterr().err


def test_what_cannot_be_swept_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = str(tmp_path / "out")
    assert main(["sweep", "--data.root", str(images), "--data.kind", "digits", "--outputs", outputs]) == 2
    assert "data.kind is digits, which has no pictures on disk" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert main(command(images, tmp_path / "out")) == 2
    assert "sweep runs in one process" in capsys.readouterr().err
    assert main(command(images, tmp_path / "out", "--sweep.lr_low", "1")) == 2
    assert "sweep.lr_low 1 must be below sweep.lr_high 0.03" in capsys.readouterr().err
