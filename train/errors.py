"""The errors of training: what a user can put right, and what a run met on its way; `exit_code` is the program's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

from store.redaction import redacted


class InputError(ValueError):
    """Bad input: the message is one sentence with what was found, what was expected and what to do.

    The command line prints it without a traceback.
    """

    exit_code = 2


class DamagedFileError(InputError):
    """A file whose bytes are not the ones that were written; the message names the file."""


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message names the step and its images."""

    exit_code = 1


class WorkerLostError(RuntimeError):
    """Another of the processes that work together has ended; what was finished stays."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(name[:4096], list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def require_known(what: str, name: str, known: Collection[str]) -> None:
    """Raise InputError for a name that is not one of those known."""
    if name not in known:
        raise InputError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


def printable(text: object) -> str:
    """A text on one line that a terminal shows as it is meant: odd characters are escaped, secrets in URLs left out."""
    return redacted("".join(c if c.isprintable() else _escape(c) for c in str(text)))


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8
        return f"\\x{ord(character) & 0xFF:02x}"
    return character.encode("unicode_escape").decode()


def brief(error: BaseException) -> str:
    """The first line of an error's text (after a colon the next, too), for a sentence; of a bare key, its class too."""
    line = " ".join(re.split(r"(?<!:)\n", str(error).strip())[0].split())
    bare = not line or isinstance(error, KeyError)
    return printable(f"{type(error).__name__} {line}".strip() if bare else line)[:200].rstrip(". ")
