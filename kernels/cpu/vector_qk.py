"""From query and key in vector registers, in float32: logits, softmax and metrics of a register's queries at a time.

Lanes are queries, rows of a tile in cache are keys, so no sum runs across lanes. Prefix tokens follow the patches, as
queries and as keys. Computed are the core metrics, distance, entropy and Moran's I, and prefix mass; queries out of the
ordinary (NaN or infinite logits, no patch to see, a row almost constant) and metrics beyond the core take the way of
`rows`; which way a query takes depends on that query alone.

2^t is good to 1.1e-7 (degree 5 on [0, 1)), a least-squares fit reweighted until its greatest error was least.
"""

# Numba types compiled code: its parameters take no annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from kernels.cpu.cache import called_from_python
from kernels.cpu.lane_types import Width
from kernels.cpu.lanes import dot_tile, fma, fraction, greater, lanes_of, load, splat, store, times_power, transpose
from kernels.cpu.math import LEAST_EXP2, LN_2, LOG2_E, OPTIONS, apart, hold, lent, load_row, log2, stored_bits
from kernels.cpu.rows import (
    CLASS_ROW,
    CORE,
    DISTANCE,
    ENTROPY,
    ENTROPY_SEED1,
    MORAN,
    PATCH_MASS,
    Planes,
    add_renormalised,
    clear_map,
    measure_row,
    moran_of_sums,
    qk_row,
    row_entropy_seed1,
)

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


@njit(forceinline=True, **OPTIONS)
def _exp2(width, t):
    """2^t of finite t, or NaN."""
    part = fraction(t)
    c0, c1, c2 = splat(width, _E0), splat(width, _E1), splat(width, _E2)
    c3, c4, c5 = splat(width, _E3), splat(width, _E4), splat(width, _E5)
    return times_power(fma(part, fma(part, fma(part, fma(part, fma(part, c5, c4), c3), c2), c1), c0), t)


@njit(forceinline=True, **OPTIONS)
def _pack(width, buffer, kind, start, stride, prefix, patches, head_dim, factor, group, panels):
    """Tokens as panels [group of a register, dim, token of the group], patches first, times `factor`; 0 past the last.

    Dimensions are padded to whole registers with what comes along; no sum reaches them. `group` is a scratch
    [token, padded dim] for tokens that do not follow each other, or whose padding would reach beyond the memory.
    """
    lanes = lanes_of(width)
    tokens = prefix + patches
    padded = group.shape[1]
    flat = group.reshape(-1)
    for begin in range(0, tokens, lanes):
        first_row = start + (prefix + begin) * stride
        in_place = begin + lanes <= patches and first_row + (lanes - 1) * stride + padded <= buffer.size
        if in_place:
            for dim in range(0, padded, lanes):
                transpose(width, buffer, first_row + dim, stride, factor, panels, begin * padded + dim * lanes)
            continue
        for row in range(lanes):
            line = group[row, :head_dim]
            place = begin + row
            if place < tokens:
                token = place + prefix if place < patches else place - patches
                load_row(stored_bits(buffer), start + token * stride, kind, line)
            else:
                for i in range(head_dim):
                    line[i] = _ZERO
        for dim in range(0, padded, lanes):
            transpose(width, flat, dim, padded, factor, panels, begin * padded + dim * lanes)


@njit(forceinline=True, **OPTIONS)
def _add_bias(width, tile, bias, start, stride, prefix, patches, begin):
    """Adds the bias of the queries from place `begin` on, in binary logarithms, to a tile of logits."""
    lanes = lanes_of(width)
    tokens = prefix + patches
    log2_e = np.float32(LOG2_E)
    for lane in range(min(lanes, tokens - begin)):
        place = begin + lane
        query = place + prefix if place < patches else place - patches
        line = start + query * stride
        for key in range(patches):
            tile[key * lanes + lane] += bias[line + prefix + key] * log2_e
        for key in range(prefix):
            tile[(patches + key) * lanes + lane] += bias[line + key] * log2_e


@njit(forceinline=True, **OPTIONS)
def _tile_logits(width, keys, queries, query_at, tokens, head_dim, padded, tile):
    """tile [token, query of the group], binary logarithms; rows beyond `tokens` up to a multiple of 4 are 0."""
    lanes = lanes_of(width)
    for begin in range(0, tokens, lanes):
        panel = begin * padded
        if begin + lanes <= tokens:
            dot_tile(width, lanes, keys, panel, queries, query_at, head_dim, tile, begin * lanes)
        else:
            for row in range(0, tokens - begin, 4):
                dot_tile(width, 4, keys, panel + row, queries, query_at, head_dim, tile, (begin + row) * lanes)


