"""HDF5 files of ours as they are written: whole, sealed, and a full disk is an error. Tables are among them.

HDF5 has checksums for chunks, and none for names, attributes, strings and for what lies where: a flipped bit there
gives other values, or ends the process. So the block before a file, which HDF5's readers pass over, holds the sha256 of
all that follows: looked at before the library opens the file, this seal finds any.

What HDF5 could not write to a full disk it tries again when the file is closed, and at the end of the process; where it
fails then, its structures are half closed, and the next call that meets them crashes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from store.disk import making, making_alone, writing
from store.removal import Mark
from store.schema import MARK, StoreError
from store.system import sync_folder

if TYPE_CHECKING:
    import xarray

BLOCK_BYTES = 512  # HDF5's user block
DAMAGE = (OSError, RuntimeError, KeyError)  # what h5py raises of a damaged file
_TABLE = f"{MARK}-table/"  # of any version
SCHEMA = f"{_TABLE}2"


def write_table(dataset: xarray.Dataset, path: str | os.PathLike[str]) -> None:
    """Write a dataset as one HDF5 (netCDF-4) file, for MATLAB, R or Julia: coordinates are its dimension scales.

    Variables are numbers, booleans and strings, attributes numbers and strings. The file appears under its name, in
    place of an earlier table, only when it is whole, and has the same bytes whenever it is written. Chunks are gzipped
    and carry a Fletcher-32 checksum, which every reader checks; the block before it holds the sha256 of everything
    behind it, which `read_table` checks.

    Raises:
        DiskError: the file cannot be written.
        StoreError: a variable or an attribute of another type, or something else lies there.
    """
    packed = {"zlib": True, "shuffle": True, "fletcher32": True}
    numbers = [name for name, values in dataset.variables.items() if values.dtype.kind in "biuf" and values.size > 1]
    content = io.BytesIO()  # in memory: where HDF5's library meets a full disk, it can end the process
    try:
        dataset.to_netcdf(content, engine="h5netcdf", encoding=dict.fromkeys(numbers, packed))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} cannot be written as a table: {error}") from error
    with sealed(Path(path), SCHEMA, lambda path: is_sealed(path, _TABLE)) as partial, open(partial, "wb") as file:
        file.write(bytes(BLOCK_BYTES))
        file.write(content.getbuffer())


def read_table(path: str | os.PathLike[str]) -> xarray.Dataset:
    """Read what `write_table` wrote; StoreError if there is no such file, a damaged one, or one of another program."""
    import xarray

    try:
        if check_seal(Path(path), SCHEMA):
            return xarray.load_dataset(path, engine="h5netcdf")
    except OSError as error:
        raise StoreError(f"{path} cannot be read as a table: {error}") from error
    raise StoreError(f"{path} was not written by write_table: it does not begin with {SCHEMA!r}")


@contextlib.contextmanager
def sealed(path: Path, schema: str, mark: Mark) -> Iterator[Path]:
    """Where to write an HDF5 file of a kind, behind a user block; sealed and on disk, it appears as `path` when whole.

    `mark` and errors are those of `making`; StoreError, too, while another process writes the same file.
    """
    with making_alone(path), making(path, mark) as partial:
        yield partial
        with open(partial, "r+b") as file:
            seal = _seal(file, schema)
            file.seek(0)
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
    with writing(path):
        sync_folder(path.absolute().parent)


def is_sealed(path: Path, schema: str) -> bool:
    """Whether a file is one of a kind whose name begins so, sound or damaged."""
    if not path.is_file():  # a device may never end
        return False
    with open(path, "rb") as file:
        return file.read(BLOCK_BYTES).startswith(schema.encode())


def check_seal(path: Path, schema: str) -> bool:
    """Compare a file with its seal; False if it is not sealed as this kind, StoreError if its bytes are others now."""
    with open(path, "rb") as file:
        block = file.read(BLOCK_BYTES)
        if not block.startswith(_beginning(schema)):
            return False
        if not block.startswith(_seal(file, schema)):
            raise StoreError(
                f"{path} is damaged: its bytes are not the ones that were written; write it again, or, if it was "
                "changed on purpose, copy what it holds to a new HDF5 file"
            )
    return True


def _beginning(schema: str) -> bytes:
    return f"{schema}, sha256 of what follows these {BLOCK_BYTES} bytes: ".encode()


def _seal(file: IO[bytes], schema: str) -> bytes:
    file.seek(BLOCK_BYTES)
    return _beginning(schema) + hashlib.file_digest(file, "sha256").hexdigest().encode()  # type: ignore[arg-type]


@contextlib.contextmanager
def new_hdf5(path: Path, schema: str, mark: Mark) -> Iterator[tuple[Any, Callable[[], None]]]:
    """An `h5py.File` that appears when it is whole (`sealed`), and a call that raises what the disk refused so far."""
    import h5py

    with sealed(path, schema, mark) as partial, open(partial, "w+b", buffering=0) as raw:
        target = _Target(raw)
        with h5py.File(partial, "w", driver="fileobj", fileobj=target, userblock_size=BLOCK_BYTES) as file:
            yield file, target.check
        target.check()


class _Target(io.RawIOBase):
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

    def truncate(self, size: int) -> int:  # type: ignore[override]  # HDF5 always gives it
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
