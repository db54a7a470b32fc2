"""NumPy arrays and torch tensors behind one small set of questions; torch is imported only by those who use it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Values:
    """What a backend's pass hands back, before rows are averaged.

    Attributes:
        values: metric name -> [*leading, patch query], [*leading], or [*leading, region]; NaN where undefined
            or invalid.
        valid: bool [*leading, query]; False for rows that are no post-softmax attention.
    """

    values: dict[str, Any]
    valid: Any


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


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


def from_host(values: np.ndarray, like: Any) -> Any:
    """A host array as the kind of array `like` is, on its device."""
    if not is_torch(like):
        return values
    return sys.modules["torch"].as_tensor(values, device=like.device)


def to_float64(array: Any) -> np.ndarray:
    """A contiguous float64 NumPy array, exact for every dtype of `FLOAT_DTYPES`."""
    if is_torch(array):
        array = array.detach().double().cpu().numpy()
    return np.asarray(array, dtype=np.float64, order="C")


def mean_of_rows(values: Any, valid: Any) -> tuple[Any, Any]:
    """(mean of the values that are not NaN, in float64, how many valid ones are NaN) over the last axis."""
    if not is_torch(values):
        defined = ~np.isnan(values)
        count = defined.sum(axis=-1)
        total = np.where(defined, values, 0.0).sum(axis=-1, dtype=np.float64)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return mean, np.asarray((~defined & valid).sum(axis=-1), dtype=np.int64)
    torch = sys.modules["torch"]
    defined = ~values.isnan()
    count = defined.sum(dim=-1)
    total = torch.where(defined, values, 0.0).sum(dim=-1, dtype=torch.float64)
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan), (~defined & valid).sum(dim=-1)


def flat_index(leading: tuple[int, ...], start: int, stop: int) -> tuple[Any, ...]:
    """Index of maps start … stop − 1, counted over the leading axes in C order; copies those maps only."""
    return np.unravel_index(np.arange(start, stop), leading) if leading else (np.newaxis,)
