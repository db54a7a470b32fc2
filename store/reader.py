"""Reading a store: committed batches only, every byte checked, float32 out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from store.arrays import ArraySpec, batch_arrays, metric_arrays, open_array, read_attributes
from store.encodings import Array, resolve_encoding
from store.ledger import Ledger, LedgerError, batch_name, file_problem
from store.schema import (
    SCHEMA,
    StoreError,
    StoreSchema,
    layer_path,
    ledger_path,
    metric_path,
    store_path,
)

__all__ = ["AttentionStore", "check_files", "open_metadata"]

Rows = slice | Sequence[int] | Array


class AttentionStore:
    """A captured run. Use `AttentionStore.open`.

    A store is open while it is written, too: it shows the batches that were committed when it was opened.

    Attributes:
        path: the store.
        schema: shapes and provenance.
        layers: numbers of the layers, in depth order.
        sites: names of their modules.
        layouts: layer -> `TokenLayout.to_dict()`.
        image_ids: of the rows.
        labels: int64 [image]; −1 if unknown.
        class_names: names of the classes.
        regions: float32 [image, region, patch], or None.
        committed_images: bool [image], rows that may be read.
        complete: every batch is committed.
    """

    def __init__(self, path: Path, ledger: Ledger, attrs: Mapping[str, Any], image_ids: Sequence[str]) -> None:
        self.path = path
        self.schema = StoreSchema.from_attrs(attrs, image_ids)
        self.layers = tuple(layer.layer for layer in self.schema.layers)
        self.sites = tuple(layer.site for layer in self.schema.layers)
        self.layouts = {layer.layer: dict(layer.layout) for layer in self.schema.layers}
        self.image_ids = self.schema.image_ids
        self.class_names = tuple(attrs["class_names"])
        self._ledger = ledger
        self._arrays = {array.path: array for array in batch_arrays(self.schema)}
        self._records = _Records(ledger, self.schema)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store for reading.

        Raises:
            StoreError: no such store, not a store, another schema version, or damaged metadata (named).
        """
        root = store_path(path)
        try:
            ledger, attrs = open_metadata(root)
            return cls(root, ledger, attrs, [str(name) for name in _read_constant(root, "images/id")])
        except OSError as error:
            raise StoreError(f"{root} cannot be read: {error}") from error

    @cached_property
    def labels(self) -> Array:
        return _read_constant(self.path, "images/label")

    @cached_property
    def regions(self) -> Array | None:
        return _read_constant(self.path, "images/regions") if self.schema.regions else None

    @property
    def committed_batches(self) -> tuple[int, ...]:
        """Numbers of the committed batches, ascending."""
        return tuple(sorted(self._records.sound))

    @cached_property
    def committed_images(self) -> Array:
        committed = np.zeros(self.schema.num_images, dtype=bool)
        for batch in self.committed_batches:
            committed[self.schema.batch_rows(batch)] = True
        return committed

    @property
    def complete(self) -> bool:
        return bool(self.committed_images.all())

    @property
    def manifest(self) -> dict[str, Any] | None:
        """Every file of the data set with its status, if it was given.

        Raises:
            LedgerError: the record is damaged.
        """
        if not self._ledger.exists("manifest"):
            return None
        manifest: dict[str, Any] = self._ledger.read("manifest")["manifest"]
        return manifest

    def layout(self, layer: int) -> dict[str, int | bool]:
        """`TokenLayout.to_dict()` of a layer's maps."""
        self._check_layer(layer)
        return self.layouts[layer]

    def files(self, batch: int) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of the files of a committed batch, as the ledger has them.

        Raises:
            StoreError: the batch is not committed, or its record is damaged.
        """
        return self._records.files(batch)

    def read(self, layer: int, images: Rows = slice(None), heads: Rows = slice(None)) -> Array:
        """Post-softmax attention of one layer, float32 [image, head, query, key].

        Args:
            layer: one of `layers`.
            images, heads: a slice, or row numbers in any order.

        Raises:
            StoreError: no such layer or rows, no attention stored, rows of batches that are not committed, or a
                shard that is missing, truncated or damaged (array and batch are named).
        """
        return self._read_maps(layer, images, heads, as_stored=False)

    def read_stored(self, layer: int, images: Rows = slice(None), heads: Rows = slice(None)) -> Array:
        """The same maps in the precision they are stored in (float16): half the bytes of `read`, nothing widened.

        Raises:
            StoreError: as `read`.
        """
        return self._read_maps(layer, images, heads, as_stored=True)

    def _read_maps(self, layer: int, images: Rows, heads: Rows, *, as_stored: bool) -> Array:
        self._check_layer(layer)
        if not self.schema.encoding:
            raise StoreError(f"{self.path} holds metrics only; capture with the `store` sink to keep attention")
        array = self._arrays[layer_path(layer)]
        columns = _positions(heads, array.shape[1], "heads")
        encoding = resolve_encoding(self.schema.encoding)
        whole = np.array_equal(columns, np.arange(array.shape[1]))
        rows = _positions(images, self.schema.num_images, "images")
        maps = np.empty((rows.size, columns.size, *array.shape[2:]), dtype=encoding.dtype if as_stored else np.float32)
        for where, stored in self._batches(array, rows, self._records):
            chosen = stored if whole else stored[:, columns]
            if as_stored:
                maps[where] = chosen
            else:
                encoding.decode(chosen, maps[where])
        return maps

    def read_logits(self, images: Rows = slice(None)) -> Array:
        """The model's logits, float32 [image, class].

        Raises:
            StoreError: as `read`; or no logits are stored.
        """
        if not self.schema.num_classes:
            raise StoreError(f"{self.path} holds no logits")
        return self._gather(self._arrays["logits"], images, self._records)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics whose values are in the store: the capture's own, then those computed later, complete or not."""
        later = dict.fromkeys(name for name, _ in self._later())
        return tuple(dict.fromkeys([*self.schema.metrics, *later]))

    def metric_params(self, name: str) -> list[dict[str, Any]]:
        """Every set of parameters with which a metric is stored; the capture's own first."""
        own = [dict(self.schema.metrics[name])] if name in self.schema.metrics else []
        return own + [params for found, params in self._later() if found == name]

    def read_metric(
        self, name: str, images: Rows = slice(None), params: Mapping[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """A metric's values, float32 [image, layer, head(, region)], and its parameters.

        Args:
            params: which set of values, where there are several; the capture's own if None.

        Raises:
            StoreError: as `read`; or there is no such metric, or there are several and none is the capture's own.
        """
        chosen = self._choose(name, params)
        array, records = self._metric(name, chosen, "value")
        return self._gather(array, images, records), chosen

    def read_undefined(self, name: str, images: Rows = slice(None), params: Mapping[str, Any] | None = None) -> Array:
        """How many rows of each map had no value, int32 [image, layer, head]; −1 for heads a layer does not have.

        Raises:
            StoreError: as `read_metric`.
        """
        array, records = self._metric(name, self._choose(name, params), "undefined")
        return self._gather(array, images, records)

    def _check_layer(self, layer: int) -> None:
        if layer not in self.layouts:
            raise StoreError(f"layer is {layer!r}; {self.path} has layers {', '.join(map(str, self.layers))}")

    def _later(self) -> list[tuple[str, dict[str, Any]]]:
        """(name, params) of every metric computed after the capture."""
        found = []
        for record in self._ledger.names("metrics"):
            if record.endswith("/metadata"):
                content = self._ledger.read(record)
                found.append((str(content["name"]), dict(content["params"])))
        return found

    def _choose(self, name: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
        stored = self.metric_params(name)
        if not stored:
            raise StoreError(f"{self.path} has no metric {name!r}; it has {', '.join(self.metric_names) or 'none'}")
        if params is not None:
            if metric_path(name, params) not in {metric_path(name, each) for each in stored}:
                raise StoreError(f"{self.path} has no {name!r} with {dict(params)}; it has {stored}")
            return dict(params)
        if len(stored) > 1 and name not in self.schema.metrics:
            raise StoreError(f"{self.path} has {name!r} with several parameters: {stored}; say which by `params`")
        return stored[0]

    def _metric(self, name: str, params: dict[str, Any], part: str) -> tuple[ArraySpec, _Records]:
        group = metric_path(name, params)
        if f"{group}/{part}" in self._arrays:
            return self._arrays[f"{group}/{part}"], self._records
        record = self._ledger.read(f"{group}/metadata")
        check_files(self.path, record["files"])
        arrays = metric_arrays(self.schema, name, params, regions=bool(record["regions"]))
        array = next(array for array in arrays if array.path == f"{group}/{part}")
        return array, _Records(self._ledger, self.schema, f"{group}/")

    def _gather(self, array: ArraySpec, images: Rows, records: _Records) -> Array:
        rows = _positions(images, self.schema.num_images, "images")
        values = np.empty((rows.size, *array.shape[1:]), dtype=array.dtype)
        for where, stored in self._batches(array, rows, records):
            values[where] = stored
        return values

    def _batches(self, array: ArraySpec, rows: Array, records: _Records) -> Iterator[tuple[slice, Array]]:
        """Stored rows, in runs that lie in one batch: (the run in `rows`, what is stored there)."""
        source = open_array(self.path, array.path)
        batches = rows // self.schema.batch_size
        starts = np.flatnonzero(np.diff(batches, prepend=-1)).tolist()
        for start, stop in itertools.pairwise([*starts, rows.size]):
            batch = int(batches[start])
            file = array.file(batch)
            if problem := file_problem(self.path, file, records.files(batch)[file], content=False):
                raise StoreError(f"{array.path}, batch {batch}: {self.path / file} {problem}; capture this batch again")
            wanted = rows[start:stop]
            first, last = int(wanted.min()), int(wanted.max())
            try:
                stored = np.asarray(source[first : last + 1])
            except Exception as error:  # zarr and its codecs raise whatever they meet first
                raise StoreError(
                    f"{array.path}, batch {batch}: {self.path / file} is damaged ({error}); capture this batch again"
                ) from error
            in_order = wanted.size == last - first + 1 and bool((np.diff(wanted) == 1).all())
            yield slice(start, stop), stored if in_order else stored[wanted - first]


class _Records:
    """The committed batches of one capture or of one metric computed later."""

    def __init__(self, ledger: Ledger, schema: StoreSchema, folder: str = "") -> None:
        self._folder = folder
        self._ledger = ledger
        self._files: dict[int, dict[str, Any]] = {}
        self._damaged: dict[int, str] = {}
        for batch in range(schema.num_batches):
            name = folder + batch_name(batch)
            if ledger.exists(name):
                try:
                    self._files[batch] = ledger.read(name)["files"]
                except LedgerError as error:  # told when a row of this batch is asked for
                    self._damaged[batch] = str(error)

    @property
    def sound(self) -> set[int]:
        return set(self._files)

    def files(self, batch: int) -> dict[str, Any]:
        """The hashes of a committed batch's files.

        Raises:
            StoreError: the batch is not committed, or its record is damaged.
        """
        if batch in self._damaged:
            raise StoreError(f"batch {batch} cannot be trusted: {self._damaged[batch]}; write this batch again")
        if batch not in self._files:
            what = f"of {self._folder.rstrip('/')} " if self._folder else ""
            raise StoreError(
                f"batch {batch} {what}is not committed in {self._ledger.path}; resume the run that writes it"
            )
        return self._files[batch]


def open_metadata(root: Path) -> tuple[Ledger, dict[str, Any]]:
    """A store's ledger and root attributes, with every metadata file checked against its hash.

    Raises:
        StoreError: no such store, not a store, another schema version, or damaged metadata.
    """
    if not root.is_dir():
        raise StoreError(f"there is no store at {root}")
    ledger = Ledger(ledger_path(root))
    if not ledger.exists("metadata"):
        attrs = read_attributes(root)  # says so if this is no Zarr group at all
        found = f"its schema is {attrs['schema']!r}" if "schema" in attrs else "it has no attribute `schema`"
        raise StoreError(
            f"{root} has no ledger at {ledger.path} ({found}); expected a {SCHEMA!r} store with its ledger beside it"
        )
    record = ledger.read("metadata")
    found_schema = record["attrs"].get("schema")
    if found_schema != SCHEMA:
        raise StoreError(f"{root}: schema is {found_schema!r}; this version reads {SCHEMA!r}")
    check_files(root, record["files"])
    return ledger, read_attributes(root)  # as the record has them, but in the order they were declared


def check_files(root: Path, files: Mapping[str, dict[str, Any]]) -> None:
    """Compare metadata files with their hashes.

    Raises:
        StoreError: naming the first one that differs.
    """
    for file, entry in files.items():
        if problem := file_problem(root, file, entry):
            raise StoreError(f"{root / file} {problem}; resume the capture to rebuild it")


def _read_constant(root: Path, path: str) -> Array:
    return np.asarray(open_array(root, path)[...])


def _positions(selection: Rows, length: int, what: str) -> Array:
    try:
        positions = np.arange(length)[selection]
    except IndexError as error:
        raise StoreError(f"{what}: {error}; there are {length}") from error
    if positions.ndim != 1:
        raise StoreError(f"{what} must be a slice or a list of numbers, found {selection!r}")
    return positions
