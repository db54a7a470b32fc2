"""Device code of the `triton` backend: rows of attention in one pass, a row of the grid at a time.

Names: m maps, n tokens that are queries, c columns of the grid, all in range: beyond an end the last one is repeated,
so that loads need no mask, and left out where sums of a tile are taken or stored.

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

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Added to a value before its logarithm: below it x·log x is 0 in float32 anyway.
NOTHING = tl.constexpr(1e-30)
# Rows whose patches sum to less are done again, scaled: squares of their values would underflow.
LEAST_TOTAL = tl.constexpr(1e-12)


@triton.jit
def widened(x, IS_BFLOAT16: tl.constexpr):
    """float32 of float16, float32, or the bits of bfloat16."""
    if IS_BFLOAT16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


# One instruction each: Triton's own keep subnormal numbers, in four. The interpreter knows no assembly.


@triton.jit
def fast_log2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def fast_exp2(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def fast_sqrt(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.sqrt(x)


@triton.jit
def store_plane(planes, plane: tl.constexpr, at, values, inside, rows):
    tl.store(planes + plane * rows + at, values, mask=inside)


@triton.jit
def store_edges(
    planes, at, inside, rows, defined, varies, s_z, s_sq, s_cross, s_ends, s_apart,
    PATCHES: tl.constexpr, NUM_EDGES: tl.constexpr, NEEDS: tl.constexpr,
):  # fmt: skip
    """Moran's I = N/E · Σ z_i z_j / Σ z² and Geary's C = (N − 1)/2E · Σ (z_i − z_j)² / Σ z².

    Σz / N, what centring left of the mean, is taken out of the sums here.
    """
    rest = s_z * (1.0 / PATCHES)
    known = defined & varies
    squares = tl.where(known, s_sq - rest * s_z, 1.0)
    if NEEDS & 4:
        cross = s_cross - rest * s_ends + NUM_EDGES * rest * rest
        moran = tl.where(known, PATCHES / NUM_EDGES * (cross / squares), float("nan"))
        store_plane(planes, 2, at, moran, inside, rows)
    if NEEDS & 8:
        factor = (PATCHES - 1) / (2 * NUM_EDGES)
        geary = tl.where(known, factor * (s_apart / squares), float("nan"))
        store_plane(planes, 3, at, geary, inside, rows)


@triton.jit
def of_grid(x, c, GRID_COLS: tl.constexpr, AXIS: tl.constexpr):
    """Sum over the columns that there are, which are the tile's axis AXIS."""
    return tl.sum(tl.where(c < GRID_COLS, x, 0.0), axis=AXIS)


@triton.jit
def of_edges(across, down, c, GRID_COLS: tl.constexpr, AXIS: tl.constexpr):
    """Sum over both kinds of edges; the last column has no neighbour to the right."""
    return tl.sum(tl.where(c < GRID_COLS - 1, across, 0.0) + tl.where(c < GRID_COLS, down, 0.0), axis=AXIS)


