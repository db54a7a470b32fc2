"""The store on ViT-B/16 maps: its writer against codec and disk, measuring against reading. Not part of CI.

    python -m pytest benchmarks/test_bench_store.py        statistics by pytest-benchmark
    python -m benchmarks.test_bench_store [FOLDER]         ratios, interleaved in one process

The second form is the one to quote: rounds in which every contender runs once, medians, so that a busy machine slows
all of them alike. GB/s are of raw float16 maps (of stored query and key, for qk). FOLDER says which disk is meant.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.measure import READ_THREADS, measure_store
from kernels import TokenLayout
from store import AttentionStore, AttentionWriter, Factors, FactorSchema, LayerSchema, StoreSchema
from store.arrays import attention_arrays
from store.commit import available_cpus
from store.precisions import cast
from store.shards import encode_chunk
from tests.cases import layout, trained

VIT_B16: TokenLayout = layout(14, 14, 1)
HEADS, HEAD_DIM, BATCH, BATCHES, LAYERS = 12, 64, 32, 4, 12
CORE = ("distance", "entropy", "morans_i")
CHUNK = 4


def maps() -> np.ndarray:
    """Trained-like maps of a batch, float32 [image, head, query, key]."""
    some = [trained(VIT_B16, np.random.default_rng(seed)).reshape(-1, 197, 197) for seed in range(16)]
    return np.resize(np.concatenate(some), (BATCH, HEADS, 197, 197)).astype(np.float32)


def factors() -> Factors:
    query, key = (np.random.default_rng(seed).normal(size=(BATCH, HEADS, 197, HEAD_DIM)) for seed in range(2))
    return Factors(query=query.astype(np.float32), key=key.astype(np.float32), scale=HEAD_DIM**-0.5)


def schema(encoding: str) -> StoreSchema:
    described = FactorSchema(head_dim=HEAD_DIM, precision="float16", scale=HEAD_DIM**-0.5)
    return StoreSchema(
        layers=tuple(
            LayerSchema(
                layer=layer,
                site=f"blocks.{layer}.attn",
                heads=HEADS,
                layout=VIT_B16.to_dict(),
                factors=described if encoding == "qk" else None,
            )
            for layer in range(LAYERS)
        ),
        image_ids=tuple(map(str, range(BATCH * BATCHES))),
        batch_size=BATCH,
        encoding=encoding,
        metrics={},
        model={},
        preprocessing={},
        dataset={},
        precision="float32",
        num_classes=0,
        code_version="benchmark",
    )


class Bench:
    """One encoding's contenders: functions that do the same work, or a part of it, on the same values."""

    def __init__(self, folder: Path, encoding: str) -> None:
        self.folder = folder
        self.schema = schema(encoding)
        self.attention: Any = factors() if encoding == "qk" else maps()
        self.arrays = attention_arrays(self.schema)
        self.raw_bytes = sum(array.row_bytes for array in self.arrays) * BATCH * BATCHES
        layer = self.arrays[: len(self.arrays) // LAYERS]
        self.parts = [(self._values(array.path), array.precision) for array in layer]
        self.stored = [cast(values, "float32", precision) for values, precision in self.parts]
        self.shards = [b"".join(b"".join(chunk) for chunk in self._encode(values, None)) for values in self.stored]
        self.threads = ThreadPoolExecutor(available_cpus())
        self.measured = folder / f"measured_{encoding}.zarr"
        self._write(self.measured, self.attention)

    def _values(self, path: str) -> np.ndarray:
        return (
            getattr(self.attention, path.rpartition("/")[2]) if isinstance(self.attention, Factors) else self.attention
        )

    def _encode(self, values: np.ndarray, threads: ThreadPoolExecutor | None) -> Iterator[tuple[bytes, bytes]]:
        precision = "bfloat16" if values.dtype == np.uint16 else "float16"
        chunks = [values[begin : begin + CHUNK] for begin in range(0, BATCH, CHUNK)]
        run = map if threads is None else threads.map
        return iter(run(lambda chunk: encode_chunk(chunk, precision, precision), chunks))

    def _write(self, path: Path, attention: Any) -> None:
        with AttentionWriter.open(path, self.schema, labels=[0] * BATCH * BATCHES, class_names=["any"]) as writer:
            for batch in range(BATCHES):
                for layer in range(LAYERS):
                    writer.add_attention(batch, layer, attention)
                writer.commit(batch)
            writer.finish()

    # ---------------------------------------------------------------------------------------------------- contenders

    def codec_only(self) -> None:
        """Compress and checksum 16-bit values in as many threads as the writer has; nothing is kept."""
        for _ in range(BATCHES * LAYERS):
            for values in self.stored:
                list(self._encode(values, self.threads))

    def raw_write(self) -> None:
        """Write the same compressed bytes, one sequential write and one fsync a shard; nothing else."""
        for number in range(BATCHES * LAYERS):
            for part, shard in enumerate(self.shards):
                with open(self.folder / f"raw_{number}_{part}", "wb", buffering=0) as file:
                    file.write(shard)
                    os.fsync(file.fileno())

    def writer(self) -> None:
        """The store's writer from float32, metadata and ledger included."""
        self._written(self.attention)

    def writer_from_16_bits(self) -> None:
        """The same from values narrowed already, as they come from a GPU."""
        if isinstance(self.attention, Factors):
            self._written(Factors(query=self.stored[0], key=self.stored[1], scale=self.attention.scale))
        elif self.stored[0].dtype == np.float16:
            self._written(self.stored[0])
        else:
            import torch

            self._written(torch.from_numpy(self.stored[0].view(np.int16)).view(torch.bfloat16))

    def _written(self, attention: Any) -> None:
        self._write(self.folder / "written.zarr", attention)

    def read(self) -> None:
        """Read and decode every shard with the threads that `measure` reads with."""
        self._read(READ_THREADS)

    def read_on_every_cpu(self) -> None:
        """The same with a thread a CPU."""
        self._read(available_cpus())

    def _read(self, threads: int) -> None:
        store = AttentionStore.open(self.measured)
        requests = [(layer, self.schema.batch_rows(batch)) for batch in range(BATCHES) for layer in range(LAYERS)]
        for _ in store.read_ahead(requests, threads=threads):
            pass

    def measure(self) -> None:
        """`measure` from a warm store, results written back."""
        measure_store(self.measured, CORE, "numba")

    def forget(self) -> None:
        """Take the results away again, untimed."""
        shutil.rmtree(self.measured.with_suffix(".ledger") / "metrics", ignore_errors=True)
        for name in CORE:
            shutil.rmtree(self.measured / "metrics" / name, ignore_errors=True)
        shutil.rmtree(self.folder / "written.zarr", ignore_errors=True)
        shutil.rmtree(self.folder / "written.ledger", ignore_errors=True)
        for file in self.folder.glob("raw_*"):
            file.unlink()


CONTENDERS: tuple[Callable[[Bench], None], ...] = (
    Bench.codec_only,
    Bench.raw_write,
    Bench.writer,
    Bench.writer_from_16_bits,
    Bench.read,
    Bench.read_on_every_cpu,
    Bench.measure,
)


@pytest.fixture(scope="module", params=["fp16", "bf16", "qk"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), request.param)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.__name__)
def test_store(benchmark: Any, bench: Bench, contender: Callable[[Bench], None]) -> None:
    contender(bench)  # compile, warm the page cache
    benchmark.extra_info["bytes"] = bench.raw_bytes
    benchmark.pedantic(contender, (bench,), setup=bench.forget, rounds=5)


