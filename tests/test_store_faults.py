"""Kills, flipped bits, lost and truncated files: nothing is lost in silence, and resuming heals."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import store_cases as case

from store import AttentionStore, AttentionWriter, StoreError
from store.verify import verify

SCRIPT = Path(case.__file__)


@dataclass(frozen=True)
class Unkilled:
    """A run that nobody killed, and how many file operations it takes."""

    path: Path
    encoding: str
    operations: int
    run: Callable[..., tuple[int, str]]  # another one: see `store_cases.forks`


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., tuple[int, str]]]:
    with case.forks() as run:
        yield run


@pytest.fixture(scope="module", params=["fp16", "bf16", "qk"])
def unkilled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run: Callable[..., tuple[int, str]]
) -> Unkilled:
    path = tmp_path_factory.mktemp("unkilled") / "run.zarr"
    code, said = run(path, "--count", "--encoding", request.param)
    assert code == 0
    assert verify(path) == []
    return Unkilled(path, request.param, int(said), run)


def check_after_a_kill(path: Path) -> None:
    """Whatever was committed is sound and readable."""
    if not path.exists():
        return
    assert verify(path) == []
    store = AttentionStore.open(path)
    committed = np.flatnonzero(store.committed_images)
    case.check_maps(store.read(1, committed), store.schema.encoding, 1, committed)
    np.testing.assert_array_equal(store.read_metric("entropy", committed)[0], case.metric("entropy")[committed])


def finish_and_compare(path: Path, unkilled: Unkilled) -> None:
    case.capture(path, case.make_schema(unkilled.encoding))
    case.measure(path)
    assert verify(path) == []
    for part in ("attention", "metrics", "logits", "images"):
        assert case.file_bytes(path / part) == case.file_bytes(unkilled.path / part)
    assert not list(path.parent.rglob("*.partial"))


def kill_at(path: Path, step: int, unkilled: Unkilled) -> None:
    code, said = unkilled.run(path, "--kill-at", step, "--encoding", unkilled.encoding)
    # Which of zarr's threads makes a folder first decides how many operations there are: up to four more or less.
    assert code == -signal.SIGKILL or (code == 0 and step > unkilled.operations - 8), said


def spread(steps: int, count: int, seed: int) -> list[int]:
    """One random step in each of `count` equal parts of a run."""
    rng = random.Random(seed)
    return [rng.randint(1 + index * steps // count, (index + 1) * steps // count) for index in range(count)]


def test_killed_at_any_file_operation(tmp_path: Path, unkilled: Unkilled) -> None:
    """The last third of a run's operations write batches; those before it make the metadata."""
    for step in spread(unkilled.operations, 3, seed=len(unkilled.encoding)):
        path = tmp_path / str(step) / "run.zarr"
        path.parent.mkdir()
        kill_at(path, step, unkilled)
        check_after_a_kill(path)
        finish_and_compare(path, unkilled)


def test_killed_again_while_resuming(tmp_path: Path, unkilled: Unkilled) -> None:
    path = tmp_path / "run.zarr"
    for step in (40, 90):
        kill_at(path, step, unkilled)
        check_after_a_kill(path)
    finish_and_compare(path, unkilled)


