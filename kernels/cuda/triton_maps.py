"""Device code of the `triton` backend from stored maps: rows in one pass, a row of the grid at a time.

What makes it fast. A thread holds WIDTH neighbouring columns of the same query in a few maps, whose distances it works
out once, and walks down the grid: the neighbour above is the value of the step before, in a register, and nothing is
summed over threads before the end. Halves are read as the aligned 16 bytes that hold them, and shifted into place.
Values are centred as they come, about the mean of their first grid row. That is no worse than centring about the true
mean by a factor of the number of grid rows: where the first row's mean is off by δ, the first row differs from the
others, and Σz² is at least C·δ². Where it is clearly off, they are centred about what the row's sum of 1 leaves to a
patch. What is left of the mean is taken out of the sums at the end.
"""

# Triton types device code: its parameters take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,var-annotated,assignment,misc"
# Nor does it know starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kernels.cuda.triton_reads import columns_of, loaded, loaded_row
from kernels.cuda.triton_rows import (
    AT_DISTANCE,
    AT_ENTROPY,
    AT_PREFIX_MASS,
    DISTANCE,
    EDGES,
    ENTROPY,
    GEARY,
    LN_2,
    fast_log2,
    fast_sqrt,
    store_edges,
    store_plane,
    widened,
)

# Added to a value before its logarithm: below it x·log x is 0 in float32 anyway.
NOTHING = tl.constexpr(1e-30)
# Rows whose patches sum to less are done again, scaled: squares of what sets their values apart could underflow.
LEAST_TOTAL = tl.constexpr(1e-8)


