"""Arithmetic of the compiled CPU loops: logarithm, power, the widening of half floats, and sums.

No loop may assume NaN away: `fastmath` grants reassociation (so that sums vectorise) and contraction alone.
The logarithm decides the speed: libm's is scalar here, so float32 takes polynomials (log2 to 3e-7, 2^t to 1e-7).
"""

# Numba types compiled code: its parameters take no annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

_intrinsic: Any = intrinsic  # what it makes is not a function to a type checker

# How the input's bits are read.
FLOAT, FLOAT16, BFLOAT16 = 0, 1, 2

# Of functions that compiled code calls: wrappers for Python take a third of the time to compile. Those that Python
# calls are made by `cache.called_from_python`.
OPTIONS: dict[str, Any] = {
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "nogil": True,
    "error_model": "numpy",  # division by zero is no exception: its test would stand in every loop's way
    "fastmath": {"reassoc", "nsz", "contract"},
}


def _without_owner(context, builder, kind, value):
    if isinstance(kind, types.Tuple | types.UniTuple):
        kinds = kind.types
        parts = cgutils.unpack_tuple(builder, value, len(kinds))
        whole = [_without_owner(context, builder, *part) for part in zip(kinds, parts, strict=True)]
        return context.make_tuple(builder, kind, whole)
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


@_intrinsic
def lent(typing, arrays):
    """The same array, or tuple with arrays, without their owner, so that no reference to them is counted.

    Loops over rows slice and hand on arrays, and counted that in their owner, one for all threads: in the loops for any
    CPU 2.8 of 10 ms per image for the core metrics, 4.2 of 5.9 for prefix mass (float16, ViT-B/16, one core). What
    Python passes in outlives the call; what compiled code makes must be held: see `hold`.
    """

    def generate(context, builder, signature, arguments):
        return _without_owner(context, builder, signature.args[0], arguments[0])

    return arrays(arrays), generate


@_intrinsic
def hold(typing, arrays):
    """Does nothing, after the last use of what was `lent` of these arrays: until here they live."""

    def generate(context, builder, signature, arguments):
        return context.get_dummy_value()

    return types.void(arrays), generate


def by_type(choose: Callable[..., Any]) -> Any:
    """A function of compiled code alone: `choose` picks what it is made of by the types of its arguments."""

    @functools.wraps(choose)
    def stub(*arguments):
        raise NotImplementedError("compiled code only")

    overload(stub)(choose)
    return stub


# Items between two arrays of working memory: 512 bytes of float32.
_APART = 128


@njit(forceinline=True, **OPTIONS)
def apart(count, dtype):
    """An empty array of `count` items that begins and ends far from everything else in memory.

    A compiled loop that writes one array and reads another asks, when it runs, whether they begin closer together than
    it takes at a step (256 bytes in AVX-512), and adds one by one if they do: the same sum, rounded otherwise, whenever
    a small grid's arrays happened to lie side by side.
    """
    return np.empty(count + 2 * _APART, dtype)[_APART : _APART + count]


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
_ONE, _HALF, LEAST_EXP2 = _f32(1.0, 0.5, -126.0)
_TWO_M14 = np.float32(2.0**-14)
_SQRT_HALF_BITS = np.int32(0x3F3504F3)
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@njit(forceinline=True, **OPTIONS)
def _float_of(bits):
    return np.int32(bits).view(np.float32)


@njit(forceinline=True, **OPTIONS)
def _int_bits(x):
    return np.float32(x).view(np.int32)


@by_type
def _signed_bits(x):
    """An integer that is negative where x has its sign bit set."""
    if x == types.float64:

        def double_bits(x):
            return np.float64(x).view(np.int64)

        return double_bits

    def single_bits(x):
        return _int_bits(x)

    return single_bits


