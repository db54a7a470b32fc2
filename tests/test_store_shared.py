"""Several writers of one store: each batch is one writer's, one of them makes and finishes the store."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import store_cases as case

from store import AttentionStore, AttentionWriter, MetricWriter, StoreError
from store.verify import verify

# Opens a store, shares it, says the run's name, and writes the batches it is given, one a line of its input.
FIRST = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import store_cases as case
from store import AttentionWriter

schema = case.make_schema()
with AttentionWriter.open(Path(sys.argv[1]), schema, **case.fixed(schema)) as writer:
    writer.share()
    print(writer.run, flush=True)
    for line in sys.stdin:
        case.write(writer, int(line))
"""

# Joins a run and writes the batches it is given, too; says "ready", and "written" after each.
JOINER = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[3])
import store_cases as case
from store import AttentionWriter

schema = case.make_schema()
with AttentionWriter.open(Path(sys.argv[1]), schema, **case.fixed(schema), join=sys.argv[2]) as writer:
    print("ready", flush=True)
    for line in sys.stdin:
        case.write(writer, int(line))
        print("written", flush=True)
"""

CASES = str(Path(case.__file__).parent)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def open_writer(path: Path, join: str = "", **changes: Any) -> AttentionWriter:
    schema = case.make_schema(**changes)
    return AttentionWriter.open(path, schema, **case.fixed(schema), join=join)


def start_joiner(path: Path, run: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", JOINER, str(path), run, CASES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    expect(process, "ready")
    return process


def expect(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{word}\n"


def give(process: subprocess.Popen[str], batch: int) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{batch}\n")
    process.stdin.flush()


def same_store(path: Path, other: Path) -> None:
    for part in ("attention", "metrics", "logits", "images"):
        assert case.file_bytes(path / part) == case.file_bytes(other / part)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run.zarr"
    case.capture(path)
    return path


def test_two_writers_leave_what_one_does(path: Path, alone: Path) -> None:
    with open_writer(path) as first:
        first.share()
        with open_writer(path, join=first.run) as second:
            case.write(second, 1)
            case.write(first, 0)
            case.write(second, 2)
            with pytest.raises(StoreError, match="is committed already"):
                second.commit(2)
        first.finish()
    assert verify(path) == []
    case.check_values(path)
    same_store(path, alone)


def test_a_store_that_lacks_a_writers_batches_is_not_finished(path: Path) -> None:
    with open_writer(path) as first:
        first.share()
        with open_writer(path, join=first.run) as second:
            case.write(second, 1)
        with pytest.raises(StoreError, match="2 of 3 batches are missing, the first is 0"):
            first.finish()
    assert case.capture(path) == [0, 2]


def test_nobody_else_writes_while_one_of_them_lives(path: Path) -> None:
    with open_writer(path) as first:
        first.share()
        second = open_writer(path, join=first.run)
        with pytest.raises(StoreError, match="or one that it shares it with, is writing this store"):
            open_writer(path)
    with pytest.raises(StoreError, match="is locked"):
        open_writer(path)
    with pytest.raises(StoreError, match="is locked"):
        MetricWriter.open(AttentionStore.open(path), case.LATER)
    second.close()
    assert case.capture(path) == [0, 1, 2]


def test_only_the_run_that_shares_can_be_joined(path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened for writing"):
        open_writer(path, join="0" * 32)
    assert not path.with_name("run.ledger").exists()
    with open_writer(path) as first:
        with pytest.raises(StoreError, match="is locked"):  # it does not share
            open_writer(path, join="0" * 32)
        first.share()
        earlier = first.run
        with pytest.raises(StoreError, match="is not shared by the run that this process belongs to"):
            open_writer(path, join="0" * 32)
    with open_writer(path) as first:
        first.share()
        with pytest.raises(StoreError, match="is not shared by the run"):  # one left over from an earlier run
            open_writer(path, join=earlier)


def test_who_joins_must_capture_the_same(path: Path) -> None:
    with open_writer(path) as first:
        first.share()
        with pytest.raises(StoreError, match=r"another model\.weights_sha256"):
            open_writer(path, join=first.run, model={"name": "vit_test", "weights_sha256": "f" * 64})
        schema = case.make_schema()
        with pytest.raises(StoreError, match="images/label"):
            AttentionWriter.open(path, schema, **case.fixed(schema) | {"labels": [0] * case.IMAGES}, join=first.run)


def check_death_of_the_first(path: Path, alone: Path, seconds: float) -> None:
    """The first is killed, the one that joined lives on for a while: no third begins before that has ended."""
    command = [sys.executable, "-c", FIRST, str(path), CASES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        run = first.stdout.readline().strip()
        joiner = start_joiner(path, run)
        give(first, 0)
        give(joiner, 1)
        time.sleep(seconds)
        first.kill()
    with pytest.raises(StoreError, match="is locked"):
        open_writer(path)
    expect(joiner, "written")
    give(joiner, 2)
    time.sleep(seconds)
    joiner.kill()
    joiner.wait()
    assert verify(path) == []
    committed = AttentionStore.open(path).committed_batches
    assert 1 in committed
    assert case.capture(path) == [batch for batch in range(3) if batch not in committed]
    assert verify(path) == []
    same_store(path, alone)
    assert not list(path.parent.rglob("*.partial"))


def test_the_first_is_killed_while_others_write(path: Path, alone: Path) -> None:
    check_death_of_the_first(path, alone, 0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_is_killed_at_30_random_moments(tmp_path: Path, alone: Path) -> None:
    rng = random.Random(0)
    for attempt in range(30):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        check_death_of_the_first(folder / "run.zarr", alone, rng.uniform(0, 0.03))
