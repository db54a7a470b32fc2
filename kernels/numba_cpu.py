"""CPU loops in Numba: one pass over the maps, all metrics at once, parallel over maps.

Arithmetic is float32, float64 for float64 input. What a map's values are depends on that map alone: not on the batch
it came in, nor on the number of threads. float16 and bfloat16 arrive as their bits and are widened a row at a time,
so no copy of the input is made. From query and key, four rows of logits exist at a time, in cache.

No loop may assume NaN away: `fastmath` grants reassociation (so that sums vectorise) and contraction alone.
The logarithm decides the speed: libm's is scalar here, so float32 takes polynomials (log2 to 3e-7, 2^t to 1e-7).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

from kernels.arrays import Values, dtype_name, host_view
from kernels.checks import ROW_SUM_TOLERANCE
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec
from kernels.reference import RECEIVED_SPREAD, SEED1_LEAST_SUM_SQ, SEED1_LOG_OFFSET, extent_px

__all__ = [
    "FromPass",
    "PairResult",
    "PassResult",
    "cls_entropy",
    "cls_morans_i",
    "distance",
    "distance_px",
    "distance_seed1",
    "distance_walmer",
    "entropy",
    "entropy_normalized",
    "entropy_seed1",
    "gearys_c",
    "gini",
    "is_compiled",
    "js_divergence",
    "measure_attention",
    "measure_pair",
    "measure_qk",
    "morans_i",
    "morans_i_received",
    "morans_i_seed1",
    "prefix_mass",
    "region_mass",
]

# What a pass computes besides validity and prefix mass.
DISTANCE, ENTROPY, MORAN, GEARY, RECEIVED, GINI, ENTROPY_SEED1, PATCH_MASS = 1, 2, 4, 8, 16, 32, 64, 128

# How the input's bits are read.
_FLOAT, _FLOAT16, _BFLOAT16 = 0, 1, 2

_OPTIONS: dict[str, Any] = {
    "cache": True,
    "nogil": True,
    "error_model": "numpy",  # division by zero is no exception: its test would stand in every loop's way
    "fastmath": {"reassoc", "nsz", "contract"},
}

# Numba's `workqueue` threading layer aborts the process when two threads enter a parallel region at once; with
# OpenMP a second region would only take cores from the first.
_one_region = threading.Lock()


@dataclass(frozen=True, slots=True)
class PassResult:
    """Arrays of one pass, maps flattened.

    Attributes:
        rows: float [6, map, patch query]: distance, entropy (nat), Moran's I, Geary's C, Gini coefficient; NaN where
            undefined. Then entropy in the `seed1` convention, NaN where invalid.
        prefix_mass: float [map, patch query].
        patch_mass: float64 [map, patch query], the patches' part of each row; NaN where invalid or not asked for.
        received: float64 [map, patch], sum of the renormalised rows over the defined patch queries.
        class_rows: float64 [map, patch], renormalised; NaN where undefined or without a class token.
        regions: float64 [map, region, patch] or None.
    """

    layout: TokenLayout
    rows: np.ndarray
    prefix_mass: np.ndarray
    patch_mass: np.ndarray
    received: np.ndarray
    class_rows: np.ndarray
    regions: np.ndarray | None


@dataclass(frozen=True, slots=True)
class PairResult:
    """Arrays of one pass over two conditions, maps flattened.

    Attributes:
        js_divergence: float [map, patch query], in nat; NaN where undefined in either.
    """

    js_divergence: np.ndarray


@dataclass(frozen=True, slots=True)
class FromPass:
    """A metric's implementation: what the pass must compute for it, and how it is read off the result."""

    needs: int
    read: Callable[[PassResult], np.ndarray]

    def __call__(self, result: PassResult) -> np.ndarray:
        return self.read(result)


def is_compiled() -> bool:
    """Whether a pass has run in this process; the first one compiles for some seconds, unless cached on disk."""
    return bool(_attention_pass.signatures or _qk_pass.signatures or _pair_pass.signatures)


def measure_attention(
    attention: Any, layout: TokenLayout, specs: Sequence[MetricSpec], regions: np.ndarray | None
) -> Values:
    """The pass over [*leading, query, key] attention."""
    name = dtype_name(attention)
    leading = tuple(attention.shape[:-2])
    buffer, starts, row_stride = _flat(_bits(host_view(attention)))
    tables = _tables(layout, name == "float64")
    with _one_region:
        arrays = _attention_pass(
            buffer,
            _KINDS.get(name, _FLOAT),
            starts,
            row_stride,
            layout.num_prefix_tokens,
            bool(layout.class_token),
            layout.grid_cols,
            layout.num_edges,
            *tables,
            ROW_SUM_TOLERANCE[name],
            _needs(specs, layout),
        )
    return _read(arrays, leading, layout, specs, regions)


