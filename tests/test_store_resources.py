"""What a capture takes: memory that does not grow with the data set, a disk that is estimated or fills up; its rate."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import store_cases as case

from engine.progress import ImageProgress
from store import AttentionStore, AttentionWriter, DiskError, StoreError, estimate_bytes
from store.commit import available_cpus
from store.verify import verify

ENCODINGS = ("fp16", "bf16", "qk")

_CAPTURE = """
import resource, sys
from pathlib import Path
import numpy, timm, torch
from engine.capture import Capture, capture_to_store

class Pictures:
    def __init__(self, count):
        self.ids = tuple(f"{row}.png" for row in range(count))
        self.labels, self.class_names, self.region_names, self.boxes = numpy.zeros(count, int), ("any",), (), None
    def __len__(self):
        return len(self.ids)
    def batch(self, rows, device="cpu"):
        return torch.randn(len(rows), 3, 112, 112, generator=torch.Generator().manual_seed(rows[0]))
    def regions(self, layout):
        return None

torch.set_num_threads(1)
model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=112, depth=2, num_classes=3)
about = {"model_info": {}, "dataset_info": {}, "preprocessing": {}}
capture = Capture(sinks=("metrics", "store"), encoding=sys.argv[2], batch_size=32)
capture_to_store(model, Pictures(int(sys.argv[3])), Path(sys.argv[1]), capture, **about)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_memory_does_not_grow_with_the_data_set(tmp_path: Path, encoding: str) -> None:
    """Peak resident memory of a process that captures 640 images is within 10 % of one that captures 64."""
    peak = {}
    for images in (64, 640):
        command = [sys.executable, "-c", _CAPTURE, str(tmp_path / f"{images}.zarr"), encoding, str(images)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak[images] = int(done.stdout.split()[-1])
    assert peak[640] <= 1.1 * peak[64], peak


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_disk_that_is_too_small_is_refused_with_every_encoding(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = case.make_schema(encoding)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=estimate_bytes(schema) - 1))
    with pytest.raises(StoreError, match=r"may need 1\.\d MiB, but .* has 1\.\d MiB free"):
        AttentionWriter.open(tmp_path / "run.zarr", schema, **case.fixed(schema))
    assert list(tmp_path.iterdir()) == [tmp_path / "run.ledger"]


def test_estimates_follow_what_is_kept() -> None:
    """Before compression: two bytes a map's value, or a query's and a key's, and float32 for a bias that all share."""
    plain = {"metrics": {}, "region_metrics": (), "num_classes": 0}
    estimate = {encoding: estimate_bytes(case.make_schema(encoding, **plain)) for encoding in ("", *ENCODINGS)}
    maps = sum(heads * case.TOKENS**2 * 2 * case.IMAGES for heads in case.HEADS)
    factors = sum(2 * heads * case.TOKENS * case.HEAD_DIM * 2 * case.IMAGES for heads in case.HEADS)
    biases = 4 * case.HEADS[0] * case.TOKENS**2 + case.IMAGES * case.TOKENS
    overhead = 64 * 3 * 5  # a chunk's header, checksum and index entry: three chunks of at most five arrays
    for encoding, kept in (("fp16", maps), ("bf16", maps), ("qk", factors + biases)):
        assert kept <= estimate[encoding] - estimate[""] <= kept + overhead


def fill(ballast: Path) -> None:
    """Write until the disk is full."""
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_disk_that_fills_up_leaves_the_last_commit_intact(
    small_disk: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC for real, and for want of an estimate; room again, and the capture goes on to the same bytes."""
    monkeypatch.setattr("store.writer.require_free_disk", lambda *_: None)
    path, schema = small_disk / "run.zarr", case.make_schema(encoding)
    with AttentionWriter.open(path, schema, **case.fixed(schema)) as writer:
        case.write(writer, 0)
        ballast = small_disk / "ballast"
        fill(ballast)
        with pytest.raises(DiskError, match=r"batch 1 of .* could not be written .*: no space left.*free some space"):
            case.write(writer, 1)
        assert writer.committed == {0}
    assert verify(path) == []
    case.check_maps(AttentionStore.open(path).read(0, slice(0, 4)), encoding, 0, slice(0, 4))
    ballast.unlink()
    assert case.capture(path, schema) == [1, 2]
    case.check_values(path)
    assert np.isfinite(AttentionStore.open(path).read(1)).all()


def test_progress_says_images_and_gigabytes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("engine.progress.time.monotonic", lambda: next(clock))
    shown = io.StringIO()
    with ImageProgress("capture", 8, 4, 750_000_000, file=shown, disable=False, mininterval=0) as progress:
        progress.update(4)
    assert re.search(r"capture: 100%.* 8/8 .*, 1\.50 GB/s", shown.getvalue())


def test_a_system_without_linux_calls_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has neither; there, a process may run on every CPU."""
    for name in ("sched_getaffinity", "preadv"):
        monkeypatch.delattr(os, name, raising=False)
    assert available_cpus() == os.cpu_count()
    case.capture(tmp_path / "run.zarr")
    case.check_values(tmp_path / "run.zarr")
