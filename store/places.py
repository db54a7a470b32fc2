"""From a path or a URL to what reads and writes files there, and whether a store may be made at it."""

from __future__ import annotations

import os
from pathlib import Path

from store.local import LocalStorage
from store.removal import schema_of
from store.schema import LEDGER_FILES, MARK, RECORD_BEGINS, SCHEMA, DamagedStoreError, StoreError, ledger_name
from store.storage import Location, Storage, location_of


def storage_at(given: str | os.PathLike[str] | Storage) -> Storage:
    """The files of a store at a path or URL; StoreError if what reads that URL is missing, or it is none."""
    if isinstance(given, Storage):
        return given
    location = location_of(given)
    if isinstance(location, Path):
        return LocalStorage(location)
    try:
        from store.objects import ObjectStorage
    except ImportError as error:
        raise StoreError(
            f"{location} lies in an object store; install what reads it: pip install 'vit-attention-engine[cloud]'"
        ) from error
    return ObjectStorage.open(location)


def require_place(storage: Storage) -> None:
    """Check that a store lies here, or that one can be made without touching what is not ours; nothing is written.

    Raises:
        DamagedStoreError: a store of ours that has lost its ledger.
        StoreError: something else lies here; or nothing does and the name does not end in .zarr, is a link's, lies
            inside a store or a ledger, or what lies where its ledger would is another store's, or not ours.
    """
    name, location = storage.name, storage.location
    ledger = storage.beside(ledger_name(name))
    if storage.is_there():
        if not ledger.exists("metadata.json"):
            ours = schema_of(storage.fetch(["zarr.json"])[0]) == SCHEMA
            raise (DamagedStoreError if ours else StoreError)(
                f"{storage} has no ledger at {ledger}; a store that is moved or renamed takes its ledger "
                f"along, as {ledger.name} beside it: put it there, or delete the store, or give another path"
                if ours
                else f"{storage} is there and no store of this program; give another path, where nothing lies yet"
            )
        return
    stem = name.removesuffix(".zarr")
    if stem == name or not stem.strip("."):
        raise StoreError(f"a store's name is {name!r}; expected one that ends in .zarr, as in maps.zarr")
    if isinstance(location, Path) and location.is_symlink():
        raise StoreError(f"{storage} is a link; give the path that it leads to")
    if around := containing_store(location):
        raise StoreError(f"{storage} lies inside {around}, which is a store or its ledger; give a path outside of it")
    files = ledger.own_files(LEDGER_FILES)
    if "metadata.json" in files and storage.beside(stem).exists("zarr.json"):
        raise StoreError(f"{ledger} is the ledger of the store {stem} beside it; give the new store another name")
    records = [file for file in files if file != "lock"]
    if records and "lock" not in files and not (ledger.fetch(records[:1])[0] or b"").startswith(RECORD_BEGINS):
        raise StoreError(f"{ledger} was not written by this program; move it away, or give the store another name")


def containing_store(location: Location) -> str:
    """The store or ledger that a place lies inside of, "" if none; of an object store, by name alone."""
    if not isinstance(location, Path):
        folders = location.partition("://")[2].split("/")[1:-1]
        return next((folder for folder in folders if folder.endswith((".zarr", ".ledger"))), "")
    for folder in location.parents:
        here = LocalStorage(folder)
        is_ledger = folder.name.endswith(".ledger") and here.exists("lock")
        if is_ledger or schema_of(here.fetch(["zarr.json"])[0]).startswith(MARK):
            return str(folder)
    return ""