def measure_qk(
    query: Any,
    key: Any,
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    regions: np.ndarray | None,
    scale: float,
    bias: Any,
) -> Values:
    """The pass from query and key [*leading, token, head_dim]; bias is [*leading, query, key] (a view) or None.

    A softmax over the patch logits alone is the renormalised row, so a prefix token that takes nearly all the mass
    costs no accuracy, and no logarithm is needed: entropy = ln Z − Σ e·t / Z with t the logits less the greatest.
    """
    name = dtype_name(query)
    leading = tuple(query.shape[:-2])
    q_buffer, q_starts, q_stride = _flat(_bits(host_view(query)))
    k_buffer, k_starts, k_stride = _flat(_bits(host_view(key)))
    tables = _tables(layout, name == "float64")
    compute = tables[0].dtype
    if bias is None:
        bias_buffer, bias_starts, bias_stride = _read_only(np.zeros(0, compute)), np.zeros(0, np.int64), 0
    else:
        bias_buffer, bias_starts, bias_stride = _flat(_additive(bias, compute))
    with _one_region:
        arrays = _qk_pass(
            q_buffer,
            k_buffer,
            _KINDS.get(name, _FLOAT),
            q_starts,
            q_stride,
            k_starts,
            k_stride,
            query.shape[-1],
            scale,
            bias_buffer,
            bias_starts,
            bias_stride,
            layout.num_prefix_tokens,
            bool(layout.class_token),
            layout.grid_cols,
            layout.num_edges,
            *tables,
            _needs(specs, layout),
        )
    return _read(arrays, leading, layout, specs, regions)


def measure_pair(attention: Any, other: Any, layout: TokenLayout, specs: Sequence[MetricSpec]) -> Values:
    """The pass over the same maps [*leading, query, key] in two conditions; a row is valid if it is in both."""
    name = dtype_name(attention)
    leading = tuple(attention.shape[:-2])
    dtype = np.dtype(np.float64 if name == "float64" else np.float32)
    one, two = (_flat(_bits(host_view(array))) for array in (attention, other))
    with _one_region:
        js, valid = _pair_pass(
            *one,
            *two,
            _KINDS.get(name, _FLOAT),
            layout.num_prefix_tokens,
            layout.num_patches,
            _read_only(np.zeros(0, dtype)),
            ROW_SUM_TOLERANCE[name],
        )
    result = PairResult(js)
    values = {}
    for spec in specs:
        implementation = spec.implementation("numba")
        assert implementation is not None  # `specs` holds those this backend has code for
        values[spec.name] = implementation(result).reshape((*leading, layout.num_patches))
    return Values(values=values, valid=valid.reshape((*leading, layout.num_tokens)))


_KINDS = {"float16": _FLOAT16, "bfloat16": _BFLOAT16}


def _needs(specs: Sequence[MetricSpec], layout: TokenLayout) -> int:
    needs = 0
    for spec in specs:
        implementation = spec.implementation("numba")
        assert isinstance(implementation, FromPass), f"numba's implementation of {spec.name!r} is no FromPass"
        needs |= implementation.needs
    return needs


def _read(
    arrays: tuple[np.ndarray, ...],
    leading: tuple[int, ...],
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    regions: np.ndarray | None,
) -> Values:
    rows, mass, patch_mass, received, class_rows, valid = arrays
    flat = None if regions is None else regions.reshape(-1, *regions.shape[-2:])
    result = PassResult(layout, rows, mass, patch_mass, received, class_rows, flat)
    values = {}
    for spec in specs:
        implementation = spec.implementation("numba")
        assert implementation is not None  # `specs` holds those this backend has code for
        tile = implementation(result)
        values[spec.name] = tile.reshape((*leading, *tile.shape[1:]))
    return Values(values=values, valid=valid.reshape((*leading, layout.num_tokens)))


@lru_cache(maxsize=16)
def _tables(layout: TokenLayout, double: bool) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, has_right).

    offsets[c] holds the distances from a query in column c to every patch of a grid 2R − 1 rows high; the R·C
    distances of the query at (r, c) are contiguous in it from (R − 1 − r)·C. At 14×14 that is 21 KB, against
    154 KB of the full matrix.
    has_right is 1 where a patch has a neighbour to its right, 0 in the last column.
    """
    rows, cols = layout.grid_rows, layout.grid_cols
    down = np.abs(np.arange(2 * rows - 1) - (rows - 1)) * layout.patch_height_px
    across = np.arange(cols)[:, None] - np.arange(cols)[None, :]
    offsets = np.hypot(down[None, :, None], across[:, None, :] * layout.patch_width_px) / layout.diagonal_px
    has_right = np.tile(np.arange(cols) < cols - 1, rows)
    dtype = np.float64 if double else np.float32
    return offsets.reshape(cols, -1).astype(dtype), has_right.astype(dtype)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == np.float16 else array


def _flat(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """[*leading, row, col] of any strides as (1-D memory, start of each map, row stride), in elements.

    No copy is made as long as a row is contiguous and strides are not negative.
    """
    item = array.itemsize
    strides = array.strides
    if (array.shape[-1] > 1 and strides[-1] != item) or any(s < 0 or s % item for s in strides):
        array = np.ascontiguousarray(array)
        strides = array.strides
    if array.size == 0:
        return _read_only(np.zeros(0, array.dtype)), np.zeros(math.prod(array.shape[:-2]), np.int64), 0
    steps = [s // item for s in strides]
    span = 1 + sum((n - 1) * step for n, step in zip(array.shape[:-1], steps[:-1], strict=True)) + array.shape[-1] - 1
    starts = np.zeros((), np.int64)
    for n, step in zip(array.shape[:-2], steps[:-2], strict=True):
        starts = np.add.outer(starts, np.arange(n, dtype=np.int64) * step)
    buffer = np.lib.stride_tricks.as_strided(array, (span,), (item,))
    return _read_only(buffer), starts.reshape(-1), steps[-2]


def _read_only(array: np.ndarray) -> np.ndarray:
    """Numba compiles apart for writable and read-only arrays: let there be one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