@njit(forceinline=True, **OPTIONS)
def _softmax_sums(width, tile, patches, prefix, distances, at, sums):
    """The patches of a tile become 2^(logit − the greatest); sums and mass lane by lane.

    Writes Σ x, Σ x·d, Σ x·log2 x and the mass on the prefix to sums[0], [1], [2] and [7], and Σ x on the patches,
    as a share of the whole row's greatest, to sums[8].
    """
    lanes = lanes_of(width)
    top = load(width, tile, 0)
    for key in range(1, patches):
        top = greater(top, load(width, tile, key * lanes))
    least, nothing = splat(width, LEAST_EXP2), splat(width, _ZERO)
    total, far, weighted = nothing, nothing, nothing
    for key in range(patches):
        t = greater(least, load(width, tile, key * lanes) - top)  # NaN stays
        x = _exp2(width, t)
        store(tile, key * lanes, x)
        total = total + x
        far = fma(x, load(width, distances, at + key * lanes), far)
        weighted = fma(x, t, weighted)
    highest = top
    for key in range(patches, patches + prefix):
        highest = greater(highest, load(width, tile, key * lanes))
    on_prefix = nothing
    for key in range(patches, patches + prefix):
        on_prefix = on_prefix + _exp2(width, greater(least, load(width, tile, key * lanes) - highest))
    on_patches = total * _exp2(width, greater(least, top - highest))
    store(sums[0], 0, total)
    store(sums[1], 0, far)
    store(sums[2], 0, weighted)
    store(sums[7], 0, on_prefix)
    store(sums[8], 0, on_patches)


@njit(forceinline=True, **OPTIONS)
def _centred_sums(width, tile, rows, cols, sums):
    """The patches of a tile less their mean, the sum being in sums[0]; sums for `_moran` to sums[3] … [6]."""
    lanes = lanes_of(width)
    n = np.float32(rows * cols)
    means = sums[9]
    for lane in range(lanes):
        means[lane] = sums[0, lane] / n
    mean, nothing = load(width, means, 0), splat(width, _ZERO)
    rest, square, border, cross = nothing, nothing, nothing, nothing
    at = 0
    for row in range(rows):
        left = nothing
        in_row = nothing
        for col in range(cols):
            z = load(width, tile, at) - mean
            store(tile, at, z)
            in_row = in_row + z
            square = fma(z, z, square)
            if row > 0:
                cross = fma(z, left + load(width, tile, at - cols * lanes), cross)
            else:
                cross = fma(z, left, cross)
            if col == 0 or col == cols - 1:
                border = border + z
                if cols == 1:
                    border = border + z
            left = z
            at += lanes
        rest = rest + in_row
        if row == 0 or row == rows - 1:
            border = border + in_row
            if rows == 1:
                border = border + in_row
    store(sums[3], 0, rest)
    store(sums[4], 0, square)
    store(sums[5], 0, fma(rest, splat(width, np.float32(4)), nothing) - border)
    store(sums[6], 0, cross)


@njit(forceinline=True, **OPTIONS)
def _lane_logits(width, keys, queries, place, prefix, patches, head_dim, padded, logits):
    """The logits of one query again, [token] with prefix tokens first, for `qk_row`."""
    lanes = lanes_of(width)
    of_query = place // lanes * lanes * padded + place % lanes
    for key in range(prefix + patches):
        of_key = key // lanes * lanes * padded + key % lanes
        dot = _ZERO
        for i in range(head_dim):
            dot += keys[of_key + i * lanes] * queries[of_query + i * lanes]
        logits[key + prefix if key < patches else key - patches] = dot


@njit(forceinline=True, **OPTIONS)
def _column(width, tile, lane, x):
    lanes = lanes_of(width)
    for key in range(x.size):
        x[key] = tile[key * lanes + lane]


@njit(forceinline=True, **OPTIONS)
def _beyond_core(width, tile, begin, m, sums, shape, tables, needs, x, z, out):
    """What is asked for beside the core, of the ordinary queries of a tile that is not centred yet."""
    lanes = lanes_of(width)
    prefix, class_token = shape[0], shape[1]
    for lane in range(min(lanes, prefix + x.size - begin)):
        patch, total = begin + lane, sums[0, lane]
        if not _is_ordinary(sums, lane):
            continue
        if patch < x.size:
            _column(width, tile, lane, x)
            share = np.float64(sums[8, lane]) / (np.float64(sums[7, lane]) + np.float64(sums[8, lane]))
            if needs & PATCH_MASS:
                out.patch_mass[m, patch] = share
            if needs & ENTROPY_SEED1:
                out.entropy_seed1[m, patch] = row_entropy_seed1(x, np.float32(share / total))
            measure_row(x, z, total, m, patch, shape, tables, needs & ~CORE, out)
        elif patch == x.size and class_token and needs & CLASS_ROW:
            _column(width, tile, lane, x)
            out.class_row[m] = 0.0
            add_renormalised(x, total, out.class_row[m])


@njit(forceinline=True, **OPTIONS)
def _is_ordinary(sums, lane):
    """Whether a query's softmax sums are numbers: not so with NaN or infinite logits, or without patches to see."""
    return sums[0, lane] < np.inf and sums[7, lane] < np.inf


