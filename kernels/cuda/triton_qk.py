"""Device code of the `triton` backend from query and key: a softmax over the patches, a row of the grid at a time.

What makes it fast. A row of the grid is one product, whose columns lie as [even | odd | next even | unused]: parts of a
tile that are the same registers of the same threads. So neighbours to the right are products of two parts, neighbours
below those of a part with that of the row before, and nothing is moved between threads before the end.

Exponentials are of logits less the greatest of the first row of the grid, not of all: one pass over the keys, not two.
Where others are so much greater that sums could lose accuracy or overflow, it is done again, less the greatest of all.

64 queries fill a product. Those of a map that are left over, as the class token leaves them, share a program with those
of other maps: products of all with the keys of all, of which a map's own are kept.
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

# A row whose exponentials sum to more is done again, less its greatest logit.
MOST_TOTAL = tl.constexpr(1e6)


@triton.jit
def products(
    q, key, tokens, stride_kn, stride_kd, BLOCK_Q: tl.constexpr, SHARE: tl.constexpr, KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """q·kᵀ of KEYS tokens given as keys. float32 factors go through the matrix units as sums of TF32 numbers.

    With SHARE > 1, `tokens` are those of each of so many maps, whose queries are the rows one after another; `key` then
    points at the map of each.
    """
    d = tl.arange(0, BLOCK_D)
    at = key + tokens.to(tl.int64)[None, :] * stride_kn + d[:, None] * stride_kd
    if HEAD_DIM < BLOCK_D:
        k = tl.load(at, mask=(d < HEAD_DIM)[:, None], other=0.0)
    else:
        k = tl.load(at)
    if WIDEN:
        k = k.to(tl.float32)
    s = tl.dot(q, k, input_precision="tf32x3")
    if SHARE > 1:
        own = tl.arange(0, BLOCK_Q)[:, None] // (BLOCK_Q // SHARE) == tl.arange(0, SHARE)[None, :]
        s = tl.sum(tl.where(own[:, :, None], tl.reshape(s, (BLOCK_Q, SHARE, KEYS)), 0.0), axis=1)
    return s


@triton.jit
def with_bias(s, bias, tokens, stride_bk, IS_MASK: tl.constexpr):
    """Logits with what is added to those of the tokens given as keys; bias points at the queries' rows."""
    added = tl.load(bias + tokens[None, :] * stride_bk)
    if IS_MASK:
        return s + tl.where(added != 0, 0.0, float("-inf"))  # added: a hidden NaN is still a NaN
    else:
        return s + added.to(tl.float32) * LOG2_E


