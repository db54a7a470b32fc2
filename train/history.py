"""The history of a training run: JSON lines beside its checkpoint, and TensorBoard on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.errors import InputError
from train.whole_files import write_atomically


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
    """A function that takes the history so far and writes its new epochs as scalars to `folder`.

    Raises:
        InputError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "train.tensorboard is true, but tensorboard is not installed; install it with "
            "pip install 'vit-attention-engine[tensorboard]', or leave the key out"
        ) from error
    writer = SummaryWriter(str(folder))
    written = 0

    def write(history: Sequence[Mapping[str, Any]]) -> None:
        nonlocal written
        for entry in history[written:]:
            for name, value in entry.items():
                if name != "epoch":
                    writer.add_scalar(name, value, entry["epoch"])
        written = len(history)
        writer.flush()

    return write
