"""Least and greatest values that metrics can take on a layout."""

from __future__ import annotations

import functools
import math

import numpy as np

from kernels.layout import TokenLayout


def farthest(layout: TokenLayout) -> float:
    """From corner to corner, patch centres, in image diagonals."""
    return float(layout.distances().max())


def share(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, 1.0


def entropy(layout: TokenLayout) -> tuple[float, float]:
    return 0.0, float(np.log(layout.num_patches))


def greatest_entropy_of_part(layout: TokenLayout) -> float:
    """−ΣP ln P of a row of mass s ≤ 1 is at most s ln(N/s), greatest at s = 1, or at N/e where that is less (N = 2)."""
    mass = min(1.0, layout.num_patches / math.e)
    return float(mass * np.log(layout.num_patches / mass))


def morans_i(layout: TokenLayout) -> tuple[float, float]:
    least, greatest, _, _ = _rook_spectrum(layout.grid_rows, layout.grid_cols)
    factor = layout.num_patches / (2 * layout.num_edges)
    return factor * least, factor * greatest


def morans_i_or_zero(layout: TokenLayout) -> tuple[float, float]:
    least, greatest = morans_i(layout)
    return min(least, 0.0), max(greatest, 0.0)


def gearys_c(layout: TokenLayout) -> tuple[float, float]:
    _, _, least, greatest = _rook_spectrum(layout.grid_rows, layout.grid_cols)
    factor = (layout.num_patches - 1) / (2 * layout.num_edges)
    return factor * least, factor * greatest


@functools.lru_cache(maxsize=64)
def _rook_spectrum(grid_rows: int, grid_cols: int) -> tuple[float, float, float, float]:
    """Least and greatest eigenvalue of the rook weights W and of the Laplacian D − W, both without the constant.

    For z ⟂ 1 the ratios zᵀWz / zᵀz and zᵀ(D − W)z / zᵀz lie between these and reach them.
    """
    n = grid_rows * grid_cols
    index = np.arange(n).reshape(grid_rows, grid_cols)
    weights = np.zeros((n, n))
    for one, other in ((index[:-1], index[1:]), (index[:, :-1], index[:, 1:])):
        weights[one.ravel(), other.ravel()] = weights[other.ravel(), one.ravel()] = 1.0
    laplacian = np.diag(weights.sum(axis=1)) - weights
    # An orthonormal basis whose first vector is the constant one; the others span the centred maps.
    basis = np.linalg.qr(np.column_stack((np.ones(n), np.eye(n)[:, 1:])))[0][:, 1:]
    w, lap = (np.linalg.eigvalsh(basis.T @ matrix @ basis) for matrix in (weights, laplacian))
    return float(w[0]), float(w[-1]), float(lap[0]), float(lap[-1])
