"""The whole summary of one study, word for word and number for number: `tests/snapshots/summary.md`.

Where other words are meant, write them again and read the difference before it is committed:

    python -m pytest tests/test_report_snapshot.py --renew-snapshots
"""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_study import build_study, results_of

from engine.report.write import summary_markdown

SNAPSHOT = Path(__file__).parent / "snapshots" / "summary.md"


def test_the_summary_is_the_one_that_was_read_and_approved(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    metrics = ("distance", "entropy", "morans_i", "region_mass")
    study = build_study(tmp_path / "outputs", metrics=metrics, equivalence={"distance": 0.02})
    summary = summary_markdown(results_of(study))
    if request.config.getoption("renew_snapshots"):
        SNAPSHOT.write_text(summary, encoding="utf-8")
    assert summary.splitlines() == SNAPSHOT.read_text(encoding="utf-8").splitlines()
