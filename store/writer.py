"""Writing a capture: batch by batch, each committed whole or not at all, resumable after any death.

A batch is committed in this order: its files closed and fsynced, their directories fsynced, then its ledger
record by temporary file, fsync and rename. A killed run therefore leaves committed batches and, at worst,
files that no record names; the next run writes those again and ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from store.arrays import (
    ArraySpec,
    batch_arrays,
    create_arrays,
    create_constant,
    create_group,
    create_metric_group,
    open_array,
    read_attributes,
    require_free_disk,
    store_files,
)
from store.encodings import Array, as_floats, resolve_encoding
from store.ledger import (
    PARTIAL,
    Ledger,
    LedgerError,
    batch_name,
    describe_file,
    file_problem,
    sync_directory,
)
from store.schema import SCHEMA, StoreError, StoreSchema, layer_path, ledger_path, metric_path, store_path

__all__ = ["AttentionWriter", "commit_batch", "metric_values", "sound_batches", "sweep"]


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
        fixed = _Fixed(schema, labels, class_names, manifest, regions)
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
        """Write and commit everything of one batch.

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
        _same_names("layers of attention", attention, [layer.layer for layer in layers])
        _same_names("metrics", metrics, schema.metrics)
        _same_names("undefined counts", undefined, schema.metrics)

        values: list[tuple[ArraySpec, Array]] = []
        for layer in layers:
            array = self._arrays[layer_path(layer.layer)]
            maps = as_floats(attention[layer.layer], f"attention of layer {layer.layer}")
            _same_shape(f"attention of layer {layer.layer}", maps, (images, *array.shape[1:]))
            values.append((array, resolve_encoding(schema.encoding).encode(maps)))
        if schema.num_classes:
            if logits is None:
                raise StoreError(f"logits are missing; expected [{images}, {schema.num_classes}]")
            scores = as_floats(logits, "logits").astype(np.float32, copy=False)
            _same_shape("logits", scores, (images, schema.num_classes))
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


def commit_batch(
    root: Path,
    ledger: Ledger,
    record: str,
    batch: int,
    rows: slice,
    values: Iterable[tuple[ArraySpec, Array]],
) -> None:
    """Write one file of each array, force them to disk, then commit them by one ledger record.

    Raises:
        StoreError: the disk failed or is full; nothing of the batch is committed.
    """
    files: dict[str, dict[str, Any]] = {}
    folders: set[Path] = set()
    try:
        for array, data in values:
            file = array.file(batch)
            # What an earlier, uncommitted or damaged try left would be read and merged into a last, short shard.
            (root / file).unlink(missing_ok=True)
            open_array(root, array.path, writable=True)[rows] = data
            files[file] = describe_file(root, file, sync=True)
            folders.add((root / file).parent)
        for folder in folders:
            sync_directory(folder)
        ledger.write(record, {"batch": batch, "files": files})
    except OSError as error:
        raise StoreError(
            f"batch {batch} of {root} could not be written: {error}; the batches committed before it are intact, "
            "run again to go on"
        ) from error


def metric_values(
    name: str, images: int, value: tuple[ArraySpec, Any], undefined: tuple[ArraySpec, Any]
) -> list[tuple[ArraySpec, Array]]:
    """A batch's values and counts of undefined rows of one metric, checked.

    Raises:
        StoreError: another shape or dtype.
    """
    array, given = value
    values = as_floats(given, f"metric {name!r}").astype(np.float32, copy=False)
    _same_shape(f"metric {name!r}", values, (images, *array.shape[1:]))
    array_of_counts, given_counts = undefined
    counts = np.asarray(given_counts)
    if counts.dtype.kind not in "iu":
        raise StoreError(f"undefined counts of {name!r} have dtype {counts.dtype}; expected integers")
    _same_shape(f"undefined counts of {name!r}", counts, (images, *array_of_counts.shape[1:]))
    return [(array, values), (array_of_counts, counts.astype(np.int32))]


