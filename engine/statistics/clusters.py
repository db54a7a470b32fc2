"""Cluster permutation along the layers: runs of neighbouring layers that change in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import xarray as xr
from scipy import stats

from engine.statistics.arrays import BLOCK_BYTES, Floats, count_reaching
from engine.statistics.pairing import paired_conditions
from engine.statistics.permutation import Patterns, normalised, t_squared
from engine.statistics.results import DEFAULTS, IMAGES, Cluster, Settings, finite

# As in `sign_flip`: masses that differ by rounding only count as equal.
_TIE = 1e-9


@dataclass(frozen=True)
class Stretch:
    """Neighbouring layers of one line whose |t| passes the threshold with the same sign."""

    line: int
    first: int
    last: int
    mass: float  # Σ t over its layers; its sign is the direction
    p: float  # share of sign patterns in which the family's greatest |mass| reaches this one's
    floor: float  # least p attainable


def cluster_sign_flip(
    differences: Floats,
    *,
    cluster_alpha: float = 0.05,
    permutations: int = 9999,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> list[Stretch]:
    """Sign-flip test of clusters along the last axis of [unit, line, layer], family-wise over all clusters.

    The threshold, the critical value of a two-sided t-test at `cluster_alpha`, only decides what is called a cluster;
    the level is held whatever it is. The p-value is of the cluster as a whole: it does not say which of its layers
    changed, nor where exactly the change begins and ends. Lines (metrics, or heads) have no neighbours; a layer with
    fewer than 2 pairs in a line (NaN is a missing pair) ends its clusters.

    Source:
        Maris and Oostenveld (2007), Journal of Neuroscience Methods 164:177–190.
    """
    n_units, n_lines, n_layers = differences.shape
    flat = differences.reshape(n_units, -1)
    counts = (~np.isnan(flat)).sum(axis=0)
    flat = np.where(counts >= 2, flat, np.nan)
    units = (~np.isnan(flat)).any(axis=1)
    if not units.any():
        return []
    z = normalised(flat[units])
    threshold = stats.t.isf(cluster_alpha / 2, np.maximum(counts - 1, 1))

    def signed_t(sums: Floats) -> Floats:
        """t of Σ s·d / √Σd², 0 where it does not pass the threshold, [pattern, line, layer]."""
        t = np.sqrt(t_squared(sums, np.maximum(counts, 2)))
        t = np.where(t > threshold, np.copysign(t, sums), 0.0)
        result: Floats = t.reshape(-1, n_lines, n_layers)
        return result

    stretches = [
        (line, first, last, float(t[first : last + 1].sum()))
        for line, t in enumerate(signed_t(z.sum(axis=0, keepdims=True))[0])
        for first, last in _stretches(t)
    ]
    if not stretches:
        return []
    limit = np.abs([mass for *_, mass in stretches]) * (1 - _TIE)

    patterns = Patterns(int(units.sum()), permutations, seed)
    rows = max(1, block_bytes // (8 * (z.shape[0] + 4 * z.shape[1])))
    greatest = [_greatest_mass(signed_t(signs @ z)) for signs in patterns.blocks(rows)]
    p = patterns.p(count_reaching(greatest, limit))
    return [Stretch(*stretch, float(value), patterns.floor) for stretch, value in zip(stretches, p, strict=True)]


def _stretches(t: Floats) -> list[tuple[int, int]]:
    """First and last position of every run of nonzero elements of one sign."""
    runs = [(sign, list(run)) for sign, run in groupby(range(t.size), key=lambda layer: np.sign(t[layer]))]
    return [(run[0], run[-1]) for sign, run in runs if sign]


def _greatest_mass(t: Floats) -> Floats:
    """Greatest |mass| over all lines, [pattern]. Within a cluster the running sum only grows: its end is its mass."""
    greatest = np.zeros(t.shape[0])
    for direction in (1.0, -1.0):
        running = np.zeros(t.shape[:2])
        for layer in range(t.shape[2]):
            part = direction * t[..., layer]
            running = np.where(part > 0, running + part, 0.0)
            np.maximum(greatest, running.max(axis=1), out=greatest)
    return greatest


def layer_clusters(
    table: xr.Dataset, settings: Settings = DEFAULTS, metrics: Sequence[str] | None = None
) -> list[Cluster]:
    """Runs of neighbouring layers in which a metric changes, paired over images (seeds, then heads averaged).

    Layers are neighbours in depth order. Heads are averaged first: the same head number in two layers means nothing,
    so heads give clusters no neighbours. The family is all clusters of all metrics (and regions) of one condition.

    Args:
        table, settings, metrics: as in `compare_conditions`.
    Returns:
        One result per cluster; none where no layer passes the threshold.
    Raises:
        InputError: as `compare_conditions`.
    """
    clusters: list[Cluster] = []
    for paired in paired_conditions(table, settings.against, metrics):
        lines = np.stack([metric.image_differences()[:, paired.layers] for metric in paired.metrics], axis=1)
        for stretch in cluster_sign_flip(
            lines, cluster_alpha=settings.cluster_alpha, permutations=settings.permutations, seed=settings.seed
        ):
            within = slice(stretch.first, stretch.last + 1)
            clusters.append(
                Cluster(
                    **paired.metrics[stretch.line].identity,
                    unit_of_inference=IMAGES,
                    family=paired.family("clusters along the layers: metric"),
                    family_size=len(paired.metrics),
                    cluster_alpha=settings.cluster_alpha,
                    layers=tuple(paired.layer_ids[i] for i in paired.layers[within]),
                    direction="higher" if stretch.mass > 0 else "lower",
                    mass=finite(stretch.mass),
                    n=int(np.isfinite(lines[:, stretch.line, within]).any(axis=1).sum()),
                    p=stretch.p,
                    p_floor=stretch.floor,
                    degenerate=None if np.isfinite(stretch.mass) else "a layer whose differences are all equal",
                )
            )
    return clusters
