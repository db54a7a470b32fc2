"""What a measurement is given, checked: maps, their factors, or maps in two conditions; and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.arrays import FLOAT_DTYPES, dtype_name, host_view, is_torch, to_float64
from kernels.errors import InvalidAttentionError
from kernels.layout import TokenLayout
from kernels.reference import softmax_rows

Index = tuple[Any, ...]  # of some maps, over the leading axes

# How far a row's sum may be off 1 by rounding alone. float64 often holds a float32 softmax.
ROW_SUM_TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4, "float64": 1e-4}


def valid_rows(p: np.ndarray, tolerance: float) -> np.ndarray:
    """Which rows of float64 [..., query, key] are finite, not negative, and sum to 1; bool [..., query]."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = p.sum(axis=-1)
        return np.asarray((np.abs(total - 1.0) <= tolerance) & ~(p < 0).any(axis=-1))


@dataclass(frozen=True, slots=True)
class Maps:
    """Post-softmax attention [*leading, query, key]."""

    attention: Any
    layout: TokenLayout
    regions: np.ndarray | None  # float64 [*leading, region, patch] (a view)
    precision: str  # what the values were rounded to, which decides how far a row's sum may be off 1

    @property
    def like(self) -> Any:
        return self.attention

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(self.attention.shape[:-2])

    @property
    def tolerance(self) -> float:
        return ROW_SUM_TOLERANCE[self.precision]

    def rows(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """(float64 rows [map, query, key] of some maps, which of them are valid)."""
        rows = to_float64(self.attention[index])
        return rows, valid_rows(rows, self.tolerance)

    def explain(self, valid: np.ndarray) -> InvalidAttentionError:
        """The error for maps some of whose rows are invalid; valid is [*leading, query]."""
        return _explain_row(self.attention, valid, self.precision, "attention")


@dataclass(frozen=True, slots=True)
class Factors:
    """query and key [*leading, token, head_dim] of softmax(scale · q·kᵀ + bias)."""

    query: Any
    key: Any
    layout: TokenLayout
    regions: np.ndarray | None
    scale: float
    bias: Any  # boolean or additive, [*leading, query, key] (a view), or None

    @property
    def like(self) -> Any:
        return self.query

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(self.query.shape[:-2])

    def rows(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        bias = None if self.bias is None else to_float64(self.bias[index])
        if bias is not None and dtype_name(self.bias) == "bool":  # True = attend
            bias = np.where(bias > 0, 0.0, -np.inf)
        rows = softmax_rows(to_float64(self.query[index]), to_float64(self.key[index]), self.scale, bias)
        return rows, ~np.isnan(rows).any(axis=-1)

    def explain(self, valid: np.ndarray) -> InvalidAttentionError:
        """The error for factors whose softmax has rows without a value; valid is [*leading, query]."""
        where, found = _first(valid)
        if not np.isfinite(to_float64(self.query[where])).all():
            what = f"query[{_position(where)}, :] holds NaN or infinite values"
        elif not np.isfinite(to_float64(self.key[where[:-1]])).all():
            what = f"key[{_position((*where[:-1], ':', ':'))}] holds NaN or infinite values"
        elif self.bias is not None and _hides_all(self.bias[where]):
            what = f"the mask leaves query {_position(where)} no key to attend to"
        else:
            what = f"the logits of query {_position(where)} are NaN or infinite"
        return InvalidAttentionError(
            f'{found}: {what}; correct the input, or pass invalid="mask" to leave such rows out'
        )


@dataclass(frozen=True, slots=True)
class MapPair(Maps):
    """The same maps in two conditions; a row is valid if it is in both."""

    other: Any

    def rows(self, index: Index) -> tuple[np.ndarray, np.ndarray]:
        """(float64 rows [condition, map, query, key], which are valid in both conditions)."""
        rows = np.stack([to_float64(array[index]) for array in (self.attention, self.other)])
        return rows, np.asarray(valid_rows(rows, self.tolerance).all(axis=0))

    def explain(self, valid: np.ndarray) -> InvalidAttentionError:
        """The error for a pair some of whose rows are invalid in either condition; valid is [*leading, query]."""
        where, _ = _first(valid)
        if valid_rows(to_float64(self.attention[where]), self.tolerance):
            return _explain_row(self.other, valid, self.precision, "other")
        return _explain_row(self.attention, valid, self.precision, "attention")


def _explain_row(attention: Any, valid: np.ndarray, precision: str, name: str) -> InvalidAttentionError:
    where, found = _first(valid)
    row = to_float64(attention[where])
    if broken := np.count_nonzero(~np.isfinite(row)):
        what = f"holds {broken} value(s) that are NaN or infinite"
    elif negative := np.count_nonzero(row < 0):
        what = f"holds {negative} negative value(s), the least {row.min():.3g}"
    else:
        what = f"sums to {row.sum():.6g}, expected 1 within {ROW_SUM_TOLERANCE[precision]:g} for {precision}"
    return InvalidAttentionError(
        f"{found}: row {name}[{_position(where)}, :] {what}; give post-softmax attention [..., query, key], "
        'or pass invalid="mask" to leave such rows out, or precision= if the values were rounded to fewer bits'
    )


def _first(valid: np.ndarray) -> tuple[tuple[int, ...], str]:
    """(place of the first invalid row, how many there are)."""
    bad = np.argwhere(~valid)
    return tuple(int(i) for i in bad[0]), f"{len(bad):,} of {valid.size:,} attention rows are invalid"


def _position(where: tuple[int | str, ...]) -> str:
    return ", ".join(str(i) for i in where)


def _hides_all(bias_row: Any) -> bool:
    if dtype_name(bias_row) == "bool":
        return not bool(host_view(bias_row.cpu() if hasattr(bias_row, "cpu") else bias_row).any())
    return bool(np.isneginf(to_float64(bias_row)).all())


# --- arrays as a user gave them, checked ------------------------------------------------------------------------------


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
