"""Stages are skipped exactly when their inputs and outputs are those of the last time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.study.journal import Journal, digest_path
from train.errors import DamagedFileError, InputError


def run(folder: Path, inputs: dict[str, int], ran: list[dict[str, int]]) -> str:
    output = folder / "made.txt"

    def work() -> None:
        ran.append(inputs)
        output.write_text(json.dumps(inputs))

    return Journal(folder / "run.jsonl").stage("make", inputs, [output], work)


@pytest.mark.parametrize("odd", [os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_a_pipe_in_a_folder_without_a_journal_is_named_and_not_waited_for(
    tmp_path: Path, odd: Callable[[Path], None]
) -> None:
    (tmp_path / "samples.zarr" / "images").mkdir(parents=True)
    odd(tmp_path / "samples.zarr" / "images" / "zarr.json")
    with pytest.raises(InputError, match=r"images/zarr\.json is a device or a link to nowhere; move it away"):
        Journal(tmp_path / "run.jsonl").usable(tmp_path / "samples.zarr")


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


def records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_no_flipped_bit_of_the_journal_is_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit of every byte of two lines: what is read then are lines as they were written; what is not is named."""
    ran: list[dict[str, int]] = []
    run(tmp_path, {"a": 1}, ran)
    run(tmp_path, {"a": 2}, ran)
    path = tmp_path / "run.jsonl"
    content = path.read_bytes()
    written = Journal(path)._records
    flipped = tmp_path / "flipped" / "run.jsonl"
    flipped.parent.mkdir()
    capsys.readouterr()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << 5 * position % 8
        flipped.write_bytes(changed)
        read = Journal(flipped)._records
        assert all(record in written for record in read), position
        assert ("is damaged" in capsys.readouterr().out) == (read != written), position


