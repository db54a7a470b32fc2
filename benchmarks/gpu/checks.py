"""The tests that need a GPU, on it: both CUDA backends against the float64 reference, copies, waits, training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import ROOT, Row, logs

__all__ = ["SECONDS", "measure"]

SECONDS = 95  # until the tests that are not done yet are given up
TESTS = (
    "tests/test_gpu_backends.py",
    "tests/test_capture_transfer.py",
    "tests/test_gpu_waits.py",
    "tests/test_gpu_training.py",
    "tests/test_kernels_auto.py",
)
SMALL = ("tests/test_capture_transfer.py",)


def measure(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """How many tests ended how, the slowest, and every test that failed, with what it said first."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes"]
    if not small and find_spec("xdist"):  # Triton compiles a shape in seconds
        command += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2))), "--dist", "worksteal"]
    if not small and find_spec("pytest_timeout"):
        command += ["--timeout", "75"]
    with tempfile.TemporaryDirectory() as folder:
        outcomes, log = Path(folder) / "outcomes", logs(Path(folder)) / "tests.log"
        outcomes.touch()
        environment = {**os.environ, "OUTCOMES": str(outcomes)}
        with log.open("w") as output:
            process = subprocess.Popen(
                [*command, *(SMALL if small else TESTS)], cwd=ROOT, env=environment, stdout=output, stderr=output
            )
            try:
                status: int | None = process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()
                status = None
        found = [json.loads(line) for line in outcomes.read_text().splitlines()]
        said = log.read_text(errors="replace")
    yield from _rows(found)
    if status is None:
        raise RuntimeError(f"pytest was not done after {SECONDS} s")
    if status > 1 or (status and not any(test["outcome"] == "failed" for test in found)):
        raise RuntimeError(f"pytest ended with {status}: {said[-1500:]}")


def _rows(found: list[dict[str, Any]]) -> Iterator[Row]:
    counts = Counter(test["outcome"] for test in found)
    slowest = max(found, key=lambda test: test["seconds"], default={"test": "", "seconds": 0.0})
    note = f"slowest {slowest['seconds']:.1f} s: {slowest['test'].rpartition('::')[2]}"
    for outcome, count in sorted(counts.items()):
        yield Row(name=f"tests {outcome}", value=float(count), unit="tests", note=note if outcome == "passed" else "")
    for test in found:
        if test["outcome"] == "failed":
            said = re.sub(r"\s+", " ", test["said"])[:600]
            yield Row(name=test["test"], value=0.0, unit="tests", error=said or "it failed")
