"""What a measurement is given, checked: maps, their factors, or maps in two conditions; and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.arrays import Values, dtype_name, host_view, to_float64
from kernels.checks import ROW_SUM_TOLERANCE, valid_rows
from kernels.errors import InvalidAttentionError
from kernels.layout import TokenLayout
from kernels.reference import softmax_rows

if TYPE_CHECKING:
    from kernels.backends import Backend
    from kernels.metrics import MetricSpec

Index = tuple[Any, ...]  # of some maps, over the leading axes


@dataclass(frozen=True, slots=True)
class Maps:
    """Post-softmax attention [*leading, query, key].

    Attributes:
        regions: float64 NumPy [*leading, region, patch] (a view), or None.
        precision: what the values were rounded to, which decides how far a row's sum may be off 1.
    """

    attention: Any
    layout: TokenLayout
    regions: np.ndarray | None
    precision: str

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

    def measure(self, backend: Backend, specs: Sequence[MetricSpec]) -> Values:
        return backend.measure_attention(self, specs)

    def explain(self, valid: np.ndarray) -> InvalidAttentionError:
        """The error for maps some of whose rows are invalid; valid is [*leading, query]."""
        return _explain_row(self.attention, valid, self.precision, "attention")


@dataclass(frozen=True, slots=True)
class Factors:
    """query and key [*leading, token, head_dim] of softmax(scale · q·kᵀ + bias).

    Attributes:
        regions: as of `Maps`.
        bias: boolean or additive, [*leading, query, key] (a view), or None.
    """

    query: Any
    key: Any
    layout: TokenLayout
    regions: np.ndarray | None
    scale: float
    bias: Any

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

    def measure(self, backend: Backend, specs: Sequence[MetricSpec]) -> Values:
        return backend.measure_qk(self, specs)

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

    def measure(self, backend: Backend, specs: Sequence[MetricSpec]) -> Values:
        return backend.measure_pair(self, specs)

    def explain(self, valid: np.ndarray) -> InvalidAttentionError:
        """The error for a pair some of whose rows are invalid in either condition; valid is [*leading, query]."""
        where, _ = _first(valid)
        if valid_rows(to_float64(self.attention[where]), self.tolerance):
            return _explain_row(self.other, valid, self.precision, "other")
        return _explain_row(self.attention, valid, self.precision, "attention")


def _explain_row(attention: Any, valid: np.ndarray, precision: str, name: str) -> InvalidAttentionError:
    where, found = _first(valid)
    row = to_float64(attention[where])
    broken = np.count_nonzero(~np.isfinite(row))
    negative = np.count_nonzero(row < 0)
    if broken:
        what = f"holds {broken} value(s) that are NaN or infinite"
    elif negative:
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
