"""What every `Storage` promises, as tests: a new one subclasses `StorageTests` and gives an empty place."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import store_cases as case
import zarr

import store.objects
from store import AttentionStore, AttentionWriter, StoreError
from store.objects import ObjectStorage
from store.schema import LEDGER_FILES, STORE_FILES
from store.storage import PARTIAL, Storage
from store.verify import verify

SHARD = "attention/layer_00/c.0.0.0.0"


class StorageTests:
    """Subclasses define the fixture `storage`: a place named run.zarr, in a folder of its own, where nothing lies."""

    @pytest.fixture
    def storage(self) -> Storage:
        raise NotImplementedError

    def test_a_place_has_a_name_and_places_beside_it(self, storage: Storage) -> None:
        assert storage.name == "run.zarr"
        assert str(storage) == str(storage.location)
        assert storage.where("zarr.json") == f"{storage}/zarr.json"
        ledger = storage.beside("run.ledger")
        assert ledger.name == "run.ledger"
        assert str(ledger) == str(storage).replace("run.zarr", "run.ledger")
        assert type(ledger) is type(storage)

    def test_nothing_lies_in_a_new_place(self, storage: Storage) -> None:
        assert not storage.is_there()
        assert not storage.exists("zarr.json")
        assert storage.sizes() == storage.sizes("attention") == {}
        assert storage.fetch(["zarr.json", SHARD]) == [None, None]
        assert storage.own_files(STORE_FILES) == []
        storage.sweep()
        storage.clear(STORE_FILES)
        assert not storage.is_there()

    def test_what_is_not_there_is_one_error(self, storage: Storage) -> None:
        storage.replace("zarr.json", b"{}")
        for ask in (storage.size, storage.version, storage.read):
            for file in (SHARD, "zarr.json/inside"):
                with pytest.raises(FileNotFoundError):
                    ask(file)
        with pytest.raises(FileNotFoundError):
            storage.read_range(SHARD, 0, 4)
        with pytest.raises(FileNotFoundError):
            storage.read_ranges(SHARD, [(0, 4)])

    @pytest.mark.parametrize("content", [b"", b"\0", bytes(range(256)) * 999])
    def test_what_is_written_is_read(self, storage: Storage, content: bytes) -> None:
        storage.replace("zarr.json", content)
        assert storage.is_there()
        assert storage.exists("zarr.json")
        assert storage.read("zarr.json") == content
        assert storage.size("zarr.json") == storage.version("zarr.json")[0] == len(content)
        assert storage.sizes() == {"zarr.json": len(content)}
        assert storage.fetch([SHARD, "zarr.json"]) == [None, content]

    @pytest.mark.parametrize(
        "file", ["a b/é.json", "a%20b.json", "plus+x", "[x]", "~t", "#h", "a&b", "a=b;c,d", "ǘ", "ü", "c.1/c.1"]
    )
    def test_odd_names(self, storage: Storage, file: str) -> None:
        storage.replace(file, b"1")
        assert storage.read(file) == b"1"
        assert list(storage.sizes()) == [file]

    def test_a_file_is_replaced_whole(self, storage: Storage) -> None:
        storage.replace(SHARD, b"before")
        before = storage.version(SHARD)
        assert storage.version(SHARD) == before
        with storage.writing(SHARD) as write:
            assert write(b"af") == 2
            assert storage.read(SHARD) == b"before"
            assert write(b"ter!") == 4
        storage.settle([SHARD])
        assert storage.read(SHARD) == b"after!"
        assert storage.version(SHARD) != before

    def test_what_is_not_written_to_its_end_is_not_there(self, storage: Storage) -> None:
        def stop_half_way(file: str) -> None:
            with storage.writing(file) as write:
                write(b"half")
                raise KeyError

        storage.replace(SHARD, b"before")
        for file in (SHARD, SHARD.replace("c.0", "c.1")):
            with pytest.raises(KeyError):
                stop_half_way(file)
        assert storage.sizes() == {SHARD: 6}
        assert storage.read(SHARD) == b"before"

    def test_parts_of_a_file(self, storage: Storage) -> None:
        storage.replace(SHARD, b"0123456789")
        for offset, length in ((0, 10), (3, 4), (9, 1), (8, 5), (0, 99), (10, 1), (20, 3), (4, 0)):
            found = storage.read_range(SHARD, offset, length)
            assert found.dtype == np.uint8
            assert found.tobytes() == b"0123456789"[offset : offset + length]
        assert storage.read_ranges(SHARD, [(6, 2), (0, 1), (1, 3)]) == [b"67", b"0", b"123"]
        assert storage.read_ranges(SHARD, []) == []
        storage.replace(SHARD, b"")
        assert storage.read_range(SHARD, 0, 4).tobytes() == b""

    def test_a_list_is_of_one_folder_and_sorted(self, storage: Storage) -> None:
        files = ["attention/layer_10/c.0", "attention/layer_1/c.10", "attention/layer_1/c.9", "zarr.json"]
        for size, file in enumerate(files):
            storage.replace(file, bytes(size))
        storage.beside("run.zarr.txt").replace("zarr.json", b"beside")
        assert storage.sizes() == {file: files.index(file) for file in sorted(files)}
        assert list(storage.sizes()) == sorted(files)
        assert storage.sizes("attention/layer_1") == {"attention/layer_1/c.10": 1, "attention/layer_1/c.9": 2}
        assert storage.sizes("attention/layer") == {}

    def test_what_is_removed_is_gone(self, storage: Storage) -> None:
        for file in (SHARD, "zarr.json"):
            storage.replace(file, b"1")
        storage.remove(SHARD)
        storage.remove(SHARD)  # again
        assert storage.sizes() == {"zarr.json": 1}

    def test_all_is_removed_but_what_is_kept(self, storage: Storage) -> None:
        ledger = storage.beside("run.ledger")
        for file in ("lock", "metadata.json", "batch_000000.json", "metrics/a/0123456789abcdef/metadata.json"):
            ledger.replace(file, b"1")
        ledger.clear(LEDGER_FILES, keep="lock")
        assert ledger.sizes() == {"lock": 1}
        ledger.clear(LEDGER_FILES)
        assert not ledger.is_there()

    def test_nothing_is_removed_beside_a_file_of_others(self, storage: Storage) -> None:
        for file in (SHARD, "zarr.json", "notes.txt"):
            storage.replace(file, b"1")
        for refused in (storage.own_files, storage.clear):
            with pytest.raises(StoreError, match=r"run\.zarr/notes\.txt is in the way"):
                refused(STORE_FILES)
        assert len(storage.sizes()) == 3

    def test_a_new_store_appears_at_once(self, storage: Storage) -> None:
        def fail() -> None:
            assert not storage.is_there()
            raise OSError("the ledger cannot be written")

        for commit in (fail, lambda: None):
            with storage.skeleton() as skeleton:
                assert list(skeleton.iterdir()) == []
                zarr.create_group(skeleton, attributes={"made": "here"})
                (skeleton / "attention").mkdir()
                (skeleton / "attention" / "zarr.json").write_bytes(b"{}")
                if commit is fail:
                    with pytest.raises(OSError, match="the ledger cannot be written"):
                        storage.adopt(skeleton, commit)
                    assert not storage.is_there()
                else:
                    storage.adopt(skeleton, commit)
            assert not skeleton.exists()
        assert list(storage.sizes()) == ["attention/zarr.json", "zarr.json"]
        assert dict(zarr.open_group(storage.zarr(), mode="r").attrs) == {"made": "here"}
        storage.sweep()
        assert len(storage.sizes()) == 2

    def test_what_may_be_written_is_a_number_or_unknown(self, storage: Storage) -> None:
        free = storage.free_bytes()
        assert free is None or free > 0

    def test_one_holds_the_lock(self, storage: Storage) -> None:
        ledger = storage.beside("run.ledger")
        for _ in range(2):
            with ledger.locked():
                for _ in range(2):
                    with pytest.raises(StoreError, match=rf"is locked: process {os.getpid()}"), ledger.locked():
                        pass
        with pytest.raises(KeyError), ledger.locked():
            raise KeyError
        with ledger.locked():
            pass

    def test_a_lock_is_shared_with_those_who_know_the_run(self, storage: Storage) -> None:
        ledger = storage.beside("run.ledger")
        with ledger.locked() as lock:
            run = lock.share()
            with ledger.joined(run), ledger.joined(run), pytest.raises(StoreError, match="is locked"):
                ledger.locked().__enter__()
            with pytest.raises(StoreError, match="is not shared by the run"), ledger.joined("0" * 32):
                pass
        with ledger.locked() as lock:
            assert lock.share() != run
            with pytest.raises(StoreError, match="is not shared by the run"), ledger.joined(run):
                pass

    def test_of_many_starters_one_holds_the_lock(self, storage: Storage) -> None:
        one_takes_it(storage)

    @pytest.mark.parametrize("encoding", ["fp16", "qk"])
    def test_a_store_is_captured_and_measured(self, storage: Storage, encoding: str) -> None:
        schema = case.make_schema(encoding)
        assert case.capture(storage, schema) == [0, 1, 2]
        assert case.measure(storage)
        assert case.measure(storage) == {}
        assert case.capture(storage, schema) == []
        case.check_values(storage)
        assert verify(storage) == []
        assert not [file for file in storage.sizes() if file.endswith(PARTIAL)]
        AttentionWriter.discard(storage)
        assert not storage.is_there()
        with pytest.raises(StoreError, match="there is no store at"):
            AttentionStore.open(storage)


def one_takes_it(storage: Storage, starters: int = 8) -> None:
    """Of starters that come together, one opens the store for writing, and the others say who has it."""
    together = threading.Barrier(starters)
    taken: list[AttentionWriter] = []
    refused: list[str] = []

    def start() -> None:
        together.wait(30)
        try:
            taken.append(AttentionWriter.open(storage, case.make_schema(), **case.fixed()))
        except StoreError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(starters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert len(refused) == starters - 1
    assert all("is locked: process" in sentence for sentence in refused)
    taken[0].close()
    AttentionWriter.open(storage, case.make_schema(), **case.fixed()).close()


class ObjectStorageTests(StorageTests):
    """What an object store promises besides: an object is put on condition, and so the lock is taken."""

    def test_an_object_is_put_where_none_is_or_over_what_was_read(self, storage: ObjectStorage) -> None:
        assert storage.put_over("lock", b"first")
        assert not storage.put_over("lock", b"second")
        content, version = storage.read_version("lock")
        assert content == b"first"
        assert storage.put_over("lock", b"third", version)
        assert not storage.put_over("lock", b"fourth", version)
        assert storage.read("lock") == b"third"
        _, version = storage.read_version("lock")
        storage.remove("lock")
        assert not storage.put_over("lock", b"fifth", version)
        assert not storage.exists("lock")
        with pytest.raises(FileNotFoundError):
            storage.read_version("lock")

    @pytest.mark.parametrize("host", [socket.gethostname(), "elsewhere"])
    def test_the_lock_of_a_dead_process(self, storage: ObjectStorage, host: str) -> None:
        """On the same machine it is known that the process is gone; elsewhere the person has to know."""
        leave_lock(storage, host, dead_process())
        if host != "elsewhere":
            assert case.capture(storage) == [0, 1, 2]
        else:
            with pytest.raises(StoreError, match="on elsewhere is writing this store"):
                case.capture(storage)

    def test_of_starters_that_find_a_dead_process_lock_one_takes_it(
        self, storage: ObjectStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All have read the stale lock when the first replaces it."""
        starters = 8
        together = threading.Barrier(starters)

        class Held(set[str]):
            def __contains__(self, location: object) -> bool:
                together.wait(30)
                return super().__contains__(location)

        def look(process: int) -> bool:
            together.wait(30)
            return False

        monkeypatch.setattr(store.objects, "_held", Held())
        monkeypatch.setattr(store.objects, "is_running", look)
        for process in (
            dead_process(),
            os.getpid(),
        ):  # which had this process's number: the locks are alike but for one
            leave_lock(storage, socket.gethostname(), process)
            one_takes_it(storage, starters)

    def test_a_run_that_has_lost_its_lock_leaves_the_next_ones_alone(
        self, storage: ObjectStorage, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Somebody followed the advice to delete it, and another run has put its own there, or none has."""
        ledger = storage.beside("run.ledger")
        with contextlib.ExitStack() as second:
            with ledger.locked() as lock:
                ledger.remove("lock")
                with pytest.raises(
                    StoreError, match=r"run\.ledger/lock was deleted or replaced while this run held it"
                ):
                    lock.share()
                second_lock = second.enter_context(ledger.locked())
                with pytest.raises(
                    StoreError, match=r"run\.ledger/lock was deleted or replaced while this run held it"
                ):
                    lock.share()
            (said,) = [record.getMessage() for record in caplog.records if record.name == "store.objects"]
            assert said == f"{ledger}/lock was deleted or replaced while this run held it; verify the store"
            with pytest.raises(StoreError, match="is locked: process"), ledger.locked():
                pass
            with ledger.joined(second_lock.share()):
                pass
        assert not ledger.exists("lock")

    @pytest.mark.parametrize(
        "content", [b"", b"\xff", b"[]", b"{", b'{"host": "' + socket.gethostname().encode() + b'"}']
    )
    def test_a_damaged_lock_is_somebodys(self, storage: ObjectStorage, content: bytes) -> None:
        storage.beside("run.ledger").replace("lock", content)
        with pytest.raises(
            StoreError, match=r"is locked: process unknown .* if it has died, delete .*run\.ledger/lock"
        ):
            case.capture(storage)
        storage.beside("run.ledger").remove("lock")
        assert case.capture(storage) == [0, 1, 2]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_lock(storage: ObjectStorage, host: str, process: int) -> None:
    """What a process that died has left."""
    lock = {"host": host, "process": process, "run": ""}
    storage.beside("run.ledger").replace("lock", json.dumps(lock).encode())