def _additive(bias: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """A broadcast bias or mask as additive numbers, converted before it is broadcast, rows contiguous."""
    if dtype_name(bias) == "bfloat16":
        bias = bias.float()
    view = host_view(bias)
    compact = view[tuple(slice(1) if step == 0 else slice(None) for step in view.strides)]
    if compact.dtype == np.bool_:
        compact = np.where(compact, dtype.type(0), dtype.type(-np.inf))
    compact = np.broadcast_to(compact.astype(dtype), (*compact.shape[:-1], view.shape[-1]))
    return np.broadcast_to(np.ascontiguousarray(compact), view.shape)


# --- arithmetic by type --------------------------------------------------------------------------------------------


def _f32(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


_L0, _L1, _L2, _L3, _L4, _L5, _L6 = _f32(
    1.442699670791626,
    -0.7213758826255798,
    0.48046502470970154,
    -0.3589618504047394,
    0.29726260900497437,
    -0.27269789576530457,
    0.17063434422016144,
)
_E1, _E2, _E3, _E4, _E5, _E6 = _f32(
    0.6931471824645996,
    0.24022646248340607,
    0.05550328642129898,
    0.009618489071726799,
    0.0013399930903688073,
    0.00015345810970757157,
)
# φ(t) = Σ_k t^2k / (2k (2k − 1)): at t = ¼ the next term is 1e-17 after k = 11, in float32 1e-8 of φ after k = 5.
_P1, _P2, _P3, _P4, _P5, _P6, _P7, _P8, _P9, _P10, _P11 = (1.0 / (2 * k * (2 * k - 1)) for k in range(1, 12))
_S1, _S2, _S3, _S4, _S5 = _f32(_P1, _P2, _P3, _P4, _P5)
_ONE, _HALF, _LEAST_EXP2 = _f32(1.0, 0.5, -126.0)
_TWO_M14 = np.float32(2.0**-14)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453


@njit(**_OPTIONS)
def _float_of(bits: Any) -> Any:
    return np.int32(bits).view(np.float32)


@njit(**_OPTIONS)
def _int_bits(x: Any) -> Any:
    return np.float32(x).view(np.int32)


def _signed_bits(x: Any) -> Any:
    """An integer that is negative where x has its sign bit set."""
    raise NotImplementedError  # compiled code only


@overload(_signed_bits)
def _signed_bits_of(x: Any) -> Any:
    if x == types.float64:

        def double_bits(x: Any) -> Any:
            return np.float64(x).view(np.int64)

        return double_bits

    def single_bits(x: Any) -> Any:
        return _int_bits(x)

    return single_bits


def _log2(x: Any) -> Any:
    """log2 x of a normal number; of 0 and, in float32, of subnormal numbers any finite number, for x·log2 x is 0."""
    raise NotImplementedError  # compiled code only


@overload(_log2)
def _log2_of(x: Any) -> Any:
    if x == types.float64:

        def log2_double(x: Any) -> Any:
            return np.log(max(x, 2.2250738585072014e-308)) * _LOG2_E

        return log2_double

    def log2(x: Any) -> Any:
        bits = _int_bits(x)  # of 0 and subnormal numbers it makes −127: they weigh nothing
        exponent = (bits - _SQRT_HALF_BITS) >> np.int32(23)
        f = _float_of(bits - (exponent << np.int32(23))) - _ONE  # mantissa in [√½, √2), less 1
        poly = _L0 + f * (_L1 + f * (_L2 + f * (_L3 + f * (_L4 + f * (_L5 + f * _L6)))))
        return np.float32(exponent) + f * poly

    return log2


def _exp2(t: Any) -> Any:
    """2^t for t ≤ 0; 0 below −126 in float32; NaN for NaN."""
    raise NotImplementedError  # compiled code only


@overload(_exp2)
def _exp2_of(t: Any) -> Any:
    if t == types.float64:

        def exp2_double(t: Any) -> Any:
            return np.exp(t * _LN_2)

        return exp2_double

    def exp2(t: Any) -> Any:
        at_least = _LEAST_EXP2 if t < _LEAST_EXP2 else t  # written so that NaN stays
        whole = np.floor(at_least + _HALF)
        f = at_least - whole
        poly = _ONE + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
        power = _float_of((np.int32(whole) + np.int32(127)) << np.int32(23))
        return np.float32(0.0) if t < _LEAST_EXP2 else poly * power

    return exp2


def _phi_series(s: Any) -> Any:
    """φ(t) = ½((1+t) ln(1+t) + (1−t) ln(1−t)) for s = t² up to 1/16."""
    raise NotImplementedError  # compiled code only


@overload(_phi_series)
def _phi_series_of(s: Any) -> Any:
    if s == types.float64:

        def phi_double(s: Any) -> Any:
            last = _P6 + s * (_P7 + s * (_P8 + s * (_P9 + s * (_P10 + s * _P11))))
            return s * (_P1 + s * (_P2 + s * (_P3 + s * (_P4 + s * (_P5 + s * last)))))

        return phi_double

    def phi(s: Any) -> Any:
        return s * (_S1 + s * (_S2 + s * (_S3 + s * (_S4 + s * _S5))))

    return phi


def _load(buffer: Any, begin: Any, kind: Any, x: Any) -> Any:
    """Widen buffer[begin : begin + x.size] into x, the exact values; (their sum, whether a sign bit is set)."""
    raise NotImplementedError  # compiled code only


@overload(_load)
def _load_of(buffer: Any, begin: Any, kind: Any, x: Any) -> Any:
    if buffer.dtype == types.uint16:

        def load_bits(buffer: Any, begin: Any, kind: Any, x: Any) -> Any:
            source = buffer[begin : begin + x.size]
            total = np.float32(0)
            signs = np.int32(0)
            if kind == _BFLOAT16:
                for i in range(x.size):
                    bits = np.int32(source[i])
                    x[i] = _float_of(bits << np.int32(16))
                    total += x[i]
                    signs |= bits
            else:
                # Rebias the exponent by 112; subnormal halves, whose exponent is that of 2^−14 but without the
                # leading 1, take it on and give it back. Infinity and NaN become numbers from 65,536 on, which no
                # row that sums to 1 holds and no finite half reaches.
                for i in range(x.size):
                    bits = np.int32(source[i])
                    size = (bits & np.int32(0x7FFF)) << np.int32(13)
                    small = _float_of(size + np.int32(113 << 23)) - _TWO_M14
                    value = small if size < np.int32(1 << 23) else _float_of(size + np.int32(112 << 23))
                    x[i] = -value if bits & np.int32(0x8000) else value
                    total += x[i]
                    signs |= bits
            return total, signs & np.int32(0x8000) != 0

        return load_bits

    def load(buffer: Any, begin: Any, kind: Any, x: Any) -> Any:
        source = buffer[begin : begin + x.size]
        total = x.dtype.type(0)
        signs = _signed_bits(total)
        for i in range(x.size):
            x[i] = source[i]
            total += x[i]
            signs |= _signed_bits(x[i])
        return total, signs < 0

    return load


@njit(**_OPTIONS)
def _sum(x: Any) -> Any:
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i]
    return total


@njit(**_OPTIONS)
def _sum_double(x: Any) -> Any:
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i])
    return total


