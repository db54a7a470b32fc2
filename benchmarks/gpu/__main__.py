"""Runs the sections one after another, each in a process of its own, and prints their rows as they come.

A section that is in the JSON already, of the same code and device, is not run again. One that fails or takes too long
is reported with its error and the rows that it had; the others run all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu import capture, ceilings, checks, counters, kernels, training
from benchmarks.gpu.results import LOGS, Results, Row, Section, describe, failed, heading, lines


def profile(small: bool, ceilings_found: dict[str, float]) -> Iterator[Row]:
    """Training steps, and forward passes, plain and measured."""
    yield from training._profiled(small, training.Variant()).rows("training")
    yield from capture.measure_profile(small, ceilings_found)


# In order: later ones set their figures against the ceilings, and what matters most comes first, should the time run
# out. Seconds that a section may take; most take a third of them.
SECTIONS: tuple[tuple[str, Section, int], ...] = (
    ("ceilings", ceilings.measure, 90),
    ("tests", checks.measure, checks.SECONDS + 20),
    ("kernels_197", partial(kernels.measure, (14, 14)), 90),
    ("capture", capture.measure_overhead, 60),
    ("training", training.measure, 110),
    ("training_compiled", training.measure_compiled, 110),
    ("profile", profile, 60),
    ("kernels_577", partial(kernels.measure, (24, 24)), 60),
    ("kernels_65", partial(kernels.measure, (8, 8)), 60),
    ("kernels_1370", partial(kernels.measure, (37, 37)), 60),
    ("host", ceilings.measure_host, 40),
    ("streaming", capture.measure_streaming, 90),
    ("training_variants", training.measure_variants, 110),
)
# Run when asked for by name.
APART: tuple[tuple[str, Section, int], ...] = (
    ("counters", counters.measure, 115),
    ("training_whole", training.measure_whole, 115),
)


def run(section: Section, small: bool, ceilings_found: dict[str, float], seconds: int) -> dict[str, Any]:
    """{rows, seconds} of a section, with its error if it failed; its processes are ended after `seconds`."""
    # A fork has what this process imported, and its own context on the device: what breaks one section's context
    # does not reach the next. Nothing here touches the device.
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    began = time.monotonic()
    process = context.Process(target=_child, args=(sending, section, small, ceilings_found))
    process.start()
    sending.close()
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"rows": rows}
    try:
        while (said := _next(receiving, began + seconds)) is not None:
            if "failed" in said:
                found["error"] = said["failed"]
                break
            rows.append(said)
    except TimeoutError:
        found["error"] = f"not done after {seconds} s"
    except EOFError:
        process.join()
        found["error"] = f"its process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid or 0, signal.SIGKILL)  # it has a group of its own: whatever it started ends with it
        process.kill()
        process.join()
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def _next(receiving: Connection, deadline: float) -> dict[str, Any] | None:
    """A row, {failed: why} or, at the end, None; TimeoutError at the deadline, EOFError if the process has ended."""
    if not receiving.poll(max(0.0, deadline - time.monotonic())):
        raise TimeoutError
    said: dict[str, Any] | None = receiving.recv()
    return said


def _child(sending: Connection, section: Section, small: bool, ceilings_found: dict[str, float]) -> None:
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        for row in section(small, ceilings_found):
            sending.send(row.to_dict())
        sending.send(None)
    except Exception as error:
        traceback.print_exc()
        sending.send({"failed": f"{type(error).__name__}: {error}"})


def main(arguments: Sequence[str] | None = None) -> int:
    by_name = {name: (section, seconds) for name, section, seconds in (*SECTIONS, *APART)}
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU: a check of this program")
    parser.add_argument("--json", type=Path, help="results, read and written; benchmarks/results/gpu_<device>.json")
    parser.add_argument("--only", default="", help="sections, comma-separated, in this order: " + ",".join(by_name))
    parser.add_argument("--logs", type=Path, help="folder for the tests' output, profiles and counters, whole")
    given = parser.parse_args(arguments)
    chosen = given.only.split(",") if given.only else [name for name, _, _ in SECTIONS]
    if unknown := set(chosen) - set(by_name):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(by_name)}")
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
        os.environ[LOGS] = str(given.logs.resolve())
    about = run(describe, given.small, {}, 120)
    if "error" in about:
        print(about["error"], file=sys.stderr)
        return 1
    results = Results.open(given.json, about["rows"][0])
    print(heading(results), flush=True)
    for name in chosen:
        section, seconds = by_name[name]
        if not results.has(name):
            results.add(name, run(section, given.small, results.ceilings(), seconds))
        print("\n".join(lines(name, results.sections[name])), flush=True)
    print(f"\n{results.path}")
    return 1 if any(failed(results.sections[name]) for name in chosen) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a section that runs is ended first
    sys.exit(main())
