"""Where a store's files lie: a folder (`store.local`), or a prefix of an object store (`store.objects`).

What this package needs of either: read a file or a part of it, write a whole file so that it appears at once or not at
all, list, remove, and keep other writers out. In a folder that is a temporary file, fsync and rename, and flock; in an
object store, a PUT.
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from store.precisions import Array
from store.redaction import redacted
from store.schema import StoreError

Item = TypeVar("Item")
Result = TypeVar("Result")

PARTIAL = ".partial"  # suffix of everything unfinished

Write = Callable[[bytes], int]  # takes all of it, and gives its length


class StoreUrl(str):
    """The URL of a store; like a path, it has a name. Where it is shown or written, no secret in it is."""

    __slots__ = ()

    def __str__(self) -> str:
        return redacted(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __repr__(self) -> str:
        return repr(str(self))

    @property
    def name(self) -> str:
        return self.rstrip("/").rpartition("/")[2]


Location = Path | StoreUrl


def location_of(given: str | os.PathLike[str]) -> Location:
    """A store's path as every part of this package uses it: absolute, without a trailing slash; or its URL.

    In a file:// URL, as `Path.as_uri` writes it, spaces and other letters stand as %20, …. Raises StoreError for a URL
    with a query, or with a password where none is used.
    """
    text = os.fspath(given)
    if text.startswith("file://"):
        from urllib.request import url2pathname

        return Path(os.path.abspath(url2pathname(text.removeprefix("file://"))))
    if "://" not in text:
        return Path(os.path.abspath(text))
    shown = redacted(text)
    if "?" in text or "#" in text:
        raise StoreError(
            f"{shown} has a query; expected the URL of a store, which ends in its name: what signs requests is read "
            "from the environment (AZURE_STORAGE_SAS_KEY, AWS_ACCESS_KEY_ID, …)"
        )
    if shown != text and not text.startswith(("http://", "https://")):
        raise StoreError(
            f"{shown} holds a user or a password, which no object store reads from its URL; give keys in the "
            "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_SERVICE_ACCOUNT, …)"
        )
    return StoreUrl(text.rstrip("/"))


class Lock(Protocol):
    """What keeps other runs from writing a store while this one does."""

    def share(self) -> str:
        """Let other processes join; gives the run's name, which they need. StoreError if another was faster."""


class Storage(ABC):
    """Files below one place, by name: "attention/layer_00/c.0.0.0.0".

    Every method raises OSError (FileNotFoundError where there is no such file) when the disk or the network fails.
    """

    location: Location  # as errors name it
    near: bool  # reading a file again costs little, and so does asking for each one's size

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

    def exists(self, file: str) -> bool:
        try:
            self.version(file)
        except FileNotFoundError:
            return False
        return True

    def size(self, file: str) -> int:
        """Bytes of a file."""
        return self.version(file)[0]

    @abstractmethod
    def version(self, file: str) -> tuple[int, Any]:
        """Bytes of a file, and something that changes whenever it is written."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by name, sorted."""

    @abstractmethod
    def read(self, file: str) -> bytes: ...

    @abstractmethod
    def read_range(self, file: str, offset: int, length: int) -> Array:
        """Bytes of a file as uint8, fewer at its end; valid until this thread reads the next ones."""

    def read_ranges(self, file: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """A few bytes each at several places of a file, given as (offset, length)."""
        return [self.read_range(file, offset, length).tobytes() for offset, length in ranges]

    def fetch(self, files: Sequence[str]) -> list[bytes | None]:
        """Several small files; None for those that are not there."""
        return self.at_once(self._read_if_there, files)

    def at_once(self, work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """What some work gives of each item: in an object store, many requests are under way together."""
        return [work(item) for item in items]

    def _read_if_there(self, file: str) -> bytes | None:
        try:
            return self.read(file)
        except FileNotFoundError:
            return None

    @abstractmethod
    def writing(self, file: str) -> contextlib.AbstractContextManager[Write]:
        """Write a file in parts: it appears whole, on disk, at the end of the `with` block, and not at all on error."""

    def settle(self, files: Iterable[str]) -> None:  # noqa: B027  an object has its name as soon as it is there
        """Make the names of written files survive a power loss."""

    @abstractmethod
    def remove(self, file: str) -> None:
        """Remove a file, durably."""

    def own_files(self, pattern: str) -> list[str]:
        """Every file here; StoreError if one is named otherwise than `pattern` says, so that it is not ours."""
        files = list(self.sizes())
        for file in files:
            if not re.fullmatch(pattern, file):
                raise StoreError(
                    f"{self.where(file)} is in the way, and this program did not write it; move it away, or give "
                    "another place"
                )
        return files

    def clear(self, pattern: str, keep: str = "") -> None:
        """Remove every file but one, a root's zarr.json last; none, with a StoreError, if one is not of `own_files`."""
        self._remove_all([file for file in self.own_files(pattern) if file != keep])

    def _remove_all(self, files: Sequence[str]) -> None:
        """Remove files, durably, in order."""
        for file in files:
            self.remove(file)

    def sweep(self) -> None:  # noqa: B027  in an object store, what was not put whole is not there
        """Remove what a killed writer left half-done; only ever called by the one writer."""

    @abstractmethod
    def skeleton(self) -> contextlib.AbstractContextManager[Path]:
        """An empty folder to put files together in, gone at the end of the `with` block unless it was adopted."""

    @abstractmethod
    def adopt(self, skeleton: Path, commit: Callable[[], None]) -> None:
        """Make a new store's files appear here at once, right after `commit`, for which they are all in place."""

    def free_bytes(self) -> int | None:
        """What may still be written; None: no limit is known."""
        return None

    @abstractmethod
    def zarr(self) -> Any:
        """What zarr reads from."""

    @abstractmethod
    def locked(self) -> contextlib.AbstractContextManager[Lock]:
        """Be the only writer, by the file `lock`; StoreError if another process (or writer in this one) is."""

    @abstractmethod
    def joined(self, run: str) -> contextlib.AbstractContextManager[Lock]:
        """Be one of the writers of a run that shares the store, as `Lock.share` named it; StoreError if it does not."""

    def replace(self, file: str, content: bytes) -> None:
        """Write a file: afterwards it is there whole, whatever happens; before, not at all."""
        with self.writing(file) as write:
            write(content)
        self.settle([file])
