"""Metrics of a stored capture: shards are read ahead, measured, and the values written back into the store."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from engine.batch_sinks import stack_layers
from engine.progress import ImageProgress
from engine.sinks import load_metrics, metric_parameters
from kernels import MetricSpec, TokenLayout, measure_attention, measure_pair, measure_qk, resolve
from store import AttentionStore, Factors, MetricWriter, has_metric
from store.arrays import attention_arrays
from store.commit import available_cpus
from store.encodings import softmax_maps
from train.errors import InputError

__all__ = ["measure_store", "missing_metrics", "stored_parameters"]

# Threads that decode ahead; the kernels take what they leave, and every CPU when they wait.
READ_THREADS = max(1, available_cpus() // 2)


def measure_store(path: Path, metrics: Sequence[str], backend: str, against: Path | None = None) -> AttentionStore:
    """Measure a stored capture; needs neither model nor images, and computes only what is not there yet.

    Shards are read and decoded ahead by threads while those before them are measured.

    Args:
        path: the store. Batches its capture has not committed yet are left out, which is said.
        metrics: names or `module:name`.
        backend: see `kernels.resolve`.
        against: the second condition's store, for pair metrics: the same images, layers and heads.

    Returns:
        The store, with every metric's values in it.

    Raises:
        InputError: a metric that the stores cannot give: no maps were stored, there are no regions, no second store
            was named for a pair metric, or it is not over the same images and layers.
        StoreError: a store is not there or damaged.
    """
    store = AttentionStore.open(path)
    chosen = resolve(backend, "cpu").name
    missing = missing_metrics(path, metrics, against)
    if not missing:
        return store
    pairs = any(spec.inputs == "pair" for spec in missing.values())
    other = _second_store(store, missing, against) if pairs else None
    _require_maps(store, missing)
    images = store.committed_images
    if other is not None:
        images = images & other.committed_images
    if not images.all():
        tqdm.write(
            f"{path.name}: only {int(images.sum())} of {store.schema.num_images} images are captured; "
            "the others are left out"
        )
    parameters = {name: metric_parameters(spec, chosen, other) for name, spec in missing.items()}
    needing = [name for name, spec in missing.items() if spec.inputs == "regions"]
    with MetricWriter.open(path, parameters, region_metrics=needing) as writer:
        batches = [batch for batch in sorted(writer.missing) if images[store.schema.batch_rows(batch)].all()]
        _measure_batches(writer, store, other, missing, batches, chosen)
    return AttentionStore.open(path)


def missing_metrics(path: Path, metrics: Sequence[str], against: Path | None = None) -> dict[str, MetricSpec]:
    """The metrics that this version of the code has not left in the store, by name.

    Raises:
        InputError: no such metric, or a pair metric without a second store.
        StoreError: a store is not there or damaged.
    """
    store = AttentionStore.open(path)
    missing: dict[str, MetricSpec] = {}
    specs = load_metrics(metrics)
    other = _second_store(store, {spec.name: spec for spec in specs}, against)
    for spec in specs:
        parameters = stored_parameters(store, spec, other)
        # A measurement that was killed has left its parameters and some of its batches.
        if parameters is None or not has_metric(path, spec.name, parameters):
            missing[spec.name] = spec
    return missing


def stored_parameters(
    store: AttentionStore, spec: MetricSpec, other: AttentionStore | None = None
) -> dict[str, Any] | None:
    """Parameters of the metric's values that this version of the code left in the store, by whatever backend."""
    for parameters in store.metric_params(spec.name):
        if metric_parameters(spec, parameters["backend"], other) == parameters:
            return parameters
    return None


def _second_store(
    store: AttentionStore, specs: Mapping[str, MetricSpec], against: Path | None
) -> AttentionStore | None:
    """The store that pair metrics compare with; None when there are none."""
    pairs = [name for name, spec in specs.items() if spec.inputs == "pair"]
    if not pairs:
        if against is not None:
            raise InputError(f"--against {against} is given, but none of {', '.join(specs)} compares two captures")
        return None
    if against is None:
        raise InputError(f"{pairs[0]} compares two captures; name the other one with --against T.zarr")
    other = AttentionStore.open(against)
    if other.image_ids != store.image_ids:
        raise InputError(
            f"{other.path} was captured over other images than {store.path}; a pair metric compares the same images"
        )
    if [dataclasses.replace(layer, factors=None) for layer in other.schema.layers] != [
        dataclasses.replace(layer, factors=None) for layer in store.schema.layers
    ]:
        raise InputError(
            f"{other.path} has other layers, heads or tokens than {store.path}; a pair metric compares models of one "
            "architecture at one input size"
        )
    _require_maps(other, specs)
    return other


