"""A small seeded capture for the store's tests, and a script that writes it and can be killed at any step.

    python tests/store_cases.py STORE [--kill-at N | --count | --wait]

`--kill-at N` ends the process by SIGKILL at the N-th file operation (open for writing, rename, remove, mkdir) on
the store or its ledger; `--count` prints how many there are; `--wait` says "ready" before it begins.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from store import AttentionStore, AttentionWriter, LayerSchema, StoreSchema
from store.results import MetricWriter

LAYOUT: dict[str, int | bool] = {
    "grid_rows": 3,
    "grid_cols": 4,
    "num_prefix_tokens": 2,
    "patch_height_px": 4,
    "patch_width_px": 4,
    "class_token": True,
}
TOKENS = 14
HEADS = (3, 2)  # a head less in layer 1: the metrics' head axis is padded
IMAGES = 11  # batches of 4, 4 and 3
CLASSES = 5
LATER = {"later_a": {"backend": "numba", "code_version": "1"}, "later_b": {"radius": 2}}


def make_schema(**changes: Any) -> StoreSchema:
    values: dict[str, Any] = {
        "layers": tuple(
            LayerSchema(layer=layer, site=f"blocks.{layer}.attn", heads=heads, layout=dict(LAYOUT))
            for layer, heads in enumerate(HEADS)
        ),
        "image_ids": tuple(f"classe é/{row}.png" for row in range(IMAGES)),
        "batch_size": 4,
        "encoding": "fp16",
        "metrics": {"region_mass": {"backend": "numba"}, "entropy": {"backend": "numba"}},
        "model": {"name": "vit_test", "weights_sha256": "0" * 64},
        "preprocessing": {"mean": [0.5, 0.5, 0.5], "size": [12, 16]},
        "dataset": {"id": "case", "split": "test", "sha256": "1" * 64},
        "precision": "float32",
        "num_classes": CLASSES,
        "code_version": "0.1.0",
        "regions": ("left", "right"),
        "region_metrics": ("region_mass",),
    }
    return StoreSchema(**(values | changes))


def fixed() -> dict[str, Any]:
    """What `AttentionWriter.open` takes besides the schema."""
    return {
        "labels": np.arange(IMAGES) % CLASSES,
        "class_names": [f"class {index}" for index in range(CLASSES)],
        "manifest": {"files": [{"id": "broken.png", "status": "unreadable"}]},
        "regions": np.random.default_rng(1).random((IMAGES, 2, 12), dtype=np.float32),
    }


def maps(layer: int) -> np.ndarray[Any, Any]:
    """Post-softmax attention of all images, float32 [image, head, query, key]."""
    rng = np.random.default_rng(10 + layer)
    return rng.dirichlet(np.full(TOKENS, 0.5), size=(IMAGES, HEADS[layer], TOKENS)).astype(np.float32)


def metric(name: str) -> np.ndarray[Any, Any]:
    """Values of a metric for all images, [image, layer, head(, region)]."""
    shape = (IMAGES, 2, 3, 2) if name == "region_mass" else (IMAGES, 2, 3)
    values = np.random.default_rng(len(name)).random(shape, dtype=np.float32)
    values[0] = np.nan
    return values


def counts(name: str) -> np.ndarray[Any, Any]:
    """Rows without a value, [image, layer, head]."""
    return np.random.default_rng(99 + len(name)).integers(0, 9, (IMAGES, 2, 3))


def logits() -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).normal(size=(IMAGES, CLASSES)).astype(np.float32)


def write(writer: AttentionWriter, batch: int) -> None:
    """Write one batch of the case."""
    schema = writer.schema
    rows = schema.batch_rows(batch)
    writer.write_batch(
        batch,
        {layer.layer: maps(layer.layer)[rows] for layer in schema.layers} if schema.encoding else None,
        {name: metric(name)[rows] for name in schema.metrics},
        {name: counts(name)[rows] for name in schema.metrics},
        logits()[rows] if schema.num_classes else None,
    )


def capture(path: Path, schema: StoreSchema | None = None) -> list[int]:
    """Write what is missing of the case and finish; return the batches that were."""
    schema = schema or make_schema()
    with AttentionWriter.open(path, schema, **fixed()) as writer:
        missing = [batch for batch in range(schema.num_batches) if batch not in writer.committed]
        for batch in missing:
            write(writer, batch)
        writer.finish()
    return missing


def measure(path: Path) -> dict[int, tuple[str, ...]]:
    """Add what is missing of two metrics computed later; return what was."""
    with MetricWriter.open(path, LATER) as writer:
        missing = dict(writer.missing)
        for batch, names in missing.items():
            rows = writer.schema.batch_rows(batch)
            writer.write_batch(
                batch, {name: metric(name)[rows] for name in names}, {name: counts(name)[rows] for name in names}
            )
    return missing


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def check_values(path: Path) -> None:
    """The store holds the whole case."""
    store = AttentionStore.open(path)
    assert store.complete
    for layer in store.layers:
        np.testing.assert_array_equal(store.read(layer), maps(layer).astype(np.float16).astype(np.float32))
    for name in store.schema.metrics:
        np.testing.assert_array_equal(store.read_metric(name)[0], metric(name))
        np.testing.assert_array_equal(store.read_undefined(name), counts(name))
    np.testing.assert_array_equal(store.read_logits(), logits())


def _main(arguments: list[str]) -> None:
    path = Path(arguments[0])
    kill_at = int(arguments[2]) if "--kill-at" in arguments else None
    operations = 0

    def hook(event: str, details: tuple[Any, ...]) -> None:
        nonlocal operations
        if event == "open":
            name, mode, flags = details
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR)) if isinstance(flags, int) else "r" not in str(mode)
        else:
            name, changes = (details[0] if details else ""), event in ("os.rename", "os.remove", "os.mkdir")
        if changes and str(path.parent) in str(name):
            operations += 1
            if operations == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if "--wait" in arguments:
        print("ready", flush=True)
    capture(path)
    measure(path)
    if "--count" in arguments:
        print(operations)


if __name__ == "__main__":
    _main(sys.argv[1:])
