"""Measures what stores keep: some images of one layer at a time, read, decoded and measured by one thread."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Self

import numpy as np
import torch

from engine.capture import stack_layers
from kernels import BACKENDS, Measurement, MetricSpec, TokenLayout, measure_attention, measure_pair, measure_qk
from kernels.cpu.threads import num_threads, one_thread
from store import AttentionStore, Factors
from store.arrays import layer_arrays
from store.encodings import softmax_maps

# Decoded at once by each thread, if a chunk is not more. A call costs half a millisecond with cold caches: at 4 images
# of ViT-B/16 that was a third of the kernel's own time, at 32 (30 MB) a thirtieth.
UNIT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class BatchValues:
    """What was measured of a batch, or of a unit of it (without the axis `layer` then)."""

    values: dict[str, np.ndarray]  # metric name -> [image, layer, head(, region)]
    # Metric name -> rows of each map that have no part in its value, [image, layer, head]: those without one, and those
    # that are no post-softmax attention.
    undefined: dict[str, np.ndarray]
    masked: int  # rows of the latter kind, each once; with a pair metric, those of either store


@dataclass(frozen=True, slots=True)
class Unit:
    """What one thread measures at a time: some images of a batch, in one layer."""

    layer: int
    rows: slice


@dataclass(frozen=True, slots=True)
class StoredMeasurement:
    """What is to be measured of which stores; values do not depend on how its batches are shared out."""

    store: AttentionStore
    other: AttentionStore | None  # the second condition's, for pair metrics
    metrics: Mapping[str, MetricSpec]
    backend: str  # of `kernels.BACKENDS`

    def batches(self, names: Mapping[int, Sequence[str]]) -> Iterator[tuple[int, BatchValues]]:
        """Measure batches (batch -> names of metrics) in as many threads as `kernels.cpu.threads` has set, in order.

        A thread decodes a unit and measures it; no thread waits for another's decoding, so all CPUs are busy whatever
        the ratio of the two, and no more than one unit per thread is in memory.

        Raises:
            StoreError: a shard is missing or damaged.
            MetricError: a user's metric failed.
        """
        threads = num_threads() if BACKENDS[self.backend].load().side_by_side else 1
        pool = ThreadPoolExecutor(threads, "measure")

        def begin(batch: int) -> tuple[int, list[tuple[Unit, Future[BatchValues]]]]:
            units = self.units(batch)
            return batch, [(unit, pool.submit(self._measure, unit, names[batch], threads > 1)) for unit in units]

        try:
            # While the first batch under way is waited for, those after it hold a unit for every thread.
            ahead = 1 + -(-threads // max(1, len(self.store.layers)))
            begun = map(begin, names)
            under_way = list(islice(begun, ahead))
            while under_way:
                batch, parts = under_way.pop(0)
                values = self._join(names[batch], [(unit, part.result()) for unit, part in parts])
                under_way += islice(begun, 1)
                yield batch, values
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def batch(self, batch: int, names: Sequence[str]) -> BatchValues:
        """Measure one batch in the calling thread; errors as `batches`."""
        return self._join(names, [(unit, self._measure(unit, names, True)) for unit in self.units(batch)])

    def units(self, batch: int) -> list[Unit]:
        """What makes up a batch, layer by layer."""
        rows = self.store.schema.batch_rows(batch)
        units = []
        for layer in self.store.layers:
            step = images_at_once(self.store, layer, whole_maps=self.other is not None)
            bounds = [*range(rows.start, rows.stop, step), rows.stop]
            units += [Unit(layer, slice(begin, end)) for begin, end in pairwise(bounds)]
        return units

    def _measure(self, unit: Unit, names: Sequence[str], one_of_several: bool) -> BatchValues:
        """Measure a unit, without rows that are no attention; `one_of_several`: other threads measure at the time."""
        store, other, backend = self.store, self.other, self.backend
        specs = [self.metrics[name] for name in names]
        single = [spec for spec in specs if spec.inputs != "pair"]
        pairs = [spec for spec in specs if spec.inputs == "pair"]
        layout = TokenLayout.from_dict(store.layout(unit.layer))
        regions = None if store.regions is None else store.regions[unit.rows]  # the format has one grid of them
        measurements = []
        ours = Stored.read(store, unit, "ours")
        theirs = None if other is None else Stored.read(other, unit, "theirs")
        with one_thread() if one_of_several else contextlib.nullcontext():
            if single:
                measurements.append(ours.measure(layout, single, backend, regions))
            if pairs:
                assert theirs is not None  # `measure_store` refuses pair metrics without a second store
                maps = in_one_precision(ours.maps(), theirs.maps())
                measurements.append(measure_pair(*maps, layout, pairs, backend, invalid="mask"))
        values, undefined = {}, {}
        masked: np.ndarray = np.zeros((), bool)
        for measured in measurements:
            invalid = ~np.asarray(measured.valid)
            masked = masked | invalid
            of_map = invalid[..., layout.num_prefix_tokens :].sum(axis=-1) if invalid.any() else 0
            for name in measured:
                values[name] = np.asarray(measured[name])
                undefined[name] = np.asarray(measured.undefined_rows[name]) + of_map
        return BatchValues(values, undefined, int(masked.sum()))

    def _join(self, names: Sequence[str], parts: Sequence[tuple[Unit, BatchValues]]) -> BatchValues:
        """A batch's values of those of its units."""
        layers: dict[int, list[BatchValues]] = {}
        for unit, measured in parts:
            layers.setdefault(unit.layer, []).append(measured)
        values, undefined = {}, {}
        for name in names:
            whole = [np.concatenate([unit.values[name] for unit in units]) for units in layers.values()]
            counts = [np.concatenate([unit.undefined[name] for unit in units]) for units in layers.values()]
            values[name], undefined[name] = stack_layers(whole, np.nan).numpy(), stack_layers(counts, -1).numpy()
        return BatchValues(values, undefined, sum(measured.masked for _, measured in parts))


