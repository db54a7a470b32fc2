"""What the host spends on a training step, and on single calls: a step of two images leaves the device little to do."""

from __future__ import annotations

import cProfile
import os
import pstats
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.results import Row

__all__ = ["call_rows", "parts"]

CALLS = 200
# Functions of a step, by the end of their file and their name, as the profiler has them.
_PARTS = {
    "forward": ("benchmarks/gpu/training.py", "loss"),
    "backward": ("torch/_tensor.py", "backward"),
    "optimizer": ("torch/optim/optimizer.py", "wrapper"),
    "clipping": ("nn/utils/clip_grad.py", "clip_grad_norm_"),
    "zero_grad": ("torch/optim/optimizer.py", "zero_grad"),
    "seed": ("torch/random.py", "manual_seed"),
    "augmentation": ("train/augment.py", "apply"),
    "look at the loss": ("train/loop.py", "look"),
    "numbers to the host": ("train/transfer.py", "downloaded"),
}


def parts(profile: cProfile.Profile, steps: int) -> str:
    """Milliseconds of a step by part; calls take longer under the profiler than without."""
    found: dict[str, float] = {}
    total = 0.0
    for (file, _, name), (_, _, own, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        total += own
        for part, (end, wanted) in _PARTS.items():
            if name == wanted and file.endswith(end):
                found[part] = max(found.get(part, 0.0), cumulative)
    rest = {"rest": total - sum(found.values())}
    return ", ".join(f"{part} {1e3 * seconds / steps:.1f}" for part, seconds in (found | rest).items())


def call_rows(device: torch.device) -> Iterator[Row]:
    """Host microseconds of a call that is launched and not waited for, on the tokens of 64 images, on a CPU of one."""
    images, dtype = (1, torch.float32) if device.type == "cpu" else (64, torch.bfloat16)
    tokens = torch.randn(images * 197, 768, device=device, dtype=dtype)
    weight, bias = torch.randn(768, 768, device=device, dtype=dtype), torch.randn(768, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {
        "sum": lambda: tokens + tokens,
        "layer norm": lambda: functional.layer_norm(tokens, (768,)),
        "product": lambda: tokens @ weight,
        "linear layer with a bias": lambda: functional.linear(tokens, weight, bias),
    }
    with torch.no_grad():
        times = {name: _microseconds(call, device) for name, call in calls.items()}
        if device.type == "cuda":
            before = torch.backends.cuda.preferred_blas_library()
            for library in ("cublas", "cublaslt"):
                torch.backends.cuda.preferred_blas_library(library)
                times |= {f"{name} by {library}": _microseconds(calls[name], device) for name in list(calls)[2:]}
            torch.backends.cuda.preferred_blas_library(before)
    several = ", ".join(f"{name} {spent:.0f}" for name, spent in times.items())
    yield Row(name="host's time of a sum", value=times["sum"], unit="us", note=f"{several}; {_processors()}")


def _microseconds(call: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        call()
    spent = time.perf_counter() - began
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e6 * spent / CALLS


def _processors() -> str:
    """How many processors there are, threads of torch's, and what the system grants."""
    granted = Path("/sys/fs/cgroup/cpu.max")
    limit = granted.read_text().strip() if granted.is_file() else "none known"
    return f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, limit {limit}"
