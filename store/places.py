"""From a path or a URL to what reads and writes files there."""

from __future__ import annotations

import os
from pathlib import Path

from store.local import LocalStorage
from store.storage import Storage, location_of

__all__ = ["storage_at"]


def storage_at(given: str | os.PathLike[str] | Storage) -> Storage:
    """The files of a store at a path or URL.

    Raises:
        StoreError: what reads that URL is not installed, or it is no URL of an object store.
    """
    if isinstance(given, Storage):
        return given
    location = location_of(given)
    if isinstance(location, Path):
        return LocalStorage(location)
    from store.objects import ObjectStorage

    return ObjectStorage.open(location)
