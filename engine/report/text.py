"""Numbers, units and lists as the report writes them. Plain text: whoever prints it escapes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from engine.statistics import Interval, PairedTest

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


MOST_DIGITS = 9
"""Means of float32 values have no more significant digits than this."""


def decimals(difference: float | None) -> int:
    """How many decimals two numbers need so that their difference is seen, in two significant digits."""
    if not difference or not math.isfinite(difference):
        return 0
    return max(0, 1 - math.floor(math.log10(abs(difference))))


def number(value: float | None, digits: int = 3, decimals: int = 0) -> str:
    """A number in three significant digits, or in the more that `decimals` takes, with a true minus.

    "undefined" for None and NaN.
    """
    if value is None or math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size:
        digits = max(digits, min(decimals + math.floor(math.log10(size)) + 1, MOST_DIGITS))
    if size == 0:
        text = "0"
    elif size < 1e-4 or size >= 1e6:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        text = f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    else:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return f"−{text}" if value < 0 else text


def quantity(value: float | None, unit: str, decimals: int = 0) -> str:
    """A number with its unit."""
    text = number(value, decimals=decimals)
    return f"{text} {unit}" if unit and text != "undefined" else text


def change(value: float | None, unit: str = "") -> str:
    """A difference with its sign and unit."""
    return f"+{quantity(value, unit)}" if value is not None and value > 0 else quantity(value, unit)


def p_value(value: float | None) -> str:
    """Two significant digits; below 1e-4 only that, for no model is right to more."""
    if value is None:
        return "undefined"
    return "1" if value >= 0.9995 else "<\u00a00.0001" if value < 1e-4 else f"{value:.2g}"


def interval(ci: Interval) -> str:
    """ "low to high" of an interval, or "" where there is none."""
    if ci is None:
        return ""
    low, high = ci
    shown = decimals(high - low)
    return f"{number(low, decimals=shown)} to {number(high, decimals=shown)}"


def plain(value: Any) -> str:
    """A recorded value of whatever kind as text; numbers as `number` writes them, counts with separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else number(value)


def listing(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def percent(level: float) -> str:
    """0.95 as "95 %"."""
    return f"{100 * level:g} %"


def where(test: PairedTest) -> str:
    """ "layer 2 (blocks.2.attn), head 1"."""
    site = f" ({test.site})" if test.site else ""
    head = "" if test.head is None else f", head {test.head}"
    return f"layer {test.layer}{site}{head}"


def what(metric: str, region: str | None) -> str:
    """ "region_mass on small digit"."""
    return metric if region is None else f"{metric} on {region}"


def of_area(area: float | None) -> str:
    """ " (0.118 of the area)", of a region, or "" where that is not known."""
    return "" if area is None else f" ({number(area)} of the area)"


def times_area(area: float | None, *values: float | None) -> str:
    """Shares of something that lie on a region, in shares of the area: "0.67 and 2.6 times that", or ""."""
    known = [number(value / area, 2) for value in values if value is not None] if area else []
    return f"{listing(known)} times that" if len(known) == len(values) else ""


def count(n: int, noun: str) -> str:
    """ "1 image", "1,024 images"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def span(layers: Sequence[int]) -> str:
    """ "layer 3", "layers 0–2", or where layers in between were not measured "layers 0, 2 and 5"."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]}–{layers[-1]}"
    return f"layers {listing([str(layer) for layer in layers])}"


def share(part: int, whole: int) -> str:
    """ "3 of 4", "all 4", "none of 4"."""
    return f"none of {whole}" if part == 0 else f"all {whole}" if part == whole > 1 else f"{part} of {whole}"
