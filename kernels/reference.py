"""The definitions: float64 NumPy that reads like the formulas, each with its declaration.  <- the seam for a new metric

`@metric` makes a definition one of `METRICS`, under its own name. Every backend is held to these.

Each metric takes full post-softmax rows `p`, float64 [batch, query, key] with the prefix tokens included, and the
`TokenLayout` that says where the patches are. Row metrics return [batch, patch query]; metrics of a whole map
return [batch]; `region_mass` returns [batch, region]. A row or map without a value is NaN. An invalid row arrives
as a row of NaN and is left out in the same way. A pair metric takes the same maps in a second condition as well.

Published codes measure the same words differently. The names without a suffix renormalise each row over the patches
and give NaN where there is no value; the other conventions carry their name as a suffix:

    distance_px       the ViT authors: pixels, not renormalised, so that mass on the prefix shortens the distance
    distance_walmer   Walmer et al.: renormalised, unit square. Its side is the longer side of the grid from first to
                      last patch centre, so that on g×g patches neighbours are 1/(g−1) apart. Oblong grids and
                      patches keep their shape. px = side · walmer
    distance_seed1    not renormalised, over √2·g grid steps (the image diagonal on any grid)
    entropy_seed1     −ΣP ln(P + 1e-12), not renormalised
    morans_i_seed1    of each query's mean over keys, which only the prefix mass changes; 0 where Σz² ≤ 1e-8
    morans_i_received of the rows' mean: averaged over queries before, not after

`convention_of` says which of them may lead to other findings; one that `rescales` another cannot. `distance_px` and
the `seed1` metrics have a value on every valid row, 0 on one wholly on the prefix.
"""

from __future__ import annotations

import math

import numpy as np

from kernels import bounds
from kernels.layout import TokenLayout
from kernels.metrics import metric

# A received map whose greatest and least value differ by less than this share of their mean is constant. Rounding of
# float32 rows alone leaves about 1e-7; the order of a sum would decide whether such a map has a Moran's I.
RECEIVED_SPREAD = 1e-5

# The constants of the `seed1` convention: what is added inside the logarithm, and the Σz² up to which I is set to 0.
SEED1_LOG_OFFSET = 1e-12
SEED1_LEAST_SUM_SQ = 1e-8

_NO_MASS = "row whose patches sum to 0"
_NO_ROW = "map without a row that has mass on the patches"
_CONSTANT = f"constant row; {_NO_MASS}"
_MORAN = "Moran 1950, doi:10.1093/biomet/37.1-2.17"
_SHANNON = "Shannon 1948, doi:10.1002/j.1538-7305.1948.tb01338.x"
_SEED1 = "the thesis code whose figures the seed1 metrics reproduce"


def _morans_i_null(num_patches: int) -> float:
    """E[I] of a map whose values lie at random."""
    return -1.0 / (num_patches - 1)


def softmax_rows(query: np.ndarray, key: np.ndarray, scale: float, bias: np.ndarray | None) -> np.ndarray:
    """softmax(scale · q·kᵀ + bias), float64 [batch, query, key]; −inf in a bias of that shape hides a key.

    A row whose logits hold NaN or +inf, or are all −inf, is NaN.
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


@metric(
    unit="image diagonals",
    title="Attention distance",
    bounds=lambda layout: (0.0, bounds.farthest(layout)),
    undefined=_NO_MASS,
    source="Dosovitskiy et al. 2021, arXiv:2010.11929 (there in pixels and not renormalised)",
    core=True,
)
def distance(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ_k p_qk ‖c_q − c_k‖ / √(H² + W²), in image diagonals; [batch, patch query]."""
    return np.asarray(np.einsum("bqk,qk->bq", renormalised(p, layout), layout.distances()))


def extent_px(layout: TokenLayout) -> float:
    """From the first to the last patch centre along the longer side of the image; the unit of `distance_walmer`."""
    down = (layout.grid_rows - 1) * layout.patch_height_px
    across = (layout.grid_cols - 1) * layout.patch_width_px
    return float(max(down, across))


