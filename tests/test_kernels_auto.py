"""What backend "auto" is: by device, gradient, dtype and all metrics of a pass. One test needs a GPU."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import numpy as np
import pytest
import torch

from kernels import (
    BACKENDS,
    CORE_METRICS,
    METRICS,
    BackendUnavailableError,
    MetricSpec,
    measure_attention,
    measure_qk,
    resolve,
)
from kernels import measure as measuring
from tests.cases import layout

pytest.importorskip("triton")
MODULE = BACKENDS["triton"].module


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def imports(name: str, *given: Any, **named: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'")
        return plainly(name, *given, **named)

    plainly = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", imports)
    for name in (MODULE, "kernels.cuda.triton_maps", "kernels.cuda.triton_qk", "kernels.cuda.triton_rows"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(autouse=True)
def _with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")


def chosen(*metrics: str | MetricSpec, dtypes: tuple[str, ...] = ("bfloat16",), gradient: bool = False) -> str:
    specs = [METRICS[metric] if isinstance(metric, str) else metric for metric in metrics]
    return resolve("auto", "cuda", gradient, dtypes, specs).name


def test_on_a_gpu_it_is_triton_where_triton_has_everything() -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        assert chosen(*CORE_METRICS, "gearys_c", "prefix_mass", "cls_entropy", dtypes=(dtype,)) == "triton"
    assert chosen() == "triton"


def test_one_metric_dtype_or_gradient_that_triton_lacks_makes_it_torch_for_all() -> None:
    own = MetricSpec(name="own", unit="1", inputs="rows", reference=lambda p, layout: layout.patches(p).max(axis=-1))
    for lacking in ("gini", "region_mass", "js_divergence", own):
        assert chosen("distance", lacking) == "torch"
    assert chosen("distance", dtypes=("float64",)) == "torch"
    assert chosen("distance", dtypes=("bfloat16", "float64")) == "torch", "one layer of many is"
    assert chosen("distance", gradient=True) == "torch"


def test_without_triton_it_is_torch_and_triton_by_name_is_refused(without_triton: None) -> None:
    assert chosen("distance") == "torch"
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run: No module named 'triton'"):
        resolve("triton", "cuda", specs=[METRICS["distance"]]).load()


def test_without_a_c_compiler_triton_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC")
    for found, expected in {None: "torch", "/bin/gcc": "triton"}.items():
        monkeypatch.setattr("kernels.backends.shutil.which", lambda name, found=found: found)
        assert chosen("distance") == expected


def test_a_gpu_that_triton_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in {(7, 5): "torch", (8, 0): "torch", (9, 0): "triton", (10, 0): "torch"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert chosen("distance") == expected


def test_a_name_is_never_replaced() -> None:
    for name in ("torch", "triton", "sdpa", "numba_cuda"):
        assert resolve(name, "cuda", dtypes=("float64",), specs=[METRICS["js_divergence"]]).name == name


def test_a_measurement_asks_with_its_own_dtype_and_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look(backend: str, device: str, gradient: bool, dtypes: list[str], specs: list[MetricSpec]) -> Any:
        asked.append((backend, device, gradient, dtypes, [spec.name for spec in specs]))
        return resolve(backend, device, gradient, dtypes, specs)

    monkeypatch.setattr(measuring, "resolve", look)
    of = layout(2, 3, 1)
    maps = torch.full((1, 7, 7), 1 / 7, dtype=torch.bfloat16)
    measure_attention(maps, of, ["distance", "gini"])
    with torch.enable_grad():
        measured = measure_attention(torch.full((1, 7, 7), 1 / 7, requires_grad=True), of, "entropy")
    assert measured.backend == "torch"
    measure_attention(np.full((1, 7, 7), 1 / 7), of, "entropy", "reference")
    assert asked == [
        ("auto", "cpu", False, ["bfloat16"], ["distance", "gini"]),
        ("auto", "cpu", True, ["float32"], ["entropy"]),
        ("reference", "cpu", False, ["float64"], ["entropy"]),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC")
    of = layout(2, 3, 1)
    query = torch.randn(1, 2, 7, 16, device="cuda", dtype=torch.bfloat16)
    for metrics, dtype, expected in (
        (CORE_METRICS, torch.bfloat16, "triton"),
        (CORE_METRICS, torch.float64, "torch"),
        ((*CORE_METRICS, "gini"), torch.bfloat16, "torch"),
    ):
        measured = measure_qk(query.to(dtype), query.to(dtype), of, metrics)
        assert (measured.backend, measured.from_reference) == (expected, ())
