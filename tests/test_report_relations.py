"""What is said of how metrics go together: words only where cells and images both say them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from engine.report.relations import relation_lead, relation_sentence
from engine.statistics import Relation


def relation(
    rho: float | None, ci: tuple[float, float] | None, layer: int | None = None, region: str | None = None
) -> Relation:
    return Relation(
        condition="finetuned",
        against="baseline",
        metric="distance",
        region=None,
        with_metric="entropy",
        with_region=region,
        over="cells" if layer is None else "images",
        layer=layer,
        rho=rho,
        ci=ci,
        n=16 if layer is None else 100,
    )


def layers(*intervals: tuple[float, float] | None) -> list[Relation]:
    return [relation(sum(ci) / 2 if ci else 0.1, ci, layer) for layer, ci in enumerate(intervals)]


AGREE = layers((0.1, 0.3), (-0.1, 0.2))


@pytest.mark.parametrize(
    ("rho", "ci", "within", "said"),
    [
        (0.85, (0.7, 0.95), AGREE, "distance and entropy rise and fall together (ρ = +0.85 (+0.70 to +0.95)"),
        (0.85, (0.6, 0.95), AGREE, "distance and entropy tend to rise and fall together (ρ ="),
        (-0.85, (-0.9, -0.8), layers((-0.3, -0.1)), "distance and entropy move in opposite directions (ρ = −0.85"),
        (
            -0.5,
            (-0.6, -0.4),
            layers((-0.3, -0.1), (-0.1, 0.1)),
            "entropy tend to move in opposite directions (ρ = −0.50",
        ),
        (0.1, (-0.1, 0.3), AGREE, "distance and entropy change largely apart from each other (ρ = +0.10"),
        # One view alone says nothing.
        (0.5, (-0.1, 0.9), AGREE, "No direction is claimed: the interval over cells holds 0."),
        (
            0.85,
            (0.7, 0.95),
            layers((0.1, 0.3), (-0.3, -0.1)),
            "No direction is claimed: images of layer 1 say the opposite.",
        ),
        (0.85, (0.7, 0.95), layers((-0.1, 0.3), (-0.2, 0.1)), "No direction is claimed: images of no layer say so."),
        (0.85, (0.7, 0.95), layers(None), "No direction is claimed: images of no layer say so."),
        (
            0.1,
            (-0.1, 0.3),
            layers((-0.6, -0.4), (0.1, 0.2), (0.5, 0.6)),
            "images of layers 0 and 2 say more than ±0.3.",
        ),
        (0.85, None, layers(None), "No direction is claimed: the images are too few for an interval."),
    ],
)
def test_words_come_from_both_views(
    rho: float, ci: tuple[float, float] | None, within: list[Relation], said: str
) -> None:
    sentence = relation_sentence(relation(rho, ci), within)
    assert said in sentence
    claims = ("together (", "opposite directions (", "from each other (")
    assert ("No direction is claimed" in sentence) != any(claim in sentence for claim in claims)


def test_numbers_stand_with_their_intervals() -> None:
    within = [*layers((0.1, 0.3), (-0.2, 0.1)), relation(None, None, 2)]
    assert relation_sentence(relation(0.5, (0.25, 0.75), region="target_digit"), within) == (
        "distance and entropy on target_digit tend to rise and fall together (ρ = +0.50 (+0.25 to +0.75) over 16 "
        "cells; over images within a layer −0.05 (−0.20 to +0.10) to +0.20 (+0.10 to +0.30))."
    )
    assert "ρ = +0.50 over 16 cells; over images within a layer +0.10 to +0.10." in relation_sentence(
        relation(0.5, None), layers(None)
    )
    assert relation_sentence(relation(None, None), AGREE) == ""


def test_lead_says_what_the_intervals_do_not_cover() -> None:
    results: Any = SimpleNamespace(confidence=0.9)
    comparison: Any = SimpleNamespace(minus="finetuned − baseline", relations=[relation(0.5, None)], heads_paired=True)
    lead = relation_lead(results, comparison)
    assert "90 % intervals over images, each by itself" in lead
    assert (
        "what other heads or models would give is not covered; of 16 cells without any relation |ρ| passes 0.50" in lead
    )
    assert "Heads are not paired" not in lead
    comparison.heads_paired = False
    comparison.relations = []
    assert "Heads are not paired: see the limits." in relation_lead(results, comparison)
    assert "without any relation" not in relation_lead(results, comparison)
