"""The tests that need a GPU, on it: both CUDA backends against the float64 reference, copies, waits."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks.gpu.results import ROOT, Row

__all__ = ["measure"]

TESTS = ("tests/test_gpu_backends.py", "tests/test_capture_transfer.py", "tests/test_gpu_waits.py")
SMALL = ("tests/test_capture_transfer.py",)


def measure(small: bool, ceilings: dict[str, float]) -> list[Row]:
    """Passed and skipped tests; a failure is an error."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(SMALL if small else TESTS)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"pytest ended with {said.returncode}: {said.stdout[-1500:]}{said.stderr[-500:]}")
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|skipped)", said.stdout)}
    return [Row(name=f"tests {word}", value=float(count), unit="tests") for word, count in counts.items()]
