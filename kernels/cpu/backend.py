"""The CPU backend: compiled loops, one pass over the maps, all metrics at once, parallel over maps.

Arithmetic is float32, float64 for float64 input. Two sets of loops agree within the tolerances: those of
`vector_maps` and `vector_qk` on CPUs with AVX-512 or AVX2 and on 64-bit Arm, those of `loops`
elsewhere and for float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from kernels.arrays import Values, dtype_name, host_view, mean_of_defined
from kernels.cpu.lane_types import Width, widest
from kernels.cpu.loops import passes
from kernels.cpu.math import BFLOAT16, FLOAT, FLOAT16
from kernels.cpu.rows import (
    CLASS_ROW,
    DISTANCE,
    ENTROPY,
    ENTROPY_SEED1,
    GEARY,
    GINI,
    MORAN,
    PATCH_MASS,
    RECEIVED,
)
from kernels.cpu.threads import over_parts
from kernels.cpu.vector_maps import attention_pass
from kernels.cpu.vector_qk import qk_pass
from kernels.layout import TokenLayout
from kernels.metrics import MetricError, MetricSpec
from kernels.reference import RECEIVED_SPREAD, SEED1_LEAST_SUM_SQ, extent_px


@dataclass(frozen=True, slots=True)
class PassResult:
    """Arrays of one pass, maps flattened.

    Attributes:
        rows: float [6, map, patch query]: distance, entropy (nat), Moran's I, Geary's C, Gini coefficient; NaN where
            undefined. Then entropy in the `seed1` convention, NaN where invalid. Of those asked for alone.
        prefix_mass: float [map, patch query].
        patch_mass: float64 [map, patch query], the patches' part of each row; NaN where invalid or not asked for.
        received: float64 [map, patch], sum of the renormalised rows over the defined patch queries.
        class_rows: float64 [map, patch], renormalised; NaN where undefined or without a class token.
        regions: float64 [map, region, patch] or None.
    """

    layout: TokenLayout
    rows: np.ndarray
    prefix_mass: np.ndarray
    patch_mass: np.ndarray
    received: np.ndarray
    class_rows: np.ndarray
    regions: np.ndarray | None


@dataclass(frozen=True, slots=True)
class PairResult:
    """Arrays of one pass over two conditions, maps flattened.

    Attributes:
        js_divergence: float [map, patch query], in nat; NaN where undefined in either.
    """

    js_divergence: np.ndarray


@dataclass(frozen=True, slots=True)
class FromPass:
    """A metric's implementation: what the pass must compute for it, and how it is read off the result."""

    needs: int
    read: Callable[[PassResult], np.ndarray]

    def __call__(self, result: PassResult) -> np.ndarray:
        return self.read(result)


def is_compiled() -> bool:
    """Whether a pass has run in this process; the first one compiles for some seconds, unless cached on disk."""
    any_cpu, width = passes(), vector_width()
    dispatchers = [any_cpu.attention, any_cpu.qk, any_cpu.pair]
    if width is not None:
        dispatchers += [attention_pass(width), qk_pass(width)]
    return any(dispatcher.signatures for dispatcher in dispatchers)


@lru_cache(maxsize=1)
def vector_width() -> Width | None:
    """The registers in which this process measures float16, bfloat16 and float32; None: with the loops for any CPU."""
    return widest()


def measure_attention(
    attention: Any,
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    regions: np.ndarray | None,
    tolerance: float,
) -> Values:
    """The pass over [*leading, query, key] attention; sums of its rows are 1 within the tolerance."""
    name = dtype_name(attention)
    leading = tuple(attention.shape[:-2])
    maps = _flat(_bits(host_view(attention)))
    kind, shape, tables = _KINDS.get(name, FLOAT), _shape(layout), _tables(layout, name == "float64")
    needs = _needs(specs, layout)
    out = _outputs(math.prod(leading), layout, tables[0].dtype, needs)
    width = None if name == "float64" else vector_width()
    if width is not None:
        wide = _wide_tables(layout, width.lanes)
        run = partial(attention_pass(width), _as_typed_bits(maps, kind), kind, shape, tables, wide)
    else:
        run = partial(passes().attention, maps, kind, shape, tables)
    over_parts(partial(run, tolerance, needs, out), math.prod(leading))
    return _read(out, leading, layout, specs, regions)


