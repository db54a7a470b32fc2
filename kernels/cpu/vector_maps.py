"""Stored maps in vector registers, in float32: every sum of a row in two sweeps over it.

The first sweep takes the row as it lies in memory, register by register, whatever the grid: it widens it into a buffer
and sums what is asked of each value alone. The second takes the buffer column by column of registers, so that
neighbours are the next lane and the previous register: Moran's I. It comes one row later than the first, for it needs
the row's mean, and the sum across lanes that the mean waits for takes as long as several registers of the next row.

Computed are the core metrics, distance, entropy and Moran's I, and prefix mass. A row that is out of the ordinary
(invalid, almost without mass on the patches, almost constant) and metrics beyond the core take the way of
`rows`; which way a row takes depends on that row alone.

What a register of the row costs decides: one prefetch for each of them took 0.36 of 2.04 ms per image more than one for
each cache line (float16, ViT-B/16, one core), counting array references by the row (`math.lent`) 0.4.

log2 is good to 1.9e-6 (degree 6 on [1, 2)), a least-squares fit reweighted until its greatest error was least.
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
from kernels.cpu.lanes import (
    either,
    exponent_steps,
    first,
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
    sum_of,
    sums_of_eight,
    transpose,
)
from kernels.cpu.math import LN_2, OPTIONS, apart, hold, lent, log2, stored_bits
from kernels.cpu.rows import CORE, DISTANCE, ENTROPY, MORAN, Planes, attention_row, clear_map, moran_of_sums

# 2^23 log2 m = Σ c_k m^k on [1, 2), in the unit of `exponent_steps`.
_STEPS = 2.0**23
_L0, _L1, _L2, _L3, _L4, _L5, _L6 = (
    np.float32(_STEPS * c)
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
_ZERO, _ONE, _NAN = np.float32(0), np.float32(1), np.float32(np.nan)
_SUMS = 8  # a row
# Rows whose spread is less than 1/24 of their mean have the rounding of the mean taken out of their sums. It is up to
# 3e-7 of the mean; left in a row of more spread it changes Moran's I by 2e-6 at most.
_LEAST_SPREAD = np.float32(1 / 24**2)


@njit(forceinline=True, **OPTIONS)
def _first_items(width, buffer, begin, count, at_end):
    """The items from buffer[begin] on in the first `count` lanes, 0 in the others.

    Where a whole register would reach beyond the memory, they are copied to `at_end`, a register long.
    """
    if begin + lanes_of(width) <= buffer.size:
        x = load(width, buffer, begin)
    else:
        for i in range(count):
            at_end[i] = buffer[begin + i]
        x = load(width, at_end, 0)
    return keep(first(width, count), x)


@njit(forceinline=True, **OPTIONS)
def _add(width, x, near_x, y, near_y, sums):
    """(Σ x, Σ x·d, 2^23 Σ x·(log2 x − _L0), the signs) with two more registers.

    Two side by side: the constants are fetched once for both, and each multiply-add waits for the one before it.
    """
    total, far, weighted, signs = sums
    c1, c2, c3 = splat(width, _L1), splat(width, _L2), splat(width, _L3)
    c4, c5, c6 = splat(width, _L4), splat(width, _L5), splat(width, _L6)
    part, other = mantissa(x), mantissa(y)
    a, b = fma(part, c6, c5), fma(other, c6, c5)
    a, b = fma(part, a, c4), fma(other, b, c4)
    far = fma(y, near_y, fma(x, near_x, far))
    a, b = fma(part, a, c3), fma(other, b, c3)
    total = total + x + y
    a, b = fma(part, a, c2), fma(other, b, c2)
    signs = either(either(signs, x), y)
    a, b = fma(part, a, c1), fma(other, b, c1)
    a, b = fma(part, a, exponent_steps(x, part)), fma(other, b, exponent_steps(y, other))
    return total, far, fma(y, b, fma(x, a, weighted)), signs


@njit(forceinline=True, **OPTIONS)
def _first_sweep(width, buffer, begin, distances, at, values, at_end, n):
    """What `_add` sums of the `n` items from buffer[begin] on, lane by lane; they themselves to `values`."""
    lanes, nothing = lanes_of(width), splat(width, _ZERO)
    sums = (nothing, nothing, nothing, nothing)
    pairs = n // (2 * lanes)
    for pair in range(pairs):
        i = pair * 2 * lanes
        x, y = load(width, buffer, begin + i), load(width, buffer, begin + i + lanes)
        store(values, i, x)
        store(values, i + lanes, y)
        sums = _add(width, x, load(width, distances, at + i), y, load(width, distances, at + i + lanes), sums)
    i = pairs * 2 * lanes
    if i < n:
        x, y = _first_items(width, buffer, begin + i, min(n - i, lanes), at_end), nothing
        if i + lanes < n:
            y = _first_items(width, buffer, begin + i + lanes, n - i - lanes, at_end)
        store(values, i, x)
        store(values, i + lanes, y)
        sums = _add(width, x, load(width, distances, at + i), y, load(width, distances, at + i + lanes), sums)
    return sums


@njit(forceinline=True, **OPTIONS)
def _second_sweep(width, values, mean, rows, cols):
    """(Σ z², Σ z·z' over edges) with z = x − mean, lane by lane."""
    lanes, nothing, centre = lanes_of(width), splat(width, _ZERO), splat(width, mean)
    square, cross = nothing, nothing
    col = 0
    while col + lanes < cols:
        above, at = nothing, col
        for _ in range(rows):
            z = load(width, values, at) - centre
            square = fma(z, z, square)
            cross = fma(z, (load(width, values, at + 1) - centre) + above, cross)
            above = z
            at += cols
        col += lanes
    # Lanes beyond the grid sum up what lies there; none meets another.
    inside, inner = first(width, cols - col), first(width, cols - col - 1)
    last_square, last_cross, above, at = nothing, nothing, nothing, col
    for _ in range(rows):
        z = load(width, values, at) - centre
        last_square = fma(z, z, last_square)
        last_cross = fma(z, next_lane(inner, z) + above, last_cross)
        above = z
        at += cols
    return square + keep(inside, last_square), cross + keep(inside, last_cross)


@njit(forceinline=True, **OPTIONS)
def _rest_sums(width, values, mean, degrees, n):
    """(Σ z, Σ deg z), lane by lane."""
    lanes, centre = lanes_of(width), splat(width, mean)
    rest, degree = splat(width, _ZERO), splat(width, _ZERO)
    for i in range(0, n, lanes):
        z = keep(first(width, min(n - i, lanes)), load(width, values, i) - centre)
        rest = rest + z
        degree = fma(z, load(width, degrees, i), degree)
    return rest, degree


@njit(forceinline=True, **OPTIONS)
def _map_sums(width, buffer, start, row_stride, shape, n, wide, work, sums):
    """The sums of every patch query of the map at buffer[start] to `sums` [patch query, 8].

    Σ x, NaN where a sign bit is set; Σ x·d; 2^23 Σ x·(log2 x − _L0); the mass on the prefix; Σ z²; Σ z·z' over edges;
    and, of rows with little spread, Σ z and Σ deg z, else 0.
    """
    prefix, _, cols, _ = shape
    distances, degrees = wide
    values, at_end = work
    lanes, nothing = lanes_of(width), splat(width, _ZERO)
    rows, line = n // cols, 64 // buffer.itemsize  # of a cache
    lines = (prefix + n + line - 1) // line
    row, col, begin = 0, 0, start + prefix * row_stride
    mean, total, far, weighted, signs, head = _ZERO, nothing, nothing, nothing, nothing, nothing
    for turn in range(n + 1):
        before, mean_before = (total, far, weighted, head), mean
        negative = holds_sign(signs)
        if turn < n:
            for i in range(lines):
                prefetch(buffer, begin + _AHEAD + i * line)
            at = (col * (2 * rows - 1) + rows - 1 - row) * cols
            total, far, weighted, signs = _first_sweep(
                width, buffer, begin + prefix, distances, at, values[turn % 2], at_end, n
            )
            mean = sum_of(total) / np.float32(n)
            head = nothing
            for i in range(0, prefix, lanes):
                x = _first_items(width, buffer, begin + i, min(prefix - i, lanes), at_end)
                head = head + x
                signs = either(signs, x)
            begin += row_stride
            col += 1
            if col == cols:
                row, col = row + 1, 0
        if turn > 0:
            here, its_values = _SUMS * (turn - 1), values[1 - turn % 2]
            square, cross = _second_sweep(width, its_values, mean_before, rows, cols)
            store(sums, here, sums_of_eight(*before, square, cross, nothing, nothing))
            if sums[here + 4] < _LEAST_SPREAD * sums[here] * mean_before:
                rest, degree = _rest_sums(width, its_values, mean_before, degrees, n)
                sums[here + 6], sums[here + 7] = sum_of(rest), sum_of(degree)
            if negative:
                sums[here] = _NAN


@njit(forceinline=True, **OPTIONS)
def _give(width, plane, at, target, begin):
    """A register's worth of a plane to `target` from `begin` on, as far as it goes."""
    lanes = lanes_of(width)
    if begin + lanes <= target.size:
        store(target, begin, load(width, plane, at))
    else:
        for i in range(target.size - begin):
            target[begin + i] = plane[at + i]


@njit(forceinline=True, **OPTIONS)
def _core_of_map(width, m, shape, tolerance, needs, sums, planes, out):
    """Writes the prefix mass and core metrics of map `m`; NaN for rows whose sums do not allow it.

    Plain loops over as many rows as a register has lanes, of which the compiler makes vector instructions.
    """
    lanes, num_edges = lanes_of(width), np.float32(shape[3])
    mass, far, entropy, moran = out.prefix_mass[m], out.distance[m], out.entropy[m], out.morans_i[m]
    n, within = np.float32(mass.size), np.float32(tolerance)
    for begin in range(0, mass.size, lanes):
        transpose(width, sums, _SUMS * begin, _SUMS, _ONE, planes, 0)  # planes [sum, row]
        for i in range(lanes):
            total, head = planes[i], planes[3 * lanes + i]
            square, rest = planes[4 * lanes + i], planes[6 * lanes + i]
            value, trusted = moran_of_sums(rest, square, planes[7 * lanes + i], planes[5 * lanes + i], n, num_edges)
            # A sum that is NaN or infinite fails the comparisons too.
            ordinary = trusted & (total >= np.float32(1e-3)) & (abs(head + total - _ONE) <= within)
            steps = planes[2 * lanes + i] / total + _L0
            nat = np.float32(LN_2) * (log2(total) - steps * np.float32(1 / _STEPS))
            planes[i] = head if ordinary else _NAN
            planes[lanes + i] = planes[lanes + i] / total if ordinary else _NAN
            planes[2 * lanes + i] = (nat if nat > _ZERO else _ZERO) if ordinary else _NAN
            planes[3 * lanes + i] = value if ordinary else _NAN
        _give(width, planes, 0, mass, begin)
        if needs & DISTANCE:
            _give(width, planes, lanes, far, begin)
        if needs & ENTROPY:
            _give(width, planes, 2 * lanes, entropy, begin)
        if needs & MORAN:
            _give(width, planes, 3 * lanes, moran, begin)


@lru_cache(maxsize=2)
def attention_pass(width: Width) -> Any:
    """`attention` as that of `loops`, for registers of this width, with one more argument after `tables`:

    wide  (the distances of `tables`, flat, and how many neighbours each patch has), from `backend._wide_tables`
    """

    @called_from_python
    def attention(maps, kind, shape, tables, wide, tolerance, needs, out, begin, end):
        (buffer, starts, row_stride), near, far = lent(maps), lent(tables), lent(wide)
        into = Planes(*lent(out))
        prefix, patches, lanes = shape[0], tables[1].size, lanes_of(width)
        blocks = (patches + lanes - 1) // lanes
        made = (
            (np.zeros((2, (blocks + 1) * lanes), np.float32), np.zeros(lanes, buffer.dtype)),
            (np.empty((blocks * lanes + 1) * _SUMS, np.float32), np.empty(lanes * lanes, np.float32)),
            (apart(prefix, np.float32), apart(patches, np.float32), apart(patches, np.float32)),
        )
        work, (sums, planes), scratch = lent(made)
        stored, mass = stored_bits(buffer), into.prefix_mass
        for m in range(begin, end):
            clear_map(m, needs, into)
            _map_sums(width, buffer, starts[m], row_stride, shape, patches, far, work, sums)
            _core_of_map(width, m, shape, tolerance, needs, sums, planes, into)
            for q in range(prefix + patches):  # what the sums cannot tell
                ordinary = q >= prefix and not np.isnan(mass[m, q - prefix])
                rest = needs & ~CORE if ordinary else needs
                if rest or not ordinary:
                    at = starts[m] + q * row_stride
                    attention_row(stored, at, kind, m, q, shape, near, tolerance, rest, scratch, into)
        hold(made)

    return attention