@triton.jit
def add_row(
    x, pivot, is_full, is_first, is_last, roots, state,
    GRID_COLS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    NEEDS: tl.constexpr, IS_SHORT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """A row of the grid into the sums of one map."""
    above, sums, s_z, border, s_sq, within, beyond, far, logs, apart_within, apart_beyond, bits = state
    cut: tl.constexpr = GRID_COLS % WIDTH if GRID_COLS % WIDTH else SLOTS  # one thread's columns may not be all there
    z = ()
    for j in tl.static_range(SLOTS):
        z = z + (x[j] - (tl.where(is_full, pivot, 0.0) if j >= cut else pivot),)
    # A row's own first: hundreds of equal numbers, one after another, would be rounded the same way every time.
    total = x[0]
    for j in tl.static_range(1, WIDTH):
        total += x[j]
    sums += total
    if ENTROPY & NEEDS:
        bits_of_row = x[0] * fast_log2(x[0] + NOTHING, FAST)
        for j in tl.static_range(1, WIDTH):
            bits_of_row += x[j] * fast_log2(x[j] + NOTHING, FAST)
        logs += bits_of_row
    for j in tl.static_range(WIDTH):
        if DISTANCE & NEEDS:
            far += x[j] * roots[j]
        if EDGES & NEEDS:
            if not IS_SHORT:
                s_z += z[j]
            s_sq += z[j] * z[j]
            within += z[j] * above[j]
            if j > 0:
                within += z[j] * z[j - 1]
            if GEARY & NEEDS:
                apart_within += (z[j] - above[j]) * (z[j] - above[j])
                if j > 0:
                    gap = z[j] - z[j - 1]
                    if j >= cut:
                        gap = tl.where(is_full, gap, 0.0)
                    apart_within += gap * gap
    if EDGES & NEEDS:
        border += z[0] * is_first
        border += z[(GRID_COLS - 1) % WIDTH] * is_last
        if SLOTS > WIDTH:
            beyond += z[WIDTH - 1] * z[WIDTH]
            if GEARY & NEEDS:
                apart_beyond += (z[WIDTH - 1] - z[WIDTH]) * (z[WIDTH - 1] - z[WIDTH])
        above = z
    return above, sums, s_z, border, s_sq, within, beyond, far, logs, apart_within, apart_beyond, bits


@triton.jit
def add_row_of_maps(
    raws, r, is_full, is_first, is_last, pivots, sides, upright, row_step, states,
    MAPS: tl.constexpr, GRID_COLS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    WORDS: tl.constexpr, NEEDS: tl.constexpr, IS_SHORT: tl.constexpr, IS_BFLOAT16: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Row r of the grid into the sums of every map."""
    height = (r - upright) * row_step
    roots, added = (), ()
    for j in tl.static_range(WIDTH):
        roots = roots + (fast_sqrt(height * height + sides[j], FAST),)
    for k in tl.static_range(MAPS):
        x, signs = columns_of(raws[k], is_full, GRID_COLS, WIDTH, SLOTS, WORDS, IS_BFLOAT16, FAST)
        sums = add_row(
            x, pivots[k], is_full, is_first, is_last, roots, states[k], GRID_COLS, WIDTH, SLOTS, NEEDS, IS_SHORT, FAST
        )
        added = added + (sums[:11] + (sums[11] | signs,),)
    return added


@triton.jit(do_not_specialize=["maps"])  # a batch of one map is no other kernel
def attention_rows(
    attention, starts, planes, valid, again, maps, stride_q, stride_k, tolerance, row_step, col_step,
    PREFIX: tl.constexpr, GRID_ROWS: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    MAPS: tl.constexpr, BLOCK_Q: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr,
    UNROLL: tl.constexpr, NEEDS: tl.constexpr, WORDS: tl.constexpr, IS_SHORT: tl.constexpr,
    IS_BFLOAT16: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Stored maps: a thread has one of the LANES parts of a query's columns, in MAPS maps.

    WORDS: halves next to each other in memory, read eight at a time.
    A tile has one axis, an element a thread: of more axes, compilers disagree which one runs along the threads.
    """
    PATCHES: tl.constexpr = GRID_ROWS * GRID_COLS
    TOKENS: tl.constexpr = PREFIX + PATCHES
    WIDTH: tl.constexpr = (GRID_COLS + LANES - 1) // LANES
    SLOTS: tl.constexpr = WIDTH + 1 if LANES > 1 else WIDTH
    LAST: tl.constexpr = min((LANES - 1) * WIDTH, GRID_COLS - 1)  # the first column of the last thread
    SURE: tl.constexpr = min(GRID_COLS - LAST, SLOTS)
    SIGNS: tl.constexpr = -0x7FFF8000 if WORDS else -0x80000000
    t = tl.arange(0, THREADS)
    lane = t % LANES
    n = tl.program_id(1) * BLOCK_Q + t // LANES % BLOCK_Q
    m = (tl.program_id(0) * (THREADS // (BLOCK_Q * LANES)) + t // (BLOCK_Q * LANES)) * MAPS
    near_n = tl.minimum(n, TOKENS - 1)
    c = tl.minimum(lane * WIDTH, GRID_COLS - 1)
    is_full = lane < GRID_COLS // WIDTH
    is_first, is_last = (lane == 0).to(tl.float32), (lane == (GRID_COLS - 1) // WIDTH).to(tl.float32)
    patch = near_n - PREFIX
    upright = (patch // GRID_COLS).to(tl.float32)
    sides = ()
    for j in tl.static_range(WIDTH):
        side = (lane * WIDTH + j - patch % GRID_COLS).to(tl.float32) * col_step
        sides = sides + (side * side,)
    none = tl.zeros((THREADS,), tl.float32)
    no_bits = tl.zeros((THREADS,), tl.int32)
    above = ()
    for _ in tl.static_range(SLOTS):
        above = above + (none,)

    places, pivots, firsts, states = (), (), (), ()
    for k in tl.static_range(MAPS):
        # 64 bits: a token of a strided view can lie beyond 2³¹ elements.
        row = attention + tl.load(starts + tl.minimum(m + k, maps - 1)) + near_n.to(tl.int64) * stride_q
        at = row + (PREFIX + c) * stride_k
        if WORDS:
            address = at.to(tl.int64, bitcast=True)
            base = address & -16
            end = (row + TOKENS).to(tl.int64, bitcast=True)
            place = base, (address - base).to(tl.int32), (end - base).to(tl.int32)
        else:
            ends = ()
            for j in tl.static_range(SURE, SLOTS):
                ends = ends + (at + tl.minimum(GRID_COLS - 1 - c, j) * stride_k,)
            place = at, ends
        raw = loaded(place, 0, stride_k, GRID_COLS, SLOTS, SURE, WORDS, FAST)
        x, _ = columns_of(raw, is_full, GRID_COLS, WIDTH, SLOTS, WORDS, IS_BFLOAT16, FAST)
        # About the row's first patch, so that the mean of a constant row is exact.
        begin = widened(tl.load(row + PREFIX * stride_k), IS_BFLOAT16)
        rest, first, first_sq = none, none, none
        for j in tl.static_range(WIDTH):
            rest += tl.where(lane * WIDTH + j < GRID_COLS, x[j] - begin, 0.0)
        pivot = begin + of_lanes(rest, LANES) * (1.0 / GRID_COLS)
        mass = none
        negative = no_bits
        for p in tl.static_range(PREFIX):
            head = widened(tl.load(row + p * stride_k), IS_BFLOAT16)
            mass += head
            negative |= (head < 0).to(tl.int32)
        mean = (1.0 - mass) * (1.0 / PATCHES)  # of a row that sums to 1
        pivot = tl.where((mass < 0.75) & (tl.abs(pivot - mean) > mean / 16), mean, pivot)
        if IS_SHORT:  # to 13 bits, so that its multiples by numbers of patches are exact
            pivot = ((pivot.to(tl.int32, bitcast=True) + 0x400) & -0x800).to(tl.float32, bitcast=True)
        for j in tl.static_range(WIDTH):
            z = tl.where(lane * WIDTH + j < GRID_COLS, x[j] - pivot, 0.0)
            first += z
            first_sq += z * z
        places, pivots = places + (place,), pivots + (pivot,)
        firsts = firsts + ((first, first_sq, mass, negative),)
        states = states + ((above, none, none, first, none, none, none, none, none, none, none, no_bits),)

    # A row is read before the one above it is added up.
    whole: tl.constexpr = GRID_ROWS // UNROLL * UNROLL
    raws = loaded_row(places, 0, stride_k, MAPS, GRID_COLS, SLOTS, SURE, WORDS, FAST)
    for start in range(0, whole, UNROLL):
        for i in tl.static_range(UNROLL):
            r = start + i
            soon = loaded_row(
                places, tl.minimum(r + 1, GRID_ROWS - 1), stride_k, MAPS, GRID_COLS, SLOTS, SURE, WORDS, FAST
            )
            states = add_row_of_maps(
                raws, r, is_full, is_first, is_last, pivots, sides, upright, row_step, states,
                MAPS, GRID_COLS, WIDTH, SLOTS, WORDS, NEEDS, IS_SHORT, IS_BFLOAT16, FAST,
            )  # fmt: skip
            raws = soon
    if whole < GRID_ROWS:
        states = add_row_of_maps(
            raws, whole, is_full, is_first, is_last, pivots, sides, upright, row_step, states,
            MAPS, GRID_COLS, WIDTH, SLOTS, WORDS, NEEDS, IS_SHORT, IS_BFLOAT16, FAST,
        )  # fmt: skip

    rows = maps.to(tl.int64) * TOKENS
    has_columns = lane * WIDTH < GRID_COLS
    has_next = (lane + 1) * WIDTH < GRID_COLS
    for k in tl.static_range(MAPS):
        above, sums, s_z, border, s_sq, within, beyond, far, logs, apart, apart_beyond, bits = states[k]
        first, first_sq, mass, negative = firsts[k]
        inside = (lane == 0) & (n < TOKENS) & (m + k < maps)
        at = (m + k).to(tl.int64) * TOKENS + n
        total = of_lanes(tl.where(has_columns, sums, 0.0), LANES)
        # −0 has a sign too: rows with any are done again.
        signed = negative + of_lanes(tl.where(has_columns & (bits & SIGNS != 0), 1, 0), LANES) > 0
        # A sum that is NaN or infinite fails the comparison.
        is_valid = tl.abs(mass + total - 1.0) <= tolerance
        tl.store(valid + at, is_valid.to(tl.int8), mask=inside)
        redo = signed | ((total > 0) & (total < LEAST_TOTAL))
        tl.store(again + at, redo.to(tl.int8), mask=inside)
        store_plane(planes, AT_PREFIX_MASS, at, tl.where(is_valid, mass, float("nan")), inside, rows)
        defined = is_valid & (total > 0)
        divisor = tl.where(defined, total, 1.0)
        share = 1.0 / divisor
        if DISTANCE & NEEDS:
            distance = of_lanes(tl.where(has_columns, far, 0.0), LANES) * share
            store_plane(planes, AT_DISTANCE, at, tl.where(defined, distance, float("nan")), inside, rows)
        if ENTROPY & NEEDS:
            nat = LN_2 * (fast_log2(divisor, FAST) - of_lanes(tl.where(has_columns, logs, 0.0), LANES) * share)
            store_plane(planes, AT_ENTROPY, at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), inside, rows)
        if EDGES & NEEDS:
            if IS_SHORT:  # exact where Σz² is small: the sums of such halves are
                columns = tl.maximum(tl.minimum(GRID_COLS - lane * WIDTH, WIDTH), 0)
                s_z = sums - (columns * GRID_ROWS).to(tl.float32) * pivots[k]
            s_z = of_lanes(tl.where(has_columns, s_z, 0.0), LANES)
            # Σ over edges of z_i + z_j: every z four times, but for those at the borders.
            for j in tl.static_range(WIDTH):
                border += tl.where(lane * WIDTH + j < GRID_COLS, above[j], 0.0)
            border = tl.where(has_columns, border, 0.0)
            within += tl.where(has_next, beyond, 0.0)
            apart += tl.where(has_next, apart_beyond, 0.0) - first_sq  # the first row has none above it
            store_edges(
                planes, at, inside, rows, defined, of_lanes(tl.where(has_columns, s_sq, 0.0), LANES) > 0, s_z,
                of_lanes(tl.where(has_columns, s_sq, 0.0), LANES),
                of_lanes(tl.where(has_columns, within, 0.0), LANES), 4.0 * s_z - of_lanes(border, LANES),
                of_lanes(tl.where(has_columns, apart, 0.0), LANES), PATCHES, NUM_EDGES, NEEDS,
            )  # fmt: skip


@triton.jit
def of_lanes(x, LANES: tl.constexpr):
    """Sum over the threads of a query, for each of them."""
    if LANES == 1:
        return x
    else:
        by_query = tl.reshape(x, (x.shape[0] // LANES, LANES))
        summed = tl.expand_dims(tl.sum(by_query, axis=1), 1)
        return tl.reshape(tl.broadcast_to(summed, by_query.shape), x.shape)


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