@njit(forceinline=True, **OPTIONS)
def _core_of_tile(width, begin, m, sums, shape, needs, done, out):
    """Writes the core metrics of a group's queries; `done` [lane] is 1, 0, or −1 where Moran's I alone is missing."""
    lanes = lanes_of(width)
    mass = out.prefix_mass
    n, num_edges = np.float32(mass.shape[1]), np.float32(shape[3])
    for lane in range(min(lanes, shape[0] + mass.shape[1] - begin)):
        patch, total = begin + lane, sums[0, lane]
        done[lane] = _is_ordinary(sums, lane)
        if not done[lane] or patch >= mass.shape[1]:
            continue
        mass[m, patch] = sums[7, lane] / (sums[7, lane] + sums[8, lane])
        if needs & DISTANCE:
            out.distance[m, patch] = sums[1, lane] / total
        if needs & ENTROPY:
            nat = np.float32(LN_2) * (log2(total) - sums[2, lane] / total)
            out.entropy[m, patch] = max(nat, _ZERO)
        if needs & MORAN:
            moran, trusted = moran_of_sums(sums[3, lane], sums[4, lane], sums[5, lane], sums[6, lane], n, num_edges)
            # Rows that are constant but for rounding, 1e-6 of the mean, are not for these sums to judge.
            spread = np.float32(1e-6) * total / n
            if trusted and sums[4, lane] > n * spread * spread:
                out.morans_i[m, patch] = moran
            else:
                done[lane] = -1


@njit(forceinline=True, **OPTIONS)
def _qk_map(width, m, queries, keys, head_dim, padded, of_bias, shape, tables, near, needs, work, out):
    """Map `m` from its panels, a group's queries at a time. `of_bias` is (memory, start or −1, stride)."""
    lanes = lanes_of(width)
    bias, bias_start, bias_stride = of_bias
    (prefix, _, cols, _), patches = shape, tables[1].size
    tokens = prefix + patches
    mass = out.prefix_mass
    tile, sums, done, logits, scratch = work
    for begin in range(0, tokens, lanes):
        _tile_logits(width, keys, queries, begin * padded, tokens, head_dim, padded, tile)
        if bias_start >= 0:
            _add_bias(width, tile, bias, bias_start, bias_stride, prefix, patches, begin)
        _softmax_sums(width, tile, patches, prefix, near, begin * patches, sums)
        if needs & ~CORE:
            _beyond_core(width, tile, begin, m, sums, shape, tables, needs, scratch[1], scratch[2], out)
        if needs & MORAN:
            _centred_sums(width, tile, patches // cols, cols, sums)
        _core_of_tile(width, begin, m, sums, shape, needs, done, out)
        for lane in range(min(lanes, tokens - begin)):
            if done[lane] == 1:
                continue
            place = begin + lane
            q = place + prefix if place < patches else place - patches
            _lane_logits(width, keys, queries, place, prefix, patches, head_dim, padded, logits)
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


@lru_cache(maxsize=2)
def qk_pass(width: Width) -> Any:
    """`qk` as that of `loops`, for registers of this width, with one more argument after `tables`:

    near  distances [group of queries, key, query of the group], flat
    """

    @called_from_python
    def qk(queries, keys, kind, scale, bias, shape, tables, near, needs, out, begin, end):
        lanes, prefix, patches = lanes_of(width), shape[0], tables[1].size
        q_buffer, q_starts, q_stride, head_dim = lent(queries)
        k_buffer, k_starts, k_stride, _ = lent(keys)
        bias_buffer, bias_starts, bias_stride = lent(bias)
        offsets, far, into = lent(tables), lent(near), Planes(*lent(out))
        tokens, padded = prefix + patches, (head_dim + lanes - 1) // lanes * lanes
        size = (tokens + lanes - 1) // lanes * lanes * padded
        made = (
            (np.zeros((lanes, padded), np.float32), np.empty(size, np.float32), np.empty(size, np.float32)),
            np.empty((tokens + 3) // 4 * 4 * lanes, np.float32),
            (np.empty((10, lanes), np.float32), np.empty(lanes, np.int8), apart(tokens, np.float32)),
            (apart(prefix, np.float32), apart(patches, np.float32), apart(patches, np.float32)),
        )
        (group, of_queries, of_keys), tile, (sums, done, logits), scratch = lent(made)
        work = (tile, sums, done, logits, scratch)
        factor = np.float32(scale * LOG2_E)  # logits in binary logarithms, for 2^t
        for m in range(begin, end):
            clear_map(m, needs, into)
            _pack(width, q_buffer, kind, q_starts[m], q_stride, prefix, patches, head_dim, factor, group, of_queries)
            _pack(width, k_buffer, kind, k_starts[m], k_stride, prefix, patches, head_dim, _ONE, group, of_keys)
            of_bias = (bias_buffer, bias_starts[m] if bias_starts.size > 0 else -1, bias_stride)
            _qk_map(width, m, of_queries, of_keys, head_dim, padded, of_bias, shape, offsets, far, needs, work, into)
        hold(made)

    return qk
