"""How a batch is committed, checked and, if it does not hold, withdrawn. Shared by every writer of a store."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from store.arrays import ArraySpec, open_array
from store.encodings import Array, as_floats
from store.ledger import PARTIAL, Ledger, LedgerError, batch_name, describe_file, file_problem, sync_directory
from store.schema import StoreError

__all__ = ["check_names", "check_shape", "commit_batch", "metric_values", "skeleton_path", "sound_batches", "sweep"]


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
    check_shape(f"metric {name!r}", values, (images, *array.shape[1:]))
    array_of_counts, given_counts = undefined
    counts = np.asarray(given_counts)
    if counts.dtype.kind not in "iu":
        raise StoreError(f"undefined counts of {name!r} have dtype {counts.dtype}; expected integers")
    check_shape(f"undefined counts of {name!r}", counts, (images, *array_of_counts.shape[1:]))
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


def sweep(root: Path, ledger: Ledger) -> None:
    """Remove what a killed writer left half-done; only ever called by the one writer."""
    if skeleton_path(root).exists():
        shutil.rmtree(skeleton_path(root))
    for folder in (root, ledger.path):
        for partial in folder.rglob(f"*{PARTIAL}"):
            partial.unlink()


def skeleton_path(root: Path) -> Path:
    """Where a new store's metadata are put together before it appears under its name."""
    return root.with_name(root.name + PARTIAL)


def check_names(what: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Raises StoreError unless these are exactly the names expected."""
    if set(found) != set(expected):
        raise StoreError(f"{what} are {sorted(found, key=str)}; the store's schema has {sorted(expected, key=str)}")


def check_shape(what: str, found: Array, expected: tuple[int, ...]) -> None:
    """Raises StoreError unless the array has the shape expected."""
    if found.shape != expected:
        raise StoreError(f"{what} has shape {found.shape}; expected {expected}")
