"""A store's files in a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from store.precisions import Array, scratch
from store.removal import is_unfinished, named, put, remove, remove_unfinished, unfinished
from store.schema import StoreError
from store.storage import PARTIAL, Lock, Storage, Write
from store.system import lock_file, sync_folder

# Names of files in stores and ledgers, whole or not.
_FILE = named(rf"(?:zarr|metadata|manifest|complete|batch_\d+)\.json(?:{PARTIAL})?|c(?:\.\d+)*(?:{PARTIAL})?|lock")
_HALF_WRITTEN = named(rf"(?:zarr|metadata|manifest|complete|batch_\d+)\.json{PARTIAL}|c(?:\.\d+)*{PARTIAL}")


def _make_folder(path: Path) -> None:
    """Make a folder and those above it; StoreError where something that is no folder lies."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        obstacle = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
        raise StoreError(f"the folder {path} cannot be made: {obstacle} is in the way; move it away") from error


class LocalStorage(Storage):
    """A folder, of an absolute path."""

    near = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.location = path

    def beside(self, name: str) -> LocalStorage:
        return LocalStorage(self.path.with_name(name))

    def is_there(self) -> bool:
        return self.path.exists() and not (self.path.is_dir() and not any(self.path.iterdir()))

    def version(self, file: str) -> tuple[int, Any]:
        status = self._there(file).stat()
        return status.st_size, (status.st_ino, status.st_mtime_ns)

    def _there(self, file: str) -> Path:
        """A file's path; a folder, a device (whose end may never come) or a link to nowhere is no file of ours."""
        path = self.path / file
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return path

    def sizes(self, folder: str = "") -> dict[str, int]:
        sizes = {}
        for below, _, names in os.walk(self.path / folder):
            for file in (Path(below) / name for name in names):
                with contextlib.suppress(FileNotFoundError):  # gone since: a writer's temporary file, or withdrawn
                    if file.is_file():
                        sizes[file.relative_to(self.path).as_posix()] = file.stat().st_size
        return dict(sorted(sizes.items()))

    def read(self, file: str) -> bytes:
        return self._there(file).read_bytes()

    def read_range(self, file: str, offset: int, length: int) -> Array:
        buffer = scratch("read", length)
        with open(self.path / file, "rb", buffering=0) as stream:
            stream.seek(offset)
            done = stream.readinto(buffer.data)
        return buffer[:done]

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
            put(partial, path, Path.is_file)  # a file of a store or a ledger, which are looked at when they are opened
        finally:
            remove(partial, _HALF_WRITTEN)

    def settle(self, files: Iterable[str]) -> None:
        for folder in {(self.path / file).parent for file in files}:
            sync_folder(folder)

    def replace(self, file: str, content: bytes) -> None:
        folder = (self.path / file).parent
        if not folder.is_dir():
            _make_folder(folder)
            for above in [folder, *folder.parents]:
                sync_folder(above)
                if above == self.path.parent:
                    break
        super().replace(file, content)

    def remove(self, file: str) -> None:
        remove(self.path / file, _FILE)
        self.settle([file])

    def _remove_all(self, files: Sequence[str]) -> None:
        for file in files:
            remove(self.path / file, _FILE)
        for folder, _, _ in os.walk(self.path, topdown=False):
            with contextlib.suppress(StoreError):  # it is not empty
                remove(Path(folder), lambda path: False)
        sync_folder(self.path if self.path.is_dir() else self.path.parent)

    def sweep(self) -> None:
        remove(unfinished(self.path), is_unfinished)
        for partial in self.path.rglob(f"*{PARTIAL}"):
            if _HALF_WRITTEN(partial):
                remove(partial, _HALF_WRITTEN)

    @contextlib.contextmanager
    def skeleton(self) -> Iterator[Path]:
        skeleton = unfinished(self.path)
        skeleton.mkdir(parents=True)
        try:
            yield skeleton
        except BaseException:
            remove_unfinished(skeleton)
            raise
        remove(skeleton, is_unfinished)

    def adopt(self, skeleton: Path, commit: Callable[[], None]) -> None:
        for folder, _, names in os.walk(skeleton):
            for name in names:
                with open(Path(folder) / name, "r+b") as file:  # Windows forces no file to disk that is only read
                    os.fsync(file.fileno())
            sync_folder(Path(folder))
        commit()
        put(skeleton, self.path, lambda path: False)  # nothing, or an empty folder
        sync_folder(self.path.parent)

    def free_bytes(self) -> int:
        folder = next(parent for parent in (self.path, *self.path.parents) if parent.is_dir())
        return shutil.disk_usage(folder).free

    def zarr(self) -> Any:
        from zarr.storage import LocalStore

        return LocalStore(self.path, read_only=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        _make_folder(self.path)
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            lock = _Flock(self.path, file)
            lock.take()
            lock.sign(str(os.getpid()))
            yield lock

    @contextlib.contextmanager
    def joined(self, run: str) -> Iterator[Lock]:
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            lock = _Flock(self.path, file)
            lock.take(shared=True)
            if run not in lock.signature():
                raise StoreError(f"{self.path} is not shared by the run that this process belongs to; start it again")
            yield lock


class _Flock:
    """The file `lock`: the process id of the writer, then the name of the run that shares the store."""

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path = path
        self._file = file

    def take(self, *, shared: bool = False) -> None:
        """Lock; StoreError if others hold it."""
        try:
            lock_file(self._file, shared=shared)
        except BlockingIOError:
            holder, *sharing = self.signature() or ["unknown"]
            others = ", or one that it shares it with," if sharing else ""
            raise StoreError(
                f"{self._path} is locked: process {holder}{others} is writing this store; "
                "wait for it to end, or write to another store"
            ) from None
        except FileNotFoundError:
            raise StoreError(f"{self._path} has just been removed by another process; start again") from None

    def share(self) -> str:
        run = uuid.uuid4().hex
        self.sign(f"{os.getpid()} {run}")
        self.take(shared=True)
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
