"""Metrics of a stored capture: what is missing is measured, and the values written back into the store."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from engine.capture import metric_parameters, stored_parameters
from engine.config import load_metrics
from engine.measure.cluster import DaskCluster, connected
from engine.measure.table import same_architecture
from engine.measure.units import StoredMeasurement
from engine.progress import ImageProgress, say
from kernels import MetricSpec, TokenLayout, check_metrics, resolve
from store import AttentionStore, MetricWriter, StoreError, has_metric
from store.arrays import attention_arrays
from train.errors import InputError


def measure_store(
    store: AttentionStore,
    metrics: Sequence[str],
    backend: str,
    against: AttentionStore | None = None,
    scheduler: str = "",
) -> tuple[str, ...]:
    """Measure a stored capture; needs neither model nor images, and computes only what is not there yet.

    Every thread decodes some images of a layer and measures them while others do the same with the next; values are
    written and committed batch by batch meanwhile.

    Args:
        store: an open one. Batches that were not committed when it was opened are left out, which is said.
        metrics: names or `module:name`.
        backend: see `kernels.resolve`.
        against: the second condition's store, for pair metrics: the same images, layers and heads.
        scheduler: address of a Dask scheduler whose workers measure; "": this process does.

    Returns:
        Names of the metrics that were measured; the store has the values of all metrics now.

    Raises:
        InputError: a metric that the stores cannot give: no maps were stored, there are no regions, no second store
            was named for a pair metric, or it is not over the same images and layers.
        StoreError: a store is damaged, or nothing of it is captured.
        ClusterError: the cluster failed; see `engine.measure.cluster`.
    """
    if not metrics:
        raise InputError("there is no metric to measure; name some in measure.metrics (--metrics distance,entropy)")
    specs = load_metrics(metrics)
    _check_second_store(store, specs, against)
    missing = {spec.name: spec for spec in specs if not _is_measured(store, spec, against)}
    if not missing:  # by whatever backend: of a capture measured on a GPU, none needs to run here
        return ()
    chosen = resolve(backend, "cpu").name
    pairs = [name for name, spec in missing.items() if spec.inputs == "pair"]
    other = against if pairs else None
    require_maps(store, list(missing.values()))
    layouts = [TokenLayout.from_dict(layer.layout) for layer in store.schema.layers]
    check_metrics(list(missing.values()), layouts, len(store.schema.regions), chosen)
    stores = [store] if other is None else [store, other]
    images = np.logical_and.reduce([each.committed_images for each in stores])
    damages = [damage for each in stores for damage in each.damaged_batches]
    if not images.any():
        first = f" ({damages[0]})" if damages else ""
        raise StoreError(f"{store.path} holds no batch that can be measured{first}; capture it first")
    if not images.all():
        say(
            f"{store.path.name}: only {int(images.sum())} of {store.schema.num_images} images are captured; "
            "the others are left out"
        )
    for damage in damages:
        say(damage)
    parameters = {name: metric_parameters(spec, chosen, other) for name, spec in missing.items()}
    needing = [name for name, spec in missing.items() if spec.inputs == "regions"]
    measurement = StoredMeasurement(store, other, missing, chosen)
    with contextlib.ExitStack() as resources:
        measurer: StoredMeasurement | DaskCluster = measurement
        if scheduler:
            named = {spec.name: name for spec, name in zip(specs, metrics, strict=True)}
            measurer = resources.enter_context(connected(scheduler, measurement, named))
        against_of = {} if other is None else dict.fromkeys(pairs, other)
        writer = resources.enter_context(
            MetricWriter.open(store, parameters, region_metrics=needing, against=against_of)
        )
        rows = {batch: store.schema.batch_rows(batch) for batch in writer.missing}
        todo = {batch: names for batch, names in writer.missing.items() if images[rows[batch]].all()}
        total = sum(rows[batch].stop - rows[batch].start for batch in todo)
        masked = 0
        image_bytes = sum(array.row_bytes for array in attention_arrays(store.schema))
        with ImageProgress(f"measure {store.path.name}", total, 0, image_bytes) as progress:
            for batch, found in measurer.batches(todo):
                writer.write_batch(batch, found.values, found.undefined)
                progress.update(rows[batch].stop - rows[batch].start)
                masked += found.masked
            writer.flush()
    if masked:
        names = " or ".join(each.path.name for each in stores)
        say(
            f"{names}: {masked:,} rows are no post-softmax attention (NaN, infinite, negative or off sum 1); they are "
            "left out of every value and counted with the rows that have none"
        )
    return tuple(missing)


def _is_measured(store: AttentionStore, spec: MetricSpec, against: AttentionStore | None) -> bool:
    """Whether this version of the code has left all of a metric's values in the store; a kill leaves some of them."""
    parameters = stored_parameters(store, spec, against)
    compared = against if spec.inputs == "pair" else None
    return parameters is not None and has_metric(store, spec.name, parameters, compared)


def _check_second_store(store: AttentionStore, specs: Sequence[MetricSpec], other: AttentionStore | None) -> None:
    """Raises InputError unless there is a second store, and one that fits, exactly where a metric compares two."""
    pairs = [spec.name for spec in specs if spec.inputs == "pair"]
    if other is None:
        if pairs:
            raise InputError(f"{pairs[0]} compares two captures; name the other one with --against OTHER.zarr")
        return
    if not pairs:
        names = ", ".join(spec.name for spec in specs)
        raise InputError(f"--against {other.path} is given, but none of {names} compares two captures")
    require_comparable(store, other, "a pair metric compares the same images")
    require_maps(other, specs)


def require_comparable(store: AttentionStore, other: AttentionStore, reason: str) -> None:
    """Raises InputError unless two stores are of one architecture and the same images; `reason` says why they must."""
    if other.image_ids != store.image_ids:
        raise InputError(f"{other.path} was captured over other images than {store.path}; {reason}")
    if not same_architecture(store, other):
        raise InputError(
            f"{other.path} has other layers, heads or tokens than {store.path}; only models of one architecture at one "
            "input size can be compared"
        )
    ours, theirs = _pictures(store), _pictures(other)
    for name in store.image_ids:
        if name in ours and name in theirs and ours[name] != theirs[name]:
            raise InputError(
                f"{name} is another picture in {other.path} than in {store.path} (its file's SHA-256 differs); "
                f"{reason}, so capture both from the same files"
            )


def _pictures(store: AttentionStore) -> dict[str, str]:
    """Image id -> SHA-256 of its file; nothing for a store that keeps no list of files."""
    records = (store.manifest or {}).get("records", ())
    return {record["id"]: record["sha256"] for record in records if record["sha256"]}


def require_maps(store: AttentionStore, specs: Sequence[MetricSpec]) -> None:
    """Raises InputError where a store keeps no attention that these metrics could be computed from."""
    if store.schema.encoding:
        return
    names = ", ".join(spec.name for spec in specs)
    paired = any(spec.inputs == "pair" for spec in specs)
    raise InputError(
        f"{store.path} holds no attention maps, so {names} cannot be computed from it; capture again with "
        f"capture.sinks store{'' if paired else f', or with {names} in measure.metrics'}"
    )