@njit(**_OPTIONS)
def _holds_negative(x: Any) -> Any:
    """Whether a value is below 0; −0.0, which has a sign bit too, is not."""
    found = 0
    for i in range(x.size):
        found |= x[i] < 0
    return found != 0


@njit(**_OPTIONS)
def _rescale(x: Any, total: Any) -> Any:
    """Multiply a row of tiny numbers by a power of two, which is exact, so that it sums to about 1; its new sum.

    Squares of such a row would underflow. The greatest power a dtype has leaves subnormal rows at 2^−23, which will do.
    """
    greatest = 126 if x.itemsize == 4 else 1022
    exponent = min(-math.frexp(np.float64(total))[1], greatest)
    factor = x.dtype.type(math.ldexp(1.0, exponent))
    for i in range(x.size):
        x[i] *= factor
    return _sum(x)


# --- one row --------------------------------------------------------------------------------------------------------


@njit(**_OPTIONS)
def _mean_distance(x: Any, total: Any, offsets: Any, begin: Any) -> Any:
    """Σ x·d / Σ x, distances from `offsets[begin]` on."""
    d = offsets[begin : begin + x.size]
    weighted = x.dtype.type(0)
    for i in range(x.size):
        weighted += x[i] * d[i]
    return weighted / total


@njit(**_OPTIONS)
def _row_entropy(x: Any, total: Any) -> Any:
    """ln Σx − Σ x ln x / Σx, in nat."""
    weighted = x.dtype.type(0)
    for i in range(x.size):
        weighted += x[i] * _log2(x[i])
    return _LN_2 * (math.log2(np.float64(total)) - np.float64(weighted / total))


@njit(**_OPTIONS)
def _row_entropy_seed1(x: Any, factor: Any) -> Any:
    """−Σ P ln(P + 1e-12), P = factor·x, in nat."""
    offset = x.dtype.type(SEED1_LOG_OFFSET)
    weighted = x.dtype.type(0)
    for i in range(x.size):
        p = x[i] * factor
        weighted += p * _log2(p + offset)
    return 0.0 - _LN_2 * np.float64(weighted)