def measure_qk(
    query: Any,
    key: Any,
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    regions: np.ndarray | None,
    scale: float,
    bias: Any,
) -> Values:
    """The pass from query and key [*leading, token, head_dim]; bias is [*leading, query, key] (a view) or None.

    A softmax over the patch logits alone is the renormalised row, so a prefix token that takes nearly all the mass
    costs no accuracy, and no logarithm is needed: entropy = ln Z − Σ e·t / Z with t the logits less the greatest.
    """
    name = dtype_name(query)
    leading = tuple(query.shape[:-2])
    queries, keys = ((*_flat(_bits(host_view(factor))), query.shape[-1]) for factor in (query, key))
    tables = _tables(layout, name == "float64")
    compute = tables[0].dtype
    if bias is None:
        of_bias = (_read_only(np.zeros(0, compute)), np.zeros(0, np.int64), 0)
    else:
        of_bias = _flat(_additive(bias, compute))
    needs = _needs(specs, layout)
    out = _outputs(math.prod(leading), layout, compute, needs)
    kind = _KINDS.get(name, FLOAT)
    rest = (kind, scale, of_bias, _shape(layout), tables)
    width = None if name == "float64" else vector_width()
    if width is not None:
        typed = _as_typed_bits(queries, kind), _as_typed_bits(keys, kind)
        run = partial(qk_pass(width), *typed, *rest, _near_table(layout, width.lanes))
    else:
        run = partial(passes().qk, queries, keys, *rest)
    over_parts(partial(run, needs, out), math.prod(leading))
    return _read(out, leading, layout, specs, regions)


def measure_pair(
    attention: Any, other: Any, layout: TokenLayout, specs: Sequence[MetricSpec], tolerance: float
) -> Values:
    """The pass over the same maps [*leading, query, key] in two conditions; a row is valid if it is in both."""
    name = dtype_name(attention)
    leading = tuple(attention.shape[:-2])
    dtype = np.dtype(np.float64 if name == "float64" else np.float32)
    one, two = (_flat(_bits(host_view(array))) for array in (attention, other))
    count = math.prod(leading)
    js = np.full((count, layout.num_patches), np.nan, dtype)
    valid = np.ones((count, layout.num_tokens), np.bool_)
    kind = _KINDS.get(name, FLOAT)
    over_parts(partial(passes().pair, one, two, kind, layout.num_prefix_tokens, tolerance, js, valid), count)
    result = PairResult(js)
    values = {}
    for spec in specs:
        implementation = spec.implementation("numba")
        assert implementation is not None  # `specs` holds those this backend has code for
        values[spec.name] = implementation(result).reshape((*leading, layout.num_patches))
    return Values(values=values, valid=valid.reshape((*leading, layout.num_tokens)))


def mean_of_rows(values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean [*leading] of the patch queries that have a value, valid ones that have none) of [*leading, patch query]"""
    sums = np.empty(values.shape[:-1])
    passes().row_sums(values.reshape(-1, values.shape[-1]), sums.reshape(-1))
    if np.isnan(sums).any():
        return mean_of_defined(values, valid)
    return np.asarray(sums / values.shape[-1]), np.zeros(sums.shape, np.int64)  # as nearly always


_KINDS = {"float16": FLOAT16, "bfloat16": BFLOAT16}


def _shape(layout: TokenLayout) -> tuple[int, bool, int, int]:
    return layout.num_prefix_tokens, bool(layout.class_token), layout.grid_cols, layout.num_edges


def _needs(specs: Sequence[MetricSpec], layout: TokenLayout) -> int:
    needs = 0
    for spec in specs:
        implementation = spec.implementation("numba")
        if not isinstance(implementation, FromPass):
            raise MetricError(
                f"metric {spec.name!r}: its implementation for numba is a {type(implementation).__name__}; expected a "
                "kernels.cpu.backend.FromPass, or none: the reference is enough"
            )
        needs |= implementation.needs
    return needs


def _outputs(maps: int, layout: TokenLayout, dtype: np.dtype[Any], needs: int) -> tuple[np.ndarray, ...]:
    """Memory for what a pass fills in: the arrays of `PassResult`, and validity [map, query].

    Each map's part is cleared by the thread that measures it; what is not needed has no maps or is left as it is. At a
    few milliseconds an image a pass would notice more.
    """
    patches = layout.num_patches
    return (
        np.empty((6, maps, patches), dtype),
        np.empty((maps, patches), dtype),
        np.empty((maps if needs & PATCH_MASS else 0, patches)),
        np.empty((maps if needs & RECEIVED else 0, patches)),
        np.empty((maps if needs & CLASS_ROW else 0, patches)),
        np.empty((maps, layout.num_tokens), np.bool_),
    )


def _maps_morans_i(maps: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of float64 maps [map, patch]; NaN where constant or undefined."""
    out = np.empty(len(maps))
    passes().maps_morans_i(
        np.ascontiguousarray(maps), _tables(layout, True)[1], layout.grid_cols, layout.num_edges, out
    )
    return out


