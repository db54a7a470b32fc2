"""Whatever bytes, names, settings and files come in: an answer, or one sentence; no traceback, no hang, no signal."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz


@pytest.mark.parametrize("door", fuzz.DOORS)
def test_a_share_of_each_door(door: str, tmp_path: Path) -> None:
    share = importlib.import_module(f"tests.doors.{door}").SHARE
    endings = fuzz.run(door, tmp_path, count=share, seed=0)
    print(endings)
    assert not endings.failed, "\n".join(endings.failed)
    assert endings.answered + endings.refused.total() == share


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("door", fuzz.DOORS)
def test_two_thousand_of_each_door_in_four_gigabytes(door: str) -> None:
    """In a process of its own, so that its end by a signal and its memory are seen."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", door, "--count", "2000", "--seed", "1"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-20_000:] + ended.stderr[-5_000:]


@pytest.mark.parametrize(
    ("sentence", "problem"),
    [
        ("a.pth is a web page; expected a checkpoint", ""),
        ("", "is empty"),
        ("two\nlines", "has several lines"),
        ("caf\udce9.jpg is no picture", "holds characters that cannot be shown"),
        ("x" * 1001, "has 1001 characters"),
    ],
)
def test_what_is_one_sentence(sentence: str, problem: str) -> None:
    assert fuzz.problem_of(sentence) == problem


def test_a_trial_that_ends_otherwise_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame itself: an error that is not meant for users, and a hang, are seen."""

    def hang() -> None:
        while True:
            pass

    door = type(sys)("tests.doors.broken")
    door.trials = lambda folder, count, seed: iter(  # type: ignore[attr-defined]
        [fuzz.Trial("sound", lambda: None), fuzz.Trial("bug", lambda: {}["a"]), fuzz.Trial("hang", hang)]
    )
    monkeypatch.setitem(sys.modules, "tests.doors.broken", door)
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    endings = fuzz.run("broken", tmp_path, count=3, seed=0)
    assert endings.answered == 1
    assert [failure.split(":")[0] for failure in endings.failed] == ["broken 1 of seed 0", "broken 2 of seed 0"]
