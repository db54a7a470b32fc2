"""What the machine can do at best: memory, link to the host, disk, codec, matrix products, exponentials."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.results import Row
from benchmarks.gpu.timing import device_of, median_seconds, wall_seconds
from store.shards import encode_chunk
from store.system import available_cpus
from tests.cases import layout, trained

__all__ = ["measure", "measure_host"]


def measure(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """Of the device alone, in seconds."""
    device = device_of(small)
    yield _copy(device, 2**20 if small else 2**31)
    yield from _products(device, 256 if small else 8192)
    yield _exponentials(device, small)


def measure_host(small: bool, ceilings: dict[str, float]) -> Iterator[Row]:
    """Of what lies between the device and a store."""
    device = device_of(small)
    for way in ("to the device", "to the host"):
        yield _link(device, 2**20 if small else 2**30, way)
    yield _codec(2 if small else 64)
    yield _disk(2**22 if small else 2**31)


def _copy(device: torch.device, nbytes: int) -> Row:
    sources = [torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    seconds, note = median_seconds([lambda s=source: target.copy_(s) for source in sources], device)  # type: ignore[misc]
    return Row(
        name="copy on the device, read + written", value=2 * nbytes / seconds / 1e9, unit="GB/s", key="copy", note=note
    )


def _link(device: torch.device, nbytes: int, way: str) -> Row:
    there = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    source, target = (here, there) if way == "to the device" else (there, here)
    seconds = wall_seconds(lambda: target.copy_(source, non_blocking=True), device)
    return Row(name=f"pinned memory {way}", value=nbytes / seconds / 1e9, unit="GB/s", key=way.replace(" ", "_"))


def _disk(nbytes: int) -> Row:
    """Sixteen files side by side, one fsync each, as the store writes its shards; in the folder for temporary files."""
    block = np.random.default_rng(0).bytes(nbytes // 16)
    with tempfile.TemporaryDirectory() as folder:

        def write(number: int) -> None:
            with open(Path(folder) / str(number), "wb", buffering=0) as file:
                view = memoryview(block)
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())

        began = time.perf_counter()
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(write, range(16)))
        seconds = time.perf_counter() - began
    return Row(name="disk, fsynced", value=nbytes / seconds / 1e9, unit="GB/s", key="disk", note="files of 1/16 each")


def _codec(images: int) -> Row:
    """Chunks of four images of ViT-B/16 maps in float16, compressed and checksummed on every CPU."""
    of = layout(14, 14, 1)
    maps = np.concatenate([trained(of, np.random.default_rng(seed)).reshape(-1, 197, 197) for seed in range(8)])
    chunk = np.ascontiguousarray(maps.reshape(4, 12, 197, 197).astype(np.float16))
    sizes: list[int] = []

    def encode(_: Any) -> None:
        sizes.append(sum(map(len, encode_chunk(chunk, "float16", "float16"))))

    encode(None)
    count = max(1, images * 12 // 4)  # a layer each
    began = time.perf_counter()
    with ThreadPoolExecutor(available_cpus()) as pool:
        list(pool.map(encode, range(count)))
    rate = count * chunk.nbytes / (time.perf_counter() - began)
    kept = sizes[0] / chunk.nbytes
    return Row(name="codec on every CPU, float16 maps", value=rate / 1e9, unit="GB/s", key="codec",
               note=f"{available_cpus()} CPUs, {kept:.2f} of the bytes")  # fmt: skip


def _products(device: torch.device, size: int) -> Iterator[Row]:
    """size × size × size, on random values: zeros run faster."""
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        pairs = [[torch.randn(size, size, device=device, dtype=dtype) for _ in range(2)] for _ in range(2)]
        torch.backends.cuda.matmul.allow_tf32 = tf32
        seconds, note = median_seconds([lambda p=pair: torch.mm(*p) for pair in pairs], device)  # type: ignore[misc]
        torch.backends.cuda.matmul.allow_tf32 = False
        rate = 2 * size**3 / seconds / 1e12
        yield Row(name=f"matrix product {size}³, {name}", value=rate, unit="TFLOP/s", key=name, note=note)


def _exponentials(device: torch.device, small: bool) -> Row:
    """exp2 of values in registers, as fast as the special-function units give them."""
    count, repeats = (2**12, 4) if small else (2**24, 256)
    x = torch.rand(count, device=device)
    if small:
        seconds, note = median_seconds([lambda: [torch.exp2(x) for _ in range(repeats)]], device)
    else:
        from benchmarks.gpu.exponentials import exponentials

        out, grid = torch.empty_like(x), (count // 1024,)
        seconds, note = median_seconds([lambda: exponentials[grid](x, out, REPEATS=repeats, BLOCK=1024)], device)
    return Row(name="exponentials", value=count * repeats / seconds / 1e12, unit="T/s", key="exp", note=note)