def _require_maps(store: AttentionStore, specs: Iterable[str]) -> None:
    if not store.schema.encoding:
        names = ", ".join(specs)
        raise InputError(
            f"{store.path} holds no attention maps, so {names} cannot be computed from it; capture again with "
            f"capture.sinks store, or with {names} in measure.metrics"
        )


def _measure_batches(
    writer: MetricWriter,
    store: AttentionStore,
    other: AttentionStore | None,
    missing: Mapping[str, MetricSpec],
    batches: Sequence[int],
    backend: str,
) -> None:
    """Measure batch by batch, layer by layer, in the order in which shards are read ahead."""
    schema = store.schema
    requests = [(layer.layer, schema.batch_rows(batch)) for batch in batches for layer in schema.layers]
    ours = store.read_ahead(requests, threads=READ_THREADS)
    theirs = iter(()) if other is None else other.read_ahead(requests, threads=READ_THREADS)
    total = sum(schema.batch_rows(batch).stop - schema.batch_rows(batch).start for batch in batches)
    image_bytes = sum(array.row_bytes for array in attention_arrays(schema))
    with ImageProgress(f"measure {store.path.name}", total, 0, image_bytes) as progress:
        for batch in batches:
            rows = schema.batch_rows(batch)
            specs = [missing[name] for name in writer.missing[batch]]
            regions = None if store.regions is None else store.regions[rows]
            measured = []
            for layer in schema.layers:
                attention = Stored(next(ours), store.precision(layer.layer))
                compared = None if other is None else Stored(next(theirs), other.precision(layer.layer))
                layout = TokenLayout.from_dict(layer.layout)
                measured.append(_measure_layer(attention, compared, layout, specs, backend, regions))
            names = [spec.name for spec in specs]
            writer.write_batch(
                batch,
                {name: stack_layers([values[name] for values, _ in measured], np.nan).numpy() for name in names},
                {name: stack_layers([counts[name] for _, counts in measured], -1).numpy() for name in names},
            )
            progress.update(rows.stop - rows.start)
        writer.flush()


@dataclass(frozen=True, slots=True)
class Stored:
    """One layer of some images as a store keeps it.

    Args:
        attention: maps [image, head, query, key], or their factors.
        precision: of either, see `store.precisions`.
    """

    attention: np.ndarray | Factors
    precision: str

    def maps(self) -> tuple[Any, str]:
        """Maps as kernels take them, and their precision: as stored, or float32 computed from query and key."""
        if not isinstance(self.attention, Factors):
            return _kernel_array(self.attention, self.precision), self.precision
        images, heads, tokens, _ = self.attention.query.shape
        out = np.empty((images, heads, tokens, tokens), np.float32)
        softmax_maps(self.attention, self.precision, out)
        return out, "float32"


def _measure_layer(
    attention: Stored,
    other: Stored | None,
    layout: TokenLayout,
    specs: Sequence[MetricSpec],
    backend: str,
    regions: np.ndarray | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each metric's values [image, head(, region)] and undefined-row counts [image, head] of one layer."""
    measurements = []
    if of_one := [spec for spec in specs if spec.inputs != "pair"]:
        stored = attention.attention
        if isinstance(stored, Factors):
            query, key = (_kernel_array(part, attention.precision) for part in (stored.query, stored.key))
            bias: Any = stored.bias
            if bias is not None and isinstance(query, torch.Tensor):
                bias = torch.from_numpy(bias)
            measured = measure_qk(query, key, layout, of_one, stored.scale, bias, backend, regions=regions)
        else:
            maps = _kernel_array(stored, attention.precision)
            measured = measure_attention(maps, layout, of_one, backend, regions=regions)
        measurements.append(measured)
    if of_two := [spec for spec in specs if spec.inputs == "pair"]:
        assert other is not None  # `_second_store` refuses pair metrics without one
        ours, theirs = _in_one_precision(attention.maps(), other.maps())
        measurements.append(measure_pair(ours, theirs, layout, of_two, backend))
    return (
        {name: values for measured in measurements for name, values in measured.items()},
        {name: counts for measured in measurements for name, counts in measured.undefined_rows.items()},
    )


def _in_one_precision(ours: tuple[Any, str], theirs: tuple[Any, str]) -> tuple[Any, Any]:
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
