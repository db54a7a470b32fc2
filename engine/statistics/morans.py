"""Inference on Moran's I of single maps: is this map's spatial association more than chance?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import ndtr

from engine.statistics.arrays import BLOCK_BYTES, Floats

# As in `sign_flip`: deviations that differ by rounding only count as equal.
_TIE = 1e-10


@dataclass(frozen=True, kw_only=True)
class MoransInference:
    """Result of `morans_inference`; arrays have the leading shape of the maps.

    Attributes:
        morans_i: Moran's I; NaN for a constant map or one that holds NaN, as is all that follows from it.
        expectation: E[I] = −1/(N−1) without association: 0 is not the null.
        variance_normality: Var[I] where the values are independent draws of one normal distribution.
        variance_randomisation: Var[I] where the values at hand are in a random order over the patches.
        p_normality, p_randomisation: two-sided, of z = (I − E) / √Var.
        p_permutation: two-sided, (b + 1)/(B + 1) with b the permutations of the values whose |I − E| reaches the
            map's own; NaN where none were asked for.
        permutations: B.
    """

    morans_i: Floats
    expectation: float
    variance_normality: float
    variance_randomisation: Floats
    p_normality: Floats
    p_randomisation: Floats
    p_permutation: Floats
    permutations: int


def morans_inference(
    maps: Any, *, permutations: int = 999, seed: int = 0, block_bytes: int = BLOCK_BYTES
) -> MoransInference:
    """Moran's I of each map with its null distribution: rook neighbours, binary weights.

    The unit of inference is the patch of one map. Attention rows are no random fields, so nearly every map is
    "significant": this tells a map of noise from one that has structure, and says nothing of the difference between
    two models; for that, compare I over images (`compare_paired`).

    Args:
        maps: [..., row, col], any unit: rows of attention over the patches laid on the grid.
        permutations: random permutations of a map's values over its patches; 0 for none. All maps share them.
        seed: of the permutations.
        block_bytes: working memory.
    Raises:
        ValueError: fewer than 2 axes, or a grid of fewer than 4 patches, for which the variance under randomisation is
            not defined.
    Source:
        Cliff and Ord (1981), Spatial processes, §2.3; permuting the values, not one side of the weights, which doubles
        the false positives.
    """
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim < 2 or values.shape[-1] * values.shape[-2] < 4:
        raise ValueError(f"maps have the shape {values.shape}; expected [..., row, col] with at least 4 patches")
    shape, (rows, cols) = values.shape[:-2], values.shape[-2:]
    n = rows * cols
    degree = np.zeros((rows, cols))
    degree[:-1] += 1
    degree[1:] += 1
    degree[:, :-1] += 1
    degree[:, 1:] += 1
    s0 = float(degree.sum())
    # Binary symmetric weights: (w_ij + w_ji)² is 4, (w_i. + w_.i)² 4·deg².
    s1, s2 = 2 * s0, 4 * float((degree**2).sum())
    expectation = -1 / (n - 1)
    variance = (n**2 * s1 - n * s2 + 3 * s0**2) / ((n**2 - 1) * s0**2) - expectation**2

    flat = values.reshape(-1, n)
    with np.errstate(invalid="ignore"):
        defined = np.isfinite(flat).all(axis=1) & (flat.max(axis=1) > flat.min(axis=1))
    z = np.where(defined[:, None], flat, 0.0)
    z = z - z.mean(axis=1, keepdims=True)
    z /= np.where(defined, np.abs(z).max(axis=1), 1.0)[:, None]  # squares of small numbers vanish
    squares = np.where(defined, (z**2).sum(axis=1), 1.0)
    factor = n / s0 / squares
    morans_i = np.where(defined, factor * _cross(z.reshape(-1, rows, cols)), np.nan)
    b2 = n * (z**4).sum(axis=1) / squares**2
    randomised = (
        n * ((n**2 - 3 * n + 3) * s1 - n * s2 + 3 * s0**2) - b2 * ((n**2 - n) * s1 - 2 * n * s2 + 6 * s0**2)
    ) / ((n - 1) * (n - 2) * (n - 3) * s0**2) - expectation**2

    p_permutation = np.full(len(flat), np.nan)
    if permutations:
        generator = np.random.default_rng(seed)
        orders = np.stack([generator.permutation(n) for _ in range(permutations)])
        beyond = np.abs(morans_i - expectation)
        limit = np.maximum(beyond - _TIE * (1 + beyond), 0)
        step = max(1, block_bytes // (8 * permutations * n))
        for start in range(0, len(flat), step):
            part = slice(start, start + step)
            permuted = _cross(z[part][:, orders].reshape(-1, permutations, rows, cols))
            reached = (np.abs(factor[part, None] * permuted - expectation) >= limit[part, None]).sum(axis=1)
            p_permutation[part] = (reached + 1) / (permutations + 1)

    def shaped(result: Floats) -> Floats:
        return np.where(defined, result, np.nan).reshape(shape)

    def two_sided(var: Any) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return shaped(2 * ndtr(-np.abs(morans_i - expectation) / np.sqrt(var)))

    return MoransInference(
        morans_i=shaped(morans_i),
        expectation=expectation,
        variance_normality=variance,
        variance_randomisation=shaped(randomised),
        p_normality=two_sided(variance),
        p_randomisation=two_sided(np.maximum(randomised, 0)),
        p_permutation=shaped(p_permutation),
        permutations=permutations,
    )


def _cross(z: Floats) -> Floats:
    """Σ_ij w_ij z_i z_j of maps [..., row, col]: every pair of neighbours twice."""
    down = np.einsum("...rc,...rc->...", z[..., :-1, :], z[..., 1:, :])
    across = np.einsum("...rc,...rc->...", z[..., :-1], z[..., 1:])
    result: Floats = 2 * (down + across)
    return result
