"""The definitions: float64 NumPy that reads like the formulas. Every backend is held to these.

Each metric takes full post-softmax rows `p`, float64 [batch, query, key] with the prefix tokens included, and the
`TokenLayout` that says where the patches are. Row metrics return [batch, patch query]; metrics of a whole map
return [batch]; `region_mass` returns [batch, region]. A row or map without a value is NaN. An invalid row arrives
as a row of NaN and is left out in the same way. A pair metric takes the same maps in a second condition as well.
"""

from __future__ import annotations

import numpy as np

from kernels.layout import TokenLayout

# A received map whose greatest and least value differ by less than this share of their mean is constant. Rounding of
# float32 rows alone leaves about 1e-7; the order of a sum would decide whether such a map has a Moran's I.
RECEIVED_SPREAD = 1e-5

# The constants of the `seed1` convention: what is added inside the logarithm, and the Σz² up to which I is set to 0.
SEED1_LOG_OFFSET = 1e-12
SEED1_LEAST_SUM_SQ = 1e-8


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


def extent_px(layout: TokenLayout) -> float:
    """From the first to the last patch centre along the longer side of the image; the unit of `distance_walmer`."""
    down = (layout.grid_rows - 1) * layout.patch_height_px
    across = (layout.grid_cols - 1) * layout.patch_width_px
    return float(max(down, across))


def distance_px(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ_k A_qk ‖c_q − c_k‖ in pixels, over patch keys, not renormalised; [batch, patch query]."""
    return np.asarray(np.einsum("bqk,qk->bq", layout.patches(p), layout.distances() * layout.diagonal_px))


def distance_walmer(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ_k p_qk ‖c_q − c_k‖ with the grid's longer side, first to last patch centre, as 1; [batch, patch query].

    On a square grid of square patches that is the distance in grid steps divided by g − 1.
    """
    return np.asarray(distance(p, layout) * layout.diagonal_px / extent_px(layout))


def distance_seed1(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`distance_px` / √(H² + W²), not renormalised; [batch, patch query].

    On a square grid of square patches that is the distance in grid steps divided by √2·g.
    """
    return np.asarray(distance_px(p, layout) / layout.diagonal_px)


def entropy(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """−Σ_k p_qk ln p_qk in nat, with 0 ln 0 = 0; [batch, patch query]."""
    return _entropy(renormalised(p, layout))


def entropy_normalized(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`entropy` / ln(R·C), so that uniform attention is 1 on every grid; [batch, patch query]."""
    return np.asarray(entropy(p, layout) / np.log(layout.num_patches))


def entropy_seed1(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """−Σ_k A_qk ln(A_qk + 1e-12) in nat, over patch keys, not renormalised; [batch, patch query]."""
    rows = layout.patches(p)
    return np.asarray(0.0 - (rows * np.log(rows + SEED1_LOG_OFFSET)).sum(axis=-1))


def morans_i(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of each row laid on the grid, rook neighbours, binary weights; [batch, patch query]."""
    return _morans_i(renormalised(p, layout), layout)


def morans_i_received(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of the received-attention map; [batch]. A map that varies by rounding alone is constant: NaN."""
    received = received_map(p, layout)
    spread = received.max(axis=-1) - received.min(axis=-1)
    varies = spread > RECEIVED_SPREAD * received.mean(axis=-1)
    return np.where(varies, _morans_i(received, layout), np.nan)


def sink_share(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """max_k mean_q p_qk, the largest share of attention that one patch receives; [batch]."""
    return np.asarray(received_map(p, layout).max(axis=-1))


def morans_i_seed1(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of x_q = Σ_k A_qk / N over patch keys, 0 where Σ z_q² ≤ 1e-8; [batch].

    x_q is (1 − mass of q on the prefix) / N: this measures how smoothly the prefix mass varies, not whether the
    patches attended to lie together. NaN if a patch query's row is invalid.
    """
    x = layout.patches(p).sum(axis=-1) / layout.num_patches
    sum_sq = ((x - x.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    flat = sum_sq <= SEED1_LEAST_SUM_SQ
    return np.where(flat, 0.0, _morans_i(np.where(flat[..., np.newaxis], 0.0, x), layout))


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


def js_divergence(p: np.ndarray, other: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """½ Σ_k (p_qk ln(p_qk/m_qk) + p'_qk ln(p'_qk/m_qk)), m = (p + p')/2, in nat; [batch, patch query].

    p and p' are the renormalised rows of the two conditions. Summed as m·φ(t) with t = (p − p')/(p + p') and
    φ(t) = ½((1+t) ln(1+t) + (1−t) ln(1−t)): no term is negative, so that nearly equal rows keep their digits.
    """
    one, two = renormalised(p, layout), renormalised(other, layout)
    total = one + two
    t = (one - two) / np.where(total > 0, total, 1.0)
    return np.asarray((total / 2 * _phi(t)).sum(axis=-1))


def _phi(t: np.ndarray) -> np.ndarray:
    """½((1+t) ln(1+t) + (1−t) ln(1−t)) for |t| ≤ 1; below ¼ as its series Σ_k t^2k / (2k (2k − 1))."""
    series = sum(t ** (2 * k) / (2 * k * (2 * k - 1)) for k in range(1, 12))  # the next term is below 1e-17
    far = np.abs(t) >= 0.25
    up, down = (1.0 + np.where(far, t, 0.0)), (1.0 - np.where(far, t, 0.0))
    logs = (up * np.log(np.where(up > 0, up, 1.0)) + down * np.log(np.where(down > 0, down, 1.0))) / 2
    return np.asarray(np.where(far, logs, series))


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
