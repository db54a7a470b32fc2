"""The vector types of the CPU loops: each operation, at each width, against NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from kernels.cpu import lanes
from kernels.cpu.lane_types import EIGHT, SIXTEEN, Width, widest

WIDEST = widest()
ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
A, B, C = (RNG.normal(size=16).astype(np.float32) for _ in range(3))


@pytest.fixture(params=[EIGHT, SIXTEEN], ids=["8", "16"])
def width(request: pytest.FixtureRequest) -> Width:
    if WIDEST is None or request.param.lanes > WIDEST.lanes:
        pytest.skip(f"this CPU has no registers of {request.param.lanes} lanes")
    return request.param


def lane_by_lane(width: Width, operation: Any, *inputs: np.ndarray) -> np.ndarray:
    """A compiled function of vectors, applied to arrays of 16 register by register."""
    out = np.empty(16, np.float32)
    step = width.lanes
    if len(inputs) == 1:

        @njit
        def run(a: Any, out: Any) -> None:
            for at in range(0, 16, step):
                lanes.store(out, at, operation(lanes.load(width, a, at)))
    elif len(inputs) == 2:

        @njit
        def run(a: Any, b: Any, out: Any) -> None:
            for at in range(0, 16, step):
                lanes.store(out, at, operation(lanes.load(width, a, at), lanes.load(width, b, at)))
    else:

        @njit
        def run(a: Any, b: Any, c: Any, out: Any) -> None:
            for at in range(0, 16, step):
                lanes.store(
                    out, at, operation(lanes.load(width, a, at), lanes.load(width, b, at), lanes.load(width, c, at))
                )

    run(*inputs, out)
    return out


def test_arithmetic(width: Width) -> None:
    @njit
    def sum_of(a: Any, b: Any) -> Any:
        return a + b

    @njit
    def difference(a: Any, b: Any) -> Any:
        return a - b

    @njit
    def product(a: Any, b: Any) -> Any:
        return a * b

    np.testing.assert_array_equal(lane_by_lane(width, sum_of, A, B), A + B)
    np.testing.assert_array_equal(lane_by_lane(width, difference, A, B), A - B)
    np.testing.assert_array_equal(lane_by_lane(width, product, A, B), A * B)
    exact = A.astype(np.float64) * B + C
    np.testing.assert_array_equal(lane_by_lane(width, lanes.fma, A, B, C), exact.astype(np.float32))


def test_greater_hands_on_nan_from_its_second_operand_alone(width: Width) -> None:
    a, b = A.copy(), B.copy()
    a[3] = b[5] = np.nan
    got = lane_by_lane(width, lanes.greater, a, b)
    assert got[3] == b[3]
    assert np.isnan(got[5])
    ordinary = [i for i in range(16) if i not in (3, 5)]
    np.testing.assert_array_equal(got[ordinary], np.maximum(a, b)[ordinary])


def test_parts_of_a_float(width: Width) -> None:
    x = np.array([1, 1.5, 2, 3.999, 0.5, 0.3, 1e-30, 1e30, 196, 1 / 196, 7, 8, 9, 1.2e-38, 3.4e38, 65504], np.float32)
    mantissa, exponent = np.frexp(x.astype(np.float64))
    np.testing.assert_array_equal(lane_by_lane(width, lanes.mantissa, x), 2 * mantissa)
    steps = lane_by_lane(width, lanes.exponent_steps, x, (2 * mantissa).astype(np.float32))
    np.testing.assert_array_equal(steps, 2.0**23 * (exponent - 1))
    zero, one = np.zeros(16, np.float32), np.ones(16, np.float32)
    np.testing.assert_array_equal(lane_by_lane(width, lanes.mantissa, zero), one)
    np.testing.assert_array_equal(lane_by_lane(width, lanes.exponent_steps, zero, one), -127 * 2.0**23 * one)
    t = np.array([-126, -5.25, -1, -0.75, 0, 0.5, 3.125, -100.5, np.nan, -3, -2.5, 1, 2, 7.75, 127, -60], np.float32)
    np.testing.assert_array_equal(lane_by_lane(width, lanes.fraction, t), t - np.floor(t))
    value = A.copy()
    value[8] = np.nan
    power = np.exp2(np.floor(t).astype(np.float64))
    expected = (value * power).astype(np.float32)
    np.testing.assert_array_equal(lane_by_lane(width, lanes.times_power, value, t), expected)


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99, 1])
def test_masks(width: Width, part: float) -> None:
    @njit
    def kept(a: Any, count: Any, out: Any) -> None:
        lanes.store(out, 0, lanes.keep(lanes.first(width, count), lanes.load(width, a, 0)))

    @njit
    def following(a: Any, count: Any, out: Any) -> None:
        lanes.store(out, 0, lanes.next_lane(lanes.first(width, count), lanes.load(width, a, 0)))

    size = width.lanes
    count = int(part * size)
    out = np.empty(size, np.float32)
    inside = np.arange(size) < count
    kept(A, count, out)
    np.testing.assert_array_equal(out, np.where(inside, A[:size], 0))
    following(A, count, out)
    np.testing.assert_array_equal(out, np.where(inside, np.roll(A[:size], -1), 0))


def test_signs(width: Width) -> None:
    @njit
    def holds(a: Any, b: Any) -> Any:
        return lanes.holds_sign(lanes.either(lanes.load(width, a, 0), lanes.load(width, b, 0)))

    positive = np.abs(A)
    for lane in range(width.lanes):
        negative_zero = positive.copy()
        negative_zero[lane] = -0.0
        assert holds(positive, negative_zero)
        assert holds(negative_zero, positive)
    assert not holds(positive, positive)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory_is_widened_exactly(width: Width, dtype: str) -> None:
    @njit
    def widen(array: Any, position: Any, out: Any) -> None:
        lanes.prefetch(array, position + 100_000)
        lanes.store(out, 0, lanes.load(width, array, position))

    values = RNG.normal(size=40).astype(np.float32)
    values[5], values[6], values[7] = 6e-8, 0.0, 65504.0
    if dtype == "float16":
        expected = values.astype(np.float16).astype(np.float32)
        stored: np.ndarray = values.astype(np.float16).view(np.uint16)
    elif dtype == "bfloat16":
        stored = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)
        expected = (stored.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        stored = expected = values
    out = np.empty(width.lanes, np.float32)
    widen(stored, 3, out)
    np.testing.assert_array_equal(out, expected[3 : 3 + width.lanes])


def test_sums_across_lanes(width: Width) -> None:
    size = width.lanes

    @njit
    def eight(v: Any, out: Any) -> None:
        a, b = lanes.load(width, v, 0), lanes.load(width, v, size)
        c, d = lanes.load(width, v, 2 * size), lanes.load(width, v, 3 * size)
        e, f = lanes.load(width, v, 4 * size), lanes.load(width, v, 5 * size)
        g, h = lanes.load(width, v, 6 * size), lanes.load(width, v, 7 * size)
        lanes.store(out, 0, lanes.sums_of_eight(a, b, c, d, e, f, g, h))

    @njit
    def one(v: Any) -> Any:
        return lanes.sum_of(lanes.load(width, v, 0))

    v = RNG.integers(-999, 999, size=(8, size)).astype(np.float32)
    out = np.empty(size, np.float32)
    eight(v.reshape(-1), out)
    np.testing.assert_array_equal(out, np.tile(v.sum(axis=1), size // 8))
    assert one(v[3]) == v[3].sum()


def test_sums_are_taken_as_written(width: Width) -> None:
    """In float32 (x − c) + z is exact here and x + (z − c) is not, whatever `fastmath` allows of plain arithmetic."""
    size = width.lanes

    @njit(fastmath=True)
    def centred(x: Any, z: Any, c: Any, out: Any) -> None:
        mean, above = lanes.splat(width, c), lanes.load(width, z, 0)
        for at in range(0, 4 * size, size):
            more = (lanes.load(width, x, at) - mean) + (above - mean)
            above = lanes.load(width, x, at)
            lanes.store(out, at, more)

    c = np.float32(1 / 256)
    x = np.nextafter(np.full(4 * size, c), np.float32(0))
    out = np.empty(4 * size, np.float32)
    centred(x, x, c, out)
    np.testing.assert_array_equal(out, 2 * (x - c))


def test_transpose(width: Width) -> None:
    @njit
    def run(source: Any, target: Any) -> None:
        lanes.transpose(width, source, 5, 23, np.float32(0.5), target, 32)

    size = width.lanes
    source = np.arange(5 + 23 * size, dtype=np.float32)
    target = np.full(32 + size * size, np.nan, np.float32)
    run(source, target)
    expected = np.array([[source[5 + 23 * j + i] / 2 for j in range(size)] for i in range(size)])
    np.testing.assert_array_equal(target[32:].reshape(size, size), expected)
    assert np.isnan(target[:32]).all()


@pytest.mark.parametrize("whole", [True, False])
def test_dot_tile(width: Width, whole: bool) -> None:
    @njit
    def run(rows: Any, keys: Any, queries: Any, depth: Any, tile: Any) -> None:
        lanes.dot_tile(width, rows, keys, 16, queries, 0, depth, tile, 16)

    size, depth = width.lanes, 7
    rows = size if whole else 4
    keys, queries = RNG.integers(-9, 9, size=16 + depth * size), RNG.integers(-9, 9, size=(depth, size))
    tile = np.full(16 + size * rows, np.nan, np.float32)
    run(rows, keys.astype(np.float32), queries.astype(np.float32).reshape(-1), depth, tile)
    np.testing.assert_array_equal(tile[16:].reshape(rows, size), (keys[16:].reshape(depth, size).T @ queries)[:rows])
    assert np.isnan(tile[:16]).all()


@pytest.mark.parametrize(
    ("cpu", "features", "lanes_of_it"),
    [
        ("generic", "", 0),
        ("haswell", "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.1,+sse4.2", 8),
    ],
)
def test_another_cpu_that_numba_has_the_name_of(cpu: str, features: str, lanes_of_it: int) -> None:
    """With NUMBA_CPU_NAME Numba makes code for another CPU: this one's registers would not compile."""
    if WIDEST is None or WIDEST.lanes < lanes_of_it:
        pytest.skip(f"this CPU has no registers of {lanes_of_it} lanes")
    code = (
        "import numpy as np; from kernels import measure_attention; from tests.cases import layout\n"
        "from kernels.cpu import backend as numba_cpu\n"
        f"width = numba_cpu.vector_width()\nassert (width.lanes if width else 0) == {lanes_of_it}, width\n"
        "a = np.full((1, 13, 13), 1 / 13, np.float16)\n"
        "print(float(measure_attention(a, layout(3, 4, 1), 'entropy')['entropy'][0]))\n"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - np.log(12)) < 1e-6
