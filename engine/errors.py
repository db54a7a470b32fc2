"""Which errors speak to the user: their message is one sentence that says all, and no traceback is shown."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator, Sequence

from train.errors import InputError, TrainingDivergedError, WorkerLostError

# What torch and others raise as a RuntimeError.
_NO_MEMORY = re.compile(r"can(?:not|'t) allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)


class MemoryExhaustedError(RuntimeError):
    """There is less memory than was asked for; the message says which key to lower."""


def foreseen(error: Exception, batch_keys: Sequence[str] = ()) -> Exception:
    """An error of the disk or of memory, wherever it came from, as the one that says so; any other as it is.

    Args:
        error: what ended a command.
        batch_keys: the keys that decide how much memory the command takes.
    """
    from store.disk import DiskError, disk_error, is_refusal

    if exit_code(error) is None or isinstance(error, OSError):
        for found in _chain(error):
            if str(found).startswith(f"[Errno {errno.ENOENT}] No usable temporary directory"):  # Python's tempfile
                return DiskError("no folder for temporary files can be written; set TMPDIR to one that can")
            if isinstance(found, OSError) and is_refusal(found):
                return disk_error(f"{found.filename or 'a file'} cannot be read or written", found)
    if exit_code(error) is None:
        for found in _chain(error):
            if _is_of_memory(found):
                asked = str(found).splitlines()[0].rstrip(". ") if str(found) else type(found).__name__
                lower = f"lower {' or '.join(f'--{key}' for key in batch_keys)}, or " if batch_keys else ""
                return MemoryExhaustedError(
                    f"there is not enough memory ({asked}); {lower}take a machine with more, or one with less to do"
                )
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while, and so on."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def exit_code(error: Exception) -> int | None:
    """Exit code of an error whose message says all a user needs; None for one that is a fault of ours.

    Looked up by what is already imported: a store's or a kernel's error cannot come before its module.
    """
    if isinstance(error, InputError):
        return 2
    if isinstance(error, TrainingDivergedError | WorkerLostError | MemoryExhaustedError):
        return 1
    store, kernels, cluster = (sys.modules.get(name) for name in ("store", "kernels", "engine.measure.cluster"))
    if cluster is not None and isinstance(error, cluster.ClusterError):
        return 1
    if store is not None and isinstance(error, store.StoreError | store.NetworkError):
        return 1
    if kernels is not None and isinstance(
        error, kernels.InvalidAttentionError | kernels.BackendUnavailableError | kernels.MetricError
    ):
        return 2
    if isinstance(error, OSError) and error.filename is not None:
        return 1
    return None


def reason_of(error: Exception) -> str:
    """What went wrong, for a sentence: the message; of a fault of ours with the error's class, one line."""
    error = foreseen(error)
    text = " ".join(str(error).split())
    return text if exit_code(error) is not None else f"{type(error).__name__}: {text}".removesuffix(": ")
