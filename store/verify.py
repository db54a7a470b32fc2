"""Is a store sound, and what is in it?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from store.arrays import ArraySpec, attention_arrays, batch_arrays, metric_arrays, read_attributes
from store.ledger import Ledger, LedgerError, batch_name, file_problem
from store.places import storage_at
from store.reader import AttentionStore
from store.schema import SCHEMA, StoreError, StoreSchema, metric_path
from store.storage import PARTIAL, Storage

__all__ = ["Damage", "info", "verify"]

# Where metrics computed later lie; what of them no record names is an interrupted run's.
_RESULT = re.compile(r"metrics/[^/]+/([0-9a-f]{16}/.+|zarr\.json)")


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged unit.

    Args:
        unit: path of the file, from the folder that holds the store, e.g. run.zarr/attention/layer_03/c.7.0.0.0.
        problem: what is wrong with it.
    """

    unit: str
    problem: str

    def __str__(self) -> str:
        return f"{self.unit} {self.problem}"


def verify(path: str | os.PathLike[str] | Storage) -> list[Damage]:
    """Check every byte of a store and its ledger.

    A store that is still being captured, or whose capture was killed, is sound: what no record names is not yet
    part of it. Results of metrics that were interrupted are passed over for the same reason.

    Returns:
        Every damaged unit; empty if the store is sound.

    Raises:
        StoreError: there is no store at that path.
    """
    root = storage_at(path)
    if not root.is_there():
        raise StoreError(f"there is no store at {root}")
    check = _Check(root)
    if not check.ledger.exists("metadata") and "schema" not in read_attributes(root):
        raise StoreError(f"{root} is not a {SCHEMA!r} store, and has no ledger at {check.ledger}")
    return check.run()


class _Check:
    def __init__(self, root: Storage) -> None:
        self.root = root
        self.ledger = Ledger(root)
        self.damages: list[Damage] = []
        self.named: set[str] = set()  # files of the store that some record names, or that are not yet committed

    def run(self) -> list[Damage]:
        metadata = self.record("metadata")
        if metadata is not None:
            self.files(metadata["files"])
        if self.ledger.exists("manifest"):
            self.record("manifest")
        complete = self.record("complete") if self.ledger.exists("complete") else None
        try:
            schema = AttentionStore.open(self.root).schema
        except StoreError as error:
            schema = None
            if not self.damages:  # a record of another version, whole
                self.damages.append(Damage(self.root.name, str(error)))
        if schema is not None:
            self.batches("", batch_arrays(schema), schema.num_batches, complete=complete is not None)
        else:
            self.batches("", None, 0, complete=False)
        self.results(schema)
        if schema is not None:
            self.strangers()
        return self.damages

    def record(self, name: str) -> dict[str, Any] | None:
        try:
            return self.ledger.read(name)
        except LedgerError:
            problem = "is damaged (its checksum does not match)" if self.ledger.exists(name) else "is missing"
            self.blame(self.ledger.storage, f"{name}.json", problem)
            return None

    def blame(self, storage: Storage, file: str, problem: str) -> None:
        self.damages.append(Damage(f"{storage.name}/{file}", problem))

    def files(self, files: dict[str, dict[str, Any]]) -> None:
        for file, entry in files.items():
            if file not in self.named and (problem := file_problem(self.root, file, entry)):
                self.blame(self.root, file, problem)
            self.named.add(file)

    def batches(self, folder: str, arrays: Iterable[ArraySpec] | None, batches: int, *, complete: bool) -> None:
        """Every batch record of a folder of the ledger; all of them must be there if `complete`."""
        there = [name for name in self.ledger.names(folder) if re.fullmatch(rf"{re.escape(folder)}batch_\d+", name)]
        expected = {folder + batch_name(batch): batch for batch in range(batches)}
        for name in dict.fromkeys([*there, *(expected if complete else ())]):
            record = self.record(name)
            if record is None:
                continue
            self.files(record["files"])
            if arrays is not None and (
                name not in expected or set(record["files"]) != {array.file(expected[name]) for array in arrays}
            ):
                self.blame(self.ledger.storage, f"{name}.json", "does not name the files of a batch of this store")
        if arrays is not None:
            self.named |= {array.file(batch) for array in arrays for batch in range(batches)}

    def results(self, schema: StoreSchema | None) -> None:
        for name in self.ledger.names("metrics"):
            folder, _, leaf = name.rpartition("/")
            if leaf != "metadata":
                continue
            record = self.record(name)
            if record is None:
                self.batches(f"{folder}/", None, 0, complete=False)
                continue
            self.files(record["files"])
            arrays = None
            if schema is not None:
                arrays = metric_arrays(schema, record["name"], record["params"], regions=record["regions"])
            self.batches(f"{folder}/", arrays, schema.num_batches if schema else 0, complete=False)

    def strangers(self) -> None:
        """Files that belong to nothing. Temporary ones are a killed writer's, and the next writer's to sweep."""
        for file in self.root.sizes():
            if file not in self.named and not _RESULT.fullmatch(file) and not file.endswith(PARTIAL):
                self.blame(self.root, file, "is not part of this store")
        records = {f"{name}.json" for name in self.ledger.names()}
        for file in self.ledger.storage.sizes():
            if file not in records and file != "lock" and not file.endswith(PARTIAL):
                self.blame(self.ledger.storage, file, "is not part of this ledger")


def info(path: str | os.PathLike[str] | Storage) -> dict[str, Any]:
    """What a store holds, as plain values.

    Returns:
        schema, created, code_version, model, dataset, precision, encoding; layers (layer, site, heads, tokens);
        images, classes, regions; batches {committed, total}; complete; attention {bytes, raw_bytes, ratio}
        of the committed batches; metrics (name, params, batches committed).

    Raises:
        StoreError: as `AttentionStore.open`.
    """
    store = AttentionStore.open(path)
    schema = store.schema
    ledger = Ledger(store.storage)
    committed = store.committed_batches
    attention = attention_arrays(schema)
    stored = sum(store.files(batch)[array.file(batch)]["bytes"] for array in attention for batch in committed)
    raw = sum(array.row_bytes for array in attention) * int(store.committed_images.sum())
    metrics = []
    for name in store.metric_names:
        for params in store.metric_params(name):
            if params == schema.metrics.get(name):
                batches = len(committed)
            else:
                records = ledger.names(metric_path(name, params))
                batches = sum(record.rpartition("/")[2].startswith("batch_") for record in records)
            metrics.append({"name": name, "params": params, "batches": batches})
    attrs = read_attributes(store.storage)
    return {
        "path": str(store.path),
        "schema": SCHEMA,
        "created": attrs["created"],
        "code_version": schema.code_version,
        "model": schema.model,
        "dataset": schema.dataset,
        "precision": schema.precision,
        "encoding": schema.encoding,
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
    }
