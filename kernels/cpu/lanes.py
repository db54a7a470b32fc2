"""Eight or sixteen float32 values side by side as one Numba value: what a vector register holds.

`Lanes` lets a compiled loop say which vector instruction it means, where the compiler's own vectoriser would have to
find one. Arithmetic is written with operators; the functions below are the rest: memory, fused multiply-add, the
parts of a float, neighbours, sums across lanes, and the inner tile of a matrix product. They exist in compiled code
only: sixteen lanes on a CPU with AVX-512 (F, DQ, BW, VL), eight on one with AVX2, FMA and F16C and on 64-bit Arm.

What makes lanes takes `SIXTEEN` or `EIGHT` first; what is made of them knows its width by its type.

Arrays are float32, uint16 (the bits of float16) or int16 (those of bfloat16), contiguous; positions count items.
"""

from __future__ import annotations

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

_intrinsic: Any = intrinsic  # what it makes is not a function to a type checker


# --- memory ---------------------------------------------------------------------------------------------------------


@_intrinsic
def lanes_of(typing: Any, width: Any) -> Any:
    """How many lanes a width has: a constant to the compiler."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_constant(types.int64, width.lanes)

    return types.int64(width), generate


@_intrinsic
def splat(typing: Any, width: Any, scalar: Any) -> Any:
    """A float32 in every lane."""
    made = LanesType(width.lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splatted(builder, made, arguments[1])

    return made(width, types.float32), generate


@_intrinsic
def first(typing: Any, width: Any, count: Any) -> Any:
    """The mask of the first `count` lanes, 0 to all."""
    made = MaskType(width.lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
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
def load(typing: Any, width: Any, array: Any, position: Any) -> Any:
    """The items from array[position] on, one a lane, widened; all must lie within the array."""
    made = LanesType(width.lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return widened(context, builder, made, signature.args[1], *arguments[1:])

    return made(width, array, types.int64), generate


@_intrinsic
def prefetch(typing: Any, array: Any, position: Any) -> Any:
    """Asks for the cache line of array[position], which need not lie within the array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = items_of(context, builder, signature.args[0], arguments[0])
        place = builder.bitcast(builder.gep(data, [arguments[1]]), I8.as_pointer())
        to_read, keep_close, of_data = (ir.Constant(I32, value) for value in (0, 3, 1))
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, to_read, keep_close, of_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@_intrinsic
def store(typing: Any, array: Any, position: Any, value: Any) -> Any:
    """Writes lanes as float32 from array[position] on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = address(context, builder, signature.args[0], arguments[0], arguments[1], arguments[2].type)
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, value), generate


@_intrinsic
def transpose(typing: Any, width: Any, source: Any, begin: Any, stride: Any, factor: Any, target: Any, at: Any) -> Any:
    """target[at + n i + j] = factor · source[begin + j · stride + i] for i, j of 0 … n − 1, widened, with n lanes.

    Rounds in which pairs of rows exchange halves, quarters, …: 64 shuffles for 256 items, 24 for 64.
    """
    lanes = width.lanes
    kind = LanesType(lanes)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
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


def _of_two(build: Callable[[Any, Any, Any, Any], Any], doc: str) -> Any:
    def operation(typing: Any, a: Any, b: Any) -> Any:
        if not (isinstance(a, LanesType) and a == b):
            return None

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, a, *arguments)

        return a(a, a), generate

    operation.__doc__ = doc
    return _intrinsic(operation)


def _or(builder: Any, kind: Any, a: Any, b: Any) -> Any:
    return as_floats(builder, kind, builder.or_(bits(builder, kind, a), bits(builder, kind, b)))


_add = _of_two(lambda builder, _, a, b: builder.fadd(a, b, flags=AS_WRITTEN), "a + b")
_sub = _of_two(lambda builder, _, a, b: builder.fsub(a, b, flags=AS_WRITTEN), "a − b")
_mul = _of_two(lambda builder, _, a, b: builder.fmul(a, b, flags=AS_WRITTEN), "a · b")
greater = _of_two(
    lambda builder, _, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b),
    "The greater; b where either is NaN.",
)
either = _of_two(_or, "The bits set in a or b: its signs tell whether either has one.")


def _operator(symbol: Callable[[Any, Any], Any], operation: Any) -> None:
    def implement(a: Any, b: Any) -> Any:
        if isinstance(a, LanesType) and isinstance(b, LanesType):

            def compute(a: Any, b: Any) -> Any:
                return operation(a, b)

            return compute
        return None

    overload(symbol)(implement)


_operator(operator.add, _add)
_operator(operator.sub, _sub)
_operator(operator.mul, _mul)


@_intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return fused(builder, a, *arguments)

    return a(a, a, a), generate


@_intrinsic
def keep(typing: Any, mask: Any, value: Any) -> Any:
    """The lanes of the mask; 0 in the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return masked(builder, value, *arguments)

    return value(mask, value), generate


@_intrinsic
def next_lane(typing: Any, value: Any, mask: Any) -> Any:
    """Lane i takes lane i + 1 where the mask has it, else 0. The last lane takes lane 0: mask it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        turns = order([(lane + 1) % value.lanes for lane in range(value.lanes)])
        turned = builder.shuffle_vector(arguments[0], arguments[0], turns)
        return masked(builder, value, arguments[1], turned)

    return value(value, mask), generate


@_intrinsic
def mantissa(typing: Any, value: Any) -> Any:
    """x / 2^⌊log2 x⌋ of a positive normal number, in [1, 2); of 0 it is 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        digits = builder.and_(bits(builder, value, arguments[0]), whole(value, 0x007FFFFF))
        return as_floats(builder, value, builder.or_(digits, whole(value, 0x3F800000)))

    return value(value), generate


