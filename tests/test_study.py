"""The study end to end at a small size: every output, controls that can fail, resume, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import load_study
from engine.measure.table import read_table
from engine.run import main
from engine.study.controls import (
    Lockstep,
    first_reached_block,
    hybrid_control,
    hybrid_state,
    same_attention_control,
    untouched_control,
)
from engine.study.journal import digest_path
from store import AttentionStore
from tests.damage import contents, kind_of
from tests.damage_subjects import OUTPUTS as OUTPUT_KINDS
from tests.photographs import write_broken, write_photographs

SMALL = [
    *("--data.train_scenes", "96", "--data.validation_scenes", "48", "--data.test_scenes", "40"),
    *("--pretrain.scenes", "96", "--pretrain.epochs", "1", "--train.epochs", "1"),
    *("--statistics.permutations", "199", "--capture.batch_size", "16"),
    *("--relevance.images", "1", "--relevance.measured", "4", "--relevance.steps", "2"),
    *("--capture.samples", "3", "--train.precision", "fp32"),
]

OUTPUTS = [
    "checkpoints/baseline_seed1.safetensors",
    "checkpoints/finetuned_seed1.safetensors",
    "checkpoints/finetuned_seed2.safetensors",
    "checkpoints/dora_seed1.safetensors",
    "checkpoints/dora_seed2.safetensors",
    "metrics/attention_comparison.json",
    "metrics/attention_metrics.zarr",
    "metrics/attention_metrics.h5",
    "metrics/attention_metrics.csv",
    "visualizations/gradcam_samples/gradcam_samples.csv",
    "metrics/relevance.json",
    "metrics/relevance.csv",
    "visualizations/relevance/generic/generic_samples.csv",
    "visualizations/relevance/lrp/lrp_samples.csv",
    "visualizations/figures/region_mass.svg",
    "visualizations/figures/region_mass.png",
    "samples.zarr",
    "summary.md",
    "report.html",
    "study.toml",
    "run.jsonl",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("study") / "out"
    assert main(["--outputs", str(outputs), "--train.seeds", "1,2", *SMALL]) == 0
    return outputs


def test_every_output_is_there(study: Path) -> None:
    assert not [name for name in OUTPUTS if not (study / name).exists()]
    assert not (study / "checkpoints" / "baseline_seed2.safetensors").exists(), "no seed changes a probe's attention"


def test_every_file_is_of_a_kind_that_is_damaged_in_a_test(study: Path) -> None:
    kinds = {kind_of(name, OUTPUT_KINDS) for name in contents(study)}
    # What a study of scenes does not leave: photographs in a cache, stored maps, metrics measured later.
    others = {"bias", "image cache", "image cache sidecar", "manifest", "shard", "training state"}
    others |= {"ledger batch of a metric", "ledger metadata of a metric"}
    assert kinds == set(OUTPUT_KINDS.values()) - others


def test_the_table_and_the_comparison_say_the_same(study: Path) -> None:
    table = read_table(study / "metrics" / "attention_metrics.zarr")
    assert dict(table.sizes) == {"condition": 3, "seed": 2, "image": 40, "layer": 4, "head": 4, "region": 2}
    assert list(table["condition"].values) == ["baseline", "finetuned", "dora"]
    assert list(table["seed_invariant"].values) == [True, False, False]
    assert not np.isnan(table["distance"].values).any()
    document = json.loads((study / "metrics" / "attention_comparison.json").read_text())
    assert document["schema"] == 1
    assert document["layers"] == [f"blocks.{i}.attn" for i in range(4)]
    expected = table["entropy"].sel(condition="dora").mean(["seed", "image", "head"]).values
    np.testing.assert_allclose(document["conditions"]["dora"]["entropy"], expected, rtol=1e-6)
    keys = {
        "condition",
        "against",
        "metric",
        "unit_of_inference",
        "family",
        "layer",
        "difference",
        "dz",
        "ci",
        "p",
        "p_max_t",
    }
    assert all(keys <= set(test) for test in document["tests"])
    assert {test["level"] for test in document["tests"]} == {"head", "layer", "class", "seed", "layer_means"}
    for part in ("trends", "clusters", "relations"):
        assert isinstance(document[part], list), part
    assert set(document["accuracy"]) == {"baseline", "finetuned", "dora"}


def test_the_primary_family_was_named_before_anything_was_captured(study: Path) -> None:
    """What is hashed stands in the journal before the first capture; another family named now would come after it."""
    document = json.loads((study / "metrics" / "attention_comparison.json").read_text())
    named = (study / "metrics" / "primary.json").read_bytes()
    family = {"metrics": ["distance", "entropy", "morans_i"], "before": True}
    assert document["primary"] == family | {"sha256": hashlib.sha256(named).hexdigest()}
    primary = [test for test in document["tests"] if test["role"] == "primary"]
    assert {test["metric"] for test in primary} == set(family["metrics"])
    assert {test["condition"] for test in primary} == {"finetuned", "dora"}
    records = [json.loads(line) for line in (study / "run.jsonl").read_text().splitlines()]
    stages = [record["stage"] for record in records]
    assert stages.index("metrics/primary.json") < min(i for i, name in enumerate(stages) if name.startswith("capture"))


def test_every_control_held(study: Path) -> None:
    controls = json.loads((study / "metrics" / "controls.json").read_text())
    assert [control["name"] for control in controls] == [
        "frozen_baseline",
        "itself_finetuned",
        "hybrid_finetuned",
        "itself_dora",
        "hybrid_dora",
    ]
    assert all(control["held"] and control["value"] == 0 for control in controls)


def test_regions_are_shares_of_the_class_tokens_attention(study: Path) -> None:
    table = read_table(study / "metrics" / "attention_metrics.zarr")
    share = table["region_mass"]
    assert list(table["region"].values) == ["source_digit", "target_digit"]
    assert float(share.min()) >= 0
    assert float(share.sum("region").max()) <= 1 + 1e-6
    # Attention that is not uniform: the box of the large digit does not get just its share of the image.
    assert float(share.std("image").min()) > 0


def test_a_second_run_does_nothing_that_is_done(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: digest_path(study / name) for name in OUTPUTS}
    assert main(["--outputs", str(study), "--train.seeds", "1,2", *SMALL]) == 0
    printed = capsys.readouterr()
    assert "train dora seed 2: done already" in printed.out
    assert "statistics: done already" in printed.out
    assert "report: done already" in printed.out
    assert {name: digest_path(study / name) for name in OUTPUTS} == before


def test_the_report_needs_neither_images_nor_models(study: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(study, kept, ignore=shutil.ignore_patterns("checkpoints", "captures"))
    for name in ("report.html", "summary.md"):
        (kept / name).unlink()
    assert main(["report", "--outputs", str(kept)]) == 0
    for name in ("report.html", "summary.md", "visualizations/figures"):
        assert digest_path(kept / name) == digest_path(study / name)


def test_an_interrupted_study_goes_on_and_the_written_study_repeats_itself(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "out"
    command = ["--config", str(study / "study.toml"), "--outputs", str(outputs)]

    import engine.capture.stream

    commit = engine.capture.stream.AttentionWriter.commit
    batches = []

    def interrupted(self, batch, *args, **options):  # type: ignore[no-untyped-def]
        batches.append(batch)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return commit(self, batch, *args, **options)

    monkeypatch.setattr(engine.capture.stream.AttentionWriter, "commit", interrupted)
    assert main(command) == 130
    monkeypatch.undo()
    store = AttentionStore.open(outputs / "captures" / "baseline_seed1.zarr")
    assert store.committed_images.tolist() == [True] * 16 + [False] * 24, "the first batch is kept"
    assert main(command) == 0
    first, second = (read_table(folder / "metrics" / "attention_metrics.zarr") for folder in (study, outputs))
    assert first.equals(second)
    assert (study / "summary.md").read_bytes() == (outputs / "summary.md").read_bytes()


def test_a_damaged_capture_is_made_again_alone(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = next((study / "captures" / "dora_seed1.zarr" / "metrics" / "distance").rglob("c*0"))
    shard.unlink()
    assert main(["stats", "--outputs", str(study)]) == 0
    printed = capsys.readouterr().out
    assert "capture finetuned_seed1: done already" in printed
    assert "capture dora_seed1: done already" not in printed
    assert AttentionStore.open(study / "captures" / "dora_seed1.zarr").complete


def test_a_folder_is_trained_captured_and_reported(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write_photographs(root, per_class=8, size=64)
    broken = write_broken(root)
    outputs = tmp_path / "out"
    torch.manual_seed(0)
    command = ["study", "--data.kind", "folder", "--data.root", str(root), "--outputs", str(outputs)]
    command += ["--model.name", "vit_tiny_patch16_224", "--model.pretrained", "false", "--model.img_size", "32"]
    command += ["--model.arguments", "depth=2", "--train.epochs", "1", "--train.batch_size", "4"]
    command += ["--statistics.permutations", "99", "--capture.samples", "2"]
    command += ["--relevance.images", "1", "--relevance.measured", "2", "--relevance.steps", "2"]
    command += ["--capture.sinks", "store", "--conditions.dora.rank", "2", "--relevance.methods", "gradcam"]
    command += ["--measure.metrics", "entropy,prefix_mass,tests.own_metrics:peak"]
    assert main(command) == 0
    document = json.loads((outputs / "metrics" / "attention_comparison.json").read_text())
    assert {entry["id"] for entry in document["data"]["dropped"]} == set(broken)
    assert all(control["held"] for control in document["controls"])
    assert document["data"]["splits"]["test"] > 0
    store = AttentionStore.open(outputs / "captures" / "dora_seed42.zarr")
    assert store.read(0).shape[1:] == (3, 5, 5)


def test_controls_can_fail() -> None:
    """The instrument is alive: models that differ are found to differ, and where."""
    from train.models import build_model

    torch.manual_seed(0)
    one = build_model("digits_vit", num_classes=3)
    torch.manual_seed(1)
    other = build_model("digits_vit", num_classes=3)

    class Images:
        def __len__(self) -> int:
            return 4

        def batch(self, indices: object) -> torch.Tensor:
            return torch.randn(4, 1, 48, 48, generator=torch.Generator().manual_seed(0))

    def pair(first: torch.nn.Module, second: torch.nn.Module) -> list:  # type: ignore[type-arg]
        lockstep = Lockstep(Images(), range(4), ["distance", "entropy"], 4, "cpu")  # type: ignore[arg-type]
        return lockstep.compare(first, second, "test")

    assert same_attention_control("n", "t", "e", pair(one, one), 4).held
    assert not same_attention_control("n", "t", "e", pair(one, other), 4).held
    mixed = build_model("digits_vit", num_classes=3)
    mixed.load_state_dict(hybrid_state(one.state_dict(), other.state_dict(), 2))
    layers = pair(one, mixed)
    assert [layer.identical for layer in layers] == [True, True, False, False]
    assert hybrid_control("b", "a", layers, 2, 4, differs=True).held
    assert not hybrid_control("b", "a", layers, 3, 4, differs=True).held
    assert not hybrid_control("b", "a", pair(one, one), 2, 4, differs=True).held, "nothing changed where it should"
    changed = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    changed["head.weight"] += 1
    assert first_reached_block(one.state_dict(), changed) == 4, "the readout reaches no attention"
    changed["blocks.1.mlp.fc1.weight"] += 0.1
    assert first_reached_block(one.state_dict(), changed) == 2, "what lies behind block 1's attention"
    mixed.load_state_dict(changed)
    layers = pair(one, mixed)
    assert untouched_control("b", "a", layers, 2, 4).held
    assert not untouched_control("b", "a", layers, 3, 4).held
    assert not untouched_control("b", "a", pair(one, one), 2, 4).held
    changed["blocks.1.attn.qkv.weight"] += 0.1
    assert first_reached_block(one.state_dict(), changed) == 1
    changed["pos_embed"] += 0.1
    assert first_reached_block(one.state_dict(), changed) == 0
    with pytest.raises(ValueError, match="expected 1 to 3"):
        hybrid_state(one.state_dict(), other.state_dict(), 4)


def test_controls_measure_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for as `module:name` and measured under its own name."""
    from train.models import build_model

    (tmp_path / "peaks.py").write_text(
        "from kernels import MetricSpec\n"
        "largest = MetricSpec(name='peak', unit='1', inputs='rows', reference=lambda p, layout: p.max((-2, -1)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    model = build_model("digits_vit", num_classes=3)

    class Images:
        def batch(self, indices: object) -> torch.Tensor:
            return torch.zeros(2, 1, 48, 48)

    metrics = ["entropy", "peaks:largest"]
    layers = Lockstep(Images(), range(2), metrics, 2, "cpu").compare(model, model, "test")  # type: ignore[arg-type]
    assert [layer.metrics for layer in layers] == [{"entropy": 0.0, "peak": 0.0}] * 4


def test_checkpoints_and_training_do_not_mix() -> None:
    from engine.study.start import Start
    from train.errors import InputError

    config = load_study(
        None, {"conditions": {"a": {"recipe": "checkpoint", "checkpoint": "x.pth"}, "b": {"recipe": "full"}}}
    )
    with pytest.raises(InputError, match="a is a given checkpoint and b is trained here"):
        Start(config, Path("unused"), None)  # type: ignore[arg-type]
