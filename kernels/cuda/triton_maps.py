"""Device code of the `triton` backend from stored maps: rows in one pass, a row of the grid at a time.

What makes it fast. A tile holds the same row of the grid of several queries, so the neighbour below is the tile of the
step after, in the same registers; nothing is summed over lanes before the end; values are centred as they come, about
the mean of their first grid row. That is no worse than centring about the true mean by a factor of the number of grid
rows: where the first row's mean is off by δ, the first row differs from the others, and Σz² is at least C·δ². What is
left of the mean is taken out of the sums at the end.
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
    at_ends,
    fast_log2,
    fast_sqrt,
    of_grid,
    store_edges,
    store_plane,
    widened,
)

# Added to a value before its logarithm: below it x·log x is 0 in float32 anyway.
NOTHING = tl.constexpr(1e-30)
# Rows whose patches sum to less are done again, scaled: squares of their values would underflow.
LEAST_TOTAL = tl.constexpr(1e-12)


@triton.jit
def rows_of_maps(
    even_at, odd_at, next_at, r, COUNT: tl.constexpr, stride_k, pivot, begin, even_side, odd_side, upright, row_step,
    is_odd, state, GRID_COLS: tl.constexpr, NEEDS: tl.constexpr, IS_BFLOAT16: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """COUNT rows of the grid from row r on, into the sums of `state`; the pointers are those of row r."""
    (
        even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond, unlike,
    ) = state  # fmt: skip
    for i in tl.static_range(COUNT):
        even = widened(tl.load(even_at + i * GRID_COLS * stride_k), IS_BFLOAT16)
        odd = widened(tl.load(odd_at + i * GRID_COLS * stride_k), IS_BFLOAT16)
        unlike |= even.to(tl.int32, bitcast=True) ^ begin
        unlike |= odd.to(tl.int32, bitcast=True) ^ begin
        even_z, odd_z = even - pivot, odd - pivot
        if GRID_COLS % 2:  # the last pair is half a pair
            odd = tl.where(is_odd, odd, 0.0)
            odd_z = tl.where(is_odd, odd_z, 0.0)
        sums += even
        sums += odd
        if DISTANCE & NEEDS:
            height = (r + i - upright) * row_step
            height *= height
            far += even * fast_sqrt(height + even_side, FAST)
            far += odd * fast_sqrt(height + odd_side, FAST)
        if ENTROPY & NEEDS:
            logs += even * fast_log2(even + NOTHING, FAST)
            logs += odd * fast_log2(odd + NOTHING, FAST)
        if EDGES & NEEDS:
            next_z = widened(tl.load(next_at + i * GRID_COLS * stride_k), IS_BFLOAT16) - pivot
            s_even += even_z
            s_odd += odd_z
            s_sq += even_z * even_z
            s_sq += odd_z * odd_z
            within += even_z * even_above
            within += odd_z * odd_above
            within += even_z * odd_z
            beyond += odd_z * next_z
            if GEARY & NEEDS:
                gap = tl.where(is_odd, even_z - odd_z, 0.0)
                apart_within += gap * gap
                apart_within += (even_z - even_above) * (even_z - even_above)
                apart_within += (odd_z - odd_above) * (odd_z - odd_above)
                apart_beyond += (odd_z - next_z) * (odd_z - next_z)
            even_above, odd_above = even_z, odd_z
    return (
        even_above, odd_above, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond, unlike,
    )  # fmt: skip


@triton.jit(do_not_specialize=["maps"])  # a batch of one map is no other kernel
def attention_rows(
    attention, starts, planes, valid, again, maps, stride_q, stride_k, tolerance, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr,
    UNROLL: tl.constexpr, NEEDS: tl.constexpr, IS_BFLOAT16: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Stored maps: BLOCK_M maps by BLOCK_Q queries a program, whose distances serve every map.

    Columns go in pairs, even and odd, so that half the neighbours to the right need no load; PAIRS lanes hold a row.
    """
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    TOKENS: tl.constexpr = PREFIX + PATCHES
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (m < maps)[:, None] & (n < TOKENS)[None, :]
    near_m, near_n = tl.minimum(m, maps - 1), tl.minimum(n, TOKENS - 1)
    even = 2 * tl.arange(0, PAIRS)[None, None, :]
    odd = even + 1
    # 64 bits: a token of a strided view can lie beyond 2³¹ elements.
    row = attention + tl.load(starts + near_m)[:, None, None] + near_n.to(tl.int64)[None, :, None] * stride_q
    even_at = row + (PREFIX + tl.minimum(even, GRID_COLS - 1)) * stride_k
    odd_at = row + (PREFIX + tl.minimum(odd, GRID_COLS - 1)) * stride_k
    next_at = row + (PREFIX + tl.minimum(even + 2, GRID_COLS - 1)) * stride_k

    begin = widened(tl.load(row + PREFIX * stride_k), IS_BFLOAT16).to(tl.int32, bitcast=True)  # every row's first patch
    first_even, first_odd = widened(tl.load(even_at), IS_BFLOAT16), widened(tl.load(odd_at), IS_BFLOAT16)
    first_odd = tl.where(odd < GRID_COLS, first_odd, 0.0)
    pivot = of_grid(first_even + first_odd, even, GRID_COLS, 2)[:, :, None] * (1.0 / GRID_COLS)
    first_even -= pivot
    first_odd = tl.where(odd < GRID_COLS, first_odd - pivot, 0.0)
    patch = near_n - PREFIX
    side = (even - (patch % GRID_COLS)[None, :, None]).to(tl.float32) * col_step
    even_side, odd_side = side * side, (side + col_step) * (side + col_step)
    upright = (patch // GRID_COLS).to(tl.float32)[None, :, None]

    none = tl.zeros((BLOCK_M, BLOCK_Q, PAIRS), tl.float32)
    no_bits = tl.zeros((BLOCK_M, BLOCK_Q, PAIRS), tl.int32)
    state = none, none, none, none, none, none, none, none, none, none, none, none, no_bits
    whole: tl.constexpr = GRID_ROWS // UNROLL * UNROLL
    for r in range(0, whole, UNROLL):
        state = rows_of_maps(
            even_at, odd_at, next_at, r, UNROLL, stride_k, pivot, begin, even_side, odd_side, upright, row_step,
            odd < GRID_COLS, state, GRID_COLS, NEEDS, IS_BFLOAT16, FAST,
        )  # fmt: skip
        even_at += UNROLL * GRID_COLS * stride_k
        odd_at += UNROLL * GRID_COLS * stride_k
        next_at += UNROLL * GRID_COLS * stride_k
    state = rows_of_maps(
        even_at, odd_at, next_at, whole, GRID_ROWS - whole, stride_k, pivot, begin, even_side, odd_side, upright,
        row_step, odd < GRID_COLS, state, GRID_COLS, NEEDS, IS_BFLOAT16, FAST,
    )  # fmt: skip
    (
        last_even, last_odd, sums, s_even, s_odd, s_sq, within, beyond, far, logs, apart_within, apart_beyond, unlike,
    ) = state  # fmt: skip

    rows = maps.to(tl.int64) * TOKENS
    at = near_m.to(tl.int64)[:, None] * TOKENS + near_n[None, :]
    total = of_grid(sums, even, GRID_COLS, 2)
    # 1: a value differs from the first; 2: one has another sign. −0 has a sign too: rows with any are done again.
    marks = tl.where(unlike < 0, 2.0, tl.where(unlike != 0, 1.0, 0.0))
    mark = tl.max(tl.where(even < GRID_COLS, marks, 0.0), axis=2)
    varies, signed = mark > 0, (mark > 1) | (tl.min(begin, axis=2) < 0)
    mass = tl.zeros((BLOCK_M, BLOCK_Q), tl.float32)
    if PREFIX > 0:
        p = tl.arange(0, BLOCK_P)[None, None, :]
        head = widened(tl.load(row + tl.minimum(p, PREFIX - 1) * stride_k), IS_BFLOAT16)
        mass = tl.sum(tl.where(p < PREFIX, head, 0.0), axis=2)
        signed |= tl.min(head, axis=2) < 0
    # A sum that is NaN or infinite fails the comparison.
    is_valid = tl.abs(mass + total - 1.0) <= tolerance
    tl.store(valid + at, is_valid.to(tl.int8), mask=inside)
    redo = signed | ((tl.abs(total) < LEAST_TOTAL) & varies)
    tl.store(again + at, redo.to(tl.int8), mask=inside)
    store_plane(planes, AT_PREFIX_MASS, at, tl.where(is_valid, mass, float("nan")), inside, rows)
    defined = is_valid & (total > 0)
    divisor = tl.where(defined, total, 1.0)
    share = 1.0 / divisor
    if DISTANCE & NEEDS:
        distance = of_grid(far, even, GRID_COLS, 2) * share
        store_plane(planes, AT_DISTANCE, at, tl.where(defined, distance, float("nan")), inside, rows)
    if ENTROPY & NEEDS:
        nat = LN_2 * (fast_log2(divisor, FAST) - of_grid(logs, even, GRID_COLS, 2) * share)
        store_plane(planes, AT_ENTROPY, at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), inside, rows)
    if EDGES & NEEDS:
        ends = at_ends(s_even, first_even, last_even, even, GRID_COLS)
        ends += at_ends(s_odd, first_odd, last_odd, odd, GRID_COLS)
        apart_within -= first_even * first_even + first_odd * first_odd  # the first row has none above it
        cross = tl.where(even < GRID_COLS, within, 0.0) + tl.where(even + 2 < GRID_COLS, beyond, 0.0)
        apart = tl.where(even < GRID_COLS, apart_within, 0.0) + tl.where(even + 2 < GRID_COLS, apart_beyond, 0.0)
        store_edges(
            planes, at, inside, rows, defined, varies, of_grid(s_even + s_odd, even, GRID_COLS, 2),
            of_grid(s_sq, even, GRID_COLS, 2), tl.sum(cross, axis=2), of_grid(ends, even, GRID_COLS, 2),
            tl.sum(apart, axis=2), PATCHES, NUM_EDGES, NEEDS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["maps"])  # a batch of one map is no other kernel
