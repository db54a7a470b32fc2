"""The ledger: one small file for each thing that is finished, beside the store.

run.ledger/  lock                       held (flock) by the one writer, or by those that share the store
             metadata.json              hashes of every zarr.json and of images/{id, label, regions}
             manifest.json              every file of the data set with its status
             batch_000000.json          hashes and sizes of every shard the batch filled (see `store.shards`)
             complete.json              written by `finish`: how many batches there must be
             metrics/<name>/<params hash>/{metadata, batch_000000}.json     metrics computed later

What the ledger does not name is not trusted: a store is only ever as long as its committed batches. A record
is written to a temporary file, fsynced and renamed, after the files it names are on disk. It holds a checksum
of itself, its own name and the SHA-256 of its capture's metadata.json, and is compared byte for byte with what this
module would write: any flipped bit is found, and so is a record of another batch or of another capture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from store.schema import LEDGER_FILES, OtherRunError, StoreError, ledger_name
from store.shards import FileEntry, ShardError, shard_digest
from store.storage import Storage


class LedgerError(StoreError):
    """A ledger record that is missing or damaged: `where` it lies and `what` is wrong with it."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(where, what)
        self.what = what

    def __str__(self) -> str:
        return "ledger record {} {}".format(*self.args)


def batch_name(batch: int) -> str:
    """Name of a batch's record: batch_000000, …"""
    return f"batch_{batch:06d}"


def describe_bytes(content: bytes) -> FileEntry:
    """Size and SHA-256 of a file's content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def file_problem(root: Storage, file: str, expected: FileEntry) -> str:
    """What is wrong with a file of the store whose entry in the ledger is `expected`, "" if nothing."""
    try:
        if problem := size_problem(root.size(file), expected):
            return problem
        whole = "chunks" not in expected
        digest = describe_bytes(root.read(file))["sha256"] if whole else shard_digest(root, file, expected)
        if digest != expected["sha256"]:
            return "its content changed after it was committed (SHA-256 differs)"
    except FileNotFoundError:
        return "is missing"
    except ShardError as error:
        return f"its content changed after it was committed ({error})"
    return ""


def file_problems(root: Storage, files: Mapping[str, FileEntry]) -> dict[str, str]:
    """What is wrong with which of some small files."""
    problems = root.at_once(lambda item: file_problem(root, *item), files.items())
    return {file: problem for file, problem in zip(files, problems, strict=True) if problem}


def size_problem(size: int | None, expected: FileEntry) -> str:
    """What is wrong with a file of this size, "" if nothing; None: there is no such file."""
    if size is None:
        return "is missing"
    return "" if size == expected["bytes"] else f"has {size} bytes; {expected['bytes']} were committed"


class Ledger:
    """The records beside the store at `root`."""

    def __init__(self, root: Storage) -> None:
        self.storage = root.beside(ledger_name(root.name))
        self._capture = ""

    @property
    def capture(self) -> str:
        """SHA-256 of the record of the capture's metadata, which every other record holds.

        "" while there is none, or a damaged one: then nothing else can be said of the store either.
        """
        if not self._capture and (content := self.storage.fetch([_file("metadata")])[0]) is not None:
            with contextlib.suppress(LedgerError):
                self._parse("metadata", content)
        return self._capture

    def __str__(self) -> str:
        return str(self.storage)

    def where(self, name: str) -> str:
        """Path or URL of a record."""
        return self.storage.where(_file(name))

    def exists(self, name: str) -> bool:
        return self.storage.exists(_file(name))

    def names(self, folder: str = "") -> list[str]:
        """Names of all records below a folder of the ledger, sorted."""
        return [file.removesuffix(".json") for file in self.storage.sizes(folder) if file.endswith(".json")]

    def read(self, name: str) -> dict[str, Any]:
        """A record; LedgerError if it is missing or damaged, OtherRunError if it is of an earlier version."""
        try:
            content = self.storage.read(_file(name))
        except FileNotFoundError:
            raise LedgerError(self.where(name), "is missing") from None
        return self._parse(name, content)

    def read_if_there(self, name: str) -> dict[str, Any] | LedgerError | None:
        """A record, what is wrong with it, or None."""
        return self.read_all([name]).get(name)

    def read_all(self, names: Sequence[str]) -> dict[str, dict[str, Any] | LedgerError]:
        """Those of some records that are there, or what is wrong with them."""
        records: dict[str, dict[str, Any] | LedgerError] = {}
        for name, content in zip(names, self.storage.fetch([_file(name) for name in names]), strict=True):
            if content is not None:
                try:
                    records[name] = self._parse(name, content)
                except LedgerError as error:
                    records[name] = error
        return records

    def read_later(self) -> dict[str, dict[str, Any] | LedgerError]:
        """Records of the metadata of metrics computed after the capture, or what is wrong with them."""
        return self.read_all([name for name in self.names("metrics") if name.endswith("/metadata")])

    def _parse(self, name: str, content: bytes) -> dict[str, Any]:
        try:
            whole = json.loads(content)
            record: dict[str, Any] = whole["record"]
            capture = str(whole.get("capture", ""))
            sound = content == _serialise(name, record, capture)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            sound = False
        if not sound:
            raise LedgerError(self.where(name), "is damaged (its checksum does not match)")
        if name == "metadata":
            self._capture = hashlib.sha256(content).hexdigest()
        elif not capture:
            raise OtherRunError(
                f"{self.where(name)} is sound and of an earlier version, whose ledgers do not say of which capture a "
                "batch is; capture again, into another store or after deleting this one and its ledger"
            )
        elif self.capture not in ("", capture):
            raise LedgerError(self.where(name), "is damaged (it is of another capture)")
        return record

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Commit a record: it is there whole afterwards, whatever happens. The capture's metadata come first."""
        if name == "metadata":
            content = _serialise(name, record, "")
            self._capture = hashlib.sha256(content).hexdigest()
        else:
            content = _serialise(name, record, self.capture)
        self.storage.replace(_file(name), content)

    def remove(self, names: Iterable[str]) -> None:
        """Withdraw records, durably."""
        for name in names:
            self.storage.remove(_file(name))

    def clear(self) -> None:
        """Withdraw everything but the lock; nothing, with a StoreError, where something lies that is not ours."""
        self.storage.clear(LEDGER_FILES, keep="lock")
        self._capture = ""


def _file(name: str) -> str:
    return f"{name}.json"


def _serialise(name: str, record: dict[str, Any], capture: str) -> bytes:
    held = {"name": name, "record": record} | ({"capture": capture} if capture else {})
    body = json.dumps(held, sort_keys=True, ensure_ascii=False, allow_nan=False)
    whole = held | {"checksum": hashlib.sha256(body.encode()).hexdigest()}
    return (json.dumps(whole, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()
