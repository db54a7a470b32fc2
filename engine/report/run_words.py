"""Sentences about training runs: what tests speak of, and how far runs of one condition lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_low

from engine.report import text
from engine.report.findings import PairFindings, training_runs
from engine.report.inputs import Results

_IN_COMMON = (
    "All training runs begin with the same pretrained weights and are trained on the same images: nothing here says "
    "what another pretrained checkpoint or other training images would give."
)
_IN_COMMON_BUT_THE_SPLIT = (
    "All training runs begin with the same pretrained weights, so nothing here says what another pretrained checkpoint "
    "would give; each seed drew its own training and validation images, out of all but the test images."
)


def scope_sentences(results: Results, comparisons: Sequence[PairFindings]) -> tuple[str, ...]:
    """What the tests speak of: a sentence for all pairs of which the same holds; what runs share."""
    groups: dict[int, list[PairFindings]] = {}
    for comparison in comparisons:
        groups.setdefault(comparison.runs, []).append(comparison)
    said = [_scope(results.alpha, runs, members) for runs, members in groups.items()]
    split = results.document.data.get("training_split")  # missing where nothing is trained
    if split is not None and any(runs > 1 for runs in groups):
        said.append(_IN_COMMON if split == "fixed" else _IN_COMMON_BUT_THE_SPLIT)
    return tuple(said)


def _scope(alpha: float, runs: int, members: Sequence[PairFindings]) -> str:
    if runs > 1:
        flips = (
            "Seed-level tests (sign flips) do not, and speak of training runs like these on these very images."
            if members[0].speaks_of_runs
            else f"{runs} training runs are too few for a seed-level test at {alpha:g} (an exact sign flip needs "
            f"{members[0].runs_needed})."
        )
        return (
            f"{runs} training runs of {text.listing([member.condition for member in members])} were paired. "
            "Image-level tests speak of these checkpoints and images like these. Tests over runs and images speak of "
            f"training runs and images like these, and take what runs differ by to be normal. {flips}"
        )
    pairs = "; ".join(f"{member.condition} and {member.against}" for member in members)
    said = f"What is said of {pairs}"
    if len(members) > 1:
        said = f"Each comparison is of two checkpoints ({pairs}): what is said of a pair"
    return (
        f"{said} holds for these two checkpoints and the kind of image they were given. Another training run would "
        "give other numbers, and nothing here says how different."
    )


def control_sentence(results: Results, condition: str) -> str:
    """How much of two runs of one condition differs by the test that is made of conditions; "" with one run."""
    controls = [control for control in results.document.run_controls if control.condition == condition]
    if not controls:
        return ""
    cells, layers = ([getattr(control, name) for control in controls] for name in ("cells_differ", "layers_differ"))
    said = (
        f"Two training runs of {condition} differ in {median_low(cells)} of {max(c.cells for c in controls)} cells and "
        f"{median_low(layers)} of {max(c.layers for c in controls)} layer means"
    )
    if len(controls) > 1:
        pairs = math.comb(training_runs(results, condition), 2)
        first = "" if pairs == len(controls) else f"the first {len(controls)} of "
        said += f" (medians over {first}{pairs} pairs; {min(cells)} to {max(cells)} cells)"
    return f"{said} by max-T over images, as conditions are tested."


def spread_sentence(comparison: PairFindings) -> str:
    """How far the difference of one run lies from that of another, beside the difference; "" with one run."""
    spread = comparison.spread
    if spread is None or spread.ratio is None:
        return ""
    cells = text.count(spread.cells, "cell")
    return (
        f"Two runs lie {text.number(spread.ratio, 2)} times as far apart as {comparison.condition} and "
        f"{comparison.against} (median over {cells}), and further apart in {spread.cells_wider} of these. In "
        f"{spread.cells_opposite} the difference does not have the same sign in every run."
    )


def crossed_sentence(results: Results, comparison: PairFindings, by: bool = True) -> str:
    """What survives over training runs and images like these, and `by` what test; "" where that was not tested."""
    counts = []
    for level, name in (("layer", "layer means"), ("head", "cells")):
        tests = [test for test in comparison.crossed if test.level == level and test.p is not None]
        if tests:
            counts.append(f"{text.share(sum(t.survives(results.alpha) for t in tests), len(tests))} {name}")
    if not counts:
        return ""
    said = (
        f"Over {text.count(comparison.runs, 'training run')} and {text.count(comparison.n, 'image')} like these, "
        f"{' and '.join(counts)} of {comparison.pair} are shown to differ at α = {results.alpha:g}"
    )
    how = " (runs and images crossed, moderated t, Holm; layer means and cells each an exploratory family)"
    return f"{said}{how if by else ''}."


def runs_sentence(results: Results, comparison: PairFindings) -> str:
    """What must be read beside the tests over images: what two runs differ by, and what holds over runs; or ""."""
    control = control_sentence(results, comparison.condition)
    return " ".join(filter(None, (control, crossed_sentence(results, comparison, by=False))))


def seed_sentence(results: Results, comparison: PairFindings) -> str:
    """What the tests over training runs, on these images, say; "" where there are none, or too few runs for them."""
    if not comparison.speaks_of_runs:
        return ""
    tests = comparison.seed_tests
    survived = [test for test in tests if test.survives(results.alpha)]
    return (
        f"Over {text.count(comparison.runs, 'training run')} with these very test images, "
        f"{text.share(len(survived), len(tests))} seed-level tests of {comparison.pair} "
        f"survive{'s' if len(survived) == 1 else ''} at α = {results.alpha:g} (sign flips of whole runs)."
    )
