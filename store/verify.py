"""Is a store sound, and what is in it?"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from store.arrays import ArraySpec, attention_arrays, batch_arrays, metric_arrays, read_attributes
from store.commit import STALE, attention_digest
from store.ledger import Ledger, LedgerError, batch_name, describe_bytes, file_problem
from store.places import storage_at
from store.reader import AttentionStore, require_store
from store.schema import SCHEMA, StoreError, StoreSchema
from store.shards import FileEntry, ShardError, glance_at_shard
from store.storage import PARTIAL, Storage

# Where metrics computed later lie; what of them no record names is an interrupted run's.
_RESULT = re.compile(r"metrics/[^/]+/([0-9a-f]{16}/.+|zarr\.json)")


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged unit."""

    unit: str  # path of the file, from the folder that holds the store, e.g. run.zarr/attention/layer_03/c.7.0.0.0
    problem: str

    def __str__(self) -> str:
        return f"{self.unit} {self.problem}"


def verify(path: str | os.PathLike[str] | Storage) -> list[Damage]:
    """Check every byte of a store and its ledger; gives every damaged unit, none if the store is sound.

    A store that is still being captured, or whose capture was killed, is sound: what no record names is not yet
    part of it. Results of metrics that were interrupted are passed over for the same reason. Of a store that is being
    written, what was committed when the check began is looked at; a batch that is withdrawn or written again
    meanwhile is no damage. Raises MissingStoreError if there is no store at that path.
    """
    root = storage_at(path)
    require_store(root, Ledger(root))
    return _Check(root).run()


class _Check:
    def __init__(self, root: Storage) -> None:
        self.root = root
        self.ledger = Ledger(root)
        self.damages: list[Damage] = []
        self.named: set[str] = set()  # files of the store that some record names, or that are not yet committed
        self.listed = self.ledger.storage.sizes()  # once: what is committed later is for the next check
        self.records = [file.removesuffix(".json") for file in self.listed if file.endswith(".json")]

    def run(self) -> list[Damage]:
        if "metadata" in self.records:
            metadata = self.unit("metadata")
            if metadata is not None and metadata.get("manifest") and "manifest" not in self.records:
                self.blame_record("manifest", "is missing")
        else:
            self.blame_record("metadata", "is missing")
        for name in ("manifest", "complete"):
            if name in self.records:
                self.unit(name)
        try:
            schema = AttentionStore.open(self.root).schema
        except StoreError as error:
            schema = None
            if not self.damages:  # a record of another version, whole
                self.damages.append(Damage(self.root.name, str(error)))
        self.batches("", schema, None if schema is None else batch_arrays(schema))
        self.absent(schema)
        for name in self.records:
            folder, _, leaf = name.rpartition("/")
            if folder.startswith("metrics/") and leaf == "metadata":
                record, arrays = self.unit(name), None
                if record is not None and schema is not None:
                    arrays = metric_arrays(schema, record["name"], record["params"], regions=record["regions"])
                self.batches(f"{folder}/", schema, arrays)
        if schema is not None:
            self.unnamed_files()
        return self.damages

    def blame(self, storage: Storage, file: str, problem: str) -> None:
        self.damages.append(Damage(f"{storage.name}/{file}", problem))

    def blame_record(self, name: str, problem: str) -> None:
        self.blame(self.ledger.storage, f"{name}.json", problem)

    def unit(self, name: str, check: Callable[[dict[str, Any]], str] | None = None) -> dict[str, Any] | None:
        """Check a record (also by what `check` says of it) and its files; None if it is damaged or was withdrawn.

        What is wrong is blamed if the record still stands then. One that was written again is looked at again.
        """
        while True:
            record = self.ledger.read_if_there(name)
            wrong, problem = {}, ""
            if isinstance(record, LedgerError):
                problem = record.what
            elif record is not None:
                files = record.get("files", {})
                wrong = {file: file_problem(self.root, file, files[file]) for file in files if file not in self.named}
                problem = check(record) if check is not None else ""
            if not (problem or any(wrong.values())) or str(self.ledger.read_if_there(name)) == str(record):
                break
        for file, what in wrong.items():
            if what:
                self.blame(self.root, file, what)
        if problem:
            self.blame_record(name, problem)
        if record is None or isinstance(record, LedgerError):
            return None
        self.named.update(record.get("files", {}))
        return record

    def batches(self, folder: str, schema: StoreSchema | None, arrays: Sequence[ArraySpec] | None) -> None:
        """Every batch record of a folder of the ledger."""
        batches = 0 if schema is None else schema.num_batches
        numbers = {folder + batch_name(batch): batch for batch in range(batches)}

        def problem(name: str, record: dict[str, Any]) -> str:
            if schema is None or arrays is None:
                return ""
            if name not in numbers or set(record["files"]) != {array.file(numbers[name]) for array in arrays}:
                return "does not name the files of a batch of this store"
            of_maps = self.ledger.read_if_there(batch_name(numbers[name])) if folder else None
            if isinstance(of_maps, dict):
                source = attention_digest(schema, numbers[name], of_maps["files"])
                return "" if record["sources"][0] == source else f"{STALE}; measure it again"
            return ""

        for name in self.records:
            if re.fullmatch(rf"{re.escape(folder)}batch_\d+", name):
                self.unit(name, partial(problem, name))
        if arrays is not None:
            self.named |= {array.file(batch) for array in arrays for batch in range(batches)}

    def absent(self, schema: StoreSchema | None) -> None:
        """Every batch's record must be there if the capture is declared complete, and still is."""
        for batch in range(schema.num_batches if schema is not None and "complete" in self.records else 0):
            name = batch_name(batch)
            if name not in self.records and self.ledger.exists("complete") and not self.ledger.exists(name):
                self.blame_record(name, "is missing")

    def unnamed_files(self) -> None:
        """Files that belong to nothing. Temporary ones are a killed writer's, and the next writer's to sweep."""
        for file in self.root.sizes():
            if file not in self.named and not _RESULT.fullmatch(file) and not file.endswith(PARTIAL):
                self.blame(self.root, file, "is not part of this store")
        for file in self.listed:
            if not file.endswith((".json", PARTIAL)) and file != "lock":
                self.blame(self.ledger.storage, file, "is not part of this ledger")