@metric(
    unit="px",
    title="Attention distance, not renormalised",
    bounds=lambda layout: (0.0, bounds.farthest(layout) * layout.diagonal_px),
    source="Dosovitskiy et al. 2021, arXiv:2010.11929",
    convention_of="distance",
)
def distance_px(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ_k A_qk ‖c_q − c_k‖ in pixels, over patch keys, not renormalised; [batch, patch query]."""
    return np.asarray(np.einsum("bqk,qk->bq", layout.patches(p), layout.distances() * layout.diagonal_px))


@metric(
    unit="grid sides",
    title="Attention distance (Walmer)",
    bounds=lambda layout: (0.0, bounds.farthest(layout) * layout.diagonal_px / extent_px(layout)),
    undefined=_NO_MASS,
    source="Walmer et al. 2023, arXiv:2212.03862",
    rescales="distance",
)
def distance_walmer(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ_k p_qk ‖c_q − c_k‖ with the grid's longer side, first to last patch centre, as 1; [batch, patch query].

    On a square grid of square patches that is the distance in grid steps divided by g − 1.
    """
    return np.asarray(distance(p, layout) * layout.diagonal_px / extent_px(layout))


@metric(
    unit="image diagonals",
    title="Attention distance (seed1)",
    bounds=lambda layout: (0.0, bounds.farthest(layout)),
    source=_SEED1,
    rescales="distance_px",
)
def distance_seed1(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`distance_px` / √(H² + W²), not renormalised; [batch, patch query].

    On a square grid of square patches that is the distance in grid steps divided by √2·g.
    """
    return np.asarray(distance_px(p, layout) / layout.diagonal_px)


@metric(unit="nat", title="Attention entropy", bounds=bounds.entropy, undefined=_NO_MASS, source=_SHANNON, core=True)
def entropy(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """−Σ_k p_qk ln p_qk in nat, with 0 ln 0 = 0; [batch, patch query]."""
    return _entropy(renormalised(p, layout))


@metric(
    unit="1",
    title="Normalised entropy",
    bounds=bounds.share,
    undefined=_NO_MASS,
    source=_SHANNON,
    rescales="entropy",
)
def entropy_normalized(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`entropy` / ln(R·C), so that uniform attention is 1 on every grid; [batch, patch query]."""
    return np.asarray(entropy(p, layout) / np.log(layout.num_patches))


@metric(
    unit="nat",
    title="Attention entropy (seed1)",
    bounds=lambda layout: (-math.log1p(SEED1_LOG_OFFSET), bounds.greatest_entropy_of_part(layout)),
    source=_SEED1,
    convention_of="entropy",
)
def entropy_seed1(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """−Σ_k A_qk ln(A_qk + 1e-12) in nat, over patch keys, not renormalised; [batch, patch query]."""
    rows = layout.patches(p)
    return np.asarray(0.0 - (rows * np.log(rows + SEED1_LOG_OFFSET)).sum(axis=-1))


@metric(
    unit="1",
    title="Moran's I",
    bounds=bounds.morans_i,
    null=_morans_i_null,
    undefined=_CONSTANT,
    source=_MORAN,
    core=True,
)
def morans_i(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of each row laid on the grid, rook neighbours, binary weights; [batch, patch query]."""
    return _morans_i(renormalised(p, layout), layout)


@metric(
    unit="1",
    title="Moran's I of received attention",
    bounds=bounds.morans_i,
    null=_morans_i_null,
    undefined=f"received map constant to 1e-5 of its mean; {_NO_ROW}",
    source=_MORAN,
    convention_of="morans_i",
)
def morans_i_received(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of the received-attention map; [batch]. A map that varies by rounding alone is constant: NaN."""
    received = received_map(p, layout)
    spread = received.max(axis=-1) - received.min(axis=-1)
    varies = spread > RECEIVED_SPREAD * received.mean(axis=-1)
    return np.where(varies, _morans_i(received, layout), np.nan)


@metric(
    unit="1",
    title="Largest share of one patch",
    bounds=lambda layout: (1.0 / layout.num_patches, 1.0),
    undefined=_NO_ROW,
    source="the patches of high norm of Darcet et al. 2023, arXiv:2309.16588, as a share of attention",
)
def sink_share(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """max_k mean_q p_qk, the largest share of attention that one patch receives; [batch]."""
    return np.asarray(received_map(p, layout).max(axis=-1))


@metric(
    unit="1",
    title="Moran's I of the mean over keys (seed1)",
    bounds=bounds.morans_i_or_zero,
    undefined="map with an invalid patch query",
    source=_SEED1,
    convention_of="morans_i",
)
def morans_i_seed1(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of x_q = Σ_k A_qk / N over patch keys, 0 where Σ z_q² ≤ 1e-8; [batch].

    x_q is (1 − mass of q on the prefix) / N: this measures how smoothly the prefix mass varies, not whether the
    patches attended to lie together. NaN if a patch query's row is invalid.
    """
    x = layout.patches(p).sum(axis=-1) / layout.num_patches
    sum_sq = ((x - x.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    flat = sum_sq <= SEED1_LEAST_SUM_SQ
    return np.where(flat, 0.0, _morans_i(np.where(flat[..., np.newaxis], 0.0, x), layout))


@metric(
    unit="1",
    title="Geary's C",
    bounds=bounds.gearys_c,
    undefined=_CONSTANT,
    source="Geary 1954, doi:10.2307/2986645",
)
def gearys_c(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """(N−1)/(2 S0) Σ_ij w_ij (x_i − x_j)² / Σ z_i² of each row, weights as for Moran's I; [batch, patch query]."""
    x = renormalised(p, layout)
    z = x - x.mean(axis=-1, keepdims=True)
    down, right = _neighbour_pairs(x, layout)
    edges = sum(((a - b) ** 2).sum(axis=(-2, -1)) for a, b in (down, right))  # each edge once: half of Σ_ij
    s0 = 2 * layout.num_edges
    return _unless_constant(x, (layout.num_patches - 1) / (2 * s0) * 2 * edges, (z**2).sum(axis=-1))


@metric(
    unit="1",
    title="Gini coefficient",
    bounds=lambda layout: (0.0, 1.0 - 1.0 / layout.num_patches),
    undefined=_NO_MASS,
    source="Gini 1912; in this form Sen 1973, doi:10.1093/0198281935.001.0001",
)
def gini(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Gini coefficient Σ_i (2i − N − 1) p_(i) / (N Σ p), p_(1) ≤ … ≤ p_(N); [batch, patch query]."""
    ordered = np.sort(renormalised(p, layout), axis=-1)
    n = layout.num_patches
    rank = 2 * np.arange(1, n + 1) - n - 1
    return np.asarray(ordered @ rank / n)


@metric(unit="1", title="Mass on prefix tokens", bounds=bounds.share, is_prefix_share=True)
def prefix_mass(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Σ over prefix keys of A_qk, not renormalised; [batch, patch query]."""
    invalid = np.isnan(layout.patches(p)).any(axis=-1)  # without prefix keys the sum alone would not tell
    return np.where(invalid, np.nan, layout.prefix(p).sum(axis=-1))


@metric(
    unit="nat",
    title="Entropy of the class token's row",
    bounds=bounds.entropy,
    undefined=_NO_MASS,
    source=_SHANNON,
)
def cls_entropy(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """`entropy` of the class token's row over patches; [batch]."""
    return _entropy(class_row(p, layout))


@metric(
    unit="1",
    title="Moran's I of the class token's row",
    bounds=bounds.morans_i,
    null=_morans_i_null,
    undefined=_CONSTANT,
    source=_MORAN,
)
def cls_morans_i(p: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of the class token's row over patches; [batch]."""
    return _morans_i(class_row(p, layout), layout)


@metric(
    unit="1",
    inputs="regions",
    title="Attention on regions",
    axis_label="share of attention on patches",
    bounds=bounds.share,
    undefined=f"{_NO_MASS}; region without coverage values (NaN)",
)
def region_mass(p: np.ndarray, layout: TokenLayout, regions: np.ndarray) -> np.ndarray:
    """Mass that the class token (without one: the mean patch query) puts in each region; [batch, region].

    `regions` is the coverage of each patch by each region, 0 to 1, [batch, region, patch].
    """
    row = class_row(p, layout) if layout.class_token else received_map(p, layout)
    return np.asarray(np.einsum("bk,brk->br", row, regions))


@metric(
    unit="nat",
    inputs="pair",
    title="Jensen–Shannon divergence",
    bounds=lambda layout: (0.0, math.log(2.0)),
    undefined=f"{_NO_MASS}, in either condition",
    source="Lin 1991, doi:10.1109/18.61115",
)
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
