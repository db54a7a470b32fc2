"""Which stage is done again when something changes that it reads."""

from __future__ import annotations

import dataclasses
import importlib
import json
import linecache
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.capture import Capture
from engine.config import StudyConfig, load_study
from engine.measure import read_table
from engine.statistics import Settings
from engine.study import data, stages
from engine.study.journal import digest
from engine.study.model import capture_settings
from engine.study.study import Study
from engine.study.training import Run
from tests.synthetic_study import small
from train.model_source import ModelSource

TEXT = """
from kernels import MetricSpec
largest = MetricSpec(name='peak', unit='1', inputs='rows', reference=lambda p, layout: p.max((-2, -1)))
"""


def study_of(outputs: Path, **keys: Any) -> Study:
    """A study of which nothing was trained, in whose folder a table lies."""
    few = {"statistics.permutations": 99, "outputs": str(outputs)}
    study = Study(load_study(None, few | keys))
    study.data = SimpleNamespace(  # type: ignore[assignment]
        test=range(4), digest="images", pretrained_digest="weights", summary=lambda: {"images": 4}
    )
    return study


def test_statistics_are_done_again_for_another_accuracy_or_condition_to_compare_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that changed in its head alone leaves the same table."""
    study = study_of(small(tmp_path))
    study.name_primary()
    accuracy = {"baseline": {"42": {"test": 0.25}}}
    monkeypatch.setattr(study, "accuracy", lambda: accuracy)
    monkeypatch.setattr(study, "classifiers", dict)
    monkeypatch.setattr(stages, "read_table", lambda path: read_table(path).assign_attrs(undefined="{}"))
    for test, done in ((0.25, False), (0.25, True), (0.75, False)):
        accuracy["baseline"]["42"]["test"] = test
        stages.statistics(study)
        assert ("done already" in capsys.readouterr().out) == done
        document = json.loads((study.metrics / "attention_comparison.json").read_text())
        assert document["accuracy"]["baseline"]["42"]["test"] == test
    monkeypatch.setattr(Study, "against", "dora")
    stages.statistics(study)
    assert "done already" not in capsys.readouterr().out
    monkeypatch.setattr(stages, "declaration", lambda kind: "fields have come and gone since")
    stages.statistics(study)
    assert "done already" not in capsys.readouterr().out


def test_a_primary_family_named_after_a_capture_is_said_to_be(tmp_path: Path) -> None:
    study = study_of(tmp_path)
    study.name_primary()
    assert study.primary_family().before
    study.journal.stage("capture baseline_seed42", {}, [], lambda: None)
    assert study.primary_family().before
    later = study_of(tmp_path, **{"statistics.primary": ["entropy"]})
    later.name_primary()
    family = later.primary_family()
    assert (family.metrics, family.before) == (("entropy",), False)


def test_controls_are_done_again_when_the_code_of_a_users_metric_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(stages, "negative_controls", lambda *models: [])
    study = study_of(small(tmp_path), **{"measure.metrics": ["entropy", "metric_of_controls:largest"]})
    for text, done in ((TEXT, False), (TEXT, True), (TEXT + "# another", False)):
        (tmp_path / "metric_of_controls.py").write_text(text)
        sys.modules.pop("metric_of_controls", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        stages.controls(study)
        assert ("done already" in capsys.readouterr().out) == done
    sys.modules.pop("metric_of_controls", None)


def test_the_table_is_made_again_when_conditions_stand_in_another_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(small(tmp_path))

    def write(study: Study) -> None:
        for suffix in (".h5", ".csv"):
            study.table.with_suffix(suffix).touch()

    monkeypatch.setattr(stages, "_make_table", write)
    runs = [Run(name, 42, "checkpoint", ModelSource("digits_vit")) for name in ("baseline", "dora")]
    study.captures = dict.fromkeys(runs, "maps")
    for order, done in ((runs, False), (runs, True), (runs[::-1], False)):
        study.trained = list(order)
        stages.measure(study)
        assert ("done already" in capsys.readouterr().out) == done


def test_a_checkpoint_read_as_another_model_is_another_one(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"weights")
    names = ("vit_base_patch16_clip_224", "vit_base_patch16_clip_quickgelu_224")
    one, other = (Run("a", 0, "checkpoint", ModelSource(name, weights=str(file))).digest for name in names)
    assert one != other


def test_the_pretrained_model_is_made_again_for_another_seed_of_what_comes_from_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(data, "_folder_splits", lambda start: SimpleNamespace(class_names=("a", "b")))
    made = []
    for seed in (0, 0, 1):
        start = SimpleNamespace(
            config=load_study(None, {"data.kind": "folder", "data.root": "none", "data.seed": seed}),
            preprocessing=SimpleNamespace(to_dict=dict),
            pretrained_path=Path("pretrained.safetensors"),
            journal=SimpleNamespace(stage=lambda name, inputs, *more, **others: digest(inputs)),
            workers=None,
        )
        made.append(data._folder(start)[1])  # type: ignore[arg-type]
    assert made[0] == made[1] != made[2]


def test_what_stands_in_two_places_of_the_configuration_is_the_same() -> None:
    config = StudyConfig()
    assert Settings(**dataclasses.asdict(config.statistics)) == Settings()
    assert capture_settings(config, "cpu") == Capture(metrics=config.measure.metrics)
    assert [key.name for key in dataclasses.fields(config.statistics)] == [
        key.name for key in dataclasses.fields(Settings)
    ][1:]