@njit(**_OPTIONS)
def _gini(x: Any, total: Any) -> Any:
    """Σ_i<j |x_i − x_j| / (N Σx), which is Σ_i (2i − N − 1) x_(i) / (N Σx) without a sort.

    Vectors take N²/2 differences faster than a sort orders N numbers: 1.4 µs against 7.2 at 196, 39 against 73 at
    1,369. Four values at a time, so that the others are loaded once for four.
    """
    zero = x.dtype.type(0)
    fours = x.size // 4 * 4
    apart = 0.0
    for i in range(0, fours, 4):
        a, b, c, d = x[i], x[i + 1], x[i + 2], x[i + 3]
        apart += np.float64(abs(a - b) + abs(a - c) + abs(a - d) + abs(b - c) + abs(b - d) + abs(c - d))
        rest = x[i + 4 :]
        of_a, of_b, of_c, of_d = zero, zero, zero, zero
        for j in range(rest.size):
            of_a += abs(rest[j] - a)
            of_b += abs(rest[j] - b)
            of_c += abs(rest[j] - c)
            of_d += abs(rest[j] - d)
        apart += np.float64(of_a) + np.float64(of_b) + np.float64(of_c) + np.float64(of_d)
    for i in range(fours, x.size):
        for j in range(i + 1, x.size):
            apart += np.float64(abs(x[i] - x[j]))
    return apart / (x.size * np.float64(total))


@njit(**_OPTIONS)
def _is_constant(x: Any) -> Any:
    i = 1
    while i < x.size and x[i] == x[0]:  # of most rows two values suffice
        i += 1
    return i >= x.size


@njit(**_OPTIONS)
def _centre(x: Any, total: Any, z: Any) -> Any:
    """z = x − mean; Σ z².

    The mean is taken away twice: the first time it is rounded at the size of x, the second time at the size of z.
    Rows uniform to 5e-4 need that.
    """
    mean = x.dtype.type(total / x.size)
    rest = x.dtype.type(0)
    for i in range(x.size):
        z[i] = x[i] - mean
        rest += z[i]
    rest = x.dtype.type(rest / x.size)
    sum_sq = x.dtype.type(0)
    for i in range(x.size):
        z[i] -= rest
        sum_sq += z[i] * z[i]
    return sum_sq


@njit(**_OPTIONS)
def _morans_i(z: Any, sum_sq: Any, has_right: Any, grid_cols: Any, num_edges: Any) -> Any:
    """N/S0 · 2 Σ z z over edges / Σ z². Neighbours are shifts, by 1 and by the width of the grid."""
    # Slices, not z[i + grid_cols]: an index that might be negative keeps a loop from vectorising.
    right, below = z[1:], z[grid_cols:]
    cross = z.dtype.type(0)
    for i in range(right.size):
        cross += has_right[i] * z[i] * right[i]
    for i in range(below.size):
        cross += z[i] * below[i]
    return np.float64(z.size) / num_edges * np.float64(cross / sum_sq)


@njit(**_OPTIONS)
def _gearys_c(z: Any, sum_sq: Any, has_right: Any, grid_cols: Any, num_edges: Any) -> Any:
    """(N − 1)/(2 S0) · 2 Σ (z − z)² over edges / Σ z²."""
    right, below = z[1:], z[grid_cols:]
    apart = z.dtype.type(0)
    for i in range(right.size):
        step = z[i] - right[i]
        apart += has_right[i] * step * step
    for i in range(below.size):
        step = z[i] - below[i]
        apart += step * step
    return np.float64(z.size - 1) / (2 * num_edges) * np.float64(apart / sum_sq)