@triton.jit
def finite(top):
    """A logit to subtract: 0 in place of −inf, so that −inf − top is no NaN."""
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
def add_row(
    s, about, height, even_side, odd_side, state, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr,
    GRID_COLS: tl.constexpr, NEEDS: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A row of the grid into the sums of `state`: logits less `top`, and squares of distances along both sides."""
    even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond = state
    is_odd = 2 * tl.arange(0, PAIRS)[None, :] + 1 < GRID_COLS
    even_t, odd_t, next_t = in_parts(s, BLOCK_Q, GROUPS, PAIRS)
    even_x, odd_x = fast_exp2(even_t, FAST), fast_exp2(odd_t, FAST)
    even_z, odd_z = even_x - about, odd_x - about
    if GRID_COLS % 2:  # the last pair is half a pair
        odd_x = tl.where(is_odd, odd_x, 0.0)
        odd_z = tl.where(is_odd, odd_z, 0.0)
    if DISTANCE & NEEDS:
        far += even_x * fast_sqrt(height + even_side, FAST)
        far += odd_x * fast_sqrt(height + odd_side, FAST)
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
    m, near_n, inside, maps, planes, valid, top, total, pivot, first_even, first_odd, head, state,
    PATCHES: tl.constexpr, PREFIX: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_P: tl.constexpr, PAIRS: tl.constexpr, NEEDS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The metrics of a map's queries from the sums over all rows of the grid; `head` are the logits of the prefix."""
    even_above, odd_above, _, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond = state
    even = 2 * tl.arange(0, PAIRS)[None, :]
    odd = even + 1
    s_z = of_grid(s_even + s_odd, even, GRID_COLS, 1)
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


@triton.jit
def tokens_of_rows(
    MAPS: tl.constexpr, PREFIX: tl.constexpr, GRID_COLS: tl.constexpr, AT_ONCE: tl.constexpr, PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Keys of a product: the first row of the grid, or AT_ONCE of them, as [map · group · row · part · pair]."""
    WIDTH: tl.constexpr = PAIRS // GROUPS
    place = tl.arange(0, 4 * PAIRS * AT_ONCE * MAPS)
    pair = place // (4 * WIDTH * AT_ONCE) % GROUPS * WIDTH + place % WIDTH
    column = tl.minimum(2 * pair + tl.minimum(place // WIDTH % 4, 2), GRID_COLS - 1)
    return PREFIX + place // (4 * WIDTH) % AT_ONCE * GRID_COLS + column


@triton.jit
def pass_over_keys(
    s, top, q, key, tokens, bias, own_tokens, stride_kn, stride_kd, stride_bk, factor, even_side, odd_side, upright,
    row_step, PATCHES: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, BLOCK_Q: tl.constexpr,
    SHARE: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr, WIDEN: tl.constexpr, FAST: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """(The sum [query] of exponentials less `top`, the mean of the first row of the grid [query], that row's columns,
    even and odd, less the mean, all sums); s are the logits of the first row.
    """
    even = 2 * tl.arange(0, PAIRS)[None, :]
    is_odd = even + 1 < GRID_COLS
    lowered = finite(top)[:, None]
    even_t, odd_t, _ = in_parts(s - lowered, BLOCK_Q, GROUPS, PAIRS)
    even_x, odd_x = fast_exp2(even_t, FAST), fast_exp2(odd_t, FAST)
    filled = tl.where(is_odd, odd_x, even_x)  # the last pair may be half a pair
    least, greatest = tl.min(tl.minimum(even_x, filled), axis=1), tl.max(tl.maximum(even_x, filled), axis=1)
    odd_x = tl.where(is_odd, odd_x, 0.0)
    # Of equal values exactly that value: what is left of each is then exactly 0.
    pivot = of_grid(even_x + odd_x, even, GRID_COLS, 1) * (1.0 / GRID_COLS)
    pivot = tl.where(least == greatest, greatest, pivot)
    about = pivot[:, None]
    first_even, first_odd = even_x - about, tl.where(is_odd, odd_x - about, 0.0)

    none = tl.zeros((BLOCK_Q, PAIRS), tl.float32)
    state = none, none, none, none, none, none, none, none, none, none, none, none
    for r in range(0, GRID_ROWS, AT_ONCE):
        s = products(q, key, tokens + r * GRID_COLS, stride_kn, stride_kd,
                     BLOCK_Q, SHARE, 4 * PAIRS * AT_ONCE, HEAD_DIM, BLOCK_D, WIDEN) * factor  # fmt: skip
        if HAS_BIAS:
            s = with_bias(s, bias, own_tokens + r * GRID_COLS, stride_bk, IS_MASK)
        s -= lowered
        height = (r - upright) * row_step
        if AT_ONCE == 2:
            s = tl.reshape(s, (BLOCK_Q, GROUPS, 2, 4 * PAIRS // GROUPS))
            s, below = tl.split(tl.permute(s, (0, 1, 3, 2)))
            state = add_row(tl.reshape(s, (BLOCK_Q, 4 * PAIRS)), about, height * height, even_side, odd_side, state,
                            BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS, HAS_BIAS, FAST)  # fmt: skip
            s = tl.reshape(below, (BLOCK_Q, 4 * PAIRS))
            height += row_step
        state = add_row(s, about, height * height, even_side, odd_side, state,
                        BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS, HAS_BIAS, FAST)  # fmt: skip
    if EDGES & NEEDS:
        total = of_grid(state[3] + state[4], even, GRID_COLS, 1) + PATCHES * pivot
    else:
        total = of_grid(state[2], even, GRID_COLS, 1)
    return total, pivot, first_even, first_odd, state


@triton.jit
def program(
    m, first_map, first_query, query, key, bias, q_starts, k_starts, b_starts, planes, valid, maps,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, SHARE: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr, NEGATE: tl.constexpr, WIDEN: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """BLOCK_Q queries from `first_query` on of map m; or with SHARE > 1 of each of so many maps from `first_map` on.

    m is then the map of each query.
    """
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    TOKENS: tl.constexpr = PREFIX + PATCHES
    ROWS: tl.constexpr = BLOCK_Q // SHARE  # queries of a map
    KEYS: tl.constexpr = 4 * PAIRS
    n = first_query + tl.arange(0, BLOCK_Q) % ROWS
    inside = (n < TOKENS) & (m < maps)
    near_n, near_m = tl.minimum(n, TOKENS - 1), tl.minimum(m, maps - 1)
    d = tl.arange(0, BLOCK_D)
    # A program of one map may have groups, and may take two rows of the grid at once.
    own_tokens = tokens_of_rows(1, PREFIX, GRID_COLS, 1, PAIRS, GROUPS)
    own_rows_tokens = tokens_of_rows(1, PREFIX, GRID_COLS, AT_ONCE, PAIRS, GROUPS)
    tokens = tokens_of_rows(SHARE, PREFIX, GRID_COLS, 1, PAIRS, GROUPS)
    rows_tokens = own_rows_tokens if SHARE == 1 else tokens
    own_head = tl.minimum(tl.arange(0, BLOCK_P), PREFIX - 1)
    head = tl.minimum(tl.arange(0, BLOCK_P * SHARE) % BLOCK_P, PREFIX - 1)
    # Without this the compiler would load two bytes at a time.
    if SHARE > 1:
        q_at = query + tl.multiple_of(tl.load(q_starts + near_m), [ALIGNED])[:, None]
        of_key = tl.minimum(first_map + tl.arange(0, KEYS * SHARE) // KEYS, maps - 1)
        key_at = key + tl.multiple_of(tl.load(k_starts + of_key), [ALIGNED])[None, :]
        of_head = tl.minimum(first_map + tl.arange(0, BLOCK_P * SHARE) // BLOCK_P, maps - 1)
        head_at = key + tl.multiple_of(tl.load(k_starts + of_head), [ALIGNED])[None, :]
    else:
        q_at = query + tl.multiple_of(tl.load(q_starts + near_m), ALIGNED)
        key_at = key + tl.multiple_of(tl.load(k_starts + near_m), ALIGNED)
        head_at = key_at
    q_at += near_n.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
    q = tl.load(q_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    if NEGATE:
        q = -q
    if HAS_BIAS:
        if SHARE > 1:
            bias_rows = bias + tl.load(b_starts + near_m)[:, None] + near_n.to(tl.int64)[:, None] * stride_bq
        else:
            bias_rows = bias + tl.load(b_starts + near_m) + near_n.to(tl.int64)[:, None] * stride_bq
    else:
        bias_rows = bias

    even = 2 * tl.arange(0, PAIRS)[None, :]
    patch = near_n - PREFIX
    side = (even - (patch % GRID_COLS)[:, None]).to(tl.float32) * col_step
    even_side, odd_side = side * side, (side + col_step) * (side + col_step)
    upright = (patch // GRID_COLS).to(tl.float32)[:, None]

    s = products(q, key_at, tokens, stride_kn, stride_kd, BLOCK_Q, SHARE, KEYS, HEAD_DIM, BLOCK_D, WIDEN)
    s *= factor
    if HAS_BIAS:
        s = with_bias(s, bias_rows, own_tokens, stride_bk, IS_MASK)
    top = tl.max(s, axis=1)
    total, pivot, first_even, first_odd, state = pass_over_keys(
        s, top, q, key_at, rows_tokens, bias_rows, own_rows_tokens, stride_kn, stride_kd, stride_bk, factor,
        even_side, odd_side, upright, row_step, PATCHES, GRID_ROWS, GRID_COLS, BLOCK_Q, SHARE, PAIRS, GROUPS, NEEDS,
        HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN, FAST, AT_ONCE,
    )  # fmt: skip
    unfit = inside & ((top == float("-inf")) | ~(total <= MOST_TOTAL))
    if tl.max(unfit.to(tl.int32), axis=0) > 0:
        s = products(q, key_at, tokens, stride_kn, stride_kd, BLOCK_Q, SHARE, KEYS, HEAD_DIM, BLOCK_D, WIDEN)
        s *= factor
        if HAS_BIAS:
            s = with_bias(s, bias_rows, own_tokens, stride_bk, IS_MASK)
        peaks = s
        for r in range(1, GRID_ROWS):
            more = products(q, key_at, tokens + r * GRID_COLS, stride_kn, stride_kd,
                            BLOCK_Q, SHARE, KEYS, HEAD_DIM, BLOCK_D, WIDEN) * factor  # fmt: skip
            if HAS_BIAS:
                more = with_bias(more, bias_rows, own_tokens + r * GRID_COLS, stride_bk, IS_MASK)
            peaks = tl.maximum(peaks, more)
        top = tl.max(peaks, axis=1)
        total, pivot, first_even, first_odd, state = pass_over_keys(
            s, top, q, key_at, rows_tokens, bias_rows, own_rows_tokens, stride_kn, stride_kd, stride_bk, factor,
            even_side, odd_side, upright, row_step, PATCHES, GRID_ROWS, GRID_COLS, BLOCK_Q, SHARE, PAIRS, GROUPS,
            NEEDS, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN, FAST, AT_ONCE,
        )  # fmt: skip

    logits_of_prefix = top
    if PREFIX > 0:
        logits_of_prefix = products(q, head_at, head, stride_kn, stride_kd,
                                    BLOCK_Q, SHARE, BLOCK_P, HEAD_DIM, BLOCK_D, WIDEN) * factor  # fmt: skip
        if HAS_BIAS:
            logits_of_prefix = with_bias(logits_of_prefix, bias_rows, own_head, stride_bk, IS_MASK)
    store_rows(near_m, near_n, inside, maps, planes, valid, top, total, pivot, first_even, first_odd, logits_of_prefix,
               state, PATCHES, PREFIX, GRID_COLS, NUM_EDGES, BLOCK_P, PAIRS, NEEDS, FAST)  # fmt: skip


@triton.jit(do_not_specialize=["maps"])  # a batch of one map is no other kernel
def qk_rows(
    query, key, bias, q_starts, k_starts, b_starts, planes, valid, maps,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCKS: tl.constexpr, SHARE: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr, NEGATE: tl.constexpr, WIDEN: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """From query and key: a softmax over the patches alone, of BLOCK_Q queries a program. `factor` is at least 0.

    SHARE maps are one after another in programs that follow each other, so that their keys are read from memory once:
    BLOCKS programs for each, and one for what is left of the queries of all. A NaN or +inf among the logits makes the
    sum NaN.
    """
    pid = tl.program_id(0)
    if SHARE > 1:
        group, place = pid // (SHARE * BLOCKS + 1), pid % (SHARE * BLOCKS + 1)
        m = group * SHARE + place // BLOCKS if BLOCKS > 0 else maps
        if place < SHARE * BLOCKS:
            program(
                tl.minimum(m, maps - 1), 0, place % BLOCKS * BLOCK_Q, query, key, bias, q_starts, k_starts, b_starts,
                planes, valid, maps, stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step,
                col_step, PREFIX, GRID_ROWS, GRID_COLS, NUM_EDGES, BLOCK_Q, 1, PAIRS, GROUPS, BLOCK_P, NEEDS, HEAD_DIM,
                BLOCK_D, HAS_BIAS, IS_MASK, NEGATE, WIDEN, FAST, ALIGNED, AT_ONCE,
            )  # fmt: skip
        else:
            program(
                group * SHARE + tl.arange(0, BLOCK_Q) // (BLOCK_Q // SHARE), group * SHARE, BLOCKS * BLOCK_Q, query,
                key, bias, q_starts, k_starts, b_starts, planes, valid, maps, stride_qn, stride_qd, stride_kn,
                stride_kd, stride_bq, stride_bk, factor, row_step, col_step, PREFIX, GRID_ROWS, GRID_COLS, NUM_EDGES,
                BLOCK_Q, SHARE, PAIRS, GROUPS, BLOCK_P, NEEDS, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, NEGATE, WIDEN,
                FAST, ALIGNED, 1,
            )  # fmt: skip
    else:
        program(
            pid // BLOCKS, 0, pid % BLOCKS * BLOCK_Q, query, key, bias, q_starts, k_starts, b_starts,
            planes, valid, maps, stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step,
            col_step, PREFIX, GRID_ROWS, GRID_COLS, NUM_EDGES, BLOCK_Q, 1, PAIRS, GROUPS, BLOCK_P, NEEDS, HEAD_DIM,
            BLOCK_D, HAS_BIAS, IS_MASK, NEGATE, WIDEN, FAST, ALIGNED, AT_ONCE,
        )  # fmt: skip
