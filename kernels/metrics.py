"""METRICS: one declaration a metric.  <- the seam for a new metric

Tests, benchmarks, the store's columns, the table and the report's headings all iterate `METRICS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from kernels.layout import TokenLayout

__all__ = ["METRICS", "Measurement", "MetricSpec", "load_metric"]

Implementation = Callable[..., Any] | str


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """What a metric is, everywhere it appears.

    Args:
        name: the same in every backend, the store, the table and the report.
        unit: "1", "nat", "image diagonals", …
        inputs: "rows" (the map alone), "regions" (the map and patch coverage of regions) or
            "pair" (the same row in two conditions).
        reference: the definition, `(p, layout) -> values` on float64 post-softmax rows
            p [batch, query, key], all tokens included (`layout.patches(p)` cuts the patches out). Values are
            [batch, patch query] (averaged over the defined queries unless reduce="none") or [batch].
            "regions" metrics take `(p, layout, regions)`, regions [batch, region, patch] -> [batch, region].
        implementations: backend name -> callable, or "module:function" loaded on first use. What a callable is
            given is the backend's own affair. A metric without an entry for a backend is computed from
            `reference` on tiles, and the result says so.
        bounds: layout -> (least, greatest) value the metric can take.
        undefined: which rows have no value, and why ("" if none).
        source: where the formula comes from.
        title: heading in tables and figures; the name if empty.
    """

    name: str
    unit: str
    inputs: Literal["rows", "regions", "pair"]
    reference: Callable[..., Any]
    implementations: Mapping[str, Implementation] = field(default_factory=dict)
    bounds: Callable[[TokenLayout], tuple[float, float]] = lambda layout: (-np.inf, np.inf)
    undefined: str = ""
    source: str = ""
    title: str = ""

    def implementation(self, backend: str) -> Callable[..., Any] | None:
        """This backend's callable, or None when only `reference` exists for it."""
        target = self.implementations.get(backend)
        if isinstance(target, str):
            module, _, name = target.partition(":")
            loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
            return loaded
        return target


class Measurement(Mapping[str, Any]):
    """Metric name -> values, with what is needed to trust them.

    Values have the attention's leading axes ([image, head] for [image, head, query, key] input); a "regions"
    metric has a region axis behind them; `reduce="none"` leaves the query axis on row metrics.

    Attributes:
        backend: the backend that ran (never "auto").
        undefined: metric name -> number of rows left out of the means because the metric has no value there.
        undefined_rows: metric name -> the same count for each value, an array of the values' leading axes.
        masked: number of rows left out because they were invalid (only with invalid="mask").
        from_reference: names of the metrics this backend computed from their `reference` alone.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        backend: str,
        undefined_rows: Mapping[str, Any],
        masked: int = 0,
        from_reference: tuple[str, ...] = (),
    ) -> None:
        self._values = dict(values)
        self.backend = backend
        self.undefined_rows = dict(undefined_rows)
        self.undefined = {name: int(counts.sum()) for name, counts in self.undefined_rows.items()}
        self.masked = masked
        self.from_reference = from_reference

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        columns = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.items())
        return f"Measurement({columns}; backend={self.backend!r}, undefined={self.undefined})"


METRICS: dict[str, MetricSpec] = {}


def load_metric(name: str) -> MetricSpec:
    """The metric of that name: one of `METRICS`, or a user's `module:attribute`.

    Raises:
        ValueError: no such metric, module or attribute, or the attribute is not a `MetricSpec`.
    """
    if ":" not in name:
        if name in METRICS:
            return METRICS[name]
        import difflib

        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no metric is called {name!r}{hint} (there are {', '.join(METRICS)}, or give module:name)")
    module_name, _, attribute = name.partition(":")
    try:
        spec = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(f"metric {name!r}: module {module_name!r} cannot be imported ({error})") from error
    except AttributeError as error:
        raise ValueError(f"metric {name!r}: module {module_name!r} has no {attribute!r}") from error
    if not isinstance(spec, MetricSpec):
        raise ValueError(f"metric {name!r} is a {type(spec).__name__}; expected a kernels.MetricSpec")
    return spec