def main(folder: Path, rounds: int = 5) -> None:
    print(
        f"{BATCHES} batches of {BATCH} images × {LAYERS} layers of ViT-B/16, {available_cpus()} CPUs, {rounds} rounds"
    )
    for encoding in ("fp16", "bf16", "qk"):
        with tempfile.TemporaryDirectory(dir=folder) as own:
            bench = Bench(Path(own), encoding)
            seconds: dict[str, list[float]] = {contender.__name__: [] for contender in CONTENDERS}
            for contender in CONTENDERS:
                contender(bench)
                bench.forget()
            for _ in range(rounds):
                for contender in CONTENDERS:
                    start = time.perf_counter()
                    contender(bench)
                    seconds[contender.__name__].append(time.perf_counter() - start)
                    bench.forget()
        rate = {name: bench.raw_bytes / float(np.median(times)) / 1e9 for name, times in seconds.items()}
        print(f"\n{encoding}: {sum(map(len, bench.shards)) / sum(v.nbytes for v in bench.stored):.3f} of the raw bytes")
        for name, gigabytes in rate.items():
            print(f"  {name.replace('_', ' '):22}{gigabytes:7.2f} GB/s")
        binding = min(("codec_only", "raw_write"), key=rate.__getitem__)
        for name in ("writer", "writer_from_16_bits"):
            print(
                f"  {name.replace('_', ' ')}: {rate[name] / rate[binding]:.0%} of the {binding.replace('_', ' ')} rate"
            )
        print(
            f"  measure: {rate['measure'] / rate['read']:.0%} of reading alone with the same {READ_THREADS} thread(s)"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
