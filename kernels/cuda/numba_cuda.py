"""numba.cuda: row metrics of stored attention maps, one block of threads a row.

A row is read once, in place, into shared memory; every sum is a tree over the block's threads in a fixed order, so the
same input gives the same bits. Arithmetic is float32, float64 for float64 input. Half-precision values are read as
their bits through a table of all 65,536: exact, and without a half type in the compiler.

The simpler of the two CUDA backends: `triton` is the one made for speed, and computes from query and key too.
"""

# Names inside kernels (threadIdx, syncthreads) exist for numba's compiler and simulator alone.
# mypy: disable-error-code="attr-defined,no-untyped-def"

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import config, cuda, float32, float64
from torch import Tensor

from kernels.arrays import Values, dtype_name
from kernels.backends import Backend
from kernels.cuda import rows
from kernels.cuda.rows import IMPLEMENTATIONS, PLANES, RowValues, distances, starts, tensor_of
from kernels.errors import BackendUnavailableError
from kernels.inputs import Maps
from kernels.metrics import MetricSpec

if not hasattr(np, "row_stack") and not config.ENABLE_CUDASIM:
    # NumPy 2.5 has it no more, and numba-cuda 0.30.4 looks it up in a module that it imports when it first compiles.
    setattr(np, "row_stack", np.vstack)  # noqa: B010
    with contextlib.suppress(ModuleNotFoundError):  # numba's own CUDA target has no such module
        importlib.import_module("numba.cuda.np.arrayobj")
    delattr(np, "row_stack")

# Threads of a block, a power of two. The simulator starts a Python thread for each.
THREADS = 2 if config.ENABLE_CUDASIM else 128

_LN_2 = math.log(2.0)


class NumbaCudaBackend(Backend):
    """Reads every dtype, any strides."""

    name = "numba_cuda"
    implementations = IMPLEMENTATIONS

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        layout, tensor = maps.layout, tensor_of(maps.attention)
        _check_device(tensor)
        real = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        values = RowValues.empty(maps, real, tensor.device)
        if blocks := values.valid.numel():
            half = dtype_name(tensor) if tensor.element_size() == 2 else ""
            kernel = _row_kernel(real == torch.float64, bool(half))
            with _current_device(tensor):
                kernel[blocks, THREADS, _stream(tensor), layout.num_patches * real.itemsize](
                    *(_device_array(_memory(tensor)), _device_array(starts(tensor)), *tensor.stride()[-2:]),
                    _device_array(_widening(half, tensor.device)),
                    _device_array(distances(layout, real, tensor.device)),
                    *(maps.tolerance, layout.num_prefix_tokens, layout.num_patches, layout.grid_cols, layout.num_edges),
                    self.needs(specs, PLANES),
                    _device_array(values.planes.view(len(PLANES), -1)),
                    _device_array(values.valid.view(-1).view(torch.int8)),
                )
        return self.values(values, values.valid, maps, specs)


BACKEND = NumbaCudaBackend()


def _check_device(tensor: Tensor) -> None:
    if config.ENABLE_CUDASIM:
        return
    if not tensor.is_cuda:
        raise BackendUnavailableError(
            f"backend 'numba_cuda' reads CUDA tensors, but the data is on {tensor.device}; move it to a CUDA device, "
            "choose another backend, or set NUMBA_ENABLE_CUDASIM=1 before numba is imported (slow, for tests)"
        )
    if not cuda.is_available():
        raise BackendUnavailableError(
            "backend 'numba_cuda' cannot run: numba finds no CUDA driver and toolkit it can use (CUDA 13 needs the "
            "package numba-cuda); install it or choose the triton or torch backend"
        )


def _memory(tensor: Tensor) -> Tensor:
    """The memory under a strided tensor from its first element on, 1-D; half-precision values as their bits."""
    if tensor.element_size() == 2:
        tensor = tensor.view(torch.int16)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,))


@lru_cache(maxsize=8)
def _widening(half: str, device: torch.device) -> Tensor:
    """float32 of every bit pattern of a half-precision dtype [65536]; for "" a table that is not read."""
    if not half:
        return torch.zeros(1, device=device)
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    return bits.view(getattr(torch, half)).float().to(device)


def _device_array(tensor: Tensor) -> Any:
    return tensor.numpy() if config.ENABLE_CUDASIM else cuda.as_cuda_array(tensor)


def _stream(tensor: Tensor) -> Any:
    """torch's own stream, so that the kernel runs after what wrote its input and before what reads its result."""
    return 0 if config.ENABLE_CUDASIM else cuda.external_stream(torch.cuda.current_stream(tensor.device).cuda_stream)


def _current_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return cuda.gpus[tensor.device.index] if tensor.is_cuda else contextlib.nullcontext()


