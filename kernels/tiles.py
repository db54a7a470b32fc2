"""Metrics from their definition alone, a tile of maps at a time.

This is the `reference` backend, and what every other backend does with a metric it has no code of its own for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kernels import reference
from kernels.arrays import Values, dtype_name, flat_index, to_float64
from kernels.backends import Backend
from kernels.checks import valid_rows
from kernels.errors import MetricError
from kernels.inputs import Factors, MapPair, Maps
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec

Index = tuple[Any, ...]  # of some maps, over the leading axes

TILE_BYTES = 32 * 2**20  # of float64 rows; the definitions make a handful of temporaries of that size


class ReferenceBackend(Backend):
    """Every metric from its definition, with code of its own for none."""

    name = "reference"
    implementations: Mapping[str, Callable[..., Any]] = {}
    side_by_side = True

    def implementation(self, spec: MetricSpec) -> Callable[..., Any]:
        return spec.reference

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        def rows(index: Index) -> tuple[np.ndarray, np.ndarray]:
            tile = to_float64(maps.attention[index])
            return tile, valid_rows(tile, maps.tolerance)

        return _measure(rows, maps, specs)

    def measure_pair(self, pair: MapPair, specs: Sequence[MetricSpec]) -> Values:
        def rows(index: Index) -> tuple[np.ndarray, np.ndarray]:
            both = np.stack([to_float64(array[index]) for array in (pair.attention, pair.other)])
            return both, np.asarray(valid_rows(both, pair.tolerance).all(axis=0))

        return _measure(rows, pair, specs)

    def measure_qk(self, factors: Factors, specs: Sequence[MetricSpec]) -> Values:
        def rows(index: Index) -> tuple[np.ndarray, np.ndarray]:
            added = None if factors.bias is None else _additive(factors.bias[index])
            query, key = to_float64(factors.query[index]), to_float64(factors.key[index])
            tile = reference.softmax_rows(query, key, factors.scale, added)
            return tile, ~np.isnan(tile).any(axis=-1)

        return _measure(rows, factors, specs)


def _additive(bias: Any) -> np.ndarray:
    """A boolean mask (True = attend) as 0 and −inf; an additive bias as it is."""
    if dtype_name(bias) == "bool":
        return np.where(to_float64(bias) > 0, 0.0, -np.inf)
    return to_float64(bias)


def _measure(
    rows: Callable[[Index], tuple[np.ndarray, np.ndarray]],
    given: Maps | Factors,
    specs: Sequence[MetricSpec],
) -> Values:
    """Every metric of every tile; `rows` gives the float64 rows of some maps, and which of them are valid."""
    layout, leading, regions, tokens = given.layout, given.leading, given.regions, given.layout.num_tokens
    maps = int(np.prod(leading, dtype=np.int64))
    step = max(1, TILE_BYTES // (8 * tokens * tokens))
    valid = np.empty((maps, tokens), dtype=bool)
    values: dict[str, np.ndarray] = {}
    # An empty batch still takes one (empty) tile: it fixes the shapes of the results.
    for start in range(0, max(maps, 1), step):
        stop = min(start + step, maps)
        index = flat_index(leading, start, stop)
        p, valid[start:stop] = rows(index)
        p = np.where(valid[start:stop, :, np.newaxis], p, np.nan)  # a copy: p may be the caller's own memory
        p.flags.writeable = False  # one metric may not change what the next one sees
        for spec in specs:
            tile = _call(spec, p, layout, None if regions is None else to_float64(regions[index]))
            if spec.name not in values:
                values[spec.name] = np.empty((maps, *tile.shape[1:]))
            values[spec.name][start:stop] = tile
    return Values(
        values={name: array.reshape((*leading, *array.shape[1:])) for name, array in values.items()},
        valid=valid.reshape((*leading, tokens)),
    )


def _call(spec: MetricSpec, p: np.ndarray, layout: TokenLayout, regions: np.ndarray | None) -> np.ndarray:
    """The definition's values on one tile, shapes checked: a user's metric may return anything.

    p is [batch, query, key], of a pair [condition, batch, query, key].

    Raises:
        MetricError: it raised something, or returned something else than finite numbers or NaN of one of the shapes.
    """
    batch = p.shape[-3]
    arguments: tuple[Any, ...]
    if spec.inputs == "regions":
        if regions is None:
            raise ValueError(f"metric {spec.name!r} needs regions [image, region, patch]; none were given")
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
