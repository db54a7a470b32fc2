"""How the program speaks to its user: sentences, progress bars, and errors that say all in one sentence."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from store.disk import DiskError, disk_error, is_refusal
from train.errors import brief, printable
from train.processes import first_process

# What the user types: the console script, or Python's -m.
PROGRAM = "vit-attention" if Path(sys.argv[0]).stem == "vit-attention" else "python -m engine.run"

# What torch and others raise as a RuntimeError.
_NO_MEMORY = re.compile(r"can(?:not|'t) allocate memory|not enough memory|out of memory|bad_alloc", re.IGNORECASE)


def say(sentence: str) -> None:
    """Print a sentence above any progress bar; of several processes that torchrun started, the first one does."""
    if first_process():
        tqdm.write(printable(sentence))


class ImageProgress(AbstractContextManager["ImageProgress"]):
    """A progress bar with images/s, and GB/s of attention before compression; off when not in a terminal.

    Of several processes, the first one has it. Of `total` images an earlier run has `done` some; `image_bytes` of
    attention per image are stored before compression, or none, and no GB/s is shown. `options` are tqdm's.
    """

    def __init__(self, label: str, total: int, done: int, image_bytes: int, **options: Any) -> None:
        shown = {"disable": None if first_process() else True}
        self._bar = tqdm(total=total, initial=done, desc=label, unit="image", **shown | options)
        self._image_bytes = image_bytes
        self._begin = time.monotonic()
        self._images = 0

    def update(self, images: int) -> None:
        """Count images that were done since the last call."""
        self._images += images
        if self._image_bytes:
            rate = self._images * self._image_bytes / max(time.monotonic() - self._begin, 1e-9)
            self._bar.set_postfix_str(f"{rate / 1e9:.2f} GB/s", refresh=False)
        self._bar.update(images)

    def reach(self, images: int) -> None:
        """Show how many images are done by now, those of other processes among them."""
        self.update(images - self._images)

    def __exit__(self, *exception: object) -> None:
        self._bar.close()


@runtime_checkable
class ForeseenError(Protocol):
    """An error whose message is one sentence that says all that a user needs: no traceback is shown.

    Attributes:
        exit_code: of the program: 2 for bad input, 1 for failure.
    """

    exit_code: int


class MemoryExhaustedError(RuntimeError):
    """There is less memory than was asked for; the message says which key to lower."""

    exit_code = 1


def exit_code(error: Exception) -> int | None:
    """The program's exit code after an error; None for a fault of the program, whose traceback is shown."""
    if isinstance(error, ForeseenError):
        return error.exit_code
    return 1 if isinstance(error, OSError) and error.filename is not None else None


def foreseen(error: Exception, batch_keys: Sequence[str] = ()) -> Exception:
    """An error of the disk or of memory, wherever it came from, as the one that says so; any other as it is.

    `batch_keys` are those that decide how much memory the command takes.
    """
    if exit_code(error) is not None and not isinstance(error, OSError):
        return error
    for cause in _chain(error):
        if str(cause).startswith(f"[Errno {errno.ENOENT}] No usable temporary directory"):  # Python's tempfile
            return DiskError("no folder for temporary files can be written; set TMPDIR to one that can")
        if isinstance(cause, OSError) and is_refusal(cause):
            return disk_error(f"{cause.filename or 'a file'} cannot be read or written", cause)
    if exit_code(error) is None and (lack := next(filter(_is_of_memory, _chain(error)), None)):
        lower = f"lower {' or '.join(f'--{key}' for key in batch_keys)}, or " if batch_keys else ""
        return MemoryExhaustedError(
            f"there is not enough memory ({brief(lack)}); {lower}take a machine with more, or one with less to do"
        )
    return error


def reason_of(error: Exception) -> str:
    """What went wrong, for a sentence: the message on one line; of a fault of the program with the error's class."""
    error = foreseen(error)
    text = " ".join(str(error).split())
    return text if exit_code(error) is not None else f"{type(error).__name__}: {text}".removesuffix(": ")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from or while, and so on."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_of_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))
