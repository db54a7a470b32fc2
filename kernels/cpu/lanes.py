"""Eight or sixteen float32 values side by side as one Numba value: what a vector register holds.

`Lanes` lets a compiled loop say which vector instruction it means, where the compiler's own vectoriser would have to
find one. Arithmetic is written with operators; the functions below are the rest: memory, fused multiply-add, the
parts of a float, neighbours, sums across lanes, and the inner tile of a matrix product. They exist in compiled code
only: sixteen lanes on a CPU with AVX-512 (F, DQ, BW, VL), eight on one with AVX2, FMA and F16C and on 64-bit Arm.

What makes lanes takes `SIXTEEN` or `EIGHT` first; what is made of them knows its width by its type.

Arrays are float32, uint16 (the bits of float16) or int16 (those of bfloat16), contiguous; positions count items.
"""

# Numba types compiled code: its parameters take no annotations.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from kernels.cpu.lane_types import (
    AS_WRITTEN,
    EIGHT,
    F32,
    I8,
    I16,
    I32,
    SIXTEEN,
    LanesType,
    MaskType,
    address,
    as_floats,
    avx512,
    bits,
    call,
    floats,
    floor,
    fused,
    items_of,
    masked,
    order,
    splatted,
    vector_of,
    whole,
    widened,
)
from kernels.cpu.math import by_type

_intrinsic: Any = intrinsic  # what it makes is not a function to a type checker


# --- memory ---------------------------------------------------------------------------------------------------------


@_intrinsic
def lanes_of(typing, width):
    """How many lanes a width has: a constant to the compiler."""

    def generate(context, builder, signature, arguments):
        return context.get_constant(types.int64, width.lanes)

    return types.int64(width), generate


@_intrinsic
def splat(typing, width, scalar):
    """A float32 in every lane."""
    made = LanesType(width.lanes)

    def generate(context, builder, signature, arguments):
        return splatted(builder, made, arguments[1])

    return made(width, types.float32), generate


@_intrinsic
def first(typing, width, count):
    """The mask of the first `count` lanes, 0 to all."""
    made = MaskType(width.lanes)

    def generate(context, builder, signature, arguments):
        wanted = builder.trunc(arguments[1], I32)
        if made.lanes == SIXTEEN.lanes:
            one = ir.Constant(I32, 1)
            return builder.trunc(builder.sub(builder.shl(one, wanted), one), I16)
        undefined = ir.Constant(vector_of(I32, made), ir.Undefined)
        filled = builder.insert_element(undefined, wanted, ir.Constant(I32, 0))
        filled = builder.shuffle_vector(filled, undefined, order([0] * made.lanes))
        inside = builder.icmp_signed("<", order(list(range(made.lanes))), filled)
        return builder.sext(inside, vector_of(I32, made))

    return made(width, types.int64), generate


@_intrinsic
def load(typing, width, array, position):
    """The items from array[position] on, one a lane, widened; all must lie within the array."""
    made = LanesType(width.lanes)

    def generate(context, builder, signature, arguments):
        return widened(context, builder, made, signature.args[1], *arguments[1:])

    return made(width, array, types.int64), generate


@_intrinsic
def prefetch(typing, array, position):
    """Asks for the cache line of array[position], which need not lie within the array."""

    def generate(context, builder, signature, arguments):
        data = items_of(context, builder, signature.args[0], arguments[0])
        place = builder.bitcast(builder.gep(data, [arguments[1]]), I8.as_pointer())
        to_read, keep_close, of_data = (ir.Constant(I32, value) for value in (0, 3, 1))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, to_read, keep_close, of_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@_intrinsic
def store(typing, array, position, value):
    """Writes lanes as float32 from array[position] on."""

    def generate(context, builder, signature, arguments):
        place = address(context, builder, signature.args[0], arguments[0], arguments[1], arguments[2].type)
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), generate


