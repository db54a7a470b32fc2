"""Files as people have them: which are read, and how their names are written down and shown."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path, PurePath

from train.errors import InputError

_KINDS = {
    stat.S_IFDIR: "is a folder",
    stat.S_IFIFO: "is a named pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}

# What an id does not hold as it is: bytes that are not UTF-8, control characters, line breaks, characters that turn
# the text after them around; and a backslash that would be taken for the beginning of an escape.
_ESCAPED = re.compile(r"\\(?=x[0-9a-f]{2})|[\udc80-\udcff\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")


def id_of(path: PurePath | str) -> str:
    r"""A path as text that every file format and every terminal takes, with `/`; `path_of` gives the path again.

    Names are kept as they are. Only bytes that are not UTF-8, control characters, line breaks and changes of the
    direction of writing become `\xNN`, byte by byte: `caf\xe9.jpg`.
    """
    text = os.fsencode(path.as_posix() if isinstance(path, PurePath) else path).decode("utf-8", "surrogateescape")
    return _ESCAPED.sub(lambda match: _bytewise(match[0].encode("utf-8", "surrogateescape")), text)


def path_of(identity: str) -> Path:
    """The path that `id_of` wrote down."""
    return Path(os.fsdecode(_ESCAPE.sub(lambda match: bytes.fromhex(match[1].decode()), identity.encode())))


def _bytewise(content: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in content)


def what_lies_at(path: Path) -> str:
    """What keeps a path from being a file to read, as the end of a sentence; "" for a file. It is not opened."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "is a link that leads nowhere" if path.is_symlink() else "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except ValueError:  # a NUL in it
        return "does not exist"
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "is no file")


def require_file(path: Path, what: str, expected: str) -> None:
    """Raise InputError where a file cannot be read, before it is: a pipe or a device might never end.

    The sentence calls it `what`, such as "checkpoint", and ends with what is `expected`.
    """
    reason = what_lies_at(path)
    if not reason:
        try:
            with open(path, "rb"):
                return
        except OSError as error:
            reason = f"cannot be read ({error.strerror})"
    raise InputError(f"{what} {path} {reason}; {expected}")
