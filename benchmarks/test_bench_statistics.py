"""Statistics at the size of a real study: 2,343 images × 432 tests × 10,000 resamples. Not part of CI.

    python -m pytest benchmarks/test_bench_statistics.py         statistics by pytest-benchmark
    python -m benchmarks.test_bench_statistics [--mne-flips 1000]   max-T beside mne's on the same problem, and memory

The second form is the one to quote; `OPENBLAS_CORETYPE=Haswell` before it gives the figures of an AVX2 machine. Both
packages compare t with the greatest |t| over all tests of the same differences: ours under resampled images, with all
intervals, mne's under random sign flips. They run in turn, in one process. mne's time grows with the number of flips,
so it is given fewer (and keeps its other defaults: one thread) and its time for all is in proportion.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.statistics import compare_paired, layer_clusters
from engine.statistics.bootstrap import Bootstrap, bootstrap_max_t

IMAGES, LAYERS, HEADS, METRICS, RESAMPLES = 2343, 12, 12, 3, 9999


def pairs() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two conditions, [image, layer, head, metric]; images differ in level, every tenth test has an effect."""
    rng = np.random.default_rng(0)
    shape = (IMAGES, LAYERS, HEADS, METRICS)
    a = rng.normal(size=shape) + rng.normal(size=(IMAGES, 1, 1, 1))
    b = a + 0.5 * rng.normal(size=shape) + 0.02 * (rng.random(shape[1:]) < 0.1)
    return a, b


def differences() -> NDArray[np.float64]:
    a, b = pairs()
    return np.ascontiguousarray((b - a).reshape(IMAGES, -1))


def max_t(d: NDArray[np.float64], resamples: int = RESAMPLES) -> Bootstrap:
    """All tests as one family."""
    return bootstrap_max_t(d, np.zeros(d.shape[1], dtype=np.int64), resamples=resamples, confidence=0.95, seed=0)


def test_max_t(benchmark: Any) -> None:
    benchmark.pedantic(max_t, args=(differences(),), rounds=3)


def test_compare_paired(benchmark: Any) -> None:
    a, b = pairs()
    benchmark.pedantic(compare_paired, args=(a, b), kwargs={"permutations": RESAMPLES}, rounds=3)


def test_clusters_of_one_comparison(benchmark: Any) -> None:
    import xarray as xr

    a, b = pairs()
    values = np.stack([a[..., 0], b[..., 0]])[:, None]
    table = xr.Dataset(
        {"entropy": (("condition", "seed", "image", "layer", "head"), values, {"units": "nat"})},
        coords={
            "condition": ["baseline", "full"],
            "seed": [0],
            "layer": np.arange(LAYERS),
            "site": ("layer", [f"blocks.{layer}.attn" for layer in range(LAYERS)]),
            "head": np.arange(HEADS),
        },
    )
    benchmark.pedantic(layer_clusters, args=(table,), rounds=3)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mne-flips", type=int, default=500)
    arguments = parser.parse_args()
    flips = arguments.mne_flips

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    d = differences()
    a, b = pairs()
    before = peak()
    max_t(d[:50], 99)  # what is imported and compiled on first use
    ours = [timed(lambda: max_t(d))]
    print(f"{IMAGES:,} × {d.shape[1]} × {RESAMPLES + 1:,}; inputs and imports: {before:.2f} GiB")
    print(f"max-T: peak {peak():.2f} GiB")
    whole = [
        timed(lambda: compare_paired(a, b, metric="axis_3", permutations=RESAMPLES)) for _ in range(arguments.rounds)
    ]
    print(f"compare_paired: peak {peak():.2f} GiB")

    import mne

    mne.set_log_level("ERROR")
    mne.stats.permutation_t_test(d[:50], n_permutations=20, seed=1)  # imports its parts on first use
    theirs, p = [], []
    for _ in range(arguments.rounds):
        theirs.append(
            timed(lambda: p.append(mne.stats.permutation_t_test(d, n_permutations=flips, seed=1, n_jobs=1)[1]))
        )
        ours.append(timed(lambda: max_t(d)))
    same = np.abs(max_t(d).p_max_t - p[-1]).max()

    share = (RESAMPLES + 1) / flips
    for name, times, scale in (("max-T", ours, 1.0), ("mne's max-T", theirs, share), ("compare_paired", whole, 1.0)):
        wall, cpu = (scale * float(np.median(column)) for column in zip(*times, strict=True))
        note = f" (scaled from {flips} flips)" if scale != 1 else ""
        print(f"{name:16}{wall:8.2f} s wall {cpu:8.2f} s CPU, median of {len(times)}{note}")
    ratios = [share * np.median([t[i] for t in theirs]) / np.median([t[i] for t in ours]) for i in (0, 1)]
    print(f"mne's / ours: {ratios[0]:.1f} by wall clock, {ratios[1]:.1f} by CPU; greatest difference of p: {same:.3f}")


if __name__ == "__main__":
    main()
