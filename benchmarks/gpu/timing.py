"""Seconds of a function on the device.

On a GPU: the calls, one for each of several inputs that together exceed the second-level cache many times, are recorded
as a CUDA graph, so that launching costs nothing, and replays are timed by events. Medians of eleven, or of what fits
into a second, at least five.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["copies_beyond_cache", "device_of", "median_seconds", "wall_seconds"]

ROUNDS, LEAST, SECONDS = 11, 5, 1.0


def device_of(small: bool) -> torch.device:
    return torch.device("cpu") if small else torch.device("cuda", torch.cuda.current_device())


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """How many inputs of this size it takes to fill the second-level cache four times; at least two on a GPU."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-4 * cache // max(nbytes, 1)))


def median_seconds(runs: Sequence[Callable[[], Any]], device: torch.device) -> tuple[float, str]:
    """(median seconds of one call, a note on how where not by a graph): every call of `runs` in turn."""
    if device.type == "cpu":
        return wall_seconds(lambda: [run() for run in runs], device, rounds=3) / len(runs), ""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # compile, and fill every cache, on a stream that can be recorded
        for run in (*runs, *runs[:2]):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)

    def plainly() -> None:
        for run in runs:
            run()

    replay, note = plainly, "launched one by one"
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plainly()
        replay, note = graph.replay, ""
    except Exception as error:  # what cannot be recorded is timed as it is launched, and says so
        torch.cuda.synchronize(device)
        note += f" ({type(error).__name__} when recorded)"
    replay()
    times: list[float] = []
    while len(times) < LEAST or (len(times) < ROUNDS and sum(times) * len(runs) < SECONDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(runs))
    return float(np.median(times)), note


def wall_seconds(run: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """Median wall time of a call, from an idle device to an idle device."""
    times = []
    for turn in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn:
            times.append(time.perf_counter() - began)
    return float(np.median(times))
