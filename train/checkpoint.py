"""Checkpoints: safetensors beside a JSON sidecar with its sha256, both written atomically.

safetensors has no checksum of its own: a flipped bit in a weight loads without a word. The sidecar
`<name>.json` beside `<name>.safetensors` holds the sha256 of the file, what the weights are, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from store.disk import making, writing
from store.removal import remove
from train.errors import DamagedFileError, InputError
from train.files import require_file

if TYPE_CHECKING:
    import torch

__all__ = [
    "Checkpoint",
    "checked_json",
    "checkpoint_facts",
    "file_digest",
    "has_sidecar",
    "parse_checked_json",
    "read_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "sidecar_path",
    "state_digest",
    "write_atomically",
]

SCHEMA = "vit-checkpoint/2"
# A sidecar of ours has both of these texts, so one that lost one of them to damage is still known as ours.
_MARKS = (b"vit-checkpoint/", b'"checksum": "')


@dataclass(frozen=True)
class Checkpoint:
    """Verified weights and what is known of them.

    Args:
        path: the `.safetensors` file.
        sha256: of its bytes, as written in the sidecar and found in the file.
        metadata: model, num_classes, recipe, seed, accuracies, preprocessing, … as they were saved.
        tensors: the state dict, on the CPU.
    """

    path: Path
    sha256: str
    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def sidecar_path(path: Path) -> Path:
    """`a/b.safetensors` → `a/b.json`."""
    return path.with_suffix(".json")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, and a machine that loses power, sees all of it or none.

    Temporary file beside it, fsync, rename, fsync of the folder. The temporary name is always the same,
    so what a killed write leaves is overwritten by the next; a file has one writer.

    Raises:
        DiskError: the folder is not writable or the disk is full; nothing is left behind.
        StoreError: no file lies there, but a folder or a device.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The caller's own names, in an outputs folder that is this program's.
        with making(path, Path.is_file) as partial, open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable (POSIX; elsewhere the rename itself is the best there is)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checked_json(document: Mapping[str, Any]) -> bytes:
    """A JSON object as readable text with a checksum of itself, the same bytes for the same values.

    Raises:
        ValueError: NaN or infinity, or a value that JSON has no form for.
    """
    body = json.dumps(document, sort_keys=True, allow_nan=False)
    whole = {"checksum": hashlib.sha256(body.encode()).hexdigest(), **document}
    return (json.dumps(whole, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def parse_checked_json(content: bytes) -> dict[str, Any]:
    """The object that `checked_json` wrote, without the checksum; any changed bit is found.

    Raises:
        ValueError: it is not what `checked_json` wrote; the message says how, as the end of a sentence.
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
    return document


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of a state dict, whatever order its keys are in."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def save_checkpoint(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    """Write weights and their sidecar; returns the sha256 of the weights' file.

    The sidecar is the commit: it is removed before the weights are replaced and written after them, so
    a killed save leaves a file without a sidecar and never a sidecar that describes other weights.
    The bytes depend on `state` and `metadata` alone.

    Args:
        path: ends in `.safetensors`.
        state: tensors on any device.
        metadata: JSON values.

    Raises:
        ValueError: another suffix.
        DiskError: not writable, or the disk is full.
        StoreError: a JSON file that is no sidecar of ours lies beside it.
    """
    from safetensors.torch import save

    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint {path} must end in .safetensors")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    content = save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    sidecar = checked_json({"schema": SCHEMA, "file": path.name, "sha256": sha256, **metadata})
    remove(sidecar_path(path), lambda _: has_sidecar(path))
    write_atomically(path, content)
    write_atomically(sidecar_path(path), sidecar)
    return sha256


def has_sidecar(path: Path) -> bool:
    """Whether the JSON file beside a checkpoint, if there is one, is a sidecar of ours, sound or damaged."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return False
    content = sidecar.read_bytes()
    return not content.strip() or any(mark in content for mark in _MARKS)


def read_metadata(path: Path) -> dict[str, Any]:
    """The sidecar of a checkpoint, `sha256` included, checked against its own checksum; the weights are not read.

    Raises:
        InputError: no sidecar.
        DamagedFileError: it is not as it was written.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise InputError(
            f"checkpoint {path} has no {sidecar.name} beside it, so its save was not finished; train it again"
        )
    try:
        document = parse_checked_json(sidecar.read_bytes())
        if document.get("schema") != SCHEMA:
            raise ValueError(f"is of schema {document.get('schema')!r}, expected {SCHEMA!r}")
    except ValueError as error:
        raise DamagedFileError(
            f"{sidecar} {error}; train its checkpoint again, or delete {sidecar.name} to use the weights as a file of "
            "which nothing is known"
        ) from error
    return document


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint of ours says of itself, such as `model`, `img_size`, `preprocessing`; {} for any other file.

    Raises:
        DamagedFileError: its sidecar is not as it was written.
    """
    return read_metadata(path) if path.suffix == ".safetensors" and has_sidecar(path) else {}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read weights that `save_checkpoint` wrote, after checking every byte against the sidecar.

    Raises:
        InputError: no such file, or no sidecar.
        DamagedFileError: the bytes are not the ones that were saved; the message names the file.
    """
    from safetensors.torch import load

    require_file(path, "checkpoint", "expected a .safetensors file that was saved before")
    metadata = read_metadata(path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != metadata["sha256"]:
        if (of := metadata.get("file", path.name)) != path.name:
            raise DamagedFileError(
                f"checkpoint {path}: {sidecar_path(path).name} beside it was written for {of}, with other weights; put "
                f"its own there, or delete {sidecar_path(path).name} to use the weights as a file of which nothing is "
                "known"
            )
        raise DamagedFileError(
            f"checkpoint {path} is damaged: its sha256 is {found[:12]}…, its sidecar says "
            f"{metadata['sha256'][:12]}…; delete both files and train it again"
        )
    return Checkpoint(path=path, sha256=found, metadata=metadata, tensors=load(content))
