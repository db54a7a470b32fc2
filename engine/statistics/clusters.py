"""Cluster permutation along the layers: runs of neighbouring layers that change in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from engine.statistics.conditions import IMAGES
from engine.statistics.entries import number
from engine.statistics.pairing import check_table, existing_heads, other_conditions, paired_metrics
from engine.statistics.permutation import BLOCK_BYTES, normalised, sign_patterns, t_squared

Floats = NDArray[np.float64]

# As in `sign_flip`: masses that differ by rounding only count as equal.
_TIE = 1e-9


@dataclass(frozen=True)
class Cluster:
    """Neighbouring layers of one line whose |t| passes the threshold with the same sign.

    Attributes:
        line: position of the line.
        first, last: positions of its first and last layer.
        mass: Σ t over its layers; its sign is the direction.
        p: share of sign patterns in which the family's greatest |mass| reaches this one's.
        floor: least p attainable.
    """

    line: int
    first: int
    last: int
    mass: float
    p: float
    floor: float


def cluster_sign_flip(
    differences: Floats,
    *,
    cluster_alpha: float = 0.05,
    permutations: int = 9999,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> list[Cluster]:
    """Sign-flip test of clusters along the last axis, family-wise over all clusters of all lines.

    The threshold only decides what is called a cluster; the level is held whatever it is. The p-value is of the cluster
    as a whole: it does not say which of its layers changed, nor where exactly the change begins and ends.

    Args:
        differences: float64 [unit, line, layer]; NaN marks a missing pair. Lines (metrics, or heads) have no
            neighbours; a layer without a t in a line, with fewer than 2 pairs, ends its clusters.
        cluster_alpha: two-sided level of the t-test whose critical value is the threshold.
        permutations, seed, block_bytes: as in `sign_flip`.
    Returns:
        The clusters, line by line, in depth order.
    Source:
        Maris and Oostenveld (2007), Journal of Neuroscience Methods 164:177–190.
    """
    n_units, n_lines, n_layers = differences.shape
    flat = differences.reshape(n_units, -1)
    valid = ~np.isnan(flat)
    counts = valid.sum(axis=0)
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

    found = [
        (line, first, last, float(t[first : last + 1].sum()))
        for line, t in enumerate(signed_t(z.sum(axis=0, keepdims=True))[0])
        for first, last in _stretches(t)
    ]
    if not found:
        return []
    observed = np.abs([mass for *_, mass in found])
    limit = observed * (1 - _TIE)

    patterns = sign_patterns(int(units.sum()), permutations, seed)
    rows = max(1, block_bytes // (8 * (z.shape[0] + 4 * z.shape[1])))
    greatest = np.sort(np.concatenate([_greatest_mass(signed_t(signs @ z)) for signs in patterns.blocks(rows)]))
    p = patterns.p(greatest.size - np.searchsorted(greatest, limit, side="left"))
    return [Cluster(*cluster, float(value), patterns.floor) for cluster, value in zip(found, p, strict=True)]


def _stretches(t: Floats) -> list[tuple[int, int]]:
    """First and last position of every run of nonzero elements of one sign."""
    runs: list[tuple[int, int]] = []
    signs = np.sign(t)
    for position, sign in enumerate(signs):
        if sign == 0:
            continue
        if runs and runs[-1][1] == position - 1 and signs[position - 1] == sign:
            runs[-1] = runs[-1][0], position
        else:
            runs.append((position, position))
    return runs


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
    table: xr.Dataset,
    *,
    against: str = "baseline",
    metrics: Sequence[str] | None = None,
    permutations: int = 9999,
    cluster_alpha: float = 0.05,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Runs of neighbouring layers in which a metric changes, paired over images (seeds, then heads averaged).

    Layers are neighbours in depth order. Heads are averaged first: the same head number in two layers means nothing,
    so heads give clusters no neighbours. The family is all clusters of all metrics (and regions) of one condition.

    Args:
        table, against, metrics, permutations, seed: as in `compare_conditions`.
        cluster_alpha: as in `cluster_sign_flip`.
    Returns:
        One dict a cluster, ready for JSON; none where no layer passes the threshold.
    Raises:
        InputError: as `compare_conditions`.
    """
    names = check_table(table, against, metrics)
    table = table[names]
    layers = np.flatnonzero(existing_heads(table).any(axis=1))
    entries: list[dict[str, Any]] = []
    for condition in other_conditions(table, against):
        pairs = list(paired_metrics(table, condition, against, names))
        lines = np.stack([metric.image_differences()[:, layers] for metric in pairs], axis=1)
        for cluster in cluster_sign_flip(lines, cluster_alpha=cluster_alpha, permutations=permutations, seed=seed):
            metric = pairs[cluster.line]
            members = layers[cluster.first : cluster.last + 1]
            entries.append(
                {
                    "condition": condition,
                    "against": against,
                    **metric.identity(),
                    "unit_of_inference": IMAGES,
                    "family": f"{condition} against {against}, clusters along the layers: metric",
                    "family_size": len(pairs),
                    "cluster_alpha": cluster_alpha,
                    "layers": [int(table["layer"].values[i]) for i in members],
                    "direction": "higher" if cluster.mass > 0 else "lower",
                    "mass": number(cluster.mass),
                    "n": int(np.isfinite(lines[:, cluster.line, cluster.first : cluster.last + 1]).any(axis=1).sum()),
                    "p": cluster.p,
                    "p_floor": cluster.floor,
                    "degenerate": None if np.isfinite(cluster.mass) else "a layer whose differences are all equal",
                }
            )
    return entries
