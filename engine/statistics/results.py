"""Results of the tests, one by one, and the settings that they are made with: parts of `Comparison`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

# Units of inference, as the report words them.
IMAGES = "image, given these checkpoints"
CLASSES = "class of images (the mean over its images), given these checkpoints"
RUNS = "training run (seed), given these images"
CROSSED = "training run and image, crossed"
LAYERS = "layer (layers are not independent samples; shown for comparison with published practice)"

Interval = tuple[float, float] | None
Verdict = Literal["different", "negligible", "equivalent", "undecided"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Result = TypeVar("_Result", bound="DataclassInstance")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How tests and intervals are made; a reader of the results learns it from them.

    Args:
        against: the condition that the others are compared with.
        primary: the metrics whose layer means are the primary family, named before anything is measured; those that the
            table does not hold are left out. All other tests are exploratory.
        permutations: resamples of images behind p-values and intervals; sign flips of runs, classes and clusters, all
            2^n patterns where these are not more.
        confidence: coverage of the intervals.
        alpha, power: level (of a whole family) and power of the minimum detectable effect.
        equivalence: metric -> bound of a negligible difference in the metric's unit, set before looking.
        cluster_alpha: two-sided level whose critical t makes neighbouring layers a cluster.
        seed: of flips and resamples.
    """

    against: str = "baseline"
    primary: tuple[str, ...] = ("distance", "entropy", "morans_i")
    permutations: int = 9999
    confidence: float = 0.95
    alpha: float = 0.05
    power: float = 0.8
    equivalence: Mapping[str, float] = field(default_factory=dict)
    cluster_alpha: float = 0.05
    seed: int = 0

    def resampling(self) -> dict[str, Any]:
        """What `compare_columns` is given of them."""
        names = ("permutations", "confidence", "seed")
        return {name: getattr(self, name) for name in names}


