"""Results of tests in JSON's own types: no NaN, no infinity, and the reason where a number is missing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def number(value: Any) -> float | None:
    """A float, or None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def numbers(values: Mapping[str, Any], index: int, names: Iterable[str]) -> dict[str, float | None]:
    """One element of the named arrays."""
    return {name: number(values[name][index]) for name in names}


def interval(values: Mapping[str, Any], index: int) -> list[float] | None:
    """[low, high] of one test, or None where there is no interval."""
    bounds = [number(values[name][index]) for name in ("ci_low", "ci_high")]
    return [bound for bound in bounds if bound is not None] if None not in bounds else None


def why_degenerate(values: Mapping[str, Any], index: int) -> str | None:
    """Why one test holds nulls where a number is expected, or None."""
    n, t, dz, gz = (float(values[name][index]) for name in ("n", "t", "dz", "gz"))
    if n < 2:
        return f"{n:.0f} complete pairs: a test needs at least 2"
    if math.isinf(t):
        return "all differences are equal and not 0: t, dz and gz are infinite"
    if math.isnan(dz):
        return "all differences are exactly 0: dz and gz are not defined"
    if math.isnan(gz):
        return "2 pairs: gz is not defined"
    return None
