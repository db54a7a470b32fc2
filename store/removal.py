"""The one place where anything is removed or replaced, here and in the packages above: only what this program wrote.

`remove` and `put` take a mark, which says of what lies there whether it is ours. Marks are: the attribute `schema` of a
Zarr group that holds no other files than such a group of ours does; a name that no other program gives (`unfinished`);
or a name that is ours in a folder that is ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store.schema import MARK, StoreError

UNFINISHED = f".{MARK}.partial"

Mark = Callable[[Path], bool]


def unfinished(path: Path) -> Path:
    """Where what becomes `path` is put together: beside it, under a name that no other program gives."""
    return path.with_name(f".{path.name}{UNFINISHED}")


def is_unfinished(path: Path) -> bool:
    """The mark of what `unfinished` names."""
    return path.name.endswith(UNFINISHED)


def named(pattern: str) -> Mark:
    """The mark of files that have names of a pattern, in a folder where such names are ours."""
    return lambda path: re.fullmatch(pattern, path.name) is not None


def own_zarr(schema: str, files: str) -> Mark:
    """The mark of a folder that is a Zarr group with this attribute `schema`, and holds files of these names alone."""
    holds = holds_only(files)
    return lambda folder: schema_of(_content(folder / "zarr.json")) == schema and holds(folder)


def holds_only(files: str) -> Mark:
    """The mark of a folder inside one that is ours, which holds files of these names, and unfinished ones."""

    def holds(folder: Path) -> bool:
        contents = (Path(below) / name for below, _, names in os.walk(folder) for name in names)
        return all(UNFINISHED in str(f) or re.fullmatch(files, f.relative_to(folder).as_posix()) for f in contents)

    return holds


def schema_of(zarr_json: bytes | None) -> str:
    """The attribute `schema` in a Zarr group's zarr.json; "" where there is none."""
    schema = attributes_of(zarr_json).get("schema")
    return schema if isinstance(schema, str) else ""


def attributes_of(zarr_json: bytes | None) -> dict[str, Any]:
    """The attributes in a Zarr group's zarr.json; none where there are none."""
    try:
        return dict(json.loads(zarr_json or b"")["attributes"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}


def remove(path: Path, mark: Mark) -> None:
    """Remove a file, or a folder with all that is in it; nothing where nothing lies. An empty folder needs no mark.

    Raises StoreError where something lies that is not ours, a link or a device.
    """
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        path.rmdir()
        return
    if path.is_symlink() or not (path.is_file() or path.is_dir()) or not mark(path):
        raise StoreError(
            f"{path} is in the way, and this program did not write it, or not all of it; "
            "move it away, or give another place"
        )
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_unfinished(partial: Path) -> None:
    """Remove what failed halfway, while threads of a library, one of which failed, may still write into it."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            remove(partial, is_unfinished)
        time.sleep(0.01)
        if not os.path.lexists(partial):
            return
    remove(partial, is_unfinished)


def put(partial: Path, path: Path, mark: Mark) -> None:
    """Give what is finished its name: a file at once in the place of another, a folder after the other was removed.

    Raises StoreError where something lies that is not ours by its mark, a link, a device or a folder in a file's place.
    """
    if partial.is_dir():
        remove(path, mark)
    elif os.path.lexists(path) and (not path.is_file() or not mark(path)):
        raise StoreError(f"{path} is no file that this program wrote, so it stays; move it away, or give another place")
    os.replace(partial, path)


def _content(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