DEFAULTS = Settings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One metric (of one region, or None) in a condition and the one that it is compared with, in `unit`."""

    condition: str
    against: str
    metric: str
    unit: str
    region: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest(Compared):
    """One paired comparison, `condition` − `against`, as `compare_conditions` describes it.

    `level` says what one test covers: "head" (a layer and head), "layer" (a layer, mean over its heads), "class" (the
    same, every class of images counting alike), "seed" (differences between training runs) or "layer_means" (the t-test
    over layer means, kept for comparison only). Numbers are in `unit`; None where there is no number, for the reason
    under `degenerate`.
    """

    level: Literal["head", "layer", "class", "seed", "layer_means"]
    role: Literal["primary", "exploratory"]
    unit_of_inference: str
    family: str
    family_size: int | None
    layer: int | None
    site: str | None
    head: int | None
    seeds: tuple[int, ...]
    n: int | None
    missing: int | None
    mean_against: float | None
    mean_condition: float | None
    difference: float | None
    sd: float | None
    skewness: float | None
    dz: float | None
    gz: float | None
    d_av: float | None
    ci: Interval
    ci_method: str | None
    ci_simultaneous: Interval
    ci_nested: Interval
    nested_levels: str | None
    test: str | None
    t: float | None
    p: float | None
    p_wilcoxon: float | None
    resampling: str
    p_max_t: float | None
    p_gated: float | None
    p_holm: float | None
    p_bh: float | None
    tost_bound: float | None
    p_tost: float | None
    p_tost_holm: float | None
    mde_dz: float | None
    mde: float | None
    p_floor: float | None
    degenerate: str | None

    def survives(self, alpha: float) -> bool:
        """Whether it survives its family's max-T test."""
        return self.difference is not None and self.p_max_t is not None and self.p_max_t <= alpha

    @property
    def within(self) -> bool:
        """Whether the difference is shown to lie within the bound set beforehand: its simultaneous interval does."""
        if self.tost_bound is None or self.ci_simultaneous is None:
            return False
        return max(map(abs, self.ci_simultaneous)) < self.tost_bound

    def verdict(self, alpha: float) -> Verdict:
        """Whether there is a difference (`survives`), and whether it is shown to be smaller than the bound (`within`).

        Both are told in their family: "different" survives and is not shown to lie within, "negligible" is there and
        within, "equivalent" is within and does not survive, "undecided" is neither. Without a bound nothing is within.
        """
        if self.survives(alpha):
            return "negligible" if self.within else "different"
        return "equivalent" if self.within else "undecided"

    @property
    def untested(self) -> bool:
        """Whether there is a difference and no test of it, for the reason under `degenerate`."""
        return self.difference is not None and self.p_max_t is None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossedTest(Compared):
    """One mean difference over training runs and images like these, `condition` − `against`, as `compare_runs` has it.

    It is of the same runs, images and heads as the `PairedTest` of this level and place. `sd_run`, `sd_image` and
    `sd_residual` are the components' standard deviations in `unit`, the shares those of the variance of the mean;
    `d_run` is the difference in units of `sd_run`. The interval has `ci_df` degrees of freedom, the test `df`.
    """

    level: Literal["head", "layer"]
    unit_of_inference: str
    family: str
    family_size: int
    layer: int
    site: str
    head: int | None
    seeds: tuple[int, ...]
    runs: int
    images: int
    missing: int
    difference: float | None
    ci: Interval
    ci_df: float | None
    ci_method: str
    sd_run: float | None
    sd_image: float | None
    sd_residual: float | None
    share_run: float | None
    share_image: float | None
    share_residual: float | None
    d_run: float | None
    t: float | None
    df: float | None
    p: float | None
    p_holm: float | None
    runs_needed: int | None
    images_needed: int | None
    degenerate: str | None

    def survives(self, alpha: float) -> bool:
        """Whether it survives the correction over its family."""
        return self.p_holm is not None and self.p_holm <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class RunControl:
    """Two training runs of one condition against each other, tested as two conditions are: what differs by chance.

    How many of the tested cells (layer × head × metric) and layer means (layer × metric) differ by max-T over images,
    as at the levels "head" and "layer" of `PairedTest`; the layer means of all metrics are one family here.
    """

    condition: str
    seeds: tuple[int, int]
    unit_of_inference: str
    n: int  # images
    cells: int
    cells_differ: int
    layers: int
    layers_differ: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpread:
    """How far runs lie apart beside what conditions differ by, over the cells (layer × head × metric) of a comparison.

    Of each cell, the mean |difference between two runs| of condition − against, over all pairs of runs, is set beside
    |the mean over runs|.
    """

    condition: str
    against: str
    seeds: tuple[int, ...]
    cells: int
    ratio: float | None  # median over cells of runs' distance / difference
    cells_wider: int  # in which runs lie further apart than the conditions
    cells_opposite: int  # in which runs have differences of both signs


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend(Compared):
    """Deep half of the layers against the shallow half, of one metric in one condition (`layer_trend`)."""

    unit_of_inference: str
    family: str
    family_size: int | None
    shallow_layers: tuple[int, ...]
    deep_layers: tuple[int, ...]
    n: int | None
    missing: int | None
    shallow: float | None
    deep: float | None
    difference: float | None
    dz: float | None
    gz: float | None
    ci: Interval
    p: float | None
    t: float | None
    p_max_t: float | None
    p_holm: float | None
    p_bh: float | None
    depth_rho: float | None
    degenerate: str | None

    def survives(self, alpha: float) -> bool:
        """Whether the halves differ after the correction over the metrics."""
        return self.difference is not None and self.p_max_t is not None and self.p_max_t <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(Compared):
    """Neighbouring layers in which one metric changes in one direction (`layer_clusters`)."""

    unit_of_inference: str
    family: str
    family_size: int | None
    cluster_alpha: float | None
    layers: tuple[int, ...]
    direction: str
    mass: float | None
    n: int | None
    p: float | None
    p_floor: float | None
    degenerate: str | None

    def survives(self, alpha: float) -> bool:
        """Whether it survives the cluster test."""
        return self.p is not None and self.p <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Specification:
    """A layer's difference by one convention of what is measured, `metric` in `unit`, and of what heads become.

    Of an image's heads it takes the mean, the median or the greatest value. `same_sign` says whether the difference has
    the sign that it has in the study's own specification; `p_max_t` is over the layers of this specification, `p_joint`
    over the layers of all specifications.
    """

    metric: str
    unit: str
    heads: Literal["mean", "median", "max"]
    difference: float | None
    dz: float | None
    same_sign: bool
    p_max_t: float | None
    p_joint: float | None

    def survives(self, alpha: float, jointly: bool = False) -> bool:
        """Whether it survives the max-T test over its own layers, or over those of all specifications."""
        p = self.p_joint if jointly else self.p_max_t
        return self.difference is not None and p is not None and p <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiverse(Compared):
    """One layer's difference by every specification (`compare_conventions`); the first one is the study's own."""

    layer: int
    site: str
    specifications: tuple[Specification, ...]

    @property
    def agreeing(self) -> int:
        """Specifications with the sign of the study's own."""
        return sum(one.same_sign for one in self.specifications)

    def claiming(self, alpha: float, jointly: bool = False) -> int:
        """Specifications with that sign that survive."""
        return sum(one.same_sign and one.survives(alpha, jointly) for one in self.specifications)

    def opposing(self, alpha: float) -> int:
        """Specifications with another sign that survive."""
        return sum(not one.same_sign and one.survives(alpha) for one in self.specifications)


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """Spearman's correlation of two metrics' differences (`cross_metric_correlation`), with an interval over images."""

    condition: str
    against: str
    metric: str
    region: str | None
    with_metric: str
    with_region: str | None
    over: str
    layer: int | None
    rho: float | None
    ci: Interval
    n: int | None


def build(
    kind: type[_Result], rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any], **same: Any
) -> list[_Result]:
    """One result per row, a dataclass: of its own fields, of `columns`, and of the fields that are the same for all.

    `columns` maps a field to one value per row: a list, an array [row], or of an interval [row, 2]; NaN and infinity,
    which JSON does not have, become None. Columns that are no field of `kind` are left out.
    """
    chosen = {entry.name: _values(columns[entry.name]) for entry in fields(kind) if entry.name in columns}
    return [
        kind(**same, **row, **dict(zip(chosen, values, strict=True)))
        for row, values in zip(rows, zip(*chosen.values(), strict=True), strict=True)
    ]


def finite(value: float) -> float | None:
    """A number as results hold it: None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def _values(column: Sequence[Any] | np.ndarray) -> Sequence[Any]:
    if not isinstance(column, np.ndarray):
        return column
    if column.ndim == 1:
        return [finite(value) for value in column] if column.dtype.kind == "f" else column.tolist()
    return [tuple(row.tolist()) if np.isfinite(row).all() else None for row in column]
