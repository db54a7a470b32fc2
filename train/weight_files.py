"""What a checkpoint file holds, by its content and not by its name: safetensors, or what torch.save writes.

Nothing in a file is run: torch's reader for weights alone reads it, and every checksum that the file has is compared.
What is neither of the two is called what it is.
"""

from __future__ import annotations

import functools
import logging
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from train.checkpoint import has_sidecar, read_checkpoint
from train.errors import DamagedFileError, InputError, brief, printable
from train.files import require_file, what_lies_at

logger = logging.getLogger(__name__)

EXPECTED = "expected safetensors, or weights that torch.save wrote"

_HEAD = 4096  # bytes that are looked at to say what a file is
_ZIP = b"PK\x03\x04"
_MOST_PACKED = 20  # times the size of the file
# What zipfile raises for the ways in which a record can be damaged (OSError: a place before the file).
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
_LEGACY_MARK = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # torch's magic number, as pickled

# First bytes of files that are no checkpoints -> what they are and what to do.
_KINDS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, which stands for the file; fetch the file itself: git lfs pull"),
    (b"\x89HDF\r\n\x1a\n", "HDF5, as Keras saves weights; a model of timm takes weights of PyTorch"),
    (b"\x1f\x8b", "compressed with gzip; unpack it first"),
    (b"BZh", "compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"GGUF", "GGUF, weights for llama.cpp; give the ones it was made from"),
    (b"\x93NUMPY", "one NumPy array, not a model's weights by name"),
    (b"%PDF", "a PDF"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
)
_SUFFIXES = {
    ".onnx": "ONNX, a graph with weights under other names; give the PyTorch weights it was exported from",
    ".msgpack": "Flax's msgpack; give the model's PyTorch or safetensors file",
    ".pb": "a TensorFlow graph; give the model's PyTorch or safetensors file",
    ".index": "the index of a TensorFlow checkpoint; give the model's PyTorch or safetensors file",
}


def read_content(path: Path) -> Any:
    """The objects in a checkpoint file: the tensors by name, or what was saved with them around."""
    head = _head(path)
    if has_sidecar(path):
        return read_checkpoint(path).tensors
    if head.startswith(_ZIP):
        _check_archive(path)
        return _read_torch(path)
    if head.startswith(b"\x80") and _LEGACY_MARK in head[:64]:
        say_once(f"{path} is in torch's format before 1.6, which holds no checksum: damage cannot be seen")
        return _read_torch(path)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100 << 20:
        return _read_safetensors(path)
    raise InputError(f"checkpoint {path} is {_kind(head, path)}")


@functools.cache
def say_once(sentence: str, level: int = logging.INFO) -> None:
    """A file is read by several stages; what is said of it is said once."""
    logger.log(level, "%s", sentence)


def shown(text: object) -> str:
    """A name out of a file, fit for a sentence: on one line, and not longer than 100 characters."""
    name = printable(text) or "''"
    return name if len(name) <= 100 else f"{name[:97]}…"


def _head(path: Path) -> bytes:
    folder = what_lies_at(path) == "is a folder"
    inside = [name for name in ("model.safetensors", "pytorch_model.bin") if folder and (path / name).is_file()]
    require_file(path, "checkpoint", f"give the file {path / inside[0]}" if inside else EXPECTED)
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _kind(head: bytes, path: Path) -> str:
    """What a file is that is no checkpoint, and what to do."""
    if not head:
        return "empty; copy or download it again"
    for start, kind in _KINDS:
        if head.startswith(start):
            return kind if ";" in kind else f"{kind}; {EXPECTED}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "a web page: its download gave a page in place of the file; download the file itself"
    if text.startswith(b"<"):
        return "XML, such as servers answer with when a download fails; download the file itself"
    if text.startswith((b"{", b"[")):
        if b'"weight_map"' in head or path.name.endswith(".index.json"):
            return (
                "the index of a checkpoint in several files, which are not put together here; save it as one file "
                "(in transformers: model.save_pretrained(folder, max_shard_size='100GB'))"
            )
        return f"JSON text; {EXPECTED}"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and give the file inside"
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    if head.startswith(b"\x80"):
        return (
            "a pickle that torch.save did not write, which could run code; load it where it was made and "
            "torch.save(model.state_dict(), FILE)"
        )
    return f"not a checkpoint file (it begins with {head[:8]!r}), or its beginning is damaged; {EXPECTED}"


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # a foreign decoder: its classes of errors (of types, sizes, names) are not declared
        raise InputError(
            f"checkpoint {path} is not a readable safetensors file ({brief(error)}): it is cut short or damaged; "
            "copy or download it again"
        ) from error


class _Inert:
    """Stands for an object beside the weights; nothing of its class is imported or run, and nothing of it is used."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# Settings and numbers that training scripts save beside the weights, by the names under which they are pickled.
_HARMLESS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"pathlib{local}.{name}" for local in ("", "._local") for name in ("Path", "PosixPath", "WindowsPath")),
    *("datetime.datetime", "datetime.date", "datetime.timedelta"),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)


def _read_torch(path: Path) -> Any:
    try:
        # The file and not its path, of which torch would look at the ending.
        with open(path, "rb") as file, torch.serialization.safe_globals([(_Inert, name) for name in _HARMLESS]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each way a file can be broken
        said = str(error)
        if "weights_only" in said or "Unsupported" in said:
            named = re.search(r"GLOBAL (\S+)", said)
            kind = f" (of {shown(named[1])})" if named else ""
            raise InputError(
                f"checkpoint {path} holds pickled objects{kind} beside tensors, which could run code and are refused; "
                "save model.state_dict() alone, or a .safetensors file"
            ) from error
        raise InputError(
            f"checkpoint {path} is not a file that torch.save wrote, or it is cut short or damaged "
            f"({brief(error)}); save or copy it again"
        ) from error


def _check_archive(path: Path) -> None:
    """See that a zip archive is torch.save's, and compare each record with its CRC-32, which torch.load does not do."""
    try:
        archive = zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise InputError(
            f"checkpoint {path} is not a file that torch.save wrote, or it is cut short: its list of records cannot be "
            f"read ({brief(error)}); copy or download it again"
        ) from error
    with archive:
        records = archive.infolist()
        if kind := _other_archive([record.filename for record in records]):
            raise InputError(f"checkpoint {path} is {kind}")
        unpacked = sum(record.file_size for record in records)
        if unpacked > _MOST_PACKED * path.stat().st_size:  # torch.save packs nothing
            raise InputError(
                f"checkpoint {path} unpacks to {unpacked} bytes, more than weights can; save it with torch.save"
            )
        if not any(record.CRC for record in records):
            say_once(f"{path} was saved without checksums (set_crc32_options): damage cannot be seen")
            return
        for record in records:
            try:
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass
            except _ZIP_ERRORS as error:
                raise DamagedFileError(
                    f"checkpoint {path} is damaged: its record {shown(record.filename)} is not as it was saved "
                    f"({brief(error)}); copy or download the file again"
                ) from error


def _other_archive(names: list[str]) -> str:
    """What a zip archive is, if it is none of torch.save, and what to do; "" for one of torch.save."""
    folders = {name.partition("/")[0] for name in names}
    if any(f"{folder}/constants.pkl" in names for folder in folders):
        return (
            "TorchScript, a program with its weights; save the weights alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
        )
    if any(f"{folder}/data.pkl" in names for folder in folders):
        return ""
    if names and all(name.endswith(".npy") for name in names):
        return (
            "a NumPy archive, as JAX models are saved; convert it with timm: timm.create_model(NAME, "
            "checkpoint_path=FILE), then torch.save(model.state_dict(), 'weights.pth')"
        )
    inside = f"it holds {shown(names[0])}" if names else "it is empty"
    return f"a zip archive that torch.save did not write ({inside}); unpack it, or save the weights with torch.save"