@triton.jit
def at_ends(s_z, first, last, c, GRID_COLS: tl.constexpr):
    """Σ over edges of z_i + z_j: every z by its number of edges, in a tile of columns."""
    across = 2 - (c == 0).to(tl.float32) - (c == GRID_COLS - 1).to(tl.float32)
    return (across + 2.0) * s_z - first - last


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
        if NEEDS & 1:
            height = (r + i - upright) * row_step
            height *= height
            far += even * fast_sqrt(height + even_side, FAST)
            far += odd * fast_sqrt(height + odd_side, FAST)
        if NEEDS & 2:
            logs += even * fast_log2(even + NOTHING, FAST)
            logs += odd * fast_log2(odd + NOTHING, FAST)
        if NEEDS & 12:
            next_z = widened(tl.load(next_at + i * GRID_COLS * stride_k), IS_BFLOAT16) - pivot
            s_even += even_z
            s_odd += odd_z
            s_sq += even_z * even_z
            s_sq += odd_z * odd_z
            within += even_z * even_above
            within += odd_z * odd_above
            within += even_z * odd_z
            beyond += odd_z * next_z
            if NEEDS & 8:
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
    store_plane(planes, 4, at, tl.where(is_valid, mass, float("nan")), inside, rows)
    defined = is_valid & (total > 0)
    divisor = tl.where(defined, total, 1.0)
    share = 1.0 / divisor
    if NEEDS & 1:
        distance = of_grid(far, even, GRID_COLS, 2) * share
        store_plane(planes, 0, at, tl.where(defined, distance, float("nan")), inside, rows)
    if NEEDS & 2:
        nat = LN_2 * (fast_log2(divisor, FAST) - of_grid(logs, even, GRID_COLS, 2) * share)
        store_plane(planes, 1, at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), inside, rows)
    if NEEDS & 12:
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
    """The rows that `attention_rows` marked `again`, one after another, scaled by a power of two; a map a program."""
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
                tl.store(planes + 4 * rows + at, tl.where(is_valid, mass, float("nan")))
                # A power of two, by its bits, takes the sum into [1, 2): exact.
                exponent = (total.to(tl.int32, bitcast=True) >> 23) & 0xFF
                factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
                defined = is_valid & (total > 0)
                least = tl.min(tl.where(there, x, float("inf")), axis=0)
                greatest = tl.max(tl.where(there, x, float("-inf")), axis=0)
                x *= factor
                total *= factor
                divisor = tl.where(defined, total, 1.0)
                if NEEDS & 1:
                    patch = n - PREFIX
                    height = (k // GRID_COLS - patch // GRID_COLS).to(tl.float32) * row_step
                    width = (k % GRID_COLS - patch % GRID_COLS).to(tl.float32) * col_step
                    distance = tl.sum(x * tl.sqrt(height * height + width * width), axis=0) / divisor
                    tl.store(planes + at, tl.where(defined, distance, float("nan")))
                if NEEDS & 2:
                    logs = tl.sum(x * tl.log2(tl.where(x > 0, x, 1.0)), axis=0)
                    nat = LN_2 * (tl.log2(divisor) - logs / divisor)
                    tl.store(planes + rows + at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")))
                if NEEDS & 12:
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
        if NEEDS & 1:
            height = (r - upright) * row_step
            far += x * fast_sqrt(height * height + sideways, FAST)
        if NEEDS & 2:
            logs += x * tl.maximum(t, -150.0)  # 2^−150 is 0 already; 0 · −inf would be NaN
        if NEEDS & 12:
            t = logits(q, key, bias_rows, right + r * GRID_COLS, stride_kn, stride_kd, stride_bk, factor,
                       HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN) - lowered  # fmt: skip
            least = tl.minimum(least, x)
            z, beside = x - pivot, fast_exp2(t, FAST) - pivot
            s_z += z
            s_sq += z * z
            across += z * beside
            down += z * above
            if NEEDS & 8:
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
    store_plane(planes, 4, at, tl.where(is_valid, mass, float("nan")), inside, rows)
    defined = is_valid & (total > 0)
    divisor = tl.where(defined, total, 1.0)
    if NEEDS & 1:
        distance = of_grid(far, c, GRID_COLS, 1) / divisor
        store_plane(planes, 0, at, tl.where(defined, distance, float("nan")), inside, rows)
    if NEEDS & 2:
        # ln Z − Σ x·t / Z: no logarithm a key
        nat = LN_2 * (tl.log2(divisor) - of_grid(logs, c, GRID_COLS, 1) / divisor)
        store_plane(planes, 1, at, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), inside, rows)
    if NEEDS & 12:
        varies = tl.min(least, axis=1) < 1.0  # the greatest is 2^0
        apart_down -= first * first  # the first row has none above it
        store_edges(
            planes, at, inside, rows, defined, varies, of_grid(s_z, c, GRID_COLS, 1), of_grid(s_sq, c, GRID_COLS, 1),
            of_edges(across, down, c, GRID_COLS, 1),
            of_grid(at_ends(s_z, first, above, c, GRID_COLS), c, GRID_COLS, 1),
            of_edges(apart_across, apart_down, c, GRID_COLS, 1), PATCHES, NUM_EDGES, NEEDS,
        )  # fmt: skip


@triton.jit
def mean_of_rows(
    values, valid, means, undefined, map_stride, query_stride, valid_stride,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean over the queries that have a value, in float64, and how many valid ones have none; a map a program."""
    m = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    x = tl.load(values + m * map_stride + n * query_stride, mask=n < QUERIES, other=float("nan"))
    is_valid = tl.load(valid + m * valid_stride + n, mask=n < QUERIES, other=0) != 0
    defined = x == x
    count = tl.sum(defined.to(tl.int32), axis=0)
    total = tl.sum(tl.where(defined, x, 0.0).to(tl.float64), axis=0)
    mean = total / tl.maximum(count, 1).to(tl.float64)
    tl.store(means + m, tl.where(count > 0, mean, float("nan")))
    tl.store(undefined + m, tl.sum((is_valid & (x != x)).to(tl.int32), axis=0).to(tl.int64))
