"""The history of a training run: JSON lines beside its checkpoint, and TensorBoard on request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.checkpoint import write_atomically
from train.errors import InputError

__all__ = ["history_path", "tensorboard_writer", "write_history"]


def history_path(checkpoint: Path) -> Path:
    """`a/b.safetensors` → `a/b.history.jsonl`."""
    return checkpoint.with_suffix(".history.jsonl")


def write_history(checkpoint: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """One line an epoch (a penalty, for a probe); written whole each time, so that a resumed run repeats no line."""
    lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in history)
    write_atomically(history_path(checkpoint), lines.encode())


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
