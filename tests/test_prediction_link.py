"""Changes of heads and of the prediction, image by image: what goes together beyond where both start, and its words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

from engine.relevance import PredictionLink, prediction_link
from engine.report.sections.relevance import _link

Floats = NDArray[np.float64]
DIMS = ("condition", "seed", "image", "layer", "head")


def table_of(values: Floats, **others: Any) -> xr.Dataset:
    """Entropy of baseline and finetuned, [condition, seed, image, layer, head]."""
    layers = np.arange(values.shape[3])
    return xr.Dataset(
        {"entropy": (DIMS, values, {"units": "nat"}), **others},
        coords={
            "condition": ["baseline", "finetuned"],
            "seed": np.arange(values.shape[1]),
            "layer": layers,
            "site": ("layer", [f"blocks.{layer}.attn" for layer in layers]),
            "head": np.arange(values.shape[4]),
            "seed_invariant": ("condition", [True, False]),
        },
    )


def linked(
    table: xr.Dataset, logits: Mapping[str, Floats], labels: Any, permutations: int = 199
) -> list[PredictionLink]:
    places = labels if isinstance(labels, dict) else dict.fromkeys(logits, labels)
    return prediction_link(table, logits, places, against="baseline", permutations=permutations, seed=0)


def said(*links: PredictionLink, unpaired: str = "") -> list[str]:
    measured: Any = SimpleNamespace(document=SimpleNamespace(link=links))
    results: Any = SimpleNamespace(alpha=0.05, unpaired_note=lambda condition: unpaired)
    return list(_link(results, measured))


def random_study(
    seed: int = 0, images: int = 80, classes: int = 4
) -> tuple[Floats, dict[str, Floats], NDArray[np.int64]]:
    """Values [condition, seed, image, layer, head], logits and labels that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    logits = {name: rng.standard_normal((images, classes)) for name in ("baseline", "finetuned")}
    return rng.standard_normal((2, 1, images, 3, 2)), logits, rng.integers(classes, size=images)


def test_the_head_that_goes_with_the_logit_is_found() -> None:
    values, logits, labels = random_study()
    images = np.arange(len(labels))
    rose = logits["finetuned"][images, labels] - logits["baseline"][images, labels]
    values[1, 0, :, 2, 1] = values[0, 0, :, 2, 1] + rose
    shares = np.random.default_rng(1).random((*values.shape, 2))
    table = table_of(values, region_mass=((*DIMS, "region"), shares, {"units": "1"})).assign_coords(region=["a", "b"])
    entries = linked(table, logits, labels)
    assert [entry.outcome for entry in entries] == ["logit", "correct"]
    tests = entries[0].tests
    assert len(tests) == entries[0].family_size == 18
    assert {test.metric for test in tests} == {"entropy", "region_mass[a]", "region_mass[b]"}
    best = max(tests, key=lambda test: abs(test.rho or 0))
    assert (best.metric, best.layer, best.head) == ("entropy", 2, 1)
    assert best.rho == pytest.approx(best.rho_raw) == pytest.approx(1.0)
    assert best.p_max_r == 1 / 200
    assert (best.n, best.df) == (80, 80 - 4 - 2 * 4 - 4 - 1)
    # The same logits with the baseline's columns in another order, and without one class.
    order = np.array([2, 0, 3, 1])
    turned = {"baseline": logits["baseline"][:, order], "finetuned": logits["finetuned"]}
    places = {"baseline": np.argsort(order)[labels], "finetuned": np.where(labels == 1, -1, labels)}
    (entry, _) = linked(table, turned, places)
    assert entry.images == (labels != 1).sum()
    best = max(entry.tests, key=lambda test: abs(test.rho or 0))
    assert (best.metric, best.layer, best.head, best.df) == ("entropy", 2, 1, entry.images - 3 - 2 * 3 - 4 - 1)
    others = table.assign(bits=table["entropy"] / np.log(2)).assign_attrs(conventions='["bits"]')
    assert linked(others, logits, labels) == entries, "other conventions of a metric are not tested"
    assert linked(table, {"finetuned": logits["finetuned"]}, labels) == []
    assert linked(table, logits, np.full(80, -1)) == []


def test_runs_are_paired_with_the_only_run_of_a_condition_that_no_seed_changes() -> None:
    """The baseline is stored once; a run's value that is missing is missing in the mean."""
    values, logits, labels = random_study()
    once = linked(table_of(values), logits, labels)
    runs = np.repeat(values, 2, axis=1)
    runs[1, 0] += 0.25
    runs[1, 1] -= 0.25
    runs[0, 1] = np.nan
    several = linked(table_of(runs), logits, labels)
    assert [test.rho for test in several[0].tests] == pytest.approx([test.rho for test in once[0].tests])
    runs[1, 1, 7] = np.nan
    assert {test.n for test in linked(table_of(runs), logits, labels)[0].tests} == {79}


