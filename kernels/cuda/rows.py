"""What the CUDA backends share: where rows lie in memory, the values of every row, and the metrics read off them.

A kernel gives each token's row five values; a metric is a view of one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.arrays import map_starts
from kernels.backends import Reading
from kernels.inputs import Factors, Maps
from kernels.layout import TokenLayout

# Planes of a kernel's result, and bits of what it is asked for.
PLANES = ("distance", "entropy", "morans_i", "gearys_c", "prefix_mass")
AT_DISTANCE, AT_ENTROPY, AT_MORAN, AT_GEARY, AT_PREFIX_MASS = range(len(PLANES))
DISTANCE, ENTROPY, MORAN, GEARY, PREFIX_MASS = 1, 2, 4, 8, 16


@dataclass(frozen=True, slots=True)
class RowValues:
    """What a kernel hands back, maps flattened: `PLANES` of every token's row, and which rows are valid.

    NaN where undefined or invalid; not written where not asked for.
    """

    planes: Tensor  # float [5, map, query]
    valid: Tensor  # bool [map, query]
    layout: TokenLayout
    patches: tuple[Tensor, ...]  # [map, patch query] of each plane, views

    @classmethod
    def empty(cls, given: Maps | Factors, dtype: torch.dtype, device: torch.device) -> RowValues:
        """Memory for a kernel to write to."""
        shape = math.prod(given.leading), given.layout.num_tokens
        planes = torch.empty((len(PLANES), *shape), dtype=dtype, device=device)
        patches = planes[:, :, given.layout.num_prefix_tokens :].unbind()
        return cls(planes, torch.empty(shape, dtype=torch.bool, device=device), given.layout, patches)

    def patch_queries(self, name: str) -> Tensor:
        """[map, patch query] of one plane."""
        return self.patches[PLANES.index(name)]

    def class_query(self, name: str) -> Tensor:
        """[map], the class token's row of one plane; ValueError without a class token."""
        self.layout.require_class_token()
        return self.planes[PLANES.index(name), :, 0]


# Name of a metric -> its reading of a kernel's result.
IMPLEMENTATIONS = {
    **{name: Reading((name,), methodcaller("patch_queries", name)) for name in PLANES[:AT_PREFIX_MASS]},
    "entropy_normalized": Reading(
        ("entropy",), lambda rows: rows.patch_queries("entropy") / math.log(rows.layout.num_patches)
    ),
    "prefix_mass": Reading(("prefix_mass",), methodcaller("patch_queries", "prefix_mass")),
    "cls_entropy": Reading(("entropy",), methodcaller("class_query", "entropy")),
    "cls_morans_i": Reading(("morans_i",), methodcaller("class_query", "morans_i")),
}


def tensor_of(array: Any) -> Tensor:
    """The tensor a kernel reads, in place; NumPy, which comes on the CPU alone, may be copied."""
    return array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.require(array, requirements=("C", "W")))


def starts(tensor: Tensor) -> Tensor:
    """Where each map of [*leading, row, col] begins, in elements; int64 [map]. Any strides, 0 among them."""
    return _starts(tuple(tensor.shape[:-2]), tuple(tensor.stride()[:-2]), tensor.device)


@lru_cache(maxsize=256)
def _starts(shape: tuple[int, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.from_numpy(map_starts(shape, strides)).to(device)


@lru_cache(maxsize=16)
def distances(layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Distance between patches |Δrow| rows and |Δcol| columns apart, in image diagonals; [R·C] at |Δrow|·C + |Δcol|."""
    offset = layout.centres_px() - layout.centres_px()[0]
    return torch.as_tensor(np.hypot(offset[:, 0], offset[:, 1]) / layout.diagonal_px, dtype=dtype, device=device)
