"""How differences of two metrics go together, in words: only what cells and images both say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special

from engine.report import text
from engine.report.findings import PairFindings
from engine.report.inputs import Results
from engine.statistics import Relation

APART = 0.3
STRONG = 0.7
"""|ρ| up to which, and from which on, the whole of an interval must lie for words that leave out "tend to"."""


def relation_lead(results: Results, comparison: PairFindings) -> str:
    """What the correlations between metrics' differences are, and what their intervals do not cover."""
    cells = max((relation.n or 0 for relation in comparison.relations if relation.over == "cells"), default=0)
    chance = ""
    if cells > 3:
        t = float(special.stdtrit(cells - 2, 0.975))
        chance = f"; of {cells} cells without any relation |ρ| passes {t / math.sqrt(cells - 2 + t * t):.2f} in 5 %"
    unpaired = "" if comparison.heads_paired else " Heads are not paired: see the limits."
    return (
        f"Differences {comparison.minus}: Spearman's ρ over layer × head cells and, within layers, over images "
        f"(exploratory). In brackets {text.percent(results.confidence)} intervals over images, each by itself: where ρ "
        "of other images like these would lie. The cells are no sample, and what other heads or models would give is "
        f"not covered{chance}. Metrics are said to go together where the interval leaves out 0, images of some layer "
        f"say the same beyond their own interval, and those of no layer the opposite.{unpaired}"
    )


def relation_sentence(relation: Relation, by_layer: Sequence[Relation]) -> str:
    """Two metrics' differences over the cells, and over images `by_layer`; "" where the coefficient is undefined."""
    if relation.rho is None:
        return ""
    layers = [other for other in by_layer if other.rho is not None]
    names = f"{text.what(relation.metric, relation.region)} and {text.what(relation.with_metric, relation.with_region)}"
    numbers = f"ρ = {_rho(relation)} over {relation.n} cells"
    if layers:
        least, most = (extreme(layers, key=lambda other: other.rho or 0.0) for extreme in (min, max))
        numbers += f"; over images within a layer {_rho(least)} to {_rho(most)}"
    verdict, reason = _together(relation, layers)
    if reason:
        return f"{names}: {numbers}. No direction is claimed: {reason}."
    return f"{names} {verdict} ({numbers})."


def _together(relation: Relation, layers: Sequence[Relation]) -> tuple[str, str]:
    """In words how metrics go together, or why that cannot be said; both views have to say it."""
    if relation.ci is None:
        return "", "the images are too few for an interval"
    low, high = relation.ci
    if max(-low, high) <= APART:
        if strong := _beyond(layers, APART) + _beyond(layers, APART, -1):
            return "", f"images of {text.span(sorted(strong))} say more than ±{APART:g}"
        return "change largely apart from each other", ""
    if low <= 0 <= high:
        return "", "the interval over cells holds 0"
    sign = 1 if low > 0 else -1
    if opposed := _beyond(layers, 0.0, -sign):
        return "", f"images of {text.span(opposed)} say the opposite"
    if not _beyond(layers, 0.0, sign):
        return "", "images of no layer say so"
    verdict = "rise and fall together" if sign > 0 else "move in opposite directions"
    return verdict if min(abs(low), abs(high)) >= STRONG else f"tend to {verdict}", ""


def _beyond(layers: Sequence[Relation], size: float, sign: int = 1) -> list[int]:
    """The layers whose interval over images lies beyond sign × size."""
    return [
        other.layer
        for other in layers
        if other.layer is not None and other.ci is not None and min(sign * bound for bound in other.ci) > size
    ]


def _rho(relation: Relation) -> str:
    values = [f"{value:+.2f}".replace("-", "−") for value in (relation.rho or 0.0, *(relation.ci or ()))]
    return f"{values[0]} ({' to '.join(values[1:])})" if relation.ci else values[0]
