"""Device code that the kernels of the `triton` backend share, and the means over rows.

Names: m maps, n tokens that are queries, c columns of the grid, all in range: beyond an end the last one is repeated,
so that loads need no mask, and left out where sums of a tile are taken or stored.
"""

# Triton types device code: its parameters take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kernels.cuda import rows

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Bits of what a kernel is asked for, and planes of its result, as constants of device code. They stand on the left of
# `&`: on the right of a number the interpreter does not know them.
DISTANCE, ENTROPY, MORAN, GEARY = (tl.constexpr(bit) for bit in (rows.DISTANCE, rows.ENTROPY, rows.MORAN, rows.GEARY))
EDGES = tl.constexpr(rows.MORAN | rows.GEARY)
PREFIX_MASS = tl.constexpr(rows.PREFIX_MASS)
AT_DISTANCE, AT_ENTROPY, AT_MORAN, AT_GEARY, AT_PREFIX_MASS = (tl.constexpr(plane) for plane in range(len(rows.PLANES)))


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
    tl.store(planes + rows * plane + at, values, mask=inside)


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
    if MORAN & NEEDS:
        cross = s_cross - rest * s_ends + NUM_EDGES * rest * rest
        moran = tl.where(known, PATCHES / NUM_EDGES * (cross / squares), float("nan"))
        store_plane(planes, AT_MORAN, at, moran, inside, rows)
    if GEARY & NEEDS:
        factor = (PATCHES - 1) / (2 * NUM_EDGES)
        geary = tl.where(known, factor * (s_apart / squares), float("nan"))
        store_plane(planes, AT_GEARY, at, geary, inside, rows)


@triton.jit
def of_grid(x, c, GRID_COLS: tl.constexpr, AXIS: tl.constexpr):
    """Sum over the columns that there are, which are the tile's axis AXIS."""
    return tl.sum(tl.where(c < GRID_COLS, x, 0.0), axis=AXIS)


@triton.jit
def of_edges_of_columns(s_z, c, GRID_COLS: tl.constexpr):
    """Σ z by its number of edges, of columns whose first and last z have one more than there are edges."""
    across = 2 - (c == 0).to(tl.float32) - (c == GRID_COLS - 1).to(tl.float32)
    return (across + 2.0) * s_z


@triton.jit(do_not_specialize=["maps", "num_planes"])
def means_of_rows(
    first, second, third, fourth, valid, means, counts, maps, num_planes, map_stride, query_stride, valid_stride,
    PREFIX: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Mean over the patch queries that have a value, in float64, and how many valid ones have none.

    A program takes a map of one of up to four planes, which have the same strides. Behind the planes'
    counts stand those of rows that are no attention, and of patch queries among them.
    """
    m, plane = tl.program_id(0).to(tl.int64), tl.program_id(1)
    values = first
    if plane == 1:
        values = second
    elif plane == 2:
        values = third
    elif plane == 3:
        values = fourth
    n = tl.arange(0, BLOCK)
    x = tl.load(values + m * map_stride + n * query_stride, mask=n < QUERIES, other=float("nan"))
    is_valid = tl.load(valid + m * valid_stride + PREFIX + n, mask=n < QUERIES, other=0) != 0
    defined = x == x
    count = tl.sum(defined.to(tl.int32), axis=0)
    total = tl.sum(tl.where(defined, x, 0.0).to(tl.float64), axis=0)
    mean = total / tl.maximum(count, 1).to(tl.float64)
    at = plane * maps + m
    tl.store(means + at, tl.where(count > 0, mean, float("nan")))
    tl.store(counts + at, tl.sum((is_valid & (x != x)).to(tl.int32), axis=0).to(tl.int64))
    if plane == 0:
        invalid = QUERIES - tl.sum(is_valid.to(tl.int32), axis=0)
        tl.store(counts + (num_planes + 1) * maps + m, invalid.to(tl.int64))
        if PREFIX > 0:
            p = tl.arange(0, BLOCK_P)
            of_prefix = tl.load(valid + m * valid_stride + p, mask=p < PREFIX, other=0) != 0
            invalid += PREFIX - tl.sum(of_prefix.to(tl.int32), axis=0)
        tl.store(counts + num_planes * maps + m, invalid.to(tl.int64))
