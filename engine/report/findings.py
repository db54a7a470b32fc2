"""What the numbers say: layer curves with intervals, and for every comparison what changed, where and how surely."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from engine.report import text
from engine.report.inputs import Results, matches
from engine.statistics import (
    Cluster,
    CrossedTest,
    PairedTest,
    Relation,
    RunSpread,
    Trend,
    defined_mean,
    may_be_largest,
)


def seeds_needed(alpha: float) -> int:
    """How many training runs a test over them takes: an exact sign flip over S runs has a least p of 2^(1−S)."""
    return math.ceil(1 - math.log2(alpha))


@dataclass(frozen=True, slots=True, eq=False)
class LayerCurve:
    """One condition's metric by layer: the mean over seeds, heads and images, with a t interval over images.

    `mean`, `low`, `high` [layer] in the metric's unit; `n` [layer] images with a value; `by_seed` holds each
    training run's own means.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray
    by_seed: Mapping[int, np.ndarray]


def layer_curve(results: Results, metric: str, condition: str, region: str | None = None) -> LayerCurve:
    """The curve of a metric in a condition. The interval is over images, given the checkpoints: no seed is in it."""
    values = results.table[metric].sel(condition=condition)
    if region is not None:
        values = values.sel(region=region)
    array = values.transpose("seed", "image", "layer", "head").values.astype(np.float64)
    by_image = defined_mean(array, (0, 3))
    centre, n = defined_mean(by_image, (0,)), np.isfinite(by_image).sum(0)
    spread = np.where(n > 1, defined_mean((by_image - centre) ** 2, (0,)), np.nan)  # biased variance
    with np.errstate(invalid="ignore", divide="ignore"):
        half = special.stdtrit(n - 1.0, 0.5 + results.confidence / 2) * np.sqrt(spread / (n - 1.0))
    by_seed = {
        seed: defined_mean(array[s], (0, 2)) for s, seed in enumerate(results.seeds) if np.isfinite(array[s]).any()
    }
    if results.seed_invariant(condition):  # the one run stands at every seed
        by_seed = dict(list(by_seed.items())[:1])
    return LayerCurve(centre, centre - half, centre + half, n, by_seed)