def _maps_entropy(maps: np.ndarray) -> np.ndarray:
    """Entropy in nat of float64 maps [map, patch]; NaN where undefined."""
    out = np.empty(len(maps))
    passes().maps_entropy(np.ascontiguousarray(maps), out)
    return out


def _read(
    arrays: tuple[np.ndarray, ...],
    leading: tuple[int, ...],
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    regions: np.ndarray | None,
) -> Values:
    rows, mass, patch_mass, received, class_rows, valid = arrays
    flat = None if regions is None else regions.reshape(-1, *regions.shape[-2:])
    result = PassResult(layout, rows, mass, patch_mass, received, class_rows, flat)
    values = {}
    for spec in specs:
        implementation = spec.implementation("numba")
        assert implementation is not None  # `specs` holds those this backend has code for
        tile = implementation(result)
        values[spec.name] = tile.reshape((*leading, *tile.shape[1:]))
    return Values(values=values, valid=valid.reshape((*leading, layout.num_tokens)))


@lru_cache(maxsize=16)
def _tables(layout: TokenLayout, double: bool) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, has_right).

    offsets[c] holds the distances from a query in column c to every patch of a grid 2R − 1 rows high; the R·C
    distances of the query at (r, c) are contiguous in it from (R − 1 − r)·C. At 14×14 that is 21 KB, against
    154 KB of the full matrix.
    has_right is 1 where a patch has a neighbour to its right, 0 in the last column.
    """
    rows, cols = layout.grid_rows, layout.grid_cols
    down = np.abs(np.arange(2 * rows - 1) - (rows - 1)) * layout.patch_height_px
    across = np.arange(cols)[:, None] - np.arange(cols)[None, :]
    offsets = np.hypot(down[None, :, None], across[:, None, :] * layout.patch_width_px) / layout.diagonal_px
    has_right = np.tile(np.arange(cols) < cols - 1, rows)
    dtype = np.float64 if double else np.float32
    return offsets.reshape(cols, -1).astype(dtype), has_right.astype(dtype)


@lru_cache(maxsize=16)
def _wide_tables(layout: TokenLayout, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """(distances, degrees), flat and registers longer than they need be, so that loads may reach beyond their ends.

    distances are `_tables`' offsets; degrees [patch] are the numbers of neighbours.
    """
    rows, cols = layout.grid_rows, layout.grid_cols
    offsets, _ = _tables(layout, False)
    distances, degrees = _aligned((offsets.size + 2 * lanes,)), _aligned((rows * cols + lanes,))
    distances[: offsets.size] = offsets.reshape(-1)
    row, col = np.indices((rows, cols))
    beside = [row > 0, row < rows - 1, col > 0, col < cols - 1]
    degrees[: rows * cols] = np.sum(beside, axis=0).reshape(-1)
    return distances, degrees


@lru_cache(maxsize=4)
def _near_table(layout: TokenLayout, lanes: int) -> np.ndarray:
    """Distances [group of queries, key, query of the group], flat; queries are the patches, then the prefix tokens.

    160 KB at 14×14, where sixteen queries read 12 KB of it; 7.5 MB at 37×37.
    """
    groups = -(-layout.num_tokens // lanes)
    table = _aligned((groups * lanes, layout.num_patches))
    table[: layout.num_patches] = layout.distances()
    near = _aligned((table.size,))
    near[:] = table.reshape(groups, lanes, layout.num_patches).swapaxes(1, 2).reshape(-1)
    return near


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """float32 zeros that begin on a cache line: a register's load then touches one."""
    size = math.prod(shape)
    memory = np.zeros(size + 16, np.float32)
    skip = -memory.ctypes.data % 64 // 4
    return memory[skip : skip + size].reshape(shape)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == np.float16 else array


def _as_typed_bits(memory: tuple[Any, ...], kind: int) -> tuple[Any, ...]:
    """Memory whose item type tells the kind of half float, as `lanes` takes it: int16 for bfloat16."""
    return (_read_only(memory[0].view(np.int16)), *memory[1:]) if kind == BFLOAT16 else memory