def exact_rows(
    attention, starts, planes, valid, again, maps, stride_q, stride_k, tolerance, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, NEEDS: tl.constexpr, IS_BFLOAT16: tl.constexpr,
):  # fmt: skip
    """Rows that `attention_rows` marked `again`, one after another, scaled by a power of two; a map per program."""
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    TOKENS: tl.constexpr = PREFIX + PATCHES
    m = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    if tl.max(tl.load(again + m * TOKENS + t, mask=t < TOKENS, other=0).to(tl.int32), axis=0) > 0:
        rows = maps.to(tl.int64) * TOKENS
        k = tl.arange(0, BLOCK_K)
        there = k < PATCHES
        has_right = there & (k % GRID_COLS < GRID_COLS - 1)
        has_below = k + GRID_COLS < PATCHES
        for n in range(0, TOKENS):
            at = m * TOKENS + n
            if tl.load(again + at) != 0:
                row = attention + tl.load(starts + m) + tl.cast(n, tl.int64) * stride_q
                mass = 0.0
                negative = 0
                if PREFIX > 0:
                    p = tl.arange(0, BLOCK_P)
                    head = widened(tl.load(row + p * stride_k, mask=p < PREFIX, other=0.0), IS_BFLOAT16)
                    mass = tl.sum(head, axis=0)
                    negative = tl.max((head < 0).to(tl.int32), axis=0)
                here = row + (PREFIX + k) * stride_k
                x = widened(tl.load(here, mask=there, other=0.0), IS_BFLOAT16)
                negative = tl.maximum(negative, tl.max((x < 0).to(tl.int32), axis=0))
                total = tl.sum(x, axis=0)
                is_valid = (tl.abs(mass + total - 1.0) <= tolerance) & (negative == 0)
                tl.store(valid + at, is_valid.to(tl.int8))
                tl.store(planes + rows * AT_PREFIX_MASS + at, tl.where(is_valid, mass, float("nan")))
                # A power of two, by its bits, takes the sum into [1, 2): exact.
                exponent = (total.to(tl.int32, bitcast=True) >> 23) & 0xFF
                factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
                defined = is_valid & (total > 0)
                least = tl.min(tl.where(there, x, float("inf")), axis=0)
                greatest = tl.max(tl.where(there, x, float("-inf")), axis=0)
                x *= factor
                total *= factor
                divisor = tl.where(defined, total, 1.0)
                if DISTANCE & NEEDS:
                    patch = n - PREFIX
                    height = (k // GRID_COLS - patch // GRID_COLS).to(tl.float32) * row_step
                    width = (k % GRID_COLS - patch % GRID_COLS).to(tl.float32) * col_step
                    distance = tl.sum(x * tl.sqrt(height * height + width * width), axis=0) / divisor
                    tl.store(planes + rows * AT_DISTANCE + at, tl.where(defined, distance, float("nan")))
                if ENTROPY & NEEDS:
                    logs = tl.sum(x * tl.log2(tl.where(x > 0, x, 1.0)), axis=0)
                    nat = LN_2 * (tl.log2(divisor) - logs / divisor)
                    tl.store(planes + rows * AT_ENTROPY + at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")))
                if EDGES & NEEDS:
                    mean = total / PATCHES
                    z = tl.where(there, x - mean, 0.0)
                    step = factor.to(tl.float32)
                    right = widened(tl.load(here + stride_k, mask=has_right, other=0.0), IS_BFLOAT16)
                    below = widened(tl.load(here + GRID_COLS * stride_k, mask=has_below, other=0.0), IS_BFLOAT16)
                    right = tl.where(has_right, right * step - mean, 0.0)
                    below = tl.where(has_below, below * step - mean, 0.0)
                    from_left, from_above = tl.where(has_right, z, 0.0), tl.where(has_below, z, 0.0)
                    over, under = from_left - right, from_above - below
                    store_edges(
                        planes, at, is_valid | True, rows, defined, least != greatest, tl.sum(z, axis=0),
                        tl.sum(z * z, axis=0), tl.sum(from_left * right + from_above * below, axis=0),
                        tl.sum(from_left + right + from_above + below, axis=0),
                        tl.sum(over * over + under * under, axis=0), PATCHES, NUM_EDGES, NEEDS,
                    )  # fmt: skip
