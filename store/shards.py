"""The files of a store's arrays, as Zarr v3 lays them out, written and read directly.

A file is one chunk, or a shard: chunks one behind the other, then an index of (offset, length) pairs, little-endian
uint64, and its CRC-32C. A chunk is bytes -> Blosc (lz4, level 5, bitshuffle) -> CRC-32C. Any Zarr v3 reader reads
them (zarr-specs: core v3.0; sharding-indexed, blosc, crc32c codecs); zarr-python's own writer reached 16 % of the
codec's rate.

Blosc with several threads writes different bytes from run to run: here a chunk has one thread, chunks go in parallel.

A shard's entry in the ledger is a SHA-256 over its chunks' CRC-32Cs and its index, which are themselves under CRC-32Cs:
hashing the chunks' bytes again would cost a quarter of the codec's time (1.8 GB/s beside 0.6 GB/s on one core). A
CRC-32C of the whole file would be no check at all: data followed by their own CRC leave a constant remainder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc  # type: ignore[import-untyped]

from store.precisions import Array, cast, scratch
from store.schema import StoreError
from store.storage import Storage

_CHECKSUM = 4  # bytes of a CRC-32C
_EMPTY = np.iinfo(np.uint64).max  # offset and length of a chunk that holds no row

FileEntry = dict[str, Any]


class ShardError(StoreError):
    """A file of chunks whose bytes are not what was written."""


def encode_chunk(values: Array, precision: str, to: str) -> tuple[bytes, bytes]:
    """A chunk's bytes and their checksum; call it from a thread that is not the main one, and it frees the GIL."""
    narrowed = cast(values, precision, to, scratch("narrowed", 2 * values.size))
    data = blosc.compress(narrowed, b"lz4", 5, blosc.BITSHUFFLE, blosc.AUTOBLOCKS)
    return data, google_crc32c.value(data).to_bytes(_CHECKSUM, "little")


def write_file(
    root: Storage, file: str, chunks: Sequence[Future[tuple[bytes, bytes]]], *, shard_chunks: int = 0
) -> FileEntry:
    """Write chunks in order as they become ready; gives the file's entry in the ledger.

    The file appears under its name, in place of an earlier one, when it is whole and on disk. `shard_chunks` are those
    of a whole shard, at least as many as there are; 0: the file is a single chunk.
    """
    index = np.full((shard_chunks, 2), _EMPTY, dtype="<u8")
    digest = hashlib.sha256()
    size = 0
    with root.writing(file) as write:
        for number, chunk in enumerate(chunks):
            data, checksum = chunk.result()
            if shard_chunks:
                index[number] = size, len(data) + _CHECKSUM
                digest.update(checksum)
            else:
                digest.update(data + checksum)
            size += write(data) + write(checksum)
        if shard_chunks:
            table = index.tobytes()
            table += google_crc32c.value(table).to_bytes(_CHECKSUM, "little")
            digest.update(table)
            size += write(table)
    entry: FileEntry = {"bytes": size, "sha256": digest.hexdigest()}
    return entry | {"chunks": shard_chunks} if shard_chunks else entry


def shard_digest(root: Storage, file: str, entry: FileEntry) -> str:
    """SHA-256 of a shard of its entry's size, every byte of it compared with a checksum; ShardError if one differs."""
    digest = hashlib.sha256()
    size = entry["bytes"]
    index, table = _read_index(root, file, size, entry["chunks"])
    begin = 0
    for number, (offset, length) in enumerate(index.tolist()):
        if offset == _EMPTY:
            continue
        if offset != begin:
            raise ShardError(f"chunk {number} begins at byte {offset}, expected {begin}")
        digest.update(_checked(root.read_range(file, offset, length), number, length)[1])
        begin += length
    if begin + len(table) != size:
        raise ShardError(f"the chunks end at byte {begin} and the index begins at {size - len(table)}")
    digest.update(table)
    return digest.hexdigest()