def test_a_reader_during_a_write_sees_whole_batches_only(tmp_path: Path, run: Callable[..., tuple[int, str]]) -> None:
    path = tmp_path / "run.zarr"
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(run, path, "--encoding", "qk")
        while not writer.done():
            check_after_a_kill(path)
            if path.exists():
                seen.add(int(AttentionStore.open(path).committed_images.sum()))
            time.sleep(0.005)
    assert writer.result()[0] == 0
    assert seen <= {0, 4, 8, 11}
    case.check_values(path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_200_file_operations(tmp_path: Path, unkilled: Unkilled) -> None:
    """200 with each encoding."""
    for step in spread(unkilled.operations, 200, seed=1):
        path = tmp_path / "run" / "run.zarr"
        path.parent.mkdir()
        kill_at(path, step, unkilled)
        check_after_a_kill(path)
        finish_and_compare(path, unkilled)
        shutil.rmtree(path.parent)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_100_random_moments(tmp_path: Path, unkilled: Unkilled) -> None:
    rng = random.Random(2)
    for _ in range(100):
        path = tmp_path / "run" / "run.zarr"
        path.parent.mkdir()
        with subprocess.Popen(
            [sys.executable, SCRIPT, path, "--wait", "--encoding", unkilled.encoding], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        check_after_a_kill(path)
        finish_and_compare(path, unkilled)
        shutil.rmtree(path.parent)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path, unkilled: Unkilled) -> Path:
    """A copy of the complete store with its ledger."""
    shutil.copytree(unkilled.path.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run.zarr"


def resume(path: Path, unkilled: Unkilled) -> list[int]:
    """Write again what is damaged; the batches that were."""
    return case.capture(path, case.make_schema(unkilled.encoding))


def shard(path: Path, layer: int, batch: int) -> Path:
    """A shard of a layer: of its maps, or of its queries."""
    folder = path / f"attention/layer_{layer:02d}"
    return (folder / "query" if (folder / "query").is_dir() else folder) / f"c.{batch}.0.0.0"


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def targets(path: Path) -> dict[str, list[Path]]:
    """Files of the store and its ledger, by kind."""
    ledger = path.with_name("run.ledger")
    shared = set((path / "attention/layer_00/bias").glob("c.*"))
    return {
        "shard": sorted(set((path / "attention").rglob("c.*")) - shared),
        "metric": sorted([*(path / "metrics").rglob("c.*"), *(path / "logits").glob("c.*")]),
        "metadata": sorted([*path.rglob("zarr.json"), *(path / "images").rglob("c.*"), *shared]),
        "ledger": sorted(ledger.rglob("*.json")),
    }


def check_flips(path: Path, unkilled: Unkilled, count: int, seed: int) -> None:
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
        resume(path, unkilled)
        case.measure(path)
        assert verify(path) == [], where
        after = case.file_bytes(path.parent)
        after.pop("run.ledger/lock")
        assert after == {name: content for name, content in before.items() if name != "run.ledger/lock"}, where


def test_every_flipped_bit_is_named_and_healed(measured: Path, unkilled: Unkilled) -> None:
    check_flips(measured, unkilled, 16, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_1000_flipped_bits_are_named_and_healed(measured: Path, unkilled: Unkilled) -> None:
    """1,000 with each encoding."""
    check_flips(measured, unkilled, 1000, seed=1)


def test_readers_meet_no_flipped_bit_in_silence(measured: Path) -> None:
    """Reads check checksums alone, not hashes: every bit of a chunk or an index must be under one."""
    rng = random.Random(3)
    for _ in range(40):
        file = rng.choice(targets(measured)["shard"])
        bit = rng.randrange(8 * file.stat().st_size)
        array, batch = str(file.parent.relative_to(measured)), int(file.name.split(".")[1])
        layer = int(array.split("_")[1][:2])
        flip(file, bit)
        store = AttentionStore.open(measured)
        with pytest.raises(StoreError, match=rf"{array}, batch {batch}: .* is damaged"):
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
    for name in [*store.schema.metrics, *case.LATER]:
        store.read_metric(name)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_shard(measured: Path, unkilled: Unkilled, keep: float) -> None:
    file = shard(measured, 1, 2)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    assert [damage.unit for damage in verify(measured)] == [str(file.relative_to(measured.parent))]
    with pytest.raises(StoreError, match=r"attention/layer_01.*, batch 2: .* bytes; \d+ were committed"):
        AttentionStore.open(measured).read(1)
    assert resume(measured, unkilled) == [2]
    assert file.read_bytes() == content
    assert verify(measured) == []


def test_missing_shard(measured: Path, unkilled: Unkilled) -> None:
    file = shard(measured, 0, 1)
    content = file.read_bytes()
    file.unlink()
    assert [str(damage) for damage in verify(measured)] == [f"{file.relative_to(measured.parent)} is missing"]
    store = AttentionStore.open(measured)
    with pytest.raises(StoreError, match=r"attention/layer_00.*, batch 1: .*is missing"):
        store.read(0)
    assert np.isfinite(store.read(0, slice(8, 11))).all()  # the other batches are as good as before
    assert resume(measured, unkilled) == [1]
    assert file.read_bytes() == content


def test_missing_record_of_a_complete_capture(measured: Path, unkilled: Unkilled) -> None:
    (measured.with_name("run.ledger") / "batch_000001.json").unlink()
    assert [str(damage) for damage in verify(measured)] == ["run.ledger/batch_000001.json is missing"]
    assert resume(measured, unkilled) == [1]
    assert verify(measured) == []


def test_a_missing_manifest_is_named_and_written_again(measured: Path, unkilled: Unkilled) -> None:
    """It may be absent only where none was given."""
    record = measured.with_name("run.ledger") / "manifest.json"
    content = record.read_bytes()
    record.unlink()
    assert [str(damage) for damage in verify(measured)] == ["run.ledger/manifest.json is missing"]
    with pytest.raises(StoreError, match=r"run\.ledger/manifest\.json is missing"):
        _ = AttentionStore.open(measured).manifest
    assert resume(measured, unkilled) == []
    assert record.read_bytes() == content
    schema = case.make_schema(unkilled.encoding)
    other = measured.with_name("other.zarr")
    with case.AttentionWriter.open(other, schema, **case.fixed(schema) | {"manifest": None}):
        pass
    assert AttentionStore.open(other).manifest is None
    assert verify(other) == []


def test_strange_files_are_named(measured: Path) -> None:
    (measured / "attention/layer_00/c.3.0.0.0").write_bytes(b"x")
    (measured / "notes.txt").write_text("x")
    (measured.with_name("run.ledger") / "notes.txt").write_text("x")
    assert sorted(damage.unit for damage in verify(measured)) == [
        "run.ledger/notes.txt",
        "run.zarr/attention/layer_00/c.3.0.0.0",
        "run.zarr/notes.txt",
    ]


def test_damaged_metadata_that_cannot_be_rebuilt_stop_a_resume(measured: Path, unkilled: Unkilled) -> None:
    """Other labels would rebuild another file: the damage is named, nothing is overwritten."""
    file = measured / "images/label/c.0"
    flip(file, 100)
    damaged = file.read_bytes()
    schema = case.make_schema(unkilled.encoding)
    with pytest.raises(StoreError, match=r"images/label/c\.0 .* cannot be rebuilt"):
        case.AttentionWriter.open(measured, schema, **case.fixed(schema) | {"labels": [0] * 11})
    assert file.read_bytes() == damaged
    assert sorted(entry.name for entry in measured.parent.iterdir()) == ["run.ledger", "run.zarr"]


def test_a_store_swapped_with_another_is_noticed(measured: Path, unkilled: Unkilled, tmp_path: Path) -> None:
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
    assert resume(measured, unkilled) == [0, 1]


@pytest.mark.parametrize("function", ["encode_chunk", "write_file"])
def test_what_fails_in_the_background_is_raised_by_the_next_call(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is, nothing is committed behind it."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room for a chunk")

    schema = case.make_schema()
    writer = AttentionWriter.open(tmp_path / "run.zarr", schema, **case.fixed())
    case.write(writer, 0)
    with monkeypatch.context() as failing:
        failing.setattr(f"store.commit.{function}", fail)
        writer.add_attention(1, 0, case.attention(schema, 0, schema.batch_rows(1)))
        wait(writer._files[1][0].values())
    with pytest.raises(MemoryError, match="no room for a chunk"):
        case.write(writer, 2)
    writer.close()
    assert AttentionStore.open(tmp_path / "run.zarr").committed_batches == (0,)
    assert verify(tmp_path / "run.zarr") == []
