"""Fused Triton kernels for CUDA: row metrics of attention, from stored maps or from query and key.

One program takes one map and a block of queries and walks over the keys a block at a time, so no map is ever written
to global memory, whatever its size. Every row is one program's: no atomic adds, and the same bits in every run.
Arithmetic is float32. Input is read in place through its strides: query and key may be views of the fused projection.

From query and key the row is a softmax over the patch logits alone; prefix keys enter the validity of a row and
`prefix_mass`. Logits are in binary logarithms, so that the exponential is one exp2.

Neighbours on the grid are the keys k + 1 and k + C: they are read again (cached) from stored maps, and multiplied out
again from query and key, as a Triton tile has no shift along an axis.
"""

# Device code is typed by Triton: its parameters take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from kernels.arrays import Values, dtype_name
from kernels.backends import BackendUnavailableError
from kernels.checks import ROW_SUM_TOLERANCE
from kernels.device_rows import PLANES, distances, needs_of, read_values, starts, tensor_of
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec

__all__ = ["measure_attention", "measure_qk"]

DTYPES = ("float16", "bfloat16", "float32")

# Queries and keys of a tile, and warps, by what ptxas says for sm_90 at 196 patches: from stored maps 247 registers and
# none spilled (32 × 128 spills 2 KB); from bfloat16 query and key 184 bytes spilled (1.2 KB with four warps).
ATTENTION_TILE, ATTENTION_WARPS = (16, 64), 4
QK_TILE, QK_WARPS = (32, 128), 8
# A tile of keys for a product takes at most 16 KB of shared memory; there are three of them, twice buffered.
KEY_TILE_BYTES = 16 * 2**10

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


def measure_attention(
    attention: Any, layout: TokenLayout, specs: Sequence[MetricSpec], regions: np.ndarray | None
) -> Values:
    """The pass over [*leading, query, key] attention: float16, bfloat16 or float32, any strides.

    Raises:
        BackendUnavailableError: float64, or a tensor that no Triton program can read here.
    """
    del regions  # no metric of this backend takes any
    tolerance = ROW_SUM_TOLERANCE[dtype_name(attention)]
    tensor = _readable(attention)
    # bfloat16 is read as its bits: the upper half of a float32.
    stored = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

    def launch(planes: Tensor, valid: Tensor, needs: int, grid: tuple[int, int]) -> None:
        _attention_kernel[grid](
            stored,
            starts(tensor),
            distances(layout, torch.float32, tensor.device),
            planes,
            valid,
            tensor.stride(-2),
            tensor.stride(-1),
            tolerance,
            **_geometry(layout),
            NEEDS=needs,
            BLOCK_Q=ATTENTION_TILE[0],
            BLOCK_K=ATTENTION_TILE[1],
            IS_BFLOAT16=tensor.dtype == torch.bfloat16,
            num_warps=ATTENTION_WARPS,
        )

    return _measure(launch, attention, tensor, ATTENTION_TILE[0], layout, specs)


