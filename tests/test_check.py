"""What would fail late is found before any work; what only looks like a mistake works."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from engine.config import load_study
from engine.measure.table import read_table
from engine.run import main
from engine.study.journal import Journal
from engine.study.start import Start
from store import AttentionStore
from tests.photographs import write_photographs

NO_CACHE = ["--data.cache", "false"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    write_photographs(root, per_class=3, size=96)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    save_file(timm.create_model("test_vit", num_classes=3).state_dict(), path)
    return path


def test_a_study_without_sample_maps_and_with_a_metric_of_ones_own(photos: Path, weights: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    command = ["compare", "--baseline", str(weights), "--finetuned", str(weights), "--model.name", "test_vit"]
    command += ["--data.root", str(photos), "--outputs", str(outputs), *NO_CACHE, "--capture.samples", "0"]
    command += ["--relevance.measured", "1", "--relevance.methods", "rollout", "--relevance.steps", "1"]
    command += ["--statistics.permutations", "19", "--measure.backend", "torch"]
    assert main([*command, "--measure.metrics", "entropy,tests.own_metrics:peak"]) == 0
    assert not (outputs / "samples.zarr").exists()
    table = read_table(outputs / "metrics" / "attention_metrics.zarr")
    assert list(table.data_vars) == ["entropy", "own.peak"]
    assert 1 / 101 <= float(table["own.peak"].min()) <= float(table["own.peak"].max()) <= 1
    controls = json.loads((outputs / "metrics" / "controls.json").read_text())
    assert controls
    assert all(control["held"] for control in controls)
    assert "own.peak" in (outputs / "summary.md").read_text()


def test_capture_without_sample_maps(photos: Path, weights: Path, tmp_path: Path) -> None:
    command = ["capture", "--model.name", "test_vit", "--model.weights", str(weights), "--data.root", str(photos)]
    assert main([*command, "--store", str(tmp_path / "s.zarr"), "--capture.samples", "0"]) == 0
    assert AttentionStore.open(tmp_path / "s.zarr").complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.ledger", "s.zarr"]


@pytest.fixture
def comparison(photos: Path, weights: Path, tmp_path: Path) -> list[str]:
    return [
        *("compare", "--baseline", str(weights), "--finetuned", str(weights), "--model.name", "test_vit"),
        *("--data.root", str(photos), "--outputs", str(tmp_path / "made" / "outputs"), *NO_CACHE),
    ]


def refused(command: list[str], capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    """The one sentence of a command that is refused, and leaves nothing of itself."""
    before = sorted(folder.rglob("*"))
    assert main(command) == 2
    sentences = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1
    assert sorted(folder.rglob("*")) == before
    return sentences[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--measure.metrics", "distance,region_mass"], "region_mass needs images with regions"),
        (
            ["--measure.metrics", "js_divergence"],
            "js_divergence compares two captures, and each condition is measured alone",
        ),
        (["--measure.metrics", "tests.own_metrics:batched"], "returned shape (1,) for 2 map(s); expected"),
        (["--measure.metrics", "tests.own_metrics:missing"], "module 'tests.own_metrics' has no 'missing'"),
        (["--measure.backend", "triton"], "backend 'triton' reads data on cuda"),
        (["--measure.backend", "sdpa", "--capture.sinks", "store"], "measures query and key, not stored attention"),
        (["--capture.layers", "0,12"], "has no layer 12; its measurable layers are 0 to"),
        (["--capture.heads", "64"], "has no head 64; its heads are 0 to"),
    ],
)
def test_what_cannot_be_captured_is_refused_before_any_work(
    flags: list[str], sentence: str, comparison: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert sentence in refused([*comparison, *flags], capsys, tmp_path)


def test_a_refused_command_leaves_a_finished_study_as_it_is(
    comparison: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from engine.study.journal import Journal
    from engine.study.outputs import OutputsFolder

    outputs = tmp_path / "made" / "outputs"
    with OutputsFolder(outputs, "a = 1\n", Journal(outputs / "run.jsonl")) as place:
        place.begin()
    before = {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file()}
    refused([*comparison, "--measure.metrics", "region_mass"], capsys, tmp_path)
    assert {path: path.read_bytes() for path in outputs.rglob("*") if path.is_file()} == before


def test_what_does_not_fit_on_the_disk_is_refused_with_both_numbers(
    comparison: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000))
    sentence = refused([*comparison, "--capture.sinks", "store"], capsys, tmp_path)
    found = re.search(r"may need (\d+) MB \(.*captures (\d+) MB.*\), and the disk has 3 MB free", sentence)
    assert found
    # Nine images of both models, a map of 101×101 tokens for each head at 16 bits; a megabyte of metadata per store.
    model = timm.create_model("test_vit", num_classes=3)
    maps = 2 * 9 * len(model.blocks) * model.blocks[0].attn.num_heads * 101**2 * 2
    assert int(found[2]) == pytest.approx((maps + 2 * 2**20) / 1e6, abs=0.6)


def test_what_lies_there_counts_as_written_where_it_is_the_studys_own_and_sample_maps_are_of_all_heads(
    comparison: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000))

    def needed(*flags: str) -> dict[str, int]:
        sentence = refused([*comparison, *flags], capsys, tmp_path)
        return {what: int(size) for what, size in re.findall(r"(sample maps|captures) (\d+) MB", sentence)}

    flags = ["--capture.layers", "0", "--capture.heads", "0", "--capture.samples", "4"]
    whole = needed(*flags)
    model = timm.create_model("test_vit", num_classes=3)
    maps = 2 * 4 * len(model.blocks) * model.blocks[0].attn.num_heads * 101**2 * 2
    assert whole["sample maps"] == pytest.approx(maps / 1e6, abs=0.6)
    for name, left in (("earlier_seed0", whole["captures"]), ("baseline_seed0", whole["captures"] - 2)):
        file = tmp_path / "made" / "outputs" / "captures" / f"{name}.zarr" / "maps"
        file.parent.mkdir(parents=True)
        with open(file, "wb") as sparse:
            sparse.truncate(2_000_000)
        assert needed(*flags)["captures"] == left


def study(photos: Path, tmp_path: Path, *flags: str, name: str = "test_vit") -> list[str]:
    return [
        *("study", "--model.name", name, "--model.pretrained", "false", "--data.kind", "folder"),
        *("--data.root", str(photos), "--outputs", str(tmp_path / "outputs"), *flags),
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--conditions.dora.targets", "blocks.99.attn.qkv"], "condition dora: targets 'blocks.99.attn.qkv' match no"),
        (["--conditions.dora.targets", "patch_embed.proj"], "condition dora: targets 'patch_embed.proj' match patch_e"),
        (["--conditions.dora.rank", "65"], "condition dora: rank 65 is more than blocks.0.attn.qkv has (192×64)"),
        (["--conditions.dora.targets", "head", "--conditions.dora.rank", "4"], "rank 4 is more than head has (3×64)"),
        (["--data.split", "all"], "gives no file for the train split with split all, and training needs all"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(
    flags: list[str], sentence: str, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert sentence in refused(study(photos, tmp_path, *flags), capsys, tmp_path)


ALL_LINEAR = r"blocks\..*\.qkv"


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        ("vit_relpos_small_patch16_224", ["--measure.metrics", "cls_entropy"], "this layout has no class token"),
        ("vit_small_patch16_18x2_224", ["--conditions.dora.targets", ALL_LINEAR], "leave gradcam out of relevance.m"),
    ],
)
def test_models_that_do_not_have_what_is_asked_for(
    name: str, flags: list[str], sentence: str, photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = study(photos, tmp_path, "--model.img_size", "32", *flags, name=name)
    assert sentence in refused(command, capsys, tmp_path)


def test_adapters_of_a_sweep_are_tried_before_any_work(
    photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["sweep", "--model.name", "test_vit", "--model.pretrained", "false", "--data.root", str(photos)]
    sentence = refused([*command, "--outputs", str(tmp_path / "out"), "--sweep.ranks", "1,65"], capsys, tmp_path)
    assert "sweep.ranks: rank 65 is more than blocks.0.attn.qkv has (192×64)" in sentence


def test_a_stored_capture_is_asked_for_what_its_maps_have(
    photos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    store = str(tmp_path / "s.zarr")
    command = ["capture", "--model.name", "vit_relpos_small_patch16_224", "--model.pretrained", "false"]
    command += ["--model.img_size", "32", "--data.root", str(photos), "--store", store, "--capture.sinks", "store"]
    assert "has no layer 40" in refused([*command, "--capture.layers", "40"], capsys, tmp_path)
    assert main([*command, "--capture.samples", "0", "--capture.layers", "0"]) == 0
    capsys.readouterr()
    for metric, sentence in (("cls_entropy", "this layout has no class token"), ("region_mass", "needs images with")):
        assert sentence in refused(["measure", "--store", store, "--metrics", metric], capsys, tmp_path)


def test_weights_are_not_looked_for_at_timm_where_scenes_make_them(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text('[conditions.baseline]\nrecipe = "probe"\n', encoding="utf-8")
    config = load_study(path, {"model.name": "digits_vit"})
    assert config.model.pretrained
    assert Start(config, tmp_path, Journal(tmp_path / "run.jsonl")).take_model().num_classes == 10
