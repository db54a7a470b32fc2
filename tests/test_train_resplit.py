"""Seeds that draw their own training and validation images: what is trained on what, and when it is done again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.config import StudyConfig, load_study
from engine.report.document import ReportedStudy
from engine.report.run_words import scope_sentences
from engine.study.check import _check_decoded
from engine.study.data import StudyData
from engine.study.model import captured_seeds, trained_seeds
from engine.study.stages import run_study
from engine.study.start import _check_conditions
from engine.study.study import Study
from engine.study.training import Run
from tests.photographs import write_photographs
from tests.synthetic_study import results_of, small
from tests.training_runs import interrupted
from train.checkpoint import read_checkpoint, read_metadata
from train.data.manifest import SPLITS, Manifest, Record
from train.errors import InputError
from train.model_source import ModelSource

STUDY = """
[model]
name = "test_vit"
pretrained = false
img_size = 32
[data]
kind = "folder"
[train]
seeds = [0, 1]
resplit = true
epochs = 1
batch_size = 8
precision = "fp32"
[conditions.baseline]
recipe = "probe"
[conditions.finetuned]
recipe = "full"
"""
RUNS = [f"{condition}_seed{seed}" for condition in ("baseline", "finetuned") for seed in (0, 1)]


def study(folder: Path, **keys: Any) -> StudyConfig:
    file, photos = folder / "study.toml", folder / "photos"
    if not photos.exists():
        write_photographs(photos, per_class=10, size=48)
        file.write_text(STUDY)
    names = {name.replace("_", ".", 1): value for name, value in keys.items()}
    return load_study(file, {"outputs": str(folder / "out"), "data.root": str(photos)} | names)


def sidecars(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted((folder / "out" / "checkpoints").glob("*_seed?.safetensors"))
    return {path.stem: read_metadata(path) for path in paths}


def test_each_seed_trains_on_its_own_images_and_is_tested_on_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_study(study(tmp_path), "train")
    fixed = Manifest.load(out / "manifest.json")
    drawn = {seed: Manifest.load(out / "splits" / f"seed{seed}.json") for seed in (0, 1)}
    trained = sidecars(tmp_path)
    assert sorted(trained) == RUNS
    for seed, manifest in drawn.items():
        assert manifest == fixed.redrawn(seed)
        for condition in ("baseline", "finetuned"):
            assert trained[f"{condition}_seed{seed}"]["dataset"]["sha256"] == manifest.sha256
    backbones, heads = zip(
        *(
            [
                {name: tensor for name, tensor in state.items() if name.startswith("head.") is of_head}
                for of_head in (0, 1)
            ]
            for state in (read_checkpoint(out / "checkpoints" / f"{run}.safetensors").tensors for run in RUNS[:2])
        ),
        strict=True,
    )
    assert all(np.array_equal(backbones[0][name], backbones[1][name]) for name in backbones[0])
    assert not any(np.array_equal(heads[0][name], heads[1][name]) for name in heads[0])
    recorded = json.loads((out / "metrics" / "training.json").read_text())
    assert [list(recorded[condition]["seeds"]) for condition in recorded] == [["0", "1"], ["0", "1"]]
    before = {run: of["sha256"] for run, of in trained.items()}

    capsys.readouterr()
    run_study(study(tmp_path), "train")
    said = capsys.readouterr().out
    assert said.count("done already") == len(said.splitlines()) - said.count("takes") > 0, "nothing is done twice"

    run_study(study(tmp_path, train_seeds=[1, 2]), "train")
    now = sidecars(tmp_path)
    assert {run: now[run]["sha256"] for run in before} == before, "another seed changes no other's run"
    assert now["finetuned_seed2"]["dataset"]["sha256"] == fixed.redrawn(2).sha256

    (out / "splits" / "seed1.json").write_text("{}")
    (out / "checkpoints" / "finetuned_seed1.json").unlink()
    with interrupted(monkeypatch, step=2):
        run_study(study(tmp_path), "train")
    run_study(study(tmp_path), "train")
    assert Manifest.load(out / "splits" / "seed1.json") == drawn[1], "made again where it is damaged"
    assert {run: sidecars(tmp_path)[run]["sha256"] for run in before} == before, "as a run that was not interrupted"

    run_study(study(tmp_path, train_resplit=False), "train")
    now = sidecars(tmp_path)
    assert {now[run]["dataset"]["sha256"] for run in (*RUNS[2:], RUNS[0])} == {fixed.sha256}
    assert now["finetuned_seed1"]["sha256"] != before["finetuned_seed1"]


def test_without_it_all_runs_are_as_before(tmp_path: Path) -> None:
    config = study(tmp_path, train_resplit=False)
    assert [trained_seeds(config, name) for name in config.conditions] == [(0,), (0, 1)]
    splits: Any = SimpleNamespace()
    data = StudyData(splits, splits, "weights")
    assert data.splits_of(0) is data.splits_of(1) is splits
    config = study(tmp_path)
    assert [trained_seeds(config, name) for name in config.conditions] == [(0, 1), (0, 1)]
    assert [captured_seeds(config, name) for name in config.conditions] == [(0,), (0, 1)]


def test_the_report_can_read_whether_runs_share_their_training_images() -> None:
    manifest = Manifest("folder", "", ("a",), (), "stratified")
    splits: Any = SimpleNamespace(train=[1], validation=[1], test=[1], manifest=manifest)
    assert StudyData(splits, splits, "weights").summary()["training_split"] == "fixed"
    drawn = StudyData(splits, splits, "weights", redrawn=lambda seed: splits)
    assert drawn.summary()["training_split"] == "drawn by the seed"
    assert "training_split" not in StudyData(splits, splits, "").summary(), "nothing is trained"


def test_the_report_says_what_runs_have_in_common(tmp_path: Path) -> None:
    results = results_of(small(tmp_path))
    comparisons = ReportedStudy(results).comparisons

    def said(runs: int, **data: str) -> str:
        pairs = [dataclasses.replace(pair, runs=runs) for pair in comparisons]
        document = dataclasses.replace(results.document, data=data)
        return " ".join(scope_sentences(dataclasses.replace(results, document=document), pairs))

    assert "the same pretrained weights and are trained on the same images" in said(2, training_split="fixed")
    drawn = said(2, training_split="drawn by the seed")
    assert "each seed drew its own training and validation images" in drawn
    assert "same images" not in drawn
    for one in (said(1, training_split="fixed"), said(2)):
        assert "pretrained" not in one


def test_accuracy_is_of_every_readout_though_attention_is_captured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = SimpleNamespace(labels=np.array([0, 1, 1]), class_names=("a", "b"))
    splits: Any = SimpleNamespace(test=test, class_names=("a", "b"))
    of = Study(study(tmp_path))
    of.data = StudyData(splits, splits, "weights")
    model = ModelSource("digits_vit")
    of.trained = [
        Run("baseline", 0, "probe", model, True, True, 0.5, 0.25),
        Run("baseline", 1, "probe", model, True, False, 0.75, 0.625),
    ]
    monkeypatch.setattr(of, "logits", lambda run: np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    found = of.accuracy()["baseline"]
    assert (found["0"].test, found["0"].validation) == (2 / 3, 0.5)
    assert (found["1"].test, found["1"].validation) == (0.625, 0.75)
    assert [run.seed for run in of.runs] == [0]


def test_given_checkpoints_are_trained_on_nothing_here(tmp_path: Path) -> None:
    given = {name: {"recipe": "checkpoint", "checkpoint": f"{name}.safetensors"} for name in ("baseline", "finetuned")}
    config = load_study(None, {"data.kind": "folder", "train.resplit": True, "conditions": given})
    with pytest.raises(InputError, match=r"train\.resplit is true, and the conditions are given as checkpoints, which"):
        _check_conditions(config)


def test_a_draw_that_leaves_a_split_empty_is_found_before_anything_runs(tmp_path: Path) -> None:
    """Where the only two images that could be told apart from training are the same file."""
    rows = [
        ("train/a/0", "a", "train", "same"),
        ("val/a/1", "a", "validation", "same"),
        ("train/b/2", "b", "train", "2"),
    ]
    rows += [(f"test/{name}/{name}", name, "test", name) for name in ("a", "b")]
    records = tuple(Record(path, "ab".index(name), name, split, "ok", sha) for path, name, split, sha in rows)
    manifest = Manifest("folder", "photos", ("a", "b"), records, "folders")
    assert all(manifest.split(split) for split in SPLITS)
    start: Any = SimpleNamespace(config=study(tmp_path, train_seeds=list(range(8))), manifest=manifest)
    with pytest.raises(
        InputError, match="no readable image for the validation split with split folders, train and val"
    ):
        _check_decoded(start, trained=True)
    start.config = study(tmp_path, train_resplit=False)
    _check_decoded(start, trained=True)
