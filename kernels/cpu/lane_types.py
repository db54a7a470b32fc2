"""Vector registers as Numba types, and the pieces of LLVM code that `lanes` puts together."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.core.datamodel import models
from numba.core.extending import register_model
from numba.core.imputils import lower_constant
from numba.extending import typeof_impl


@dataclass(frozen=True, slots=True)
class Width:
    """A kind of vector register: how many float32 it holds, and what an x86-64 CPU must have for it."""

    lanes: int
    needs: tuple[str, ...]


SIXTEEN = Width(16, ("avx512f", "avx512dq", "avx512bw", "avx512vl"))
EIGHT = Width(8, ("avx2", "fma", "f16c"))  # on 64-bit Arm two of four, which every CPU has


def widest() -> Width | None:
    """The widest registers that the code Numba makes in this process may use; None where it has neither.

    NUMBA_CPU_NAME and NUMBA_CPU_FEATURES, with which Numba compiles for another CPU than this one, count.
    """
    from llvmlite import binding

    if platform.machine().lower() in ("aarch64", "arm64"):
        return EIGHT
    cpu, features = getattr(config, "CPU_NAME", None), getattr(config, "CPU_FEATURES", None)
    if cpu is None and features is None:
        host = binding.get_host_cpu_features()
        has = {name for name, there in host.items() if there}
    else:
        has = {name[1:] for name in (features or "").split(",") if name.startswith("+")}
    return next((width for width in (SIXTEEN, EIGHT) if has.issuperset(width.needs)), None)


class _OfLanes(types.Type):
    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"{type(self).__name__}({lanes})")


class WidthType(_OfLanes):
    """The type of a `Width`: a constant, by which compiled code is chosen."""


class LanesType(_OfLanes):
    """float32 values side by side."""


class MaskType(_OfLanes):
    """Which of them are meant."""


@typeof_impl.register(Width)
def _type_of_width(value: Width, _: Any) -> WidthType:
    return WidthType(value.lanes)


register_model(WidthType)(models.OpaqueModel)


@lower_constant(WidthType)
def _constant_width(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, vector_of(F32, fe_type))


@register_model(MaskType)
class _MaskModel(models.PrimitiveModel):
    """AVX-512 has registers for masks; elsewhere a mask is lanes of ones and zeros."""

    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, I16 if fe_type.lanes == SIXTEEN.lanes else vector_of(I32, fe_type))


# --- what the operations are made of --------------------------------------------------------------------------------

# Arithmetic without flags gets those of its function's `fastmath` from Numba, and with them sums another order: of
# (x' − mean) + z, exact for rows almost uniform, LLVM made x' + (z − mean), which is not: Moran's I was off by 2e-4 at
# a spread of 1e-5. nsz alone leaves the order alone.
AS_WRITTEN = ("nsz",)

F32, I8, I16, I32, I1 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(1)
ITEMS = {types.float32: F32, types.uint16: I16, types.int16: I16}


def vector_of(item: Any, kind: Any) -> Any:
    """The LLVM vector of `item`s with as many lanes as a Numba type has."""
    return ir.VectorType(item, kind.lanes)


def floats(kind: Any, value: float) -> Any:
    """A float32 in every lane, known when compiling."""
    return ir.Constant(vector_of(F32, kind), [value] * kind.lanes)


def whole(kind: Any, value: int) -> Any:
    """An int32 in every lane, known when compiling."""
    return ir.Constant(vector_of(I32, kind), [value] * kind.lanes)


def order(lanes: list[int]) -> Any:
    """Which lanes a shuffle takes; those of its second operand count on from the first's."""
    return ir.Constant(ir.VectorType(I32, len(lanes)), lanes)


def as_floats(builder: Any, kind: Any, value: Any) -> Any:
    """The same bits as float32."""
    return builder.bitcast(value, vector_of(F32, kind))


def bits(builder: Any, kind: Any, value: Any) -> Any:
    """The same bits as int32."""
    return builder.bitcast(value, vector_of(I32, kind))


def call(builder: Any, name: str, returns: Any, arguments: list[Any]) -> Any:
    signature = ir.FunctionType(returns, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def fused(builder: Any, kind: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once."""
    return call(builder, f"llvm.fma.v{kind.lanes}f32", vector_of(F32, kind), [a, b, c])


def floor(builder: Any, kind: Any, value: Any) -> Any:
    return call(builder, f"llvm.floor.v{kind.lanes}f32", vector_of(F32, kind), [value])


def avx512(builder: Any, name: str, value: Any, *middle: Any) -> Any:
    """An AVX-512 instruction of one register, all lanes, in the current rounding."""
    of_all, rounding = ir.Constant(I16, -1), ir.Constant(I32, 4)
    zero = ir.Constant(value.type, [0.0] * value.type.count)
    return call(builder, f"llvm.x86.avx512.mask.{name}.ps.512", value.type, [value, *middle, zero, of_all, rounding])


def masked(builder: Any, kind: Any, mask: Any, value: Any) -> Any:
    """The lanes of the mask; 0 in the others."""
    if kind.lanes == SIXTEEN.lanes:
        return builder.select(builder.bitcast(mask, vector_of(I1, kind)), value, floats(kind, 0.0))
    return as_floats(builder, kind, builder.and_(mask, bits(builder, kind, value)))


def items_of(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Pointer to the first item of an array."""
    return context.make_array(array_type)(context, builder, array).data


def address(context: Any, builder: Any, array_type: Any, array: Any, position: Any, vector: Any) -> Any:
    """Pointer to a vector at array[position]."""
    items = items_of(context, builder, array_type, array)
    return builder.bitcast(builder.gep(items, [position]), vector.as_pointer())


def widened(context: Any, builder: Any, kind: Any, array_type: Any, array: Any, position: Any) -> Any:
    """The items at array[position] as float32, as many as `kind` has lanes."""
    dtype = array_type.dtype
    place = address(context, builder, array_type, array, position, vector_of(ITEMS[dtype], kind))
    raw = builder.load(place, align=dtype.bitwidth // 8)
    if dtype == types.float32:
        return raw
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(raw, vector_of(ir.HalfType(), kind)), vector_of(F32, kind))
    high = builder.shl(builder.zext(raw, vector_of(I32, kind)), whole(kind, 16))
    return as_floats(builder, kind, high)


def splatted(builder: Any, kind: Any, scalar: Any) -> Any:
    """A float32 in every lane."""
    undefined = ir.Constant(vector_of(F32, kind), ir.Undefined)
    with_first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(with_first, undefined, order([0] * kind.lanes))
