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
from operator import attrgetter
from typing import Any

import numpy as np

from kernels.arrays import Values, dtype_name, host_view, map_starts
from kernels.backends import Backend, Reading
from kernels.cpu import loops
from kernels.cpu.lane_types import Width, widest
from kernels.cpu.math import BFLOAT16, FLOAT, FLOAT16
from kernels.cpu.rows import Planes
from kernels.cpu.threads import num_threads, over_parts
from kernels.cpu.vector_maps import attention_pass
from kernels.cpu.vector_qk import qk_pass
from kernels.inputs import Factors, MapPair, Maps
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec
from kernels.reference import RECEIVED_SPREAD, SEED1_LEAST_SUM_SQ, extent_px


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a metric is read off: what the pass filled in, and float64 regions [map, region, patch] or None."""

    planes: Planes
    layout: TokenLayout
    regions: np.ndarray | None


# --- metrics, as read off a pass ------------------------------------------------------------------------------------


def _region_mass(result: PassResult) -> np.ndarray:
    assert result.regions is not None  # the entry points refuse region metrics without regions
    planes = result.planes
    maps = planes.class_row if result.layout.class_token else _mean_row(planes.received)
    return np.asarray(np.einsum("mk,mrk->mr", maps, result.regions))


def _mean_row(received: np.ndarray) -> np.ndarray:
    total = received.sum(axis=-1, keepdims=True)
    return np.where(total > 0, received / np.where(total > 0, total, 1.0), np.nan)


def _class_rows(result: PassResult) -> np.ndarray:
    result.layout.require_class_token()
    return np.asarray(result.planes.class_row)


def _received_morans_i(result: PassResult) -> np.ndarray:
    maps = result.planes.received
    varies = maps.max(axis=-1) - maps.min(axis=-1) > RECEIVED_SPREAD * maps.mean(axis=-1)
    return np.where(varies, _maps_morans_i(maps, result.layout), np.nan)


def _distance_seed1(result: PassResult) -> np.ndarray:
    """A row without mass on the patches has no mean distance, but 0 of this one."""
    mass = result.planes.patch_mass
    return np.asarray(np.where(mass == 0, 0, result.planes.distance) * mass)


def _distance_walmer(result: PassResult) -> np.ndarray:
    return np.asarray(result.planes.distance * (result.layout.diagonal_px / extent_px(result.layout)))


def _morans_i_seed1(result: PassResult) -> np.ndarray:
    x = result.planes.patch_mass / result.layout.num_patches
    sum_sq = ((x - x.mean(axis=-1, keepdims=True)) ** 2).sum(axis=-1)
    of_mass = _maps_morans_i(x, result.layout)
    return np.where(sum_sq <= SEED1_LEAST_SUM_SQ, 0.0, of_mass)


# Name of a metric -> its reading of a pass; of a pair metric, of [map, patch query], NaN where undefined.
IMPLEMENTATIONS: dict[str, Callable[[Any], np.ndarray]] = {
    **{name: Reading((name,), attrgetter(f"planes.{name}")) for name in Planes._fields[:6]},
    "prefix_mass": Reading((), lambda result: result.planes.prefix_mass),
    "distance_seed1": Reading(("distance", "patch_mass"), _distance_seed1),
    "distance_px": Reading(
        ("distance", "patch_mass"), lambda result: _distance_seed1(result) * result.layout.diagonal_px
    ),
    "distance_walmer": Reading(("distance",), _distance_walmer),
    "entropy_normalized": Reading(
        ("entropy",), lambda result: result.planes.entropy / math.log(result.layout.num_patches)
    ),
    "morans_i_seed1": Reading(("patch_mass",), _morans_i_seed1),
    "morans_i_received": Reading(("received",), _received_morans_i),
    "sink_share": Reading(("received",), lambda result: _mean_row(result.planes.received).max(axis=-1)),
    "cls_entropy": Reading(("class_row",), lambda result: _maps_entropy(_class_rows(result))),
    "cls_morans_i": Reading(("class_row",), lambda result: _maps_morans_i(_class_rows(result), result.layout)),
    "region_mass": Reading(("received", "class_row"), _region_mass),
    "js_divergence": lambda js: js,
}


# --- the pass -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def vector_width() -> Width | None:
    """The registers in which this process measures float16, bfloat16 and float32; None: with the loops for any CPU."""
    return widest()


class NumbaBackend(Backend):
    """Compiled loops, parallel over maps."""

    name = "numba"
    implementations = IMPLEMENTATIONS
    side_by_side = True

    @property
    def lanes(self) -> int:
        width = vector_width()
        return 0 if width is None else width.lanes

    def check(self) -> None:
        num_threads()

    def notice(self) -> str:
        width = vector_width()
        dispatchers = [loops.attention, loops.qk, loops.pair]
        if width is not None:
            dispatchers += [attention_pass(width), qk_pass(width)]
        if any(dispatcher.signatures for dispatcher in dispatchers):
            return ""
        return "loading the compiled kernels; the first time on a machine they are compiled, in about 15 s"

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        layout, name, count = maps.layout, dtype_name(maps.attention), math.prod(maps.leading)
        memory = _flat(maps.attention)
        kind, shape, tables = _KINDS.get(name, FLOAT), _shape(layout), _tables(layout, name == "float64")
        needs = self.needs(specs, Planes._fields)
        planes = _planes(count, layout, tables[0].dtype, needs)
        width = None if name == "float64" else vector_width()
        if width is None:
            run = partial(loops.attention, memory, kind, shape, tables)
        else:
            wide = _wide_tables(layout, width.lanes)
            run = partial(attention_pass(width), _as_typed_bits(memory, kind), kind, shape, tables, wide)
        over_parts(partial(run, maps.tolerance, needs, tuple(planes)), count)
        return self._read(planes, maps, specs)

    def measure_qk(self, factors: Factors, specs: Sequence[MetricSpec]) -> Values:
        """A softmax over the patch logits alone is the renormalised row, so a prefix token that takes nearly all the
        mass costs no accuracy, and no logarithm is needed: entropy = ln Z − Σ e·t / Z with t the logits less the
        greatest.
        """
        layout, name, count = factors.layout, dtype_name(factors.query), math.prod(factors.leading)
        queries, keys = ((*_flat(factor), factor.shape[-1]) for factor in (factors.query, factors.key))
        kind, shape, tables = _KINDS.get(name, FLOAT), _shape(layout), _tables(layout, name == "float64")
        compute = tables[0].dtype
        if factors.bias is None:
            bias = (_read_only(np.zeros(0, compute)), np.zeros(0, np.int64), 0)
        else:
            bias = _flat(_additive(factors.bias, compute))
        needs = self.needs(specs, Planes._fields)
        planes = _planes(count, layout, compute, needs)
        rest = (kind, factors.scale, bias, shape, tables)
        width = None if name == "float64" else vector_width()
        if width is None:
            run = partial(loops.qk, queries, keys, *rest)
        else:
            typed = _as_typed_bits(queries, kind), _as_typed_bits(keys, kind)
            run = partial(qk_pass(width), *typed, *rest, _near_table(layout, width.lanes))
        over_parts(partial(run, needs, tuple(planes)), count)
        return self._read(planes, factors, specs)

    def measure_pair(self, pair: MapPair, specs: Sequence[MetricSpec]) -> Values:
        layout, name, count = pair.layout, dtype_name(pair.attention), math.prod(pair.leading)
        one, two = _flat(pair.attention), _flat(pair.other)
        js = np.full((count, layout.num_patches), np.nan, np.float64 if name == "float64" else np.float32)
        valid = np.ones((count, layout.num_tokens), np.bool_)
        kind = _KINDS.get(name, FLOAT)
        over_parts(partial(loops.pair, one, two, kind, layout.num_prefix_tokens, pair.tolerance, js, valid), count)
        return self.values(js, valid, pair, specs)

    def mean_of_rows(self, values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sums = np.empty(values.shape[:-1])
        loops.row_sums(values.reshape(-1, values.shape[-1]), sums.reshape(-1))
        if np.isnan(sums).any():
            return super().mean_of_rows(values, valid)
        return np.asarray(sums / values.shape[-1]), np.zeros(sums.shape, np.int64)  # as nearly always

    def _read(self, planes: Planes, given: Maps | Factors, specs: Sequence[MetricSpec]) -> Values:
        regions = None if given.regions is None else given.regions.reshape(-1, *given.regions.shape[-2:])
        return self.values(PassResult(planes, given.layout, regions), planes.valid, given, specs)


_KINDS = {"float16": FLOAT16, "bfloat16": BFLOAT16}


def _shape(layout: TokenLayout) -> tuple[int, bool, int, int]:
    return layout.num_prefix_tokens, bool(layout.class_token), layout.grid_cols, layout.num_edges


def _planes(maps: int, layout: TokenLayout, dtype: np.dtype[Any], needs: int) -> Planes:
    """Memory for what a pass fills in; each map's part is cleared by the thread that measures it."""
    arrays = []
    for i, name in enumerate(Planes._fields[:-2]):
        kind = np.float64 if name in ("patch_mass", "received", "class_row") else dtype
        arrays.append(np.empty((maps if needs >> i & 1 else 0, layout.num_patches), kind))
    prefix_mass = np.empty((maps, layout.num_patches), dtype)
    return Planes._make([*arrays, prefix_mass, np.empty((maps, layout.num_tokens), np.bool_)])


