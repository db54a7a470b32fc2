"""Kernels launched by a table of what was compiled: the same calls as Triton's own. Without a GPU, nothing runs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from kernels.cuda import launches, triton_rows  # noqa: E402

KERNEL = triton_rows.means_of_rows

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not isinstance(KERNEL, triton.JITFunction), reason="a driver in place of CUDA's"
)


class Driver:
    """Of an H100 that notes what would be launched."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.loaded = itertools.count(1)
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda x, y, z, stream, function, packed, about, enter, leave, *arguments: self.calls.append(
            (x, y, z, stream, function, *(id(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        )

    def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, ...]:
        return 0, next(self.loaded), 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def unload_module(self, *given: Any) -> None:
        pass

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    driver = Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(KERNEL, "device_caches", defaultdict(KERNEL.create_binder))
    monkeypatch.setattr(launches, "_COMPILED", {})
    return driver


CONSTANTS = {"PREFIX": 1, "QUERIES": 12, "BLOCK": 16, "BLOCK_P": 1, "num_warps": 1}
MEMORY = torch.zeros(256)
MASKS, MEANS, COUNTS = torch.zeros(64, dtype=torch.int8), torch.zeros(8, dtype=torch.float64), torch.zeros(16).long()


@pytest.mark.parametrize("call", ["a first", "an offset", "a stride of 1", "another dtype", "more warps", "more maps"])
def test_what_is_launched(driver: Driver, call: str) -> None:
    """Each changes what Triton compiles but the last, after another call of the same kernel."""

    def arguments(rows: torch.Tensor, maps: int = 2, stride: int = 16) -> tuple[Any, ...]:
        return *[rows] * 4, MASKS, MEANS, COUNTS, maps, 1, stride, 1, 13

    plain = arguments(MEMORY)
    given, constants = {
        "a first": (plain, CONSTANTS),
        "an offset": (arguments(MEMORY[1:]), CONSTANTS),
        "a stride of 1": (arguments(MEMORY, stride=1), CONSTANTS),
        "another dtype": (arguments(MEMORY.half()), CONSTANTS),
        "more warps": (plain, CONSTANTS | {"num_warps": 2}),
        "more maps": (arguments(MEMORY, maps=16), CONSTANTS),
    }[call]
    for _ in range(2):
        launches.launch(KERNEL, (2, 1), plain, CONSTANTS)
    KERNEL[2, 1](*given, **constants)
    for _ in range(2):
        launches.launch(KERNEL, (2, 1), given, constants)
    assert driver.calls[0] == driver.calls[1]
    assert driver.calls[2] == driver.calls[3] == driver.calls[4]
    is_another = driver.calls[2][4] != driver.calls[0][4]
    assert is_another == (call not in ("a first", "more maps"))


def test_constants_stand_behind_the_other_parameters() -> None:
    from kernels.cuda import triton_qk

    for kernel in (KERNEL, triton_qk.qk_rows):
        are_constant = [parameter.is_constexpr for parameter in kernel.params]
        assert are_constant == sorted(are_constant)
