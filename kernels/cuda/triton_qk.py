"""Device code of the `triton` backend from query and key: a softmax over the patches, a row of the grid at a time."""

# Triton types device code: its parameters take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kernels.cuda.triton_rows import (
    AT_DISTANCE,
    AT_ENTROPY,
    AT_PREFIX_MASS,
    DISTANCE,
    EDGES,
    ENTROPY,
    GEARY,
    LN_2,
    LOG2_E,
    at_ends,
    fast_exp2,
    fast_sqrt,
    of_edges,
    of_grid,
    store_edges,
    store_plane,
)


@triton.jit
def logits(
    q, key, bias, tokens, stride_kn, stride_kd, stride_bk, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """log2(e)·(scale·q·kᵀ + bias) of the tokens given as keys; bias points at the queries' rows."""
    d = tl.arange(0, BLOCK_D)
    at = key + tokens.to(tl.int64)[None, :] * stride_kn + d[:, None] * stride_kd
    if HEAD_DIM < BLOCK_D:
        k = tl.load(at, mask=(d < HEAD_DIM)[:, None], other=0.0)
    else:
        k = tl.load(at)
    if WIDEN:
        k = k.to(tl.float32)
    found = tl.dot(q, k, input_precision="ieee") * factor
    if HAS_BIAS:
        added = tl.load(bias + tokens[None, :] * stride_bk)
        if IS_MASK:
            found += tl.where(added != 0, 0.0, float("-inf"))  # added: a hidden NaN is still a NaN
        else:
            found += added.to(tl.float32) * LOG2_E
    return found


@triton.jit
def finite(top):
    """The greatest logit, 0 for rows of −inf, so that −inf − top is no NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit(do_not_specialize=["maps"])  # a batch of one map is no other kernel
def qk_rows(
    query, key, bias, q_starts, k_starts, b_starts, planes, valid, maps,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, NEEDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr,
    WIDEN: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """From query and key: a softmax over the patches alone, of one map and BLOCK_Q queries a program.

    Twice over the keys: for the greatest logit, and for the rest. The neighbour to the right is multiplied out again,
    as a tile has no shift along an axis. A NaN or +inf among the logits makes the sum NaN.
    """
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    TOKENS: tl.constexpr = PREFIX + PATCHES
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = n < TOKENS
    near_n = tl.minimum(n, TOKENS - 1)
    d = tl.arange(0, BLOCK_D)
    # Without this the compiler would load two bytes at a time.
    q_start = tl.multiple_of(tl.load(q_starts + m), ALIGNED)
    k_start = tl.multiple_of(tl.load(k_starts + m), ALIGNED)
    q_at = query + q_start + near_n.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
    q = tl.load(q_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    key += k_start
    if HAS_BIAS:
        bias_rows = bias + tl.load(b_starts + m) + near_n.to(tl.int64)[:, None] * stride_bq
    else:
        bias_rows = bias
    column = tl.arange(0, BLOCK_C)
    here = PREFIX + tl.minimum(column, GRID_COLS - 1)
    right = PREFIX + tl.minimum(column + 1, GRID_COLS - 1)
    c = column[None, :]

    peaks = tl.full((BLOCK_Q, BLOCK_C), float("-inf"), tl.float32)
    for r in range(0, GRID_ROWS):
        s = logits(q, key, bias_rows, here + r * GRID_COLS, stride_kn, stride_kd, stride_bk, factor,
                   HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN)  # fmt: skip
        peaks = tl.maximum(peaks, s)
    top = tl.max(peaks, axis=1)
    lowered = finite(top)[:, None]
    s = logits(q, key, bias_rows, here, stride_kn, stride_kd, stride_bk, factor,
               HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN)  # fmt: skip
    first = fast_exp2(s - lowered, FAST)
    pivot = of_grid(first, c, GRID_COLS, 1)[:, None] * (1.0 / GRID_COLS)
    first -= pivot
    patch = near_n - PREFIX
    sideways = (c - (patch % GRID_COLS)[:, None]).to(tl.float32) * col_step
    sideways = sideways * sideways
    upright = (patch // GRID_COLS).to(tl.float32)[:, None]

    sums = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    s_z = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    s_sq = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    across = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    down = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    far = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    logs = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    apart_across = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    apart_down = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    least = tl.full((BLOCK_Q, BLOCK_C), 1.0, tl.float32)
    above = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for r in range(0, GRID_ROWS):
        t = logits(q, key, bias_rows, here + r * GRID_COLS, stride_kn, stride_kd, stride_bk, factor,
                   HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN) - lowered  # fmt: skip
        x = fast_exp2(t, FAST)
        sums += x
        if DISTANCE & NEEDS:
            height = (r - upright) * row_step
            far += x * fast_sqrt(height * height + sideways, FAST)
        if ENTROPY & NEEDS:
            logs += x * tl.maximum(t, -150.0)  # 2^−150 is 0 already; 0 · −inf would be NaN
        if EDGES & NEEDS:
            t = logits(q, key, bias_rows, right + r * GRID_COLS, stride_kn, stride_kd, stride_bk, factor,
                       HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN) - lowered  # fmt: skip
            least = tl.minimum(least, x)
            z, beside = x - pivot, fast_exp2(t, FAST) - pivot
            s_z += z
            s_sq += z * z
            across += z * beside
            down += z * above
            if GEARY & NEEDS:
                apart_across += (z - beside) * (z - beside)
                apart_down += (z - above) * (z - above)
            above = z

    total = of_grid(sums, c, GRID_COLS, 1)
    highest, mass, on_all = top, tl.zeros((BLOCK_Q,), tl.float32), total
    if PREFIX > 0:
        p = tl.arange(0, BLOCK_P)
        head = logits(q, key, bias_rows, tl.minimum(p, PREFIX - 1), stride_kn, stride_kd, stride_bk, factor,
                      HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN)  # fmt: skip
        head = tl.where((p < PREFIX)[None, :], head, float("-inf"))
        highest = tl.maximum(top, tl.max(head, axis=1))
        on_prefix = tl.sum(tl.exp2(head - finite(highest)[:, None]), axis=1)
        on_all = on_prefix + total * tl.exp2(top - finite(highest))
        mass = on_prefix / tl.where(on_all > 0, on_all, 1.0)
    is_valid = (on_all == on_all) & (highest > float("-inf"))
    rows = maps.to(tl.int64) * TOKENS
    at = m.to(tl.int64) * TOKENS + near_n
    tl.store(valid + at, is_valid.to(tl.int8), mask=inside)
    store_plane(planes, AT_PREFIX_MASS, at, tl.where(is_valid, mass, float("nan")), inside, rows)
    defined = is_valid & (total > 0)
    divisor = tl.where(defined, total, 1.0)
    if DISTANCE & NEEDS:
        distance = of_grid(far, c, GRID_COLS, 1) / divisor
        store_plane(planes, AT_DISTANCE, at, tl.where(defined, distance, float("nan")), inside, rows)
    if ENTROPY & NEEDS:
        # ln Z − Σ x·t / Z: no logarithm a key
        nat = LN_2 * (tl.log2(divisor) - of_grid(logs, c, GRID_COLS, 1) / divisor)
        store_plane(planes, AT_ENTROPY, at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), inside, rows)
    if EDGES & NEEDS:
        varies = tl.min(least, axis=1) < 1.0  # the greatest is 2^0
        apart_down -= first * first  # the first row has none above it
        store_edges(
            planes, at, inside, rows, defined, varies, of_grid(s_z, c, GRID_COLS, 1), of_grid(s_sq, c, GRID_COLS, 1),
            of_edges(across, down, c, GRID_COLS, 1),
            of_grid(at_ends(s_z, first, above, c, GRID_COLS), c, GRID_COLS, 1),
            of_edges(apart_across, apart_down, c, GRID_COLS, 1), PATCHES, NUM_EDGES, NEEDS,
        )  # fmt: skip
