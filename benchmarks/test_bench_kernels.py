"""Kernels on ViT-B/16 maps: every backend against vectorised NumPy. Not part of CI.

    python -m pytest benchmarks/test_bench_kernels.py        statistics by pytest-benchmark
    python -m benchmarks.test_bench_kernels                  ratios, interleaved in one process, one thread

The second form is the one to quote: CPU time, rounds in which every contender runs once, medians, so that a busy
machine slows all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kernels import BACKENDS, TokenLayout, measure_attention, measure_qk
from kernels.threads import set_num_threads
from tests.cases import layout, trained

CORE = ("distance", "entropy", "morans_i")
VIT_B16 = layout(14, 14, 1)
MAPS_AN_IMAGE = 144


def image(dtype: torch.dtype) -> torch.Tensor:
    """The 144 maps of one image, [head, query, key]: trained-like rows of many temperatures."""
    maps = [trained(VIT_B16, np.random.default_rng(seed)).reshape(-1, 197, 197) for seed in range(24)]
    return torch.from_numpy(np.concatenate(maps)).to(dtype)


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (1.2 * torch.randn(MAPS_AN_IMAGE, 197, 64, generator=generator) for _ in range(2))
    return query, key


def numpy_shifts(attention: np.ndarray, of: TokenLayout, distances: np.ndarray) -> dict[str, np.ndarray]:
    """The three core metrics in vectorised float32 NumPy: what one writes first. No input checks."""
    p = of.patches(attention).astype(np.float32)
    p /= p.sum(axis=-1, keepdims=True)
    far = np.einsum("mqk,qk->mq", p, distances)
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1)
    z = (p - p.mean(axis=-1, keepdims=True)).reshape(*p.shape[:-1], of.grid_rows, of.grid_cols)
    cross = (z[..., :-1, :] * z[..., 1:, :]).sum(axis=(-2, -1)) + (z[..., :-1] * z[..., 1:]).sum(axis=(-2, -1))
    moran = of.num_patches / of.num_edges * cross / (z * z).sum(axis=(-2, -1))
    return {"distance": far.mean(-1), "entropy": entropy.mean(-1), "morans_i": moran.mean(-1)}


def contenders() -> dict[str, Callable[[], Any]]:
    half, single = image(torch.float16), image(torch.float32)
    query, key = factors()
    distances = VIT_B16.distances().astype(np.float32)
    runs: dict[str, Callable[[], Any]] = {
        "NumPy shifts, float16": lambda: numpy_shifts(half.numpy(), VIT_B16, distances),
        "materialise in torch, then numba": lambda: measure_attention(
            (query @ key.transpose(-1, -2) / 8).softmax(-1), VIT_B16, CORE, "numba"
        ),
    }
    for backend in BACKENDS:
        if backend == "reference":
            continue  # seconds an image; its job is to be right
        runs[f"{backend}, float16"] = lambda backend=backend: measure_attention(half, VIT_B16, CORE, backend)
        runs[f"{backend}, float32"] = lambda backend=backend: measure_attention(single, VIT_B16, CORE, backend)
        runs[f"{backend}, from q and k"] = lambda backend=backend: measure_qk(
            query, key, VIT_B16, CORE, backend=backend
        )
    return runs


def pytest_generate_tests(metafunc: Any) -> None:
    if "run" in metafunc.fixturenames:
        runs = contenders()
        metafunc.parametrize("run", runs.values(), ids=runs.keys())


def test_core_metrics_of_one_image(benchmark: Any, run: Callable[[], Any]) -> None:
    run()  # compile
    benchmark.extra_info["maps"] = MAPS_AN_IMAGE
    benchmark(run)


def main(rounds: int = 7) -> None:
    torch.set_num_threads(1)
    set_num_threads(1)
    runs = contenders()
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    base = medians["numba, float16"]
    print(f"one image of ViT-B/16 ({MAPS_AN_IMAGE} maps of 197×197), {', '.join(CORE)}; one thread, CPU time, medians")
    for name, median in sorted(medians.items(), key=lambda item: item[1]):
        print(f"{name:36}{1e3 * median:8.1f} ms {1 / median:8.1f} images/s {median / base:7.2f} × numba, float16")


if __name__ == "__main__":
    main()
