"""A small seeded capture for the store's tests, and a script that writes it and can be killed at any step.

    python tests/store_cases.py STORE [--kill-at N | --count | --wait] [--encoding NAME]
    python tests/store_cases.py --forks

`--forks` takes such arguments, a JSON list per line of its input, and runs each in a fork of itself: see `Forks`.
`--kill-at N` ends the process by SIGKILL at the N-th file operation (open for writing, rename, remove, mkdir) on
the store or its ledger; `--count` prints how many there are; `--wait` says "ready" before it begins.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from store import AttentionStore, AttentionWriter, Factors, FactorSchema, LayerSchema, StoreSchema
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
HEAD_DIM = 6
# A bias that all images share in layer 0, a mask of each image's own in layer 1.
FACTORS = (
    FactorSchema(head_dim=HEAD_DIM, precision="float16", scale=0.4, bias="shared", bias_shape=(3, TOKENS, TOKENS)),
    FactorSchema(
        head_dim=HEAD_DIM,
        precision="bfloat16",
        scale=0.5,
        bias="image",
        bias_shape=(1, 1, TOKENS),
        bias_precision="bool",
    ),
)
LATER = {"later_a": {"backend": "numba", "code_version": "1"}, "later_b": {"radius": 2}}


def make_schema(encoding: str = "fp16", **changes: Any) -> StoreSchema:
    values: dict[str, Any] = {
        "layers": tuple(
            LayerSchema(
                layer=layer,
                site=f"blocks.{layer}.attn",
                heads=heads,
                layout=dict(LAYOUT),
                factors=FACTORS[layer] if encoding == "qk" else None,
            )
            for layer, heads in enumerate(HEADS)
        ),
        "image_ids": tuple(f"classe é/{row}.png" for row in range(IMAGES)),
        "batch_size": 4,
        "encoding": encoding,
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


def fixed(schema: StoreSchema | None = None) -> dict[str, Any]:
    """What `AttentionWriter.open` takes besides the schema."""
    with_factors = schema is not None and schema.encoding == "qk"
    return {
        "biases": {0: factors(0, slice(None)).bias} if with_factors else None,
        "labels": np.arange(IMAGES) % CLASSES,
        "class_names": [f"class {index}" for index in range(CLASSES)],
        "manifest": {"files": [{"id": "broken.png", "status": "unreadable"}]},
        "regions": np.random.default_rng(1).random((IMAGES, 2, 12), dtype=np.float32),
    }


def maps(layer: int) -> np.ndarray[Any, Any]:
    """Post-softmax attention of all images, float32 [image, head, query, key]."""
    rng = np.random.default_rng(10 + layer)
    return rng.dirichlet(np.full(TOKENS, 0.5), size=(IMAGES, HEADS[layer], TOKENS)).astype(np.float32)


def factors(layer: int, rows: slice) -> Factors:
    """Query, key and bias of some images, float32; layer 1's query and key are bfloat16's numbers."""
    rng = np.random.default_rng(20 + layer)
    query, key = rng.normal(size=(2, IMAGES, HEADS[layer], TOKENS, HEAD_DIM)).astype(np.float32)
    if layer == 0:
        bias = rng.normal(size=(1, HEADS[0], TOKENS, TOKENS)).astype(np.float32)
        return Factors(query=query[rows], key=key[rows], scale=FACTORS[0].scale, bias=bias)
    query, key = ((values.view(np.uint32) & 0xFFFF0000).view(np.float32) for values in (query, key))
    mask = rng.random((IMAGES, 1, 1, TOKENS)) > 0.3
    mask[..., 0] = True
    return Factors(query=query[rows], key=key[rows], scale=FACTORS[1].scale, bias=mask[rows])


def attention(schema: StoreSchema, layer: int, rows: slice) -> Any:
    """What `add_attention` takes."""
    return factors(layer, rows) if schema.encoding == "qk" else maps(layer)[rows]


def expected(encoding: str, layer: int) -> np.ndarray[Any, Any]:
    """What `read` must give for all images, to the last bit for maps and to rounding for factors, float32."""
    if encoding == "fp16":
        return maps(layer).astype(np.float16).astype(np.float32)
    if encoding == "bf16":
        bits = maps(layer).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    kept = factors(layer, slice(None))
    query, key = kept.query.astype(np.float64), kept.key.astype(np.float64)
    if layer == 0:
        query, key = (values.astype(np.float16).astype(np.float64) for values in (query, key))
    logits = kept.scale * query @ key.swapaxes(-2, -1)
    logits = np.where(kept.bias, logits, -np.inf) if kept.bias.dtype == bool else logits + kept.bias
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)


def check_maps(found: np.ndarray[Any, Any], encoding: str, layer: int, rows: Any = slice(None)) -> None:
    """Maps of some images are what must come back."""
    np.testing.assert_allclose(found, expected(encoding, layer)[rows], rtol=0, atol=1e-6 if encoding == "qk" else 0)


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
    for layer in schema.layers if schema.encoding else ():
        writer.add_attention(batch, layer.layer, attention(schema, layer.layer, rows))
    writer.commit(
        batch,
        {name: metric(name)[rows] for name in schema.metrics},
        {name: counts(name)[rows] for name in schema.metrics},
        logits()[rows] if schema.num_classes else None,
    )
    writer.flush()


def capture(path: Path, schema: StoreSchema | None = None) -> list[int]:
    """Write what is missing of the case and finish; return the batches that were."""
    schema = schema or make_schema()
    with AttentionWriter.open(path, schema, **fixed(schema)) as writer:
        missing = writer.missing
        for batch in missing:
            write(writer, batch)
        writer.finish()
    return missing


def measure(path: Path) -> dict[int, tuple[str, ...]]:
    """Add what is missing of two metrics computed later; return what was."""
    with MetricWriter.open(AttentionStore.open(path), LATER) as writer:
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
    for layer in store.layers if store.schema.encoding else ():
        check_maps(store.read(layer), store.schema.encoding, layer)
    for name in store.schema.metrics:
        np.testing.assert_array_equal(store.read_metric(name)[0], metric(name))
        np.testing.assert_array_equal(store.read_undefined(name), counts(name))
    np.testing.assert_array_equal(store.read_logits(), logits())


@contextmanager
def forks() -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs this script with arguments in forks of one process, which has imported the store: (exit code, output)."""
    command = [sys.executable, __file__, "--forks"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(*arguments: object) -> tuple[int, str]:
            print(json.dumps([str(argument) for argument in arguments]), file=process.stdin, flush=True)
            code, said = json.loads(process.stdout.readline())
            return code, said

        yield run


def _serve_forks() -> None:
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(writing, sys.stdout.fileno())
            code = 1
            try:
                _main(json.loads(line))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(writing)
        with open(reading) as output:
            said = output.read()
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said]), flush=True)


def _main(arguments: list[str]) -> None:
    path = Path(arguments[0])
    kill_at = int(arguments[arguments.index("--kill-at") + 1]) if "--kill-at" in arguments else None
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
    encoding = arguments[arguments.index("--encoding") + 1] if "--encoding" in arguments else "fp16"
    capture(path, make_schema(encoding))
    measure(path)
    if "--count" in arguments:
        print(operations)


if __name__ == "__main__":
    _serve_forks() if sys.argv[1:] == ["--forks"] else _main(sys.argv[1:])
