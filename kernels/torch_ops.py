"""torch: every metric vectorised, on any device, differentiable.

Maps go through in chunks, so that the temporaries stay small; each chunk is read once and all metrics come from it.
Arithmetic is float32, float64 for float64 input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from kernels.arrays import Values, flat_index, spans
from kernels.backends import Backend, shaped
from kernels.inputs import Factors, MapPair, Maps
from kernels.layout import TokenLayout
from kernels.metrics import MetricSpec
from kernels.reference import RECEIVED_SPREAD, SEED1_LEAST_SUM_SQ, SEED1_LOG_OFFSET, extent_px

# Bytes of one temporary, a chunk of rows in the arithmetic's dtype: in the CPU's cache, or enough to fill a GPU.
CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}

T = TypeVar("T")


class once(Generic[T]):
    """An attribute worked out when first asked for; `functools.cached_property` takes a lock, which torch.compile
    cannot follow."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute = compute

    def __get__(self, instance: Any, owner: type) -> T:
        value = self.compute(instance)
        setattr(instance, self.compute.__name__, value)
        return value


class PatchMaps:
    """Non-negative maps over patches [..., patch], in any scale: every metric renormalises.

    A map that sums to 0 is undefined: NaN in every metric. Denominators are replaced where they are 0, so that
    gradients of the defined rows stay finite.
    """

    def __init__(self, x: Tensor, layout: TokenLayout) -> None:
        # A power of two takes the sum to about 1: exact, and squares of subnormal rows do not underflow.
        self.x = x * _power_of_two(x.detach().sum(dim=-1, keepdim=True))
        self.layout = layout

    @once
    def total(self) -> Tensor:
        return self.x.sum(dim=-1, keepdim=True)

    @once
    def defined(self) -> Tensor:
        return self.total > 0

    @once
    def p(self) -> Tensor:
        """Renormalised maps; 0 where undefined."""
        return self.x / torch.where(self.defined, self.total, 1.0)

    @once
    def z(self) -> Tensor:
        """x less its mean, twice: the first mean is rounded at the size of x, the second at the size of z."""
        z = self.x - self.x.mean(dim=-1, keepdim=True)
        return z - z.mean(dim=-1, keepdim=True)

    @once
    def varies(self) -> Tensor:
        return (self.x != self.x[..., :1]).any(dim=-1)

    @once
    def sum_sq(self) -> Tensor:
        """Σ z², 1 for constant maps."""
        return torch.where(self.varies, self.z.square().sum(dim=-1), 1.0)

    def neighbours(self, maps: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Both ends of every rook edge: (upper, lower) and (left, right)."""
        grid = maps.unflatten(-1, (self.layout.grid_rows, self.layout.grid_cols))
        return (grid[..., :-1, :], grid[..., 1:, :]), (grid[..., :, :-1], grid[..., :, 1:])

    def entropy(self) -> Tensor:
        tiny = torch.finfo(self.p.dtype).tiny  # 0 ln tiny = 0, and the gradient at 0 stays finite
        return _where(self.defined.squeeze(-1), 0.0 - (self.p * self.p.clamp(min=tiny).log()).sum(dim=-1))

    def morans_i(self) -> Tensor:
        down, right = ((a * b).sum(dim=(-2, -1)) for a, b in self.neighbours(self.z))
        factor = self.layout.num_patches / self.layout.num_edges
        return _where(self.varies, factor * (down + right) / self.sum_sq)

    def gearys_c(self) -> Tensor:
        down, right = ((a - b).square().sum(dim=(-2, -1)) for a, b in self.neighbours(self.z))
        factor = (self.layout.num_patches - 1) / (2 * self.layout.num_edges)
        return _where(self.varies, factor * (down + right) / self.sum_sq)


@dataclass(eq=False)
class MapRows:
    """What every metric reads: the rows of a chunk of maps."""

    patches: Tensor  # [map, patch query, patch] in any scale, 0 in invalid rows
    class_token: Tensor | None  # its row [map, patch]
    prefix_mass: Tensor  # [map, patch query], NaN in invalid rows
    # Called when first needed: the patches' part of each row before renormalising, float64, as prefix_mass.
    sum_patches: Callable[[], Tensor]
    regions: Tensor | None  # [map, region, patch]
    layout: TokenLayout

    @once
    def rows(self) -> PatchMaps:
        return PatchMaps(self.patches, self.layout)

    @once
    def patch_mass(self) -> Tensor:
        return self.sum_patches()

    @once
    def class_row(self) -> PatchMaps:
        self.layout.require_class_token()
        assert self.class_token is not None
        return PatchMaps(self.class_token, self.layout)

    @once
    def received(self) -> PatchMaps:
        """Σ over the defined patch queries of the renormalised rows; its mean differs by a factor alone."""
        return PatchMaps(self.rows.p.sum(dim=-2, dtype=torch.float64), self.layout)

    @once
    def mean_distance(self) -> Tensor:
        """Of the renormalised rows, in image diagonals; 0 where undefined."""
        p = self.rows.p
        return (p * _distances(self.layout, p.dtype, p.device)).sum(dim=-1)


@dataclass(eq=False)
class PairRows:
    """What every pair metric reads: the patch rows of a chunk of maps in two conditions."""

    one: PatchMaps
    other: PatchMaps

    @once
    def defined(self) -> Tensor:
        return (self.one.defined & self.other.defined).squeeze(-1)


def _mean_distance(maps: MapRows) -> Tensor:
    return _where(maps.rows.defined.squeeze(-1), maps.mean_distance)


def _distance_seed1(maps: MapRows) -> Tensor:
    return maps.mean_distance * maps.patch_mass.to(maps.mean_distance.dtype)


def _entropy_seed1(maps: MapRows) -> Tensor:
    rows = maps.rows.p * maps.patch_mass.to(maps.rows.p.dtype).unsqueeze(-1)
    return 0.0 - (rows * (rows + SEED1_LOG_OFFSET).log()).sum(dim=-1)


def _morans_i_received(maps: MapRows) -> Tensor:
    x = maps.received.x.detach()
    varies = x.amax(dim=-1) - x.amin(dim=-1) > RECEIVED_SPREAD * x.mean(dim=-1)
    return _where(varies, maps.received.morans_i())


def _morans_i_seed1(maps: MapRows) -> Tensor:
    of_queries = PatchMaps(maps.patch_mass, maps.layout)
    mean_over_keys = maps.patch_mass.detach() / maps.layout.num_patches
    sum_sq = (mean_over_keys - mean_over_keys.mean(dim=-1, keepdim=True)).square().sum(dim=-1)
    return torch.where(sum_sq <= SEED1_LEAST_SUM_SQ, 0.0, of_queries.morans_i())


def _gini(maps: MapRows) -> Tensor:
    ordered = maps.rows.p.sort(dim=-1).values
    n = maps.layout.num_patches
    rank = 2 * torch.arange(1, n + 1, dtype=ordered.dtype, device=ordered.device) - (n + 1)
    return _where(maps.rows.defined.squeeze(-1), (ordered * rank).sum(dim=-1) / n)


def _region_mass(maps: MapRows) -> Tensor:
    assert maps.regions is not None  # the entry points refuse region metrics without regions
    row = maps.class_row if maps.layout.class_token else maps.received
    return _where(row.defined, (row.p.unsqueeze(-2) * maps.regions).sum(dim=-1))


def _js_divergence(pair: PairRows) -> Tensor:
    one, two = pair.one.p, pair.other.p
    total = one + two
    t = (one - two) / torch.where(total > 0, total, 1.0)
    return _where(pair.defined, (total / 2 * _phi(t)).sum(dim=-1))


def _phi(t: Tensor) -> Tensor:
    """½((1+t) ln(1+t) + (1−t) ln(1−t)), below ¼ as its series Σ_k t^2k / (2k (2k − 1)): see the reference."""
    square = t.square()
    series = torch.zeros_like(t)
    for k in range(11, 0, -1):
        series = (series + 1.0 / (2 * k * (2 * k - 1))) * square
    tiny = torch.finfo(t.dtype).tiny  # 0 ln tiny = 0, and the gradient at t = ±1 stays finite
    up, down = 1.0 + t, 1.0 - t
    logs = (up * up.clamp(min=tiny).log() + down * down.clamp(min=tiny).log()) / 2
    return torch.where(t.abs() < 0.25, series, logs)


# Name of a metric -> its function of `MapRows`, of a pair metric of `PairRows`.
IMPLEMENTATIONS: dict[str, Callable[[Any], Tensor]] = {
    "distance": _mean_distance,
    "distance_px": lambda maps: _distance_seed1(maps) * maps.layout.diagonal_px,
    "distance_walmer": lambda maps: _mean_distance(maps) * (maps.layout.diagonal_px / extent_px(maps.layout)),
    "distance_seed1": _distance_seed1,
    "entropy": lambda maps: maps.rows.entropy(),
    "entropy_normalized": lambda maps: maps.rows.entropy() / math.log(maps.layout.num_patches),
    "entropy_seed1": _entropy_seed1,
    "morans_i": lambda maps: maps.rows.morans_i(),
    "morans_i_received": _morans_i_received,
    "sink_share": lambda maps: _where(maps.received.defined.squeeze(-1), maps.received.p.amax(dim=-1)),
    "morans_i_seed1": _morans_i_seed1,
    "gearys_c": lambda maps: maps.rows.gearys_c(),
    "gini": _gini,
    "prefix_mass": lambda maps: maps.prefix_mass,
    "cls_entropy": lambda maps: maps.class_row.entropy(),
    "cls_morans_i": lambda maps: maps.class_row.morans_i(),
    "region_mass": _region_mass,
    "js_divergence": _js_divergence,
}


# (start, stop, regions of those maps) -> (rows, validity)
_Chunk = Callable[[int, int, Tensor | None], tuple[MapRows | PairRows, Tensor]]


class TorchBackend(Backend):
    """Chunks of maps, each read once."""

    name = "torch"
    implementations = IMPLEMENTATIONS
    differentiable = True

    def measure_attention(self, maps: Maps, specs: Sequence[MetricSpec]) -> Values:
        layout = maps.layout
        attention = _tensor(maps.attention)
        flat = attention.reshape(-1, layout.num_tokens, layout.num_tokens)

        def chunk(start: int, stop: int, coverage: Tensor | None) -> tuple[MapRows, Tensor]:
            p = _upcast(flat[start:stop])
            valid = _valid_rows(p, maps.tolerance)
            p = p.masked_fill(~valid.unsqueeze(-1), 0.0)
            query_valid = valid[:, layout.num_prefix_tokens :]
            rows = MapRows(
                patches=layout.patches(p),
                class_token=layout.class_row(p) if layout.class_token else None,
                prefix_mass=_where(query_valid, layout.prefix(p).sum(dim=-1)),
                sum_patches=lambda: _where(query_valid, layout.patches(p).sum(dim=-1, dtype=torch.float64)),
                regions=coverage,
                layout=layout,
            )
            return rows, valid

        return self._chunked(chunk, flat, maps, specs)

    def measure_qk(self, factors: Factors, specs: Sequence[MetricSpec]) -> Values:
        """A softmax over the patch logits alone is the renormalised row, so a prefix token that takes nearly all the
        mass costs no accuracy.
        """
        layout, prefix = factors.layout, factors.layout.num_prefix_tokens
        query, key = _tensor(factors.query), _tensor(factors.key)
        flat_q, flat_k = (t.reshape(-1, *t.shape[-2:]) for t in (query, key))
        added = None if factors.bias is None else _tensor(factors.bias)

        def chunk(start: int, stop: int, coverage: Tensor | None) -> tuple[MapRows, Tensor]:
            q, k = _upcast(flat_q[start:stop]), _upcast(flat_k[start:stop])
            logits = factors.scale * (q @ k.transpose(-1, -2))
            if added is not None:
                tile = _maps(added, start, stop)
                logits = logits.masked_fill(~tile, -math.inf) if tile.dtype == torch.bool else logits + tile
            top = logits.detach().amax(dim=-1)
            valid = top.isfinite()  # NaN and +inf pass through the maximum; −inf means no key at all
            logits = logits.masked_fill(~valid.unsqueeze(-1), -math.inf)
            patch_logits = logits[..., prefix:]
            peak = patch_logits.detach().amax(dim=-1, keepdim=True)
            weights = (patch_logits - peak.masked_fill(peak.isneginf(), 0.0)).exp()
            shift = top.masked_fill(~valid, 0.0)
            on_prefix = (logits[..., :prefix] - shift.unsqueeze(-1)).exp().sum(dim=-1)
            on_patches = weights.sum(dim=-1) * (peak.squeeze(-1) - shift).exp()
            total = torch.where(valid, on_prefix + on_patches, 1.0)
            rows = MapRows(
                patches=weights[:, prefix:],
                class_token=weights[:, 0] if layout.class_token else None,
                prefix_mass=_where(valid, on_prefix / total)[:, prefix:],
                sum_patches=lambda: _where(valid, on_patches / total)[:, prefix:].double(),
                regions=coverage,
                layout=layout,
            )
            return rows, valid

        return self._chunked(chunk, flat_q, factors, specs)

    def measure_pair(self, pair: MapPair, specs: Sequence[MetricSpec]) -> Values:
        layout = pair.layout
        one, two = (
            _tensor(maps).reshape(-1, layout.num_tokens, layout.num_tokens) for maps in (pair.attention, pair.other)
        )

        def chunk(start: int, stop: int, coverage: Tensor | None) -> tuple[PairRows, Tensor]:
            p, q = _upcast(one[start:stop]), _upcast(two[start:stop])
            valid = _valid_rows(p, pair.tolerance) & _valid_rows(q, pair.tolerance)
            p, q = (t.masked_fill(~valid.unsqueeze(-1), 0.0) for t in (p, q))
            return PairRows(*(PatchMaps(layout.patches(maps), layout) for maps in (p, q))), valid

        return self._chunked(chunk, one, pair, specs)

    def _chunked(self, chunk: _Chunk, flat: Tensor, given: Maps | Factors, specs: Sequence[MetricSpec]) -> Values:
        """Every metric of every chunk of maps, put together again."""
        dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        parts: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}
        valid_parts: list[Tensor] = []
        size = CHUNK_BYTES.get(flat.device.type, CHUNK_BYTES["cpu"])
        for start, stop in spans(len(flat), max(1, size // (given.layout.num_tokens**2 * dtype.itemsize))):
            coverage = None
            if given.regions is not None:
                tile = torch.from_numpy(np.array(given.regions[flat_index(given.leading, start, stop)])).to(dtype)
                # From ordinary memory a copy to a GPU would wait for all that runs there.
                coverage = tile.pin_memory().to(flat.device, non_blocking=True) if flat.is_cuda else tile
            rows, valid = chunk(start, stop, coverage)
            valid_parts.append(valid)
            for spec in specs:
                parts[spec.name].append(self.compute(spec, rows))
        return shaped({name: torch.cat(tensors) for name, tensors in parts.items()}, torch.cat(valid_parts), given)


def _maps(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Maps start … stop − 1 of [*leading, query, key], counted over the leading axes; those alone are copied."""
    leading = tensor.shape[:-2]
    place = torch.arange(start, stop, device=tensor.device)
    index: list[Tensor] = []
    for size in reversed(leading):
        index.insert(0, place % max(size, 1))
        place = place // max(size, 1)
    return tensor[tuple(index)] if leading else tensor.unsqueeze(0)


def _tensor(array: Tensor | np.ndarray) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch takes neither
    return torch.from_numpy(array)


def _upcast(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _valid_rows(p: Tensor, tolerance: float) -> Tensor:
    """Which rows are not negative and sum to 1; a sum that is NaN or infinite fails the comparison."""
    p = p.detach()
    return ((p.sum(dim=-1) - 1.0).abs() <= tolerance) & ~(p < 0).any(dim=-1)


def _where(defined: Tensor, values: Tensor) -> Tensor:
    return torch.where(defined, values, torch.nan)


def _power_of_two(total: Tensor) -> Tensor:
    """2^−⌈log2 total⌉, from its bits and so exact; 1 for 0, at most the dtype's greatest power of two."""
    exponent = torch.frexp(total).exponent
    if total.dtype == torch.float64:
        return ((1023 - exponent.clamp(min=-1022).long()) << 52).view(torch.float64)
    return ((127 - exponent.clamp(min=-126)) << 23).view(torch.float32)


def _distances(layout: TokenLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    grid, patch = (layout.grid_rows, layout.grid_cols), (layout.patch_height_px, layout.patch_width_px)
    kept: Tensor = _kept_distances(*grid, *patch, dtype, device)
    return kept


@torch.compiler.assume_constant_result
def _kept_distances(
    rows: int, cols: int, height_px: int, width_px: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Part of a compiled graph as it is: worked out there, it would be brought to a GPU in every call, which waits."""
    return _new_distances(rows, cols, height_px, width_px, dtype, device)


@lru_cache(maxsize=8)
def _new_distances(
    rows: int, cols: int, height_px: int, width_px: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    grid = TokenLayout(
        grid_rows=rows, grid_cols=cols, num_prefix_tokens=0, patch_height_px=height_px, patch_width_px=width_px
    )
    with torch.inference_mode(False):  # a tensor made in that mode has no place in a graph with gradients
        return torch.as_tensor(grid.distances(), dtype=dtype, device=device)


BACKEND = TorchBackend()