def sound_batches(
    root: Path, ledger: Ledger, arrays: Sequence[ArraySpec], batches: int, *, folder: str = "", content: bool = True
) -> tuple[set[int], dict[str, str]]:
    """Which batches are committed and undamaged, and what is wrong with the other records.

    Args:
        arrays: what a batch's record must name.
        folder: of the ledger; "" for the capture's own batches.
        content: whether to hash the files.

    Returns:
        Batch numbers, and record name -> first problem found.
    """
    sound: set[int] = set()
    problems: dict[str, str] = {}
    for batch in range(batches):
        record = folder + batch_name(batch)
        if not ledger.exists(record):
            continue
        try:
            files = ledger.read(record)["files"]
        except LedgerError as error:
            problems[record] = str(error)
            continue
        if set(files) != {array.file(batch) for array in arrays}:
            problems[record] = "does not name the files of this batch"
            continue
        found = ((file, file_problem(root, file, entry, content=content)) for file, entry in sorted(files.items()))
        wrong = next((f"{file} {problem}" for file, problem in found if problem), "")
        if wrong:
            problems[record] = wrong
        else:
            sound.add(batch)
    return sound, problems


def _drop_unsound(root: Path, ledger: Ledger, schema: StoreSchema) -> set[int]:
    """Withdraw the records that no longer hold; return the batches that do."""
    sound, problems = sound_batches(root, ledger, batch_arrays(schema), schema.num_batches)
    withdrawn = list(problems)
    if ledger.exists("complete"):
        try:
            ledger.read("complete")
            if len(sound) < schema.num_batches:
                withdrawn.append("complete")
        except LedgerError:
            withdrawn.append("complete")
    ledger.remove(withdrawn)
    return sound


def sweep(root: Path, ledger: Ledger) -> None:
    """Remove what a killed writer left half-done; only ever called by the one writer."""
    if _skeleton_path(root).exists():
        shutil.rmtree(_skeleton_path(root))
    for folder in (root, ledger.path):
        for partial in folder.rglob(f"*{PARTIAL}"):
            partial.unlink()


def _skeleton_path(root: Path) -> Path:
    return root.with_name(root.name + PARTIAL)


