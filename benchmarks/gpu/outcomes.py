"""A pytest plugin: how each test ended, a line of JSON each in the file that OUTCOMES names, as they end."""

from __future__ import annotations

import json
import os

import pytest

_active = False


def pytest_configure(config: pytest.Config) -> None:
    global _active
    _active = not hasattr(config, "workerinput")  # of several processes the first hears of all tests


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """A test ends with its call, or with a setup or teardown that was skipped or failed."""
    if not _active or (report.when != "call" and report.passed):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    said = "" if report.passed else crash.message if crash else str(report.longrepr)
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2), "said": said[:2000]}
    with open(os.environ["OUTCOMES"], "a") as file:
        file.write(json.dumps(line) + "\n")
