"""What would fail late is found before any work; what only looks like a mistake works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from engine.run import main
from engine.table import read_table
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
    command += ["--statistics.permutations", "19", "--statistics.bootstrap", "9"]
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
