"""What a metric is. `METRICS` holds those that `kernels.reference` declares, each in one place.

Tests, benchmarks, the store's columns, the table and the report's headings all iterate `METRICS`.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from kernels.errors import MetricError
from kernels.layout import TokenLayout


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
            "pair" metrics take `(p, other, layout)`, the same rows in two conditions -> as without a pair.
        implementations: backend name -> callable, or "module:function" loaded on first use. What a callable is
            given is the backend's own affair. A metric without an entry for a backend is computed from
            `reference` on tiles, and the result says so. Backends have their code for `METRICS` themselves.
        bounds: layout -> (least, greatest) value the metric can take.
        undefined: which rows have no value, and why ("" if none).
        source: where the formula comes from.
        title: heading in tables and figures; the name if empty.
        null: number of patches -> the value expected without any association; None where there is no such value.
        axis_label: what stands beside the axis of a figure; empty: the unit, or the title where there is none.
        core: measured where nothing else is asked for.
        is_prefix_share: it is the share of attention on prefix tokens, where a high one is warned of.
        convention_of: the metric that measures the same thing by another convention, and may give other findings.
        rescales: the metric of which it is a constant multiple on every grid, so that all findings are the same.

    Raises:
        MetricError: a name that cannot be a file's, other inputs, a unit that is no text, or no callable reference.
    """

    name: str
    unit: str
    inputs: Literal["rows", "regions", "pair"]
    reference: Callable[..., Any]
    implementations: Mapping[str, Callable[..., Any] | str] = field(default_factory=dict)
    bounds: Callable[[TokenLayout], tuple[float, float]] = lambda layout: (-np.inf, np.inf)
    undefined: str = ""
    source: str = ""
    title: str = ""
    null: Callable[[int], float | None] = lambda num_patches: None
    axis_label: str = ""
    core: bool = False
    is_prefix_share: bool = False
    convention_of: str = ""
    rescales: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", self.name):
            raise MetricError(
                f"a metric's name is {self.name!r}; expected a letter, then up to 63 letters, digits and _ . -"
            )
        if self.inputs not in ("rows", "regions", "pair"):
            raise MetricError(f"metric {self.name!r}: inputs is {self.inputs!r}; expected 'rows', 'regions' or 'pair'")
        if not isinstance(self.unit, str):
            raise MetricError(f"metric {self.name!r}: unit is {self.unit!r}; expected text, '1' if it has none")
        if not callable(self.reference):
            raise MetricError(f"metric {self.name!r}: reference is {self.reference!r}; expected a callable")

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of its values in store, table and report."""
        return ("image", "layer", "head", "region") if self.inputs == "regions" else ("image", "layer", "head")

    @property
    def convention(self) -> str:
        """The metric that gives the same findings: the one that it rescales, or itself."""
        return self.rescales or self.name

    @property
    def construct(self) -> str:
        """What it measures, by whatever convention: the name of the metric of which it is one, or its own."""
        spec = METRICS.get(self.rescales, self)
        return spec.convention_of or spec.convention

    @property
    def is_builtin(self) -> bool:
        """Whether it is one of `METRICS`, not a user's own."""
        return METRICS.get(self.name) is self

    def implementation(self, backend: str) -> Callable[..., Any] | None:
        """The callable that `implementations` names for this backend, or None; MetricError if it cannot be imported."""
        target = self.implementations.get(backend)
        if not isinstance(target, str):
            return target
        module, _, name = target.partition(":")
        try:
            loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise MetricError(
                f"metric {self.name!r}: {target}, its implementation for {backend}, cannot be imported ({error}); "
                "correct it, or leave it out: the reference is enough"
            ) from error
        return loaded

    def definition(self) -> str:
        """SHA-256 of the reference's place and of its module's source; of its byte code where there is no source."""
        code: Any = self.reference
        while isinstance(code, functools.partial):
            code = code.func
        code = code if inspect.isroutine(code) else type(code)
        compiled = getattr(code, "__code__", None)
        place = f"{code.__module__}:{code.__qualname__}:{0 if compiled is None else compiled.co_firstlineno}"
        try:
            text = inspect.getsource(inspect.getmodule(code) or code)
        except (OSError, TypeError):  # typed in, or compiled
            text = "" if compiled is None else compiled.co_code.hex()
        return hashlib.sha256(f"{place}\n{text}".encode()).hexdigest()


METRICS: dict[str, MetricSpec] = {}

Reference = TypeVar("Reference", bound=Callable[..., Any])


def metric(
    *, unit: str, inputs: Literal["rows", "regions", "pair"] = "rows", **declared: Any
) -> Callable[[Reference], Reference]:
    """Declares the decorated definition as one of `METRICS`, under its own name; arguments as of `MetricSpec`."""

    def declare(reference: Reference) -> Reference:
        METRICS[reference.__name__] = MetricSpec(reference.__name__, unit, inputs, reference, **declared)
        return reference

    return declare


def load_metric(name: str) -> MetricSpec:
    """The metric of that name: one of `METRICS`, or a user's `module:attribute`.

    Raises:
        MetricError: no such metric, module or attribute, or it is no `MetricSpec`, or has the name of another metric.
    """
    if ":" not in name:
        if name in METRICS:
            return METRICS[name]
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise MetricError(f"no metric is called {name!r}{hint} (there are {', '.join(METRICS)}, or give module:name)")
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise MetricError(
            f"metric {name!r} is not of the form module:name, the place of a kernels.MetricSpec in Python"
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a module of the user's, which may do anything
        found = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise MetricError(f"metric {name!r}: module {module_name!r} cannot be imported ({found})") from error
    spec = getattr(module, attribute, None)
    if spec is None:
        raise MetricError(f"metric {name!r}: module {module_name!r} has no {attribute!r}")
    if not isinstance(spec, MetricSpec):
        raise MetricError(f"metric {name!r} is a {type(spec).__name__}; expected a kernels.MetricSpec")
    if METRICS.get(spec.name, spec) is not spec:
        raise MetricError(f"metric {name!r} is called {spec.name!r}, as a metric of kernels is; give it another name")
    return spec


def load_metrics(metrics: Sequence[str | MetricSpec], reserved: Collection[str] = ()) -> list[MetricSpec]:
    """The metrics of these names, each once.

    Args:
        reserved: names that no metric may have, those of the coordinates of a table.

    Raises:
        MetricError: as `load_metric`; two of one name, or one with a reserved name.
    """
    named: dict[str, tuple[MetricSpec, str | MetricSpec]] = {}
    for metric in metrics:
        spec = metric if isinstance(metric, MetricSpec) else load_metric(metric)
        other, first = named.setdefault(spec.name, (spec, metric))
        if spec.name in reserved:
            raise MetricError(
                f"{metric} is called {spec.name!r}, as a coordinate of the table is; give it another name"
            )
        if other is not spec:
            raise MetricError(f"{first} and {metric} are both called {spec.name!r}; give each a name of its own")
    return [spec for spec, _ in named.values()]


def other_conventions(metrics: Sequence[MetricSpec]) -> list[MetricSpec]:
    """Those of `METRICS` that measure what these do by another convention: each once, none that rescales another."""
    constructs, there = {spec.construct for spec in metrics}, {spec.convention for spec in metrics}
    return [
        spec
        for spec in METRICS.values()
        if spec.construct in constructs and spec.convention == spec.name and spec.name not in there
    ]
