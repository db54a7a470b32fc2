"""benchmarks/gpu.sh at tiny sizes on a CPU: every section leaves its rows, and what is there is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import checks, counters, kernels
from benchmarks.gpu.__main__ import SECTIONS, main, run
from benchmarks.gpu.results import Row, failed
from tests.cases import layout

ROOT = Path(__file__).resolve().parents[1]


def test_small_sizes_on_a_cpu(tmp_path: Path) -> None:
    path, logs = tmp_path / "gpu.json", tmp_path / "logs"
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--small", "--json", str(path), "--logs", str(logs)]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    found = json.loads(path.read_text())
    assert list(found["sections"]) == [name for name, _, _ in SECTIONS]
    for name, section in found["sections"].items():
        assert section["rows"], name
        assert all(row["value"] > 0 and not row["error"] for row in section["rows"]), name
    assert found["about"]["small"] is True
    assert {"date", "device", "versions", "code", "commit"} <= set(found["about"])
    traces = {f"trace_{name}.json.gz" for name in ("forward", "sink_torch", "training", "training_compiled")}
    assert {file.name for file in logs.iterdir()} == {"tests.log", *traces}
    before = path.stat()
    assert main(["--small", "--json", str(path)]) == 0
    assert path.stat().st_mtime_ns == before.st_mtime_ns, "every section was there"


def test_a_section_that_fails_hangs_or_dies_is_reported_and_ended() -> None:
    def fails(small: bool, ceilings: dict[str, float]) -> list[Row]:
        raise ValueError("no such kernel")

    def hangs(small: bool, ceilings: dict[str, float]) -> list[Row]:
        while True:
            pass

    def starts(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
        subprocess.Popen(["sleep", "300"])
        yield Row(name="one", value=1.0, unit="s")
        time.sleep(300)

    def dies(small: bool, ceilings: dict[str, float]) -> list[Row]:
        os._exit(9)

    assert run(fails, True, {}, 20)["error"] == "ValueError: no such kernel"
    assert run(hangs, True, {}, 1)["error"] == "not done after 1 s"
    late = run(starts, True, {}, 2)
    assert (late["error"], [row["name"] for row in late["rows"]]) == ("not done after 2 s", ["one"])
    assert run(dies, True, {}, 20)["error"] == "its process ended with exit code 9"


def test_a_backend_that_is_wrong_or_fails_costs_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(work: kernels.Work, backend: str) -> Any:
        run = public(work, "torch")
        return (lambda attention: run(attention.flip(-1))) if backend == "torch" else public(work, backend)

    public = kernels.public
    monkeypatch.setattr(kernels, "public", wrong)
    monkeypatch.setattr(kernels, "WORKS", ((torch.float32, False), (torch.float32, True)))
    ceilings = {"copy": 1.0, "bf16": 1.0, "fp32": 1.0, "exp": 1.0}
    bad, *rest = kernels.measure((2, 3), True, ceilings)
    assert "is off by" in bad.error
    assert "TypeError" in rest[0].error, "query and key are two"
    assert failed({"rows": [bad.to_dict()]})


def test_what_compiles_does_so_side_by_side_and_a_failure_is_left_to_the_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def public(work: kernels.Work, backend: str) -> Any:
        def run(*given: torch.Tensor) -> None:
            (tmp_path / f"{backend} {work.dtype} {len(given)}").touch()
            if work.from_qk:
                raise ValueError("no such code")

        return run

    monkeypatch.setattr(kernels, "public", public)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    of = layout(2, 3, 1)
    kernels._compile_at_once([kernels.Work(of, 1, *what, torch.device("cpu"), qk) for *what, qk in kernels.WORKS])
    dtypes = ("float16", "bfloat16", "float32")
    assert {file.name for file in tmp_path.iterdir()} == {f"triton torch.{d} {n}" for d in dtypes for n in (1, 2)}
    assert capfd.readouterr().err.count("ValueError: no such code") == 3


def test_every_test_that_fails_is_kept_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n"
        "@pytest.fixture\ndef broken(): raise OSError('no device')\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'off by one'\n"
        "def test_not_set_up(broken): pass\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
    )
    monkeypatch.setattr(checks, "SMALL", (str(tests),))
    rows = list(checks.measure(True, {}))
    assert [(row.name, row.value) for row in rows[:3]] == [
        ("tests failed", 2),
        ("tests passed", 1),
        ("tests skipped", 1),
    ]
    said = {row.name.rpartition("::")[2]: row.error for row in rows[3:]}
    assert said.keys() == {"test_wrong", "test_not_set_up"}
    assert said["test_wrong"].startswith("AssertionError: off by one")
    assert said["test_not_set_up"] == "OSError: no device"


def test_counters_are_read_from_nsight_computes_report() -> None:
    stalled = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    report = "==PROF== Connected\n" + "\n".join(
        ",".join(f'"{value}"' for value in line)
        for line in (
            ("ID", "Kernel Name", "gpu__time_duration.sum", *map(stalled.format, ("wait", "long_scoreboard")),
             stalled.format("wait_not_issued"), "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
             "smsp__inst_executed_op_local.sum"),
            ("", "", "ns", "inst", "inst", "inst", "%", ""),
            ("0", "qk_rows", "1,234,567", "1.5", "3", "2", "81.25", "0"),
            ("1", "mean_of_rows", "9,000", "n/a", "1", "2", "0", "4"),
        )
    )  # fmt: skip
    assert [(row.name, row.value, row.unit) for row in counters.rows_of(report)] == [
        ("qk_rows: gpu__time_duration.sum", 1234567, "ns"),
        ("qk_rows: sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active", 81.25, "%"),
        ("qk_rows: local memory", 0, ""),
        ("qk_rows: warps stalled, long_scoreboard", 3, "inst"),
        ("qk_rows: warps stalled, wait", 1.5, "inst"),
        ("mean_of_rows: gpu__time_duration.sum", 9000, "ns"),
        ("mean_of_rows: local memory", 4, ""),
        ("mean_of_rows: warps stalled, long_scoreboard", 1, "inst"),
    ]
    assert list(counters.rows_of("==ERROR== no such section")) == []


def test_without_a_gpu_it_says_how_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "--small runs on a CPU" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()
