"""Runs the sections one after another, each in a process of its own, and prints the table.

A section that is in the JSON already, of the same code and device, is not run again. One that fails or takes too long
is reported with its error; the others run all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu import capture, ceilings, checks, kernels, training
from benchmarks.gpu.results import Results, Section, describe, failed, table

# In order: later ones set their figures against the ceilings. Seconds that a section may take, of 9 minutes in all.
SECTIONS: tuple[tuple[str, Section, int], ...] = (
    ("ceilings", ceilings.measure, 45),
    ("tests", checks.measure, 90),
    ("kernels_65", partial(kernels.measure, (8, 8)), 30),
    ("kernels_197", partial(kernels.measure, (14, 14)), 50),
    ("kernels_577", partial(kernels.measure, (24, 24)), 50),
    ("kernels_1370", partial(kernels.measure, (37, 37)), 30),
    ("capture", capture.measure_overhead, 40),
    ("streaming", capture.measure_streaming, 60),
    ("training", training.measure, 60),
    ("training_compiled", training.measure_compiled, 80),
)


def run(section: Section, small: bool, ceilings_found: dict[str, float], seconds: int) -> dict[str, Any]:
    """{rows, seconds} of a section, with its error if it failed; the process is ended after `seconds`."""
    # A fork has what this process imported, and its own context on the device: what breaks one section's context
    # does not reach the next. Nothing here touches the device.
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    began = time.monotonic()
    process = context.Process(target=_child, args=(sending, section, small, ceilings_found))
    process.start()
    sending.close()
    try:
        found: dict[str, Any] = (
            receiving.recv() if receiving.poll(seconds) else {"error": f"not done after {seconds} s"}
        )
    except EOFError:
        process.join()
        found = {"error": f"its process ended with exit code {process.exitcode}"}
    process.kill()
    process.join()
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def _child(sending: Connection, section: Section, small: bool, ceilings_found: dict[str, float]) -> None:
    found: dict[str, Any] = {"rows": []}
    try:
        for row in section(small, ceilings_found):
            found["rows"].append(row.to_dict())
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    sending.send(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU: a check of this program")
    parser.add_argument("--json", type=Path, help="results, read and written; benchmarks/results/gpu_<device>.json")
    parser.add_argument("--only", default="", help="sections, comma-separated: " + ",".join(n for n, _, _ in SECTIONS))
    given = parser.parse_args(arguments)
    chosen = given.only.split(",") if given.only else [name for name, _, _ in SECTIONS]
    if unknown := set(chosen) - {name for name, _, _ in SECTIONS}:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(n for n, _, _ in SECTIONS)}")
    about = run(describe, given.small, {}, 60)
    if "error" in about:
        print(about["error"], file=sys.stderr)
        return 1
    results = Results.open(given.json, about["rows"][0])
    for name, section, seconds in SECTIONS:
        if name in chosen and not results.has(name):
            print(f"== {name}", flush=True)
            results.add(name, run(section, given.small, results.ceilings(), seconds))
    print(table(results))
    print(f"\n{results.path}")
    return 1 if any(map(failed, results.sections.values())) else 0


if __name__ == "__main__":
    sys.exit(main())
