"""A user's HDF5 file, looked at before its values are read: what kind of file it is, and what it needs to be read.

HDF5's library follows links to other files, makes room for whatever size a file states, and trusts the file's own
bytes: damaged ones can end the process, or keep it busy for ever.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from store.schema import StoreError

_SECONDS = 30  # of CPU time, for what takes a part of one
_CHUNK_BYTES = 1 << 30
_SHRUNK = 2000  # gzip makes zeros a thousandth, and nothing less than that
_SMALL_BYTES = 1 << 20

# How files begin that are taken for HDF5 -> what they are, and what to do.
_KINDS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    (b"<!doctype html", "is a web page; download the file itself"),
    (b"<html", "is a web page; download the file itself"),
    (b"matlab 5.0 mat-file", "is a MATLAB file of an earlier format; save it in MATLAB with the option -v7.3"),
    (b"cdf", "is a netCDF-3 file; convert it with nccopy -k netCDF-4"),
    (b"\x0e\x03\x13\x01", "is an HDF4 file; convert it with h4toh5"),
    (b"pk\x03\x04", "is a zip archive (as .npz and .pt files are); write what it holds to an HDF5 file"),
    (b"\x93numpy", "is a NumPy array; write it to an HDF5 file with h5py"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
)

# Compressions that come as plugins, by their registered numbers.
_FILTERS = {
    **{4: "szip", 305: "lzo", 307: "bzip2", 32001: "Blosc", 32004: "LZ4", 32008: "bitshuffle", 32013: "ZFP"},
    **{32015: "Zstandard", 32017: "SZ", 32024: "SZ3", 32026: "Blosc2", 32029: "Sperr", 32040: "JPEG"},
}


def open_hdf5(path: Path) -> Any:
    """The file, open for reading; StoreError if there is none, or it is of another kind, damaged or being written."""
    import h5py

    if not path.is_file():
        raise StoreError(f"{path} is {'no file, but a folder or a device' if path.exists() else 'not there'}")
    with open(path, "rb") as content:
        begin = content.read(512).lstrip().lower()
    if not begin:
        raise StoreError(f"{path} is empty; expected an HDF5 file")
    for mark, what in _KINDS:
        if begin.startswith(mark):
            raise StoreError(f"{path} {what}")
    try:
        return h5py.File(path, "r")
    except BlockingIOError as error:
        raise StoreError(f"{path} is open for writing in another program; close it there") from error
    except (OSError, RuntimeError, ValueError) as error:
        if "consistency flags" in str(error):
            what = "was not closed by the program that wrote it, or is being written; close it there, or run h5clear -s"
            raise StoreError(f"{path} {what} {path.name}") from error
        raise StoreError(f"{path} cannot be read as HDF5 ({error}); copy it again, or write it again") from error


def fatality(read: Callable[[], object]) -> str:
    """What becomes of a process that reads a file, for a sentence; "" if it lives on: a copy of this one tries.

    What the reading raises is no matter here: this process meets it, too. Windows makes no copies of processes.
    """
    if not hasattr(os, "fork"):
        return ""
    import resource

    copy = os.fork()
    if not copy:
        with contextlib.suppress(BaseException):
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the C library says at its end
            read()
        os._exit(0)
    status = os.waitpid(copy, 0)[1]
    if not os.WIFSIGNALED(status):
        return ""
    if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return f"HDF5's library does not come back from it in {_SECONDS} s"
    return "HDF5's library fails on it"


def datasets(file: Any) -> Iterator[tuple[str, Any]]:
    """Name and dataset of all that lies in a file, each once; StoreError if a link leads into another file."""
    import h5py

    seen: set[Any] = set()
    groups: list[tuple[str, Any]] = [("", file["/"])]
    while groups:
        path, group = groups.pop()
        for key in group.id:  # bytes: not every name is UTF-8
            name = path + as_text(key)
            link = group.id.links.get_info(key).type
            if link == h5py.h5l.TYPE_EXTERNAL:
                other = as_text(group.id.links.get_val(key)[0])
                raise StoreError(
                    f"{file.filename}: {name} is a link into another file, {other}, and other files are not read; "
                    "copy what it leads to into this file, or remove the link"
                )
            if link != h5py.h5l.TYPE_HARD:  # another name for something in this file, or for nothing
                continue
            item = group[key]
            place = h5py.h5o.get_info(item.id).addr
            if place in seen:
                continue
            seen.add(place)
            if isinstance(item, h5py.Dataset):
                yield name, item
            elif isinstance(item, h5py.Group):
                groups.append((f"{name}/", item))


def require_readable(file: Any, name: str, dataset: Any) -> None:
    """Raises StoreError unless a dataset's values are in this file, in a form that is read in bounded memory."""
    import h5py

    where = f"{file.filename}: {name}"
    if dataset.file.filename != file.filename or dataset.is_virtual or dataset.external:
        raise StoreError(f"{where} keeps its values in another file, and other files are not read; copy them into one")
    plist = dataset.id.get_create_plist()
    for number, _, _, described in (plist.get_filter(index) for index in range(plist.get_nfilters())):
        if not h5py.h5z.filter_avail(number):
            known = _FILTERS.get(number) or as_text(described).strip("\0 ") or "of an unknown name"
            raise StoreError(
                f"{where} is compressed by a plugin that is not here ({known}, filter {number}); set HDF5_PLUGIN_PATH "
                "to where the plugin lies, or write the file again with gzip or without compression"
            )
    shape = dataset.shape
    if shape is None:
        raise StoreError(f"{where} is empty; expected values")
    try:
        stated = math.prod(shape) * dataset.dtype.itemsize
    except TypeError as error:
        raise StoreError(f"{where} is of a type that cannot be read ({error}); expected numbers") from error
    held = dataset.id.get_storage_size()
    if stated > max(_SMALL_BYTES, _SHRUNK * held):
        raise StoreError(
            f"{where} states {stated / 1e9:,.1f} GB of values and holds {held / 1e6:,.1f} MB; it was not written to "
            "its end, so write it again"
        )
    if dataset.chunks and (chunk := math.prod(dataset.chunks) * dataset.dtype.itemsize) > _CHUNK_BYTES:
        raise StoreError(
            f"{where} is stored in chunks of {chunk / 1e9:,.1f} GB, each of which must be read as a whole; write it "
            f"again with smaller ones, of an image each (at most {_CHUNK_BYTES / 1e9:.0f} GB)"
        )


def attribute(item: Any, name: str) -> str:
    """An attribute that is text; "" for none, and what stands there for one that is something else."""
    try:
        value = item.attrs.get(name, "")
    except Exception as error:  # of a foreign file: h5py raises errors of many kinds for types that it does not know
        return f"unreadable ({type(error).__name__})"
    if isinstance(value, bytes):
        return as_text(value)
    return value if isinstance(value, str) else repr(value)


def as_text(content: bytes) -> str:
    """Text of an encoding that nothing states."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
