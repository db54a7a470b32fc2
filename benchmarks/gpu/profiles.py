"""Where the device's time goes: the kernels that take most of it, and how much of the wall time they fill."""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.results import Row, logs

__all__ = ["Profile"]

TOP = 15  # kernels


class Profile:
    """What ran on the device between start and stop; on a CPU torch's operations, those within others too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        self._profile = profile(activities=[activity], acc_events=True)
        self.wall = 0.0

    def start(self) -> None:
        self._profile.start()
        self._synchronize()
        self._began = time.perf_counter()

    def stop(self) -> None:
        self._synchronize()
        self.wall = time.perf_counter() - self._began
        self._profile.stop()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def rows(self, what: str) -> Iterator[Row]:
        """The busy fraction of the wall time, and the kernels that took most, in milliseconds."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            trace = path.read_bytes()
            kept = logs(Path(folder)) / f"trace_{what.replace(' ', '_')}.json.gz"
            kept.write_bytes(gzip.compress(trace, 6))
        kinds = ("kernel", "gpu_memcpy", "gpu_memset") if self.device.type == "cuda" else ("cpu_op",)
        events = [event for event in json.loads(trace)["traceEvents"] if event.get("cat") in kinds]
        times: dict[str, list[float]] = defaultdict(list)
        for event in events:
            times[event["name"]].append(event["dur"] / 1e3)
        total = sum(map(sum, times.values()))
        yield Row(
            name=f"{what}: device busy",
            value=_covered([(event["ts"], event["ts"] + event["dur"]) for event in events]) / 1e6 / self.wall,
            unit="of wall",
            note=f"{1e3 * self.wall:.1f} ms of wall time, {total:.1f} ms of kernels, {len(events)} launches",
        )
        for name, spent in sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]:
            note = f"{sum(spent) / total:.1%}, {len(spent)} launches"
            yield Row(name=f"{what}: {name.removeprefix('void ')[:140]}", value=sum(spent), unit="ms", note=note)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of (start, end)."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
