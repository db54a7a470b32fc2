"""Fused Triton kernels for CUDA: row metrics of attention, from stored maps or from query and key.

A program takes a block of queries and walks over the keys a row of the grid at a time, so no map is ever written to
global memory, whatever its size. Every row is one program's, and means over rows come from a second kernel: no atomic
adds, and the same bits in every run. Arithmetic is float32. Input is read in place through its strides: query and key
may be views of the fused projection. Device code: `triton_maps`, `triton_qk`.

From query and key the row is a softmax over the patch logits alone; prefix keys enter the validity of a row and
`prefix_mass`. Logits are in binary logarithms, so that the exponential is one exp2.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from kernels.arrays import Values, dtype_name
from kernels.backends import Backend, Means
from kernels.cuda import triton_maps, triton_qk, triton_rows
from kernels.cuda.launches import launch
from kernels.cuda.rows import IMPLEMENTATIONS, PLANES, RowValues, starts, tensor_of
from kernels.errors import BackendUnavailableError
from kernels.inputs import Factors, MapPair, Maps
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec

DTYPES = ("float16", "bfloat16", "float32")

# Stored maps: maps of a thread, warps of a program, and the most columns of a thread: 128 registers at 224 px.
MAPS, MAPS_WARPS, MAPS_WIDTH = 2, 4, 8
# Planes whose means one launch takes.
AT_ONCE = 4


class TritonBackend(Backend):
    """Reads float16, bfloat16 or float32, any strides."""

    name = "triton"
    implementations = IMPLEMENTATIONS
    dtypes = DTYPES

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        rows = self._rows_of_maps(maps, specs)
        return self.values(rows, rows.valid, maps, specs)

    def measure_qk(self, factors: Factors, specs: Sequence[MetricSpec]) -> Values:
        rows = self._rows_of_factors(factors, specs)
        return self.values(rows, rows.valid, factors, specs)

    def measure_means(self, given: Maps | Factors, specs: Sequence[MetricSpec]) -> tuple[Means, Tensor] | None:
        """Two launches and little else, where metrics are planes of the pass."""
        planes = [_PLANE_OF.get(spec.name) if spec.is_builtin else None for spec in specs]
        leading, layout = given.leading, given.layout
        if isinstance(given, MapPair) or None in planes or len(planes) > AT_ONCE or not math.prod(leading):
            return None
        if not isinstance(given.like, Tensor):  # NumPy comes only to the interpreter
            return None
        if isinstance(given, Factors):
            rows = self._rows_of_factors(given, specs)
        else:
            rows = self._rows_of_maps(given, specs)
        patches = [rows.patches[plane] for plane in planes if plane is not None]
        together = _means_of_rows(patches, rows.valid, leading, layout.num_prefix_tokens)
        means, (*undefined, invalid, invalid_patches) = together[0].unbind(), together[1].unbind()
        reduced = {spec.name: (mean, count) for spec, mean, count in zip(specs, means, undefined, strict=True)}
        return Means(reduced, invalid, invalid_patches, together), rows.valid.view(*leading, layout.num_tokens)

    def _rows_of_maps(self, maps: Maps, specs: Sequence[MetricSpec]) -> RowValues:
        layout, tensor = maps.layout, _readable(maps.attention)
        values = RowValues.empty(maps, torch.float32, tensor.device)
        count, tokens = values.valid.shape
        # bfloat16 is read as its bits: the upper half of a float32.
        stored = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        given = (
            *(stored, starts(tensor), values.planes, values.valid.view(torch.int8)),
            *(torch.empty_like(values.valid, dtype=torch.int8), count),
            *(*tensor.stride()[-2:], maps.tolerance, *_steps(layout)),
        )
        constants = _geometry(layout) | {
            "NEEDS": self.needs(specs, PLANES),
            "IS_BFLOAT16": tensor.dtype == torch.bfloat16,
        }
        tile = _maps_tile(layout.grid_rows, layout.grid_cols)
        is_short = tensor.element_size() == 2
        if count:
            with _current_device(tensor):
                triton_maps.attention_rows[triton.cdiv(count, MAPS * MAPS_WARPS), triton.cdiv(tokens, tile["BLOCK_Q"])](
                    *given,
                    **constants,
                    **tile,
                    WORDS=is_short and tensor.stride(-1) == 1,
                    IS_SHORT=is_short,
                    FAST=not _is_interpreted(),
                    num_warps=MAPS_WARPS,
                )
                triton_maps.exact_rows[(count,)](
                    *given,
                    **constants,
                    BLOCK_P=triton.next_power_of_2(layout.num_prefix_tokens),
                    BLOCK_K=triton.next_power_of_2(layout.num_patches),
                    BLOCK_T=triton.next_power_of_2(tokens),
                    num_warps=4,
                )
        return values

    def _rows_of_factors(self, factors: Factors, specs: Sequence[MetricSpec]) -> RowValues:
        """Products are exact to float32: half-precision factors go through the matrix units with float32 sums, float32
        factors as three products of their TF32 parts (one alone would cost 1e-3 of a logit).
        """
        layout, bias = factors.layout, factors.bias
        q, k = _readable(factors.query), _readable(factors.key)
        # Without a bias the pointer is never read; any tensor of the device will do.
        added = q if bias is None else _readable(bias, any_dtype=True)
        if added.dtype == torch.bool:
            added = added.view(torch.uint8)
        head_dim = q.shape[-1]
        values = RowValues.empty(factors, torch.float32, q.device)
        count, tokens = values.valid.shape
        if count:
            with _current_device(q):
                arguments = (
                    *(q, k, added, starts(q), starts(k), starts(added)),
                    *(values.planes, values.valid.view(torch.int8), count),
                    *(*q.stride()[-2:], *k.stride()[-2:], *added.stride()[-2:]),
                    *(abs(factors.scale) * triton_rows.LOG2_E.value, *_steps(layout)),
                )
                mask = "" if bias is None else dtype_name(bias)
                aligned = _is_aligned(q) and _is_aligned(k)
                needs = self.needs(specs, PLANES)
                facts = head_dim, mask, needs, factors.scale < 0, aligned, _is_interpreted()
                constants = _qk_constants(layout, q.dtype, *facts)
                programs = -(count * tokens // -64) if constants["FLAT"] else -(tokens // -64) * count
                launch(triton_qk.qk_rows, (programs,), arguments, constants)
        return values

    def means_of_rows(self, values: Mapping[str, Tensor], valid: Tensor, prefix: int) -> Means:
        """One launch for all planes of a pass and what of it is invalid, where torch takes eight for each."""
        valid = tensor_of(valid)
        if not values or not valid.numel():
            return super().means_of_rows(values, valid, prefix)
        alike: dict[Any, dict[str, Tensor]] = {}
        for name, of_rows in values.items():
            rows = tensor_of(of_rows).reshape(-1, of_rows.shape[-1])
            alike.setdefault((rows.dtype, rows.stride()), {})[name] = rows
        reduced: dict[str, tuple[Tensor, Tensor]] = {}
        for group in alike.values():
            for start in range(0, len(group), AT_ONCE):
                names = list(group)[start : start + AT_ONCE]
                flat = valid.reshape(-1, valid.shape[-1])
                means, counts = _means_of_rows([group[name] for name in names], flat, valid.shape[:-1], prefix)
                *undefined, invalid, invalid_patches = counts.unbind()
                reduced |= dict(zip(names, zip(means.unbind(), undefined, strict=True), strict=True))
        return Means({name: reduced[name] for name in values}, invalid, invalid_patches)


# Metrics that are planes of a pass -> which.
_PLANE_OF = {name: plane for plane, name in enumerate(PLANES)}

BACKEND = TritonBackend()


def _means_of_rows(planes: list[Tensor], valid: Tensor, leading: Sequence[int], prefix: int) -> tuple[Tensor, Tensor]:
    """(means [plane, *leading], counts [plane + 2, *leading]) of at most `AT_ONCE` planes of the same strides.

    Args:
        planes: [map, patch query].
        valid: [map, query], prefix queries included.

    Counts: of each plane its rows without a value; then rows that are no attention, and patch queries among them.
    """
    means = torch.empty(len(planes), *leading, dtype=torch.float64, device=valid.device)
    counts = torch.empty(len(planes) + 2, *leading, dtype=torch.int64, device=valid.device)
    maps, tokens = valid.shape
    with _current_device(valid):
        arguments = (
            *(*planes, *planes[:1] * (AT_ONCE - len(planes)), valid.view(torch.int8), means, counts),
            *(maps, len(planes), *planes[0].stride(), valid.stride(0)),
        )
        constants = _means_constants(prefix, tokens - prefix)
        launch(triton_rows.means_of_rows, (maps, len(planes)), arguments, constants)
    return means, counts


@lru_cache(maxsize=64)
def _means_constants(prefix: int, queries: int) -> dict[str, int]:
    block = triton.next_power_of_2(queries)
    of_prefix = {"PREFIX": prefix, "BLOCK_P": triton.next_power_of_2(prefix)}
    return of_prefix | {"QUERIES": queries, "BLOCK": block, "num_warps": 1 if block <= 256 else 4}


@lru_cache(maxsize=64)
def _qk_constants(
    layout: TokenLayout,
    dtype: torch.dtype,
    head_dim: int,
    bias: str,
    needs: int,
    negate: bool,
    aligned: bool,
    interpreted: bool,
) -> dict[str, Any]:
    """`bias` is its dtype's name, "" without one."""
    return {
        **_geometry(layout),
        "NEEDS": needs,
        # A dimension of a matrix product is at least 16.
        "BLOCK_P": max(16, triton.next_power_of_2(layout.num_prefix_tokens)),
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "HAS_BIAS": bias != "",
        "IS_MASK": bias == "bool",
        "NEGATE": negate,
        # Triton's interpreter multiplies the bits of bfloat16 as integers; widened, products are the same.
        "WIDEN": interpreted and dtype == torch.bfloat16,
        "FAST": not interpreted,
        "ALIGNED": 16 if aligned else 1,
        **_qk_tile(layout, dtype.itemsize, bias != ""),
    }


