"""NumPy arrays and torch tensors behind one small set of questions; torch is imported only by those who use it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Values:
    """What a backend's pass hands back, before rows are averaged.

    Values are [*leading, patch query], [*leading], or [*leading, region], NaN where undefined or invalid.
    """

    values: dict[str, Any]
    valid: Any  # bool [*leading, query]; False for rows that are no post-softmax attention


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def library(array: Any) -> Any:
    """torch or NumPy, whose functions of the same names and arguments the array takes."""
    return sys.modules["torch"] if is_torch(array) else np


def wants_grad(array: Any) -> bool:
    """Whether autograd would record operations on it."""
    return is_torch(array) and bool(array.requires_grad) and bool(sys.modules["torch"].is_grad_enabled())


def device_type(array: Any) -> str:
    """torch device type; NumPy counts as "cpu"."""
    return str(array.device.type) if is_torch(array) else "cpu"


def dtype_name(array: Any) -> str:
    """ "float16", "bfloat16", … of either kind of array."""
    return str(array.dtype).removeprefix("torch.")


def host_view(array: Any) -> np.ndarray:
    """The same memory as a NumPy array; bfloat16, which NumPy lacks, as its uint16 bits."""
    if not is_torch(array):
        return np.asarray(array)
    array = array.detach()
    if dtype_name(array) == "bfloat16":
        return np.asarray(array.view(sys.modules["torch"].int16).numpy()).view(np.uint16)
    return np.asarray(array.numpy())


def as_kind(values: Any, like: Any) -> Any:
    """Values as the kind of array that `like` is; those of the host on its device."""
    if not is_torch(like):
        return np.asarray(values)
    return values if is_torch(values) else sys.modules["torch"].as_tensor(values, device=like.device)


def to_float64(array: Any) -> np.ndarray:
    """A contiguous float64 NumPy array, exact for every dtype of `FLOAT_DTYPES`."""
    if is_torch(array):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array, dtype=np.float64, order="C")


def mean_of_rows(values: Any, valid: Any) -> tuple[Any, Any]:
    """(mean of the values that are not NaN, in float64, how many valid ones are NaN) over the last axis."""
    module = library(values)
    defined = ~module.isnan(values)
    count = defined.sum(-1)
    total = module.where(defined, values, 0.0).sum(-1, dtype=module.float64)
    return module.where(count > 0, total / count.clip(1), module.nan), (~defined & valid).sum(-1)


def invalid_rows(valid: Any, prefix: int) -> tuple[Any, Any]:
    """(rows that are no attention, patch queries among them) of each map, [*leading] of valid [*leading, query]."""
    invalid = ~valid
    return invalid.sum(-1), invalid[..., prefix:].sum(-1)


def map_starts(leading: tuple[int, ...], steps: Sequence[int]) -> np.ndarray:
    """Where each map begins, counted over the leading axes in C order, with a step in memory on each; int64 [map]."""
    along_axes = (np.arange(size, dtype=np.int64) * step for size, step in zip(leading, steps, strict=True))
    return functools.reduce(np.add.outer, along_axes, np.zeros((), np.int64)).reshape(-1)


def spans(maps: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at most `most` maps each. No maps still make one span: it fixes the shapes of the results."""
    return ((start, min(start + most, maps)) for start in range(0, max(maps, 1), most))


def flat_index(leading: tuple[int, ...], start: int, stop: int) -> tuple[Any, ...]:
    """Index of maps start … stop − 1, counted over the leading axes in C order; copies those maps only."""
    return np.unravel_index(np.arange(start, stop), leading) if leading else (np.newaxis,)
