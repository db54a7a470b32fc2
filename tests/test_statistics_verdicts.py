"""What intervals of many tests say: which layers may be the largest, what is equivalent; and what was not tested."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from benchmarks.null_studies import band
from engine.statistics import Floats, PairedTest, compare_columns, compare_paired, may_be_largest

NEIGHBOURS = 0.8
"""Correlation of neighbouring layers."""


def studies(effects: Floats, images: int, count: int, skewed: bool) -> Floats:
    """Differences [study, image, layer] with mean `effects` and standard deviation 1."""
    rng = np.random.default_rng(len(effects) * images)
    noise = rng.normal(size=(count, images, len(effects)))
    for layer in range(1, len(effects)):
        fresh = np.sqrt(1 - NEIGHBOURS**2) * noise[..., layer]
        noise[..., layer] = NEIGHBOURS * noise[..., layer - 1] + fresh
    if skewed:
        noise = (np.exp(0.5 * noise) - np.exp(0.125)) / np.sqrt((np.exp(0.25) - 1) * np.exp(0.25))
    return effects + noise


def rates(effects: Floats, images: int, count: int, skewed: bool = False) -> tuple[float, float, float]:
    """Shares of studies: the truly largest is in the set, the chosen one's interval covers; mean size of the set."""
    held, covered, size = 0, 0, 0
    largest = np.abs(effects) == np.abs(effects).max()
    for d in studies(effects, images, count, skewed):
        found = compare_paired(np.zeros_like(d), d, permutations=199)
        low, high = found.ci_low_simultaneous.values, found.ci_high_simultaneous.values
        chosen = np.abs(found.difference.values).argmax()
        among = may_be_largest(low, high)
        assert among[chosen]
        held += int(among[largest].any())
        covered += int(low[chosen] <= effects[chosen] <= high[chosen])
        size += among.sum()
    return held / count, covered / count, size / count


CASES = {
    "12 rising layers": (np.linspace(0.1, 0.3, 12), 200),
    "24 rising layers": (np.linspace(0.1, 0.3, 24), 200),
    "12 equal layers": (np.full(12, 0.3), 200),
    "no effect": (np.zeros(12), 200),
    "one layer": (np.append(np.zeros(11), 1.0), 200),
    "both signs": (np.linspace(-0.3, 0.25, 12), 60),
}


@pytest.mark.parametrize("skewed", [False, True], ids=["normal", "lognormal"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_truly_largest_is_among_those_that_may_be_it(case: str, skewed: bool, count: int) -> None:
    held, covered, size = rates(*CASES[case], count, skewed)
    assert held >= 0.95
    assert covered >= band(count, 0.95)[0]  # 93 % of 1,000
    assert case != "one layer" or size == 1


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        ([1.0, 2.0, -5.0], [2.0, 3.0, -3.5], [False, False, True]),
        ([1.0, 2.0, -4.0], [2.0, 3.0, -3.0], [False, True, True]),  # 3 is reached
        ([-1.0, -2.0, 0.0], [1.0, 0.5, 0.1], [True, True, True]),  # all may be 0
        ([1.0, np.nan, 3.0], [2.0, np.nan, 4.0], [False, True, True]),  # of the second nothing is known
        ([], [], []),
    ],
)
def test_what_may_be_the_largest(low: list[float], high: list[float], expected: list[bool]) -> None:
    assert may_be_largest(np.array(low), np.array(high)).tolist() == expected


@pytest.mark.parametrize(
    ("interval", "p", "bound", "expected"),
    [
        ((0.1, 0.4), 0.01, 0.3, "different"),
        ((0.1, 0.3), 0.01, 0.3, "different"),  # on the bound is not within
        ((-0.29, -0.1), 0.01, 0.3, "negligible"),
        ((-0.2, 0.1), 0.5, 0.3, "equivalent"),
        ((-0.4, 0.1), 0.5, 0.3, "undecided"),
        ((0.1, 0.2), 0.01, None, "different"),
        ((-0.1, 0.2), 0.5, None, "undecided"),
        (None, None, 0.3, "undecided"),
    ],
)
def test_one_interval_gives_every_verdict(
    interval: tuple[float, float] | None, p: float | None, bound: float | None, expected: str
) -> None:
    known: dict[str, Any] = {"difference": 0.1, "ci_simultaneous": interval, "p_max_t": p, "tost_bound": bound}
    entries: dict[str, Any] = {field.name: known.get(field.name) for field in fields(PairedTest)}
    test = PairedTest(**entries)
    assert test.verdict(0.05) == expected
    assert test.untested == (p is None)


def test_equivalence_of_a_family_is_claimed_wrongly_in_no_more_than_its_level() -> None:
    """Twelve effects just beyond the bound: in few studies any of their intervals lies within it."""
    wrong = 0
    for d in studies(np.full(12, 0.3), 100, 200, skewed=True):
        found = compare_paired(np.zeros_like(d), d, permutations=199)
        within = np.maximum(-found.ci_low_simultaneous, found.ci_high_simultaneous) < 0.299
        wrong += bool(within.any())
    assert wrong / 200 <= band(200)[1]


def test_what_was_not_tested_says_why() -> None:
    d = np.random.default_rng(0).normal(size=(30, 4))
    d[2:, 1] = 0.25
    d[:, 2] = 0.5
    d[3:, 3] = np.nan
    how: dict[str, Any] = {"permutations": 199, "seed": 0, "confidence": 0.95}
    resampled = compare_columns(np.zeros_like(d), d, **how).results()
    assert resampled["degenerate"] == [
        None,
        "fewer than 10 pairs differ from the most frequent value",
        "all differences are equal and not 0: t, dz and gz are infinite",
        "fewer than 6 complete pairs",
    ]
    assert np.isfinite(resampled["p_max_t"]).tolist() == [True, False, False, False]
    flipped = compare_columns(np.zeros((12, 4)), d[:12], **how).results()
    assert flipped["degenerate"][:2] == [None, None]
    assert flipped["degenerate"][3] == "fewer than 6 complete pairs"
