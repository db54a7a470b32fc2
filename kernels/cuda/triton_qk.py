"""Device code of the `triton` backend from query and key: a softmax over the patches, a row of the grid at a time.

What makes it fast. A row of the grid is one product, whose columns lie as [even | odd | next even | unused]: parts of a
tile that are the same registers of the same threads. So neighbours to the right are products of two parts, neighbours
below those of a part with that of the row before, and nothing is moved between threads before the end.
"""

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
    fast_log2,
    fast_sqrt,
    of_grid,
    store_edges,
    store_plane,
)


@triton.jit
def products(
    q, key, tokens, stride_kn, stride_kd, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr
):  # fmt: skip
    """q·kᵀ of the tokens given as keys. float32 factors go through the matrix units as sums of TF32 numbers."""
    d = tl.arange(0, BLOCK_D)
    at = key + tokens.to(tl.int64)[None, :] * stride_kn + d[:, None] * stride_kd
    if HEAD_DIM < BLOCK_D:
        k = tl.load(at, mask=(d < HEAD_DIM)[:, None], other=0.0)
    else:
        k = tl.load(at)
    if WIDEN:
        k = k.to(tl.float32)
    return tl.dot(q, k, input_precision="tf32x3")


@triton.jit
def with_bias(s, bias, tokens, stride_bk, IS_MASK: tl.constexpr):
    """Logits with what is added to those of the tokens given as keys; bias points at the queries' rows."""
    added = tl.load(bias + tokens[None, :] * stride_bk)
    if IS_MASK:
        return s + tl.where(added != 0, 0.0, float("-inf"))  # added: a hidden NaN is still a NaN
    else:
        return s + added.to(tl.float32) * LOG2_E


