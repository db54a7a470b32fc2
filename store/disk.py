"""What a disk refuses, as one sentence: what could not be written, why, and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from store.removal import Mark, is_unfinished, put, remove, remove_unfinished, unfinished
from store.schema import StoreError
from store.system import HAS_FLOCK, lock_file

_AGAIN = "run the same command again"
_ELSEWHERE = "give another place"
# errno -> what is wrong, what to do.
_REFUSALS = {
    errno.ENOSPC: ("no space left on its disk", f"free some space there, and {_AGAIN}"),
    errno.EDQUOT: ("no space left in the quota of its disk", f"free some space there, and {_AGAIN}"),
    errno.EFBIG: (
        "it would be larger than its file system or a limit allows (ulimit -f)",
        f"raise the limit or {_ELSEWHERE}",
    ),
    errno.EROFS: ("its disk can only be read", _ELSEWHERE),
    errno.EACCES: ("permission denied", f"{_ELSEWHERE}, or see to the right to write there"),
    errno.EPERM: ("permission denied", f"{_ELSEWHERE}, or see to the right to write there"),
    errno.ENOENT: ("there is no such folder", f"make it, or {_ELSEWHERE}"),
    errno.EEXIST: ("a file lies there", _ELSEWHERE),
    errno.ENOTDIR: ("a part of the path is a file", _ELSEWHERE),
    errno.EISDIR: ("a folder lies there", _ELSEWHERE),
    errno.ELOOP: ("a link there leads to itself", f"remove the link, or {_ELSEWHERE}"),
    errno.ENAMETOOLONG: ("the path is too long", _ELSEWHERE),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.EIO: ("its disk failed (input/output error)", f"see to the disk, and {_AGAIN}"),
}


class DiskError(StoreError):
    """Something that could not be written, and is not there; what was finished before is intact."""


def disk_error(clause: str, error: OSError) -> DiskError:
    """The sentence for an error of the system; `clause`, its beginning, says what could not be done, with the path."""
    first: BaseException | None = error  # where a disk is full, removing what was begun may fail next
    while first is not None and not is_refusal(first):
        first = first.__context__
    error = first if isinstance(first, OSError) else error
    reason, remedy = _REFUSALS.get(error.errno or 0, (error.strerror or str(error), f"see to it, and {_AGAIN}"))
    return DiskError(f"{clause}: {reason}; {remedy}")


def is_refusal(error: BaseException) -> bool:
    """Whether this is an error of a disk, whatever was asked of it, and not of one file that is there or is not."""
    return isinstance(error, OSError) and error.errno in _REFUSALS.keys() - {errno.ENOENT, errno.EEXIST}


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What is written in the `with` block becomes this file or folder; DiskError where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise disk_error(f"{os.fspath(path)} cannot be written", error) from error


@contextlib.contextmanager
def making_alone(path: Path) -> Iterator[None]:
    """Keep other processes from making the same during the `with` block; StoreError if one is making it."""
    lock = unfinished(path.with_name(f"{path.name}.lock"))
    with writing(path), contextlib.ExitStack() as locked:
        file = locked.enter_context(open(lock, "ab"))
        try:
            lock_file(file)
        except (BlockingIOError, FileNotFoundError):
            raise StoreError(f"{path} is being written by another process; wait for it, or {_ELSEWHERE}") from None
        try:
            yield
        finally:
            if not HAS_FLOCK:  # Windows removes no file that is open
                locked.close()
            remove(lock, is_unfinished)


@contextlib.contextmanager
def making(path: Path, mark: Mark) -> Iterator[Path]:
    """Where to put together what appears as `path` at the end of the `with` block, whole, and not at all on error.

    Raises DiskError where it cannot be written, and StoreError where something lies that `mark` (see `store.removal`)
    does not know for ours.
    """
    partial = unfinished(path)
    with writing(path):
        try:
            remove(partial, is_unfinished)
            yield partial
            put(partial, path, mark)
        except BaseException:
            remove_unfinished(partial)
            raise
