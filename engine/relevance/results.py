"""What `metrics/relevance.json` holds: built by the relevance stage, written, and read back by the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.config import Baseline
from engine.statistics import IMAGES, SCHEMA, UNLESS_NONE, Interval, parse

CONTROL = "random"
"""The method that knows nothing: a seeded random map."""
ILLUSTRATIVE = ("gradcam",)
"""Methods whose maps are shown one by one, as illustrations, in a folder of their own."""
Role = Literal["true", "predicted", "own"]
Outcome = Literal["logit", "correct"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A method that could not be computed for a condition, and why."""

    condition: str
    method: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MapMean:
    """The mean over images of a measure of a condition's maps by one method."""

    condition: str
    method: str
    measure: str
    mean: float | None
    ci: Interval
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MapCurves:
    """Mean probability of the class as shares of patches (`fractions`, most relevant first) go or come back."""

    condition: str
    method: str
    fractions: tuple[float, ...]
    deletion: tuple[float | None, ...]
    insertion: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MapTest:
    """A paired test over images of a measure of maps: between methods, conditions, or classes.

    `difference` is that of `method` from the method `than`; of `condition` from `against`; with neither, of the map of
    another class from that of the image's class. Numbers are None where they are not defined, as `degenerate` says.
    """

    condition: str
    against: str | None = field(default=None, metadata=UNLESS_NONE)
    method: str
    than: str | None = field(default=None, metadata=UNLESS_NONE)
    measure: str
    n: int | None
    difference: float | None
    dz: float | None
    ci: Interval
    p: float | None
    p_max_t: float | None
    family_size: int | None
    degenerate: str | None

    def survives(self, alpha: float) -> bool:
        """Whether it survives its family's max-T test."""
        return self.difference is not None and self.p_max_t is not None and self.p_max_t <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPeaks:
    """In how many of a condition's maps by rollout the peak is the patch that dominates a head.

    That patch has the greatest share of received attention in any head (`kernels.reference.sink_share`), a share above
    `DOMINANT_SHARE`.
    """

    condition: str
    images: int
    at_dominant: int
    share: float | None  # the greatest of them, as layer and head
    layer: int | None
    head: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAssociation:
    """Spearman's correlation over images of a head's change in a metric with a change in the prediction.

    `rho` and its tests are adjusted for class and baseline values; None where nothing could be tested. `rho_raw` is
    not adjusted and not tested: regression to the mean is in it.
    """

    metric: str
    layer: int
    head: int
    n: int
    df: int | None  # residual degrees of freedom
    rho: float | None
    rho_raw: float | None
    p: float | None
    p_max_r: float | None

    def survives(self, alpha: float) -> bool:
        """Whether it survives its family's max-|ρ| test."""
        return self.rho is not None and self.p_max_r is not None and self.p_max_r <= alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionLink:
    """Whether heads' changes go with one change in the prediction (`prediction_link`)."""

    condition: str
    against: str
    outcome: Outcome
    unit_of_inference: str = IMAGES
    family: str = "metric × layer × head"
    family_size: int  # heads tested
    permutations: int
    images: int
    alone: int  # images that are the only one of their class (and of having been right), which say nothing
    rho_start: float | None  # of the outcome's change with its value in `against`, over images
    tests: tuple[HeadAssociation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelevanceResults:
    """The whole of `relevance.json`; its keys are these names, in this order."""

    schema: int = SCHEMA
    unit_of_inference: str = IMAGES
    images: int  # how many maps were measured on
    target: Role  # which class is explained; see `ClassChoice.role`
    left_out: tuple[str, ...]  # what is not computed and why, a sentence each
    baseline: Baseline
    steps: int  # of `perturbation_curves`
    against: str  # the condition that the others are compared with
    confidence: float  # of the intervals
    refused: tuple[Refusal, ...]
    means: tuple[MapMean, ...]
    curves: tuple[MapCurves, ...]
    # Tests between methods, conditions and classes, as `relevance_results` describes them.
    methods: tuple[MapTest, ...]
    conditions: tuple[MapTest, ...]
    classes: tuple[MapTest, ...]
    rollout_peaks: tuple[RolloutPeaks, ...]
    link: tuple[PredictionLink, ...]


def samples_folder(outputs: Path, method: str) -> Path:
    """Where a method's pictures go."""
    folder = f"{method}_samples" if method in ILLUSTRATIVE else f"relevance/{method}"
    return outputs / "visualizations" / folder


def parse_relevance(document: Mapping[str, Any], path: Path) -> RelevanceResults:
    """What a JSON document, read from `path`, holds of relevance maps. Raises InputError as `parse`."""
    return parse(RelevanceResults, document, path, "relevance")
