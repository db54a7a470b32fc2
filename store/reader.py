"""Reading a store: committed batches only, every byte checked, chunks decoded in parallel, float32 out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import numpy as np

from store.arrays import ArraySpec, batch_arrays, layer_arrays, metric_arrays, read_attributes, read_constant
from store.commit import attention_digest
from store.encodings import Factors, softmax_maps, with_all_axes
from store.ledger import Ledger, LedgerError, file_problems
from store.places import storage_at
from store.precisions import Array, RoundedArray
from store.removal import schema_of
from store.rows import Records, Rows, positions, read_rows
from store.schema import (
    SCHEMA,
    MissingStoreError,
    StoreError,
    StoreSchema,
    UnfinishedStoreError,
    layer_path,
    ledger_name,
    metric_path,
)
from store.shards import FileEntry
from store.storage import Location, Storage


class AttentionStore:
    """A captured run. Use `AttentionStore.open`.

    A store is open while it is written, too: it shows what was committed when it was first asked, until `refresh`. Rows
    (`images`, `heads`) are a slice, or numbers in any order. Every `read…` raises StoreError, which names array and
    batch: no such layer or rows, nothing of that kind stored, batches that are not committed, a file that is missing or
    damaged.

    Attributes:
        path: the store, or its URL.
        schema: shapes and provenance.
        layers: numbers of the layers, in depth order.
        sites: names of their modules.
        layouts: layer -> `TokenLayout.to_dict()`.
        image_ids: of the rows.
        labels: int64 [image]; −1 if unknown.
        class_names: names of the classes.
        regions: float32 [image, region, patch] on the first layer's grid, or None.
        committed_images: bool [image], rows that may be read.
        complete: every batch is committed.
        ledger: its records.
        metadata_files: its metadata files' entries there.
    """

    def __init__(
        self, storage: Storage, ledger: Ledger, files: Mapping[str, FileEntry], attrs: Mapping[str, Any]
    ) -> None:
        self.path: Location = storage.location
        self.storage = storage
        self.metadata_files = files
        self.schema = StoreSchema.from_attrs(attrs, [str(name) for name in read_constant(storage, "images/id")])
        self._layers = {layer.layer: layer for layer in self.schema.layers}
        self.layers = tuple(self._layers)
        self.sites = tuple(layer.site for layer in self.schema.layers)
        self.layouts = {layer.layer: dict(layer.layout) for layer in self.schema.layers}
        self.image_ids = self.schema.image_ids
        self.class_names = tuple(attrs["class_names"])
        self.ledger = ledger
        self._arrays = {array.path: array for array in batch_arrays(self.schema)}
        self._records = Records(ledger, self.schema)
        self._biases: dict[int, Array] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str] | Storage) -> Self:
        """Open a store for reading.

        Args:
            path: its folder, or a URL: s3://, gs://, az://, https:// (with the extra `cloud`), file://.

        Raises:
            UnfinishedStoreError: an import that was not finished.
            MissingStoreError: no such store.
            StoreError: not a store, another schema version, or damaged metadata (named).
        """
        root = storage_at(path)
        try:
            store = cls(root, *open_metadata(root))
            if store.schema.whole and not store.ledger.exists("complete"):
                raise UnfinishedStoreError(f"{root} is an import that was not finished; import its file again")
            return store
        except OSError as error:
            raise StoreError(f"{root} cannot be read: {error}") from error

    @cached_property
    def labels(self) -> Array:
        return self._constant("images/label")

    @cached_property
    def regions(self) -> Array | None:
        return self._constant("images/regions") if self.schema.regions else None

    def _constant(self, path: str) -> Array:
        """A whole small array that never changes, compared with its hashes as it is read."""
        files = {file: entry for file, entry in self.metadata_files.items() if file.startswith(f"{path}/")}
        check_files(self.storage, files, CAPTURE_AGAIN)
        return read_constant(self.storage, path)

    @property
    def committed_batches(self) -> tuple[int, ...]:
        """Numbers of the committed batches, ascending."""
        return tuple(sorted(self._records.sound))

    @property
    def damaged_batches(self) -> tuple[str, ...]:
        """What is wrong with records of batches that were committed once, a sentence each."""
        return self._records.damaged

    def refresh(self) -> None:
        """Look again at which batches and metrics are there; StoreError if the store was captured again since."""
        if Ledger(self.storage).capture != self.digest:
            raise StoreError(f"{self.path} was captured again since it was opened; open it again")
        self._records = Records(self.ledger, self.schema)
        self.__dict__.pop("_later", None)

    @property
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
        """Every file of the data set with its status, if it was given; LedgerError if the record is damaged or lost."""
        if not self.ledger.exists("manifest") and not self.ledger.read("metadata").get("manifest"):
            return None
        manifest: dict[str, Any] = self.ledger.read("manifest")["manifest"]
        return manifest

    @property
    def digest(self) -> str:
        """SHA-256 of the record of this capture's metadata: what tells it from every other capture."""
        return self.ledger.capture

    def attention_digest(self, batch: int) -> str:
        """SHA-256 over the hashes of a batch's attention, to which values are tied; "" if it is not committed."""
        if batch not in self._records.sound:
            return ""
        return attention_digest(self.schema, batch, self._records.files(batch))

    def layout(self, layer: int) -> dict[str, int | bool]:
        """`TokenLayout.to_dict()` of a layer's maps."""
        self._check_layer(layer)
        return self.layouts[layer]

    def files(self, batch: int) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of a committed batch's files, as the ledger has them; StoreError if it is not committed."""
        return self._records.files(batch)

    def precision(self, layer: int) -> str:
        """Number format of what `read_stored` or `read_factors` gives: float16, or bfloat16 (as uint16 bits)."""
        arrays = self._layer_arrays(layer)
        return arrays["query" if "query" in arrays else ""].precision

    def read(self, layer: int, images: Rows = slice(None), heads: Rows = slice(None)) -> Array:
        """Post-softmax attention of one layer, float32 [image, head, query, key], whatever its encoding.

        Of maps kept in 16 bits, the array's `precision` names these ("float16", "bfloat16"), and
        `kernels.measure_attention` allows rows the sums that this rounding explains.
        """
        arrays = self._layer_arrays(layer)
        if "query" not in arrays:
            maps = self._rows(arrays[""], images, columns=heads, wide=True)
            return RoundedArray.of(maps, self.precision(layer))
        factors = self.read_factors(layer, images, heads)
        tokens = arrays["query"].shape[2]
        maps = np.empty((*factors.query.shape[:2], tokens, tokens), dtype=np.float32)
        softmax_maps(factors, self.precision(layer), maps)
        return maps

    def read_stored(self, layer: int, images: Rows = slice(None), heads: Rows = slice(None)) -> Array:
        """The same maps in the precision they are stored in: half the bytes of `read`, nothing widened."""
        arrays = self._layer_arrays(layer)
        if "query" in arrays:
            raise StoreError(f"{self.path} keeps query and key, not maps; use read_factors, or read for float32 maps")
        return self._rows(arrays[""], images, columns=heads)

    def read_factors(self, layer: int, images: Rows = slice(None), heads: Rows = slice(None)) -> Factors:
        """Query and key of one layer, [image, head, token, head_dim] as they are stored, with scale and bias.

        The bias is float32 or boolean, [(image,) head, query, key] with 1 where it is constant along an axis.
        """
        return self._factors(layer, images, heads)

    def read_here(self, layer: int, images: slice, place: str = "") -> Array | Factors:
        """What is stored of some images, read and decoded by the calling thread alone, into memory of its own.

        For threads that each use what they have decoded while it is in their cache: maps as `read_stored` has them, or
        `Factors` as `read_factors`. Fresh pages would cost half as much as decoding into them.

        Args:
            images: rows; whole chunks (`chunk_rows`) are decoded in place, parts of one by way of a copy.
            place: name of the memory; the thread's next call with it overwrites what this one gave.
        """
        arrays = self._layer_arrays(layer)
        if "query" in arrays:
            return self._factors(layer, images, slice(None), place)
        return self._rows(arrays[""], images, place=place)

    def chunk_rows(self, layer: int) -> int:
        """Images that are compressed together."""
        return next(iter(self._layer_arrays(layer).values())).chunk

    def _layer_arrays(self, layer: int) -> dict[str, ArraySpec]:
        """The arrays that keep a layer, by the name of the part."""
        self._check_layer(layer)
        if not self.schema.encoding:
            raise StoreError(f"{self.path} holds metrics only; capture with the `store` sink to keep attention")
        return layer_arrays(self.schema, self._layers[layer])

    def _factors(self, layer: int, images: Rows, heads: Rows, place: str | None = None) -> Factors:
        arrays, described = self._layer_arrays(layer), self._layers[layer]
        fixed = described.factors
        if fixed is None:
            raise StoreError(f"{self.path} keeps maps, not query and key; use read or read_stored")
        stored = {}
        for name, array in arrays.items():
            columns = slice(None) if name == "bias" else heads
            memory = None if place is None else f"{place}/{name}"
            stored[name] = self._rows(array, images, columns=columns, place=memory)
        if fixed.bias == "shared":
            if layer not in self._biases:
                self._biases[layer] = self._constant(f"{layer_path(layer)}/bias")
            stored["bias"] = self._biases[layer]
        bias = with_all_axes(described, stored["bias"]) if fixed.bias else None
        if bias is not None and bias.shape[-3] > 1:
            bias = bias[..., positions(heads, described.heads, "heads"), :, :]
        return Factors(query=stored["query"], key=stored["key"], scale=fixed.scale, bias=bias)

    def read_logits(self, images: Rows = slice(None)) -> Array:
        """The model's logits, float32 [image, class]."""
        if not self.schema.num_classes:
            raise StoreError(f"{self.path} holds no logits")
        return self._rows(self._arrays["logits"], images)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Metrics whose values are in the store: the capture's own, then those computed later, complete or not."""
        return tuple(dict.fromkeys([*self.schema.metrics, *(name for name, _ in self._later[0])]))

    def metric_params(self, name: str) -> list[dict[str, Any]]:
        """Every set of parameters with which a metric is stored; the capture's own first."""
        captured = [dict(self.schema.metrics[name])] if name in self.schema.metrics else []
        return captured + [params for metric, params in self._later[0] if metric == name]

    def metric_batches(self, name: str, params: Mapping[str, Any]) -> tuple[int, ...]:
        """Numbers of the batches whose values of a metric may be read, ascending."""
        return tuple(sorted(self._metric(name, self._choose(name, params), "value")[1].sound))

    @property
    def damaged_metrics(self) -> tuple[str, ...]:
        """What is wrong with metrics computed later whose parameters cannot be read, a sentence each."""
        return tuple(f"{error}; {MEASURE_AGAIN}" for error in self._later[1].values())

    def read_metric(
        self, name: str, images: Rows = slice(None), params: Mapping[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """A metric's values, float32 [image, layer, head(, region)], and its parameters.

        Args:
            params: which set of values, where there are several; the capture's own if None.
        """
        chosen = self._choose(name, params)
        array, records = self._metric(name, chosen, "value")
        return self._rows(array, images, records), chosen

    def read_undefined(self, name: str, images: Rows = slice(None), params: Mapping[str, Any] | None = None) -> Array:
        """How many rows of each map had no value, int32 [image, layer, head]; −1 for heads a layer does not have."""
        array, records = self._metric(name, self._choose(name, params), "undefined")
        return self._rows(array, images, records)

    def _check_layer(self, layer: int) -> None:
        if layer not in self.layouts:
            raise StoreError(f"layer is {layer!r}; {self.path} has layers {', '.join(map(str, self.layers))}")

    @cached_property
    def _later(self) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, LedgerError]]:
        """(name, params) of every metric computed after the capture, and what is wrong with the records of others."""
        try:
            records = self.ledger.read_later()
        except OSError as error:  # a web server lists nothing
            raise StoreError(f"{self.ledger} cannot be searched for metrics computed later: {error}") from error
        damaged = {name: record for name, record in records.items() if isinstance(record, LedgerError)}
        sound = [record for record in records.values() if not isinstance(record, LedgerError)]
        return [(str(record["name"]), dict(record["params"])) for record in sound], damaged

    def _choose(self, name: str, params: Mapping[str, Any] | None) -> dict[str, Any]:
        captured = self.schema.metrics.get(name)
        if captured is not None and params in (None, captured):
            return dict(captured)
        damaged = self._later[1]
        folder = f"metrics/{name}/" if params is None else f"{metric_path(name, params)}/"
        if wrong := next((error for record, error in damaged.items() if record.startswith(folder)), None):
            raise StoreError(f"{wrong}; {MEASURE_AGAIN}")
        stored = self.metric_params(name)
        if not stored:
            raise StoreError(f"{self.path} has no metric {name!r}; it has {', '.join(self.metric_names) or 'none'}")
        if params is not None:
            if metric_path(name, params) not in {metric_path(name, each) for each in stored}:
                raise StoreError(f"{self.path} has no {name!r} with {dict(params)}; it has {stored}")
            return dict(params)
        if len(stored) > 1:
            raise StoreError(f"{self.path} has {name!r} with several parameters: {stored}; say which by `params`")
        return stored[0]

    def _metric(self, name: str, params: dict[str, Any], part: str) -> tuple[ArraySpec, Records]:
        group = metric_path(name, params)
        if f"{group}/{part}" in self._arrays:
            return self._arrays[f"{group}/{part}"], self._records
        record = self.ledger.read(f"{group}/metadata")
        check_files(self.storage, record["files"], MEASURE_AGAIN)
        arrays = metric_arrays(self.schema, name, params, regions=bool(record["regions"]))
        array = next(array for array in arrays if array.path == f"{group}/{part}")
        return array, Records(self.ledger, self.schema, f"{group}/", self.attention_digest)

    def _rows(self, array: ArraySpec, images: Rows, records: Records | None = None, **options: Any) -> Array:
        return read_rows(self.storage, array, images, records or self._records, **options)


