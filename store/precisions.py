"""The number formats of a store's arrays, casts between them, and memory that a thread uses again and again.

A precision is a NumPy dtype's name, or "bfloat16", which NumPy lacks: such values travel as their bits, uint16, with
the precision's name beside them.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np

from store.schema import StoreError

Array = np.ndarray[Any, np.dtype[Any]]

FLOATS = ("float16", "bfloat16", "float32", "float64")

# What was never written reads as this: NaN, or for counts a number that no count can be.
FILL: dict[str, float] = {
    "float16": float("nan"),
    "bfloat16": 0x7FC0,
    "float32": float("nan"),
    "int32": -1,
    "bool": 0,
}


_thread = threading.local()


class RoundedArray(np.ndarray[Any, np.dtype[Any]]):
    """float32 values that were kept in fewer bits: an array like any other, whose `precision` says which.

    What checks its values needs to know: rows of attention in float16 sum to 1 within 2e-3, not within 1e-4. Views,
    selections and copies say it too; what is computed from it is a plain array.
    """

    precision: str

    def __array_finalize__(self, whole: Any) -> None:
        self.precision = getattr(whole, "precision", "")

    def __array_wrap__(self, result: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return result[()] if return_scalar else np.asarray(result)

    @classmethod
    def of(cls, values: Array, precision: str) -> RoundedArray:
        """The same memory, with the precision that the values were rounded to."""
        array = values.view(cls)
        array.precision = precision
        return array


def storage_dtype(precision: str) -> np.dtype[Any]:
    """The NumPy dtype that holds values of a precision, little-endian."""
    return np.dtype("uint16" if precision == "bfloat16" else precision).newbyteorder("<")


def as_numbers(values: Any, what: str) -> tuple[Array, str]:
    """A NumPy view of a floating-point or boolean array or CPU tensor, and its precision; StoreError for others."""
    torch = sys.modules.get("torch")
    try:
        if torch is not None and isinstance(values, torch.Tensor) and values.dtype == torch.bfloat16:
            return np.asarray(values.view(torch.int16)).view(np.uint16), "bfloat16"
        array = np.asarray(values)
    except (TypeError, RuntimeError) as error:
        raise StoreError(f"{what} cannot be read as a NumPy array: {error}") from error
    if array.dtype.name not in (*FLOATS, "bool"):
        raise StoreError(f"{what} has dtype {array.dtype}; expected floating point")
    return array, array.dtype.name


def cast(values: Array, precision: str, to: str, room: Array | None = None) -> Array:
    """Values as the bytes of another precision, contiguous; rounded to nearest, ties to even.

    Args:
        room: bytes where 16-bit floats narrowed from longer ones may be put, so that no fresh pages are needed.
    """
    if precision == to:
        return np.ascontiguousarray(values)
    if precision in ("float32", "float64") and to in ("float16", "bfloat16"):
        from store import halves

        single = np.ascontiguousarray(values, dtype=np.float32)
        out = np.empty(single.size, np.uint16) if room is None else room[: 2 * single.size].view(np.uint16)
        out = out.reshape(single.shape)
        bits = single.reshape(-1).view(np.uint32)
        if to == "float16":
            halves.float32_to_float16(single.reshape(-1), bits, out.reshape(-1))
            return out.view(np.float16)
        halves.float32_to_bfloat16(bits, out.reshape(-1))
        return out
    if precision in ("float16", "bfloat16"):
        single = np.empty(values.shape, np.float32)
        widen(values, precision, single)
        return cast(single, "float32", to)
    return np.ascontiguousarray(values, dtype=to)


def widen(values: Array, precision: str, out: Array) -> None:
    """Values of any precision as float32, into the contiguous array `out` of the same shape."""
    if precision not in ("float16", "bfloat16"):
        np.copyto(out, values)
        return
    from store import halves

    bits = np.ascontiguousarray(values).view(np.uint16).reshape(-1)
    if precision == "float16":
        halves.float16_to_float32(bits, out.reshape(-1))
    else:
        halves.bfloat16_to_float32(bits, out.reshape(-1).view(np.uint32))


def scratch(name: str, size: int) -> Array:
    """This thread's own bytes under a name, used again for the next chunk: fresh pages cost as much as reading them."""
    buffer: Array | None = getattr(_thread, name, None)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, np.uint8)
        setattr(_thread, name, buffer)
    return buffer[:size]
