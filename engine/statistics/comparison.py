"""What `attention_comparison.json` holds: put together of the results, written, and read back by the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engine.statistics.document import SCHEMA, parse, write_document
from engine.statistics.results import (
    DEFAULTS,
    Cluster,
    CrossedTest,
    Multiverse,
    PairedTest,
    Relation,
    RunControl,
    RunSpread,
    Settings,
    Trend,
)
from train.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Shares of images that one training run classifies rightly, of those whose class its head has."""

    validation: float | None  # None for a given checkpoint
    test: float
    chance: float
    images: int  # of the test split


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier:
    """What the outputs of a condition's head stand for (None: not known), and what a reader must know of it, or ""."""

    outputs: int
    classes: tuple[str, ...] | None
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrimaryFamily:
    """The family that was named beforehand, and whether it was: `metrics/primary.json` holds it, of this sha256."""

    metrics: tuple[str, ...]
    before: bool  # named before the first capture
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPairing:
    """Whether heads of one number belong together in a given checkpoint and the one that it is compared with."""

    against: str
    similarity: Mapping[str, float]  # module of each layer -> cosine of the weights of its attention in both
    note: str  # what a reader must know of it, or ""


@dataclass(frozen=True, slots=True)
class Control:
    """A negative control: `value` is the largest absolute difference where zero is expected, `detail` in words."""

    name: str
    title: str
    expectation: str
    value: float
    held: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The whole of `attention_comparison.json`; its keys are these names, in this order.

    Args:
        schema: of this file.
        layers: module of each layer, in depth order.
        units: metric -> unit.
        conditions: condition -> metric, or "metric[region]" (for example `region_mass[target_digit]`) -> one value per
            layer: the mean over seeds, images and heads of the values that are defined, in the metric's unit.
        crossed, run_controls, run_spreads: what training runs say; empty where conditions have one.
        settings: what tests, trends, clusters and relations were made with.
        accuracy, classifiers, controls, data, head_pairing, prefix_mass_warning, primary, undefined: what the study
            knows besides: condition -> seed -> accuracies; condition -> what its outputs stand for; the negative
            controls; the data set; given checkpoint -> whether its heads are paired; what capture had to say; when the
            primary family was named (None: no study kept a record); metric -> condition -> rows without a value.
    """

    schema: int = SCHEMA
    layers: tuple[str, ...] = ()
    units: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, tuple[float | None, ...]]] = field(default_factory=dict)
    tests: tuple[PairedTest, ...] = ()
    accuracy: Mapping[str, Mapping[str, Accuracy]] = field(default_factory=dict)
    classifiers: Mapping[str, Classifier] = field(default_factory=dict)
    clusters: tuple[Cluster, ...] = ()
    controls: tuple[Control, ...] = ()
    crossed: tuple[CrossedTest, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    head_pairing: Mapping[str, HeadPairing] = field(default_factory=dict)
    multiverse: tuple[Multiverse, ...] = ()
    prefix_mass_warning: str = ""
    primary: PrimaryFamily | None = None
    relations: tuple[Relation, ...] = ()
    run_controls: tuple[RunControl, ...] = ()
    run_spreads: tuple[RunSpread, ...] = ()
    settings: Settings = DEFAULTS
    trends: tuple[Trend, ...] = ()
    undefined: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def parse_comparison(document: Mapping[str, Any], path: Path) -> Comparison:
    """The comparison that a JSON document, read from `path`, holds.

    Raises:
        InputError: another schema, no settings, or a part that is not as `Comparison` declares it.
    """
    comparison = parse(Comparison, document, path, "statistics")
    if missing := [entry.name for entry in fields(Settings) if entry.name not in document["settings"]]:
        raise InputError(
            f"{path}: does not say with which settings ({', '.join(missing)}) its tests and intervals were made; "
            "run the statistics stage again"
        )
    return comparison


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write `attention_comparison.json`: all of it or nothing, the same bytes for the same results.

    Raises:
        ValueError: a value is infinite or has no form in JSON.
    """
    write_document(path, comparison, indent=1)
