"""Metrics computed later from a store's maps, kept in the store beside the capture's own.

metrics/<name>/<params hash>/{value, undefined}, params being everything that fixes the numbers: the metric's
parameters, the backend, the code version. Committed batch by batch like a capture, so that only what is missing
is ever computed, and a flipped bit in a result is found and that batch computed again. A batch's record says from which
maps its values were measured (`AttentionStore.attention_digest`): when those change, the values are missing again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, Self

from store.arrays import create_arrays, create_metric_group, metric_arrays, read_attributes
from store.commit import Writer, metric_values, sound_batches
from store.disk import disk_error
from store.ledger import LedgerError, batch_name, describe_bytes, file_problem, file_problems
from store.reader import AttentionStore
from store.schema import StoreError, StoreSchema, metric_path


def has_metric(
    store: AttentionStore, name: str, params: Mapping[str, Any], against: AttentionStore | None = None
) -> bool:
    """Whether a store holds a metric, computed with these parameters from its present maps, sound for every image.

    Args:
        against: the second condition's store, of a pair metric.
    """
    if _is_own(store.schema, name, params):
        arrays = metric_arrays(store.schema, name, params, regions=name in store.schema.region_metrics)
        return store.complete and not any(
            file_problem(store.storage, array.file(batch), store.files(batch)[array.file(batch)])
            for array in arrays
            for batch in store.committed_batches
        )
    folder = metric_path(name, params) + "/"
    record = _sound_metadata(store, folder)
    if record is None:
        return False
    arrays = metric_arrays(store.schema, name, params, regions=bool(record["regions"]))
    sources = _sources(store, against)
    sound, _ = sound_batches(
        store.storage, store.ledger, arrays, store.schema.num_batches, folder=folder, sources=sources
    )
    return len(sound & sources.keys()) == store.schema.num_batches


class MetricWriter(Writer):
    """Writes metrics into a store that is captured already. Use `MetricWriter.open`, as a context manager.

    Attributes:
        store: the open store; nobody else writes it while the writer is open.
        missing: batch -> names of the metrics still to be written for it; only batches the capture has
            committed. What the capture measured itself with the same parameters is never missing.
    """

    def __init__(
        self,
        store: AttentionStore,
        metrics: Mapping[str, Mapping[str, Any]],
        regions: Collection[str],
        against: Mapping[str, AttentionStore],
    ) -> None:
        super().__init__(store.storage, store.schema, store.ledger)
        self.store = store
        self.missing: dict[int, tuple[str, ...]] = {}
        self._metrics = metrics
        self._arrays = {
            name: metric_arrays(store.schema, name, params, regions=name in regions) for name, params in metrics.items()
        }
        self._sources = {name: _sources(store, against.get(name)) for name in metrics}

    @classmethod
    def open(
        cls,
        store: AttentionStore,
        metrics: Mapping[str, Mapping[str, Any]],
        *,
        region_metrics: Collection[str] = (),
        against: Mapping[str, AttentionStore] | None = None,
    ) -> Self:
        """Begin to add metrics to a store, or go on adding them.

        Args:
            store: an open one; its committed batches are looked at again.
            metrics: name -> {metric parameters, backend, code version}.
            region_metrics: names of those whose values have a region axis.
            against: name of a pair metric -> the second condition's store, open as its values are measured from it.

        Raises:
            StoreError: another writer, damaged metadata, another capture than when the store was opened, or region
                metrics without regions.
        """
        with contextlib.ExitStack() as resources:
            try:
                resources.enter_context(store.ledger.storage.locked())
                store.refresh()
                if region_metrics and not store.schema.regions:
                    raise StoreError(f"{store.path} has no regions, which {', '.join(sorted(region_metrics))} needs")
                writer = cls(store, metrics, region_metrics, against or {})
                store.storage.sweep()
                store.ledger.storage.sweep()
                writer._prepare()
            except OSError as error:
                raise disk_error(f"{store.path} cannot be opened for writing", error) from error
            writer._resources = resources.pop_all()
        return writer

    def write_batch(self, batch: int, metrics: Mapping[str, Any], undefined: Mapping[str, Any]) -> None:
        """Write and commit what `missing` lists for a batch; returns while that is under way, `flush` waits.

        The values must have been measured from `store`, or by an `AttentionStore` opened before it: reading compares
        every shard with the record of it, so that maps which changed in between would have been refused.

        Args:
            metrics: name -> float [image, layer, head(, region)].
            undefined: name -> number of rows without a value, integer [image, layer, head].

        Raises:
            StoreError: other names or shapes, or the disk failed or is full.
        """
        expected = self.missing.get(batch, ())
        if not expected or set(metrics) != set(expected) or set(undefined) != set(expected):
            raise StoreError(
                f"batch {batch} of {self.path} lacks {list(expected)}; "
                f"found values of {sorted(metrics)} and counts of {sorted(undefined)}"
            )
        rows = self.schema.batch_rows(batch)
        images = rows.stop - rows.start
        checked = {}
        for name in expected:
            checked[name] = metric_values(name, self._arrays[name], images, metrics[name], undefined[name])
        for name, values in checked.items():
            record = f"{metric_path(name, self._metrics[name])}/{batch_name(batch)}"
            files = {array.file(batch): self._put(array, batch, data, array.precision) for array, data in values}
            self._commit(record, batch, files, lambda: None, sources=self._sources[name][batch])
        del self.missing[batch]

    def _prepare(self) -> None:
        """Make each metric's arrays where they are not there yet, and find what is missing."""
        self._rebuild_records()
        missing: dict[int, list[str]] = {}
        for name, params in self._metrics.items():
            if _is_own(self.schema, name, params):
                continue
            folder = metric_path(name, params) + "/"
            regions = len(self._arrays[name][0].shape) == 4
            record = _sound_metadata(self.store, folder)
            if record is None:
                self._create(name, params, regions)
            elif bool(record["regions"]) != regions:
                raise StoreError(f"{name!r} is stored {'with' if record['regions'] else 'without'} a region axis")
            sources = self._sources[name]
            arrays, batches = self._arrays[name], self.schema.num_batches
            sound, problems = sound_batches(self.storage, self._ledger, arrays, batches, folder=folder, sources=sources)
            self._ledger.remove(problems)
            for batch in sources:
                if batch not in sound:
                    missing.setdefault(batch, []).append(name)
        self.missing = {batch: tuple(names) for batch, names in sorted(missing.items())}

    def _rebuild_records(self) -> None:
        """Write damaged records of metrics again, from the parameters in groups whose names are hashes of them."""
        for name, record in self._ledger.read_later().items():
            group = name.removesuffix("/metadata")
            if isinstance(record, LedgerError):
                with contextlib.suppress(StoreError, KeyError, TypeError):
                    attributes = read_attributes(self.storage, group)
                    metric, params, regions = (attributes[key] for key in ("name", "params", "regions"))
                    if metric_path(metric, params) == group:
                        self._create(metric, params, regions)

    def _create(self, name: str, params: Mapping[str, Any], regions: bool) -> None:
        """Write the metadata of a metric's arrays, again if they were damaged: the same bytes, so data stay valid."""
        group = metric_path(name, params)
        arrays = metric_arrays(self.schema, name, params, regions=regions)
        parent = group.rpartition("/")[0]
        files = [f"{folder}/zarr.json" for folder in (parent, group, *(array.path for array in arrays))]
        entries = {}
        with self.storage.skeleton() as skeleton:
            create_metric_group(skeleton, name, params, regions=regions)
            create_arrays(skeleton, arrays)
            for file in files:
                content = (skeleton / file).read_bytes()
                entries[file] = describe_bytes(content)
                if file not in self.store.metadata_files:
                    self.storage.replace(file, content)
        record = {"name": name, "params": dict(params), "regions": regions, "files": entries}
        self._ledger.write(f"{group}/metadata", record)


def _sources(store: AttentionStore, against: AttentionStore | None) -> dict[int, list[str]]:
    """Batch that can be measured -> digests of the maps that its values are measured from."""
    stores = [store] if against is None else [store, against]
    digests = {batch: [each.attention_digest(batch) for each in stores] for batch in store.committed_batches}
    return {batch: sources for batch, sources in digests.items() if all(sources)}


def _is_own(schema: StoreSchema, name: str, params: Mapping[str, Any]) -> bool:
    captured = schema.metrics.get(name)
    return captured is not None and metric_path(name, captured) == metric_path(name, params)


def _sound_metadata(store: AttentionStore, folder: str) -> dict[str, Any] | None:
    """The metadata record of a metric computed later; None if it, or a file it names, is missing or damaged."""
    try:
        record = store.ledger.read(f"{folder}metadata")
    except LedgerError:
        return None
    return None if file_problems(store.storage, record["files"]) else record
