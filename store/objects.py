"""A store in an object store (S3, Google Cloud Storage, Azure, HTTP), by obstore; nothing here without a URL.

A file is one PUT, which appears whole or not at all, so a batch is committed as in a folder: its shards, then its
record. Credentials and endpoints come from the environment, as obstore reads them (AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, …).

The lock is an object that is PUT on condition that there is none (If-None-Match). Nobody takes it away when its writer
dies: a run on the same machine replaces it, if that process is gone, on condition that it is still the one that it read
(If-Match), and one on another machine says whose it is. A run whose lock somebody deleted leaves the next alone. Two
runs that write one store all the same PUT the same bytes under the same names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, PreconditionError
from obstore.store import from_url

from store.precisions import Array
from store.redaction import redacted
from store.removal import UNFINISHED, is_unfinished, remove
from store.schema import NetworkError, StoreError
from store.storage import Item, Lock, Result, Storage, StoreUrl, Write
from store.system import is_running

logger = logging.getLogger(__name__)

_AT_ONCE = 16  # requests under way
_held: set[str] = set()  # ids of locks that this process holds, or is about to take
_PATIENCE = timedelta(seconds=60)  # with a network that fails


class ObjectStorage(Storage):
    """A prefix of an object store, by its URL; `objects` is an obstore store, of the folder that holds it."""

    near = False
    location: StoreUrl

    def __init__(self, objects: Any, location: StoreUrl) -> None:
        self.location = location
        self._objects = objects

    @classmethod
    def open(cls, location: StoreUrl) -> ObjectStorage:
        """The object store of a URL; StoreError if obstore takes no such URL."""
        folder = location.rpartition("/")[0]
        try:
            objects = from_url(
                folder,
                client_options={"allow_http": True} if location.startswith("http://") else None,
                retry_config={"max_retries": 5, "retry_timeout": _PATIENCE},
            )
            return cls(objects, location)
        except (BaseError, ValueError) as error:
            raise StoreError(
                f"{location} is no URL of a store ({_sentence(error)}); expected s3://bucket/run.zarr, gs://, az://, "
                "https:// or file://"
            ) from None

    def beside(self, name: str) -> ObjectStorage:
        return ObjectStorage(self._objects, StoreUrl(f"{self.location.rpartition('/')[0]}/{name}"))

    def is_there(self) -> bool:
        return self.exists("zarr.json")

    def version(self, file: str) -> tuple[int, Any]:
        meta = self._call("head", file)
        return int(meta["size"]), meta["e_tag"] or meta["last_modified"]

    def sizes(self, folder: str = "") -> dict[str, int]:
        prefix = f"{self.name}/"
        with self._named(folder):
            listed = [entry for page in obstore.list(self._objects, f"{prefix}{folder}".rstrip("/")) for entry in page]
        return dict(sorted((entry["path"].removeprefix(prefix), int(entry["size"])) for entry in listed))

    def read(self, file: str) -> bytes:
        return bytes(self._call("get", file).bytes())

    def read_range(self, file: str, offset: int, length: int) -> Array:
        try:
            return np.frombuffer(self._call("get_range", file, start=offset, length=max(length, 1)), np.uint8)[:length]
        except NetworkError:
            if offset < self.size(file):
                raise
            return np.empty(0, np.uint8)  # of nothing behind the end, no object store gives a part

    def read_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not ranges:
            return []
        starts, lengths = zip(*ranges, strict=True)
        return [bytes(part) for part in self._call("get_ranges", file, starts=starts, lengths=lengths)]

    def at_once(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        with ThreadPoolExecutor(_AT_ONCE, "request") as threads:
            return list(threads.map(work, items))

    @contextlib.contextmanager
    def writing(self, file: str) -> Iterator[Write]:
        parts: list[bytes] = []

        def write(data: bytes) -> int:
            parts.append(data)
            return len(data)

        yield write
        self._call("put", file, b"".join(parts))

    def remove(self, file: str) -> None:
        self._call("delete", file)

    @contextlib.contextmanager
    def skeleton(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(suffix=UNFINISHED))
        try:
            yield folder
        finally:
            remove(folder, is_unfinished)

    def adopt(self, skeleton: Path, commit: Callable[[], None]) -> None:
        """The root's zarr.json comes last: without it there is no store."""
        files = [file.relative_to(skeleton).as_posix() for file in skeleton.rglob("*") if file.is_file()]

        def put(file: str) -> None:
            self.replace(file, (skeleton / file).read_bytes())

        self.at_once(put, [file for file in files if file != "zarr.json"])
        commit()
        put("zarr.json")

    def zarr(self) -> Any:
        from zarr.storage import ObjectStore, StorePath

        return StorePath(ObjectStore(self._objects, read_only=True), self.name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        lock = _LockObject(self)
        _held.add(lock.id)
        try:
            lock.take()
            try:
                yield lock
            finally:
                lock.release()
        finally:
            _held.discard(lock.id)

    @contextlib.contextmanager
    def joined(self, run: str) -> Iterator[Lock]:
        lock = _LockObject(self)
        if lock.read()[0].get("run") != run:
            raise StoreError(f"{self} is not shared by the run that this process belongs to; start it again")
        yield lock

    def put_over(self, file: str, content: bytes, version: Any = None) -> bool:
        """Put an object in the place of one version of it, None: of none; whether that is what was there."""
        try:
            self._call("put", file, content, mode="create" if version is None else version)
        except FileNotFoundError:
            return False
        except NetworkError as error:
            if isinstance(error.__context__, AlreadyExistsError | PreconditionError):
                return False
            raise
        return True

    def read_version(self, file: str) -> tuple[bytes, Any]:
        """An object's content, and what `put_over` knows this version of it by."""
        answer = self._call("get", file)
        version = {key: answer.meta[key] for key in ("e_tag", "version") if answer.meta[key] is not None}
        return bytes(answer.bytes()), version

    def _call(self, function: str, file: str, *args: Any, **kwargs: Any) -> Any:
        with self._named(file):
            return getattr(obstore, function)(self._objects, f"{self.name}/{file}", *args, **kwargs)

    @contextlib.contextmanager
    def _named(self, file: str) -> Iterator[None]:
        """Errors inside become those of a disk, with the URL and a sentence."""
        try:
            yield
        except (FileNotFoundError, NotFoundError):
            raise FileNotFoundError(f"there is no {self.where(file)}") from None
        except (BaseError, PermissionError, NotImplementedError) as error:
            raise NetworkError(f"{self.where(file)}: {_sentence(error)}") from None  # its own text has the whole URL


class _LockObject:
    """The object `lock`: host and process of the writer, and the name of the run where it shares the store."""

    def __init__(self, storage: ObjectStorage) -> None:
        self._storage = storage
        # An object's e_tag may be a hash of its content, which no two locks have in common.
        self.id = uuid.uuid4().hex
        self._mine = {"host": socket.gethostname(), "process": os.getpid(), "run": "", "id": self.id}

    def take(self) -> None:
        """Put it, or replace one whose writer has died on this machine; StoreError if another may hold it."""
        if self._storage.put_over("lock", self._content()):
            return
        holder, version = self.read()
        if holder.get("host") == self._mine["host"] and not self._lives(holder):
            # Of several that find it so, one replaces the version that they all have read.
            if version and self._storage.put_over("lock", self._content(), version):
                return
            holder, _ = self.read()
        process, host = (holder.get(key, "unknown") for key in ("process", "host"))
        raise StoreError(
            f"{self._storage} is locked: process {process} on {host} is writing this store; wait for it to end, or if "
            f"it has died, delete {self._storage.where('lock')}"
        )

    def share(self) -> str:
        holder, version = self.read()
        self._mine["run"] = uuid.uuid4().hex
        if holder.get("id") != self.id or not self._storage.put_over("lock", self._content(), version):
            raise StoreError(
                f"{self._storage.where('lock')} was deleted or replaced while this run held it; start it again when "
                "no other run writes this store"
            )
        return str(self._mine["run"])

    def release(self) -> None:
        """Remove it; one that is no longer this run's stays, which is said."""
        if self.read()[0].get("id") == self.id:
            self._storage.remove("lock")
        else:
            lock = self._storage.where("lock")
            logger.warning("%s was deleted or replaced while this run held it; verify the store", lock)

    def read(self) -> tuple[dict[str, Any], Any]:
        """What the object says, nothing if there is none, or a damaged one; and its version."""
        try:
            content, version = self._storage.read_version("lock")
        except FileNotFoundError:
            return {}, None
        try:
            return dict(json.loads(content)), version
        except (ValueError, TypeError, RecursionError):
            return {}, version

    def _lives(self, holder: dict[str, Any]) -> bool:
        """Whether a process of this machine still holds the lock; a dead one may have had this one's number."""
        process = holder.get("process")
        if process == os.getpid():
            return holder.get("id") in _held
        return not isinstance(process, int) or is_running(process)

    def _content(self) -> bytes:
        return json.dumps(self._mine).encode()


def _sentence(error: BaseException) -> str:
    """obstore's first line, without secrets of a URL in it; what follows is for its developers."""
    return redacted((str(error).strip() or type(error).__name__).splitlines()[0])
