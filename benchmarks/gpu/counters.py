"""Hardware counters of the Triton kernels by Nsight Compute: which unit is busy, and what warps wait for."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.results import ROOT, Row, logs

__all__ = ["measure"]

PLACES = ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu")
# Whole sections: an unknown name of a metric would fail the run. If a section is not there, the first ones alone.
SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
MORE = ("LaunchStats", "SchedulerStats", "InstructionStats", "MemoryWorkloadAnalysis_Tables")
SHARE = r"\.avg\.pct_of_peak_sustained_(active|elapsed)"
SHOWN = (
    r"gpu__time_duration\.(sum|avg)",
    r"\w+__\w*throughput" + SHARE,
    r"dram__bytes(_read|_write)?\.sum(\.per_second)?",
    r"sm(sp)?__(issue_active|inst_issued|inst_executed)\.(sum|avg\.(per_cycle_active|pct_of_peak_sustained_active))",
    r"sm(sp)?__(inst_executed_)?pipe_\w+" + SHARE,
    r"(l1tex|lts)__t_\w*hit_rate\.pct",
    r"sm__(warps_active|inst_issued)" + SHARE,
    r"launch__(registers_per_thread|occupancy_limit_\w+|shared_mem_per_block|block_size|grid_size|stack_size)",
)
STALL = r"smsp__average_warps?_(?:latency_)?issue_stalled_(?!\w*not_issued)(\w+?)(?:_per_\w+)?\.(?:ratio|pct)"
LOCAL = r"\w*(local|spill)\w*\.sum"
STALLS = 6  # reasons shown


def measure(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """Of each kernel that a call of `measure_attention` (fp16) and of `measure_qk` (bf16) launches at 197 tokens."""
    ncu = _ncu()
    if small or not ncu:
        yield Row(name="ncu", value=0.0, unit="", error="it reads GPUs" if small else "Nsight Compute is not here")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = logs(Path(folder)) / "counters.csv"
        for sections in ((*SECTIONS, *MORE), SECTIONS):
            command = [ncu, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
            command += ["--print-units", "base", "--log-file", str(report), "-k", "regex:rows|qk|attention|maps"]
            command += [part for name in sections for part in ("--section", name)]
            said = subprocess.run(
                [*command, sys.executable, "-m", "benchmarks.gpu.launches"], cwd=ROOT, capture_output=True, text=True
            )
            text = report.read_text(errors="replace") if report.exists() else ""
            if rows := list(rows_of(text)):
                yield from rows
                return
    raise RuntimeError(f"ncu ended with {said.returncode}: {said.stdout[-500:]}{said.stderr[-500:]}{text[-500:]}")


def rows_of(report: str) -> Iterator[Row]:
    """Of a report as comma-separated values: names, units, then a line for each launch."""
    lines = list(csv.reader(line for line in report.splitlines() if line.startswith('"')))
    for launch in lines[2:]:
        values = {name: (text, unit) for name, text, unit in zip(lines[0], launch, lines[1], strict=False)}
        kernel = values["Kernel Name"][0].partition("(")[0]
        stalls, local = [], []
        for name, (text, unit) in values.items():
            value = _number(text)
            if value is None:
                continue
            if stall := re.fullmatch(STALL, name):
                stalls.append((value, stall[1], unit))
            elif re.fullmatch(LOCAL, name):
                local.append(value)
            elif value and any(re.fullmatch(pattern, name) for pattern in SHOWN):
                yield Row(name=f"{kernel}: {name}", value=value, unit=unit)
        if local:
            note = f"all of {len(local)} counters of registers spilled to local memory"
            yield Row(name=f"{kernel}: local memory", value=sum(local), unit="", note=note)
        for value, reason, unit in sorted(stalls, reverse=True)[:STALLS]:
            yield Row(name=f"{kernel}: warps stalled, {reason}", value=value, unit=unit)


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _ncu() -> str:
    """The program: on the path, or where its installer puts it; "" if nowhere."""
    found = (str(path) for place in PLACES for path in sorted(Path("/").glob(place[1:]), reverse=True))
    return shutil.which("ncu") or next(found, "")
