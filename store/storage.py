"""Where a store's files lie: a folder, or (`store.objects`) a prefix of an object store.

What this package needs of either: read a file or a part of it, write a whole file so that it appears at once or not at
all, list, remove, and keep other writers out. In a folder that is a temporary file, fsync and rename, and flock; in an
object store, a PUT.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from store.precisions import Array
from store.schema import StoreError
from store.scratch import scratch

__all__ = ["PARTIAL", "Location", "Lock", "Storage", "StoreUrl", "location_of", "storage_at", "sync_directory"]

PARTIAL = ".partial"  # suffix of everything unfinished

Write = Callable[[bytes], int]  # takes all of it, and gives its length


class StoreUrl(str):
    """The URL of a store; like a path, it has a name."""

    __slots__ = ()

    @property
    def name(self) -> str:
        return self.rstrip("/").rpartition("/")[2]


Location = Path | StoreUrl


def location_of(given: str | os.PathLike[str]) -> Location:
    """A store's path as every part of this package uses it: absolute, without a trailing slash; or its URL."""
    text = os.fspath(given)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    elif "://" in text:
        return StoreUrl(text.rstrip("/"))
    return Path(os.path.abspath(text))


def storage_at(given: str | os.PathLike[str] | Storage) -> Storage:
    """The files of a store at a path or URL.

    Raises:
        StoreError: what reads that URL is not installed, or it is no URL of an object store.
    """
    if isinstance(given, Storage):
        return given
    location = location_of(given)
    if isinstance(location, Path):
        return LocalStorage(location)
    from store.objects import ObjectStorage

    return ObjectStorage.open(location)


class Lock(Protocol):
    """What keeps other runs from writing a store while this one does."""

    def share(self) -> str:
        """Let other processes join; returns the name of the run, which they need. Nobody else may write meanwhile.

        Raises:
            StoreError: another writer was faster.
        """