def _current_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For a kernel's launch; nothing to do where the tensor's device is the current one already."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _readable(array: Any, any_dtype: bool = False) -> Tensor:
    """The tensor a kernel reads; NumPy comes only to the interpreter."""
    tensor = tensor_of(array)
    if not tensor.is_cuda and not _is_interpreted():
        raise BackendUnavailableError(
            f"backend 'triton' reads CUDA tensors, but the data is on {tensor.device}; move it to a CUDA device, "
            "choose another backend, or set TRITON_INTERPRET=1 before Triton is imported (slow, for tests)"
        )
    if not any_dtype and dtype_name(tensor) not in DTYPES:
        raise BackendUnavailableError(
            f"backend 'triton' reads {', '.join(DTYPES)}, but the data is {dtype_name(tensor)}; "
            "convert it or choose the torch backend"
        )
    return tensor


def _is_interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: the kernels are then run by Python."""
    return not isinstance(triton_qk.qk_rows, triton.JITFunction)


def _qk_tile(layout: TokenLayout, itemsize: int, has_bias: bool) -> dict[str, int]:
    """What a program takes, and its options.

    64 queries fill the product of a group of four warps, which holds eight pairs of columns. With 128 registers four
    programs of a group run at once; those of two maps spill some, and those of float32, whose factors are split.
    """
    pairs = max(8, triton.next_power_of_2((layout.grid_cols + 1) // 2))
    groups = min(pairs // 8, 4 if itemsize == 2 else 2)
    plain = groups == 1 and itemsize == 2 and not has_bias
    tile = {
        "BLOCK_Q": 64,
        "PAIRS": pairs,
        "GROUPS": groups,
        "AT_ONCE": 2 if plain and layout.grid_rows % 2 == 0 else 1,
        # Products of a map that has less queries would be of more than two maps.
        "FLAT": plain and layout.num_tokens >= 64 and layout.num_tokens % 64 > 0 and layout.num_prefix_tokens <= pairs,
        "num_warps": 4 * groups,
        "num_stages": 3 if itemsize == 2 else 2 if groups == 1 else 1,  # tiles of keys in shared memory
    }
    return tile | {"maxnreg": 128} if plain else tile


def _maps_tile(grid_rows: int, grid_cols: int) -> dict[str, int]:
    """How a warp divides a map between its threads: LANES to a query, each with the same number of columns."""
    lanes = min(32, triton.next_power_of_2(triton.cdiv(grid_cols, MAPS_WIDTH)))
    return {
        "MAPS": MAPS,
        "THREADS": 32 * MAPS_WARPS,
        "LANES": lanes,
        "BLOCK_Q": 32 // lanes,
        "UNROLL": min(2, grid_rows),
    }


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every map, and every token within it, begins at a multiple of 16 elements."""
    return all(stride % 16 == 0 for stride in tensor.stride()[:-1])


def _steps(layout: TokenLayout) -> tuple[float, float]:
    """Distance between neighbouring rows and between neighbouring columns of patches, in image diagonals."""
    return layout.patch_height_px / layout.diagonal_px, layout.patch_width_px / layout.diagonal_px


def _geometry(layout: TokenLayout) -> dict[str, int]:
    return {
        "PREFIX": layout.num_prefix_tokens,
        "GRID_ROWS": layout.grid_rows,
        "GRID_COLS": layout.grid_cols,
        "NUM_EDGES": layout.num_edges,
    }
