"""What `attention_comparison.json` holds of inference and description, as the report reads it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from train.errors import InputError

LEVELS = ("head", "layer", "class", "seed", "layer_means")

SKEWED = 0.06
"""Skewness/√n above which the level of a sign-flip test of many cells is no longer near its nominal one: at 5 %
a thousand simulated null studies each are rejected in 4.9 % at 0.050, 9.6 % at 0.077 and 15 % at 0.153."""

Interval = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """One paired comparison, `condition` − `against`, as `engine.statistics.compare_conditions` describes it.

    `level` says what one test covers: "head" (a layer and head), "layer" (a layer, mean over its heads), "class" (the
    same, every class of images counting alike), "seed" (differences between training runs) or "layer_means" (the t-test
    over layer means, kept for comparison only). Numbers are in `unit`; None where the file holds null.
    """

    condition: str
    against: str
    metric: str
    unit: str
    level: str
    unit_of_inference: str
    family: str
    family_size: int | None = None
    region: str | None = None
    layer: int | None = None
    site: str | None = None
    head: int | None = None
    n: int | None = None
    missing: int | None = None
    mean_against: float | None = None
    mean_condition: float | None = None
    difference: float | None = None
    sd: float | None = None
    skewness: float | None = None
    dz: float | None = None
    gz: float | None = None
    d_av: float | None = None
    ci: Interval = (None, None)
    ci_method: str = ""
    ci_nested: Interval = (None, None)
    nested_levels: str = ""
    test: str = ""
    t: float | None = None
    p: float | None = None
    p_wilcoxon: float | None = None
    p_max_t: float | None = None
    p_holm: float | None = None
    p_bh: float | None = None
    p_floor: float | None = None
    tost_bound: float | None = None
    p_tost: float | None = None
    p_tost_holm: float | None = None
    mde_dz: float | None = None
    mde: float | None = None
    degenerate: str = ""

    def survives(self, alpha: float) -> bool:
        """Whether it survives its family's max-T test."""
        return self.difference is not None and self.p_max_t is not None and self.p_max_t <= alpha

    def changed(self, alpha: float) -> bool:
        """Whether there is a difference, and none that is shown to be negligible."""
        return self.survives(alpha) and not self.equivalent(alpha)

    def negligible(self, alpha: float) -> bool:
        """Whether the difference is there and yet within the bound that was set beforehand."""
        return self.survives(alpha) and self.equivalent(alpha)

    @property
    def skewed(self) -> bool:
        """Whether the differences are so skewed for their number that sign flips reject too often.

        Beyond what chance gives n symmetric differences, too: skewness has a standard error of about √(6/n).
        """
        if self.skewness is None or not self.n:
            return False
        return abs(self.skewness) > max(SKEWED * math.sqrt(self.n), 3 * math.sqrt(6 / self.n))

    def equivalent(self, alpha: float) -> bool:
        """Whether the difference is shown to lie within the bound, in its family (Holm)."""
        return self.p_tost_holm is not None and self.p_tost_holm <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Deep half of the layers against the shallow half, of one metric in one condition (`layer_trend`)."""

    condition: str
    against: str
    metric: str
    unit: str
    unit_of_inference: str
    family: str
    region: str | None = None
    shallow_layers: tuple[int, ...] = ()
    deep_layers: tuple[int, ...] = ()
    n: int | None = None
    shallow: float | None = None
    deep: float | None = None
    difference: float | None = None
    dz: float | None = None
    ci: Interval = (None, None)
    p: float | None = None
    p_max_t: float | None = None
    depth_rho: float | None = None

    def survives(self, alpha: float) -> bool:
        """Whether the halves differ after the correction over the metrics."""
        return self.difference is not None and self.p_max_t is not None and self.p_max_t <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Neighbouring layers in which one metric changes in one direction (`layer_clusters`)."""

    condition: str
    against: str
    metric: str
    unit: str
    unit_of_inference: str
    family: str
    direction: str
    region: str | None = None
    layers: tuple[int, ...] = ()
    mass: float | None = None
    n: int | None = None
    p: float | None = None

    def survives(self, alpha: float) -> bool:
        """Whether it survives the cluster permutation test."""
        return self.p is not None and self.p <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Spearman's correlation of two metrics' differences (`cross_metric_correlation`). Descriptive only."""

    condition: str
    against: str
    metric: str
    with_metric: str
    over: str
    region: str | None = None
    with_region: str | None = None
    layer: int | None = None
    rho: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Analyses:
    """Everything of one study."""

    tests: tuple[PairedTest, ...]
    trends: tuple[Trend, ...]
    clusters: tuple[Cluster, ...]
    relations: tuple[Relation, ...]


Entry = TypeVar("Entry", PairedTest, Trend, Cluster, Relation)


def load_analyses(document: Mapping[str, Any], path: Path) -> Analyses:
    """The analyses of a comparison document.

    Raises:
        InputError: a part is no list, or an entry lacks what it needs or holds something else than expected.
    """
    tests = tuple(_entries(PairedTest, document, "tests", path))
    for index, test in enumerate(tests):
        if test.level not in LEVELS:
            raise InputError(f"{path}: tests[{index}].level is {test.level!r}; expected one of {', '.join(LEVELS)}")
    return Analyses(
        tests=tests,
        trends=tuple(_entries(Trend, document, "trends", path)),
        clusters=tuple(_entries(Cluster, document, "clusters", path)),
        relations=tuple(_entries(Relation, document, "relations", path)),
    )


def _entries(kind: type[Entry], document: Mapping[str, Any], part: str, path: Path) -> Iterator[Entry]:
    entries = document.get(part, [])
    if not isinstance(entries, list):
        raise InputError(f"{path}: {part} is a {type(entries).__name__}; expected a list")
    declared = _fields(kind)
    for index, entry in enumerate(entries):
        where = f"{path}: {part}[{index}]"
        if not isinstance(entry, dict):
            raise InputError(f"{where} is a {type(entry).__name__}; expected an object")
        values = {}
        for name, wanted, required in declared:
            value = entry.get(name)
            if value is None:
                if required:
                    raise InputError(f"{where} has no {name}; expected text")
                continue  # null: the field's own default
            try:
                values[name] = _read(value, wanted)
            except (TypeError, ValueError) as error:
                raise InputError(f"{where}.{name} is {value!r:.80}; expected {wanted}") from error
        yield kind(**values)


def _fields(kind: Any) -> tuple[tuple[str, str, bool], ...]:
    """(name, what it holds, whether it must be there) of every field."""
    hints = typing.get_type_hints(kind)
    return tuple((f.name, _kind(hints[f.name]), f.default is dataclasses.MISSING) for f in dataclasses.fields(kind))


def _kind(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return _kind(next(part for part in typing.get_args(hint) if part is not type(None)))
    if hint == Interval:
        return "two numbers"
    return {str: "text", int: "a whole number", float: "a number"}.get(hint, "whole numbers")


def _read(value: Any, wanted: str) -> Any:
    match wanted:
        case "text":
            if not isinstance(value, str):
                raise TypeError
            return value
        case "a whole number":
            return int(value)
        case "a number":
            return float(value)
        case "two numbers":
            low, high = value
            return float(low), float(high)
        case _:
            return tuple(int(item) for item in value)
