"""The ledger: one small file for each thing that is finished, beside the store.

run.ledger/  lock                       held (flock) by the one writer, or by those that share the store
             metadata.json              hashes of every zarr.json and of images/{id, label, regions}
             manifest.json              every file of the data set with its status
             batch_000000.json          hashes and sizes of every shard the batch filled (see `store.shards`)
             complete.json              written by `finish`: how many batches there must be
             metrics/<name>/<params hash>/{metadata, batch_000000}.json     metrics computed later

What the ledger does not name is not trusted: a store is only ever as long as its committed batches. A record
is written to a temporary file, fsynced and renamed, after the files it names are on disk. It holds a checksum
of itself and its own name, and is compared byte for byte with what this module would write: any flipped bit
is found.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from store.schema import StoreError
from store.shards import PARTIAL, FileEntry, ShardError, describe_shard

__all__ = [
    "PARTIAL",
    "Ledger",
    "LedgerError",
    "Lock",
    "batch_name",
    "describe_file",
    "file_problem",
    "sync_directory",
]


class LedgerError(StoreError):
    """A ledger record that is damaged; the message names it."""


def batch_name(batch: int) -> str:
    """Name of a batch's record: batch_000000, …"""
    return f"batch_{batch:06d}"


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(root: Path, path: str, *, sync: bool = False) -> FileEntry:
    """Size and SHA-256 of a file of the store, optionally after forcing it to disk."""
    with open(root / path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def file_problem(root: Path, path: str, expected: FileEntry, *, content: bool = True) -> str:
    """What is wrong with a file of the store, "" if nothing.

    Args:
        expected: its entry in the ledger.
        content: whether to hash it; otherwise only existence and size are looked at.
    """
    try:
        size = (root / path).stat().st_size
        if size != expected["bytes"]:
            return f"has {size} bytes; {expected['bytes']} were committed"
        if not content:
            return ""
        sharded = "chunks" in expected
        found = describe_shard(root / path, expected["chunks"]) if sharded else describe_file(root, path)
        if found["sha256"] != expected["sha256"]:
            return "its content changed after it was committed (SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except ShardError as error:
        return f"its content changed after it was committed ({error})"
    return ""


class Ledger:
    """The records beside one store.

    Args:
        path: the ledger's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        """Path of a record."""
        return self.path / f"{name}.json"

    def exists(self, name: str) -> bool:
        return self.file(name).is_file()

    def names(self, folder: str = "") -> list[str]:
        """Names of all records below a folder of the ledger, sorted."""
        below = self.path / folder
        return sorted(str(file.relative_to(self.path).with_suffix("")) for file in below.rglob("*.json"))

    def read(self, name: str) -> dict[str, Any]:
        """A record's content.

        Raises:
            LedgerError: it is missing or damaged.
        """
        file = self.file(name)
        try:
            content = file.read_bytes()
        except FileNotFoundError:
            raise LedgerError(f"ledger record {file} is missing") from None
        try:
            record: dict[str, Any] = json.loads(content)["record"]
            sound = content == _serialise(name, record)
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise LedgerError(f"ledger record {file} is damaged (its checksum does not match)")
        return record

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Commit a record: afterwards it is there whole, whatever happens; before, not at all."""
        file = self.file(name)
        content = _serialise(name, record)
        if not file.parent.is_dir():
            file.parent.mkdir(parents=True)
            for folder in [file.parent, *file.parent.parents]:
                sync_directory(folder)
                if folder == self.path.parent:
                    break
        partial = file.with_suffix(PARTIAL)
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        sync_directory(file.parent)

    def remove(self, names: Iterable[str]) -> None:
        """Withdraw records, durably."""
        for name in names:
            self.file(name).unlink()
            sync_directory(self.file(name).parent)

    def clear(self) -> None:
        """Withdraw everything but the lock."""
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
        sync_directory(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[Lock]:
        """Be the store's only writer.

        Raises:
            StoreError: another process (or another writer in this one) is.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            lock = Lock(self.path, file)
            lock.take(fcntl.LOCK_EX)
            lock.sign(str(os.getpid()))
            yield lock

    @contextlib.contextmanager
    def joined(self, run: str) -> Iterator[Lock]:
        """Be one of the writers of a run that shares the store, as `Lock.share` named it.

        Raises:
            StoreError: the store is not shared, or is another run's by now.
        """
        with open(self.path / "lock", "a+", encoding="ascii") as file:
            lock = Lock(self.path, file)
            lock.take(fcntl.LOCK_SH)
            if run not in lock.signature():
                raise StoreError(f"{self.path} is not shared by the run that this process belongs to; start it anew")
            yield lock


class Lock:
    """What keeps every other run from writing a store, as long as one process of this run lives.

    Args:
        path: the ledger's folder.
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
        """Let other processes join; returns the name of the run, which they need. Nobody else may write meanwhile.

        Raises:
            StoreError: another writer was faster.
        """
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


def _serialise(name: str, record: dict[str, Any]) -> bytes:
    body = json.dumps({"name": name, "record": record}, sort_keys=True, ensure_ascii=False, allow_nan=False)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    whole = {"checksum": checksum, "name": name, "record": record}
    return (json.dumps(whole, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
