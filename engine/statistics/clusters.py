"""Cluster tests along the layers: runs of neighbouring layers that change in the same direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import xarray as xr
from scipy import stats

from engine.statistics.arrays import BLOCK_BYTES, Floats, count_reaching
from engine.statistics.bootstrap import FEWEST, INFORMATIVE, informative_pairs, resampled_t
from engine.statistics.pairing import paired_conditions
from engine.statistics.permutation import Patterns, enough_to_flip, normalised, t_squared
from engine.statistics.results import DEFAULTS, IMAGES, Cluster, Settings, finite

# As in `sign_flip`: masses that differ by rounding only count as equal. That of a t grows with t², so greater ones than
# this count as equal, too.
_TIE, _GREATEST_T = 1e-6, 1e4


@dataclass(frozen=True)
class Stretch:
    """Neighbouring layers of one line whose |t| passes the threshold with the same sign."""

    line: int
    first: int
    last: int
    mass: float  # Σ t over its layers; its sign is the direction
    p: float  # by how often the family's greatest mass reaches this one's
    floor: float  # least p attainable


def cluster_test(
    differences: Floats,
    *,
    cluster_alpha: float = 0.05,
    permutations: int = 9999,
    seed: int = 0,
    block_bytes: int = BLOCK_BYTES,
) -> list[Stretch]:
    """Test of clusters along the last axis of [unit, line, layer], family-wise over all clusters.

    The threshold, the critical value of a two-sided t-test at `cluster_alpha`, only decides what is called a cluster;
    the level is held whatever it is. The p-value is of the cluster as a whole: it does not say which of its layers
    changed, nor where exactly the change begins and ends. Lines (metrics, or heads) have no neighbours; a layer with
    too few pairs in a line (NaN is a missing pair) ends its clusters.

    The greatest mass under the null hypothesis comes from resampled images, studentised and each direction at half the
    level, as in `bootstrap_max_t`; from sign flips, as in `sign_flip`, where there are fewer than `FEWEST` units.

    Source:
        Maris and Oostenveld (2007), Journal of Neuroscience Methods 164:177–190.
    """
    n_units, n_lines, n_layers = differences.shape
    flat = differences.reshape(n_units, -1)
    units = (~np.isnan(flat)).any(axis=1)
    if not units.any():
        return []
    resampled = units.sum() >= FEWEST
    enough = informative_pairs(flat) >= INFORMATIVE if resampled else enough_to_flip((~np.isnan(flat)).sum(axis=0))
    flat = np.where(enough, flat, np.nan)[units]
    counts = (~np.isnan(flat)).sum(axis=0)
    threshold = stats.t.isf(cluster_alpha / 2, np.maximum(counts - 1, 1))

    def passing(t: Floats) -> Floats:
        """t [pattern, line, layer], 0 where it does not pass the threshold."""
        return np.where(np.abs(t) > threshold, t, 0.0).reshape(-1, n_lines, n_layers)

    z = normalised(flat)

    def flipped_t(signs: Floats) -> Floats:
        """t of Σ s·d / √Σd², [pattern, test]."""
        sums = signs @ z
        return np.copysign(np.sqrt(t_squared(sums, np.maximum(counts, 2))), sums)

    observed = passing(flipped_t(np.ones((1, len(z)))))[0]
    stretches = [
        (line, first, last, float(t[first : last + 1].sum()))
        for line, t in enumerate(observed)
        for first, last in _stretches(t)
    ]
    if not stretches:
        return []
    mass = np.array([stretch[-1] for stretch in stretches])
    compared = [_limited(observed[line, first : last + 1]).sum() for line, first, last, _ in stretches]
    limit = np.abs(compared) * (1 - _TIE)
    if resampled:
        drawn = resampled_t(flat, resamples=permutations, seed=seed, block_bytes=block_bytes)
        blocks = [_limited(passing(t)) for t in drawn]
        sides = [count_reaching([_greatest_mass(side * t) for t in blocks], limit) for side in (1.0, -1.0)]
        p = np.minimum(2 * (np.where(mass > 0, *sides) + 1) / (permutations + 1), 1.0)
        floor = 2 / (permutations + 1)
    else:
        patterns = Patterns(len(z), permutations, seed)
        rows = max(1, block_bytes // (8 * (z.shape[0] + 4 * z.shape[1])))
        flips = (_limited(passing(flipped_t(signs))) for signs in patterns.blocks(rows))
        greatest = [np.maximum(_greatest_mass(t), _greatest_mass(-t)) for t in flips]
        p, floor = patterns.p(count_reaching(greatest, limit)), patterns.floor
    return [Stretch(*stretch, float(value), floor) for stretch, value in zip(stretches, p, strict=True)]


def _limited(t: Floats) -> Floats:
    return np.clip(t, -_GREATEST_T, _GREATEST_T)


def _stretches(t: Floats) -> list[tuple[int, int]]:
    """First and last position of every run of nonzero elements of one sign."""
    runs = [(sign, list(run)) for sign, run in groupby(range(t.size), key=lambda layer: np.sign(t[layer]))]
    return [(run[0], run[-1]) for sign, run in runs if sign]


def _greatest_mass(t: Floats) -> Floats:
    """Greatest mass of rising layers over all lines, [pattern]; a running sum within a cluster ends as its mass."""
    greatest = np.zeros(t.shape[0])
    running = np.zeros(t.shape[:2])
    for layer in range(t.shape[2]):
        part = t[..., layer]
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
        for stretch in cluster_test(
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
