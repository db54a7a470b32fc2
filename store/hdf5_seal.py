"""A seal before an HDF5 file of ours: the sha256 of everything behind it, in the block that HDF5's readers pass over.

HDF5 has checksums for chunks, and none for names, attributes, strings and for what lies where: a flipped bit there
gives other values, or ends the process. Looked at before the library opens a file, the seal finds any.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from store.disk import making, writing
from store.removal import Mark
from store.schema import StoreError
from store.system import sync_folder

BLOCK_BYTES = 512  # HDF5's user block
DAMAGE = (OSError, RuntimeError, KeyError)  # what h5py raises of a damaged file


@contextlib.contextmanager
def sealed(path: Path, schema: str, mark: Mark) -> Iterator[Path]:
    """Where to write an HDF5 file behind a user block; it appears as `path`, sealed and on disk, when it is whole.

    Args:
        schema: what kind of file it is.
        mark: of what it may replace, see `store.removal`.

    Raises:
        DiskError: the file cannot be written.
        StoreError: something else lies there.
    """
    with making(path, mark) as partial:
        yield partial
        with open(partial, "r+b") as file:
            seal = _seal(file, schema)
            file.seek(0)
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
    with writing(path):
        sync_folder(path.absolute().parent)


def is_sealed(path: Path, schema: str) -> bool:
    """Whether a file is one of a kind whose name begins so, sound or damaged."""
    if not path.is_file():  # a device may never end
        return False
    with open(path, "rb") as file:
        return file.read(BLOCK_BYTES).startswith(schema.encode())


def check_seal(path: Path, schema: str) -> bool:
    """Compare a file with its seal; False if it is not sealed as this kind, StoreError if its bytes are others now."""
    with open(path, "rb") as file:
        block = file.read(BLOCK_BYTES)
        if not block.startswith(_beginning(schema)):
            return False
        if not block.startswith(_seal(file, schema)):
            raise StoreError(
                f"{path} is damaged: its bytes are not the ones that were written; write it again, or, if it was "
                "changed on purpose, copy what it holds to a new HDF5 file"
            )
    return True


def _beginning(schema: str) -> bytes:
    return f"{schema}, sha256 of what follows these {BLOCK_BYTES} bytes: ".encode()


def _seal(file: IO[bytes], schema: str) -> bytes:
    file.seek(BLOCK_BYTES)
    return _beginning(schema) + hashlib.file_digest(file, "sha256").hexdigest().encode()  # type: ignore[arg-type]
