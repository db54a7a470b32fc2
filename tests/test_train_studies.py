"""Miniatures of both data sets through the whole study: bad files, every recipe, two seeds, to a report. Slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.measure.table import read_table
from engine.run import main
from tests.miniatures import ROOMS, SPORTS, write_indoor67, write_sports100
from train.checkpoint import history_path, read_metadata
from train.data.manifest import Manifest

STUDY = """
outputs = {outputs}
[model]
name = "vit_tiny_patch16_224"
pretrained = false
img_size = 32
[data]
kind = "{kind}"
root = {root}
split = "{split}"
[train]
seeds = [0, 1]
epochs = 2
batch_size = 8
accumulate = 2
precision = "fp32"
[conditions.baseline]
recipe = "probe"
[conditions.finetuned]
recipe = "full"
[conditions.lora]
recipe = "lora"
rank = 2
lr = 1e-3
init = "pissa"
[conditions.dora]
recipe = "dora"
rank = 2
lr = 1e-3
targets = "block9_fc1"
[statistics]
permutations = 99
[relevance]
images = 1
[capture]
samples = 2
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kind", "split"), [("indoor67", "official"), ("sports100", "auto")])
def test_a_miniature_goes_through_the_study(tmp_path: Path, kind: str, split: str) -> None:
    root, outputs = tmp_path / "data", tmp_path / "out"
    bad = (write_indoor67 if kind == "indoor67" else write_sports100)(root)
    study = STUDY.format(kind=kind, split=split, root=json.dumps(str(root)), outputs=json.dumps(str(outputs)))
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    assert main(["--config", str(tmp_path / "study.toml")]) == 0

    manifest = Manifest.load(outputs / "manifest.json")
    assert {record.id: record.status for record in manifest.records if record.status != "ok"} == bad
    assert manifest.class_names == (ROOMS if kind == "indoor67" else SPORTS)
    document = json.loads((outputs / "metrics" / "attention_comparison.json").read_text())
    assert {entry["id"] for entry in document["data"]["dropped"]} == set(bad), "counted in the report"
    assert document["data"]["same_file_in_several_splits"] == []
    assert all(control["held"] for control in document["controls"])
    untouched = next(control for control in document["controls"] if control["name"] == "untouched_dora")
    assert untouched["value"] == 0
    assert "blocks 0 to 9" in untouched["expectation"]

    table = read_table(outputs / "metrics" / "attention_metrics.zarr")
    assert list(table["condition"].values) == ["baseline", "finetuned", "lora", "dora"]
    assert list(table["seed"].values) == [0, 1]
    used = {record.id for record in manifest.split("test")}
    assert set(table["image"].values.tolist()) == used
    assert not used & set(bad)
    for condition in ("finetuned", "lora", "dora"):
        for seed in (0, 1):
            path = outputs / "checkpoints" / f"{condition}_seed{seed}.safetensors"
            metadata = read_metadata(path)
            assert len(history_path(path).read_text().splitlines()) == 2
            if condition != "finetuned":
                assert metadata["merge_difference"] < 1e-5
    page = (outputs / "report.html").read_text(encoding="utf-8")
    assert all(condition in page for condition in ("baseline", "finetuned", "lora", "dora"))
    assert (outputs / "visualizations" / "figures" / "training.png").is_file()
    assert (outputs / "summary.md").is_file()
