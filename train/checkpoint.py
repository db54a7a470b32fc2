"""Checkpoints: safetensors, beside them a JSON sidecar with its sha256 and the history of the training run.

safetensors has no checksum of its own: a flipped bit in a weight loads without a word. The sidecar
`<name>.json` beside `<name>.safetensors` holds the sha256 of the file, what the weights are, and a checksum of itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from store.removal import remove
from train.errors import DamagedFileError, InputError
from train.files import require_file
from train.whole_files import checked_json, parse_checked_json, write_atomically

SCHEMA = "vit-checkpoint/2"
# A sidecar of ours has both of these texts, so one that lost one of them to damage is still known as ours.
_MARKS = (b"vit-checkpoint/", b'"checksum": "')


@dataclass(frozen=True)
class Checkpoint:
    """Verified weights and what is known of them."""

    metadata: dict[str, Any]  # model, num_classes, recipe, seed, accuracies, preprocessing, … as they were saved
    tensors: dict[str, torch.Tensor]  # the state dict, on the CPU


def sidecar_path(path: Path) -> Path:
    """`a/b.safetensors` → `a/b.json`."""
    return path.with_suffix(".json")


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of a state dict, whatever order its keys are in."""
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
    The bytes depend on `state`, tensors on any device, and `metadata`, JSON values, alone. Raises DiskError, and
    StoreError: a JSON file that is no sidecar of ours lies beside it.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint {path} must end in .safetensors")
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    content = safetensors.torch.save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    sidecar = checked_json({"schema": SCHEMA, "file": path.name, "sha256": sha256, **metadata})
    remove(sidecar_path(path), lambda _: has_sidecar(path))
    write_atomically(path, content)
    write_atomically(sidecar_path(path), sidecar)
    return sha256


def has_sidecar(path: Path) -> bool:
    """Whether a checkpoint is of training here: a sidecar of ours, sound or damaged, lies beside a .safetensors."""
    sidecar = sidecar_path(path)
    if path.suffix != ".safetensors" or not sidecar.is_file():
        return False
    content = sidecar.read_bytes()
    return not content.strip() or any(mark in content for mark in _MARKS)


def read_metadata(path: Path) -> dict[str, Any]:
    """The sidecar of a checkpoint, `sha256` included, checked against its own checksum; the weights are not read.

    Raises InputError without a sidecar, DamagedFileError if it is not as it was written.
    """
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        raise InputError(
            f"checkpoint {path} has no {sidecar.name} beside it, so its save was not finished; train it again"
        )
    try:
        document = parse_checked_json(sidecar.read_bytes(), SCHEMA)
    except ValueError as error:
        raise DamagedFileError(
            f"{sidecar} {error}; train its checkpoint again, or delete {sidecar.name} to use the weights as a file of "
            "which nothing is known"
        ) from error
    return document


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint of ours says of itself, such as `img_size`; {} for any other file."""
    return read_metadata(path) if has_sidecar(path) else {}


def read_checkpoint(path: Path) -> Checkpoint:
    """Read weights that `save_checkpoint` wrote, after checking every byte against the sidecar.

    Raises InputError: no such file, or no sidecar; DamagedFileError: the bytes are not the ones that were saved.
    """
    require_file(path, "checkpoint", "expected a .safetensors file that was saved before")
    metadata = read_metadata(path)
    content = path.read_bytes()
    sha256, sidecar = hashlib.sha256(content).hexdigest(), sidecar_path(path).name
    if sha256 != metadata["sha256"]:
        if (written_for := metadata.get("file", path.name)) != path.name:
            raise DamagedFileError(
                f"checkpoint {path}: {sidecar} beside it was written for {written_for}, with other weights; put its "
                f"own there, or delete {sidecar} to use the weights as a file of which nothing is known"
            )
        raise DamagedFileError(
            f"checkpoint {path} is damaged: its sha256 is {sha256[:12]}…, its sidecar says "
            f"{metadata['sha256'][:12]}…; delete both files and train it again"
        )
    return Checkpoint(metadata, safetensors.torch.load(content))


def history_path(checkpoint: Path) -> Path:
    """`a/b.safetensors` → `a/b.history.jsonl`."""
    return checkpoint.with_suffix(".history.jsonl")


def write_history(checkpoint: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One line per epoch (per penalty, for a probe); written whole each time, so that a resumed run repeats no line.

    The same history is in the checkpoint's sidecar, under its checksum: from it a damaged file is written again.
    """
    content = "".join(json.dumps(entry, sort_keys=True, allow_nan=False) + "\n" for entry in history).encode()
    path = history_path(checkpoint)
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


def tensorboard_writer(folder: Path) -> Callable[[Sequence[Mapping[str, Any]]], None]:
    """A function that takes the history so far and writes its new epochs as scalars to `folder`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "train.tensorboard is true, but tensorboard is not installed; install it with "
            "pip install 'vit-attention-engine[tensorboard]', or leave the key out"
        ) from error
    writer: SummaryWriter | None = None
    written = 0

    def write(history: Sequence[Mapping[str, Any]]) -> None:
        nonlocal writer, written
        # Purged: what the folder holds of a run that was cut, and which now goes on with its whole history.
        writer = writer or SummaryWriter(str(folder), purge_step=0)
        for entry in history[written:]:
            for name, value in entry.items():
                if name != "epoch":
                    writer.add_scalar(name, value, entry["epoch"])
        written = len(history)
        writer.flush()

    return write
