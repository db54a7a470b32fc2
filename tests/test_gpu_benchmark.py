"""benchmarks/gpu.sh at tiny sizes on a CPU: every section leaves its rows, and what is there is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.__main__ import SECTIONS, main, run
from benchmarks.gpu.results import Row, failed

ROOT = Path(__file__).resolve().parents[1]


def test_small_sizes_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--small", "--json", str(path)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    found = json.loads(path.read_text())
    assert list(found["sections"]) == [name for name, _, _ in SECTIONS]
    for name, section in found["sections"].items():
        assert section["rows"], name
        assert all(row["value"] > 0 and not row["error"] for row in section["rows"]), name
    assert found["about"]["small"] is True
    assert {"date", "device", "versions", "code", "commit"} <= set(found["about"])
    before = path.read_bytes()
    assert main(["--small", "--json", str(path)]) == 0
    assert "==" not in capsys.readouterr().out, "every section was there"
    assert path.read_bytes() == before


def test_a_section_that_fails_hangs_or_dies_is_reported_and_ended() -> None:
    def fails(small: bool, ceilings: dict[str, float]) -> list[Row]:
        raise ValueError("no such kernel")

    def hangs(small: bool, ceilings: dict[str, float]) -> list[Row]:
        while True:
            pass

    def dies(small: bool, ceilings: dict[str, float]) -> list[Row]:
        os._exit(9)

    assert run(fails, True, {}, 20)["error"] == "ValueError: no such kernel"
    assert run(hangs, True, {}, 1)["error"] == "not done after 1 s"
    assert run(dies, True, {}, 20)["error"] == "its process ended with exit code 9"


def test_a_backend_that_is_wrong_or_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: kernels.Work, backend: str) -> Any:
        run = public(work, "torch")
        return (lambda attention: run(attention.flip(-1))) if backend == "torch" else public(work, backend)

    public = kernels._public
    monkeypatch.setattr(kernels, "_public", wrong)
    monkeypatch.setattr(kernels, "DTYPES", (torch.float32,))
    ceilings = {"copy": 1.0, "bf16": 1.0, "fp32": 1.0, "exp": 1.0}
    bad, *rest = kernels.measure((2, 3), True, ceilings)
    assert "is off by" in bad.error
    assert "TypeError" in rest[0].error, "query and key are two"
    assert failed({"rows": [bad.to_dict()]})


def test_without_a_gpu_it_says_how_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "--small runs on a CPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()
