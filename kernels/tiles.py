"""Metrics from their definition alone, a tile of maps at a time.

This is the `reference` backend, and what every other backend does with a metric it has no code of its own for.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kernels.arrays import Values, flat_index, spans, to_float64
from kernels.backends import Backend, shaped
from kernels.errors import MetricError
from kernels.inputs import Factors, Maps
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec

TILE_BYTES = 32 * 2**20  # of float64 rows; the definitions make a handful of temporaries of that size


class ReferenceBackend(Backend):
    """Every metric from its definition, with code of its own for none."""

    name = "reference"
    implementations: Mapping[str, Callable[..., Any]] = {}
    side_by_side = True

    def implementation(self, spec: MetricSpec) -> Callable[..., Any]:
        return spec.reference

    def measure(self, given: Maps | Factors, specs: Sequence[MetricSpec]) -> Values:
        """Every metric of every tile."""
        regions, tokens, maps = given.regions, given.layout.num_tokens, math.prod(given.leading)
        valid = np.empty((maps, tokens), dtype=bool)
        values: dict[str, np.ndarray] = {}
        for start, stop in spans(maps, max(1, TILE_BYTES // (8 * tokens * tokens))):
            index = flat_index(given.leading, start, stop)
            p, valid[start:stop] = given.rows(index)
            p = np.where(valid[start:stop, :, np.newaxis], p, np.nan)  # a copy: p may be the caller's own memory
            p.flags.writeable = False  # one metric may not change what the next one sees
            for spec in specs:
                tile = _call(spec, p, given.layout, None if regions is None else to_float64(regions[index]))
                if spec.name not in values:
                    values[spec.name] = np.empty((maps, *tile.shape[1:]))
                values[spec.name][start:stop] = tile
        return shaped(values, valid, given)

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        return self.measure(maps, specs)


def _call(spec: MetricSpec, p: np.ndarray, layout: TokenLayout, regions: np.ndarray | None) -> np.ndarray:
    """The definition's values on p [(condition,) batch, query, key]; MetricError for what else a user's may give."""
    batch = p.shape[-3]
    arguments: tuple[Any, ...]
    if spec.inputs == "regions":
        assert regions is not None  # the entry points refuse region metrics without regions
        arguments, signature = (p, layout, regions), "(p, layout, regions)"
        expected: tuple[tuple[int, ...], ...] = ((batch, regions.shape[-2]),)
    else:
        paired = spec.inputs == "pair"
        arguments = (p[0], p[1], layout) if paired else (p, layout)
        signature = "(p, other, layout)" if paired else "(p, layout)"
        expected = ((batch, layout.num_patches), (batch,))
    what = f"metric {spec.name!r}: its reference, called with {signature},"
    try:
        found = np.asarray(spec.reference(*arguments))
    except (Exception, SystemExit) as error:  # a user's code, which may do anything
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise MetricError(
            f"{what} raised {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
        ) from error
    if found.dtype.kind not in "biuf":
        raise MetricError(f"{what} returned {found.dtype} values; expected real numbers")
    if found.shape not in expected:
        raise MetricError(
            f"{what} returned shape {found.shape} for {batch} map(s); expected {' or '.join(map(str, expected))}"
        )
    tile = found.astype(np.float64)
    if np.isinf(tile).any():
        raise MetricError(f"{what} returned infinite values; give NaN where there is no value")
    return tile


BACKEND = ReferenceBackend()
