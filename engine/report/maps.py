"""The page's layer × head maps: a test for every cell, its differences by image, and its pairs of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from engine.report import text
from engine.report.findings import Change, PairFindings, opening
from engine.report.inputs import Results
from engine.report.viewer import deflated
from engine.statistics import PairedTest, defined_mean

HISTOGRAM_BINS = 24
SCATTER_IMAGES = 256
SCATTER_BUDGET = 1_500_000
"""Bytes of all paired values before deflating: a 12 × 12 model, six metrics and three conditions have 256 images."""
MARKS = {"different": "●", "negligible": "○", "equivalent": "≈", "undecided": ""}
"""What stands in a cell, by its verdict."""
LEVELS = 255
"""Values of a cell are kept as 0 to 254 of its range; 255 is missing."""


def maps_payload(results: Results, comparisons: Sequence[PairFindings]) -> Iterator[dict[str, Any]]:
    """One entry per metric (and region), with a grid of tests for every comparison and the values behind the cells.

    Where the page opens, `open` is the cell's [layer, head] as positions, the mean over heads behind the heads.
    """
    shown, first = scatter_images(results), opening(results, comparisons)
    for metric, region in results.series():
        values = _by_cell(results, metric, region)
        grids = []
        for comparison in comparisons:
            condition, against = (results.conditions.index(name) for name in (comparison.condition, comparison.against))
            for change in comparison.changes:
                if (change.metric, change.region) == (metric, region):
                    cells = _cells(results, change, values[condition] - values[against])
                    grids.append({"condition": condition, "against": against, "cells": cells})
        if grids:
            opens = first is not None and (first.metric, first.region) == (metric, region)
            yield {
                "open": _place(results, first) if first is not None and opens else None,
                "metric": metric,
                "region": region,
                "label": results.heading(metric, region),
                "unit": results.unit(metric),
                "grids": grids,
                "pairs": _packed(values[:, shown]),
            }


def scatter_images(results: Results) -> list[int]:
    """Positions of the images whose values the page holds: those with kept maps, then seeded ones, as many as fit."""
    images = [str(name) for name in results.table["image"].values]
    cells = len(results.layers) * (len(results.heads) + 1) * len(results.conditions)
    series = max(1, sum(1 for _ in results.series()))
    most = min(len(images), SCATTER_IMAGES, max(16, SCATTER_BUDGET // (cells * series)))
    kept = dict.fromkeys(results.samples.ids) if results.samples else {}
    first = [images.index(name) for name in kept if name in set(images)][:most]
    others = [int(i) for i in np.random.default_rng(0).permutation(len(images)) if i not in set(first)]
    return sorted(first + others[: most - len(first)])


def _by_cell(results: Results, metric: str, region: str | None) -> np.ndarray:
    """[condition, image, layer, head + 1]: means over seeds, and behind the heads their mean."""
    table = results.table[metric] if region is None else results.table[metric].sel(region=region)
    values = table.transpose("condition", "seed", "image", "layer", "head").values.astype(np.float64)
    by_head = defined_mean(values, (1,))
    return np.concatenate([by_head, defined_mean(by_head, (3,))[..., None]], axis=3)


def _cells(results: Results, change: Change, paired: np.ndarray) -> list[list[dict[str, Any] | None]]:
    """[layer][head] of the head-level tests, then one of layer-level ones; `paired`: [image, layer, head + 1]."""
    heads = len(results.heads)
    cells: list[list[dict[str, Any] | None]] = [[None] * (heads + 1) for _ in results.layers]
    for test in (*change.heads, *change.layers):
        row, column = _place(results, test)
        cells[row][column] = _cell(results, test, paired[:, row, column])
    return cells


def _place(results: Results, test: PairedTest) -> tuple[int, int]:
    """Row and column of a test of a layer or head; the mean over heads stands behind the heads."""
    assert test.layer is not None, "heads and layers have one"
    column = len(results.heads) if test.head is None else results.heads.index(test.head)
    return results.layers.index(test.layer), column


def _cell(results: Results, test: PairedTest, differences: np.ndarray) -> dict[str, Any]:
    cell = {
        "d": _round(test.difference),
        "ci": [_round(edge) for edge in test.ci or (None, None)],
        "all": [_round(edge) for edge in test.ci_simultaneous or (None, None)],
        "dz": _round(test.dz),
        "p": _round(test.p_max_t),
        "a": _round(test.mean_against, text.MOST_DIGITS),
        "b": _round(test.mean_condition, text.MOST_DIGITS),
        "mde": _round(test.mde),
        "n": test.n,
        "missing": test.missing,
        "verdict": test.verdict(results.alpha),
        "note": test.degenerate or "",
        "hist": _histogram(differences),
    }
    if test.tost_bound is not None:
        cell["bound"] = _round(test.tost_bound)
    return cell


def _histogram(differences: np.ndarray) -> dict[str, Any] | None:
    """Counts of the paired differences over images, over a range that includes 0; None where there is nothing."""
    known = differences[np.isfinite(differences)]
    low, high = float(known.min(initial=0.0)), float(known.max(initial=0.0))
    if low == high:
        return None
    counts, _ = np.histogram(known, bins=HISTOGRAM_BINS, range=(low, high))
    return {"low": _round(low), "high": _round(high), "counts": [int(count) for count in counts]}


def _packed(values: np.ndarray) -> str:
    """Values [condition, image, layer, head + 1] for the scatter plots, deflated, as base64.

    float32 [layer, head + 1] of each cell's least and of its greatest value over all conditions, then uint8
    [layer, head + 1, condition, image].
    """
    known = np.isfinite(values)
    low = values.min(axis=(0, 1), initial=np.inf, where=known)
    high = values.max(axis=(0, 1), initial=-np.inf, where=known)
    low, high = np.where(np.isfinite(low), low, 0.0), np.where(np.isfinite(high), high, 0.0)
    spread = np.where(high > low, high - low, 1.0)
    fractions = (np.where(known, values, low) - low) / spread
    steps = np.where(known, np.rint((LEVELS - 1) * fractions), LEVELS).astype(np.uint8)
    content = low.astype("<f4").tobytes() + high.astype("<f4").tobytes() + steps.transpose(2, 3, 0, 1).tobytes()
    return deflated(content)


def _round(value: float | None, digits: int = 6) -> float | None:
    """Six significant digits: more than a reader needs, fewer bytes; means need more, to show their difference."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.{digits}g}")
