"""How a batch is committed, checked and, if it does not hold, withdrawn. Shared by every writer of a store."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from store.arrays import ArraySpec, attention_arrays
from store.disk import disk_error
from store.ledger import Ledger, LedgerError, batch_name, file_problem, size_problem
from store.precisions import Array, as_numbers, cast
from store.schema import StoreError, StoreSchema
from store.shards import FileEntry, encode_chunk, write_file
from store.storage import Location, Storage
from store.system import available_cpus

FILES_IN_FLIGHT = 4  # files whose values wait in memory: two being encoded, two being forced to disk
SMALL_BYTES = 1 << 20  # smaller ones (a batch's logits, a metric's values) wait beside them, until their commit
FILE_THREADS = 2  # one file is written while the other is being forced to disk
COMMITS_IN_FLIGHT = 8  # a batch is one commit of a capture, and one per metric of a measurement


class Writer:
    """What writes batches into a store, in the background, in bounded memory; locked; a context manager.

    `_put` starts a file: its chunks are encoded in parallel and written as they become ready, one sequential write and
    one fsync per file. `_commit` follows when the files it names are on disk. Both return at once, unless as much is
    under way as memory may hold: that is the back-pressure. What fails in the background is raised by the next call.
    """

    def __init__(self, storage: Storage, schema: StoreSchema, ledger: Ledger) -> None:
        self.path: Location = storage.location
        self.storage = storage
        self.schema = schema
        self._ledger = ledger
        self._resources = contextlib.ExitStack()
        self._slots = threading.BoundedSemaphore(FILES_IN_FLIGHT)
        self._codec = ThreadPoolExecutor(available_cpus(), "encode")
        self._files_pool = ThreadPoolExecutor(FILE_THREADS, "write")
        self._commits = ThreadPoolExecutor(1, "commit")
        self._pending: deque[Future[None]] = deque()
        self._failure: Exception | None = None
        self._failure_raised = False  # by some call

    def _put(self, array: ArraySpec, batch: int, values: Array, precision: str) -> Future[FileEntry]:
        """Start the file that a batch fills, of values that must not change until it is written; cast by chunks."""
        with contextlib.ExitStack() as slot:
            if values.nbytes >= SMALL_BYTES:
                slot.enter_context(self._slots)
            self._raise_failure()
            chunks = [
                self._codec.submit(_encode, array, values[begin : begin + array.chunk], precision)
                for begin in range(0, len(values), array.chunk)
            ]
            written = self._files_pool.submit(self._write, array, batch, chunks)
            held = slot.pop_all()
        written.add_done_callback(lambda _: held.close())
        return written

    def _write(self, array: ArraySpec, batch: int, chunks: Sequence[Future[tuple[bytes, bytes]]]) -> FileEntry:
        with self._guarded(batch):
            return write_file(self.storage, array.file(batch), chunks, shard_chunks=array.shard_chunks)

    def _commit(
        self, record: str, batch: int, files: Mapping[str, Future[FileEntry]], done: Callable[[], None], **more: Any
    ) -> None:
        """Commit a batch by one ledger record, with `more` in it, when its files are on disk; then call `done`."""

        def work() -> None:
            entries = {file: future.result() for file, future in files.items()}
            with self._guarded(batch):
                self.storage.settle(entries)
                self._ledger.write(record, {"batch": batch, "files": entries, **more})
            done()

        self._raise_failure()
        while len(self._pending) >= COMMITS_IN_FLIGHT:
            self._wait()
        self._pending.append(self._commits.submit(work))

    @contextlib.contextmanager
    def _guarded(self, batch: int) -> Iterator[None]:
        """A failure inside, in a batch's work, ends the run; a disk's becomes a sentence."""
        try:
            yield
        except OSError as error:
            self._failure = disk_error(
                f"batch {batch} of {self.storage} could not be written (the batches committed before it are intact)",
                error,
            )
            raise self._failure from error
        except Exception as error:
            self._failure = error
            raise

    def _wait(self) -> None:
        try:
            self._pending.popleft().result()
        except BaseException:
            self._failure_raised = True
            raise

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._failure_raised = True
            raise self._failure

    def flush(self) -> None:
        """Wait until every batch given to the writer is committed; StoreError if the disk failed or is full."""
        while self._pending:
            self._wait()
        self._raise_failure()

    def close(self) -> None:
        """Wait for what is under way, then let another writer in. What was committed stays."""
        for executor in (self._codec, self._files_pool, self._commits):
            executor.shutdown(wait=True)
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self._failure_raised:
                self.flush()
        finally:
            self.close()


def _encode(array: ArraySpec, values: Array, precision: str) -> tuple[bytes, bytes]:
    """One chunk; rows that it has and the array lacks hold the fill value."""
    if len(values) < array.chunk:
        whole = np.full((array.chunk, *array.shape[1:]), array.fill, array.dtype)
        whole[: len(values)] = cast(values, precision, array.precision)
        return encode_chunk(whole, array.precision, array.precision)
    return encode_chunk(values, precision, array.precision)


def metric_values(
    name: str, arrays: Sequence[ArraySpec], images: int, given: Any, undefined: Any
) -> list[tuple[ArraySpec, Array]]:
    """A batch's values and counts of undefined rows of one metric; StoreError for another shape or dtype."""
    array, array_of_counts = arrays
    values, counts = float32(given, f"metric {name!r}"), np.asarray(undefined)
    check_shape(f"metric {name!r}", values, (images, *array.shape[1:]))
    if counts.dtype.kind not in "iu":
        raise StoreError(f"undefined counts of {name!r} have dtype {counts.dtype}; expected integers")
    check_shape(f"undefined counts of {name!r}", counts, (images, *array_of_counts.shape[1:]))
    return [(array, values), (array_of_counts, counts.astype(np.int32))]