def histories(results: Results, key: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(condition, epochs, values) of every training run that recorded `key` by epoch.

    A probe is fitted for several penalties and has no epochs: it has no curve.
    """
    for condition, entry in (results.training or {}).items():
        for run in (entry.get("seeds") or {}).values():
            steps = [step for step in run.get("history") or () if None not in (step.get("epoch"), step.get(key))]
            if steps:
                points = np.asarray([(step["epoch"], step[key]) for step in steps], dtype=np.float64)
                yield condition, points[:, 0], points[:, 1]


def training_runs(results: Results, condition: str) -> int:
    """How many training runs of a condition were measured (one, where no seed can change its attention)."""
    if results.seed_invariant(condition):
        return 1
    first = results.table[results.metrics[0]].sel(condition=condition).transpose("seed", ...).values
    return int(np.isfinite(first).reshape(len(first), -1).any(1).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How one metric (in one region) differs between two conditions.

    What changed is "different" by `PairedTest.verdict`, what is negligible survives and lies within the bound.
    """

    metric: str
    region: str | None
    unit: str
    primary: bool  # whether its layers are in the primary family
    heads: tuple[PairedTest, ...]  # layer × head tests
    defined: int  # of these, with a difference
    risen: int  # of these, changed and higher; fallen: lower
    fallen: int
    gated: int  # of those that changed, heads whose layer survives in the primary family
    negligible: int
    identical: bool  # every defined difference is exactly 0
    layers: tuple[PairedTest, ...]  # layer-level tests in depth order
    layers_changed: int
    layers_negligible: int
    # What row, sentence and headline speak of: the greatest |difference| of the layers that changed, or else of those
    # that are negligible, or else of all.
    shown: PairedTest | None
    largest: tuple[int, ...]  # layers that may be the one of the largest difference (`largest_layers`)
    bound: float | None
    equivalent: int | None  # layers whose difference is shown to lie within the bound; None where none was set
    detectable: float | None  # the layers' largest minimum detectable effect; None where no p can fall to α
    classes: tuple[PairedTest, ...]
    trend: Trend | None  # None below two layers
    clusters: tuple[Cluster, ...]  # those that survive

    @property
    def name(self) -> str:
        return text.what(self.metric, self.region)

    @property
    def changed(self) -> int:
        return self.risen + self.fallen

    @property
    def within(self) -> bool:
        """Whether the difference is shown to lie within the bound in every layer."""
        return self.equivalent is not None and self.equivalent == len(self.layers) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairFindings:
    """Everything about one condition against another; the counts are those of all its changes together."""

    condition: str
    against: str
    runs: int  # training runs that are paired
    runs_needed: int
    heads_paired: bool  # whether heads of one number belong together
    n: int
    cells: int
    changed: int
    gated: int
    negligible: int
    layers_changed: int
    layers_negligible: int
    untested: Mapping[str, tuple[int, int]]  # reason -> cells and layer means with a difference and no test
    identical: bool
    changes: tuple[Change, ...]
    seed_tests: tuple[PairedTest, ...]
    crossed: tuple[CrossedTest, ...]
    spread: RunSpread | None  # None with one run
    layer_means: tuple[PairedTest, ...]
    relations: tuple[Relation, ...]

    @property
    def pair(self) -> str:
        return f"{self.condition} against {self.against}"

    @property
    def minus(self) -> str:
        return f"{self.condition} − {self.against}"

    def layers(self, primary: bool) -> tuple[int, int]:
        """How many layer means changed, of how many, in the primary family or in exploratory ones."""
        family = [change for change in self.changes if change.primary is primary]
        return sum(change.layers_changed for change in family), sum(len(change.layers) for change in family)

    @property
    def cells_named(self) -> str:
        """What is counted head by head, with the caution that it may need."""
        return "layer × head × metric cells" + ("" if self.heads_paired else " (heads are not paired: see the limits)")

    @property
    def speaks_of_runs(self) -> bool:
        """Whether there are training runs enough, and tests over them, to speak of more than these checkpoints."""
        return self.runs >= self.runs_needed and bool(self.seed_tests)


def comparisons(results: Results) -> Iterator[PairFindings]:
    """Every tested pair of conditions."""
    for condition, against in results.comparisons():
        pair = {"condition": condition, "against": against}
        tests = results.select("head", **pair) or results.select("layer", **pair)
        changes = tuple(_changes(results, condition, against))
        cells = sum(change.defined for change in changes)
        seed_tests = results.select("seed", **pair)
        yield PairFindings(
            condition=condition,
            against=against,
            runs=max((test.n or 0 for test in seed_tests), default=1),
            runs_needed=seeds_needed(results.alpha),
            heads_paired=not results.unpaired_note(condition),
            n=max((test.n or 0 for test in tests), default=0),
            cells=cells,
            changed=sum(change.changed for change in changes),
            gated=sum(change.gated for change in changes),
            negligible=sum(change.negligible for change in changes),
            layers_changed=sum(change.layers_changed for change in changes),
            layers_negligible=sum(change.layers_negligible for change in changes),
            untested=_untested(changes),
            identical=cells > 0 and all(change.identical for change in changes if change.defined),
            changes=changes,
            seed_tests=seed_tests,
            crossed=tuple(test for test in results.document.crossed if matches(test, pair)),
            spread=next((spread for spread in results.document.run_spreads if matches(spread, pair)), None),
            layer_means=results.select("layer_means", **pair),
            relations=tuple(r for r in results.document.relations if matches(r, pair)),
        )


def _changes(results: Results, condition: str, against: str) -> Iterator[Change]:
    """One `Change` per metric, or per region, in the table's order; metrics without a test are left out."""
    for metric, region in results.series():
        where = {"condition": condition, "against": against, "metric": metric, "region": region}
        heads = results.select("head", **where)
        layers = tuple(sorted(results.select("layer", **where), key=lambda test: test.layer or 0))
        if not heads and not layers:
            continue
        defined = [test for test in heads if test.difference is not None]
        differ = [test for test in defined if test.verdict(results.alpha) == "different"]
        risen = sum((test.difference or 0.0) > 0 for test in differ)
        layers_changed = [test for test in layers if test.verdict(results.alpha) == "different"]
        layers_negligible = [test for test in layers if test.verdict(results.alpha) == "negligible"]
        sized = [test for test in layers if test.difference is not None]
        every = [test.difference for test in (*heads, *layers) if test.difference is not None]
        bound = next((test.tost_bound for test in layers if test.tost_bound is not None), None)
        yield Change(
            metric=metric,
            region=region,
            unit=results.unit(metric),
            primary=metric in results.primary,
            heads=heads,
            defined=len(defined),
            risen=risen,
            fallen=len(differ) - risen,
            gated=sum(test.p_gated is not None and test.p_gated <= results.alpha for test in differ),
            negligible=sum(test.verdict(results.alpha) == "negligible" for test in defined),
            identical=bool(every) and not any(every),
            layers=layers,
            layers_changed=len(layers_changed),
            layers_negligible=len(layers_negligible),
            shown=max(
                layers_changed or layers_negligible or sized, key=lambda test: abs(test.difference or 0.0), default=None
            ),
            largest=largest_layers(layers),
            bound=bound,
            equivalent=None if bound is None else sum(test.within for test in layers),
            detectable=max((test.mde for test in layers if test.mde is not None), default=None),
            classes=results.select("class", **where),
            trend=next((trend for trend in results.document.trends if matches(trend, where)), None),
            clusters=results.clusters(**where),
        )


def largest_layers(tests: Iterable[PairedTest]) -> tuple[int, ...]:
    """Layers of these tests in one unit that may be the one of the largest difference, in depth order."""
    sized = [test for test in tests if test.difference is not None]
    bounds = np.array([test.ci_simultaneous or (np.nan, np.nan) for test in sized]).reshape(-1, 2)
    among = zip(sized, may_be_largest(*bounds.T), strict=True)
    return tuple(sorted({test.layer for test, may_be in among if may_be and test.layer is not None}))


def clearest_change(comparisons: Sequence[PairFindings], primary: bool) -> Change | None:
    """The change of greatest size beside how much images differ, |d_av|; units of metrics differ, so that decides.

    A certainty such as |dz| would put the most even change first, however small.
    """
    changes = (c for pair in comparisons for c in pair.changes if c.primary is primary and c.layers_changed)
    return max(changes, key=lambda change: abs((change.shown and change.shown.d_av) or 0.0), default=None)


def regional_change(comparisons: Sequence[PairFindings]) -> Change | None:
    """The largest change of a layer on an annotated region."""
    changes = (c for pair in comparisons for c in pair.changes if c.region is not None and c.layers_changed)
    return max(changes, key=lambda change: abs((change.shown and change.shown.difference) or 0.0), default=None)


def opening(results: Results, comparisons: Sequence[PairFindings]) -> PairedTest | None:
    """What the page opens on: what its first claim speaks of, else the largest difference of a head that differs."""
    firsts = clearest_change(comparisons, True), regional_change(comparisons), clearest_change(comparisons, False)
    if (first := next(filter(None, firsts), None)) is not None:
        return first.shown
    heads = [test for pair in comparisons for change in pair.changes for test in change.heads]
    differ = [test for test in heads if test.verdict(results.alpha) == "different"]
    return max(differ, key=lambda test: abs(test.d_av or 0.0), default=None)


def _untested(changes: Sequence[Change]) -> dict[str, tuple[int, int]]:
    """Reason -> how many cells and layer means have a difference and no test."""
    tests = [test for change in changes for test in (*change.heads, *change.layers) if test.untested]
    counts = Counter((str(test.degenerate), test.level) for test in tests)
    return {reason: (counts[reason, "head"], counts[reason, "layer"]) for reason, _ in counts}


def cell_relations(comparison: PairFindings) -> Iterator[tuple[Relation, tuple[Relation, ...]]]:
    """Each two metrics' relation over the cells, with those over images within the layers; regions are left out."""
    plain = [relation for relation in comparison.relations if relation.region is None is relation.with_region]
    for relation in plain:
        if relation.over == "cells":
            pair = (relation.metric, relation.with_metric)
            within = (other for other in plain if other.over == "images" and (other.metric, other.with_metric) == pair)
            yield relation, tuple(within)
