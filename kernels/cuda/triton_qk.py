"""Device code of the `triton` backend from query and key: a softmax over the patches, a row of the grid at a time.

What makes it fast. A row of the grid is one product, whose columns lie as [even | odd | next even | prefix]: parts of a
tile that are the same registers of the same threads. So neighbours to the right are products of two parts, neighbours
below those of a part with that of the row before, and nothing is moved between threads before the end.

Exponentials are of logits less the greatest of the first rows of the grid, not of all: one pass over the keys, not two.
Where others are so much greater that sums could lose accuracy or overflow, it is done again, less the greatest of all.

Queries follow each other from map to map, 64 a program. One that has queries of two maps multiplies them with the keys
of both, of which a query's own are kept.
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
    PREFIX_MASS,
    fast_exp2,
    fast_log2,
    fast_sqrt,
    of_edges_of_columns,
    of_grid,
    store_edges,
    store_plane,
)

# A row whose exponentials sum to more is done again, less its greatest logit.
MOST_TOTAL = tl.constexpr(1e6)


@triton.jit
def products(
    q, key, tokens, stride_kn, stride_kd, is_second, MAPS: tl.constexpr, BLOCK_Q: tl.constexpr, KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """q·kᵀ of KEYS tokens given as keys. float32 factors go through the matrix units as sums of TF32 numbers.

    With MAPS = 2, `tokens` are those of the one map and those of the other, which `key` points at; `is_second` says
    whose a query is.
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
    if MAPS == 2:
        one, other = tl.split(tl.permute(tl.reshape(s, (BLOCK_Q, 2, KEYS)), (0, 2, 1)))
        s = tl.where(is_second[:, None], other, one)
    return s


@triton.jit
def with_bias(s, bias, tokens, stride_bk, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr):
    """Logits with what is added to those of the tokens given as keys; bias points at the queries' rows."""
    if HAS_BIAS:
        added = tl.load(bias + tokens[None, :] * stride_bk)
        if IS_MASK:
            s += tl.where(added != 0, 0.0, float("-inf"))  # added: a hidden NaN is still a NaN
        else:
            s += added.to(tl.float32) * LOG2_E
    return s


@triton.jit
def finite(top):
    """A logit to subtract: 0 in place of −inf, so that −inf − top is no NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def halves(tile, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """A tile [query, group · half · WIDTH] as its two halves, each [query, group · WIDTH], in the same registers."""
    one, other = tl.split(tl.permute(tl.reshape(tile, (BLOCK_Q, GROUPS, 2, WIDTH)), (0, 1, 3, 2)))
    return tl.reshape(one, (BLOCK_Q, GROUPS * WIDTH)), tl.reshape(other, (BLOCK_Q, GROUPS * WIDTH))


@triton.jit
def parts(tile, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr, PAIRS: tl.constexpr):
    """The four parts of a tile [query, group · part · pair], each [query, pair]."""
    low, high = halves(tile, BLOCK_Q, GROUPS, 2 * PAIRS // GROUPS)
    even, odd = halves(low, BLOCK_Q, GROUPS, PAIRS // GROUPS)
    after, prefix = halves(high, BLOCK_Q, GROUPS, PAIRS // GROUPS)
    return even, odd, after, prefix


@triton.jit
def keys_of_rows(
    MAPS: tl.constexpr, PREFIX: tl.constexpr, GRID_COLS: tl.constexpr, AT_ONCE: tl.constexpr, PAIRS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Tokens of a product: AT_ONCE rows of the grid from the first on, as [map · group · row · part · pair].

    In the fourth part of the first row the prefix, as far as it fits.
    """
    WIDTH: tl.constexpr = PAIRS // GROUPS
    place = tl.arange(0, 4 * PAIRS * AT_ONCE * MAPS)
    pair = place // (4 * WIDTH * AT_ONCE) % GROUPS * WIDTH + place % WIDTH
    part, row = place // WIDTH % 4, place // (4 * WIDTH) % AT_ONCE
    tokens = PREFIX + row * GRID_COLS + tl.minimum(2 * pair + tl.minimum(part, 2), GRID_COLS - 1)
    if PREFIX > 0:
        tokens = tl.where((part == 3) & (row == 0), tl.minimum(pair, PREFIX - 1), tokens)
    return tokens