@pytest.mark.parametrize(
    "line", [b"[]", b"{}", b"3", b"null", b'{"event": "done", "stage": "make"}', b"\xff\xfe", b"["]
)
def test_a_line_that_is_no_record_is_named_and_dropped(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[dict[str, int]] = []
    run(tmp_path, {"a": 1}, ran)
    path = tmp_path / "run.jsonl"
    path.write_bytes(line + b"\n" + path.read_bytes())
    capsys.readouterr()
    run(tmp_path, {"a": 1}, ran)
    printed = capsys.readouterr().out
    assert "run.jsonl: line 1 is damaged" in printed
    assert "make: done already" in printed
    run(tmp_path, {"a": 2}, ran)
    assert [record["stage"] for record in records(path)] == ["make", "make"]
    capsys.readouterr()
    assert "make" in Journal(path).stage_seconds()
    assert capsys.readouterr().out == ""


def test_what_is_not_as_its_stage_wrote_it_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Edited, swapped, rolled back, copied from elsewhere, missing: each is named, with the stage and a way out."""
    journal = Journal(tmp_path / "run.jsonl")
    one, two = tmp_path / "one.json", tmp_path / "in" / "two"
    two.mkdir(parents=True)

    def work() -> None:
        one.write_text("1")
        (two / "a").write_text("2")

    journal.stage("statistics", {}, [one, two], work)
    assert journal.usable(one)
    assert journal.usable(two)
    assert journal.usable(tmp_path / "in"), "what lies in it is recorded"
    (two / "a").write_text("1")
    with pytest.raises(
        DamagedFileError, match=r"in/two is not as it was written.*\(stage statistics\).*run stats --outp"
    ):
        Journal(journal.path).usable(tmp_path / "in")
    one.unlink()
    with pytest.raises(DamagedFileError, match=r"one\.json is missing \(stage statistics\)"):
        journal.require(one)
    foreign = tmp_path / "foreign.json"
    foreign.write_text("1")
    capsys.readouterr()
    assert not journal.usable(foreign)
    assert not journal.usable(foreign)
    assert capsys.readouterr().out.count("foreign.json is left out") == 1
    with pytest.raises(InputError, match="has no record of it"):
        journal.require(foreign)
    journal.path.unlink()
    assert Journal(journal.path).usable(foreign), "a folder that no study made"
    assert not Journal(journal.path).usable(one)


def test_only_the_newest_record_of_a_stage_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    old, new = tmp_path / "lrp", tmp_path / "generic"

    def relevance(path: Path, content: str) -> None:
        def work() -> None:
            path.write_text(content)

        journal.stage("relevance", {"content": content}, [path], work)

    relevance(old, "maps")
    relevance(new, "other maps")
    assert not journal.usable(old), "left over from a run before"
    assert journal.usable(new)
    before = journal.path.read_bytes()
    relevance(new, "newer maps")
    journal.path.write_bytes(before)  # an older journal: it knows nothing of the newer file
    with pytest.raises(DamagedFileError, match="generic is not as it was written"):
        Journal(journal.path).usable(new)


def test_what_was_made_from_an_older_file_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained again, and not captured, measured and tested again: the old tests are not those of the new checkpoint."""
    journal = Journal(tmp_path / "run.jsonl")
    names = ("train", "capture", "statistics")
    paths = dict(zip(names, (tmp_path / name for name in names), strict=True))

    def done(name: str, content: str, *reads: str) -> None:
        def work() -> None:
            paths[name].write_text(content)

        journal.stage(name, {"of": content}, [paths[name]], work, reads=[paths[read] for read in reads])

    done("train", "a")
    done("capture", "maps of a", "train")
    done("statistics", "tests of a", "capture")
    journal.path.write_bytes(b"".join(journal.path.read_bytes().splitlines(keepends=True)[1:]))
    journal = Journal(journal.path)
    done("train", "a")  # its record was lost: done again, with the same result
    assert journal.usable(paths["statistics"])
    done("train", "b")
    with pytest.raises(InputError, match="stage capture was done with another train than stage train left since; make"):
        journal.usable(paths["statistics"])
    done("capture", "maps of b", "train")
    with pytest.raises(InputError, match="stage statistics was done with another capture than stage capture left"):
        journal.usable(paths["statistics"])
    done("statistics", "tests of b", "capture")
    assert Journal(journal.path).usable(paths["statistics"])
    done("capture", "maps of b, at another time", "train")
    done("statistics", "tests of b", "capture")  # nothing that it names as its input changed
    assert Journal(journal.path).usable(paths["statistics"])
    capsys.readouterr()
    done("statistics", "tests of b", "capture")
    assert capsys.readouterr().out == "statistics: done already\n"


def test_a_file_of_no_stage_is_written_when_it_is_not_there_so(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    path = tmp_path / "study.toml"
    for _ in range(2):
        journal.write(path, b"a = 1")
    assert len(records(journal.path)) == 1
    path.write_bytes(b"a = 3")
    with pytest.raises(DamagedFileError, match=r"give it on purpose: --config .*study\.toml"):
        journal.usable(path)
    journal.write(path, b"a = 1")
    assert path.read_bytes() == b"a = 1"
    assert journal.stage_seconds() == {}


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


def test_of_two_stages_that_leave_one_file_the_later_one_counts(tmp_path: Path) -> None:
    """In whatever order they were first done: "pretrain" and "pretrained" both leave the pretrained weights."""
    journal, made = Journal(tmp_path / "run.jsonl"), tmp_path / "made.txt"
    for stage, text in (("pretrain", "1"), ("pretrained", "2"), ("pretrain", "3")):
        journal.stage(stage, {"text": text}, [made], lambda text=text: made.write_text(text) and None)
        assert Journal(tmp_path / "run.jsonl").usable(made)


def test_a_file_precedes_a_stage_that_was_done_after_it_was_first_written(tmp_path: Path) -> None:
    """So it is known whether a family of tests was named before the data were measured."""
    journal, named = Journal(tmp_path / "run.jsonl"), tmp_path / "primary.json"
    journal.write(named, b"entropy")
    assert journal.precedes(named, "make")
    run(tmp_path, {"a": 1}, [])
    journal = Journal(tmp_path / "run.jsonl")
    journal.write(named, b"entropy")
    assert journal.precedes(named, "make")
    journal.write(named, b"distance")
    assert not journal.precedes(named, "make")
    journal.write(named, b"entropy")
    assert Journal(tmp_path / "run.jsonl").precedes(named, "make")
