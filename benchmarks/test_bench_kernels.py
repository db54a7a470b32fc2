"""Kernels on ViT-B/16 maps: every CPU backend against what one would run otherwise. Not part of CI.

    python -m pytest benchmarks/test_bench_kernels.py        statistics by pytest-benchmark
    python -m benchmarks.test_bench_kernels [results.json]   ratios, interleaved in one process, one thread

The second form is the one to quote: CPU time, rounds in which every contender runs once, medians, so that a busy
machine slows all of them alike. Peers come with the `bench` extra. What is too slow for a whole batch runs on part of
it and is scaled up; its name says so.

On a CPU with AVX-512 everything finds its 32 registers and its instructions, torch.compile too. As on a CPU without:

    NUMBA_CPU_NAME=haswell ATEN_CPU_CAPABILITY=avx2 \\
    NUMBA_CPU_FEATURES=+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2 \\
    python -m benchmarks.test_bench_kernels
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

from kernels import TokenLayout, measure_attention, measure_qk
from kernels.cpu import backend as numba_cpu
from kernels.cpu.lane_types import EIGHT, Width, widest
from kernels.cpu.threads import over_parts, set_num_threads
from tests.cases import layout, trained

CORE = ("distance", "entropy", "morans_i")
VIT_B16 = layout(14, 14, 1)
MAPS_AN_IMAGE = 144
IMAGES = 4
OURS = "numba"
# numba with the loops that it takes on CPUs with fewer vector registers.
LESSER = {"with eight lanes": EIGHT, "on any CPU": None}


@dataclass(frozen=True)
class Contender:
    """Something that measures `share` of the batch's images."""

    run: Callable[[], Any]
    share: float = 1.0
    bytes_read: int = 0  # of the whole batch, from main memory


def image(dtype: torch.dtype, images: int = 1) -> torch.Tensor:
    """The maps of images, [image × head, query, key]: trained-like rows of many temperatures."""
    maps = [trained(VIT_B16, np.random.default_rng(seed)).reshape(-1, 197, 197) for seed in range(24 * images)]
    return torch.from_numpy(np.concatenate(maps)).to(dtype)