def images_at_once(store: AttentionStore, layer: int, *, whole_maps: bool) -> int:
    """Images of a unit: whole chunks, of what is stored, or of the float32 maps that a comparison makes of factors."""
    described = store.schema.layers[store.layers.index(layer)]
    if whole_maps and described.factors is not None:
        image_bytes = 4 * described.heads * described.tokens**2
    else:
        image_bytes = sum(array.row_bytes for array in layer_arrays(store.schema, described).values())
    chunk = store.chunk_rows(layer)
    return chunk * max(1, UNIT_BYTES // image_bytes // chunk)


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer of some images as a store keeps it: maps [image, head, query, key], or their factors."""

    attention: np.ndarray | Factors
    precision: str  # see `store.precisions`

    @classmethod
    def read(cls, store: AttentionStore, unit: Unit, place: str) -> Self:
        """Read and decode a unit in the calling thread; `place` as in `AttentionStore.read_here`."""
        return cls(store.read_here(unit.layer, unit.rows, place), store.precision(unit.layer))

    def measure(
        self, layout: TokenLayout, specs: Sequence[MetricSpec], backend: str, regions: np.ndarray | None
    ) -> Measurement:
        stored = self.attention
        if not isinstance(stored, Factors):
            maps = _kernel_array(stored, self.precision)
            return measure_attention(maps, layout, specs, backend, invalid="mask", regions=regions)
        query, key = (_kernel_array(part, self.precision) for part in (stored.query, stored.key))
        bias: Any = stored.bias
        if bias is not None and isinstance(query, torch.Tensor):
            bias = torch.from_numpy(bias)
        return measure_qk(query, key, layout, specs, stored.scale, bias, backend, invalid="mask", regions=regions)

    def maps(self) -> tuple[Any, str]:
        """Maps as kernels take them, and their precision: as stored, or float32 computed from query and key."""
        if not isinstance(self.attention, Factors):
            return _kernel_array(self.attention, self.precision), self.precision
        images, heads, tokens, _ = self.attention.query.shape
        out = np.empty((images, heads, tokens, tokens), np.float32)
        softmax_maps(self.attention, self.precision, out)
        return out, "float32"


def in_one_precision(ours: tuple[Any, str], theirs: tuple[Any, str]) -> tuple[Any, Any]:
    """Both maps in the coarser of their precisions: what remains of a difference is not the rounding of one alone."""
    coarser = max(ours[1], theirs[1], key=("float32", "float16", "bfloat16").index)
    first, second = (
        maps if precision == coarser else torch.as_tensor(maps).to(getattr(torch, coarser))
        for maps, precision in (ours, theirs)
    )
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first, second
    return torch.as_tensor(first), torch.as_tensor(second)


def _kernel_array(values: np.ndarray, precision: str) -> Any:
    """Stored values as kernels take them: NumPy, or a torch view of bfloat16's bits."""
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16) if precision == "bfloat16" else values