def measure_qk(
    query: Any,
    key: Any,
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    regions: np.ndarray | None,
    scale: float,
    bias: Any,
) -> Values:
    """The pass from query and key [*leading, token, head_dim]; bias is broadcast (a view) to [*leading, query, key].

    Products are exact to float32: half-precision factors go through the matrix units with float32 sums, float32
    factors through ordinary arithmetic (TF32 would cost 1e-3 of a logit).

    Raises:
        BackendUnavailableError: as `measure_attention`.
    """
    del regions
    q, k = _readable(query), _readable(key)
    # Without a bias the pointer is never read; any tensor of the device will do.
    added = q if bias is None else _readable(bias, any_dtype=True)
    if added.dtype == torch.bool:
        added = added.view(torch.uint8)
    head_dim = q.shape[-1]
    block_d = max(16, triton.next_power_of_2(head_dim))

    def launch(planes: Tensor, valid: Tensor, needs: int, grid: tuple[int, int]) -> None:
        _qk_kernel[grid](
            q,
            k,
            added,
            starts(q),
            starts(k),
            starts(added),
            distances(layout, torch.float32, q.device),
            planes,
            valid,
            q.stride(-2),
            q.stride(-1),
            k.stride(-2),
            k.stride(-1),
            added.stride(-2),
            added.stride(-1),
            scale * _LOG2_E.value,
            **_geometry(layout),
            NEEDS=needs,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_Q=QK_TILE[0],
            BLOCK_K=min(max(KEY_TILE_BYTES // (block_d * q.element_size()), 16), QK_TILE[1]),
            HAS_BIAS=bias is not None,
            IS_MASK=bias is not None and dtype_name(bias) == "bool",
            # Triton's interpreter multiplies the bits of bfloat16 as integers; widened first, products are the same.
            WIDEN=_is_interpreted() and q.dtype == torch.bfloat16,
            num_stages=2,
            num_warps=QK_WARPS,
        )

    return _measure(launch, query, q, QK_TILE[0], layout, specs)


def _measure(
    launch: Callable[[Tensor, Tensor, int, tuple[int, int]], None],
    given: Any,
    tensor: Tensor,
    block_q: int,
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
) -> Values:
    maps, tokens = math.prod(tensor.shape[:-2]), layout.num_tokens
    planes = torch.empty((len(PLANES), maps, tokens), dtype=torch.float32, device=tensor.device)
    valid = torch.empty((maps, tokens), dtype=torch.bool, device=tensor.device)
    if maps:
        device = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
        with device:
            launch(planes, valid.view(torch.int8), needs_of(specs, "triton"), (maps, triton.cdiv(tokens, block_q)))
    as_numpy = not isinstance(given, Tensor)
    return read_values(planes, valid, tuple(tensor.shape[:-2]), layout, specs, "triton", as_numpy)


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
    """Whether Triton was imported with TRITON_INTERPRET=1: the kernels below are then run by Python."""
    return not isinstance(_attention_kernel, triton.JITFunction)


def _geometry(layout: TokenLayout) -> dict[str, int]:
    return {
        "PREFIX": layout.num_prefix_tokens,
        "PATCHES": layout.num_patches,
        "GRID_COLS": layout.grid_cols,
        "NUM_EDGES": layout.num_edges,
        # A dimension of a matrix product is at least 16.
        "BLOCK_P": max(16, triton.next_power_of_2(layout.num_prefix_tokens)),
    }


# --- device code ----------------------------------------------------------------------------------------------------
# Names: n tokens of a tile's queries [BLOCK_Q], k patches of a tile's keys [BLOCK_K]; x a tile of rows in any scale.


@triton.jit
def _widened(x, IS_BFLOAT16: tl.constexpr):
    """float32 of float16, float32, or the bits of bfloat16."""
    if IS_BFLOAT16:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _has_right(k, PATCHES: tl.constexpr, GRID_COLS: tl.constexpr):
    return (k < PATCHES) & (k % GRID_COLS < GRID_COLS - 1)


@triton.jit
def _mean_distance_sum(x, distances, n, k, PREFIX: tl.constexpr, PATCHES: tl.constexpr, GRID_COLS: tl.constexpr):
    """Σ_k x·d over a tile; 0 for prefix queries, which lie nowhere."""
    patch = n - PREFIX
    down = tl.abs(patch[:, None] // GRID_COLS - k[None, :] // GRID_COLS)
    across = tl.abs(patch[:, None] % GRID_COLS - k[None, :] % GRID_COLS)
    known = ((patch >= 0) & (patch < PATCHES))[:, None] & (k < PATCHES)[None, :]
    return tl.sum(x * tl.load(distances + down * GRID_COLS + across, mask=known, other=0.0), axis=1)


@triton.jit
def _edge_sums(x, right, below, mean, k, PATCHES: tl.constexpr, GRID_COLS: tl.constexpr):
    """Of z = x − mean over a tile: Σz, Σz²; over the edges that begin in it: Σ z_i z_j, Σ (z_i + z_j), Σ (z_i − z_j)².

    Centred before squaring: rows uniform to 5e-4 would be lost in the rounding of Σx² − N·mean².
    """
    has_right = _has_right(k, PATCHES, GRID_COLS)[None, :]
    has_below = (k + GRID_COLS < PATCHES)[None, :]
    z = tl.where((k < PATCHES)[None, :], x - mean[:, None], 0.0)
    left = tl.where(has_right, z, 0.0)
    right = tl.where(has_right, right - mean[:, None], 0.0)
    above = tl.where(has_below, z, 0.0)
    below = tl.where(has_below, below - mean[:, None], 0.0)
    across, down = left - right, above - below
    return (
        tl.sum(z, axis=1),
        tl.sum(z * z, axis=1),
        tl.sum(left * right + above * below, axis=1),
        tl.sum(left + right + above + below, axis=1),
        tl.sum(across * across + down * down, axis=1),
    )


@triton.jit
def _store_plane(planes, plane: tl.constexpr, n, values, TOKENS: tl.constexpr):
    at = (plane * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * TOKENS
    tl.store(planes + at + n, values, mask=n < TOKENS)


@triton.jit
def _store_edges(
    planes, n, defined, varies, s_z, s_sq, s_cross, s_ends, s_apart,
    TOKENS: tl.constexpr, PATCHES: tl.constexpr, NUM_EDGES: tl.constexpr, NEEDS: tl.constexpr,
):  # fmt: skip
    """Moran's I = N/E · Σ z_i z_j / Σ z² and Geary's C = (N − 1)/2E · Σ (z_i − z_j)² / Σ z².

    The mean was rounded at the size of x; what it left, Σz / N, is taken out of the sums here.
    """
    rest = s_z / PATCHES
    known = defined & varies
    squares = tl.where(known, s_sq - rest * s_z, 1.0)
    if NEEDS & 4:
        cross = s_cross - rest * s_ends + NUM_EDGES * rest * rest
        _store_plane(planes, 2, n, tl.where(known, PATCHES / NUM_EDGES * (cross / squares), float("nan")), TOKENS)
    if NEEDS & 8:
        factor = (PATCHES - 1) / (2 * NUM_EDGES)
        _store_plane(planes, 3, n, tl.where(known, factor * (s_apart / squares), float("nan")), TOKENS)


@triton.jit
def _attention_kernel(
    attention, starts, distances, planes, valid, stride_q, stride_k, tolerance,
    PREFIX: tl.constexpr, PATCHES: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, NEEDS: tl.constexpr,
    IS_BFLOAT16: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = PREFIX + PATCHES
    n = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = (n < TOKENS)[:, None]
    # 64 bits: a token of a strided view can lie beyond 2³¹ elements.
    row = attention + tl.load(starts + tl.program_id(0)) + n.to(tl.int64)[:, None] * stride_q
    patches = row + PREFIX * stride_k

    mass = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    least = tl.full((BLOCK_Q,), float("inf"), tl.float32)
    greatest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    negative = tl.zeros((BLOCK_Q,), tl.int32)
    if PREFIX > 0:
        p = tl.arange(0, BLOCK_P)
        head = tl.load(row + p[None, :] * stride_k, mask=inside & (p < PREFIX)[None, :], other=0.0)
        head = _widened(head, IS_BFLOAT16)
        mass = tl.sum(head, axis=1)
        negative = tl.max((head < 0).to(tl.int32), axis=1)
    for begin in range(0, PATCHES, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        there = inside & (k < PATCHES)[None, :]
        x = _widened(tl.load(patches + k[None, :] * stride_k, mask=there, other=0.0), IS_BFLOAT16)
        total += tl.sum(x, axis=1)
        least = tl.minimum(least, tl.min(tl.where(there, x, float("inf")), axis=1))
        greatest = tl.maximum(greatest, tl.max(tl.where(there, x, float("-inf")), axis=1))
    # A sum that is NaN or infinite fails the comparison.
    is_valid = (tl.abs(mass + total - 1.0) <= tolerance) & (negative == 0) & (least >= 0)
    tl.store(valid + tl.program_id(0).to(tl.int64) * TOKENS + n, is_valid.to(tl.int8), mask=n < TOKENS)
    _store_plane(planes, 4, n, tl.where(is_valid, mass, float("nan")), TOKENS)

    if NEEDS > 0:
        # A power of two, by its bits, takes the sum into [1, 2): squares of subnormal rows do not underflow.
        exponent = (total.to(tl.int32, bitcast=True) >> 23) & 0xFF
        factor = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        defined = is_valid & (total > 0)
        total *= factor
        divisor = tl.where(defined, total, 1.0)
        mean = total / PATCHES
        far = tl.zeros((BLOCK_Q,), tl.float32)
        logs = tl.zeros((BLOCK_Q,), tl.float32)
        s_z = tl.zeros((BLOCK_Q,), tl.float32)
        s_sq = tl.zeros((BLOCK_Q,), tl.float32)
        s_cross = tl.zeros((BLOCK_Q,), tl.float32)
        s_ends = tl.zeros((BLOCK_Q,), tl.float32)
        s_apart = tl.zeros((BLOCK_Q,), tl.float32)
        for begin in range(0, PATCHES, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            at = patches + k[None, :] * stride_k
            x = _widened(tl.load(at, mask=inside & (k < PATCHES)[None, :], other=0.0), IS_BFLOAT16) * factor[:, None]
            if NEEDS & 1:
                far += _mean_distance_sum(x, distances, n, k, PREFIX, PATCHES, GRID_COLS)
            if NEEDS & 2:
                logs += tl.sum(x * tl.log2(tl.where(x > 0, x, 1.0)), axis=1)
            if NEEDS & 12:
                has_right = inside & _has_right(k, PATCHES, GRID_COLS)[None, :]
                has_below = inside & (k + GRID_COLS < PATCHES)[None, :]
                right = _widened(tl.load(at + stride_k, mask=has_right, other=0.0), IS_BFLOAT16) * factor[:, None]
                below = (
                    _widened(tl.load(at + GRID_COLS * stride_k, mask=has_below, other=0.0), IS_BFLOAT16)
                    * factor[:, None]
                )
                z, sq, cross, ends, apart = _edge_sums(x, right, below, mean, k, PATCHES, GRID_COLS)
                s_z += z
                s_sq += sq
                s_cross += cross
                s_ends += ends
                s_apart += apart
        if NEEDS & 1:
            _store_plane(planes, 0, n, tl.where(defined, far / divisor, float("nan")), TOKENS)
        if NEEDS & 2:
            nat = _LN_2 * (tl.log2(divisor) - logs / divisor)
            _store_plane(planes, 1, n, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), TOKENS)
        if NEEDS & 12:
            varies = least != greatest
            _store_edges(
                planes, n, defined, varies, s_z, s_sq, s_cross, s_ends, s_apart, TOKENS, PATCHES, NUM_EDGES, NEEDS
            )


@triton.jit
def _logits(
    q, key, bias, tokens, there, inside, stride_kn, stride_kd, stride_bk, factor,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """log2(e)·(scale·q·kᵀ + bias) for the tokens given as keys, −inf where there are none. bias points at rows."""
    d = tl.arange(0, BLOCK_D)
    at = key + tokens.to(tl.int64)[None, :] * stride_kn + d[:, None] * stride_kd
    k = tl.load(at, mask=there[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
    if WIDEN:
        k = k.to(tl.float32)
    logits = tl.dot(q, k, input_precision="ieee") * factor
    if HAS_BIAS:
        added = tl.load(bias + tokens[None, :] * stride_bk, mask=inside & there[None, :], other=0)
        if IS_MASK:
            logits += tl.where(added != 0, 0.0, float("-inf"))  # added: a hidden NaN is still a NaN
        else:
            logits += added.to(tl.float32) * _LOG2_E
    return tl.where(there[None, :], logits, float("-inf"))


@triton.jit
def _broken(logits):
    """1 for rows that hold NaN or +inf; a maximum need not carry NaN on."""
    return tl.max(((logits != logits) | (logits == float("inf"))).to(tl.int32), axis=1)


@triton.jit
def _finite(top):
    """The greatest logit, 0 for rows of −inf, so that −inf − top is no NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _qk_kernel(
    query, key, bias, q_starts, k_starts, b_starts, distances, planes, valid,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_bq, stride_bk, factor,
    PREFIX: tl.constexpr, PATCHES: tl.constexpr, GRID_COLS: tl.constexpr, NUM_EDGES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, NEEDS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, IS_MASK: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = PREFIX + PATCHES
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    inside = (n < TOKENS)[:, None]
    at = query + tl.load(q_starts + m) + n.to(tl.int64)[:, None] * stride_qn + d[None, :] * stride_qd
    q = tl.load(at, mask=inside & (d < HEAD_DIM)[None, :], other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    key += tl.load(k_starts + m)
    if HAS_BIAS:
        bias_rows = bias + tl.load(b_starts + m) + n.to(tl.int64)[:, None] * stride_bq
    else:
        bias_rows = bias

    # The greatest logit and Σ 2^(logit − greatest), a block of keys at a time.
    broken = tl.zeros((BLOCK_Q,), tl.int32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for begin in range(0, PATCHES, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        s = _logits(
            q, key, bias_rows, PREFIX + k, k < PATCHES, inside, stride_kn, stride_kd, stride_bk, factor,
            HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
        )  # fmt: skip
        broken = tl.maximum(broken, _broken(s))
        higher = tl.maximum(top, tl.max(s, axis=1))
        shift = _finite(higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(s - shift[:, None]), axis=1)
        top = higher
    highest = top
    mass = tl.zeros((BLOCK_Q,), tl.float32)
    if PREFIX > 0:
        p = tl.arange(0, BLOCK_P)
        head = _logits(
            q, key, bias_rows, p, p < PREFIX, inside, stride_kn, stride_kd, stride_bk, factor,
            HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
        )  # fmt: skip
        broken = tl.maximum(broken, _broken(head))
        highest = tl.maximum(top, tl.max(head, axis=1))
        on_prefix = tl.sum(tl.exp2(head - _finite(highest)[:, None]), axis=1)
        on_all = on_prefix + total * tl.exp2(top - _finite(highest))
        mass = on_prefix / tl.where(on_all > 0, on_all, 1.0)
    is_valid = (broken == 0) & (highest > float("-inf"))
    tl.store(valid + m.to(tl.int64) * TOKENS + n, is_valid.to(tl.int8), mask=n < TOKENS)
    _store_plane(planes, 4, n, tl.where(is_valid, mass, float("nan")), TOKENS)

    if NEEDS > 0:
        defined = is_valid & (total > 0)
        divisor = tl.where(defined, total, 1.0)
        mean = total / PATCHES
        lowered = _finite(top)[:, None]
        least = tl.full((BLOCK_Q,), 1.0, tl.float32)
        far = tl.zeros((BLOCK_Q,), tl.float32)
        logs = tl.zeros((BLOCK_Q,), tl.float32)
        s_z = tl.zeros((BLOCK_Q,), tl.float32)
        s_sq = tl.zeros((BLOCK_Q,), tl.float32)
        s_cross = tl.zeros((BLOCK_Q,), tl.float32)
        s_ends = tl.zeros((BLOCK_Q,), tl.float32)
        s_apart = tl.zeros((BLOCK_Q,), tl.float32)
        for begin in range(0, PATCHES, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            t = _logits(
                q, key, bias_rows, PREFIX + k, k < PATCHES, inside, stride_kn, stride_kd, stride_bk, factor,
                HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
            ) - lowered  # fmt: skip
            x = tl.exp2(t)
            if NEEDS & 1:
                far += _mean_distance_sum(x, distances, n, k, PREFIX, PATCHES, GRID_COLS)
            if NEEDS & 2:
                logs += tl.sum(x * tl.maximum(t, -150.0), axis=1)  # 2^−150 is 0 already; 0 · −inf would be NaN
            if NEEDS & 12:
                right = tl.exp2(
                    _logits(
                        q, key, bias_rows, PREFIX + k + 1, _has_right(k, PATCHES, GRID_COLS), inside,
                        stride_kn, stride_kd, stride_bk, factor, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
                    ) - lowered
                )  # fmt: skip
                below = tl.exp2(
                    _logits(
                        q, key, bias_rows, PREFIX + k + GRID_COLS, k + GRID_COLS < PATCHES, inside,
                        stride_kn, stride_kd, stride_bk, factor, HEAD_DIM, BLOCK_D, HAS_BIAS, IS_MASK, WIDEN,
                    ) - lowered
                )  # fmt: skip
                least = tl.minimum(least, tl.min(tl.where((k < PATCHES)[None, :], x, 1.0), axis=1))
                z, sq, cross, ends, apart = _edge_sums(x, right, below, mean, k, PATCHES, GRID_COLS)
                s_z += z
                s_sq += sq
                s_cross += cross
                s_ends += ends
                s_apart += apart
        if NEEDS & 1:
            _store_plane(planes, 0, n, tl.where(defined, far / divisor, float("nan")), TOKENS)
        if NEEDS & 2:
            # ln Z − Σ x·t / Z: no logarithm a key
            nat = _LN_2 * (tl.log2(divisor) - logs / divisor)
            _store_plane(planes, 1, n, tl.where(defined, tl.maximum(nat, 0.0), float("nan")), TOKENS)
        if NEEDS & 12:
            varies = least < 1.0  # the greatest is 2^0
            _store_edges(
                planes, n, defined, varies, s_z, s_sq, s_cross, s_ends, s_apart, TOKENS, PATCHES, NUM_EDGES, NEEDS
            )