@triton.jit
def logits(
    q, key, bias, tokens, stride_kn, stride_kd, stride_bk, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """log2(e)·(scale·q·kᵀ + bias) of the tokens given as keys; bias points at the queries' rows."""
    found = products(q, key, tokens, stride_kn, stride_kd, HEAD_DIM, BLOCK_D, WIDEN) * factor
    if HAS_BIAS:
        found = with_bias(found, bias, tokens, stride_bk, IS_MASK)
    return found


@triton.jit
def finite(top):
    """The greatest logit, 0 for rows of −inf, so that −inf − top is no NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def in_parts(tile, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr):
    """The three parts of a tile [query, group · part · pair], each [query, pair]: in the registers that they are in."""
    tile = tl.permute(tl.reshape(tile, (BLOCK_Q, GROUPS, 2, 2, PAIRS // GROUPS)), (0, 1, 4, 3, 2))
    low, high = tl.split(tl.reshape(tile, (BLOCK_Q, PAIRS, 2, 2)))
    even, odd = tl.split(low)
    after, _ = tl.split(high)
    return even, odd, after


@triton.jit
def begin(
    m, query, key, bias, q_starts, k_starts, b_starts, at_q, at_bias, tokens, even, is_odd,
    stride_kn, stride_kd, stride_bk, factor, PREFIX: tl.constexpr, PATCHES: tl.constexpr, GRID_COLS: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr, NEGATE: tl.constexpr, WIDEN: tl.constexpr,
    FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A map's factors, its greatest logits, and the mean of the first row of its grid.

    (query, where its keys and its bias begin, the greatest logit [query], the mean [query], even and odd columns of the
    first row less that mean).
    """
    # Without this the compiler would load two bytes at a time.
    q_start = tl.multiple_of(tl.load(q_starts + m), ALIGNED)
    k_start = tl.multiple_of(tl.load(k_starts + m), ALIGNED)
    q = tl.load(query + q_start + at_q, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    if NEGATE:
        q = -q
    key += k_start
    if HAS_BIAS:
        bias_rows = bias + tl.load(b_starts + m) + at_bias
    else:
        bias_rows = bias

    peaks = tl.full((BLOCK_Q, BLOCK_K), float("-inf"), tl.float32)
    for k in range(0, PATCHES, BLOCK_K):
        some = PREFIX + tl.minimum(k + tl.arange(0, BLOCK_K), PATCHES - 1)
        s = products(q, key, some, stride_kn, stride_kd, HEAD_DIM, BLOCK_D, WIDEN)
        if HAS_BIAS:
            s = with_bias(s * factor, bias_rows, some, stride_bk, IS_MASK)
        peaks = tl.maximum(peaks, s)
    top = tl.max(peaks, axis=1)
    if not HAS_BIAS:
        top *= factor

    s = logits(q, key, bias_rows, tokens, stride_kn, stride_kd, stride_bk, factor,
               HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN) - finite(top)[:, None]  # fmt: skip
    even_t, odd_t, _ = in_parts(s, BLOCK_Q, GROUPS, PAIRS)
    even_x, odd_x = fast_exp2(even_t, FAST), fast_exp2(odd_t, FAST)
    filled = tl.where(is_odd, odd_x, even_x)  # the last pair may be half a pair
    least, greatest = tl.min(tl.minimum(even_x, filled), axis=1), tl.max(tl.maximum(even_x, filled), axis=1)
    odd_x = tl.where(is_odd, odd_x, 0.0)
    # Of equal values exactly that value: what is left of each is then exactly 0.
    pivot = of_grid(even_x + odd_x, even, GRID_COLS, 1) * (1.0 / GRID_COLS)
    pivot = tl.where(least == greatest, greatest, pivot)
    about = pivot[:, None]
    return q, key, bias_rows, top, pivot, even_x - about, tl.where(is_odd, odd_x - about, 0.0)


@triton.jit
def add_row(
    s, about, even_apart, odd_apart, state, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr,
    GRID_COLS: tl.constexpr, NEEDS: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A row of the grid into the sums of `state`: logits less the greatest, and the distances of its columns."""
    even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond = state
    is_odd = 2 * tl.arange(0, PAIRS)[None, :] + 1 < GRID_COLS
    even_t, odd_t, next_t = in_parts(s, BLOCK_Q, GROUPS, PAIRS)
    even_x, odd_x = fast_exp2(even_t, FAST), fast_exp2(odd_t, FAST)
    even_z, odd_z = even_x - about, odd_x - about
    if GRID_COLS % 2:  # the last pair is half a pair
        odd_x = tl.where(is_odd, odd_x, 0.0)
        odd_z = tl.where(is_odd, odd_z, 0.0)
    if DISTANCE & NEEDS:
        far += even_x * even_apart
        far += odd_x * odd_apart
    if ENTROPY & NEEDS:
        if HAS_BIAS:  # 2^−150 is 0 already; 0 · −inf would be NaN
            even_t, odd_t = tl.maximum(even_t, -150.0), tl.maximum(odd_t, -150.0)
        logs += even_x * even_t
        logs += odd_x * odd_t
    if EDGES & NEEDS:
        next_z = fast_exp2(next_t, FAST) - about
        s_even += even_z
        s_odd += odd_z
        s_sq += even_z * even_z
        s_sq += odd_z * odd_z
        within += even_z * odd_z
        within += even_z * even_above
        within += odd_z * odd_above
        beyond += odd_z * next_z
        if GEARY & NEEDS:
            gap = tl.where(is_odd, even_z - odd_z, 0.0)
            apart_within += gap * gap
            apart_within += (even_z - even_above) * (even_z - even_above)
            apart_within += (odd_z - odd_above) * (odd_z - odd_above)
            apart_beyond += (odd_z - next_z) * (odd_z - next_z)
        even_above, odd_above = even_z, odd_z
    else:
        sums += even_x
        sums += odd_x
    return even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond


@triton.jit
def store_rows(
    m, near_n, inside, maps, planes, valid, top, pivot, first_even, first_odd, head, state,
    PATCHES: tl.constexpr, PREFIX: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_P: tl.constexpr, PAIRS: tl.constexpr, NEEDS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The metrics of a map's queries from the sums over all rows of the grid; `head` are the logits of the prefix."""
    even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond = state
    even = 2 * tl.arange(0, PAIRS)[None, :]
    odd = even + 1
    s_z = of_grid(s_even + s_odd, even, GRID_COLS, 1)
    if EDGES & NEEDS:
        total = s_z + PATCHES * pivot
    else:
        total = of_grid(sums, even, GRID_COLS, 1)
    highest, mass, on_all = top, total * 0.0, total
    if PREFIX > 0:
        head = tl.where((tl.arange(0, BLOCK_P) < PREFIX)[None, :], head, float("-inf"))
        highest = tl.maximum(top, tl.max(head, axis=1))
        on_prefix = tl.sum(fast_exp2(head - finite(highest)[:, None], FAST), axis=1)
        on_all = on_prefix + total * fast_exp2(top - finite(highest), FAST)
        mass = on_prefix / tl.where(on_all > 0, on_all, 1.0)
    is_valid = (on_all == on_all) & (highest > float("-inf"))
    TOKENS: tl.constexpr = PREFIX + PATCHES
    rows = maps.to(tl.int64) * TOKENS
    at = m.to(tl.int64) * TOKENS + near_n
    tl.store(valid + at, is_valid.to(tl.int8), mask=inside)
    store_plane(planes, AT_PREFIX_MASS, at, tl.where(is_valid, mass, float("nan")), inside, rows)
    defined = is_valid & (total > 0)
    divisor = tl.where(defined, total, 1.0)
    share = 1.0 / divisor
    if DISTANCE & NEEDS:
        distance = of_grid(far, even, GRID_COLS, 1) * share
        store_plane(planes, AT_DISTANCE, at, tl.where(defined, distance, float("nan")), inside, rows)
    if ENTROPY & NEEDS:
        # ln Z − Σ x·t / Z: no logarithm a key
        nat = LN_2 * (fast_log2(divisor, FAST) - of_grid(logs, even, GRID_COLS, 1) * share)
        store_plane(planes, AT_ENTROPY, at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), inside, rows)
    if EDGES & NEEDS:
        squares = of_grid(s_sq, even, GRID_COLS, 1)
        ends = at_ends(s_even, first_even, even_above, even, GRID_COLS)
        ends += at_ends(s_odd, first_odd, odd_above, odd, GRID_COLS)
        apart_within -= first_even * first_even + first_odd * first_odd  # the first row has none above it
        cross = tl.where(even < GRID_COLS, within, 0.0) + tl.where(even + 2 < GRID_COLS, beyond, 0.0)
        apart = tl.where(even < GRID_COLS, apart_within, 0.0) + tl.where(even + 2 < GRID_COLS, apart_beyond, 0.0)
        store_edges(
            planes, at, inside, rows, defined, squares > 0, s_z, squares, tl.sum(cross, axis=1),
            of_grid(ends, even, GRID_COLS, 1), tl.sum(apart, axis=1), PATCHES, NUM_EDGES, NEEDS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["maps", "first_query"])  # a batch of one map is no other kernel
def qk_rows(
    query, key, bias, q_starts, k_starts, b_starts, planes, valid, maps,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step, first_query,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr, NEGATE: tl.constexpr, WIDEN: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """From query and key: a softmax over the patches alone, of BLOCK_Q queries of one or two maps a program.

    Two maps share the distances. Twice over the keys: for the greatest logit, and for the rest, a row of the grid at a
    time. Its even columns are one part of a tile, its odd ones another; an odd column's neighbour to the right is
    multiplied out again in a third, as a tile has no shift along an axis. `factor` is at least 0. A NaN or +inf among
    the logits makes the sum NaN.
    """
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    TOKENS: tl.constexpr = PREFIX + PATCHES
    m = tl.program_id(0) * BLOCK_M
    n = first_query + tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = n < TOKENS
    near_n = tl.minimum(n, TOKENS - 1)
    d = tl.arange(0, BLOCK_D)
    at_q = near_n.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
    at_bias = near_n.to(tl.int64)[:, None] * stride_bq
    lane = tl.arange(0, 4 * PAIRS)
    WIDTH: tl.constexpr = PAIRS // GROUPS
    column = 2 * (lane // (4 * WIDTH) * WIDTH + lane % WIDTH) + tl.minimum(lane // WIDTH % 4, 2)
    tokens = PREFIX + tl.minimum(column, GRID_COLS - 1)
    patch = near_n - PREFIX
    even = 2 * tl.arange(0, PAIRS)[None, :]
    is_odd = even + 1 < GRID_COLS
    side = (even - (patch % GRID_COLS)[:, None]).to(tl.float32) * col_step
    even_side, odd_side = side * side, (side + col_step) * (side + col_step)
    upright = (patch // GRID_COLS).to(tl.float32)[:, None]

    last = tl.minimum(m + BLOCK_M, maps) - 1
    a = begin(
        m, query, key, bias, q_starts, k_starts, b_starts, at_q, at_bias, tokens, even, is_odd, stride_kn, stride_kd,
        stride_bk, factor, PREFIX, PATCHES, GRID_COLS, BLOCK_Q, BLOCK_K, PAIRS, GROUPS, HEAD_DIM, BLOCK_D, HAS_BIAS,
        IS_MASK, NEGATE, WIDEN, FAST, ALIGNED,
    )  # fmt: skip
    if BLOCK_M == 2:
        b = begin(
            last, query, key, bias, q_starts, k_starts, b_starts, at_q, at_bias, tokens, even, is_odd, stride_kn,
            stride_kd, stride_bk, factor, PREFIX, PATCHES, GRID_COLS, BLOCK_Q, BLOCK_K, PAIRS, GROUPS, HEAD_DIM,
            BLOCK_D, HAS_BIAS, IS_MASK, NEGATE, WIDEN, FAST, ALIGNED,
        )  # fmt: skip
    none = tl.zeros((BLOCK_Q, PAIRS), tl.float32)
    state_a = none, none, none, none, none, none, none, none, none, none, none, none
    state_b = state_a
    even_apart, odd_apart = none, none
    for r in tl.range(0, GRID_ROWS, loop_unroll_factor=UNROLL):
        if DISTANCE & NEEDS:
            height = (r - upright) * row_step
            height *= height
            even_apart, odd_apart = fast_sqrt(height + even_side, FAST), fast_sqrt(height + odd_side, FAST)
        s = logits(a[0], a[1], a[2], tokens + r * GRID_COLS, stride_kn, stride_kd, stride_bk, factor,
                   HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN) - finite(a[3])[:, None]  # fmt: skip
        state_a = add_row(s, a[4][:, None], even_apart, odd_apart, state_a, BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS,
                          HAS_BIAS, FAST)  # fmt: skip
        if BLOCK_M == 2:
            s = logits(b[0], b[1], b[2], tokens + r * GRID_COLS, stride_kn, stride_kd, stride_bk, factor,
                       HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN) - finite(b[3])[:, None]  # fmt: skip
            state_b = add_row(s, b[4][:, None], even_apart, odd_apart, state_b, BLOCK_Q, GROUPS, PAIRS, GRID_COLS,
                              NEEDS, HAS_BIAS, FAST)  # fmt: skip

    head = none
    if PREFIX > 0:
        head = logits(a[0], a[1], a[2], tl.minimum(tl.arange(0, BLOCK_P), PREFIX - 1), stride_kn, stride_kd, stride_bk,
                      factor, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN)  # fmt: skip
    store_rows(m, near_n, inside, maps, planes, valid, a[3], a[4], a[5], a[6], head, state_a,
               PATCHES, PREFIX, GRID_COLS, NUM_EDGES, BLOCK_P, PAIRS, NEEDS, FAST)  # fmt: skip
    if BLOCK_M == 2:
        if PREFIX > 0:
            head = logits(b[0], b[1], b[2], tl.minimum(tl.arange(0, BLOCK_P), PREFIX - 1), stride_kn, stride_kd,
                          stride_bk, factor, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN)  # fmt: skip
        store_rows(last, near_n, inside, maps, planes, valid, b[3], b[4], b[5], b[6], head, state_b,
                   PATCHES, PREFIX, GRID_COLS, NUM_EDGES, BLOCK_P, PAIRS, NEEDS, FAST)  # fmt: skip
