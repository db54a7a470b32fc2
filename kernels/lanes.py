"""Sixteen float32 values side by side as one Numba value: what an AVX-512 register holds.

`Lanes` lets a compiled loop say which vector instruction it means, where the compiler's own vectoriser would have to
find one. Arithmetic is written with operators; the functions below are the rest: memory, fused multiply-add, the
parts of a float, neighbours, sums across lanes, and the inner tile of a matrix product. They exist in compiled code
only, and only on a CPU with AVX-512 (F, DQ, BW, VL).

Arrays are float32, uint16 (the bits of float16) or int16 (those of bfloat16), contiguous; positions count items.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.datamodel import models
from numba.core.extending import register_model
from numba.extending import intrinsic, overload

__all__ = [
    "WIDTH",
    "are_available",
    "dot_tile",
    "either",
    "exponent",
    "first",
    "first_lane",
    "fma",
    "fraction",
    "greater",
    "holds_sign",
    "keep",
    "load",
    "mantissa",
    "next_lane",
    "prefetch",
    "splat",
    "store",
    "sums_of_eight",
    "times_power",
    "transpose",
]

_intrinsic: Any = intrinsic  # what it makes is not a function to a type checker

WIDTH = 16
_NEEDED = ("avx512f", "avx512dq", "avx512bw", "avx512vl")

_F32, _I16, _I32, _I1 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(1)
_V, _VI, _VM = (ir.VectorType(item, WIDTH) for item in (_F32, _I32, _I1))
_CURRENT_ROUNDING = ir.Constant(_I32, 4)
_ALL = ir.Constant(_I16, -1)


class _LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__("float32x16")


class _MaskType(types.Type):
    def __init__(self) -> None:
        super().__init__("bool16")


_lanes, _mask = _LanesType(), _MaskType()
_ITEMS = {types.float32: _F32, types.uint16: _I16, types.int16: _I16}


@register_model(_LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _V)


@register_model(_MaskType)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _I16)


def are_available() -> bool:
    """Whether the code that Numba makes in this process may use AVX-512.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, with which Numba compiles for another CPU than this one, are heeded.
    """
    from llvmlite import binding

    cpu, features = getattr(config, "CPU_NAME", None), getattr(config, "CPU_FEATURES", None)
    if cpu is None and features is None:
        host = binding.get_host_cpu_features()
        return all(host.get(name, False) for name in _NEEDED)
    wanted = (features or "").split(",")
    return all(f"+{name}" in wanted for name in _NEEDED)


def _vector(values: list[int] | float) -> Any:
    return ir.Constant(_VI, values) if isinstance(values, list) else ir.Constant(_V, [values] * WIDTH)


def _call(builder: Any, name: str, returns: Any, arguments: list[Any]) -> Any:
    signature = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.v16f32", _V, [a, b, c])


def _as_mask(builder: Any, bits: Any) -> Any:
    return builder.bitcast(bits, _VM)


def _address(context: Any, builder: Any, array_type: Any, array: Any, position: Any, item: Any) -> Any:
    """Pointer to a vector of `item` at array[position]."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [position]), ir.VectorType(item, WIDTH).as_pointer())


def _widened(context: Any, builder: Any, array_type: Any, array: Any, position: Any) -> Any:
    """The sixteen items at array[position] as float32."""
    dtype = array_type.dtype
    raw = builder.load(
        _address(context, builder, array_type, array, position, _ITEMS[dtype]), align=dtype.bitwidth // 8
    )
    if dtype == types.float32:
        return raw
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), WIDTH)), _V)
    return builder.bitcast(builder.shl(builder.zext(raw, _VI), _vector([16] * WIDTH)), _V)