def _flat(array: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """[*leading, row, col] of any strides as (1-D memory, start of each map, row stride), in elements.

    No copy is made as long as a row is contiguous and strides are not negative.
    """
    item = array.itemsize
    strides = array.strides
    if (array.shape[-1] > 1 and strides[-1] != item) or any(s < 0 or s % item for s in strides):
        array = np.ascontiguousarray(array)
        strides = array.strides
    if array.size == 0:
        return _read_only(np.zeros(0, array.dtype)), np.zeros(math.prod(array.shape[:-2]), np.int64), 0
    if array.flags.c_contiguous:
        row, col = array.shape[-2:]
        return _read_only(array.reshape(-1)), np.arange(0, array.size, row * col), col
    steps = [s // item for s in strides]
    span = 1 + sum((n - 1) * step for n, step in zip(array.shape[:-1], steps[:-1], strict=True)) + array.shape[-1] - 1
    starts = np.zeros((), np.int64)
    for n, step in zip(array.shape[:-2], steps[:-2], strict=True):
        starts = np.add.outer(starts, np.arange(n, dtype=np.int64) * step)
    buffer = np.lib.stride_tricks.as_strided(array, (span,), (item,))
    return _read_only(buffer), starts.reshape(-1), steps[-2]


def _read_only(array: np.ndarray) -> np.ndarray:
    """Numba compiles apart for writable and read-only arrays: let there be one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


def _additive(bias: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """A broadcast bias or mask as additive numbers, converted before it is broadcast, rows contiguous."""
    if dtype_name(bias) == "bfloat16":
        bias = bias.float()
    view = host_view(bias)
    compact = view[tuple(slice(1) if step == 0 else slice(None) for step in view.strides)]
    if compact.dtype == np.bool_:
        compact = np.where(compact, dtype.type(0), dtype.type(-np.inf))
    compact = np.broadcast_to(compact.astype(dtype), (*compact.shape[:-1], view.shape[-1]))
    return np.broadcast_to(np.ascontiguousarray(compact), view.shape)


# --- metrics, as read off a pass ------------------------------------------------------------------------------------


def _region_mass(result: PassResult) -> np.ndarray:
    assert result.regions is not None  # the entry points refuse region metrics without regions
    maps = result.class_rows if result.layout.class_token else _mean_row(result.received)
    return np.asarray(np.einsum("mk,mrk->mr", maps, result.regions))


def _mean_row(received: np.ndarray) -> np.ndarray:
    total = received.sum(axis=-1, keepdims=True)
    return np.where(total > 0, received / np.where(total > 0, total, 1.0), np.nan)


def _class_rows(result: PassResult) -> np.ndarray:
    if not result.layout.class_token:
        raise ValueError("this layout has no class token, so there is no class-token row")
    return result.class_rows


def _received_morans_i(result: PassResult) -> np.ndarray:
    maps = result.received
    varies = maps.max(axis=-1) - maps.min(axis=-1) > RECEIVED_SPREAD * maps.mean(axis=-1)
    return np.where(varies, _maps_morans_i(maps, result.layout), np.nan)


def _distance_seed1(result: PassResult) -> np.ndarray:
    """A row without mass on the patches has no mean distance, but 0 of this one."""
    far = np.where(result.patch_mass == 0, 0, result.rows[0])
    return np.asarray(far * result.patch_mass)


def _morans_i_seed1(result: PassResult) -> np.ndarray:
    x = result.patch_mass / result.layout.num_patches
    sum_sq = ((x - x.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    of_mass = _maps_morans_i(x, result.layout)
    return np.where(sum_sq <= SEED1_LEAST_SUM_SQ, 0.0, of_mass)


distance = FromPass(DISTANCE, lambda result: result.rows[0])
distance_seed1 = FromPass(DISTANCE | PATCH_MASS, _distance_seed1)
distance_px = FromPass(DISTANCE | PATCH_MASS, lambda result: _distance_seed1(result) * result.layout.diagonal_px)
distance_walmer = FromPass(
    DISTANCE, lambda result: result.rows[0] * (result.layout.diagonal_px / extent_px(result.layout))
)
entropy = FromPass(ENTROPY, lambda result: result.rows[1])
entropy_normalized = FromPass(ENTROPY, lambda result: result.rows[1] / math.log(result.layout.num_patches))
morans_i = FromPass(MORAN, lambda result: result.rows[2])
gearys_c = FromPass(GEARY, lambda result: result.rows[3])
gini = FromPass(GINI, lambda result: result.rows[4])
entropy_seed1 = FromPass(ENTROPY_SEED1, lambda result: result.rows[5])
morans_i_seed1 = FromPass(PATCH_MASS, _morans_i_seed1)
prefix_mass = FromPass(0, lambda result: result.prefix_mass)
morans_i_received = FromPass(RECEIVED, _received_morans_i)
sink_share = FromPass(RECEIVED, lambda result: _mean_row(result.received).max(axis=-1))
cls_entropy = FromPass(CLASS_ROW, lambda result: _maps_entropy(_class_rows(result)))
cls_morans_i = FromPass(
    CLASS_ROW,
    lambda result: _maps_morans_i(_class_rows(result), result.layout),
)
region_mass = FromPass(RECEIVED | CLASS_ROW, _region_mass)


def js_divergence(result: PairResult) -> np.ndarray:
    return result.js_divergence