def require_store(root: Storage, ledger: Ledger) -> None:
    """Raises MissingStoreError, or StoreError for what has no ledger and does not say that it is one: sample maps, …"""
    if not root.is_there():
        raise MissingStoreError(f"there is no store at {root}")
    if ledger.exists("metadata"):
        return
    schema = schema_of(root.fetch(["zarr.json"])[0])
    if schema != SCHEMA:
        what = f"its schema is {schema!r}" if schema else "it has no attribute `schema`"
        raise StoreError(
            f"{root} is no store of attention ({what}) and has no ledger {ledger_name(root.name)} beside it; "
            f"expected a {SCHEMA!r} store, as a capture writes it"
        )


def open_metadata(root: Storage) -> tuple[Ledger, dict[str, FileEntry], dict[str, Any]]:
    """A store's ledger, its metadata files' entries there and root attributes, every file checked against its hash."""
    ledger = Ledger(root)
    require_store(root, ledger)
    record = ledger.read_if_there("metadata")
    if record is None:
        raise StoreError(
            f"{root} has no ledger at {ledger}; a store that is moved or renamed takes its ledger along, as "
            f"{ledger_name(root.name)} beside it: put it there, or delete the store and capture again"
        )
    if isinstance(record, LedgerError):
        raise StoreError(f"{record}; {CAPTURE_AGAIN}") from record
    schema = record["attrs"].get("schema")
    if schema != SCHEMA:
        raise StoreError(f"{root}: schema is {schema!r}; this version reads {SCHEMA!r}")
    check_files(root, record["files"], CAPTURE_AGAIN)
    # The attributes are as the record has them, but in the order they were declared.
    return ledger, record["files"], read_attributes(root)


CAPTURE_AGAIN, MEASURE_AGAIN = "resume the capture to rebuild it", "measure it again"


def check_files(root: Storage, files: Mapping[str, FileEntry], remedy: str) -> None:
    """Compare metadata files with their hashes; StoreError names the first that differs, and the remedy."""
    for file, problem in file_problems(root, files).items():
        raise StoreError(f"{root.where(file)} {problem}; {remedy}")