def begin_chunks(
    root: Storage,
    file: str,
    size: int,
    entry: FileEntry,
    chunks: range,
    place: Callable[[int, Array], None],
    threads: Executor | None,
    *,
    compare: bool,
) -> Callable[[], None]:
    """Begin to read chunks of a file of `size` bytes.

    What it gives waits for them, and raises ShardError or OSError; only then may they be used.

    Args:
        threads: that read and decode; None: the calling one does it, now.
        place: called in a thread with a chunk's number and its compressed bytes (valid during the call), to
            `decode_chunk` them to where they belong.
        compare: the entry's SHA-256 with what was read and with the checksums of the chunks that were not.
    """
    shard_chunks = entry.get("chunks", 0)  # 0: the file is a single chunk
    if shard_chunks:
        index, table = _read_index(root, file, size, shard_chunks)
    else:
        index, table = np.array([[0, size]], dtype="<u8"), b""
    hashed: dict[int, bytes] = {}  # chunk -> its part of what is hashed

    def read(number: int) -> None:
        offset, length = (int(value) for value in index[number])
        if offset == _EMPTY:
            raise ShardError(f"chunk {number} is missing")
        data, checksum = _checked(root.read_range(file, offset, length), number, length)
        hashed[number] = checksum if shard_chunks else data.tobytes() + checksum
        place(number, data)

    futures = []
    for number in chunks:
        if threads is None:
            read(number)
        else:
            futures.append(threads.submit(read, number))
    if compare:
        hashed.update(_checksums(root, file, index, without=chunks))

    def finish() -> None:
        for future in futures:
            future.result()
        if compare:
            content = b"".join(hashed[number] for number in sorted(hashed)) + table
            if hashlib.sha256(content).hexdigest() != entry["sha256"]:
                raise ShardError("its SHA-256 is not the one in the ledger: it is another file's content")

    return finish


def glance_at_shard(root: Storage, file: str, shard_chunks: int) -> str:
    """The SHA-256 of a shard's entry, by index and checksums alone: a change inside a chunk is not seen."""
    index, table = _read_index(root, file, root.size(file), shard_chunks)
    checksums = _checksums(root, file, index)
    return hashlib.sha256(b"".join(checksums.values()) + table).hexdigest()


def decode_chunk(data: Array, out: Array) -> None:
    """Decode a chunk's compressed bytes into `out`, contiguous, of its whole size; ShardError if they hold another."""
    holds = int.from_bytes(data[4:8].tobytes(), "little")  # Blosc's header: the size before compression
    if holds != out.nbytes:
        raise ShardError(f"a chunk holds {holds} bytes, expected {out.nbytes}")
    blosc.decompress(data, out)


def _read_index(root: Storage, file: str, size: int, shard_chunks: int) -> tuple[Array, bytes]:
    """(offset, length) of every chunk, and the index's own bytes."""
    length = 16 * shard_chunks + _CHECKSUM
    table = root.read_range(file, max(size - length, 0), length).tobytes()
    if len(table) < length or google_crc32c.value(table[:-_CHECKSUM]) != int.from_bytes(table[-_CHECKSUM:], "little"):
        raise ShardError("the index does not match its checksum")
    return np.frombuffer(table[:-_CHECKSUM], dtype="<u8").reshape(shard_chunks, 2), table


def _checksums(root: Storage, file: str, index: Array, without: Container[int] = ()) -> dict[int, bytes]:
    """The stored checksums of a shard's chunks, by their numbers, in order."""
    ends = {n: int(offset) + int(length) for n, (offset, length) in enumerate(index) if offset != _EMPTY}
    numbers = [number for number in ends if number not in without]
    checksums = root.read_ranges(file, [(ends[number] - _CHECKSUM, _CHECKSUM) for number in numbers])
    return dict(zip(numbers, checksums, strict=True))


def _checked(data: Array, number: int, length: int) -> tuple[Array, bytes]:
    """A chunk's compressed bytes and its checksum."""
    content, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:].tobytes()
    if data.size != length or google_crc32c.value(content) != int.from_bytes(checksum, "little"):
        raise ShardError(f"chunk {number} does not match its checksum")
    return content, checksum
