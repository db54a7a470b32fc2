"""Metrics as users bring them, sound and broken: `tests.own_metrics:peak`."""

from __future__ import annotations

import numpy as np

from kernels import MetricSpec, TokenLayout


def greatest(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """The greatest weight of each patch query's row, [batch, patch query]."""
    return np.asarray(layout.patches(p).max(axis=-1))


def over_the_batch(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """One value for all maps of a call, which is none for each."""
    return np.asarray([p.max()])


peak = MetricSpec("own.peak", "1", "rows", greatest)
batched = MetricSpec("own.batched", "1", "rows", over_the_batch)
