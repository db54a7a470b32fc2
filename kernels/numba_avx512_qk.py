"""From query and key on CPUs with AVX-512, in float32: logits, softmax and metrics of sixteen queries at a time.

Lanes are queries, rows of a tile in cache are keys, so no sum runs across lanes. Prefix tokens follow the patches, as
queries and as keys. Computed are the core metrics, distance, entropy and Moran's I, and prefix mass; queries out of the
ordinary (NaN or infinite logits, no patch to see, a row almost constant) and metrics beyond the core take the way of
`numba_rows`; which way a query takes depends on that query alone.

2^t is good to 1.1e-7 (degree 5 on [0, 1)), a least-squares fit reweighted until its greatest error was least.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from kernels.lanes import WIDTH, dot_tile, fma, fraction, greater, load, splat, store, times_power, transpose
from kernels.numba_math import (
    CALLED_FROM_PYTHON,
    LEAST_EXP2,
    LN_2,
    LOG2_E,
    OPTIONS,
    load_row,
    log2,
    sources,
    stored_bits,
)
from kernels.numba_rows import (
    CLASS_ROW,
    CORE,
    DISTANCE,
    ENTROPY,
    ENTROPY_SEED1,
    MORAN,
    PATCH_MASS,
    add_renormalised,
    clear_map,
    measure_row,
    moran_of_sums,
    qk_row,
    row_entropy_seed1,
)

__all__ = ["qk_pass"]

# 2^f = Σ c_k f^k on [0, 1).
_E0, _E1, _E2, _E3, _E4, _E5 = (
    np.float32(c)
    for c in (
        0.9999998807907104,
        0.6931547522544861,
        0.24013970792293549,
        0.05586624518036842,
        0.008942830376327038,
        0.0018964604241773486,
    )
)
_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(**OPTIONS)
def _exp2(t: Any) -> Any:
    """2^t of finite t, or NaN."""
    part = fraction(t)
    c0, c1, c2, c3, c4, c5 = splat(_E0), splat(_E1), splat(_E2), splat(_E3), splat(_E4), splat(_E5)
    return times_power(fma(part, fma(part, fma(part, fma(part, fma(part, c5, c4), c3), c2), c1), c0), t)


@njit(**OPTIONS)
def _pack(
    buffer: Any,
    kind: Any,
    start: Any,
    stride: Any,
    prefix: Any,
    patches: Any,
    head_dim: Any,
    factor: Any,
    sixteen: Any,
    panels: Any,
) -> None:
    """Tokens as panels [sixteen tokens, dim, token of the sixteen], patches first, times `factor`; 0 beyond the last.

    Dimensions are padded to a multiple of 16 with what comes along; no sum reaches them. `sixteen` is a scratch
    [16, padded dim] for tokens that do not follow each other, or whose padding would reach beyond the memory.
    """
    tokens = prefix + patches
    padded = sixteen.shape[1]
    flat = sixteen.reshape(-1)
    for begin in range(0, tokens, WIDTH):
        first_row = start + (prefix + begin) * stride
        in_place = begin + WIDTH <= patches and first_row + (WIDTH - 1) * stride + padded <= buffer.size
        if in_place:
            for dim in range(0, padded, WIDTH):
                transpose(buffer, first_row + dim, stride, factor, panels, begin * padded + dim * WIDTH)
            continue
        for row in range(WIDTH):
            line = sixteen[row, :head_dim]
            place = begin + row
            if place < tokens:
                token = place + prefix if place < patches else place - patches
                load_row(stored_bits(buffer), start + token * stride, kind, line)
            else:
                for i in range(head_dim):
                    line[i] = _ZERO
        for dim in range(0, padded, WIDTH):
            transpose(flat, dim, padded, factor, panels, begin * padded + dim * WIDTH)


@njit(**OPTIONS)
def _add_bias(tile: Any, bias: Any, start: Any, stride: Any, prefix: Any, patches: Any, begin: Any) -> None:
    """Adds the bias of the queries from place `begin` on, in binary logarithms, to a tile of logits."""
    tokens = prefix + patches
    log2_e = np.float32(LOG2_E)
    for lane in range(min(WIDTH, tokens - begin)):
        place = begin + lane
        query = place + prefix if place < patches else place - patches
        line = start + query * stride
        for key in range(patches):
            tile[key * WIDTH + lane] += bias[line + prefix + key] * log2_e
        for key in range(prefix):
            tile[(patches + key) * WIDTH + lane] += bias[line + key] * log2_e


@njit(**OPTIONS)
def _tile_logits(keys: Any, queries: Any, query_at: Any, tokens: Any, head_dim: Any, padded: Any, tile: Any) -> None:
    """tile [token, query of the sixteen], binary logarithms; rows beyond `tokens` up to a multiple of 4 are 0."""
    for begin in range(0, tokens, WIDTH):
        panel = begin * padded
        if begin + WIDTH <= tokens:
            dot_tile(WIDTH, keys, panel, queries, query_at, head_dim, tile, begin * WIDTH)
        else:
            for row in range(0, tokens - begin, 4):
                dot_tile(4, keys, panel + row, queries, query_at, head_dim, tile, (begin + row) * WIDTH)


@njit(**OPTIONS)
def _softmax_sums(tile: Any, patches: Any, prefix: Any, distances: Any, at: Any, sums: Any) -> None:
    """The patches of a tile become 2^(logit − the greatest); sums and mass lane by lane.

    Writes Σ x, Σ x·d, Σ x·log2 x and the mass on the prefix to sums[0], [1], [2] and [7], and Σ x on the patches,
    as a share of the whole row's greatest, to sums[8].
    """
    top = load(tile, 0)
    for key in range(1, patches):
        top = greater(top, load(tile, key * WIDTH))
    least, nothing = splat(LEAST_EXP2), splat(_ZERO)
    total, far, weighted = nothing, nothing, nothing
    for key in range(patches):
        t = greater(least, load(tile, key * WIDTH) - top)  # NaN stays
        x = _exp2(t)
        store(tile, key * WIDTH, x)
        total = total + x
        far = fma(x, load(distances, at + key * WIDTH), far)
        weighted = fma(x, t, weighted)
    highest = top
    for key in range(patches, patches + prefix):
        highest = greater(highest, load(tile, key * WIDTH))
    on_prefix = nothing
    for key in range(patches, patches + prefix):
        on_prefix = on_prefix + _exp2(greater(least, load(tile, key * WIDTH) - highest))
    on_patches = total * _exp2(greater(least, top - highest))
    store(sums[0], 0, total)
    store(sums[1], 0, far)
    store(sums[2], 0, weighted)
    store(sums[7], 0, on_prefix)
    store(sums[8], 0, on_patches)


@njit(**OPTIONS)
def _centred_sums(tile: Any, rows: Any, cols: Any, sums: Any) -> None:
    """The patches of a tile less their mean, the sum being in sums[0]; sums for `_moran` to sums[3] … [6]."""
    n = np.float32(rows * cols)
    means = sums[9]
    for lane in range(WIDTH):
        means[lane] = sums[0, lane] / n
    mean, nothing = load(means, 0), splat(_ZERO)
    rest, square, border, cross = nothing, nothing, nothing, nothing
    at = 0
    for row in range(rows):
        left = nothing
        in_row = nothing
        for col in range(cols):
            z = load(tile, at) - mean
            store(tile, at, z)
            in_row = in_row + z
            square = fma(z, z, square)
            if row > 0:
                cross = fma(z, left + load(tile, at - cols * WIDTH), cross)
            else:
                cross = fma(z, left, cross)
            if col == 0 or col == cols - 1:
                border = border + z
                if cols == 1:
                    border = border + z
            left = z
            at += WIDTH
        rest = rest + in_row
        if row == 0 or row == rows - 1:
            border = border + in_row
            if rows == 1:
                border = border + in_row
    store(sums[3], 0, rest)
    store(sums[4], 0, square)
    store(sums[5], 0, fma(rest, splat(np.float32(4)), nothing) - border)
    store(sums[6], 0, cross)


@njit(**OPTIONS)
def _lane_logits(
    keys: Any, queries: Any, place: Any, prefix: Any, patches: Any, head_dim: Any, padded: Any, logits: Any
) -> None:
    """The logits of one query anew, [token] with prefix tokens first, for `qk_row`."""
    of_query = place // WIDTH * WIDTH * padded + place % WIDTH
    for key in range(prefix + patches):
        of_key = key // WIDTH * WIDTH * padded + key % WIDTH
        dot = _ZERO
        for i in range(head_dim):
            dot += keys[of_key + i * WIDTH] * queries[of_query + i * WIDTH]
        logits[key + prefix if key < patches else key - patches] = dot


@njit(**OPTIONS)
def _column(tile: Any, lane: Any, x: Any) -> None:
    for key in range(x.size):
        x[key] = tile[key * WIDTH + lane]


@njit(**OPTIONS)
def _beyond_core(
    tile: Any, begin: Any, m: Any, sums: Any, shape: Any, tables: Any, needs: Any, x: Any, z: Any, out: Any
) -> None:
    """What is asked for beside the core, of the ordinary queries of a tile that is not centred yet."""
    prefix, class_token = shape[0], shape[1]
    rows, patch_mass, class_rows = out[0], out[2], out[4]
    for lane in range(min(WIDTH, prefix + x.size - begin)):
        patch, total = begin + lane, sums[0, lane]
        if not _is_ordinary(sums, lane):
            continue
        if patch < x.size:
            _column(tile, lane, x)
            share = np.float64(sums[8, lane]) / (np.float64(sums[7, lane]) + np.float64(sums[8, lane]))
            if needs & PATCH_MASS:
                patch_mass[m, patch] = share
            if needs & ENTROPY_SEED1:
                rows[5, m, patch] = row_entropy_seed1(x, np.float32(share / total))
            measure_row(x, z, total, m, patch, shape, tables, needs & ~CORE, out)
        elif patch == x.size and class_token and needs & CLASS_ROW:
            _column(tile, lane, x)
            class_rows[m] = 0.0
            add_renormalised(x, total, class_rows[m])


@njit(**OPTIONS)
def _is_ordinary(sums: Any, lane: Any) -> Any:
    """Whether a query's softmax sums are numbers: not so with NaN or infinite logits, or without patches to see."""
    return sums[0, lane] < np.inf and sums[7, lane] < np.inf