def mean_reverting(seed: int, images: int = 400) -> tuple[Floats, dict[str, Floats], NDArray[np.int64]]:
    """Values and the true class's logits that share where they start, and nothing afterwards."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=images)
    common = rng.standard_normal((images, 1, 1))
    values = rng.standard_normal((2, 1, images, 3, 2))
    values[0, 0] = 0.9 * common + np.sqrt(1 - 0.9**2) * values[0, 0]
    logits = {name: rng.standard_normal((images, 4)) for name in ("baseline", "finetuned")}
    logits["baseline"][np.arange(images), labels] = 2 * common[:, 0, 0] + 0.5 * rng.standard_normal(images)
    logits["finetuned"][np.arange(images), labels] += 2
    return values, logits, labels


def test_what_follows_from_where_both_start_does_not_go_together() -> None:
    """Raw correlations are large in every cell, of the logit and of being right; adjusted ones are left to chance."""
    surviving = 0
    for seed in range(12):
        values, logits, labels = mean_reverting(seed)
        for entry in linked(table_of(values), logits, labels):
            assert min(test.rho_raw or 0 for test in entry.tests) > 0.15
            assert entry.rho_start is not None
            assert entry.rho_start < -0.5
            assert max(abs(test.rho or 0) for test in entry.tests) < 0.2
            surviving += sum(test.survives(0.05) for test in entry.tests)
    assert surviving <= 4, "of 24 families at 5 %"


def test_being_right_is_compared_among_those_that_were_right_and_those_that_were_not() -> None:
    """Strata of one image, here of a class's only right one, say nothing and are counted."""
    values, logits, labels = random_study()
    for name in logits:
        logits[name] = np.full((80, 4), -1.0)
        logits[name][np.arange(80), (labels + 1) % 4] = 0.0
    right = {"baseline": np.arange(80) % 3 == 0, "finetuned": np.arange(80) % 2 == 0}
    right["baseline"][labels == 3] = np.arange((labels == 3).sum()) == 0
    for name, those in right.items():
        logits[name][those, labels[those]] = 1.0
    (_, entry) = linked(table_of(values), logits, labels)
    assert entry.alone == 1
    sizes = np.unique(2 * labels + right["baseline"], return_counts=True)[1]
    slopes = (sizes >= 6).sum() + (sizes[sizes < 6] > 1).any()
    assert {test.df for test in entry.tests} == {80 - 8 - slopes - 2 - 1}, "the logit is fixed by class and being right"
    assert (
        "Nothing is said by 1 image without another of its class that was right, or wrong, as well." in said(entry)[1]
    )


def test_what_cannot_be_tested_is_counted_and_said() -> None:
    values, logits, labels = random_study()
    values[:, :, :, 0, 0] = 1.0  # varies nowhere
    values[:, :, 10:, 0, 1] = np.nan  # too few images
    entry = linked(table_of(values), logits, labels)[0]
    assert [test.rho is None for test in entry.tests] == [True, True, False, False, False, False]
    assert [test.n for test in entry.tests[:3]] == [80, 10, 80]
    assert entry.family_size == 4
    assert "No test in 2 cells, where too few images are left or nothing varies." in said(entry)[1]
    alone = linked(table_of(values), {name: np.eye(80) for name in logits}, np.arange(80))[0]
    assert alone.family_size == 0
    assert alone.alone == 80
    assert said(alone) == [
        "finetuned against baseline: the change of the true class's logit cannot be tested: class and values in "
        "baseline leave too few of 80 images, or nothing of one of the two changes."
    ]


def test_the_adjusted_correlation_leads_and_the_raw_one_is_labelled() -> None:
    values, logits, labels = mean_reverting(0)
    entry = linked(table_of(values), logits, labels)[0]
    first = replace(entry.tests[0], rho=0.31, rho_raw=-0.125, p_max_r=0.002)
    introduction, sentence = said(replace(entry, tests=(first, *entry.tests[1:]), rho_start=-0.75))
    assert "raw ρ of two changes hold that regression to the mean and are not tested" in introduction
    assert "associations over images of these checkpoints" in introduction
    assert sentence == (
        "finetuned against baseline: the change of the true class's logit goes with the change of a head's metric in 1 "
        "of 6 metric × layer × head cells (400 images, max-|ρ| over 199 permutations); the greatest of these in "
        "entropy, layer 0, head 0: adjusted ρ = +0.310, p 0.002; raw ρ = −0.125. With the true class's logit in "
        "baseline itself that change goes at ρ = −0.750."
    )
    nothing = said(replace(entry, tests=tuple(replace(test, p_max_r=0.5) for test in entry.tests)))[1]
    assert "in none of 6" in nothing
    assert "the greatest ρ in" in nothing
    assert "whose heads are not paired: see the limits (400 images" in said(entry, unpaired="Heads of …")[1]
