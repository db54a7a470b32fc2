"""Capture of ViT-B/16 with the three core metrics, against the plain forward pass and what one would run otherwise.

    python -m pytest benchmarks/test_bench_capture.py        statistics by pytest-benchmark
    python -m benchmarks.test_bench_capture                  ratios, interleaved in one process, one thread

The second form is the one to quote: CPU time, each contender between two plain forward passes and set against their
mean, medians and quartiles of that ratio over the rounds, so that a busy machine slows all of them alike. Weights are
random. Not part of CI.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from benchmarks.test_bench_kernels import CORE, VIT_B16, numpy_shifts
from engine.capture import AttentionSite, AttentionTap, attention_map
from kernels import measure_qk

BATCH = 8
PLAIN = "plain forward, fused attention"
CAPTURE = "tap, metrics from q and k"

in_measure_qk: list[float] = []  # CPU seconds within each capture


def contenders(batch: int = BATCH) -> dict[str, Callable[[], Any]]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224").eval()
    unfused = timm.create_model("vit_base_patch16_224").eval()
    unfused.load_state_dict(model.state_dict())
    for block in unfused.blocks:
        block.attn.fused_attn = False
    images = torch.randn(batch, 3, 224, 224)
    distances = VIT_B16.distances().astype(np.float32)

    def by_numpy(attention: torch.Tensor) -> None:
        numpy_shifts(attention.flatten(0, 1).numpy(), VIT_B16, distances)

    def tapped(on_attention: Callable[..., Any]) -> None:
        with AttentionTap(model, on_attention):
            model(images)

    def hooked(measure: Callable[[torch.Tensor], Any]) -> None:
        """Maps as hooks on `attn_drop` see them once fused attention is off, a layer at a time."""
        hooks = [
            block.attn.attn_drop.register_forward_hook(lambda module, args, output: measure(output))
            for block in unfused.blocks
        ]
        unfused(images)
        for hook in hooks:
            hook.remove()

    def all_maps() -> list[torch.Tensor]:
        maps: list[torch.Tensor] = []
        hooked(maps.append)
        return maps

    def measure(site: AttentionSite, query: torch.Tensor, key: torch.Tensor, *call: Any) -> None:
        start = time.process_time()
        measure_qk(query, key, site.layout, CORE, *call)
        in_measure_qk[-1] += time.process_time() - start

    def captured() -> None:
        in_measure_qk.append(0.0)
        tapped(measure)

    measured: list[Any] = []

    def replay(calls: list[Any]) -> None:
        for _, query, key, scale, bias in calls:
            measure_qk(query, key, VIT_B16, CORE, scale, bias)

    with torch.inference_mode(), AttentionTap(model, lambda *call: measured.append(call)):
        model(images)
    return {
        PLAIN: lambda: model(images),
        "tap alone": lambda: tapped(lambda *call: None),
        CAPTURE: captured,
        "measure_qk alone, same q and k": lambda: replay(measured),
        "tap, whole maps, NumPy metrics": lambda: tapped(lambda site, *call: by_numpy(attention_map(*call))),
        "fused off, hooks": lambda: hooked(lambda attention: None),
        "fused off, hooks, all maps kept": all_maps,
        "fused off, hooks, NumPy metrics": lambda: hooked(by_numpy),
    }


def pytest_generate_tests(metafunc: Any) -> None:
    if "run" in metafunc.fixturenames:
        runs = contenders()
        metafunc.parametrize("run", runs.values(), ids=runs.keys())


def test_capture_of_one_batch(benchmark: Any, run: Callable[[], Any]) -> None:
    benchmark.extra_info["images"] = BATCH
    with torch.inference_mode():
        run()  # compile
        benchmark.pedantic(run, rounds=5)


def main(rounds: int = 7, chosen: Collection[str] = ()) -> None:
    """Print the table; `chosen` contenders only, if any are named."""
    import numba

    torch.set_num_threads(1)
    numba.set_num_threads(1)
    runs = contenders()
    plain = runs.pop(PLAIN)
    runs = {name: run for name, run in runs.items() if not chosen or name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for run in (plain, *runs.values()):
            run()
        in_measure_qk.clear()
        before = _cpu_seconds(plain)
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(_cpu_seconds(run))
                after = _cpu_seconds(plain)
                ratios[name].append(2 * seconds[name][-1] / (before + after))
                before = after
    print(f"ViT-B/16, batch {BATCH}, fp32, {', '.join(CORE)}; one thread, CPU time, medians of {rounds} rounds")
    for name in runs:
        low, median, high = np.percentile(ratios[name], (25, 50, 75))
        each = float(np.median(seconds[name])) / BATCH
        print(
            f"{name:34}{1e3 * each:8.1f} ms/image {1 / each:6.2f} images/s {median:7.3f} × plain ({low:.3f}–{high:.3f})"
        )
        if name == CAPTURE:
            inside = np.array(in_measure_qk) / np.array(seconds[name])
            low, median, high = median * np.percentile(inside, (25, 50, 75))
            print(f"{'  of which in measure_qk':60}{median:7.3f} × plain ({low:.3f}–{high:.3f})")


def _cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    main()
