"""What counts as post-softmax attention, and how its violations are told."""

from __future__ import annotations

from typing import Any

import numpy as np

from kernels.arrays import dtype_name, host_view, to_float64

# How far a row's sum may be off 1 by rounding alone. float64 often holds a float32 softmax.
ROW_SUM_TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4, "float64": 1e-4}


class InvalidAttentionError(ValueError):
    """The input is no post-softmax attention: NaN, infinite or negative values, or rows that do not sum to 1."""

    exit_code = 2


def rounded_to(precision: str | None, *attentions: Any) -> str:
    """The precision that decides how far sums of rows may be off 1: the coarsest that values were rounded to.

    Args:
        precision: as a user gave it; None: what an array says itself by an attribute `precision` (as those that
            `store.AttentionStore.read` gives do), else its dtype.

    Raises:
        ValueError: no such precision.
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


def explain_attention(
    attention: Any, valid: np.ndarray, precision: str, name: str = "attention"
) -> InvalidAttentionError:
    """The error for attention [*leading, query, key] some of whose rows are invalid; valid is [*leading, query]."""
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


def explain_pair(attention: Any, other: Any, valid: np.ndarray, precision: str) -> InvalidAttentionError:
    """The error for a pair some of whose rows are invalid in either condition; valid is [*leading, query]."""
    where, _ = _first(valid)
    in_first = valid_rows(to_float64(attention[where]), ROW_SUM_TOLERANCE[precision])
    if in_first:
        return explain_attention(other, valid, precision, "other")
    return explain_attention(attention, valid, precision)


def explain_qk(query: Any, key: Any, bias: Any, valid: np.ndarray) -> InvalidAttentionError:
    """The error for query and key whose softmax has rows without a value; valid is [*leading, query]."""
    where, found = _first(valid)
    if not np.isfinite(to_float64(query[where])).all():
        what = f"query[{_position(where)}, :] holds NaN or infinite values"
    elif not np.isfinite(to_float64(key[where[:-1]])).all():
        what = f"key[{_position((*where[:-1], ':', ':'))}] holds NaN or infinite values"
    elif bias is not None and _hides_all(bias[where]):
        what = f"the mask leaves query {_position(where)} no key to attend to"
    else:
        what = f"the logits of query {_position(where)} are NaN or infinite"
    return InvalidAttentionError(f'{found}: {what}; mend the input, or pass invalid="mask" to leave such rows out')


def _first(valid: np.ndarray) -> tuple[tuple[int, ...], str]:
    bad = np.argwhere(~valid)
    return tuple(int(i) for i in bad[0]), f"{len(bad):,} of {valid.size:,} attention rows are invalid"


def _position(where: tuple[int | str, ...]) -> str:
    return ", ".join(str(i) for i in where)


def _hides_all(bias_row: Any) -> bool:
    if dtype_name(bias_row) == "bool":
        return not bool(host_view(bias_row.cpu() if hasattr(bias_row, "cpu") else bias_row).any())
    return bool(np.isneginf(to_float64(bias_row)).all())
