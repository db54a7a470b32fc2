"""Relevance maps of ViT-S/16 at batch 8, as multiples of one plain forward pass. Not part of CI.

    python -m pytest benchmarks/test_bench_relevance.py      statistics by pytest-benchmark
    python -m benchmarks.test_bench_relevance                ratios, interleaved in one process, one thread

The second form is the one to quote: process CPU time, rounds in which every contender runs once, medians, so that a
busy machine slows all of them alike. It also prints the memory that each takes beyond model and images (Linux).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch

from engine.relevance import relevance_maps

BATCH = 8
CONTENDERS: dict[str, tuple[str, torch.dtype | None]] = {
    "gradcam": ("gradcam", None),
    "rollout": ("rollout", None),
    "generic": ("generic", None),
    "lrp, float32": ("lrp", torch.float32),
    "lrp, float64": ("lrp", torch.float64),
}


def model_and_images() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model("vit_small_patch16_224").eval(), torch.randn(BATCH, 3, 224, 224)


def contenders() -> dict[str, Callable[[], Any]]:
    model, images = model_and_images()
    targets = list(range(BATCH))

    def forward() -> None:
        with torch.inference_mode():
            model(images)

    runs: dict[str, Callable[[], Any]] = {"plain forward": forward}
    for name, (method, dtype) in CONTENDERS.items():
        runs[name] = lambda method=method, dtype=dtype: relevance_maps(model, images, targets, method, dtype=dtype)
    return runs


def pytest_generate_tests(metafunc: Any) -> None:
    if "run" in metafunc.fixturenames:
        runs = contenders()
        metafunc.parametrize("run", runs.values(), ids=runs.keys())


def test_maps_of_one_batch(benchmark: Any, run: Callable[[], Any]) -> None:
    benchmark.extra_info["images"] = BATCH
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


def memory_gb(name: str) -> float:
    """Peak resident memory beyond model, images and a plain forward pass, in a process of its own."""
    # VmHWM and not ru_maxrss, which a child inherits from its parent.
    code = (
        "import re; from benchmarks.test_bench_relevance import contenders; runs = contenders();"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]);"
        f"runs['plain forward'](); before = peak(); runs[{name!r}](); print((peak() - before) / 1e6)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main(rounds: int = 5) -> None:
    torch.set_num_threads(1)
    runs = contenders()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if round_:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    forward = np.array(seconds["plain forward"])
    print(f"ViT-S/16, batch {BATCH}, one thread, CPU time an image, medians of {rounds} rounds")
    for name, times in seconds.items():
        ratio = float(np.median(np.array(times) / forward))
        print(
            f"{name:16}{1e3 * float(np.median(times)) / BATCH:8.0f} ms {ratio:7.2f} × forward "
            f"{memory_gb(name):6.2f} GB beyond it"
        )


if __name__ == "__main__":
    main()