@njit(**OPTIONS)
def _core_of_tile(begin: Any, m: Any, sums: Any, shape: Any, needs: Any, done: Any, out: Any) -> None:
    """Writes the core metrics of sixteen queries; `done` [lane] is 1, 0, or −1 where Moran's I alone is missing."""
    rows, mass = out[0], out[1]
    n, num_edges = np.float32(mass.shape[1]), np.float32(shape[3])
    for lane in range(min(WIDTH, shape[0] + mass.shape[1] - begin)):
        patch, total = begin + lane, sums[0, lane]
        done[lane] = _is_ordinary(sums, lane)
        if not done[lane] or patch >= mass.shape[1]:
            continue
        mass[m, patch] = sums[7, lane] / (sums[7, lane] + sums[8, lane])
        if needs & DISTANCE:
            rows[0, m, patch] = sums[1, lane] / total
        if needs & ENTROPY:
            nat = np.float32(LN_2) * (log2(total) - sums[2, lane] / total)
            rows[1, m, patch] = max(nat, _ZERO)
        if needs & MORAN:
            moran, trusted = moran_of_sums(sums[3, lane], sums[4, lane], sums[5, lane], sums[6, lane], n, num_edges)
            # Rows that are constant but for rounding, 1e-6 of the mean, are not for these sums to judge.
            spread = np.float32(1e-6) * total / n
            if trusted and sums[4, lane] > n * spread * spread:
                rows[2, m, patch] = moran
            else:
                done[lane] = -1


