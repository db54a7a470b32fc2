"""Kills, flipped bits, lost and truncated files: nothing is lost in silence, and resuming heals."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import store_cases as case

from store import AttentionStore, StoreError
from store.verify import verify

SCRIPT = Path(case.__file__)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that nobody killed, and how many file operations it takes."""
    path = tmp_path_factory.mktemp("unkilled") / "run.zarr"
    run = subprocess.run([sys.executable, SCRIPT, path, "--count"], capture_output=True, text=True, check=True)
    assert verify(path) == []
    return path, int(run.stdout)


def check_after_a_kill(path: Path) -> None:
    """Whatever was committed is sound and readable."""
    if not path.exists():
        return
    assert verify(path) == []
    store = AttentionStore.open(path)
    committed = np.flatnonzero(store.committed_images)
    np.testing.assert_array_equal(store.read(0, committed), np.float32(np.float16(case.maps(0)[committed])))
    np.testing.assert_array_equal(store.read_metric("entropy", committed)[0], case.metric("entropy")[committed])


def finish_and_compare(path: Path, unkilled: Path) -> None:
    case.capture(path)
    case.measure(path)
    assert verify(path) == []
    for part in ("attention", "metrics", "logits", "images"):
        assert case.file_bytes(path / part) == case.file_bytes(unkilled / part)
    assert not list(path.parent.rglob("*.partial"))


