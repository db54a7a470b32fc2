"""What operating systems do differently: locks of files, folders that are forced to disk, CPUs, other processes.

POSIX locks a file by flock, which processes can share. Windows locks a byte of it, for one process alone.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import time
from pathlib import Path
from typing import IO, Any

from store.schema import StoreError

HAS_FLOCK = importlib.util.find_spec("fcntl") is not None
if HAS_FLOCK:
    import fcntl
else:
    import msvcrt

_LOCKED_BYTE = 1 << 30  # behind all that a file holds, for nobody else can read what is locked


def lock_file(file: IO[Any], *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file, until it is closed: alone or `shared`; BlockingIOError if others hold it, unless we `wait`.

    Raises FileNotFoundError where who held it has removed it, and StoreError where the system cannot share a lock.
    """
    if HAS_FLOCK:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(file.name)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file.name)
        return
    if shared:
        raise StoreError("this system cannot share the lock of a file between processes; let one process write alone")
    descriptor = file.fileno()
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        while True:
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                return
            except OSError as error:
                if not wait:
                    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from error
                time.sleep(0.1)
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)


def sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power loss; Windows opens no folder, and keeps their order itself."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def available_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_running(process: int) -> bool:
    """Whether a process of this machine lives; true where it cannot be asked (on Windows, that would end it)."""
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
