"""Arrays that fit the layout, of known dtypes, and rows that are post-softmax attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.arrays import FLOAT_DTYPES, dtype_name, is_torch, to_float64
from kernels.layout import TokenLayout

# How far a row's sum may be off 1 by rounding alone. float64 often holds a float32 softmax.
ROW_SUM_TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4, "float64": 1e-4}


def float_array(array: Any, name: str) -> Any:
    """The array, which is one of `FLOAT_DTYPES`; else TypeError."""
    if not (isinstance(array, np.ndarray) or is_torch(array)):
        raise TypeError(f"{name} is a {type(array).__name__}; expected a NumPy array or a torch tensor")
    if dtype_name(array) not in FLOAT_DTYPES:
        raise TypeError(f"{name} is {dtype_name(array)}; expected one of {', '.join(FLOAT_DTYPES)}")
    return array


def attention_array(array: Any, name: str, layout: TokenLayout) -> Any:
    """The array, which is [..., query, key] of the layout's tokens; else TypeError or ValueError."""
    array, tokens = float_array(array, name), layout.num_tokens
    if array.ndim < 2 or tuple(array.shape[-2:]) != (tokens, tokens):
        raise ValueError(f"{name} has shape {tuple(array.shape)}; expected [..., {tokens}, {tokens}] for {layout}")
    return array


def check_alike(name: str, one: Any, other_name: str, other: Any) -> None:
    """TypeError or ValueError unless two arrays are of one kind and dtype, and on one device."""
    if is_torch(one) != is_torch(other) or one.dtype != other.dtype:
        one_kind, other_kind = (f"{'torch' if is_torch(a) else 'NumPy'} {dtype_name(a)}" for a in (one, other))
        raise TypeError(f"{name} is {one_kind} and {other_name} is {other_kind}; expected one kind and dtype")
    if is_torch(one) and one.device != other.device:
        raise ValueError(f"{name} is on {one.device} and {other_name} on {other.device}; expected one device")


def bias_array(bias: Any, leading: tuple[int, ...], layout: TokenLayout, like: Any) -> Any:
    """bias broadcast (a view) to [*leading, query, key], else TypeError or ValueError; None stays None."""
    if bias is None:
        return None
    if not (isinstance(bias, np.ndarray) or is_torch(bias)) or is_torch(bias) != is_torch(like):
        raise TypeError(f"bias is a {type(bias).__name__}; expected the kind of array that query is")
    if dtype_name(bias) not in (*FLOAT_DTYPES, "bool"):
        raise TypeError(f"bias is {dtype_name(bias)}; expected bool (True = attend) or a float dtype")
    if is_torch(bias) and bias.device != like.device:
        raise ValueError(f"bias is on {bias.device} and query on {like.device}; expected one device")
    shape = (*leading, layout.num_tokens, layout.num_tokens)
    try:
        return bias.expand(shape) if is_torch(bias) else np.broadcast_to(bias, shape)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected one that broadcasts to {shape}") from error


def regions_array(regions: Any, leading: tuple[int, ...], layout: TokenLayout) -> np.ndarray | None:
    """regions as float64 NumPy, broadcast (a view) to [*leading, region, patch], else ValueError; None stays None."""
    if regions is None:
        return None
    coverage = to_float64(regions)
    if coverage.ndim < 2 or coverage.shape[-1] != layout.num_patches or coverage.shape[-2] == 0:
        raise ValueError(
            f"regions has shape {coverage.shape}; expected [..., region, {layout.num_patches}] for {layout}"
        )
    if ((coverage < 0) | (coverage > 1)).any():
        raise ValueError(
            f"regions holds values from {np.nanmin(coverage):.3g} to {np.nanmax(coverage):.3g}; "
            "expected each patch's covered share, 0 to 1"
        )
    # One axis of size 1 stands for the heads, which share an image's regions.
    per_head = coverage if not leading else coverage[..., np.newaxis, :, :]
    shape = (*leading, *coverage.shape[-2:])
    try:
        return np.broadcast_to(per_head, shape)
    except ValueError as error:
        raise ValueError(
            f"regions has shape {coverage.shape}; expected its leading axes to match {leading[:-1]}, "
            f"those of the attention {leading} without head"
        ) from error


def rounded_to(precision: str | None, *attentions: Any) -> str:
    """The precision that decides how far sums of rows may be off 1: the coarsest that values were rounded to.

    That is what a user gave (ValueError if there is none of that name), else what an array says itself by an attribute
    `precision` (as those that `store.AttentionStore.read` gives do), else its dtype.
    """
    if precision is not None and precision not in ROW_SUM_TOLERANCE:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(ROW_SUM_TOLERANCE)}")
    said = [precision or getattr(array, "precision", "") or dtype_name(array) for array in attentions]
    return max(said, key=ROW_SUM_TOLERANCE.__getitem__)


def valid_rows(p: np.ndarray, tolerance: float) -> np.ndarray:
    """Which rows of float64 [..., query, key] are finite, not negative, and sum to 1; bool [..., query]."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = p.sum(axis=-1)
        return np.asarray((np.abs(total - 1.0) <= tolerance) & ~(p < 0).any(axis=-1))
