"""HDF5 files as they are written: a full disk is an error, where HDF5's own way of writing ends the process.

What HDF5 could not write it tries again when the file is closed, and at the end of the process; where it fails then,
its structures are half closed, and the next call that meets them crashes.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from store.hdf5_seal import BLOCK_BYTES, sealed
from store.removal import Mark


@contextlib.contextmanager
def new_hdf5(path: Path, schema: str, mark: Mark) -> Iterator[tuple[Any, Callable[[], None]]]:
    """An `h5py.File` that appears when it is whole (`sealed`), and a call that raises what the disk refused so far."""
    import h5py

    with sealed(path, schema, mark) as partial, open(partial, "w+b", buffering=0) as raw:
        target = _Target(raw)
        with h5py.File(partial, "w", driver="fileobj", fileobj=target, userblock_size=BLOCK_BYTES) as file:
            yield file, target.check
        target.check()


class _Target:
    """What HDF5 writes to: it takes everything; what the disk refused from the first time on is kept in memory."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._failure: OSError | None = None
        self._refused: list[tuple[int, bytes]] = []  # (offset, content)
        self._at = 0

    def check(self) -> None:
        """Raise what the disk refused."""
        if self._failure is not None:
            raise self._failure

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        begin, self._at = self._at, self._at + len(content)
        if self._failure is None:
            try:
                self._file.seek(begin)
                rest = content
                while rest:
                    rest = rest[self._file.write(rest) :]
                return len(content)
            except OSError as error:
                self._failure = error
        self._refused.append((begin, bytes(content)))
        return len(content)

    def readinto(self, buffer: Any) -> int:
        into = memoryview(buffer).cast("B")
        self._file.seek(self._at)
        done = 0
        while got := self._file.readinto(into[done:]):
            done += got
        for offset, content in self._refused:
            begin, end = max(offset, self._at), min(offset + len(content), self._at + len(into))
            if begin < end:
                into[begin - self._at : end - self._at] = content[begin - offset : end - offset]
        self._at += len(into)
        return len(into)

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        if self._failure is None:
            try:
                self._file.truncate(size)
            except OSError as error:
                self._failure = error
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end()}[whence]
        self._at = base + offset
        return self._at

    def _end(self) -> int:
        ends = [offset + len(content) for offset, content in self._refused]
        return max(os.fstat(self._file.fileno()).st_size, *ends, 0)

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing waits."""