@njit(**OPTIONS)
def _qk_map(
    m: Any,
    queries: Any,
    keys: Any,
    head_dim: Any,
    padded: Any,
    of_bias: Any,
    shape: Any,
    tables: Any,
    near: Any,
    needs: Any,
    out: Any,
) -> None:
    """Map `m` from its panels, sixteen queries at a time. `of_bias` is (memory, start or −1, stride)."""
    bias, bias_start, bias_stride = of_bias
    (prefix, _, cols, _), patches = shape, tables[1].size
    tokens = prefix + patches
    mass = out[1]
    tile = np.empty((tokens + 3) // 4 * 4 * WIDTH, np.float32)
    sums, done = np.empty((10, WIDTH), np.float32), np.empty(WIDTH, np.int8)
    logits = np.empty(tokens, np.float32)
    scratch = (np.empty(prefix, np.float32), np.empty(patches, np.float32), np.empty(patches, np.float32))
    for begin in range(0, tokens, WIDTH):
        _tile_logits(keys, queries, begin * padded, tokens, head_dim, padded, tile)
        if bias_start >= 0:
            _add_bias(tile, bias, bias_start, bias_stride, prefix, patches, begin)
        _softmax_sums(tile, patches, prefix, near, begin * patches, sums)
        if needs & ~CORE:
            _beyond_core(tile, begin, m, sums, shape, tables, needs, scratch[1], scratch[2], out)
        if needs & MORAN:
            _centred_sums(tile, patches // cols, cols, sums)
        _core_of_tile(begin, m, sums, shape, needs, done, out)
        for lane in range(min(WIDTH, tokens - begin)):
            if done[lane] == 1:
                continue
            place = begin + lane
            q = place + prefix if place < patches else place - patches
            _lane_logits(keys, queries, place, prefix, patches, head_dim, padded, logits)
            if bias_start >= 0:
                line = bias_start + q * bias_stride
                for key in range(tokens):
                    logits[key] += bias[line + key] * np.float32(LOG2_E)
            if done[lane] == 0:
                qk_row(logits, m, q, shape, tables, needs, scratch, out)
            else:
                on_prefix = mass[m, place]  # what is written already does not depend on what is asked for
                qk_row(logits, m, q, shape, tables, MORAN, scratch, out)
                mass[m, place] = on_prefix


@lru_cache(maxsize=1)
def qk_pass() -> Any:
    """`qk` as that of `numba_loops.passes`, with one more argument after `tables`:

    near  distances [sixteen queries, key, query of the sixteen], flat
    """
    of = sources()  # a part of the key under which compiled code is kept

    @njit(**CALLED_FROM_PYTHON)
    def qk(
        queries: Any,
        keys: Any,
        kind: Any,
        scale: Any,
        bias: Any,
        shape: Any,
        tables: Any,
        near: Any,
        needs: Any,
        out: Any,
        begin: Any,
        end: Any,
    ) -> None:
        _ = of
        prefix, patches = shape[0], tables[1].size
        q_buffer, q_starts, q_stride, head_dim = queries
        k_buffer, k_starts, k_stride, _ = keys
        bias_buffer, bias_starts, bias_stride = bias
        padded = (head_dim + WIDTH - 1) // WIDTH * WIDTH
        size = (prefix + patches + WIDTH - 1) // WIDTH * WIDTH * padded
        sixteen = np.zeros((WIDTH, padded), np.float32)
        of_queries, of_keys = np.empty(size, np.float32), np.empty(size, np.float32)
        factor = np.float32(scale * LOG2_E)  # logits in binary logarithms, for 2^t
        for m in range(begin, end):
            clear_map(m, needs, out)
            _pack(q_buffer, kind, q_starts[m], q_stride, prefix, patches, head_dim, factor, sixteen, of_queries)
            _pack(k_buffer, kind, k_starts[m], k_stride, prefix, patches, head_dim, _ONE, sixteen, of_keys)
            of_bias = (bias_buffer, bias_starts[m] if bias_starts.size > 0 else -1, bias_stride)
            _qk_map(m, of_queries, of_keys, head_dim, padded, of_bias, shape, tables, near, needs, out)

    return qk