@by_type
def log2(x):
    """log2 x of a normal number; of 0 and, in float32, of subnormal numbers any finite number, for x·log2 x is 0."""
    if x == types.float64:

        def log2_double(x):
            return np.log(max(x, 2.2250738585072014e-308)) * LOG2_E

        return log2_double

    def log2_single(x):
        bits = _int_bits(x)  # of 0 and subnormal numbers it makes −127: they weigh nothing
        exponent = (bits - _SQRT_HALF_BITS) >> np.int32(23)
        f = _float_of(bits - (exponent << np.int32(23))) - _ONE  # mantissa in [√½, √2), less 1
        poly = _L0 + f * (_L1 + f * (_L2 + f * (_L3 + f * (_L4 + f * (_L5 + f * _L6)))))
        return np.float32(exponent) + f * poly

    return log2_single


@by_type
def exp2(t):
    """2^t for t ≤ 0; 0 below −126 in float32; NaN for NaN."""
    if t == types.float64:

        def exp2_double(t):
            return np.exp(t * LN_2)

        return exp2_double

    def exp2_single(t):
        at_least = LEAST_EXP2 if t < LEAST_EXP2 else t  # written so that NaN stays
        whole = np.floor(at_least + _HALF)
        f = at_least - whole
        poly = _ONE + f * (_E1 + f * (_E2 + f * (_E3 + f * (_E4 + f * (_E5 + f * _E6)))))
        power = _float_of((np.int32(whole) + np.int32(127)) << np.int32(23))
        return np.float32(0.0) if t < LEAST_EXP2 else poly * power

    return exp2_single


@by_type
def phi_series(s):
    """φ(t) = ½((1+t) ln(1+t) + (1−t) ln(1−t)) for s = t² up to 1/16."""
    if s == types.float64:

        def phi_double(s):
            last = _P6 + s * (_P7 + s * (_P8 + s * (_P9 + s * (_P10 + s * _P11))))
            return s * (_P1 + s * (_P2 + s * (_P3 + s * (_P4 + s * (_P5 + s * last)))))

        return phi_double

    def phi(s):
        return s * (_S1 + s * (_S2 + s * (_S3 + s * (_S4 + s * _S5))))

    return phi


@by_type
def load_row(buffer, begin, kind, x):
    """Widen buffer[begin : begin + x.size] into x, the exact values; (their sum, whether a sign bit is set)."""
    if buffer.dtype == types.uint16:

        def load_bits(buffer, begin, kind, x):
            source = buffer[begin : begin + x.size]
            total = np.float32(0)
            signs = np.int32(0)
            if kind == BFLOAT16:
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

    def load(buffer, begin, kind, x):
        source = buffer[begin : begin + x.size]
        total = x.dtype.type(0)
        signs = _signed_bits(total)
        for i in range(x.size):
            x[i] = source[i]
            total += x[i]
            signs |= _signed_bits(x[i])
        return total, signs < 0

    return load


@njit(forceinline=True, **OPTIONS)
def sum_row(x):
    total = x.dtype.type(0)
    for i in range(x.size):
        total += x[i]
    return total


@njit(forceinline=True, **OPTIONS)
def sum_double(x):
    total = 0.0
    for i in range(x.size):
        total += np.float64(x[i])
    return total


@njit(forceinline=True, **OPTIONS)
def holds_negative(x):
    """Whether a value is below 0; −0.0, which has a sign bit too, is not."""
    found = 0
    for i in range(x.size):
        found |= x[i] < 0
    return found != 0


@njit(forceinline=True, **OPTIONS)
def rescale(x, total):
    """Multiply a row of tiny numbers by a power of two, which is exact, so that it sums to about 1; its new sum.

    Squares of such a row would underflow. The greatest power a dtype has leaves subnormal rows at 2^−23, which will do.
    """
    greatest = 126 if x.itemsize == 4 else 1022
    exponent = min(-math.frexp(np.float64(total))[1], greatest)
    factor = x.dtype.type(math.ldexp(1.0, exponent))
    for i in range(x.size):
        x[i] *= factor
    return sum_row(x)


@by_type
def stored_bits(buffer):
    """The buffer as `load_row` takes it: half floats of both kinds as uint16, where int16 marks bfloat16."""
    if buffer.dtype == types.int16:

        def as_bits(buffer):
            return buffer.view(np.uint16)

        return as_bits

    def as_it_is(buffer):
        return buffer

    return as_it_is
