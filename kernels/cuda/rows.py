"""What the CUDA backends share: where rows lie in memory, the values of every row, and the metrics read off them.

A kernel gives each token's row five values; a metric is a view of one of them. So the two backends differ in their
kernels alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.arrays import Values
from kernels.backends import Backend
from kernels.inputs import Factors, Maps
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec

# Planes of a kernel's result, and bits of what it is asked for.
PLANES = ("distance", "entropy", "morans_i", "gearys_c", "prefix_mass")
DISTANCE, ENTROPY, MORAN, GEARY = 1, 2, 4, 8


@dataclass(frozen=True, slots=True)
class RowValues:
    """What a kernel hands back, maps flattened.

    Attributes:
        planes: float [5, map, query]: distance, entropy (nat), Moran's I, Geary's C, prefix mass of every token's
            row; NaN where undefined or invalid, and not written where not asked for.
        layout: where the patches lie.
    """

    planes: Tensor
    layout: TokenLayout

    def patch_queries(self, name: str) -> Tensor:
        """[map, patch query] of one plane."""
        return self.planes[PLANES.index(name), :, self.layout.num_prefix_tokens :]

    def class_query(self, name: str) -> Tensor:
        """[map], the class token's row of one plane; ValueError without a class token."""
        if not self.layout.class_token:
            raise ValueError("this layout has no class token, so there is no class-token row")
        return self.planes[PLANES.index(name), :, 0]


@dataclass(frozen=True, slots=True)
class FromRows:
    """A metric's implementation: what the kernel must compute for it, and how it is read off the result."""

    needs: int
    read: Callable[[RowValues], Tensor]

    def __call__(self, rows: RowValues) -> Tensor:
        return self.read(rows)


# Name of a metric -> its reading of a kernel's result.
IMPLEMENTATIONS = {
    "distance": FromRows(DISTANCE, lambda rows: rows.patch_queries("distance")),
    "entropy": FromRows(ENTROPY, lambda rows: rows.patch_queries("entropy")),
    "entropy_normalized": FromRows(
        ENTROPY, lambda rows: rows.patch_queries("entropy") / math.log(rows.layout.num_patches)
    ),
    "morans_i": FromRows(MORAN, lambda rows: rows.patch_queries("morans_i")),
    "gearys_c": FromRows(GEARY, lambda rows: rows.patch_queries("gearys_c")),
    "prefix_mass": FromRows(0, lambda rows: rows.patch_queries("prefix_mass")),
    "cls_entropy": FromRows(ENTROPY, lambda rows: rows.class_query("entropy")),
    "cls_morans_i": FromRows(MORAN, lambda rows: rows.class_query("morans_i")),
}


class RowsBackend(Backend):
    """A backend whose kernels give `RowValues`."""

    implementations = IMPLEMENTATIONS

    def needs(self, specs: Sequence[MetricSpec]) -> int:
        """Bits of what a kernel must compute for these metrics."""
        needs = 0
        for spec in specs:
            implementation = self.implementation(spec)
            assert isinstance(implementation, FromRows), f"{self.name}'s implementation of {spec.name!r} is no FromRows"
            needs |= implementation.needs
        return needs

    def read(self, planes: Tensor, valid: Tensor, given: Maps | Factors, specs: Sequence[MetricSpec]) -> Values:
        """The metrics of a kernel's planes [5, map, query] and valid [map, query], in the input's shape and kind."""
        rows = RowValues(planes, given.layout)
        values: dict[str, Any] = {}
        for spec in specs:
            implementation = self.implementation(spec)
            assert implementation is not None  # `specs` holds those this backend has code for
            tile = implementation(rows)
            values[spec.name] = tile.reshape((*given.leading, *tile.shape[1:]))
        valid = valid.reshape((*given.leading, given.layout.num_tokens))
        if not isinstance(given.like, Tensor):
            return Values(values={name: value.numpy() for name, value in values.items()}, valid=valid.numpy())
        return Values(values=values, valid=valid)


def tensor_of(array: Any) -> Tensor:
    """The tensor a kernel reads, in place; NumPy comes only to an emulator, and may be copied there."""
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def starts(tensor: Tensor) -> Tensor:
    """Where each map of [*leading, row, col] begins, in elements; int64 [map]. Any strides, 0 among them."""
    return _starts(tuple(tensor.shape[:-2]), tuple(tensor.stride()[:-2]), tensor.device)


@lru_cache(maxsize=256)
def _starts(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    found = np.zeros((), np.int64)
    for size, stride in zip(shape, strides, strict=True):
        found = np.add.outer(found, np.arange(size, dtype=np.int64) * stride)
    return torch.from_numpy(found.reshape(-1)).to(device)


@lru_cache(maxsize=16)
def distances(layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Distance between patches |Δrow| rows and |Δcol| columns apart, in image diagonals; [R·C] at |Δrow|·C + |Δcol|."""
    offset = layout.centres_px() - layout.centres_px()[0]
    return torch.as_tensor(np.hypot(offset[:, 0], offset[:, 1]) / layout.diagonal_px, dtype=dtype, device=device)
