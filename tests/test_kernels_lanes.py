"""The vector type of the AVX-512 loops: each operation against NumPy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

from kernels import lanes

pytestmark = pytest.mark.skipif(not lanes.are_available(), reason="no AVX-512 on this CPU")

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
A, B, C = (RNG.normal(size=16).astype(np.float32) for _ in range(3))


def lane_by_lane(operation: Any, *inputs: np.ndarray) -> np.ndarray:
    """A compiled function of vectors, applied to arrays of 16."""
    out = np.empty(16, np.float32)
    if len(inputs) == 1:

        @njit
        def run(a: Any, out: Any) -> None:
            lanes.store(out, 0, operation(lanes.load(a, 0)))
    elif len(inputs) == 2:

        @njit
        def run(a: Any, b: Any, out: Any) -> None:
            lanes.store(out, 0, operation(lanes.load(a, 0), lanes.load(b, 0)))
    else:

        @njit
        def run(a: Any, b: Any, c: Any, out: Any) -> None:
            lanes.store(out, 0, operation(lanes.load(a, 0), lanes.load(b, 0), lanes.load(c, 0)))

    run(*inputs, out)
    return out


def test_arithmetic() -> None:
    @njit
    def sum_of(a: Any, b: Any) -> Any:
        return a + b

    @njit
    def difference(a: Any, b: Any) -> Any:
        return a - b

    @njit
    def product(a: Any, b: Any) -> Any:
        return a * b

    np.testing.assert_array_equal(lane_by_lane(sum_of, A, B), A + B)
    np.testing.assert_array_equal(lane_by_lane(difference, A, B), A - B)
    np.testing.assert_array_equal(lane_by_lane(product, A, B), A * B)
    exact = A.astype(np.float64) * B + C
    np.testing.assert_array_equal(lane_by_lane(lanes.fma, A, B, C), exact.astype(np.float32))


def test_greater_hands_on_nan_from_its_second_operand_alone() -> None:
    a, b = A.copy(), B.copy()
    a[3] = b[5] = np.nan
    got = lane_by_lane(lanes.greater, a, b)
    assert got[3] == b[3]
    assert np.isnan(got[5])
    ordinary = [i for i in range(16) if i not in (3, 5)]
    np.testing.assert_array_equal(got[ordinary], np.maximum(a, b)[ordinary])


def test_parts_of_a_float() -> None:
    x = np.array([1, 1.5, 2, 3.999, 0.5, 0.3, 1e-30, 1e30, 196, 1 / 196, 7, 8, 9, 1e-38, 1e-40, 0], np.float32)
    mantissa, exponent = np.frexp(x.astype(np.float64))
    np.testing.assert_array_equal(lane_by_lane(lanes.mantissa, x)[:15], (2 * mantissa)[:15])
    np.testing.assert_array_equal(lane_by_lane(lanes.exponent, x)[:15], (exponent - 1)[:15])
    assert lane_by_lane(lanes.exponent, x)[15] == -np.inf
    t = np.array([-126, -5.25, -1, -0.75, 0, 0.5, 3.125, -100.5, np.nan, -3, -2.5, 1, 2, 7.75, -0.125, -60], np.float32)
    np.testing.assert_array_equal(lane_by_lane(lanes.fraction, t), t - np.floor(t))
    np.testing.assert_array_equal(lane_by_lane(lanes.times_power, A, t), A * np.exp2(np.floor(t)))


@pytest.mark.parametrize("count", [0, 1, 7, 15, 16])
def test_masks(count: int) -> None:
    @njit
    def kept(a: Any, count: Any, out: Any) -> None:
        lanes.store(out, 0, lanes.keep(lanes.first(count), lanes.load(a, 0)))

    @njit
    def following(a: Any, count: Any, out: Any) -> None:
        lanes.store(out, 0, lanes.next_lane(lanes.load(a, 0), lanes.first(count)))

    out = np.empty(16, np.float32)
    inside = np.arange(16) < count
    kept(A, count, out)
    np.testing.assert_array_equal(out, np.where(inside, A, 0))
    following(A, count, out)
    np.testing.assert_array_equal(out, np.where(inside, np.roll(A, -1), 0))


def test_signs() -> None:
    @njit
    def holds(a: Any, b: Any) -> Any:
        return lanes.holds_sign(lanes.either(lanes.load(a, 0), lanes.load(b, 0)))

    positive = np.abs(A)
    negative_zero = positive.copy()
    negative_zero[11] = -0.0
    assert not holds(positive, positive)
    assert holds(positive, negative_zero)
    assert holds(negative_zero, positive)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_memory_is_widened_exactly(dtype: str) -> None:
    @njit
    def widen(array: Any, position: Any, out: Any) -> Any:
        lanes.prefetch(array, position + 100_000)
        lanes.store(out, 0, lanes.load(array, position))
        return lanes.first_lane(lanes.load(array, position + 1))

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
    out = np.empty(16, np.float32)
    assert widen(stored, 3, out) == expected[4]
    np.testing.assert_array_equal(out, expected[3:19])


def test_sums_across_lanes() -> None:
    @njit
    def eight(v: Any, out: Any) -> None:
        lanes.store(
            out,
            0,
            lanes.sums_of_eight(
                lanes.load(v, 0),
                lanes.load(v, 16),
                lanes.load(v, 32),
                lanes.load(v, 48),
                lanes.load(v, 64),
                lanes.load(v, 80),
                lanes.load(v, 96),
                lanes.load(v, 112),
            ),
        )

    v = RNG.integers(-999, 999, size=(8, 16)).astype(np.float32)
    out = np.empty(16, np.float32)
    eight(v.reshape(-1), out)
    np.testing.assert_array_equal(out, np.tile(v.sum(axis=1), 2))


def test_transpose() -> None:
    @njit
    def run(source: Any, target: Any) -> None:
        lanes.transpose(source, 5, 23, np.float32(0.5), target, 32)

    source = np.arange(5 + 23 * 16, dtype=np.float32)
    target = np.full(32 + 256, np.nan, np.float32)
    run(source, target)
    expected = np.array([[source[5 + 23 * j + i] / 2 for j in range(16)] for i in range(16)])
    np.testing.assert_array_equal(target[32:].reshape(16, 16), expected)
    assert np.isnan(target[:32]).all()


@pytest.mark.parametrize("rows", [16, 4])
def test_dot_tile(rows: int) -> None:
    @njit
    def run(rows: Any, keys: Any, queries: Any, depth: Any, tile: Any) -> None:
        lanes.dot_tile(rows, keys, 16, queries, 0, depth, tile, 16)

    depth = 7
    keys, queries = RNG.integers(-9, 9, size=(8, 16)), RNG.integers(-9, 9, size=(7, 16))
    tile = np.full(16 + 16 * rows, np.nan, np.float32)
    run(rows, keys.astype(np.float32).reshape(-1), queries.astype(np.float32).reshape(-1), depth, tile)
    np.testing.assert_array_equal(tile[16:].reshape(rows, 16), (keys[1:].T @ queries)[:rows])


def test_another_cpu_that_numba_is_told_of_has_none() -> None:
    """With NUMBA_CPU_NAME=generic Numba makes code for any CPU: the loops for AVX-512 would not compile."""
    code = (
        "import numpy as np; from kernels import measure_attention, numba_cpu; from tests.cases import layout\n"
        "assert not numba_cpu.has_vector_loops()\n"
        "a = np.full((1, 13, 13), 1 / 13, np.float32)\n"
        "print(float(measure_attention(a, layout(3, 4, 1), 'entropy')['entropy'][0]))\n"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - np.log(12)) < 1e-6