def factors(images: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = (1.2 * torch.randn(images * MAPS_AN_IMAGE, 197, 64, generator=generator) for _ in range(2))
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


def torch_shifts(attention: torch.Tensor, of: TokenLayout, distances: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same in torch, and what torch.compile is given. No input checks."""
    p = of.patches(attention).float()
    p = p / p.sum(-1, keepdim=True)
    far = (p * distances).sum(-1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(-1)
    z = (p - p.mean(-1, keepdim=True)).unflatten(-1, (of.grid_rows, of.grid_cols))
    cross = (z[..., :-1, :] * z[..., 1:, :]).sum((-2, -1)) + (z[..., :-1] * z[..., 1:]).sum((-2, -1))
    moran = of.num_patches / of.num_edges * cross / (z * z).sum((-2, -1))
    return far.mean(-1), entropy.mean(-1), moran.mean(-1)


def row_loop(attention: np.ndarray, of: TokenLayout, distances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The three core metrics a row at a time, neighbours by a dense matrix: what thesis code does. Moran's rows are of
    NumPy, so this is the faster kind of loop."""
    rows = of.patches(attention).astype(np.float64)
    found = np.empty((*rows.shape[:-1], 3))
    scale = of.num_patches / weights.sum()
    for m, one in enumerate(rows):
        for q, row in enumerate(one):
            p = row / row.sum()
            z = p - p.mean()
            entropy = -(p * np.log(p + 1e-12)).sum()
            found[m, q] = (p * distances[q]).sum(), entropy, scale * (z @ weights @ z) / (z @ z)
    return found.mean(axis=1)


def rook_weights(of: TokenLayout) -> np.ndarray:
    """Binary neighbours, float64 [patch, patch]."""
    rows, cols = np.divmod(np.arange(of.num_patches), of.grid_cols)
    steps = np.abs(rows[:, None] - rows) + np.abs(cols[:, None] - cols)
    return (steps == 1).astype(np.float64)


def moran_by_scanpy(rows: np.ndarray, of: TokenLayout) -> Any:
    from scanpy.metrics import morans_i
    from scipy.sparse import csr_matrix

    return morans_i(csr_matrix(rook_weights(of)), rows)


def moran_by_esda(rows: np.ndarray, of: TokenLayout) -> list[float]:
    from esda import Moran
    from libpysal.weights import lat2W

    weights = lat2W(of.grid_rows, of.grid_cols)
    return [Moran(row, weights, transformation="B", permutations=0).I for row in rows]


def with_registers(width: Width | None, measure: Callable[[], Any]) -> Callable[[], Any]:
    """numba with the loops that it takes on a CPU that has these registers at most."""

    def run() -> Any:
        kept = numba_cpu.vector_width
        numba_cpu.vector_width = lambda: width  # type: ignore[assignment]
        try:
            return measure()
        finally:
            numba_cpu.vector_width = kept

    return run


def contenders(images: int = IMAGES) -> dict[str, Contender]:
    half, single = image(torch.float16, images), image(torch.float32, images)
    query, key = factors(images)
    distances, weights = VIT_B16.distances(), rook_weights(VIT_B16)
    near = torch.from_numpy(distances.astype(np.float32))
    rows = VIT_B16.patches(single[:12]).reshape(-1, VIT_B16.num_patches).double().numpy()
    of_map = 1 / (MAPS_AN_IMAGE * images)
    compiled = torch.compile(torch_shifts)
    ours: dict[str, tuple[Callable[[], Any], int]] = {
        "float16": (lambda: measure_attention(half, VIT_B16, CORE, "numba"), half.nbytes),
        "float32": (lambda: measure_attention(single, VIT_B16, CORE, "numba"), single.nbytes),
        "from q and k": (lambda: measure_qk(query, key, VIT_B16, CORE, backend="numba"), 2 * query.nbytes),
    }
    lesser = {name: width for name, width in LESSER.items() if width != widest()}
    runs = {
        **{f"{OURS}, {name}": Contender(run, 1, moved) for name, (run, moved) in ours.items()},
        **{
            f"{OURS} {registers}, {name}": Contender(with_registers(width, run), 1, moved)
            for registers, width in lesser.items()
            for name, (run, moved) in ours.items()
        },
        "torch backend, float16": Contender(lambda: measure_attention(half, VIT_B16, CORE, "torch")),
        "torch backend, from q and k": Contender(lambda: measure_qk(query, key, VIT_B16, CORE, backend="torch")),
        "torch shifts, eager, float16": Contender(lambda: torch_shifts(half, VIT_B16, near)),
        "torch shifts, torch.compile, float16": Contender(lambda: compiled(half, VIT_B16, near)),
        "NumPy shifts, float16": Contender(lambda: numpy_shifts(half.numpy(), VIT_B16, distances.astype(np.float32))),
        "materialise in torch, then numba": Contender(
            lambda: measure_attention((query @ key.transpose(-1, -2) / 8).softmax(-1), VIT_B16, CORE, "numba")
        ),
        "row loop, one map scaled up": Contender(
            lambda: row_loop(half[:1].numpy(), VIT_B16, distances, weights), of_map
        ),
        "Moran's I alone by esda, 49 rows scaled up": Contender(lambda: moran_by_esda(rows[:49], VIT_B16), of_map / 4),
        "Moran's I alone by scanpy, 12 maps scaled up": Contender(lambda: moran_by_scanpy(rows, VIT_B16), 12 * of_map),
    }
    for peer, package in (("esda", "esda"), ("scanpy", "scanpy")):
        try:
            __import__(package)
        except ImportError:
            print(f"{package} is not installed and left out; the bench extra brings it", file=sys.stderr)
            runs = {name: run for name, run in runs.items() if f"by {peer}" not in name}
    return runs


def pytest_generate_tests(metafunc: Any) -> None:
    if "contender" in metafunc.fixturenames:
        runs = contenders(1)
        metafunc.parametrize("contender", runs.values(), ids=runs.keys())


def test_core_metrics_of_one_image(benchmark: Any, contender: Contender) -> None:
    contender.run()  # compile
    benchmark.extra_info["share of the image"] = contender.share
    benchmark(contender.run)


@njit(nogil=True, fastmath=True)  # type: ignore[untyped-decorator]
def _read(memory: Any) -> Any:
    total = np.float32(0)
    for i in range(memory.size):  # not `for value in memory`, which does not vectorise
        total += memory[i]
    return total


def read_bandwidth() -> float:
    """Bytes a second that one thread reads from main memory; the best of five."""
    memory = np.ones(64_000_000, np.float32)
    _read(memory[:8])
    best = 0.0
    for _ in range(5):
        start = time.process_time()
        _read(memory)
        best = max(best, memory.nbytes / (time.process_time() - start))
    return best


def interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Median seconds of each, run in turn, each a second time at once: the first run after another contender's finds
    what that one left of the caches and of the process's memory."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            start = clock()
            run()
            seconds[name].append(clock() - start)
    return {name: float(np.median(times)) for name, times in seconds.items()}


@njit(nogil=True, fastmath={"contract"})
def _turn(begin: int, end: int) -> float:
    """Multiply-adds in registers alone, eight chains side by side: as many as a core does at once."""
    a, b, c, d, e, f, g, h = 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0
    for _ in range(200_000 * (end - begin)):
        a, b, c, d = a * 0.999 + 0.1, b * 0.999 + 0.1, c * 0.999 + 0.1, d * 0.999 + 0.1
        e, f, g, h = e * 0.999 + 0.1, f * 0.999 + 0.1, g * 0.999 + 0.1, h * 0.999 + 0.1
    return a + b + c + d + e + f + g + h


def two_threads(runs: dict[str, Contender]) -> dict[str, float]:
    """Wall time of one thread over that of two, by input.

    "registers alone" reads no memory: quiet cores take it to 2, two halves of one core (of a virtual machine, say) not.
    """
    names = {name: runs[f"{OURS}, {name}"].run for name in ("float16", "float32", "from q and k")}
    names["registers alone"] = lambda: over_parts(_turn, 32)
    contenders: dict[str, Callable[[], Any]] = {}
    for name, run in names.items():
        for threads in (1, 2):

            def with_threads(threads: int = threads, run: Callable[[], Any] = run) -> Any:
                set_num_threads(threads)
                return run()

            contenders[f"{name}, {threads}"] = with_threads
    seconds = interleaved(contenders, 41, time.perf_counter)
    set_num_threads(1)
    return {name: seconds[f"{name}, 1"] / seconds[f"{name}, 2"] for name in names}


def forward_seconds() -> Callable[[], Any]:
    import timm

    model = timm.create_model("vit_base_patch16_224").eval()
    images = torch.randn(IMAGES, 3, 224, 224)

    def run() -> Any:
        with torch.inference_mode():
            return model(images)

    return run


def main(rounds: int = 7) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    set_num_threads(1)
    runs = contenders()
    forward = forward_seconds()
    for contender in runs.values():
        contender.run()
    forward()
    medians = interleaved(
        {name: contender.run for name, contender in runs.items()} | {"plain forward, float32": forward}, rounds
    )
    shares = {name: contender.share for name, contender in runs.items()} | {"plain forward, float32": 1.0}
    an_image = {name: median / shares[name] / IMAGES for name, median in medians.items()}
    bandwidth = read_bandwidth()
    base = an_image[f"{OURS}, float16"]
    width = widest()
    loops = "loops for any CPU" if width is None else f"loops of {width.lanes} lanes"
    print(f"ViT-B/16, {MAPS_AN_IMAGE} maps of 197×197 an image, {IMAGES} images; {', '.join(CORE)}; numba has {loops}")
    print(f"one thread, CPU time, medians of {rounds} rounds; one thread reads {bandwidth / 1e9:.1f} GB/s")
    print(f"{'':46}{'ms/image':>10}{'images/s':>10}{'× numba':>9}{'GB/s':>7}{'of read':>9}")
    rows = []
    for name, seconds in sorted(an_image.items(), key=lambda item: item[1]):
        row: dict[str, Any] = {"name": name, "seconds_an_image": seconds, "ratio": seconds / base}
        line = f"{name:46}{1e3 * seconds:10.2f}{1 / seconds:10.1f}{seconds / base:9.2f}"
        moved = runs[name].bytes_read if name in runs else 0
        if moved:
            row["bytes_a_second"] = moved / IMAGES / seconds
            row["of_read_bandwidth"] = row["bytes_a_second"] / bandwidth
            line += f"{row['bytes_a_second'] / 1e9:7.1f}{100 * row['of_read_bandwidth']:8.0f}%"
        print(line)
        rows.append(row)
    from_qk = an_image[f"{OURS}, from q and k"]
    of_forward = from_qk / an_image["plain forward, float32"]
    less = an_image["materialise in torch, then numba"] / from_qk
    print(f"from q and k: {100 * of_forward:.1f} % of the plain forward pass, {less:.1f} × less than materialising")
    scaling = two_threads(runs)
    for name, ratio in scaling.items():
        print(f"two threads, {name}: {ratio:.2f} × one (wall time)")
    if len(sys.argv) > 1:
        found = {"rows": rows, "read_bandwidth": bandwidth, "two_threads": scaling, "of_forward": of_forward}
        Path(sys.argv[1]).write_text(json.dumps({"loops": loops, "images": IMAGES, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
