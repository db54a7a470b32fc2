"""Rows of a store's arrays: from committed batches only, every byte checked, chunks decoded in parallel."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np

from store.arrays import ArraySpec
from store.commit import STALE
from store.ledger import Ledger, LedgerError, batch_name, size_problem
from store.precisions import Array, scratch, widen
from store.schema import StoreError, StoreSchema
from store.shards import ShardError, begin_chunks, decode_chunk
from store.storage import Storage
from store.system import available_cpus

Rows = slice | Sequence[int] | Array


class Records:
    """The committed batches of one capture or of one metric computed later, as they were at one moment.

    Args:
        folder: of the ledger; "" for the capture's own batches.
        source: of a metric computed later: batch -> `attention_digest` of the store.
    """

    def __init__(
        self, ledger: Ledger, schema: StoreSchema, folder: str = "", source: Callable[[int], str] | None = None
    ) -> None:
        self.remedy = "measure it again" if folder else "capture this batch again"
        self._folder = folder
        self._ledger = ledger
        self._files: dict[int, dict[str, Any]] = {}
        self._damaged: dict[int, str] = {}  # raised when a row of the batch is asked for
        self.versions: dict[str, Any] = {}  # file -> its `Storage.version` when its content was what the ledger says
        names = {folder + batch_name(batch): batch for batch in range(schema.num_batches)}
        for name, record in ledger.read_all(list(names)).items():
            batch = names[name]
            if isinstance(record, LedgerError):
                problem = str(record)
            elif source is not None and record["sources"][0] != source(batch):
                problem = f"ledger record {ledger.where(name)} {STALE}"
            else:
                self._files[batch] = record["files"]
                continue
            self._damaged[batch] = f"batch {batch} cannot be trusted: {problem}; {self.remedy}"

    @property
    def sound(self) -> set[int]:
        return set(self._files)

    @property
    def damaged(self) -> tuple[str, ...]:
        """What is wrong with the records that cannot be trusted, a sentence each."""
        return tuple(self._damaged.values())

    def files(self, batch: int) -> dict[str, Any]:
        """The hashes of a committed batch's files; StoreError if it is not committed, or its record is damaged."""
        if batch in self._damaged:
            raise StoreError(self._damaged[batch])
        if batch not in self._files:
            what = f"of {self._folder.rstrip('/')} " if self._folder else ""
            raise StoreError(f"batch {batch} {what}is not committed in {self._ledger}; resume the run that writes it")
        return self._files[batch]

    def hold(self, batch: int) -> bool:
        """Whether the ledger still says of a batch what it said; not if it is being written again, or was."""
        try:
            record = self._ledger.read_if_there(self._folder + batch_name(batch))
        except OSError:  # what was met first is to be raised
            return True
        return isinstance(record, dict) and record["files"] == self._files[batch]


def read_rows(
    root: Storage,
    array: ArraySpec,
    images: Rows,
    records: Records,
    *,
    columns: Rows = slice(None),
    wide: bool = False,
    place: str | None = None,
) -> Array:
    """Some rows of an array, and of its second axis (heads) some columns; errors are those of `AttentionStore.read`.

    Args:
        wide: as float32, instead of what is stored.
        place: None: into new memory, decoded in a thread per CPU; else by the calling thread alone, into its own
            memory of that name.
    """
    rows = positions(images, array.shape[0], "images")
    heads = positions(columns, array.shape[1], "heads")
    chosen = None if np.array_equal(heads, np.arange(array.shape[1])) else heads
    shape, dtype = (rows.size, heads.size, *array.shape[2:]), np.dtype(np.float32) if wide else array.dtype
    if place is None:
        out = np.empty(shape, dtype)
    else:
        out = scratch(f"rows/{place}", math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)
    decoders = _decoders() if place is None else None
    runs: list[tuple[int, Any, _Run, Callable[[], None]]] = []
    batches = rows // array.batch
    starts = np.flatnonzero(np.diff(batches, prepend=-1)).tolist()
    for start, stop in itertools.pairwise([*starts, rows.size]):
        batch = int(batches[start])
        file = array.file(batch)
        entry = records.files(batch)[file]
        run = _Run(array, rows[start:stop] - batch * array.batch, chosen, out[start:stop], wide)
        with _named(array, batch, root, records):
            size, version = root.version(file)
            if problem := size_problem(size, entry):
                raise ShardError(problem)
            known = records.versions.get(file) == version
            wait = begin_chunks(root, file, size, entry, run.chunks, run.place, decoders, compare=not known)
        runs.append((batch, version, run, wait))

    for batch, version, run, wait in runs:
        with _named(array, batch, root, records):
            wait()
        records.versions[array.file(batch)] = version
        run.finish()
    return out