class Storage(ABC):
    """Files below one place, by name: "attention/layer_00/c.0.0.0.0".

    Every method raises OSError (FileNotFoundError where there is no such file) when the disk or the network fails.

    Attributes:
        location: the place, as errors name it.
        near: whether reading a file again costs little, and so does asking for each one's size.
    """

    location: Location
    near: bool

    @property
    def name(self) -> str:
        """The last part of the location."""
        return self.location.name

    def __str__(self) -> str:
        return str(self.location)

    def where(self, file: str) -> str:
        """A file's whole path or URL."""
        return f"{self.location}/{file}"

    @abstractmethod
    def beside(self, name: str) -> Storage:
        """The place of that name in the same folder."""

    @abstractmethod
    def is_there(self) -> bool:
        """Whether anything lies here."""

    @abstractmethod
    def exists(self, file: str) -> bool: ...

    @abstractmethod
    def size(self, file: str) -> int:
        """Bytes of a file."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by name, sorted."""

    @abstractmethod
    def read(self, file: str) -> bytes: ...

    @abstractmethod
    def read_range(self, file: str, offset: int, length: int) -> Array:
        """Bytes of a file as uint8, fewer at its end; valid until this thread reads the next ones."""

    @abstractmethod
    def fetch(self, files: Sequence[str]) -> list[bytes | None]:
        """Several small files; None for those that are not there."""

    @abstractmethod
    def writing(self, file: str) -> contextlib.AbstractContextManager[Write]:
        """Write a file in parts: it appears whole, on disk, at the end of the `with` block, and not at all on error."""

    @abstractmethod
    def settle(self, files: Iterable[str]) -> None:
        """Make the names of written files survive a power loss."""

    @abstractmethod
    def remove(self, file: str) -> None:
        """Remove a file, durably."""

    @abstractmethod
    def clear(self, keep: str) -> None:
        """Remove every file but one."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what a killed writer left half-done; only ever called by the one writer."""

    @abstractmethod
    def skeleton(self) -> contextlib.AbstractContextManager[Path]:
        """An empty folder to put files together in, gone at the end of the `with` block unless it was adopted."""

    @abstractmethod
    def adopt(self, skeleton: Path, commit: Callable[[], None]) -> None:
        """Make a new store's files appear here at once, right after `commit`, for which they are all in place."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """What may still be written; None: no limit is known."""

    @abstractmethod
    def zarr(self) -> Any:
        """What zarr reads from."""

    @abstractmethod
    def locked(self) -> contextlib.AbstractContextManager[Lock]:
        """Be the only writer, by the file `lock`.

        Raises:
            StoreError: another process (or another writer in this one) is.
        """

    @abstractmethod
    def joined(self, run: str) -> contextlib.AbstractContextManager[Lock]:
        """Be one of the writers of a run that shares the store, as `Lock.share` named it.

        Raises:
            StoreError: the store is not shared, or is another run's by now.
        """

    def replace(self, file: str, content: bytes) -> None:
        """Write a file: afterwards it is there whole, whatever happens; before, not at all."""
        with self.writing(file) as write:
            write(content)
        self.settle([file])


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LocalStorage(Storage):
    """A folder.

    Args:
        path: absolute.
    """

    near = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = path

    def beside(self, name: str) -> LocalStorage:
        return LocalStorage(self.path.with_name(name))

    def is_there(self) -> bool:
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

    def exists(self, file: str) -> bool:
        return (self.path / file).is_file()

    def size(self, file: str) -> int:
        return (self.path / file).stat().st_size

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = (Path(below) / name for below, _, names in os.walk(self.path / folder) for name in names)
        return dict(sorted((file.relative_to(self.path).as_posix(), file.stat().st_size) for file in found))

    def read(self, file: str) -> bytes:
        return (self.path / file).read_bytes()

    def read_range(self, file: str, offset: int, length: int) -> Array:
        buffer = scratch("read", length)
        with open(self.path / file, "rb", buffering=0) as stream:
            done = os.preadv(stream.fileno(), [buffer.data], offset)
        return buffer[:done]

    def fetch(self, files: Sequence[str]) -> list[bytes | None]:
        return [self.read(file) if self.exists(file) else None for file in files]

    @contextlib.contextmanager
    def writing(self, file: str) -> Iterator[Write]:
        path = self.path / file
        partial = path.with_name(path.name + PARTIAL)
        try:
            with open(partial, "wb", buffering=0) as stream:

                def write(data: bytes) -> int:
                    """All of it: an unbuffered write may stop short on a disk that is filling up."""
                    rest = memoryview(data)
                    while rest:
                        rest = rest[stream.write(rest) :]
                    return len(data)

                yield write
                os.fsync(stream.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def settle(self, files: Iterable[str]) -> None:
        for folder in {(self.path / file).parent for file in files}:
            sync_directory(folder)

    def replace(self, file: str, content: bytes) -> None:
        folder = (self.path / file).parent
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for above in [folder, *folder.parents]:
                sync_directory(above)
                if above == self.path.parent:
                    break
        super().replace(file, content)

    def remove(self, file: str) -> None:
        (self.path / file).unlink()
        self.settle([file])

    def clear(self, keep: str) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != keep:
                entry.unlink()
        sync_directory(self.path)

    def sweep(self) -> None:
        if self._skeleton.exists():
            shutil.rmtree(self._skeleton)
        for partial in self.path.rglob(f"*{PARTIAL}"):
            partial.unlink()

    @property
    def _skeleton(self) -> Path:
        return self.path.with_name(self.path.name + PARTIAL)

    @contextlib.contextmanager
    def skeleton(self) -> Iterator[Path]:
        self._skeleton.mkdir(parents=True)
        try:
            yield self._skeleton
        finally:
            shutil.rmtree(self._skeleton, ignore_errors=True)

    def adopt(self, skeleton: Path, commit: Callable[[], None]) -> None:
        for folder, _, names in os.walk(skeleton):
            for name in names:
                with open(Path(folder) / name, "rb") as file:
                    os.fsync(file.fileno())
            sync_directory(Path(folder))
        commit()
        skeleton.rename(self.path)
        sync_directory(self.path.parent)

    def free_bytes(self) -> int:
        folder = next(parent for parent in (self.path, *self.path.parents) if parent.is_dir())
        return shutil.disk_usage(folder).free

    def zarr(self) -> Any:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            lock = _Flock(self.path, file)
            lock.take(fcntl.LOCK_EX)
            lock.sign(str(os.getpid()))
            yield lock

    @contextlib.contextmanager
    def joined(self, run: str) -> Iterator[Lock]:
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            lock = _Flock(self.path, file)
            lock.take(fcntl.LOCK_SH)
            if run not in lock.signature():
                raise StoreError(f"{self.path} is not shared by the run that this process belongs to; start it anew")
            yield lock


class _Flock:
    """A lock that lasts as long as one process of its run lives, by flock: exclusive, or shared with those that join.

    Args:
        path: the folder.
        file: its file `lock`, open: the process id of the writer, then the name of the run that shares the store.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path = path
        self._file = file

    def take(self, kind: int) -> None:
        """Lock, exclusively or shared.

        Raises:
            StoreError: others hold it.
        """
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, *sharing = self.signature() or ["unknown"]
            others = ", or one that it shares it with," if sharing else ""
            raise StoreError(
                f"{self._path} is locked: process {holder}{others} is writing this store; "
                "wait for it to end, or write to another store"
            ) from None

    def share(self) -> str:
        run = uuid.uuid4().hex
        self.sign(f"{os.getpid()} {run}")
        self.take(fcntl.LOCK_SH)
        return run

    def signature(self) -> list[str]:
        """What the holder wrote."""
        self._file.seek(0)
        return self._file.read().split()

    def sign(self, signature: str) -> None:
        """Write who holds it."""
        self._file.truncate(0)
        self._file.write(f"{signature}\n")
        self._file.flush()