@lru_cache(maxsize=4)
def _row_kernel(double: bool, half: bool) -> Any:
    """The kernel in one arithmetic and for one way of reading a value."""
    real = np.float64 if double else np.float32
    stored = float64 if double else float32
    greatest_exponent = 1022 if double else 126

    if half:

        @cuda.jit(device=True)
        def read(buffer, at, widening):
            return widening[int(buffer[at]) & 0xFFFF]

    else:

        @cuda.jit(device=True)
        def read(buffer, at, widening):
            return buffer[at]

    @cuda.jit(device=True)
    def add_up(sums, first, second, third, fourth):
        """sums[i, 0] = the sum of every thread's i-th value, always in the same order."""
        thread = cuda.threadIdx.x
        cuda.syncthreads()  # the sums before may still be being read
        sums[0, thread] = first
        sums[1, thread] = second
        sums[2, thread] = third
        sums[3, thread] = fourth
        cuda.syncthreads()
        step = cuda.blockDim.x // 2
        while step > 0:
            if thread < step:
                for i in range(4):
                    sums[i, thread] += sums[i, thread + step]
            cuda.syncthreads()
            step //= 2

    @cuda.jit
    def measure_rows(
        buffer,
        map_starts,
        stride_q,
        stride_k,
        widening,
        table,
        tolerance,
        prefix,
        patches,
        grid_cols,
        num_edges,
        needs,
        planes,
        valid,
    ):
        x = cuda.shared.array(0, stored)  # the row's patches; sized at launch
        sums = cuda.shared.array((4, THREADS), stored)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        row = cuda.blockIdx.x
        query = row % (prefix + patches)
        base = map_starts[row // (prefix + patches)] + query * stride_q

        head = real(0)
        body = real(0)
        negative = real(0)
        for i in range(thread, prefix, threads):
            value = read(buffer, base + i * stride_k, widening)
            head += value
            if value < 0:
                negative = real(1)
        for i in range(thread, patches, threads):
            value = read(buffer, base + (prefix + i) * stride_k, widening)
            x[i] = value
            body += value
            if value < 0:
                negative = real(1)
        add_up(sums, head, body, negative, real(0))
        head = sums[0, 0]
        total = sums[1, 0]
        negative = sums[2, 0]
        # A sum that is NaN or infinite fails the comparison too.
        is_valid = abs(head + total - real(1)) <= tolerance and negative == 0
        is_defined = is_valid and total > 0
        if thread == 0:
            valid[row] = 1 if is_valid else 0
            planes[rows.AT_PREFIX_MASS, row] = head if is_valid else real(np.nan)
            if not is_defined:
                for plane in range(rows.AT_PREFIX_MASS):
                    planes[plane, row] = real(np.nan)
        if not is_defined:  # of every thread of the block alike
            return

        # A power of two takes the sum to about 1: exact, and squares of subnormal rows do not underflow.
        exponent = min(-math.frexp(total)[1], greatest_exponent)
        factor = real(math.ldexp(real(1), exponent))
        total = total * factor
        for i in range(thread, patches, threads):
            x[i] *= factor
        cuda.syncthreads()
        patch = query - prefix
        far = real(0)
        logs = real(0)
        rest = real(0)
        unlike_first = real(0)
        first = x[0]
        mean = total / real(patches)
        for i in range(thread, patches, threads):
            value = x[i]
            if needs & rows.DISTANCE and patch >= 0:
                down = abs(i // grid_cols - patch // grid_cols)
                across = abs(i % grid_cols - patch % grid_cols)
                far += value * table[down * grid_cols + across]
            if needs & rows.ENTROPY and value > 0:
                logs += value * real(math.log2(value))
            if value != first:
                unlike_first = real(1)
            rest += value - mean
        add_up(sums, far, logs, rest, unlike_first)
        far = sums[0, 0]
        logs = sums[1, 0]
        rest = sums[2, 0] / real(patches)
        unlike_first = sums[3, 0]
        if thread == 0:
            planes[rows.AT_DISTANCE, row] = far / total
            planes[rows.AT_ENTROPY, row] = max(real(_LN_2) * (real(math.log2(total)) - logs / total), real(0))
        if not needs & (rows.MORAN | rows.GEARY):
            return

        # Less the mean twice: the first time it is rounded at the size of x, the second time at the size of z. Rows
        # uniform to 5e-4 need that.
        for i in range(thread, patches, threads):
            x[i] = (x[i] - mean) - rest
        cuda.syncthreads()
        squares = real(0)
        cross = real(0)
        apart = real(0)
        for i in range(thread, patches, threads):
            z = x[i]
            squares += z * z
            if i % grid_cols < grid_cols - 1:
                cross += z * x[i + 1]
                apart += (z - x[i + 1]) * (z - x[i + 1])
            if i + grid_cols < patches:
                cross += z * x[i + grid_cols]
                apart += (z - x[i + grid_cols]) * (z - x[i + grid_cols])
        add_up(sums, squares, cross, apart, real(0))
        squares = sums[0, 0]
        cross = sums[1, 0]
        apart = sums[2, 0]
        if thread == 0:
            # N/E · Σ z_i z_j / Σ z² and (N − 1)/2E · Σ (z_i − z_j)² / Σ z², each edge once
            planes[rows.AT_MORAN, row] = real(np.nan)
            planes[rows.AT_GEARY, row] = real(np.nan)
            if unlike_first > 0:
                planes[rows.AT_MORAN, row] = real(patches) / real(num_edges) * (cross / squares)
                planes[rows.AT_GEARY, row] = real(patches - 1) / real(2 * num_edges) * (apart / squares)

    return measure_rows
