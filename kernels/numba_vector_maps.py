"""Stored maps in vector registers, in float32: every sum of a row in one sweep over it.

Lanes are patches of one grid row, so that neighbours are the next lane and the previous register. Computed are the core
metrics, distance, entropy and Moran's I, and prefix mass. A row that is out of the ordinary (invalid, almost
without mass on the patches, almost constant) and metrics beyond the core take the way of `numba_rows`; which way a row
takes depends on that row alone.

Moran's I is centred by the mean known beforehand, (1 − prefix mass)/N, and the small rest δ of the mean is taken out
of the sums afterwards: Σ(z−δ)² = Σz² − δΣz, and over the E edges Σ(z−δ)(z'−δ) = Σzz' − δ Σ deg z + δ²E. Where
that would cancel nine tenths of Σz² or more, the row is out of the ordinary. Σx is Σz plus N times that mean.

What a register of the row costs decides: one prefetch for each of them took 0.36 of 2.04 ms an image more than one for
each cache line (float16, ViT-B/16, one core), counting array references by the row (`kernels.numba_math.lent`) 0.4.

log2 is good to 1.9e-6 (degree 6 on [1, 2)), a least-squares fit reweighted until its greatest error was least.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import njit

from kernels.lane_types import Width
from kernels.lanes import (
    either,
    exponent,
    first,
    first_lane,
    fma,
    holds_sign,
    keep,
    lanes_of,
    load,
    mantissa,
    next_lane,
    prefetch,
    splat,
    store,
    sums_of_eight,
)
from kernels.numba_math import CALLED_FROM_PYTHON, LN_2, OPTIONS, hold, lent, log2, sources, stored_bits
from kernels.numba_rows import CORE, DISTANCE, ENTROPY, MORAN, attention_row, clear_map, moran_of_sums

__all__ = ["attention_pass"]

# log2 m = Σ c_k m^k on [1, 2).
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (
    np.float32(c)
    for c in (
        -3.0400373935699463,
        6.112950801849365,
        -5.3419671058654785,
        3.286508560180664,
        -1.266907811164856,
        0.275145947933197,
        -0.025690775364637375,
    )
)
_AHEAD = 1024  # items by which memory is asked for in advance
_ZERO, _ONE = np.float32(0), np.float32(1)
_TINY = np.float32(1e-30)  # has a logarithm, and weighs nothing beside any value whose own weighs something


@njit(forceinline=True, **OPTIONS)
def _block_sums(
    width: Any,
    buffer: Any,
    begin: Any,
    mean: Any,
    cols: Any,
    rows: Any,
    distances: Any,
    at: Any,
    pitch: Any,
    degrees: Any,
    col: Any,
    in_next_block: Any,
) -> Any:
    """The sums of `_row_sums`, lane by lane, over the grid columns of one register from `col` on; then the signs."""
    lanes = lanes_of(width)
    inner = first(width, min(cols - col - 1, lanes))  # lanes with a neighbour to the right
    nothing, tiny, centre = splat(width, _ZERO), splat(width, _TINY), splat(width, mean)
    c1, c2, c3 = splat(width, _L1), splat(width, _L2), splat(width, _L3)
    c4, c5, c6 = splat(width, _L4), splat(width, _L5), splat(width, _L6)
    far, weighted, rest, square, cross, signs = nothing, nothing, nothing, nothing, nothing, nothing
    above = nothing
    top = load(width, buffer, begin + col) - centre
    here, there = begin + col, at + col
    for _ in range(rows):
        x = load(width, buffer, here)
        signs = either(signs, x)
        far = fma(x, load(width, distances, there), far)
        safe = x + tiny
        part = mantissa(safe)
        log = fma(part, fma(part, fma(part, fma(part, fma(part, fma(part, c6, c5), c4), c3), c2), c1), exponent(safe))
        weighted = fma(x, log, weighted)
        z = x - centre
        rest = rest + z
        square = fma(z, z, square)
        if in_next_block:
            right = load(width, buffer, here + 1) - centre  # the last lane's neighbour is in the next block
        else:
            right = next_lane(z, inner)
        cross = fma(z, right + above, cross)
        above = z
        here += cols
        there += pitch
    # Lanes beyond the grid row have summed up what lies there; none has met another.
    degree = fma(rest, load(width, degrees, col), nothing) - top - above
    mask = first(width, min(cols - col, lanes))
    return (
        *(keep(mask, far), keep(mask, weighted), keep(mask, rest), keep(mask, square)),
        *(keep(mask, degree), keep(mask, cross), keep(mask, signs)),
    )


@njit(forceinline=True, **OPTIONS)
def _row_sums(
    width: Any,
    buffer: Any,
    begin: Any,
    mean: Any,
    cols: Any,
    rows: Any,
    distances: Any,
    at: Any,
    pitch: Any,
    degrees: Any,
    sums: Any,
    out_at: Any,
) -> Any:
    """Writes (Σ z, Σ x·d, Σ x·(log2 x − _L0), Σ z², Σ deg·z, Σ z·z' over edges, 0, 0) of one row to `sums`.

    `degrees` [col] are the neighbours of a patch in an inner grid row. Returns whether a sign bit is set.
    """
    lanes, zero = lanes_of(width), splat(width, _ZERO)
    if cols <= lanes:
        far, weighted, rest, square, degree, cross, signs = _block_sums(
            width, buffer, begin, mean, cols, rows, distances, at, pitch, degrees, 0, False
        )
        store(sums, out_at, sums_of_eight(rest, far, weighted, square, degree, cross, zero, zero))
        return holds_sign(signs)
    far, weighted, rest, square, degree, cross, signs = _block_sums(
        width, buffer, begin, mean, cols, rows, distances, at, pitch, degrees, 0, True
    )
    for col in range(lanes, cols, lanes):
        more = _block_sums(
            width, buffer, begin, mean, cols, rows, distances, at, pitch, degrees, col, col + lanes < cols
        )
        far, weighted, rest, square = far + more[0], weighted + more[1], rest + more[2], square + more[3]
        degree, cross, signs = degree + more[4], cross + more[5], either(signs, more[6])
    store(sums, out_at, sums_of_eight(rest, far, weighted, square, degree, cross, zero, zero))
    return holds_sign(signs)


@njit(forceinline=True, **OPTIONS)
def _map_sums(
    width: Any,
    buffer: Any,
    start: Any,
    row_stride: Any,
    shape: Any,
    tables: Any,
    wide: Any,
    at_end: Any,
    head: Any,
    sums: Any,
) -> None:
    """`_row_sums` of every patch query of the map at buffer[start], the mass on its prefix in `head` [patch query].

    Σ z is NaN where a sign bit is set. `at_end` is a row and a register long, for rows at the end of the memory, beyond
    which whole registers would reach.
    """
    prefix, _, cols, _ = shape
    patches = tables[1].size
    rows, tokens = patches // cols, prefix + patches
    (distances, degrees), pitch = wide, wide[1].size
    line = 64 // buffer.itemsize  # of a cache
    for patch in range(patches):
        begin = start + (prefix + patch) * row_stride
        row, col = patch // cols, patch % cols
        at = (col * (2 * rows - 1) + rows - 1 - row) * pitch
        if begin + at_end.size <= buffer.size:
            for i in range(begin, begin + tokens, line):
                prefetch(buffer, i + _AHEAD)
            head[patch] = _prefix_sum(width, buffer, begin, prefix)
            mean = (_ONE - head[patch]) / np.float32(patches)
            negative = _row_sums(
                width, buffer, begin + prefix, mean, cols, rows, distances, at, pitch, degrees, sums, 8 * patch
            )
        else:
            for i in range(tokens):
                at_end[i] = buffer[begin + i]
            head[patch] = _prefix_sum(width, at_end, 0, prefix)
            mean = (_ONE - head[patch]) / np.float32(patches)
            negative = _row_sums(
                width, at_end, prefix, mean, cols, rows, distances, at, pitch, degrees, sums, 8 * patch
            )
        if negative:
            sums[8 * patch] = np.nan


@njit(forceinline=True, **OPTIONS)
def _prefix_sum(width: Any, buffer: Any, begin: Any, prefix: Any) -> Any:
    """The mass on the prefix; NaN where a value is negative."""
    total = _ZERO
    for i in range(prefix):
        value = first_lane(load(width, buffer, begin + i))
        total += value if value >= _ZERO else np.float32(np.nan)
    return total


@njit(forceinline=True, **OPTIONS)
def _core_of_map(m: Any, shape: Any, tolerance: Any, needs: Any, head: Any, sums: Any, done: Any, out: Any) -> None:
    """Writes the core metrics of the rows whose sums allow it, and which those are to `done` [patch query]."""
    num_edges = np.float32(shape[3])
    rows, mass = out[0], out[1]
    n = np.float32(head.size)
    for patch in range(head.size):
        rest, far, weighted, square, degree, cross = (
            sums[8 * patch],
            sums[8 * patch + 1],
            sums[8 * patch + 2],
            sums[8 * patch + 3],
            sums[8 * patch + 4],
            sums[8 * patch + 5],
        )
        total = rest + n * ((_ONE - head[patch]) / n)  # z are the values less the mean that was expected
        moran, trusted = moran_of_sums(rest, square, degree, cross, n, num_edges)
        # A sum that is NaN or infinite fails the comparisons too.
        done[patch] = trusted and total >= np.float32(1e-3) and abs(head[patch] + total - _ONE) <= tolerance
        if done[patch]:
            mass[m, patch] = head[patch]
            if needs & DISTANCE:
                rows[0, m, patch] = far / total
            if needs & ENTROPY:
                nat = np.float32(LN_2) * (log2(total) - (weighted / total + _L0))
                rows[1, m, patch] = max(nat, _ZERO)
            if needs & MORAN:
                rows[2, m, patch] = moran


@lru_cache(maxsize=2)
def attention_pass(width: Width) -> Any:
    """`attention` as that of `numba_loops.passes`, for registers of this width, with one more argument after `tables`:

    wide  (distances [grid column, …], flat, and degrees [column]), grid rows padded to whole registers
    """
    of = sources()  # a part of the key under which compiled code is kept

    @njit(**CALLED_FROM_PYTHON)
    def attention(
        maps: Any,
        kind: Any,
        shape: Any,
        tables: Any,
        wide: Any,
        tolerance: Any,
        needs: Any,
        out: Any,
        begin: Any,
        end: Any,
    ) -> None:
        _ = of
        (buffer, starts, row_stride), near, far = lent(maps), lent(tables), lent(wide)
        into = lent(out)
        prefix, patches = shape[0], tables[1].size
        made = (
            (np.empty(patches, np.float32), np.empty(8 * patches + 8, np.float32), np.empty(patches, np.bool_)),
            np.zeros(prefix + patches + lanes_of(width), buffer.dtype),
            (np.empty(prefix, np.float32), np.empty(patches, np.float32), np.empty(patches, np.float32)),
        )
        (head, sums, done), at_end, scratch = lent(made)
        stored = stored_bits(buffer)
        for m in range(begin, end):
            clear_map(m, needs, into)
            _map_sums(width, buffer, starts[m], row_stride, shape, near, far, at_end, head, sums)
            _core_of_map(m, shape, tolerance, needs, head, sums, done, into)
            for q in range(prefix + patches):  # what the sums cannot tell
                ordinary = q >= prefix and done[q - prefix]
                left = needs & ~CORE if ordinary else needs
                if left or not ordinary:
                    at = starts[m] + q * row_stride
                    attention_row(stored, at, kind, m, q, shape, near, tolerance, left, scratch, into)
        hold(made)

    return attention