def float32(values: Any, what: str) -> Array:
    """Floating-point values as float32; StoreError as of `as_numbers`."""
    array, precision = as_numbers(values, what)
    if precision == "bool":
        raise StoreError(f"{what} has dtype bool; expected floating point")
    return cast(array, precision, "float32")


# What is wrong with values whose record names other maps than those that are committed now.
STALE = "was measured from other maps than the store holds now"


def attention_digest(schema: StoreSchema, batch: int, files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over the hashes, in a batch's record, of the files of its attention: values measured from it name it."""
    hashes = [files[array.file(batch)]["sha256"] for array in attention_arrays(schema)]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def sound_batches(
    root: Storage,
    ledger: Ledger,
    arrays: Sequence[ArraySpec],
    batches: int,
    *,
    folder: str = "",
    sources: Mapping[int, Sequence[str]] | None = None,
) -> tuple[set[int], dict[str, str]]:
    """Numbers of the batches that are committed and undamaged; record name -> first problem of the others.

    Files of a folder are hashed. Of an object store, one listing gives their sizes: hashing would be to download it.
    `sources` are, by batch, the `attention_digest` of the stores that its values must have been measured from.
    """
    sizes = None if root.near else root.sizes()

    def first_problem(files: Mapping[str, FileEntry]) -> str:
        for file, entry in sorted(files.items()):
            if what := file_problem(root, file, entry) if sizes is None else size_problem(sizes.get(file), entry):
                return f"{file} {what}"
        return ""

    sound: set[int] = set()
    problems: dict[str, str] = {}
    names = {folder + batch_name(batch): batch for batch in range(batches)}
    for name, record in ledger.read_all(list(names)).items():
        batch = names[name]
        if isinstance(record, LedgerError):
            problems[name] = str(record)
        elif set(record["files"]) != {array.file(batch) for array in arrays}:
            problems[name] = "does not name the files of this batch"
        elif sources is not None and record["sources"] != list(sources.get(batch, record["sources"])):
            problems[name] = STALE
        elif wrong := first_problem(record["files"]):
            problems[name] = wrong
        else:
            sound.add(batch)
    return sound, problems


def check_names(what: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Raises StoreError unless these are exactly the names expected."""
    if set(found) != set(expected):
        raise StoreError(f"{what} are {sorted(found, key=str)}; the store's schema has {sorted(expected, key=str)}")


def check_shape(what: str, found: Array, expected: tuple[int, ...]) -> None:
    """Raises StoreError unless the array has the shape expected."""
    if found.shape != expected:
        raise StoreError(f"{what} has shape {found.shape}; expected {expected}")
