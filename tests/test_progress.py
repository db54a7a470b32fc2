"""One bar over what all processes do, in the first of them."""

from __future__ import annotations

import io

import pytest

from engine.progress import ImageProgress, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_the_first_process_counts_for_all(
    rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    terminal = Terminal()
    with ImageProgress("capture", 12, 4, 1000, file=terminal) as progress:
        progress.reach(3)  # of this process and others
        progress.reach(3)
        progress.reach(8)
    assert ("12/12" in terminal.getvalue()) == shown
    assert ("GB/s" in terminal.getvalue()) == shown
    say("left out: 1 truncated")
    assert capsys.readouterr().out == ("left out: 1 truncated\n" if shown else "")
