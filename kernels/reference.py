"""The definitions: float64 NumPy that reads like the formulas. Every backend is held to these.

Each metric takes full post-softmax rows `p`, float64 [batch, query, key] with the prefix tokens included, and the
`TokenLayout` that says where the patches are. Row metrics return [batch, patch query]; metrics of a whole map
return [batch]; `region_mass` returns [batch, region]. A row or map without a value is NaN. An invalid row arrives
as a row of NaN and is left out in the same way.
"""

from __future__ import annotations

import numpy as np

from kernels.layout import TokenLayout

__all__ = [
    "RECEIVED_SPREAD",
    "class_row",
    "cls_entropy",
    "cls_morans_i",
    "distance",
    "entropy",
    "entropy_normalized",
    "gearys_c",
    "gini",
    "morans_i",
    "morans_i_received",
    "prefix_mass",
    "received_map",
    "region_mass",
    "renormalised",
    "softmax_rows",
]

# A received map whose greatest and least value differ by less than this share of their mean is constant. Rounding of
# float32 rows alone leaves about 1e-7; the order of a sum would decide whether such a map has a Moran's I.
RECEIVED_SPREAD = 1e-5


def softmax_rows(query: np.ndarray, key: np.ndarray, scale: float, bias: np.ndarray | None) -> np.ndarray:
    """Post-softmax attention softmax(scale · q·kᵀ + bias).

    Args:
        query, key: float64 [batch, token, head_dim].
        scale: factor of q·k.
        bias: float64, added to the logits, [batch, query, key]; −inf hides a key.

    Returns:
        float64 [batch, query, key]; a row whose logits hold NaN or +inf, or are all −inf, is NaN.
    """
    logits = scale * (query @ key.swapaxes(-1, -2))
    if bias is not None:
        logits = logits + bias
    with np.errstate(invalid="ignore"):
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def renormalised(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """p_qk = A_qk / Σ_k' A_qk' over patches, [batch, patch query, patch]; NaN where the patches sum to 0."""
    return _over_sum(layout.patches(p))


def received_map(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """The mean of the renormalised rows over patch queries, [batch, patch]; undefined rows are left out."""
    rows = renormalised(p, layout)
    defined = np.isfinite(rows[..., :1])
    total = np.where(defined, rows, 0.0).sum(axis=-2)
    count = defined.sum(axis=-2)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def class_row(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """The class token's row renormalised over the patches, [batch, patch]; ValueError without a class token."""
    return _over_sum(layout.class_row(p))


def distance(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ_k p_qk ‖c_q − c_k‖ / √(H² + W²), in image diagonals; [batch, patch query]."""
    return np.asarray(np.einsum("bqk,qk->bq", renormalised(p, layout), layout.distances()))


def entropy(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """−Σ_k p_qk ln p_qk in nat, with 0 ln 0 = 0; [batch, patch query]."""
    return _entropy(renormalised(p, layout))


def entropy_normalized(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`entropy` / ln(R·C), so that uniform attention is 1 on every grid; [batch, patch query]."""
    return np.asarray(entropy(p, layout) / np.log(layout.num_patches))


def morans_i(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of each row laid on the grid, rook neighbours, binary weights; [batch, patch query]."""
    return _morans_i(renormalised(p, layout), layout)


def morans_i_received(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of the received-attention map; [batch]. A map that varies by rounding alone is constant: NaN."""
    received = received_map(p, layout)
    spread = received.max(axis=-1) - received.min(axis=-1)
    varies = spread > RECEIVED_SPREAD * received.mean(axis=-1)
    return np.where(varies, _morans_i(received, layout), np.nan)


def gearys_c(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """(N−1)/(2 S0) Σ_ij w_ij (x_i − x_j)² / Σ z_i² of each row, weights as for Moran's I; [batch, patch query]."""
    x = renormalised(p, layout)
    z = x - x.mean(axis=-1, keepdims=True)
    down, right = _neighbour_pairs(x, layout)
    edges = sum(((a - b) ** 2).sum(axis=(-2, -1)) for a, b in (down, right))  # each edge once: half of Σ_ij
    s0 = 2 * layout.num_edges
    return _unless_constant(x, (layout.num_patches - 1) / (2 * s0) * 2 * edges, (z**2).sum(axis=-1))


def gini(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Gini coefficient Σ_i (2i − N − 1) p_(i) / (N Σ p), p_(1) ≤ … ≤ p_(N); [batch, patch query]."""
    ordered = np.sort(renormalised(p, layout), axis=-1)
    n = layout.num_patches
    rank = 2 * np.arange(1, n + 1) - n - 1
    return np.asarray(ordered @ rank / n)


def prefix_mass(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ over prefix keys of A_qk, not renormalised; [batch, patch query]."""
    invalid = np.isnan(layout.patches(p)).any(axis=-1)  # without prefix keys the sum alone would not tell
    return np.where(invalid, np.nan, layout.prefix(p).sum(axis=-1))


def cls_entropy(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`entropy` of the class token's row over patches; [batch]."""
    return _entropy(class_row(p, layout))


def cls_morans_i(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of the class token's row over patches; [batch]."""
    return _morans_i(class_row(p, layout), layout)


def region_mass(p: np.ndarray, layout: TokenLayout, regions: np.ndarray) -> np.ndarray:
    """Mass that the class token (without one: the mean patch query) puts in each region; [batch, region].

    Args:
        regions: coverage of each patch by each region, 0 to 1, [batch, region, patch].
    """
    row = class_row(p, layout) if layout.class_token else received_map(p, layout)
    return np.asarray(np.einsum("bk,brk->br", row, regions))


def _over_sum(rows: np.ndarray) -> np.ndarray:
    """Rows [..., patch] divided by their sum; NaN where the sum is 0."""
    total = rows.sum(axis=-1, keepdims=True)
    return np.where(total > 0, rows / np.where(total > 0, total, 1.0), np.nan)


def _entropy(rows: np.ndarray) -> np.ndarray:
    logs = np.log(np.where(rows > 0, rows, 1.0))
    return np.asarray(0.0 - (rows * logs).sum(axis=-1))  # 0 − 0 is 0; −(0) would be −0


def _morans_i(x: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """(N/S0) Σ_ij w_ij z_i z_j / Σ z_i² of maps [..., patch]."""
    z = x - x.mean(axis=-1, keepdims=True)
    down, right = _neighbour_pairs(z, layout)
    cross = sum((a * b).sum(axis=(-2, -1)) for a, b in (down, right))  # each edge once: half of Σ_ij
    s0 = 2 * layout.num_edges
    return _unless_constant(x, layout.num_patches / s0 * 2 * cross, (z**2).sum(axis=-1))


def _neighbour_pairs(x: np.ndarray, layout: TokenLayout) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Both ends of every rook edge of maps [..., patch]: (upper, lower) and (left, right)."""
    grid = x.reshape(*x.shape[:-1], layout.grid_rows, layout.grid_cols)
    return (grid[..., :-1, :], grid[..., 1:, :]), (grid[..., :, :-1], grid[..., :, 1:])


def _unless_constant(x: np.ndarray, numerator: np.ndarray, sum_sq: np.ndarray) -> np.ndarray:
    """numerator / sum_sq, NaN where x is constant: Σz² can round above 0 there, equality cannot."""
    varies = x.max(axis=-1) != x.min(axis=-1)
    return np.where(varies, numerator / np.where(varies, sum_sq, 1.0), np.nan)
