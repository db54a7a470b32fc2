"""Writing a capture: batch by batch, each committed whole or not at all, resumable after any death.

A batch is committed in this order: its files closed and fsynced, their directories fsynced, then its ledger
record by temporary file, fsync and rename. A killed run therefore leaves committed batches and, at worst,
files that no record names; the next run writes those again and ends with the same bytes.

Several processes may write one store, each its own batches: one opens it and shares it, the others join.

All of it happens in the background, so that the forward pass goes on: a layer is encoded while the next is computed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Self

from store.arrays import ArraySpec, batch_arrays, layer_arrays, metric_arrays, require_free_disk
from store.commit import Writer, check_names, check_shape, float32, metric_values, sound_batches
from store.disk import disk_error
from store.encodings import resolve_encoding
from store.ledger import Ledger, LedgerError, batch_name
from store.metadata import Metadata
from store.places import require_place, storage_at
from store.precisions import Array
from store.removal import schema_of
from store.schema import SCHEMA, STORE_FILES, StoreError, StoreSchema
from store.shards import FileEntry
from store.storage import Lock, Storage
from store.system import HAS_FLOCK


class AttentionWriter(Writer):
    """The writer of a store, or one of those that share it. Use `AttentionWriter.open`, as a context manager.

        with AttentionWriter.open(path, schema, labels=labels, class_names=names) as writer:
            for batch in writer.missing:
                for layer in ...:
                    writer.add_attention(batch, layer, maps)
                writer.commit(batch, metrics, undefined, logits)
            writer.finish()

    Attributes:
        committed: numbers of the batches that are committed and whose files still match their hashes.
            A damaged or missing shard is simply not among them, hence written again.
        run: name of the run that shares the store; "" for the only writer.
    """

    def __init__(self, storage: Storage, schema: StoreSchema, ledger: Ledger, lock: Lock) -> None:
        super().__init__(storage, schema, ledger)
        self.committed: set[int] = set()
        self.run = ""
        self._lock = lock
        self._layers = {layer.layer: layer for layer in schema.layers} if schema.encoding else {}
        self._attention = {number: layer_arrays(schema, layer) for number, layer in self._layers.items()}
        self._logits = next((array for array in batch_arrays(schema) if array.path == "logits"), None)
        self._files: dict[int, dict[int, dict[str, Future[FileEntry]]]] = {}  # batch -> layer -> file
        self._submitted: set[int] = set()

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | Storage,
        schema: StoreSchema,
        *,
        labels: Sequence[int] | Array,
        class_names: Sequence[str],
        manifest: dict[str, Any] | None = None,
        regions: Array | None = None,
        biases: Mapping[int, Any] | None = None,
        join: str = "",
    ) -> Self:
        """Create a store, resume one whose schema is equal in every field, or join its writer.

        Args:
            path: the store's folder, or its URL; its ledger lies beside it.
            schema: shapes and provenance.
            labels: class index of every image, −1 if unknown.
            class_names: names of the classes.
            manifest: every file of the data set with its status, kept in the ledger.
            regions: float32 [image, region, patch], coverage of patches by the regions of `schema.regions`.
            biases: layer -> bias [1, head, query, key] of the layers whose bias is one for all images (encoding qk).
            join: `run` of the writer to join, which shares the store. Each batch is one writer's: `missing` of the
                first, dealt out. Only the first finishes, when the others have committed.

        Raises:
            StoreError: the store is being written by another process, is of another schema (the first key
                that differs, with what was found and expected), has damaged metadata that cannot be rebuilt, is
                not a store, does not fit on the disk, or is not shared by the run to join.
        """
        root = storage_at(path)
        fixed = Metadata(schema, labels, class_names, manifest, regions, biases)
        ledger = Ledger(root)
        with contextlib.ExitStack() as resources:
            try:
                require_place(root)  # before the lock's file is made: what is not ours stays untouched
                lock = resources.enter_context(ledger.storage.joined(join) if join else ledger.storage.locked())
                writer = cls(root, schema, ledger, lock)
                if join:
                    writer.run = join
                    fixed.compare(root, ledger)
                else:
                    writer._prepare(fixed)
            except OSError as error:
                raise disk_error(f"{root} cannot be opened for writing", error) from error
            writer._resources = resources.pop_all()
        return writer

    @classmethod
    def discard(cls, path: str | os.PathLike[str] | Storage) -> None:
        """Remove a store and its ledger.

        Raises:
            StoreError: it is no store of ours, something else lies in it or in its ledger (nothing is removed then),
                or another process is writing it.
        """
        root = storage_at(path)
        ledger = Ledger(root)
        try:
            record = ledger.read_if_there("metadata")
            recorded = record["attrs"].get("schema") if isinstance(record, dict) else ""
            if SCHEMA not in (recorded, schema_of(root.fetch(["zarr.json"])[0])):
                raise StoreError(f"{root} is not removed: nothing says that it is a {SCHEMA!r} store")
            with contextlib.ExitStack() as locked:
                locked.enter_context(ledger.storage.locked())
                root.own_files(STORE_FILES)
                ledger.clear()
                root.clear(STORE_FILES)
                if not HAS_FLOCK:  # Windows removes no file that is open
                    locked.close()
                if root.near:
                    ledger.storage.clear("lock")  # and the folder; elsewhere it goes by itself
        except OSError as error:
            raise disk_error(f"{root} cannot be removed", error) from error

    def _prepare(self, fixed: Metadata) -> None:
        """Make the store, or find out what of it holds, and withdraw the records that do not."""
        root, ledger, schema = self.storage, self._ledger, self.schema
        root.sweep()
        ledger.storage.sweep()
        exists = root.is_there()
        if exists:
            fixed.resume(root, ledger)
            self.committed, problems = sound_batches(root, ledger, batch_arrays(schema), schema.num_batches)
            complete = ledger.read_if_there("complete")
            if isinstance(complete, LedgerError) or (complete is not None and self.missing):
                ledger.remove(["complete"])  # first: a capture is not complete without its batches
            ledger.remove(problems)
        require_free_disk(root, schema, schema.num_batches - len(self.committed))
        if not exists:
            fixed.create(root, ledger)

    def share(self) -> None:
        """Let other processes join, which give `run` to `open`; StoreError if another writer was faster."""
        self.run = self._lock.share()

    @property
    def missing(self) -> list[int]:
        """Batches still to be written, ascending."""
        return [batch for batch in range(self.schema.num_batches) if batch not in self.committed]

    def add_attention(self, batch: int, layer: int, attention: Any) -> None:
        """Start to write one layer of one batch; returns while it is being written, or waits while others are.

        Args:
            batch: its number; rows `schema.batch_rows(batch)`.
            layer: its number.
            attention: post-softmax maps [image, head, query, key], or `Factors` with the encoding "qk"; float, NumPy
                or CPU tensors. They are read later: do not change them.

        Raises:
            StoreError: no such layer, another shape, the batch or the layer was written already, or the disk failed
                or is full, in which case the batches committed before are intact.
        """
        images = self._images(batch)
        if layer not in self._layers:
            kept = ", ".join(map(str, self._layers)) or "none: it keeps metrics only"
            raise StoreError(f"layer is {layer!r}; {self.path} keeps layers {kept}")
        if layer in self._files.get(batch, {}):
            raise StoreError(f"layer {layer} of batch {batch} of {self.path} was written already")
        parts = resolve_encoding(self.schema.encoding).split(self._layers[layer], attention)
        arrays = self._attention[layer]
        for name, (values, _) in parts.items():
            check_shape(f"{name or 'attention'} of layer {layer}", values, (images, *arrays[name].shape[1:]))
        self._files.setdefault(batch, {})[layer] = {
            arrays[name].file(batch): self._put(arrays[name], batch, values, precision)
            for name, (values, precision) in parts.items()
        }

    def commit(
        self,
        batch: int,
        metrics: Mapping[str, Any] | None = None,
        undefined: Mapping[str, Any] | None = None,
        logits: Any = None,
    ) -> None:
        """Commit a batch, every layer of which was added. Batches may come in any order, from one thread.

        Returns while it is being written; `finish` and `flush` wait.

        Args:
            batch: its number.
            metrics: name -> values [image, layer, head(, region)]; every metric of the schema.
            undefined: name -> number of rows without a value, integer [image, layer, head].
            logits: [image, class], if the schema has classes.

        Raises:
            StoreError: something is missing, unknown or of another shape; the batch is committed already; or
                the disk failed or is full, in which case the batches committed before are intact.
        """
        schema = self.schema
        images = self._images(batch)
        metrics, undefined = metrics or {}, undefined or {}
        check_names("layers of attention", self._files.get(batch, {}), self._layers)
        check_names("metrics", metrics, schema.metrics)
        check_names("undefined counts", undefined, schema.metrics)
        values: list[tuple[ArraySpec, Array]] = []
        if self._logits is not None:
            if logits is None:
                raise StoreError(f"logits are missing; expected [{images}, {schema.num_classes}]")
            scores = float32(logits, "logits")
            check_shape("logits", scores, (images, schema.num_classes))
            values.append((self._logits, scores))
        for name, params in schema.metrics.items():
            arrays = metric_arrays(schema, name, params, regions=name in schema.region_metrics)
            values += metric_values(name, arrays, images, metrics[name], undefined[name])

        files = {file: written for layer in self._files.pop(batch, {}).values() for file, written in layer.items()}
        for array, data in values:
            files[array.file(batch)] = self._put(array, batch, data, array.precision)
        self._submitted.add(batch)
        self._commit(batch_name(batch), batch, files, lambda: self.committed.add(batch))

    def _images(self, batch: int) -> int:
        """How many images there are in a batch that may still be written."""
        if not 0 <= batch < self.schema.num_batches:
            raise StoreError(f"batch is {batch}; this store has batches 0 to {self.schema.num_batches - 1}")
        if batch in self.committed or batch in self._submitted:
            raise StoreError(f"batch {batch} of {self.path} is committed already")
        rows = self.schema.batch_rows(batch)
        return int(rows.stop - rows.start)

    def finish(self) -> None:
        """Declare the capture complete: from now on a missing record is damage, not work to do.

        Raises:
            StoreError: batches are missing, or the disk failed or is full.
        """
        self.flush()
        self.committed.update(batch for batch in self.missing if self._ledger.exists(batch_name(batch)))  # by others
        if self.missing:
            raise StoreError(
                f"{self.path} is not complete: {len(self.missing)} of {self.schema.num_batches} batches are missing, "
                f"the first is {self.missing[0]}"
            )
        if not self._ledger.exists("complete"):
            try:
                self._ledger.write("complete", {"batches": self.schema.num_batches})
            except OSError as error:
                raise disk_error(f"{self.path} could not be finished", error) from error