@_intrinsic
def exponent_steps(typing: Any, value: Any, part: Any) -> Any:
    """2^23 · ⌊log2 x⌋ of a positive normal number with mantissa `part`; of 0 it is −127 · 2^23.

    As many float32 lie between the two: the difference of their bits, exact, where ⌊log2 x⌋ would take a shift more.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        steps = builder.sub(*(bits(builder, value, argument) for argument in arguments))
        return builder.sitofp(steps, arguments[0].type)

    return value(value, value), generate


@_intrinsic
def fraction(typing: Any, value: Any) -> Any:
    """x − ⌊x⌋"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value.lanes == SIXTEEN.lanes:
            return avx512(builder, "reduce", arguments[0], ir.Constant(I32, 1))
        return builder.fsub(arguments[0], floor(builder, value, arguments[0]), flags=AS_WRITTEN)

    return value(value), generate


@_intrinsic
def times_power(typing: Any, value: Any, power: Any) -> Any:
    """value · 2^⌊power⌋ for a power of −126 to 127; NaN if both are."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if value.lanes == SIXTEEN.lanes:
            return avx512(builder, "scalef", *arguments)
        # Added to 1.5 · 2^23, a small whole number stands in the last bits; shifted, in the exponent's place. NaN ends
        # as 2^0.
        last = builder.fadd(floor(builder, value, arguments[1]), floats(value, 1.5 * 2**23), flags=AS_WRITTEN)
        shifted = builder.shl(bits(builder, value, last), whole(value, 23))
        scale = as_floats(builder, value, builder.add(shifted, whole(value, 0x3F800000)))
        return builder.fmul(arguments[0], scale, flags=AS_WRITTEN)

    return value(value, value), generate


# --- across lanes ---------------------------------------------------------------------------------------------------


@_intrinsic
def sum_of(typing: Any, value: Any) -> Any:
    """The sum over the lanes, halves added to halves."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, half = arguments[0], value.lanes // 2
        while half:
            turned = order([(lane + half) % value.lanes for lane in range(value.lanes)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, turned), flags=AS_WRITTEN)
            half //= 2
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.float32(value), generate


@_intrinsic
def holds_sign(typing: Any, value: Any) -> Any:
    """Whether a lane has its sign bit set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        signs = builder.icmp_signed("<", bits(builder, value, arguments[0]), whole(value, 0))
        one_each = ir.IntType(value.lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(signs, one_each), ir.Constant(one_each, 0))

    return types.boolean(value), generate


@_intrinsic
def sums_of_eight(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """The sums over the lanes of a, b, …, h in lanes 0 … 7, and of sixteen lanes again in 8 … 15.

    Summed together they take 22 shuffles and additions, eight lanes 21; one by one they would take 64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes = a.lanes

        def folded(x: Any, y: Any, low: list[int], high: list[int]) -> Any:
            parts = (builder.shuffle_vector(x, y, order(taken)) for taken in (low, high))
            return builder.fadd(*parts, flags=AS_WRITTEN)

        # Within quarters of 128 bits: pairs of sums in turn, then four sums in turn.
        quarters = range(0, lanes, 4)
        twos = [[q + s + part for q in quarters for s in (0, lanes, 1, lanes + 1)] for part in (0, 2)]
        fours = [[q + s + part for q in quarters for s in (0, 1, lanes, lanes + 1)] for part in (0, 2)]
        pairs = [folded(arguments[i], arguments[i + 1], *twos) for i in (0, 2, 4, 6)]
        one, two = folded(pairs[0], pairs[1], *fours), folded(pairs[2], pairs[3], *fours)
        # Then across quarters.
        even = [s + lane for s in range(0, 2 * lanes, 8) for lane in range(4)]
        both = folded(one, two, even, [lane + 4 for lane in even])
        if lanes == EIGHT.lanes:
            return both
        ends = [lane for _ in range(2) for half in (0, 8) for lane in range(half, half + 4)]
        return folded(both, both, ends, [lane + 4 for lane in ends])

    return a(*[a] * 8), generate


def _dot_tile(rows: int) -> Any:
    def operation(
        typing: Any, width: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, at: Any
    ) -> Any:
        lanes = width.lanes
        kind = LanesType(lanes)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
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


def dot_tile(
    width: Any, rows: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
) -> Any:
    """tile[tile_at + n j + i] = Σ_d keys[key_at + n d + j] · queries[query_at + n d + i], j < rows, i < n lanes.

    `keys` and `queries` are panels as `transpose` leaves them, n tokens side by side for each of `depth` dimensions.
    `rows` is n or 4: so many sums stay in registers, each a chain of one multiply-add a dimension.
    """
    raise NotImplementedError  # compiled code only


@overload(dot_tile)
def _dot_tile_of(
    width: Any, rows: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
) -> Any:
    lanes = width.lanes
    many, four = _dot_tiles[lanes], _dot_tiles[4]

    def compute(
        width: Any, rows: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
    ) -> Any:
        if rows == lanes:
            many(width, keys, key_at, queries, query_at, depth, tile, tile_at)
        else:
            four(width, keys, key_at, queries, query_at, depth, tile, tile_at)

    return compute
