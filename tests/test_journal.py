"""Stages are skipped exactly when their inputs and outputs are those of the last time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.journal import Journal, digest_path


def run(folder: Path, inputs: dict[str, int], ran: list[dict[str, int]]) -> str:
    output = folder / "made.txt"

    def work() -> None:
        ran.append(inputs)
        output.write_text(json.dumps(inputs))

    return Journal(folder / "run.jsonl").stage("make", inputs, [output], work)


def test_a_stage_runs_once_for_its_inputs(tmp_path: Path) -> None:
    ran: list[dict[str, int]] = []
    first = run(tmp_path, {"a": 1}, ran)
    assert run(tmp_path, {"a": 1}, ran) == first
    assert ran == [{"a": 1}]
    assert run(tmp_path, {"a": 2}, ran) != first
    assert ran == [{"a": 1}, {"a": 2}]


def test_a_changed_or_missing_output_is_made_again(tmp_path: Path) -> None:
    ran: list[dict[str, int]] = []
    run(tmp_path, {"a": 1}, ran)
    (tmp_path / "made.txt").write_text("touched by somebody")
    run(tmp_path, {"a": 1}, ran)
    (tmp_path / "made.txt").unlink()
    run(tmp_path, {"a": 1}, ran)
    assert len(ran) == 3


def test_a_torn_line_is_passed_over_and_not_glued_to(tmp_path: Path) -> None:
    ran: list[dict[str, int]] = []
    run(tmp_path, {"a": 1}, ran)
    journal = tmp_path / "run.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"event": "done", "stage": "ma')
    run(tmp_path, {"a": 1}, ran)
    assert len(ran) == 1
    run(tmp_path, {"a": 2}, ran)
    run(tmp_path, {"a": 2}, ran)
    assert len(ran) == 2


def test_a_failed_stage_is_not_done(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")

    def fail() -> None:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        journal.stage("make", {}, [tmp_path / "x"], fail)
    assert not journal.path.exists()


def test_a_folders_digest_sees_every_byte_and_name(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    (folder / "in").mkdir(parents=True)
    (folder / "in" / "a").write_text("1")
    before = digest_path(folder)
    (folder / "in" / "a").write_text("2")
    changed = digest_path(folder)
    (folder / "in" / "a").rename(folder / "in" / "b")
    assert len({before, changed, digest_path(folder)}) == 3
    assert digest_path(tmp_path / "absent") == ""
