"""What is fixed before the first batch: groups, arrays, image ids, labels, regions. Created, compared, rebuilt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from store.arrays import (
    batch_arrays,
    create_arrays,
    create_constant,
    create_group,
    create_metric_group,
    layer_attributes,
    read_attributes,
    read_constant,
    shared_biases,
)
from store.commit import check_names, check_shape, float32
from store.encodings import bias_dims, shared_bias
from store.ledger import Ledger, LedgerError, describe_bytes, file_problems
from store.local import LocalStorage
from store.precisions import Array
from store.schema import SCHEMA, DamagedStoreError, OtherRunError, StoreError, StoreSchema, layer_path, ledger_name
from store.storage import Storage


class Metadata:
    """Everything about a store that is fixed before its first batch, and how it is written, compared, rebuilt."""

    def __init__(
        self,
        schema: StoreSchema,
        labels: Sequence[int] | Array,
        class_names: Sequence[str],
        manifest: dict[str, Any] | None,
        regions: Array | None,
        biases: Mapping[int, Any] | None,
    ) -> None:
        self.schema = schema
        self.labels = np.asarray(labels, dtype=np.int64)
        check_shape("labels", self.labels, (schema.num_images,))
        self.regions = None if regions is None else float32(regions, "regions")
        if (self.regions is None) != (not schema.regions):
            raise StoreError(f"schema.regions is {list(schema.regions)}, but regions are given: {regions is not None}")
        if self.regions is not None:
            shape = (schema.num_images, len(schema.regions))
            if self.regions.ndim != 3 or self.regions.shape[:2] != shape:
                raise StoreError(f"regions has shape {self.regions.shape}; expected {shape} and the patches")
        check_names("layers with a shared bias", biases or {}, shared_biases(schema))
        # path -> dimensions and values of the biases that all images share
        self.biases = {
            f"{layer_path(layer.layer)}/bias": (bias_dims(layer), shared_bias(layer, (biases or {})[layer.layer]))
            for layer in schema.layers
            if layer.layer in shared_biases(schema)
        }
        try:
            self.manifest = json.loads(json.dumps(manifest, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StoreError(f"the manifest cannot be written as JSON: {error}") from error
        self.attrs = {**schema.to_attrs(), "class_names": [str(name) for name in class_names]}

    def create(self, root: Storage, ledger: Ledger) -> None:
        """Make the store. It appears under its name only when all metadata are on disk and in the ledger."""
        ledger.clear()
        with root.skeleton() as skeleton:
            self._build(skeleton, datetime.now(UTC).isoformat(timespec="microseconds"))
            record = self._record(skeleton)

            def commit() -> None:
                ledger.write("metadata", record)
                if self.manifest is not None:
                    ledger.write("manifest", {"manifest": self.manifest})

            root.adopt(skeleton, commit)

    def resume(self, root: Storage, ledger: Ledger) -> None:
        """Check that the store is the one that would be created, and rebuild metadata that were damaged."""
        try:
            record: dict[str, Any] | None = ledger.read("metadata")
        except LedgerError:
            record = None
        attrs = read_attributes(root) if record is None else record["attrs"]
        self._compare_attributes(root, attrs)
        damaged = {} if record is None else file_problems(root, record["files"])
        if record is None or damaged:
            self._repair(root, ledger, record, damaged, str(attrs.get("created")))
        self._compare_arrays(root)
        self._compare_manifest(ledger)

    def compare(self, root: Storage, ledger: Ledger) -> None:
        """Check that the store is the one that would be created, as another process has just created or resumed it."""
        self._compare_attributes(root, ledger.read("metadata")["attrs"])
        self._compare_arrays(root)

    def _repair(
        self, root: Storage, ledger: Ledger, record: dict[str, Any] | None, damaged: dict[str, str], created: str
    ) -> None:
        """Write the ledger's damaged record, or damaged files, again, if what is left is as this capture makes it."""
        with root.skeleton() as skeleton:
            self._build(skeleton, created)
            rebuilt = self._record(skeleton)
            if record is None:
                for file, problem in file_problems(root, rebuilt["files"]).items():
                    raise DamagedStoreError(
                        f"ledger record {ledger.where('metadata')} is damaged and cannot be rebuilt: "
                        f"{root.where(file)} {problem.replace('were committed', 'were expected')}; capture again into "
                        "another store"
                    )
                ledger.write("metadata", rebuilt)
                return
            for file, problem in damaged.items():
                if rebuilt["files"].get(file) != record["files"][file]:
                    raise DamagedStoreError(
                        f"{root.where(file)} {problem} and cannot be rebuilt from this capture's settings; "
                        "restore it from a copy or capture again into another store"
                    )
                root.replace(file, (skeleton / file).read_bytes())

    def _build(self, skeleton: Path, created: str) -> None:
        """All metadata in a folder. Depends on nothing but the arguments."""
        schema = self.schema
        create_group(skeleton, "", {**self.attrs, "created": created})
        for group in ("images", "metrics", *(("attention",) if schema.encoding else ())):
            create_group(skeleton, group)
        for name, params in schema.metrics.items():
            create_metric_group(skeleton, name, params, regions=name in schema.region_metrics)
        for layer in schema.layers:
            if layer.factors is not None:
                create_group(skeleton, layer_path(layer.layer), layer_attributes(layer))
        create_arrays(skeleton, batch_arrays(schema))
        for path, (dims, values) in self.biases.items():
            create_constant(skeleton, path, dims, values, {})
        create_constant(skeleton, "images/id", ("image",), np.array(schema.image_ids, dtype=object), {})
        create_constant(skeleton, "images/label", ("image",), self.labels, {})
        if self.regions is not None:
            names = {"regions": list(schema.regions)}
            create_constant(skeleton, "images/regions", ("image", "region", "patch"), self.regions, names)

    def _record(self, skeleton: Path) -> dict[str, Any]:
        """The ledger's record of the metadata in a folder."""
        built = LocalStorage(skeleton)
        return {
            "attrs": read_attributes(built),
            "files": {file: describe_bytes(built.read(file)) for file in built.sizes()},
            "manifest": self.manifest is not None,
        }

    def _compare_attributes(self, root: Storage, recorded: Mapping[str, Any]) -> None:
        if recorded.get("schema") != SCHEMA:
            raise StoreError(f"{root}: schema is {recorded.get('schema')!r}; this version writes {SCHEMA!r}")
        for key in ("encoding", *self.attrs):  # layers follow from it
            expected = self.attrs[key]
            if recorded.get(key) != expected:
                where, ours, theirs = _first_difference(key, expected, recorded.get(key))
                raise _another(root, f"{where}: found {_shown(theirs)}, expected {_shown(ours)}")

    def _compare_arrays(self, root: Storage) -> None:
        expected: dict[str, Array] = {
            "images/id": np.array(self.schema.image_ids, dtype=object),
            "images/label": self.labels,
        }
        if self.regions is not None:
            expected["images/regions"] = self.regions
        for path, ours in expected.items():
            theirs = read_constant(root, path)
            if theirs.shape != ours.shape:
                raise _another(root, f"shape of {path}: found {theirs.shape}, expected {ours.shape}")
            same = (theirs == ours) | ((theirs != theirs) & (ours != ours))  # NaN is the same as NaN
            differ = np.flatnonzero(~same.reshape(len(ours), -1).all(axis=1))
            if differ.size:
                row = int(differ[0])
                values = f" is {theirs[row]}, expected {ours[row]}" if ours.ndim == 1 else " differs"
                raise _another(root, f"{path}: row {row}{values}")

        for path, (_, ours) in self.biases.items():
            if not np.array_equal(read_constant(root, path), ours):
                raise _another(root, f"bias in {path}")

    def _compare_manifest(self, ledger: Ledger) -> None:
        if self.manifest is None:
            return
        try:
            theirs = ledger.read("manifest")["manifest"]
        except LedgerError:  # damaged or never given: this capture's images were just found to be the same
            ledger.write("manifest", {"manifest": self.manifest})
            return
        if theirs != self.manifest:
            where, ours, other = _first_difference("manifest", self.manifest, theirs)
            raise OtherRunError(f"{ledger.where('manifest')}: {where} is {other!r}; expected {ours!r}")


def _first_difference(key: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Path of the first place where two plain values differ, and what stands there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for inner in [*ours, *(name for name in theirs if name not in ours)]:
            if ours.get(inner) != theirs.get(inner):
                return _first_difference(f"{key}.{inner}", ours.get(inner), theirs.get(inner))
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return f"number of {key}", len(ours), len(theirs)
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine != other:
                return _first_difference(f"{key}[{index}]", mine, other)
    return key, ours, theirs


def _another(root: Storage, what: str) -> OtherRunError:
    """The error of a capture that goes on with a store of another: `what` differs."""
    ledger = ledger_name(root.name)
    return OtherRunError(
        f"{root} was captured with another {what}; capture into another store, or delete this one and its {ledger}"
    )


def _shown(value: Any) -> str:
    """A value in a sentence; of a hash, enough to tell it from another."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:13]}…"