@contextlib.contextmanager
def _named(array: ArraySpec, batch: int, root: Storage, records: Records) -> Iterator[None]:
    """Errors inside say which array, batch and file; what is written meanwhile is not called damage."""
    try:
        yield
    except (ShardError, OSError) as error:
        where = root.where(array.file(batch))
        if not records.hold(batch):
            what = "has been written again, or is being written, since the store was opened; open it again"
        elif isinstance(error, FileNotFoundError):
            what = f"is missing; {records.remedy}"
        elif isinstance(error, OSError):
            what = f"cannot be read: {error}"
        else:
            # Who writes again goes by the sizes of objects, which damage may leave as they are.
            what = f"is damaged ({error}); {'' if root.near else 'delete it and '}{records.remedy}"
        raise StoreError(f"{array.path}, batch {batch}: {where} {what}") from error


class _Run:
    """Rows of one file (`wanted`, in any order; of the second axis `columns` alone) on their way into `out`."""

    def __init__(self, array: ArraySpec, wanted: Array, columns: Array | None, out: Array, wide: bool) -> None:
        self.rows = slice(int(wanted.min()), int(wanted.max()) + 1)
        self.chunks = range(self.rows.start // array.chunk, (self.rows.stop - 1) // array.chunk + 1)
        self._array = array
        self._columns = columns
        self._wide = wide
        self._order = wanted - self.rows.start
        self._out = out
        in_order = wanted.size == self.rows.stop - self.rows.start and bool((np.diff(wanted) == 1).all())
        self._target = out if in_order else np.empty((self.rows.stop - self.rows.start, *out.shape[1:]), out.dtype)

    def place(self, number: int, data: Array) -> None:
        """Decode a chunk to where its rows belong."""
        array = self._array
        first = number * array.chunk  # of the chunk's rows, in the file
        begin, end = max(first, self.rows.start), min(first + array.chunk, self.rows.stop)
        out = self._target[begin - self.rows.start : end - self.rows.start]
        if not self._wide and self._columns is None and end - begin == array.chunk:
            decode_chunk(data, out)
            return
        chunk = scratch("decoded", array.chunk * array.row_bytes).view(array.dtype)
        chunk = chunk.reshape(array.chunk, *array.shape[1:])
        decode_chunk(data, chunk)
        rows = chunk[begin - first : end - first]
        if self._columns is not None:
            rows = rows[:, self._columns]
        if self._wide:
            widen(rows, array.precision, out)
        else:
            out[...] = rows

    def finish(self) -> None:
        """Put rows that were not wanted in order into theirs."""
        if self._target is not self._out:
            self._out[...] = self._target[self._order]


@lru_cache
def _decoders() -> Executor:
    """The process's threads that decode chunks; they are idle when nobody reads."""
    return ThreadPoolExecutor(available_cpus(), "decode")


def positions(selection: Rows, length: int, what: str) -> Array:
    """A slice or a list of numbers as row numbers; StoreError if there are no such rows."""
    try:
        # NumPy takes a tuple for one index an axis.
        numbers = np.arange(length)[list(selection) if isinstance(selection, tuple) else selection]
    except IndexError as error:
        raise StoreError(f"{what}: {error}; there are {length}") from error
    if numbers.ndim != 1:
        raise StoreError(f"{what} must be a slice or a list of numbers, found {selection!r}")
    return numbers