@triton.jit
def add_row(
    s, about, nothing, height, even_side, odd_side, state, BLOCK_Q: tl.constexpr, GROUPS: tl.constexpr,
    PAIRS: tl.constexpr, GRID_COLS: tl.constexpr, NEEDS: tl.constexpr, HAS_BIAS: tl.constexpr, FAST: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """A row of the grid into the sums of `state`: logits less `top`, and squares of distances along both sides."""
    even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond = state
    is_odd = 2 * tl.arange(0, PAIRS)[None, :] + 1 < GRID_COLS
    even_t, odd_t, next_t, _ = parts(s, BLOCK_Q, GROUPS, PAIRS)
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
        beyond += odd_z * next_z
        if not IS_FIRST:
            within += even_z * even_above
            within += odd_z * odd_above
        if GEARY & NEEDS:
            gap = tl.where(is_odd, even_z - odd_z, 0.0)
            apart_within += gap * gap
            apart_beyond += (odd_z - next_z) * (odd_z - next_z)
            if not IS_FIRST:
                apart_within += (even_z - even_above) * (even_z - even_above)
                apart_within += (odd_z - odd_above) * (odd_z - odd_above)
        # The same values, but no copies: ptxas 12.8 and 12.9 take a copy that goes round the loop for the value of the
        # present row, where they write the loop out. `nothing` is a 0 that they cannot know; 0.0 did not always do.
        even_above, odd_above = even_z + nothing, odd_z + nothing
    else:
        sums += even_x
        sums += odd_x
    return even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond


@triton.jit
def first_logits(
    q, key, tokens, bias, own_tokens, stride_kn, stride_kd, stride_bk, factor, is_second, MAPS: tl.constexpr,
    GRID_COLS: tl.constexpr, BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, AT_ONCE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """(logits of the first row of the grid, of the second, or again the first, the greatest of both [query])."""
    s = products(q, key, tokens, stride_kn, stride_kd, is_second,
                 MAPS, BLOCK_Q, 4 * PAIRS * AT_ONCE, HEAD_DIM, BLOCK_D, WIDEN) * factor  # fmt: skip
    s = with_bias(s, bias, own_tokens, stride_bk, HAS_BIAS, IS_MASK)
    one, other = s, s
    if AT_ONCE == 2:
        one, other = halves(s, BLOCK_Q, GROUPS, 4 * PAIRS // GROUPS)
    even, odd, _, _ = parts(one, BLOCK_Q, GROUPS, PAIRS)
    peaks = tl.maximum(even, odd)  # beyond the last column it is repeated
    even, odd, _, _ = parts(other, BLOCK_Q, GROUPS, PAIRS)
    return one, other, tl.max(tl.maximum(peaks, tl.maximum(even, odd)), axis=1)


@triton.jit
def pass_over_keys(
    one, other, top, q, key, tokens, bias, own_tokens, stride_kn, stride_kd, stride_bk, factor, is_second, even_side,
    odd_side, upright, row_step, MAPS: tl.constexpr, PATCHES: tl.constexpr, GRID_ROWS: tl.constexpr,
    GRID_COLS: tl.constexpr, BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, AT_ONCE: tl.constexpr,
    NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr,
    WIDEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(The sum [query] of exponentials less `top`, all sums); `one` and `other` are of `first_logits`."""
    even = 2 * tl.arange(0, PAIRS)[None, :]
    is_odd = even + 1 < GRID_COLS
    lowered = finite(top)[:, None]
    even_t, odd_t, _, _ = parts(one - lowered, BLOCK_Q, GROUPS, PAIRS)
    even_x, odd_x = fast_exp2(even_t, FAST), fast_exp2(odd_t, FAST)
    filled = tl.where(is_odd, odd_x, even_x)  # the last pair may be half a pair
    least, greatest = tl.min(tl.minimum(even_x, filled), axis=1), tl.max(tl.maximum(even_x, filled), axis=1)
    # The mean of the first row. Of equal values exactly that value: what is left of each is then exactly 0.
    pivot = of_grid(even_x + tl.where(is_odd, odd_x, 0.0), even, GRID_COLS, 1) * (1.0 / GRID_COLS)
    pivot = tl.where(least == greatest, greatest, pivot)
    about = pivot[:, None]
    nothing = row_step * 0.0  # see `add_row`

    none = tl.zeros((BLOCK_Q, PAIRS), tl.float32)
    state = none, none, none, none, none, none, none, none, none, none, none, none
    height = upright * row_step
    state = add_row(one - lowered, about, nothing, height * height, even_side, odd_side, state,
                    BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS, HAS_BIAS, FAST, True)  # fmt: skip
    if AT_ONCE == 2:
        height = (1 - upright) * row_step
        state = add_row(other - lowered, about, nothing, height * height, even_side, odd_side, state,
                        BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS, HAS_BIAS, FAST, False)  # fmt: skip
    for r in range(AT_ONCE, GRID_ROWS, AT_ONCE):
        s = products(q, key, tokens + r * GRID_COLS, stride_kn, stride_kd, is_second,
                     MAPS, BLOCK_Q, 4 * PAIRS * AT_ONCE, HEAD_DIM, BLOCK_D, WIDEN) * factor  # fmt: skip
        s = with_bias(s, bias, own_tokens + r * GRID_COLS, stride_bk, HAS_BIAS, IS_MASK) - lowered
        height = (r - upright) * row_step
        if AT_ONCE == 2:
            s, below = halves(s, BLOCK_Q, GROUPS, 4 * PAIRS // GROUPS)
            state = add_row(s, about, nothing, height * height, even_side, odd_side, state,
                            BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS, HAS_BIAS, FAST, False)  # fmt: skip
            s = below
            height += row_step
        state = add_row(s, about, nothing, height * height, even_side, odd_side, state,
                        BLOCK_Q, GROUPS, PAIRS, GRID_COLS, NEEDS, HAS_BIAS, FAST, False)  # fmt: skip
    if EDGES & NEEDS:
        total = of_grid(state[3] + state[4], even, GRID_COLS, 1) + PATCHES * pivot
    else:
        total = of_grid(state[2], even, GRID_COLS, 1)
    return total, state


@triton.jit
def store_rows(
    at, inside, rows, planes, valid, top, total, prefix, state, PATCHES: tl.constexpr, PREFIX: tl.constexpr,
    GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr, BLOCK_P: tl.constexpr, PAIRS: tl.constexpr, NEEDS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """The metrics of queries from the sums over all rows of the grid; `prefix` are logits of BLOCK_P keys."""
    even_above, odd_above, _, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond = state
    even = 2 * tl.arange(0, PAIRS)[None, :]
    highest, mass, on_all = top, total * 0.0, total
    if PREFIX > 0:
        prefix = tl.where((tl.arange(0, BLOCK_P) < PREFIX)[None, :], prefix, float("-inf"))
        highest = tl.maximum(top, tl.max(prefix, axis=1))
        on_prefix = tl.sum(fast_exp2(prefix - finite(highest)[:, None], FAST), axis=1)
        on_all = on_prefix + total * fast_exp2(top - finite(highest), FAST)
        mass = on_prefix / tl.where(on_all > 0, on_all, 1.0)
    is_valid = (on_all == on_all) & (highest > float("-inf"))
    tl.store(valid + at, is_valid.to(tl.int8), mask=inside)
    if PREFIX_MASS & NEEDS:
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
        # The first row sums to nothing, less its own mean.
        ends = of_edges_of_columns(s_even, even, GRID_COLS) - even_above
        ends += tl.where(even + 1 < GRID_COLS, of_edges_of_columns(s_odd, even + 1, GRID_COLS) - odd_above, 0.0)
        cross = tl.where(even < GRID_COLS, within, 0.0) + tl.where(even + 2 < GRID_COLS, beyond, 0.0)
        apart = tl.where(even < GRID_COLS, apart_within, 0.0) + tl.where(even + 2 < GRID_COLS, apart_beyond, 0.0)
        store_edges(
            planes, at, inside, rows, defined, squares > 0, of_grid(s_even + s_odd, even, GRID_COLS, 1), squares,
            tl.sum(cross, axis=1), of_grid(ends, even, GRID_COLS, 1), tl.sum(apart, axis=1), PATCHES, NUM_EDGES, NEEDS,
        )  # fmt: skip


@triton.jit
def program(
    m, n, at, inside, first_map, query, key, bias, q_starts, k_starts, b_starts, planes, valid, maps,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step, MAPS: tl.constexpr,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_P: tl.constexpr,
    NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr,
    NEGATE: tl.constexpr, WIDEN: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Queries n of map m; with MAPS = 2 m is the map of each, `first_map` or the next."""
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    d = tl.arange(0, BLOCK_D)
    own_tokens = keys_of_rows(1, PREFIX, GRID_COLS, AT_ONCE, PAIRS, GROUPS)
    tokens = keys_of_rows(MAPS, PREFIX, GRID_COLS, AT_ONCE, PAIRS, GROUPS)
    # Without this the compiler would load two bytes at a time.
    if MAPS == 2:
        KEYS: tl.constexpr = 4 * PAIRS * AT_ONCE
        is_second = m > first_map
        q_at = query + tl.multiple_of(tl.load(q_starts + m), [ALIGNED])[:, None]
        of_key = tl.minimum(first_map + tl.arange(0, 2 * KEYS) // KEYS, maps - 1)
        key_at = key + tl.multiple_of(tl.load(k_starts + of_key), [ALIGNED])[None, :]
        bias_rows = bias
    else:
        is_second = n < 0
        q_at = query + tl.multiple_of(tl.load(q_starts + m), ALIGNED)
        key_at = key + tl.multiple_of(tl.load(k_starts + m), ALIGNED)
        bias_rows = bias
        if HAS_BIAS:
            bias_rows = bias + tl.load(b_starts + m) + n.to(tl.int64)[:, None] * stride_bq
    q_at += n.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
    q = tl.load(q_at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    if NEGATE:
        q = -q
    patch = n - PREFIX
    side = (2 * tl.arange(0, PAIRS)[None, :] - (patch % GRID_COLS)[:, None]).to(tl.float32) * col_step
    even_side, odd_side = side * side, (side + col_step) * (side + col_step)
    upright = (patch // GRID_COLS).to(tl.float32)[:, None]

    one, other, top = first_logits(
        q, key_at, tokens, bias_rows, own_tokens, stride_kn, stride_kd, stride_bk, factor, is_second, MAPS, GRID_COLS,
        BLOCK_Q, PAIRS, GROUPS, AT_ONCE, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
    )  # fmt: skip
    prefix = parts(one, BLOCK_Q, GROUPS, PAIRS)[3]
    if PREFIX > PAIRS:
        prefix_tokens = tl.minimum(tl.arange(0, BLOCK_P), PREFIX - 1)
        prefix = products(q, key_at, prefix_tokens, stride_kn, stride_kd, is_second,
                          1, BLOCK_Q, BLOCK_P, HEAD_DIM, BLOCK_D, WIDEN) * factor  # fmt: skip
        prefix = with_bias(prefix, bias_rows, prefix_tokens, stride_bk, HAS_BIAS, IS_MASK)
    total, state = pass_over_keys(
        one, other, top, q, key_at, tokens, bias_rows, own_tokens, stride_kn, stride_kd, stride_bk, factor, is_second,
        even_side, odd_side, upright, row_step, MAPS, PATCHES, GRID_ROWS, GRID_COLS, BLOCK_Q, PAIRS, GROUPS, AT_ONCE,
        NEEDS, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN, FAST,
    )  # fmt: skip
    unfit = inside & ((top == float("-inf")) | ~(total <= MOST_TOTAL))
    if tl.max(unfit.to(tl.int32), axis=0) > 0:
        one, other, top = first_logits(
            q, key_at, tokens, bias_rows, own_tokens, stride_kn, stride_kd, stride_bk, factor, is_second, MAPS,
            GRID_COLS, BLOCK_Q, PAIRS, GROUPS, AT_ONCE, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
        )  # fmt: skip
        for r in range(AT_ONCE, GRID_ROWS, AT_ONCE):
            more = first_logits(
                q, key_at, tokens + r * GRID_COLS, bias_rows, own_tokens + r * GRID_COLS, stride_kn, stride_kd,
                stride_bk, factor, is_second, MAPS, GRID_COLS, BLOCK_Q, PAIRS, GROUPS, AT_ONCE, HEAD_DIM, BLOCK_D,
                HAS_BIAS, IS_MASK, WIDEN,
            )[2]  # fmt: skip
            top = tl.maximum(top, more)
        total, state = pass_over_keys(
            one, other, top, q, key_at, tokens, bias_rows, own_tokens, stride_kn, stride_kd, stride_bk, factor,
            is_second, even_side, odd_side, upright, row_step, MAPS, PATCHES, GRID_ROWS, GRID_COLS, BLOCK_Q, PAIRS,
            GROUPS, AT_ONCE, NEEDS, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN, FAST,
        )  # fmt: skip
    rows = maps.to(tl.int64) * (PREFIX + PATCHES)
    store_rows(at, inside, rows, planes, valid, top, total, prefix, state, PATCHES, PREFIX, GRID_COLS, NUM_EDGES,
               BLOCK_P if PREFIX > PAIRS else PAIRS, PAIRS, NEEDS, FAST)  # fmt: skip


@triton.jit(do_not_specialize=["maps"])  # a batch of one map is no other kernel
def qk_rows(
    query, key, bias, q_starts, k_starts, b_starts, planes, valid, maps,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr, AT_ONCE: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr, NEEDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_MASK: tl.constexpr, NEGATE: tl.constexpr, WIDEN: tl.constexpr, FAST: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """From query and key: a softmax over the patches alone, of BLOCK_Q queries a program. `factor` is at least 0.

    FLAT: they are counted over all maps, else those of a map begin with a program. Programs of one map follow each
    other: its keys are read from memory once. A NaN or +inf among the logits makes the sum NaN. Products that overflow
    float32 to −inf leave a row without entropy.
    """
    TOKENS: tl.constexpr = PREFIX + GRID_ROWS * GRID_COLS
    BLOCKS: tl.constexpr = (TOKENS + BLOCK_Q - 1) // BLOCK_Q
    pid = tl.program_id(0)
    if FLAT:
        last = maps.to(tl.int64) * TOKENS - 1
        first = pid.to(tl.int64) * BLOCK_Q
        at = tl.minimum(first + tl.arange(0, BLOCK_Q), last)
        inside = first + tl.arange(0, BLOCK_Q) <= last
        first_map = (first // TOKENS).to(tl.int32)
        n = (first - first_map * TOKENS).to(tl.int32) + (at - first).to(tl.int32)
        if tl.minimum(first + BLOCK_Q - 1, last) // TOKENS == first_map:
            program(
                first_map, n, at, inside, first_map, query, key, bias, q_starts, k_starts, b_starts, planes, valid,
                maps, stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step, 1,
                PREFIX, GRID_ROWS, GRID_COLS, NUM_EDGES, BLOCK_Q, PAIRS, GROUPS, AT_ONCE, BLOCK_P, NEEDS, HEAD_DIM,
                BLOCK_D, HAS_BIAS, IS_MASK, NEGATE, WIDEN, FAST, ALIGNED,
            )  # fmt: skip
        else:
            m = first_map + (n >= TOKENS).to(tl.int32)
            program(
                m, n % TOKENS, at, inside, first_map, query, key, bias, q_starts, k_starts, b_starts, planes, valid,
                maps, stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step, 2,
                PREFIX, GRID_ROWS, GRID_COLS, NUM_EDGES, BLOCK_Q, PAIRS, GROUPS, 1, BLOCK_P, NEEDS, HEAD_DIM, BLOCK_D,
                HAS_BIAS, IS_MASK, NEGATE, WIDEN, FAST, ALIGNED,
            )  # fmt: skip
    else:
        m = pid // BLOCKS
        n = pid % BLOCKS * BLOCK_Q + tl.arange(0, BLOCK_Q)
        inside = n < TOKENS
        n = tl.minimum(n, TOKENS - 1)
        program(
            m, n, m.to(tl.int64) * TOKENS + n, inside, m, query, key, bias, q_starts, k_starts, b_starts, planes, valid,
            maps, stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor, row_step, col_step, 1,
            PREFIX, GRID_ROWS, GRID_COLS, NUM_EDGES, BLOCK_Q, PAIRS, GROUPS, AT_ONCE, BLOCK_P, NEEDS, HEAD_DIM,
            BLOCK_D, HAS_BIAS, IS_MASK, NEGATE, WIDEN, FAST, ALIGNED,
        )  # fmt: skip