def kill_at(path: Path, step: int) -> None:
    process = subprocess.run([sys.executable, SCRIPT, path, "--kill-at", str(step)], capture_output=True, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr


def spread(steps: int, count: int, seed: int) -> list[int]:
    """One random step in each of `count` equal parts of a run."""
    rng = random.Random(seed)
    return [rng.randint(1 + index * steps // count, (index + 1) * steps // count) for index in range(count)]


def test_killed_at_any_file_operation(tmp_path: Path, unkilled: tuple[Path, int]) -> None:
    for step in spread(unkilled[1], 8, seed=0):
        path = tmp_path / str(step) / "run.zarr"
        path.parent.mkdir()
        kill_at(path, step)
        check_after_a_kill(path)
        finish_and_compare(path, unkilled[0])


def test_killed_again_while_resuming(tmp_path: Path, unkilled: tuple[Path, int]) -> None:
    path = tmp_path / "run.zarr"
    for step in (40, 90, 150):
        kill_at(path, step)
        check_after_a_kill(path)
    finish_and_compare(path, unkilled[0])


def test_a_reader_during_a_write_sees_whole_batches_only(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    seen = set()
    with subprocess.Popen([sys.executable, SCRIPT, path]) as process:
        while process.poll() is None:
            check_after_a_kill(path)
            if path.exists():
                seen.add(int(AttentionStore.open(path).committed_images.sum()))
    assert process.returncode == 0
    assert seen <= {0, 4, 8, 11}
    case.check_values(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_200_file_operations(tmp_path: Path, unkilled: tuple[Path, int]) -> None:
    for step in spread(unkilled[1], 200, seed=1):
        path = tmp_path / "run" / "run.zarr"
        path.parent.mkdir()
        kill_at(path, step)
        check_after_a_kill(path)
        finish_and_compare(path, unkilled[0])
        shutil.rmtree(path.parent)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_100_random_moments(tmp_path: Path, unkilled: tuple[Path, int]) -> None:
    rng = random.Random(2)
    for _ in range(100):
        path = tmp_path / "run" / "run.zarr"
        path.parent.mkdir()
        with subprocess.Popen([sys.executable, SCRIPT, path, "--wait"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        check_after_a_kill(path)
        finish_and_compare(path, unkilled[0])
        shutil.rmtree(path.parent)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, unkilled: tuple[Path, int]) -> Path:
    """A copy of the complete store with its ledger."""
    shutil.copytree(unkilled[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "run.zarr"


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def targets(path: Path) -> dict[str, list[Path]]:
    """Files of the store and its ledger, by kind."""
    ledger = path.with_name("run.ledger")
    return {
        "shard": sorted((path / "attention").rglob("c.*")),
        "metric": sorted([*(path / "metrics").rglob("c.*"), *(path / "logits").glob("c.*")]),
        "metadata": sorted([*path.rglob("zarr.json"), *(path / "images").rglob("c.*")]),
        "ledger": sorted(ledger.rglob("*.json")),
    }


def check_flips(path: Path, count: int, seed: int) -> None:
    """Flip a bit, expect its file and no other to be named, resume, expect the original store."""
    rng = random.Random(seed)
    before = case.file_bytes(path.parent)
    kinds = targets(path)
    for index in range(count):
        kind = list(kinds)[index % len(kinds)]
        file = rng.choice(kinds[kind])
        size = file.stat().st_size
        bit = rng.randrange(8 * size)
        if kind == "shard" and rng.random() < 0.3:  # one chunk of 4 images: 16 bytes of index and its checksum
            bit = 8 * size - 1 - rng.randrange(8 * 20)
        flip(file, bit)
        where = f"bit {bit} of {file.relative_to(path.parent)}"
        damages = verify(path)
        assert [damage.unit for damage in damages] == [str(file.relative_to(path.parent))], where
        case.capture(path)
        case.measure(path)
        assert verify(path) == [], where
        after = case.file_bytes(path.parent)
        after.pop("run.ledger/lock")
        assert after == {name: content for name, content in before.items() if name != "run.ledger/lock"}, where


def test_every_flipped_bit_is_named_and_healed(measured: Path) -> None:
    check_flips(measured, 60, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_1000_flipped_bits_are_named_and_healed(measured: Path) -> None:
    check_flips(measured, 1000, seed=1)


def test_readers_meet_no_flipped_bit_in_silence(measured: Path) -> None:
    """Reads check checksums alone, not hashes: every bit of a chunk or an index must be under one."""
    rng = random.Random(3)
    for _ in range(40):
        file = rng.choice(targets(measured)["shard"])
        bit = rng.randrange(8 * file.stat().st_size)
        layer, batch = int(file.parent.name[-2:]), int(file.name.split(".")[1])
        flip(file, bit)
        store = AttentionStore.open(measured)
        with pytest.raises(StoreError, match=rf"attention/layer_0{layer}, batch {batch}: .* is damaged"):
            store.read(layer)
        flip(file, bit)
        assert np.isfinite(store.read(layer)).all()


def test_readers_refuse_flipped_metadata_and_records(measured: Path) -> None:
    rng = random.Random(4)
    for file in targets(measured)["metadata"]:
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(StoreError, match=f"{file.name} its content changed"):
            read_all(measured)  # metadata of metrics computed later are looked at when one is read
        flip(file, bit)
    for file in targets(measured)["ledger"]:
        bit = rng.randrange(8 * file.stat().st_size)
        flip(file, bit)
        if file.name != "complete.json":
            with pytest.raises(StoreError, match=f"{file.name} is damaged"):
                read_all(measured)
        flip(file, bit)
    read_all(measured)


def read_all(path: Path) -> None:
    store = AttentionStore.open(path)
    assert store.manifest is not None
    store.read(0)
    for name in store.metric_names:
        store.read_metric(name)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_shard(measured: Path, keep: float) -> None:
    file = measured / "attention/layer_01/c.2.0.0.0"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    assert [damage.unit for damage in verify(measured)] == ["run.zarr/attention/layer_01/c.2.0.0.0"]
    with pytest.raises(StoreError, match=r"attention/layer_01, batch 2: .* bytes; \d+ were committed"):
        AttentionStore.open(measured).read(1)
    assert case.capture(measured) == [2]
    assert file.read_bytes() == content
    assert verify(measured) == []


def test_missing_shard(measured: Path) -> None:
    file = measured / "attention/layer_00/c.1.0.0.0"
    content = file.read_bytes()
    file.unlink()
    assert [str(damage) for damage in verify(measured)] == ["run.zarr/attention/layer_00/c.1.0.0.0 is missing"]
    store = AttentionStore.open(measured)
    with pytest.raises(StoreError, match=r"attention/layer_00, batch 1: .*is missing"):
        store.read(0)
    assert np.isfinite(store.read(0, slice(8, 11))).all()  # the other batches are as good as before
    assert case.capture(measured) == [1]
    assert file.read_bytes() == content


def test_missing_record_of_a_complete_capture(measured: Path) -> None:
    (measured.with_name("run.ledger") / "batch_000001.json").unlink()
    assert [str(damage) for damage in verify(measured)] == ["run.ledger/batch_000001.json is missing"]
    assert case.capture(measured) == [1]
    assert verify(measured) == []


def test_strange_files_are_named(measured: Path) -> None:
    (measured / "attention/layer_00/c.3.0.0.0").write_bytes(b"x")
    (measured / "notes.txt").write_text("x")
    (measured.with_name("run.ledger") / "notes.txt").write_text("x")
    assert sorted(damage.unit for damage in verify(measured)) == [
        "run.ledger/notes.txt",
        "run.zarr/attention/layer_00/c.3.0.0.0",
        "run.zarr/notes.txt",
    ]


def test_damaged_metadata_that_cannot_be_rebuilt_stop_a_resume(measured: Path) -> None:
    """Other labels would rebuild another file: the damage is named, nothing is overwritten."""
    file = measured / "images/label/c.0"
    flip(file, 100)
    damaged = file.read_bytes()
    with pytest.raises(StoreError, match=r"images/label/c\.0 .* cannot be rebuilt"):
        case.AttentionWriter.open(measured, case.make_schema(), **case.fixed() | {"labels": [0] * 11})
    assert file.read_bytes() == damaged
    assert sorted(entry.name for entry in measured.parent.iterdir()) == ["run.ledger", "run.zarr"]


def test_a_store_swapped_with_another_is_noticed(measured: Path, tmp_path: Path) -> None:
    """Two records of sound content under each other's names."""
    ledger = measured.with_name("run.ledger")
    first, second = ledger / "batch_000000.json", ledger / "batch_000001.json"
    first.rename(tmp_path / "kept")
    second.rename(first)
    (tmp_path / "kept").rename(second)
    assert sorted(damage.unit for damage in verify(measured)) == [
        "run.ledger/batch_000000.json",
        "run.ledger/batch_000001.json",
    ]
    assert case.capture(measured) == [0, 1]