@_intrinsic
def transpose(typing, width, source, begin, stride, factor, target, at):
    """target[at + n i + j] = factor · source[begin + j · stride + i] for i, j of 0 … n − 1, widened, with n lanes.

    Rounds in which pairs of rows exchange halves, quarters, …: 64 shuffles for 256 items, 24 for 64.
    """
    lanes = width.lanes
    kind = LanesType(lanes)

    def generate(context, builder, signature, arguments):
        _, source, begin, stride, factor, target, at = arguments
        index = stride.type
        times = splatted(builder, kind, factor)

        def shifted(position: Any, row: int, step: Any) -> Any:
            return builder.add(position, builder.mul(step, ir.Constant(index, row)))

        rows = [
            builder.fmul(
                times,
                widened(context, builder, kind, signature.args[1], source, shifted(begin, j, stride)),
                flags=AS_WRITTEN,
            )
            for j in range(lanes)
        ]
        half = lanes // 2
        while half:
            low = [i if not i & half else lanes + i - half for i in range(lanes)]
            high = [i + half if not i & half else lanes + i for i in range(lanes)]
            exchanged = list(rows)
            for j in range(lanes):
                if not j & half:
                    exchanged[j] = builder.shuffle_vector(rows[j], rows[j + half], order(low))
                    exchanged[j + half] = builder.shuffle_vector(rows[j], rows[j + half], order(high))
            rows = exchanged
            half //= 2
        for i, row in enumerate(rows):
            position = shifted(at, i, ir.Constant(index, lanes))
            builder.store(row, address(context, builder, signature.args[5], target, position, row.type), align=4)
        return context.get_dummy_value()

    return types.void(width, source, types.int64, types.int64, types.float32, target, types.int64), generate


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _on_lanes(returns: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """An operation on lanes that `build` makes of the builder, their kind and values; it returns lanes if not said."""

    def declare(build: Callable[..., Any]) -> Any:
        def operation(typing, *kinds):
            kind = kinds[-1]
            if not isinstance(kind, LanesType):
                return None

            def generate(context, builder, signature, arguments):
                return build(builder, kind, *arguments)

            return (returns or kind)(*kinds), generate

        # Numba reads off the signature how many values there are, the first parameter left out.
        parameters = list(inspect.signature(build).parameters.values())[1:]
        operation.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        operation.__doc__ = build.__doc__
        return _intrinsic(operation)

    return declare


@_on_lanes()
def greater(builder, kind, a, b):
    """The greater; b where either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@_on_lanes()
def either(builder, kind, a, b):
    """The bits set in a or b: its signs tell whether either has one."""
    return as_floats(builder, kind, builder.or_(bits(builder, kind, a), bits(builder, kind, b)))


fma = _on_lanes()(fused)


@_on_lanes()
def mantissa(builder, kind, value):
    """x / 2^⌊log2 x⌋ of a positive normal number, in [1, 2); of 0 it is 1."""
    digits = builder.and_(bits(builder, kind, value), whole(kind, 0x007FFFFF))
    return as_floats(builder, kind, builder.or_(digits, whole(kind, 0x3F800000)))


@_on_lanes()
def exponent_steps(builder, kind, value, part):
    """2^23 · ⌊log2 x⌋ of a positive normal number with mantissa `part`; of 0 it is −127 · 2^23.

    As many float32 lie between the two: the difference of their bits, exact, where ⌊log2 x⌋ would take a shift more.
    """
    return builder.sitofp(builder.sub(bits(builder, kind, value), bits(builder, kind, part)), value.type)


@_on_lanes()
def fraction(builder, kind, value):
    """x − ⌊x⌋"""
    if kind.lanes == SIXTEEN.lanes:
        return avx512(builder, "reduce", value, ir.Constant(I32, 1))
    return builder.fsub(value, floor(builder, kind, value), flags=AS_WRITTEN)


@_on_lanes()
def times_power(builder, kind, value, power):
    """value · 2^⌊power⌋ for a power of −126 to 127; NaN if both are."""
    if kind.lanes == SIXTEEN.lanes:
        return avx512(builder, "scalef", value, power)
    # Added to 1.5 · 2^23, a small whole number stands in the last bits; shifted, in the exponent's place. NaN ends
    # as 2^0.
    last = builder.fadd(floor(builder, kind, power), floats(kind, 1.5 * 2**23), flags=AS_WRITTEN)
    shifted = builder.shl(bits(builder, kind, last), whole(kind, 23))
    scale = as_floats(builder, kind, builder.add(shifted, whole(kind, 0x3F800000)))
    return builder.fmul(value, scale, flags=AS_WRITTEN)


def _operator(symbol: Callable[[Any, Any], Any], instruction: Callable[..., Any]) -> None:
    operation = _on_lanes()(lambda builder, kind, a, b: instruction(builder, a, b, flags=AS_WRITTEN))

    def implement(a, b):
        if isinstance(a, LanesType) and isinstance(b, LanesType):
            return lambda a, b: operation(a, b)
        return None

    overload(symbol)(implement)


_operator(operator.add, ir.IRBuilder.fadd)
_operator(operator.sub, ir.IRBuilder.fsub)
_operator(operator.mul, ir.IRBuilder.fmul)


keep = _on_lanes()(masked)


# --- across lanes ---------------------------------------------------------------------------------------------------


@_on_lanes()
def next_lane(builder, kind, mask, value):
    """Lane i takes lane i + 1 where the mask has it, else 0. The last lane takes lane 0: mask it."""
    turns = order([(lane + 1) % kind.lanes for lane in range(kind.lanes)])
    return masked(builder, kind, mask, builder.shuffle_vector(value, value, turns))


@_on_lanes(types.float32)
def sum_of(builder, kind, value):
    """The sum over the lanes, halves added to halves."""
    total, half = value, kind.lanes // 2
    while half:
        turned = order([(lane + half) % kind.lanes for lane in range(kind.lanes)])
        total = builder.fadd(total, builder.shuffle_vector(total, total, turned), flags=AS_WRITTEN)
        half //= 2
    return builder.extract_element(total, ir.Constant(I32, 0))


@_on_lanes(types.boolean)
def holds_sign(builder, kind, value):
    """Whether a lane has its sign bit set."""
    signs = builder.icmp_signed("<", bits(builder, kind, value), whole(kind, 0))
    one_each = ir.IntType(kind.lanes)
    return builder.icmp_unsigned("!=", builder.bitcast(signs, one_each), ir.Constant(one_each, 0))


@_on_lanes()
def sums_of_eight(builder, kind, a, b, c, d, e, f, g, h):
    """The sums over the lanes of a, b, …, h in lanes 0 … 7, and of sixteen lanes again in 8 … 15.

    Summed together they take 22 shuffles and additions, eight lanes 21; one by one they would take 64.
    """
    lanes = kind.lanes

    def folded(x, y, low, high):
        parts = (builder.shuffle_vector(x, y, order(taken)) for taken in (low, high))
        return builder.fadd(*parts, flags=AS_WRITTEN)

    # Within quarters of 128 bits: pairs of sums in turn, then four sums in turn.
    quarters = range(0, lanes, 4)
    twos = [[q + s + part for q in quarters for s in (0, lanes, 1, lanes + 1)] for part in (0, 2)]
    fours = [[q + s + part for q in quarters for s in (0, 1, lanes, lanes + 1)] for part in (0, 2)]
    pairs = [folded(x, y, *twos) for x, y in ((a, b), (c, d), (e, f), (g, h))]
    one, two = folded(pairs[0], pairs[1], *fours), folded(pairs[2], pairs[3], *fours)
    # Then across quarters.
    even = [s + lane for s in range(0, 2 * lanes, 8) for lane in range(4)]
    both = folded(one, two, even, [lane + 4 for lane in even])
    if lanes == EIGHT.lanes:
        return both
    ends = [lane for _ in range(2) for half in (0, 8) for lane in range(half, half + 4)]
    return folded(both, both, ends, [lane + 4 for lane in ends])


def _dot_tile(rows: int) -> Any:
    def operation(typing, width, keys, key_at, queries, query_at, depth, tile, at):
        lanes = width.lanes
        kind = LanesType(lanes)

        def generate(context, builder, signature, arguments):
            _, keys, key_at, queries, query_at, depth, tile, at = arguments
            _, key_type, _, query_type, _, _, tile_type, _ = signature.args
            key_data = items_of(context, builder, key_type, keys)
            index, vector = depth.type, vector_of(F32, kind)
            sums = [cgutils.alloca_once_value(builder, floats(kind, 0.0)) for _ in range(rows)]
            with cgutils.for_range(builder, depth) as loop:
                step = builder.mul(loop.index, ir.Constant(index, lanes))
                place = address(context, builder, query_type, queries, builder.add(query_at, step), vector)
                query = builder.load(place, align=4)
                row = builder.gep(key_data, [builder.add(key_at, step)])
                for j, total in enumerate(sums):
                    key = splatted(builder, kind, builder.load(builder.gep(row, [ir.Constant(index, j)])))
                    builder.store(fused(builder, kind, key, query, builder.load(total)), total)
            for j, total in enumerate(sums):
                position = builder.add(at, ir.Constant(index, lanes * j))
                place = address(context, builder, tile_type, tile, position, vector)
                builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        position = types.int64
        return types.void(width, keys, position, queries, position, position, tile, position), generate

    operation.__doc__ = f"{rows} rows of the product; see `dot_tile`."
    return _intrinsic(operation)


_dot_tiles = {rows: _dot_tile(rows) for rows in (16, 8, 4)}


@by_type
def dot_tile(width, rows, keys, key_at, queries, query_at, depth, tile, tile_at):
    """tile[tile_at + n j + i] = Σ_d keys[key_at + n d + j] · queries[query_at + n d + i], j < rows, i < n lanes.

    `keys` and `queries` are panels as `transpose` leaves them, n tokens side by side for each of `depth` dimensions.
    `rows` is n or 4: that many sums stay in registers, each a chain of one multiply-add per dimension.
    """
    lanes = width.lanes
    many, four = _dot_tiles[lanes], _dot_tiles[4]

    def compute(width, rows, keys, key_at, queries, query_at, depth, tile, tile_at):
        if rows == lanes:
            many(width, keys, key_at, queries, query_at, depth, tile, tile_at)
        else:
            four(width, keys, key_at, queries, query_at, depth, tile, tile_at)

    return compute