def _maps_morans_i(maps: np.ndarray, layout: TokenLayout) -> np.ndarray:
    """Moran's I of float64 maps [map, patch]; NaN where constant or undefined."""
    out = np.empty(len(maps))
    loops.maps_morans_i(np.ascontiguousarray(maps), _tables(layout, True)[1], layout.grid_cols, layout.num_edges, out)
    return out


def _maps_entropy(maps: np.ndarray) -> np.ndarray:
    """Entropy in nat of float64 maps [map, patch]; NaN where undefined."""
    out = np.empty(len(maps))
    loops.maps_entropy(np.ascontiguousarray(maps), out)
    return out


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


def _as_typed_bits(memory: tuple[Any, ...], kind: int) -> tuple[Any, ...]:
    """Memory whose item type tells the kind of half float, as `lanes` takes it: int16 for bfloat16."""
    return (_read_only(memory[0].view(np.int16)), *memory[1:]) if kind == BFLOAT16 else memory


def _flat(given: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """[*leading, row, col] of any strides as (1-D memory, start of each map, row stride), in elements.

    Half floats come as their bits. No copy is made as long as a row is contiguous and strides are not negative.
    """
    array = host_view(given)
    array = array.view(np.uint16) if array.dtype == np.float16 else array
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
    span = array.shape[-1] + sum((n - 1) * step for n, step in zip(array.shape[:-1], steps[:-1], strict=True))
    buffer = np.lib.stride_tricks.as_strided(array, (span,), (item,))
    return _read_only(buffer), map_starts(array.shape[:-2], steps[:-2]), steps[-2]


def _read_only(array: np.ndarray) -> np.ndarray:
    """Numba compiles apart for writable and read-only arrays: let there be one kind."""
    view = array.view()
    view.flags.writeable = False
    return view


def _additive(bias: Any, dtype: np.dtype[Any]) -> np.ndarray:
    """A broadcast bias or mask as additive numbers, converted before it is broadcast, rows contiguous."""
    compact = bias[tuple(slice(1) if step == 0 else slice(None) for step in host_view(bias).strides)]
    values = host_view(compact.float() if dtype_name(bias) == "bfloat16" else compact)
    if values.dtype == np.bool_:
        values = np.where(values, dtype.type(0), dtype.type(-np.inf))
    values = np.broadcast_to(values.astype(dtype), (*values.shape[:-1], bias.shape[-1]))
    return np.broadcast_to(np.ascontiguousarray(values), bias.shape)


BACKEND = NumbaBackend()