def _splatted(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(_V, ir.Undefined)
    return builder.shuffle_vector(
        builder.insert_element(undefined, scalar, ir.Constant(_I32, 0)), undefined, _vector([0] * WIDTH)
    )


# --- memory ---------------------------------------------------------------------------------------------------------


@_intrinsic
def splat(typing: Any, scalar: Any) -> Any:
    """A float32 in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splatted(builder, arguments[0])

    return _lanes(types.float32), generate


@_intrinsic
def first(typing: Any, count: Any) -> Any:
    """The mask of the first `count` lanes, 0 to 16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(_I32, 1)
        bits = builder.sub(builder.shl(one, builder.trunc(arguments[0], _I32)), one)
        return builder.trunc(bits, _I16)

    return _mask(types.int64), generate


@_intrinsic
def load(typing: Any, array: Any, position: Any) -> Any:
    """The sixteen items from array[position] on, widened; all must lie within the array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _widened(context, builder, signature.args[0], *arguments)

    return _lanes(array, types.int64), generate


@_intrinsic
def prefetch(typing: Any, array: Any, position: Any) -> Any:
    """Asks for the cache line of array[position], which need not lie within the array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        to_read, keep_close, of_data = (ir.Constant(_I32, value) for value in (0, 3, 1))
        signature_of = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, signature_of, "llvm.prefetch.p0")
        builder.call(function, [address, to_read, keep_close, of_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


@_intrinsic
def store(typing: Any, array: Any, position: Any, value: Any) -> Any:
    """Writes sixteen float32 from array[position] on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1], _F32)
        builder.store(arguments[2], address, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, _lanes), generate


@_intrinsic
def transpose(typing: Any, source: Any, begin: Any, stride: Any, factor: Any, target: Any, at: Any) -> Any:
    """target[at + 16 i + j] = factor · source[begin + j · stride + i] for i, j of 0 … 15, widened.

    Four rounds in which pairs of rows exchange halves, quarters, …: 64 shuffles for 256 items.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, begin, stride, factor, target, at = arguments
        whole = stride.type
        times = _splatted(builder, factor)

        def shifted(position: Any, row: int, step: Any) -> Any:
            return builder.add(position, builder.mul(step, ir.Constant(whole, row)))

        rows = [
            builder.fmul(times, _widened(context, builder, signature.args[0], source, shifted(begin, j, stride)))
            for j in range(WIDTH)
        ]
        half = WIDTH // 2
        while half:
            low = [i if not i & half else WIDTH + i - half for i in range(WIDTH)]
            high = [i + half if not i & half else WIDTH + i for i in range(WIDTH)]
            exchanged = list(rows)
            for j in range(WIDTH):
                if not j & half:
                    exchanged[j] = builder.shuffle_vector(rows[j], rows[j + half], _vector(low))
                    exchanged[j + half] = builder.shuffle_vector(rows[j], rows[j + half], _vector(high))
            rows = exchanged
            half //= 2
        for i in range(WIDTH):
            position = shifted(at, i, ir.Constant(whole, WIDTH))
            builder.store(rows[i], _address(context, builder, signature.args[4], target, position, _F32), align=4)
        return context.get_dummy_value()

    return types.void(source, types.int64, types.int64, types.float32, target, types.int64), generate


# --- arithmetic -----------------------------------------------------------------------------------------------------


def _of_two(build: Callable[[Any, Any, Any], Any], doc: str) -> Any:
    def operation(typing: Any, a: Any, b: Any) -> Any:
        if not (isinstance(a, _LanesType) and isinstance(b, _LanesType)):
            return None

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return build(builder, *arguments)

        return _lanes(_lanes, _lanes), generate

    operation.__doc__ = doc
    return _intrinsic(operation)


_add = _of_two(lambda builder, a, b: builder.fadd(a, b), "a + b")
_sub = _of_two(lambda builder, a, b: builder.fsub(a, b), "a − b")
_mul = _of_two(lambda builder, a, b: builder.fmul(a, b), "a · b")
greater = _of_two(
    lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b), "The greater; b where either is NaN."
)
either = _of_two(
    lambda builder, a, b: builder.bitcast(builder.or_(builder.bitcast(a, _VI), builder.bitcast(b, _VI)), _V),
    "The bits set in a or b: its signs tell whether either has one.",
)


def _operator(symbol: Callable[[Any, Any], Any], operation: Any) -> None:
    def implement(a: Any, b: Any) -> Any:
        if isinstance(a, _LanesType) and isinstance(b, _LanesType):

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
        return _fma(builder, *arguments)

    return _lanes(_lanes, _lanes, _lanes), generate


@_intrinsic
def keep(typing: Any, mask: Any, value: Any) -> Any:
    """The lanes of the mask; 0 in the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(_as_mask(builder, arguments[0]), arguments[1], _vector(0.0))

    return _lanes(mask, _lanes), generate


@_intrinsic
def next_lane(typing: Any, value: Any, mask: Any) -> Any:
    """Lane i takes lane i + 1 where the mask has it, else 0. Lane 15 takes lane 0: mask it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        turned = builder.shuffle_vector(
            arguments[0], arguments[0], _vector([(lane + 1) % WIDTH for lane in range(WIDTH)])
        )
        return builder.select(_as_mask(builder, arguments[1]), turned, _vector(0.0))

    return _lanes(_lanes, mask), generate


def _of_float(name: str, *middle: Any, doc: str) -> Any:
    """An AVX-512 instruction of one vector."""

    def operation(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            parts = [arguments[0], *middle, _vector(0.0), _ALL, _CURRENT_ROUNDING]
            return _call(builder, f"llvm.x86.avx512.mask.{name}.ps.512", _V, parts)

        return _lanes(_lanes), generate

    operation.__doc__ = doc
    return _intrinsic(operation)


exponent = _of_float("getexp", doc="⌊log2 |x|⌋; −inf of 0.")
mantissa = _of_float("getmant", ir.Constant(_I32, 0), doc="|x| / 2^exponent, in [1, 2).")
fraction = _of_float("reduce", ir.Constant(_I32, 1), doc="x − ⌊x⌋")


@_intrinsic
def times_power(typing: Any, value: Any, power: Any) -> Any:
    """value · 2^⌊power⌋"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        parts = [*arguments, _vector(0.0), _ALL, _CURRENT_ROUNDING]
        return _call(builder, "llvm.x86.avx512.mask.scalef.ps.512", _V, parts)

    return _lanes(_lanes, _lanes), generate


# --- across lanes ---------------------------------------------------------------------------------------------------


@_intrinsic
def first_lane(typing: Any, value: Any) -> Any:
    """Lane 0 as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.extract_element(arguments[0], ir.Constant(_I32, 0))

    return types.float32(_lanes), generate


@_intrinsic
def holds_sign(typing: Any, value: Any) -> Any:
    """Whether a lane has its sign bit set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        signs = builder.icmp_signed("<", builder.bitcast(arguments[0], _VI), _vector([0] * WIDTH))
        return builder.icmp_unsigned("!=", builder.bitcast(signs, _I16), ir.Constant(_I16, 0))

    return types.boolean(_lanes), generate


@_intrinsic
def sums_of_eight(typing: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> Any:
    """The sums over the lanes of a, b, …, h in lanes 0 … 7, and again in 8 … 15.

    Summed together they take 22 shuffles and additions; one by one they would take 64.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def folded(x: Any, y: Any, low: list[int], high: list[int]) -> Any:
            return builder.fadd(builder.shuffle_vector(x, y, _vector(low)), builder.shuffle_vector(x, y, _vector(high)))

        # Within quarters of the register: pairs of sums in turn, then four sums in turn.
        quarters = range(0, WIDTH, 4)
        twos = [[q + s + part for q in quarters for s in (0, WIDTH, 1, WIDTH + 1)] for part in (0, 2)]
        fours = [[q + s + part for q in quarters for s in (0, 1, WIDTH, WIDTH + 1)] for part in (0, 2)]
        pairs = [folded(arguments[i], arguments[i + 1], *twos) for i in (0, 2, 4, 6)]
        one, two = folded(pairs[0], pairs[1], *fours), folded(pairs[2], pairs[3], *fours)
        # Then across quarters.
        even = [s + lane for s in (0, 8, WIDTH, WIDTH + 8) for lane in range(4)]
        both = folded(one, two, even, [lane + 4 for lane in even])
        ends = [lane for _ in range(2) for half in (0, 8) for lane in range(half, half + 4)]
        return folded(both, both, ends, [lane + 4 for lane in ends])

    return _lanes(*[_lanes] * 8), generate


def _dot_tile(rows: int) -> Any:
    def operation(
        typing: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            keys, key_at, queries, query_at, depth, tile, tile_at = arguments
            key_type, query_type, tile_type = signature.args[0], signature.args[2], signature.args[5]
            key_data = context.make_array(key_type)(context, builder, keys).data
            whole = depth.type
            sums = [cgutils.alloca_once_value(builder, _vector(0.0)) for _ in range(rows)]
            with cgutils.for_range(builder, depth) as loop:
                step = builder.mul(loop.index, ir.Constant(whole, WIDTH))
                query = builder.load(
                    _address(context, builder, query_type, queries, builder.add(query_at, step), _F32), align=4
                )
                row = builder.gep(key_data, [builder.add(key_at, step)])
                for j, total in enumerate(sums):
                    key = _splatted(builder, builder.load(builder.gep(row, [ir.Constant(whole, j)])))
                    builder.store(_fma(builder, key, query, builder.load(total)), total)
            for j, total in enumerate(sums):
                position = builder.add(tile_at, ir.Constant(whole, WIDTH * j))
                builder.store(builder.load(total), _address(context, builder, tile_type, tile, position, _F32), align=4)
            return context.get_dummy_value()

        position = types.int64
        return types.void(keys, position, queries, position, position, tile, position), generate

    operation.__doc__ = f"{rows} rows of the product; see `dot_tile`."
    return _intrinsic(operation)


_dot_tiles = {rows: _dot_tile(rows) for rows in (WIDTH, 4)}


def dot_tile(
    rows: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
) -> Any:
    """tile[tile_at + 16 j + i] = Σ_d keys[key_at + 16 d + j] · queries[query_at + 16 d + i], for j < rows, i < 16.

    `keys` and `queries` are panels as `transpose` leaves them, sixteen tokens side by side for each of `depth`
    dimensions. `rows` is 16 or 4: so many sums stay in registers, each a chain of one multiply-add a dimension.
    """
    raise NotImplementedError  # compiled code only


@overload(dot_tile)
def _dot_tile_of(
    rows: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
) -> Any:
    sixteen, four = _dot_tiles[WIDTH], _dot_tiles[4]

    def compute(
        rows: Any, keys: Any, key_at: Any, queries: Any, query_at: Any, depth: Any, tile: Any, tile_at: Any
    ) -> Any:
        if rows == WIDTH:
            sixteen(keys, key_at, queries, query_at, depth, tile, tile_at)
        else:
            four(keys, key_at, queries, query_at, depth, tile, tile_at)

    return compute
