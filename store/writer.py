"""Writing a capture: batch by batch, each committed whole or not at all, resumable after any death.

A batch is committed in this order: its files closed and fsynced, their directories fsynced, then its ledger
record by temporary file, fsync and rename. A killed run therefore leaves committed batches and, at worst,
files that no record names; the next run writes those again and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from store.arrays import ArraySpec, batch_arrays, require_free_disk
from store.commit import check_names, check_shape, commit_batch, metric_values, sound_batches, sweep
from store.encodings import Array, as_floats, resolve_encoding
from store.ledger import Ledger, LedgerError, batch_name
from store.metadata import Metadata
from store.schema import StoreError, StoreSchema, layer_path, ledger_path, metric_path, store_path

__all__ = ["AttentionWriter"]


class AttentionWriter:
    """The one writer of a store. Use `AttentionWriter.open`, as a context manager.

    Attributes:
        path: the store.
        schema: its schema.
        committed: numbers of the batches that are committed and whose files still match their hashes.
            A damaged or missing shard is simply not among them, hence written again.
    """

    def __init__(self, path: Path, schema: StoreSchema, ledger: Ledger, resources: contextlib.ExitStack) -> None:
        self.path = path
        self.schema = schema
        self.committed: set[int] = set()
        self._ledger = ledger
        self._resources = resources
        self._arrays = {array.path: array for array in batch_arrays(schema)}

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        schema: StoreSchema,
        *,
        labels: Sequence[int] | Array,
        class_names: Sequence[str],
        manifest: dict[str, Any] | None = None,
        regions: Array | None = None,
    ) -> Self:
        """Create a store, or resume one whose schema is equal in every field.

        Args:
            path: the store's folder; its ledger lies beside it.
            schema: shapes and provenance.
            labels: class index of every image, −1 if unknown.
            class_names: names of the classes.
            manifest: every file of the data set with its status, kept in the ledger.
            regions: float32 [image, region, patch], coverage of patches by the regions of `schema.regions`.

        Raises:
            StoreError: the store is being written by another process, is of another schema (the first key
                that differs, with what was found and expected), has damaged metadata that cannot be rebuilt, is
                not a store, or does not fit on the disk.
        """
        root = store_path(path)
        fixed = Metadata(schema, labels, class_names, manifest, regions)
        ledger = Ledger(ledger_path(root))
        exists = root.exists() and not (root.is_dir() and not any(root.iterdir()))
        if exists and not ledger.exists("metadata"):
            raise StoreError(
                f"{root} exists but has no ledger at {ledger.path}; "
                "give the path of a store with its ledger beside it, or one where nothing lies yet"
            )
        with contextlib.ExitStack() as resources:
            try:
                resources.enter_context(ledger.locked())
                writer = cls(root, schema, ledger, resources)
                sweep(root, ledger)
                if exists:
                    fixed.resume(root, ledger)
                    writer.committed = _drop_unsound(root, ledger, schema)
                require_free_disk(root, schema, schema.num_batches - len(writer.committed))
                if not exists:
                    fixed.create(root, ledger)
            except OSError as error:
                raise StoreError(f"{root} cannot be opened for writing: {error}") from error
            writer._resources = resources.pop_all()
        return writer

    def write_batch(
        self,
        batch: int,
        attention: Mapping[int, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        undefined: Mapping[str, Any] | None = None,
        logits: Any = None,
    ) -> None:
        """Write and commit everything of one batch. Batches may come in any order, one at a time, from any thread.

        Args:
            batch: its number; rows `schema.batch_rows(batch)`.
            attention: layer -> post-softmax maps [image, head, query, key], float, NumPy or CPU tensor;
                every layer of the schema, or nothing if the schema has no encoding.
            metrics: name -> values [image, layer, head(, region)]; every metric of the schema.
            undefined: name -> number of rows without a value, integer [image, layer, head].
            logits: [image, class], if the schema has classes.

        Raises:
            StoreError: something is missing, unknown or of another shape; the batch is committed already; or
                the disk failed or is full, in which case the batches committed before are intact.
        """
        schema = self.schema
        if not 0 <= batch < schema.num_batches:
            raise StoreError(f"batch is {batch}; this store has batches 0 to {schema.num_batches - 1}")
        if batch in self.committed:
            raise StoreError(f"batch {batch} of {self.path} is committed already")
        rows = schema.batch_rows(batch)
        images = rows.stop - rows.start

        layers = schema.layers if schema.encoding else ()
        attention, metrics, undefined = attention or {}, metrics or {}, undefined or {}
        check_names("layers of attention", attention, [layer.layer for layer in layers])
        check_names("metrics", metrics, schema.metrics)
        check_names("undefined counts", undefined, schema.metrics)

        values: list[tuple[ArraySpec, Array]] = []
        for layer in layers:
            array = self._arrays[layer_path(layer.layer)]
            maps = as_floats(attention[layer.layer], f"attention of layer {layer.layer}")
            check_shape(f"attention of layer {layer.layer}", maps, (images, *array.shape[1:]))
            values.append((array, resolve_encoding(schema.encoding).encode(maps)))
        if schema.num_classes:
            if logits is None:
                raise StoreError(f"logits are missing; expected [{images}, {schema.num_classes}]")
            scores = as_floats(logits, "logits").astype(np.float32, copy=False)
            check_shape("logits", scores, (images, schema.num_classes))
            values.append((self._arrays["logits"], scores))
        for name, params in schema.metrics.items():
            group = metric_path(name, params)
            value, counts = self._arrays[f"{group}/value"], self._arrays[f"{group}/undefined"]
            values += metric_values(name, images, (value, metrics[name]), (counts, undefined[name]))

        commit_batch(self.path, self._ledger, batch_name(batch), batch, rows, values)
        self.committed.add(batch)

    def finish(self) -> None:
        """Declare the capture complete: from now on a missing record is damage, not work to do.

        Raises:
            StoreError: batches are missing, or the disk failed or is full.
        """
        missing = [batch for batch in range(self.schema.num_batches) if batch not in self.committed]
        if missing:
            raise StoreError(
                f"{self.path} is not complete: {len(missing)} of {self.schema.num_batches} batches are missing, "
                f"the first is {missing[0]}"
            )
        if not self._ledger.exists("complete"):
            try:
                self._ledger.write("complete", {"batches": self.schema.num_batches})
            except OSError as error:
                raise StoreError(f"{self.path} could not be finished: {error}; run again to finish it") from error

    def close(self) -> None:
        """Let another writer in. What was committed stays."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_unsound(root: Path, ledger: Ledger, schema: StoreSchema) -> set[int]:
    """Withdraw the records that no longer hold; return the batches that do."""
    sound, problems = sound_batches(root, ledger, batch_arrays(schema), schema.num_batches)
    withdrawn = list(problems)
    if ledger.exists("complete"):
        try:
            ledger.read("complete")
            if len(sound) < schema.num_batches:
                withdrawn.insert(0, "complete")  # first: a capture is not complete without its batches
        except LedgerError:
            withdrawn.insert(0, "complete")
    ledger.remove(withdrawn)
    return sound
