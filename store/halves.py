"""float32 to and from the two 16-bit floats, at the speed of memory, without the GIL.

NumPy's and torch's casts to float16 are scalar on some CPUs: 0.5 and 0.25 GB/s of float16 measured on an AVX-512 core,
where these loops reach 9 GB/s. Rounding is to nearest, ties to even, as IEEE 754 and both libraries have it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

# Not kept on disk: each compiles in 0.2 s, and a cache is one more thing that can be full, damaged or read-only.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

_SIGN, _MAGNITUDE = np.uint32(0x8000), np.uint32(0x7FFFFFFF)
_INFINITY = np.uint32(0x7F800000)
_LEAST_NORMAL = np.uint32(0x38800000)  # 2^-14, float16's least normal number
_LEAST_OVERFLOW = np.uint32(0x477FF000)  # 65520: rounds to infinity
_REBIAS = np.uint32(0xC8000FFF)  # exponent bias 127 -> 15, and half a unit in the last place less one
_ONE_HALF = np.float32(0.5)  # 0.5 + x rounds a subnormal x to multiples of 2^-24, float16's last place
_ONE_HALF_BITS = np.uint32(0x3F000000)
_TO_FLOAT32 = np.float32(2.0**112)  # exponent bias 15 -> 127


@njit(**_OPTIONS)
def float32_to_float16(values: Any, bits: Any, out: Any) -> None:
    """out[i] = values[i] as float16: contiguous float32, whose memory as uint32 is `bits`; `out` is uint16."""
    for i in range(values.size):
        magnitude = bits[i] & _MAGNITUDE
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        normal = np.uint32(magnitude + _REBIAS + odd) >> np.uint32(13)
        small = np.uint32((np.float32(abs(values[i]) + _ONE_HALF)).view(np.uint32) - _ONE_HALF_BITS)
        half = normal if magnitude >= _LEAST_NORMAL else small
        half = half if magnitude < _LEAST_OVERFLOW else np.uint32(0x7C00)
        half = half if magnitude <= _INFINITY else np.uint32(0x7E00)
        out[i] = np.uint16(half | ((bits[i] >> np.uint32(16)) & _SIGN))


@njit(**_OPTIONS)
def float32_to_bfloat16(bits: Any, out: Any) -> None:
    """out[i] = the float32 of bits[i] as bfloat16, both as bits."""
    for i in range(bits.size):
        odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
        half = np.uint32(bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        is_nan = (bits[i] & _MAGNITUDE) > _INFINITY
        out[i] = np.uint16(half if not is_nan else np.uint32(0x7FC0))


@njit(**_OPTIONS)
def float16_to_float32(bits: Any, out: Any) -> None:
    """out[i] = the float16 of bits[i]; out float32."""
    for i in range(bits.size):
        half = np.uint32(bits[i])
        magnitude = np.uint32((half & np.uint32(0x7FFF)) << np.uint32(13))
        # Infinity and NaN keep an exponent of ones; everything else, subnormals too, is scaled exactly.
        scaled = magnitude.view(np.float32) * _TO_FLOAT32
        special = np.uint32(magnitude | _INFINITY).view(np.float32)
        value = scaled if magnitude < np.uint32(0x0F800000) else special
        out[i] = -value if half & _SIGN else value


@njit(**_OPTIONS)
def bfloat16_to_float32(bits: Any, out: Any) -> None:
    """out[i] = the bfloat16 of bits[i] as the bits of a float32."""
    for i in range(bits.size):
        out[i] = np.uint32(bits[i]) << np.uint32(16)
