"""The store on ViT-B/16 maps: its writer against codec and disk, measuring against reading. Not part of CI.

    python -m pytest benchmarks/test_bench_store.py        statistics by pytest-benchmark
    python -m benchmarks.test_bench_store FOLDER [RESULTS.json]     ratios, interleaved in one process

The second form is the one to quote: rounds in which every contender runs once; medians of times, and of the ratios in
one round, so that a busy machine slows both sides alike. GB/s are of raw float16 maps (of stored query and key, for
qk). FOLDER says which disk is meant.
"""

from __future__ import annotations

import json
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

from engine.measure.store import measure_store
from engine.measure.units import StoredMeasurement
from kernels import TokenLayout
from kernels.cpu.threads import num_threads
from store import AttentionStore, AttentionWriter, Factors, FactorSchema, LayerSchema, StoreSchema
from store.arrays import attention_arrays
from store.precisions import cast
from store.shards import encode_chunk
from store.system import available_cpus
from tests.cases import layout, trained

VIT_B16: TokenLayout = layout(14, 14, 1)
HEADS, HEAD_DIM, BATCH, BATCHES, LAYERS = 12, 64, 32, 8, 12
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
        """Read and decode every shard as `measure` does, in as many threads; nothing else."""
        self._read(num_threads())

    def read_on_half_the_cpus(self) -> None:
        """The same in half as many threads."""
        self._read(max(1, num_threads() // 2))

    def _read(self, threads: int) -> None:
        store = AttentionStore.open(self.measured)
        whole = StoredMeasurement(store, None, {}, "numba")
        units = [unit for batch in range(BATCHES) for unit in whole.units(batch)]
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(store.read_here, unit.layer, unit.rows) for unit in units]:
                done.result()

    def measure(self) -> None:
        """`measure` from a warm store, results written back."""
        measure_store(AttentionStore.open(self.measured), CORE, "numba")

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
    Bench.read_on_half_the_cpus,
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


def interleaved(bench: Bench, rounds: int) -> dict[str, dict[str, np.ndarray]]:
    """Contender -> {"wall", "cpu"} seconds of every round; each runs once before, to compile and warm the cache."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for contender in CONTENDERS:
        contender(bench)
        bench.forget()
        found[contender.__name__] = {"wall": np.empty(rounds), "cpu": np.empty(rounds)}
    for number in range(rounds):
        for contender in CONTENDERS:
            wall, cpu = time.perf_counter(), time.process_time()
            contender(bench)
            found[contender.__name__]["wall"][number] = time.perf_counter() - wall
            found[contender.__name__]["cpu"][number] = time.process_time() - cpu
            bench.forget()
    return found


def of_encoding(folder: Path, encoding: str, rounds: int) -> dict[str, Any]:
    """One encoding's rates and ratios; printed, too."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        bench = Bench(Path(own), encoding)
        seconds = interleaved(bench, rounds)
    images = BATCH * BATCHES
    compressed = sum(map(len, bench.shards)) / sum(values.nbytes for values in bench.stored)
    print(f"\n{encoding}: {compressed:.3f} of the raw bytes")
    rows = {}
    for name, times in seconds.items():
        wall, cpu = (float(np.median(times[clock])) for clock in ("wall", "cpu"))
        rows[name] = {
            "gigabytes_a_second": bench.raw_bytes / wall / 1e9,
            "wall_ms_an_image": 1e3 * wall / images,
            "cpu_ms_an_image": 1e3 * cpu / images,
        }
        print(
            f"  {name.replace('_', ' '):24}{bench.raw_bytes / wall / 1e9:6.2f} GB/s"
            f"{1e3 * wall / images:8.2f} ms an image{1e3 * cpu / images:8.2f} of CPU"
        )

    def ratio(name: str, base: str, clock: str = "wall") -> float:
        """Rate over rate, round by round; the median."""
        return float(np.median(seconds[base][clock] / seconds[name][clock]))

    binding = max(("codec_only", "raw_write"), key=lambda name: float(np.median(seconds[name]["wall"])))
    ratios = {
        **{f"{name} of {binding}": ratio(name, binding) for name in ("writer", "writer_from_16_bits")},
        "measure of read": ratio("measure", "read"),
        "measure of read, CPU time": ratio("measure", "read", "cpu"),
        "measure of read_on_half_the_cpus": ratio("measure", "read_on_half_the_cpus"),
    }
    for name, value in ratios.items():
        print(f"  {name.replace('_', ' ')}: {value:.0%}")
    return {"compressed": compressed, "contenders": rows, "ratios": ratios}


def main(folder: Path, results: Path | None, rounds: int = 7) -> None:
    about = {"images": BATCH * BATCHES, "cpus": available_cpus(), "threads": num_threads(), "rounds": rounds}
    print(f"ViT-B/16, {BATCHES} batches of {BATCH} images × {LAYERS} layers; {about}")
    found = {encoding: of_encoding(folder, encoding, rounds) for encoding in ("fp16", "bf16", "qk")}
    if results is not None:
        results.write_text(json.dumps(about | {"encodings": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
