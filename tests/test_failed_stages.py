"""A stage that fails after the captures costs its own part of the report and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from engine.report import write
from engine.run import main
from engine.study import stages as study
from engine.study.journal import Journal
from tests.photographs import write_photographs
from train.errors import InputError


def compare(folder: Path) -> int:
    options = {
        "--model.name": "test_vit",
        "--data.root": str(folder / "photos"),
        "--baseline": str(folder / "a.safetensors"),
        "--finetuned": str(folder / "b.safetensors"),
        "--outputs": str(folder / "outputs"),
        "--measure.metrics": "distance",
        "--statistics.permutations": "49",
        "--capture.samples": "1",
        "--relevance.methods": "rollout",
        "--relevance.measured": "0",
    }
    return main(["compare", *(part for pair in options.items() for part in pair)])


def test_controls_and_relevance_that_fail_are_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photographs(tmp_path / "photos", per_class=2)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / f"{name}.safetensors")
    outputs = tmp_path / "outputs"
    monkeypatch.setattr(write, "render_figures", lambda results: [])  # most of the time

    def broken(*arguments: object, **keywords: object) -> None:
        raise KeyError("a fault of ours")

    def refused(*arguments: object, **keywords: object) -> None:
        raise InputError("no map can be made of these")

    with monkeypatch.context() as patched:
        patched.setattr(study, "negative_controls", broken)
        patched.setattr(study, "explain_study", refused)
        with pytest.raises(KeyError, match="a fault of ours"):
            compare(tmp_path)
    said = capsys.readouterr().out
    reasons = {"controls": "KeyError: 'a fault of ours'", "relevance": "no map can be made of these"}
    for stage, reason in reasons.items():
        assert f"{stage} failed and is left out: {reason}" in said
    summary, page = (outputs / "summary.md").read_text(), (outputs / "report.html").read_text()
    for reason in reasons.values():
        words = reason.split("'")[-2 if "'" in reason else 0]
        assert words in summary
        assert words in page
    comparison = json.loads((outputs / "metrics/attention_comparison.json").read_text())
    assert comparison["controls"] == []
    assert comparison["tests"]

    with monkeypatch.context() as patched:
        patched.setattr(study, "explain_study", refused)
        assert compare(tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"the report, without what failed: {outputs / 'report.html'}",
        "error: no map can be made of these",
    ]
    assert json.loads((outputs / "metrics/attention_comparison.json").read_text())["controls"]
    assert "Stage controls" not in (outputs / "summary.md").read_text()

    assert compare(tmp_path) == 0
    assert "capture baseline_seed0: done already" in capsys.readouterr().out
    assert "Stage " not in (outputs / "summary.md").read_text()
    assert (outputs / "metrics/relevance.json").is_file()


def test_what_a_stage_left_before_it_failed_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = tmp_path / "metrics" / "relevance.json"
    left.parent.mkdir()
    left.write_text("{}")
    journal = Journal(tmp_path / "run.jsonl")
    journal.stage("relevance", {"rows": 1}, [left], lambda: None)
    assert journal.usable(left)
    journal.fail("relevance", "no map")
    for known in (journal, Journal(tmp_path / "run.jsonl")):
        assert known.failed() == {"relevance": "no map"}
        assert not known.usable(left)
        assert known.done("relevance", {"rows": 1}, [left]) is None
    journal.stage("relevance", {"rows": 1}, [left], lambda: None)
    assert journal.failed() == {}
    assert journal.usable(left)


def test_a_reader_that_leaves_is_no_fault_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise BrokenPipeError

    journal = Journal(tmp_path / "run.jsonl")
    monkeypatch.setitem(study.FIRST_STAGES, "controls", broken)
    with pytest.raises(BrokenPipeError):
        study.attempt(SimpleNamespace(journal=journal), "controls")
    assert journal.failed() == {}