def _same_names(what: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    if set(found) != set(expected):
        raise StoreError(f"{what} are {sorted(found)}; the store's schema has {sorted(expected)}")


def _same_shape(what: str, found: Array, expected: tuple[int, ...]) -> None:
    if found.shape != expected:
        raise StoreError(f"{what} has shape {found.shape}; expected {expected}")


class _Fixed:
    """Everything about a store that is fixed before its first batch, and how it is written, compared, rebuilt."""

    def __init__(
        self,
        schema: StoreSchema,
        labels: Sequence[int] | Array,
        class_names: Sequence[str],
        manifest: dict[str, Any] | None,
        regions: Array | None,
    ) -> None:
        self.schema = schema
        self.labels = np.asarray(labels, dtype=np.int64)
        _same_shape("labels", self.labels, (schema.num_images,))
        self.regions = None if regions is None else as_floats(regions, "regions").astype(np.float32, copy=False)
        if (self.regions is None) != (not schema.regions):
            raise StoreError(f"schema.regions is {list(schema.regions)}, but regions are given: {regions is not None}")
        if self.regions is not None:
            shape = (schema.num_images, len(schema.regions))
            if self.regions.ndim != 3 or self.regions.shape[:2] != shape:
                raise StoreError(f"regions has shape {self.regions.shape}; expected {shape} and the patches")
        try:
            self.manifest = json.loads(json.dumps(manifest, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StoreError(f"the manifest cannot be written as JSON: {error}") from error
        self.attrs = {**schema.to_attrs(), "class_names": [str(name) for name in class_names]}

    def create(self, root: Path, ledger: Ledger) -> None:
        """Make the store. It appears under its name only when all metadata are on disk and in the ledger."""
        ledger.clear()
        skeleton = self._build(root, datetime.now(UTC).isoformat(timespec="seconds"))
        if self.manifest is not None:
            ledger.write("manifest", {"manifest": self.manifest})
        ledger.write("metadata", _metadata_record(skeleton))
        skeleton.rename(root)
        sync_directory(root.parent)

    def resume(self, root: Path, ledger: Ledger) -> None:
        """Check that the store is the one that would be created, and rebuild metadata that were damaged."""
        record: dict[str, Any] | None
        try:
            record = ledger.read("metadata")
            found = record["attrs"]
        except LedgerError:
            record = None
            found = read_attributes(root)
        self._compare(root, found)
        skeleton = self._build(root, str(found.get("created")))
        rebuilt = _metadata_record(skeleton)
        if record is None:
            for file, entry in rebuilt["files"].items():
                if problem := file_problem(root, file, entry):
                    raise StoreError(
                        f"ledger record {ledger.file('metadata')} is damaged and cannot be rebuilt, for {root / file} "
                        f"{problem.replace('were committed', 'were expected')}; capture again into another store"
                    )
            ledger.write("metadata", rebuilt)
        else:
            for file, entry in record["files"].items():
                if problem := file_problem(root, file, entry):
                    if rebuilt["files"].get(file) != entry:
                        raise StoreError(
                            f"{root / file} {problem} and cannot be rebuilt from this capture's settings; "
                            "restore it from a copy or capture again into another store"
                        )
                    (root / file).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(skeleton / file, root / file)
                    sync_directory((root / file).parent)
        shutil.rmtree(skeleton)
        self._compare_images(root)
        self._compare_manifest(ledger)

    def _build(self, root: Path, created: str) -> Path:
        """All metadata in a folder beside the store, forced to disk. Depends on nothing but the arguments."""
        skeleton = _skeleton_path(root)
        schema = self.schema
        skeleton.mkdir(parents=True)
        create_group(skeleton, "", {**self.attrs, "created": created})
        for group in ("images", "metrics", *(("attention",) if schema.encoding else ())):
            create_group(skeleton, group)
        for name, params in schema.metrics.items():
            create_metric_group(skeleton, name, params)
        create_arrays(skeleton, batch_arrays(schema))
        create_constant(skeleton, "images/id", ("image",), np.array(schema.image_ids, dtype=object), {})
        create_constant(skeleton, "images/label", ("image",), self.labels, {})
        if self.regions is not None:
            names = {"regions": list(schema.regions)}
            create_constant(skeleton, "images/regions", ("image", "region", "patch"), self.regions, names)
        for folder, _, names_of_files in os.walk(skeleton):
            for name in names_of_files:
                with open(Path(folder) / name, "rb") as file:
                    os.fsync(file.fileno())
            sync_directory(Path(folder))
        return skeleton

    def _compare(self, root: Path, found: Mapping[str, Any]) -> None:
        if found.get("schema") != SCHEMA:
            raise StoreError(f"{root}: schema is {found.get('schema')!r}; this version writes {SCHEMA!r}")
        for key, expected in self.attrs.items():
            if found.get(key) != expected:
                where, ours, theirs = _first_difference(key, expected, found.get(key))
                raise StoreError(
                    f"{root} was captured with another {where}: found {theirs!r}, expected {ours!r}; "
                    "capture into another store, or delete this one and its ledger"
                )

    def _compare_images(self, root: Path) -> None:
        expected: dict[str, Array] = {
            "images/id": np.array(self.schema.image_ids, dtype=object),
            "images/label": self.labels,
        }
        if self.regions is not None:
            expected["images/regions"] = self.regions
        for path, ours in expected.items():
            theirs = np.asarray(open_array(root, path)[...])
            if theirs.shape != ours.shape:
                raise StoreError(f"{root}: {path} has shape {theirs.shape}; expected {ours.shape}")
            same = (theirs == ours) | ((theirs != theirs) & (ours != ours))  # NaN is the same as NaN
            differ = np.flatnonzero(~same.reshape(len(ours), -1).all(axis=1))
            if differ.size:
                row = int(differ[0])
                values = f" is {theirs[row]}, expected {ours[row]}" if ours.ndim == 1 else " differs"
                raise StoreError(
                    f"{root} was captured with another {path}: row {row}{values}; "
                    "capture into another store, or delete this one and its ledger"
                )

    def _compare_manifest(self, ledger: Ledger) -> None:
        if self.manifest is None:
            return
        try:
            theirs = ledger.read("manifest")["manifest"]
        except LedgerError:  # damaged or never given: this capture's images were just found to be the same
            ledger.write("manifest", {"manifest": self.manifest})
            return
        if theirs != self.manifest:
            where, ours, found = _first_difference("manifest", self.manifest, theirs)
            raise StoreError(f"{ledger.file('manifest')}: {where} is {found!r}; expected {ours!r}")


def _metadata_record(skeleton: Path) -> dict[str, Any]:
    return {
        "attrs": read_attributes(skeleton),
        "files": {file: describe_file(skeleton, file) for file in store_files(skeleton)},
    }


def _first_difference(key: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Path of the first place where two plain values differ, and what stands there."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for inner in [*ours, *(name for name in theirs if name not in ours)]:
            if ours.get(inner) != theirs.get(inner):
                return _first_difference(f"{key}.{inner}", ours.get(inner), theirs.get(inner))
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine != other:
                return _first_difference(f"{key}[{index}]", mine, other)
    return key, ours, theirs
