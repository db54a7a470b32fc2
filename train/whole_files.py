"""Files of this program's own: written whole or not at all, some with a checksum of themselves."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from store.disk import making, writing
from store.removal import named, remove
from store.system import sync_folder
from train.errors import InputError

logger = logging.getLogger(__name__)

_WRITTEN = ".written.json"  # in a folder of pictures: the files that this program left there


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, and a machine that loses power, sees all of it or none.

    Temporary file beside it, fsync, rename, fsync of the folder. The temporary name is always the same,
    so what a killed write leaves is overwritten by the next; a file has one writer. Raises DiskError, with nothing left
    behind, and StoreError: no file lies there, but a folder or a device.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The caller's own names, in an outputs folder that is this program's.
        with making(path, Path.is_file) as partial, open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)


def checked_json(document: Mapping[str, Any]) -> bytes:
    """A JSON object as text with a checksum of itself, the same bytes for the same values; NaN is refused."""
    body = json.dumps(document, sort_keys=True, allow_nan=False)
    whole = {"checksum": hashlib.sha256(body.encode()).hexdigest(), **document}
    return (json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def parse_checked_json(content: bytes, schema: str = "") -> dict[str, Any]:
    """The object that `checked_json` wrote, without the checksum.

    Any changed bit is a ValueError, and another schema; the message says how, as the end of a sentence.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not readable JSON ({error})") from error
    if not isinstance(document, dict) or "checksum" not in document:
        raise ValueError("holds no checksum of itself (earlier versions wrote none)")
    document.pop("checksum")
    try:
        sound = checked_json(document) == content
    except ValueError:  # a number that no writer of ours wrote
        sound = False
    if not sound:
        raise ValueError("changed after it was written (its checksum does not match)")
    if schema and document.get("schema") != schema:
        raise ValueError(f"is of schema {document.get('schema')!r}, expected {schema!r}")
    return document


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON values, all of them or nothing; NaN and infinity are refused."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def replace_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Write files into a folder, each whole, and remove those that the last call left there and this one does not.

    The folder keeps a list of them, `.written.json`; what is not in it stays. Raises DiskError, and InputError: a file
    that this program did not write has the name of one of them; nothing is written then. Where the list is damaged,
    which is logged, files of these names are taken for ours.
    """
    new = dict(files)
    record = folder / _WRITTEN
    before: list[str] = []
    if record.is_file():
        try:
            before = list(parse_checked_json(record.read_bytes())["files"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; files with the names of those written now are replaced", record)
            before = list(new)
    if foreign := [name for name in new if name not in before and os.path.lexists(folder / name)]:
        more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        raise InputError(f"{folder} holds {foreign[0]}{more}, which this program did not write; move the folder away")
    obsolete = [name for name in before if name not in new and Path(name).name == name]
    # Named before it is written: a killed call leaves nothing that the next one does not know.
    write_atomically(record, checked_json({"files": sorted([*new, *obsolete])}))
    for name, content in new.items():
        write_atomically(folder / name, content)
    for name in obsolete:
        remove(folder / name, named(re.escape(name)))
    write_atomically(record, checked_json({"files": sorted(new)}))
    return [folder / name for name in new]