@njit(**_OPTIONS)
def _measure_row(
    x: Any, z: Any, total: Any, patch: Any, grid_cols: Any, num_edges: Any, offsets: Any, has_right: Any, needs: Any
) -> Any:
    """(distance, Moran's I, Geary's C, Gini coefficient) of the row of patch query `patch`."""
    far, moran, geary, unequal = np.nan, np.nan, np.nan, np.nan
    if needs & DISTANCE:
        row, col = patch // grid_cols, patch % grid_cols
        begin = (x.size // grid_cols - 1 - row) * grid_cols
        far = np.float64(_mean_distance(x, total, offsets[col], begin))
    if needs & (MORAN | GEARY) and not _is_constant(x):
        sum_sq = _centre(x, total, z)
        if needs & MORAN:
            moran = _morans_i(z, sum_sq, has_right, grid_cols, num_edges)
        if needs & GEARY:
            geary = _gearys_c(z, sum_sq, has_right, grid_cols, num_edges)
    if needs & GINI:
        unequal = _gini(x, total)
    return far, moran, geary, unequal


@njit(**_OPTIONS)
def _add_renormalised(x: Any, total: Any, received: Any) -> Any:
    scale = 1.0 / np.float64(total)
    for i in range(x.size):
        received[i] += np.float64(x[i]) * scale


@njit(**_OPTIONS)
def _allocate(maps: Any, tokens: Any, patches: Any, offsets: Any) -> Any:
    dtype = offsets.dtype
    rows = np.full((6, maps, patches), np.nan, dtype)
    mass = np.full((maps, patches), np.nan, dtype)
    patch_mass = np.full((maps, patches), np.nan, np.float64)
    received = np.zeros((maps, patches), np.float64)
    class_rows = np.full((maps, patches), np.nan, np.float64)
    valid = np.ones((maps, tokens), np.bool_)
    return rows, mass, patch_mass, received, class_rows, valid


@njit(**_OPTIONS)
def _checked_row(buffer: Any, begin: Any, prefix: Any, kind: Any, head: Any, x: Any, tolerance: Any) -> Any:
    """Widen one row into head and x; (sum over the patches, whether it is post-softmax attention)."""
    on_prefix, head_signs = _load(buffer, begin, kind, head)
    total, signs = _load(buffer, begin + prefix, kind, x)
    # A sum that is NaN or infinite fails the comparison too.
    in_range = abs(on_prefix + total - 1) <= tolerance
    negative = (head_signs and _holds_negative(head)) or (signs and _holds_negative(x))
    return total, in_range and not negative


# --- whole maps -----------------------------------------------------------------------------------------------------


@njit(parallel=True, **_OPTIONS)
def _attention_pass(
    buffer: Any,
    kind: Any,
    starts: Any,
    row_stride: Any,
    prefix: Any,
    class_token: Any,
    grid_cols: Any,
    num_edges: Any,
    offsets: Any,
    has_right: Any,
    tolerance: Any,
    needs: Any,
) -> Any:
    """Every row of every map: widened, checked, measured. `starts` [map]; the arrays of `PassResult`, and validity."""
    maps, patches = starts.size, has_right.size
    tokens = prefix + patches
    rows, mass, patch_mass, received, class_rows, valid = _allocate(maps, tokens, patches, offsets)
    for m in prange(maps):
        head = np.empty(prefix, offsets.dtype)
        x = np.empty(patches, offsets.dtype)
        z = np.empty(patches, offsets.dtype)
        for q in range(tokens):
            begin = starts[m] + q * row_stride
            on_prefix, head_signs = _load(buffer, begin, kind, head)
            total, signs = _load(buffer, begin + prefix, kind, x)
            # A sum that is NaN or infinite fails the comparison too.
            in_range = abs(on_prefix + total - 1) <= tolerance
            if not in_range or (head_signs and _holds_negative(head)) or (signs and _holds_negative(x)):
                valid[m, q] = False
                continue
            if q >= prefix:
                mass[m, q - prefix] = on_prefix
                if needs & PATCH_MASS:
                    patch_mass[m, q - prefix] = _sum_double(x)
                if needs & ENTROPY_SEED1:
                    rows[5, m, q - prefix] = _row_entropy_seed1(x, x.dtype.type(1))
            if total == 0:
                continue
            if total < 1e-3:
                total = _rescale(x, total)
            if q < prefix:
                if class_token and q == 0:
                    class_rows[m] = 0.0
                    _add_renormalised(x, total, class_rows[m])
                continue
            patch = q - prefix
            rows[0, m, patch], rows[2, m, patch], rows[3, m, patch], rows[4, m, patch] = _measure_row(
                x, z, total, patch, grid_cols, num_edges, offsets, has_right, needs
            )
            if needs & ENTROPY:
                rows[1, m, patch] = max(_row_entropy(x, total), 0.0)
            if needs & RECEIVED:
                _add_renormalised(x, total, received[m])
    return rows, mass, patch_mass, received, class_rows, valid


@njit(**_OPTIONS)
def _logits(q: Any, kt: Any, out: Any) -> Any:
    """out = q·kᵀ for four queries [4, dim] and all keys kt [dim, token]; dim is a multiple of 4.

    Four queries by four dimensions: 16 products for four loads of keys and four of sums (44 GFLOP/s measured where
    one query at a time reached 24).
    """
    out0, out1, out2, out3 = out[0], out[1], out[2], out[3]
    out[:] = 0
    for i in range(0, kt.shape[0], 4):
        k0, k1, k2, k3 = kt[i], kt[i + 1], kt[i + 2], kt[i + 3]
        a0, a1, a2, a3 = q[0, i], q[0, i + 1], q[0, i + 2], q[0, i + 3]
        b0, b1, b2, b3 = q[1, i], q[1, i + 1], q[1, i + 2], q[1, i + 3]
        c0, c1, c2, c3 = q[2, i], q[2, i + 1], q[2, i + 2], q[2, i + 3]
        d0, d1, d2, d3 = q[3, i], q[3, i + 1], q[3, i + 2], q[3, i + 3]
        for j in range(kt.shape[1]):
            v0, v1, v2, v3 = k0[j], k1[j], k2[j], k3[j]
            out0[j] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
            out1[j] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
            out2[j] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
            out3[j] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3


@njit(**_OPTIONS)
def _greatest(x: Any) -> Any:
    """The greatest logit; NaN if there is one. −inf for an empty row."""
    top = x.dtype.type(-np.inf)
    for i in range(x.size):
        if not x[i] <= top:
            top = x[i]
            if np.isnan(top):
                return top
    return top


@njit(**_OPTIONS)
def _weights(logits: Any, top: Any, x: Any) -> Any:
    """x = 2^t with t = logits − top (binary logarithms); (Σ x, Σ x·t)."""
    total = x.dtype.type(0)
    weighted = x.dtype.type(0)
    for i in range(x.size):
        t = logits[i] - top
        x[i] = _exp2(t)
        total += x[i]
        weighted += x[i] * (t if t > _LEAST_EXP2 else _LEAST_EXP2)
    return total, weighted


@njit(parallel=True, **_OPTIONS)
def _qk_pass(
    q_buffer: Any,
    k_buffer: Any,
    kind: Any,
    q_starts: Any,
    q_stride: Any,
    k_starts: Any,
    k_stride: Any,
    head_dim: Any,
    scale: Any,
    bias_buffer: Any,
    bias_starts: Any,
    bias_stride: Any,
    prefix: Any,
    class_token: Any,
    grid_cols: Any,
    num_edges: Any,
    offsets: Any,
    has_right: Any,
    needs: Any,
) -> Any:
    """As `_attention_pass`, from query and key: four rows of logits, their softmax and metrics, then the next four."""
    maps, patches = q_starts.size, has_right.size
    tokens = prefix + patches
    rows, mass, patch_mass, received, class_rows, valid = _allocate(maps, tokens, patches, offsets)
    dtype = offsets.dtype
    padded = (head_dim + 3) // 4 * 4
    log2_e = dtype.type(_LOG2_E)
    factor = dtype.type(scale * _LOG2_E)  # logits in binary logarithms, for 2^t
    for m in prange(maps):
        vector = np.empty(head_dim, dtype)
        kt = np.zeros((padded, tokens), dtype)
        for token in range(tokens):
            _load(k_buffer, k_starts[m] + token * k_stride, kind, vector)
            for i in range(head_dim):
                kt[i, token] = vector[i]
        four = np.zeros((4, padded), dtype)
        logits = np.empty((4, tokens), dtype)
        head = np.empty(prefix, dtype)
        x = np.empty(patches, dtype)
        z = np.empty(patches, dtype)
        for begin in range(0, tokens, 4):
            size = min(4, tokens - begin)
            for row in range(size):
                _load(q_buffer, q_starts[m] + (begin + row) * q_stride, kind, vector)
                for i in range(head_dim):
                    four[row, i] = vector[i] * factor
            _logits(four, kt, logits)
            for row in range(size):
                q = begin + row
                line = logits[row]
                if bias_starts.size > 0:
                    start = bias_starts[m] + q * bias_stride
                    for i in range(tokens):
                        line[i] += bias_buffer[start + i] * log2_e
                top_prefix = _greatest(line[:prefix])
                top = _greatest(line[prefix:])
                highest = top_prefix if top_prefix > top else top
                # NaN logits, infinite ones, or no key at all.
                if np.isnan(top_prefix) or np.isnan(top) or abs(highest) == np.inf:
                    valid[m, q] = False
                    continue
                if top == -np.inf:  # the patches are hidden: all mass is on the prefix
                    if q >= prefix:
                        mass[m, q - prefix] = 1
                        patch_mass[m, q - prefix] = 0
                        rows[5, m, q - prefix] = 0
                    continue
                total, weighted = _weights(line[prefix:], top, x)
                if q >= prefix:
                    share = 1.0  # of the patches
                    mass[m, q - prefix] = 0
                    if prefix > 0:
                        on_prefix, _ = _weights(line[:prefix], highest, head)
                        on_patches = np.float64(total) * 2.0 ** np.float64(top - highest)
                        mass[m, q - prefix] = on_prefix / (on_prefix + on_patches)
                        share = on_patches / (on_prefix + on_patches)
                    patch_mass[m, q - prefix] = share
                    if needs & ENTROPY_SEED1:
                        rows[5, m, q - prefix] = _row_entropy_seed1(x, dtype.type(share / total))
                if q < prefix:
                    if class_token and q == 0:
                        class_rows[m] = 0.0
                        _add_renormalised(x, total, class_rows[m])
                    continue
                patch = q - prefix
                rows[0, m, patch], rows[2, m, patch], rows[3, m, patch], rows[4, m, patch] = _measure_row(
                    x, z, total, patch, grid_cols, num_edges, offsets, has_right, needs
                )
                if needs & ENTROPY:
                    nat = _LN_2 * (math.log2(np.float64(total)) - np.float64(weighted / total))
                    rows[1, m, patch] = max(nat, 0.0)
                if needs & RECEIVED:
                    _add_renormalised(x, total, received[m])
    return rows, mass, patch_mass, received, class_rows, valid


@njit(**_OPTIONS)
def _maps_morans_i(maps: Any, grid_cols: Any, num_edges: Any) -> Any:
    """Moran's I of float64 maps [map, patch]; NaN where constant or undefined."""
    count, n = maps.shape
    out = np.full(count, np.nan)
    z = np.empty(n)
    has_right = np.ones(n)
    has_right[grid_cols - 1 :: grid_cols] = 0.0
    for m in range(count):
        total = _sum(maps[m])
        if total > 0 and not _is_constant(maps[m]):
            sum_sq = _centre(maps[m], total, z)
            out[m] = _morans_i(z, sum_sq, has_right, grid_cols, num_edges)
    return out


@njit(**_OPTIONS)
def _maps_entropy(maps: Any) -> Any:
    """Entropy in nat of float64 maps [map, patch]; NaN where undefined."""
    out = np.full(maps.shape[0], np.nan)
    for m in range(maps.shape[0]):
        total = _sum(maps[m])
        if total > 0:
            out[m] = max(_row_entropy(maps[m], total), 0.0)
    return out


@njit(**_OPTIONS)
def _row_js_divergence(x: Any, x_total: Any, y: Any, y_total: Any) -> Any:
    """Σ m φ(t) in nat with m = (p + q)/2, t = (p − q)/(p + q) of the renormalised rows; φ as in the reference."""
    one, half, quarter = x.dtype.type(1), x.dtype.type(0.5), x.dtype.type(0.25)
    ln_2 = x.dtype.type(_LN_2)
    divergence = x.dtype.type(0)
    for i in range(x.size):
        p, q = x[i] / x_total, y[i] / y_total
        total = p + q
        t = (p - q) / (total if total > 0 else one)
        up, down = one + t, one - t
        far = half * ln_2 * (up * _log2(up) + down * _log2(down))
        divergence += half * total * (far if abs(t) >= quarter else _phi_series(t * t))
    return divergence


@njit(parallel=True, **_OPTIONS)
def _pair_pass(
    one_buffer: Any,
    one_starts: Any,
    one_stride: Any,
    two_buffer: Any,
    two_starts: Any,
    two_stride: Any,
    kind: Any,
    prefix: Any,
    patches: Any,
    like: Any,
    tolerance: Any,
) -> Any:
    """Every row of every map in two conditions; arithmetic in the dtype of `like`. (divergences, validity)."""
    maps = one_starts.size
    tokens = prefix + patches
    js = np.full((maps, patches), np.nan, like.dtype)
    valid = np.ones((maps, tokens), np.bool_)
    for m in prange(maps):
        head = np.empty(prefix, like.dtype)
        x = np.empty(patches, like.dtype)
        y = np.empty(patches, like.dtype)
        for q in range(tokens):
            begin = one_starts[m] + q * one_stride
            one_total, one_valid = _checked_row(one_buffer, begin, prefix, kind, head, x, tolerance)
            begin = two_starts[m] + q * two_stride
            two_total, two_valid = _checked_row(two_buffer, begin, prefix, kind, head, y, tolerance)
            if not (one_valid and two_valid):
                valid[m, q] = False
            elif q >= prefix and one_total > 0 and two_total > 0:
                if one_total < 1e-3:
                    one_total = _rescale(x, one_total)
                if two_total < 1e-3:
                    two_total = _rescale(y, two_total)
                js[m, q - prefix] = _row_js_divergence(x, one_total, y, two_total)
    return js, valid


# --- metrics, as read off a pass ------------------------------------------------------------------------------------


def _region_mass(result: PassResult) -> np.ndarray:
    assert result.regions is not None  # the entry points refuse region metrics without regions
    maps = result.class_rows if result.layout.class_token else _mean_row(result.received)
    return np.asarray(np.einsum("mk,mrk->mr", maps, result.regions))


def _mean_row(received: np.ndarray) -> np.ndarray:
    total = received.sum(axis=-1, keepdims=True)
    return np.where(total > 0, received / np.where(total > 0, total, 1.0), np.nan)


def _class_rows(result: PassResult) -> np.ndarray:
    if not result.layout.class_token:
        raise ValueError("this layout has no class token, so there is no class-token row")
    return result.class_rows


def _received_morans_i(result: PassResult) -> np.ndarray:
    maps = result.received
    varies = maps.max(axis=-1) - maps.min(axis=-1) > RECEIVED_SPREAD * maps.mean(axis=-1)
    return np.where(varies, _maps_morans_i(maps, result.layout.grid_cols, result.layout.num_edges), np.nan)


def _distance_seed1(result: PassResult) -> np.ndarray:
    """A row without mass on the patches has no mean distance, but 0 of this one."""
    far = np.where(result.patch_mass == 0, 0, result.rows[0])
    return np.asarray(far * result.patch_mass)


def _morans_i_seed1(result: PassResult) -> np.ndarray:
    x = result.patch_mass / result.layout.num_patches
    sum_sq = ((x - x.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    of_mass = _maps_morans_i(x, result.layout.grid_cols, result.layout.num_edges)
    return np.where(sum_sq <= SEED1_LEAST_SUM_SQ, 0.0, of_mass)


distance = FromPass(DISTANCE, lambda result: result.rows[0])
distance_seed1 = FromPass(DISTANCE | PATCH_MASS, _distance_seed1)
distance_px = FromPass(DISTANCE | PATCH_MASS, lambda result: _distance_seed1(result) * result.layout.diagonal_px)
distance_walmer = FromPass(
    DISTANCE, lambda result: result.rows[0] * (result.layout.diagonal_px / extent_px(result.layout))
)
entropy = FromPass(ENTROPY, lambda result: result.rows[1])
entropy_normalized = FromPass(ENTROPY, lambda result: result.rows[1] / math.log(result.layout.num_patches))
morans_i = FromPass(MORAN, lambda result: result.rows[2])
gearys_c = FromPass(GEARY, lambda result: result.rows[3])
gini = FromPass(GINI, lambda result: result.rows[4])
entropy_seed1 = FromPass(ENTROPY_SEED1, lambda result: result.rows[5])
morans_i_seed1 = FromPass(PATCH_MASS, _morans_i_seed1)
prefix_mass = FromPass(0, lambda result: result.prefix_mass)
morans_i_received = FromPass(RECEIVED, _received_morans_i)
cls_entropy = FromPass(0, lambda result: _maps_entropy(_class_rows(result)))
cls_morans_i = FromPass(
    0, lambda result: _maps_morans_i(_class_rows(result), result.layout.grid_cols, result.layout.num_edges)
)
region_mass = FromPass(RECEIVED, _region_mass)


def js_divergence(result: PairResult) -> np.ndarray:
    return result.js_divergence