def content_digest(path: str | os.PathLike[str] | Storage) -> str:
    """SHA-256 of what a capture has left, as it lies there now: its ledger and its files, by name and content.

    Of a shard, the index and the chunks' checksums stand for the content: reading all maps would take longer than what
    they were captured for. A change inside a chunk is found by whoever reads it. Metrics computed later are no part.
    """
    root = storage_at(path)
    ledger = Ledger(root)
    total = hashlib.sha256()
    entries: dict[str, FileEntry] = {}
    names = [name for name in ledger.names() if not name.startswith("metrics/")]
    for name, record in ledger.read_all(names).items():
        total.update(f"{name}\0{record}\0".encode())
        entries |= record.get("files", {}) if isinstance(record, dict) else {}
    for file, size in root.sizes().items():
        entry = entries.get(file)
        if entry is not None or (not file.startswith("metrics/") and not file.endswith(PARTIAL)):
            total.update(f"{file}\0{size if entry is None else _content(root, file, entry)}\0".encode())
    return total.hexdigest()


def _content(root: Storage, file: str, entry: FileEntry) -> str:
    try:
        if "chunks" not in entry:
            return str(describe_bytes(root.read(file))["sha256"])
        return glance_at_shard(root, file, entry["chunks"])
    except (ShardError, FileNotFoundError) as error:
        return str(error)


def info(path: str | os.PathLike[str] | Storage) -> dict[str, Any]:
    """What a store holds, as plain values.

    Returns:
        schema, created, code_version, model, dataset, precision, encoding; layers (layer, site, heads, tokens);
        images, classes, regions; batches {committed, total}; complete; attention {bytes, raw_bytes, ratio}
        of the committed batches; metrics (name, params, batches that may be read); damaged (what records cannot be
        trusted, a sentence each).

    Raises:
        StoreError: as `AttentionStore.open`.
    """
    store = AttentionStore.open(path)
    schema = store.schema
    committed = store.committed_batches
    attention = attention_arrays(schema)
    stored = sum(store.files(batch)[array.file(batch)]["bytes"] for array in attention for batch in committed)
    raw = sum(array.row_bytes for array in attention) * int(store.committed_images.sum())
    metrics, damaged = [], [*store.damaged_batches, *store.damaged_metrics]
    for name in store.metric_names:
        for params in store.metric_params(name):
            batches = 0
            try:
                batches = len(store.metric_batches(name, params))
            except StoreError as error:  # of this metric alone
                damaged.append(str(error))
            metrics.append({"name": name, "params": params, "batches": batches})
    attrs = read_attributes(store.storage)
    return {
        "path": str(store.path),
        "schema": SCHEMA,
        "created": attrs["created"],
        **{name: getattr(schema, name) for name in ("code_version", "model", "dataset", "precision", "encoding")},
        "layers": [
            {"layer": layer.layer, "site": layer.site, "heads": layer.heads, "tokens": layer.tokens}
            for layer in schema.layers
        ],
        "images": schema.num_images,
        "classes": list(store.class_names),
        "regions": list(schema.regions),
        "batches": {"committed": len(committed), "total": schema.num_batches},
        "complete": store.complete,
        "attention": {"bytes": stored, "raw_bytes": raw, "ratio": stored / raw if raw else None},
        "metrics": metrics,
        "damaged": damaged,
    }
