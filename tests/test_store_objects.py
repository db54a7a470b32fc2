"""A store in an object store: the bytes of one in a folder, whole batches whatever fails, read and measured by URL."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import store_cases as case
import timm
import torch
from obstore.store import MemoryStore
from PIL import Image
from safetensors.torch import save_file

from engine.run import main
from engine.study.one_capture import require_places
from store import AttentionStore, AttentionWriter, MetricWriter, StoreError
from store.local import LocalStorage
from store.objects import ObjectStorage
from store.places import storage_at
from store.storage import StoreUrl, location_of
from store.verify import info, verify
from train.errors import InputError


def in_memory(objects: Any = None) -> ObjectStorage:
    """A store in an object store of this process's memory."""
    return ObjectStorage(objects or MemoryStore(), StoreUrl("s3://bucket/runs/run.zarr"))


def content(storage: Any) -> dict[str, bytes]:
    """Every file of a store, and what the records of its ledger say beside the capture that they belong to."""
    ledger = storage.beside("run.ledger")
    records = {file: json.loads(ledger.read(file))["record"] for file in ledger.sizes() if file != "lock"}
    return {f"{storage.name}/{file}": storage.read(file) for file in storage.sizes()} | {
        f"{ledger.name}/{file}": json.dumps(record).encode() for file, record in records.items()
    }


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> set[str]:
    return {file for file in one.keys() | other.keys() if one.get(file) != other.get(file)}


# The time at which a store was made.
CREATED = {"run.zarr/zarr.json", "run.ledger/metadata.json"}


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_the_bytes_of_a_folder(tmp_path: Path, encoding: str) -> None:
    schema = case.make_schema(encoding)
    there, here = in_memory(), LocalStorage(tmp_path / "run.zarr")
    for storage in (there, here):
        assert case.capture(storage, schema) == [0, 1, 2]
        assert case.measure(storage)
        assert case.measure(storage) == {}
        assert case.capture(storage, schema) == []
        case.check_values(storage)
        assert verify(storage) == []
    assert differing(content(there), content(here)) <= CREATED
    printed = [info(storage) | {"path": "", "created": ""} for storage in (there, here)]
    assert printed[0] == printed[1]
    assert info(there)["path"] == "s3://bucket/runs/run.zarr"
    assert not there.beside("run.ledger").exists("lock")


class Failing(ObjectStorage):
    """Ends after so many PUTs, as a kill or a network would."""

    left: ClassVar[int] = 0  # of all places together

    def beside(self, name: str) -> Failing:
        place = super().beside(name)
        place.__class__ = Failing
        return place  # type: ignore[return-value]

    def _call(self, function: str, file: str, *args: Any, **kwargs: Any) -> Any:
        if function == "put":
            if Failing.left == 0:
                raise OSError("the network is gone")
            Failing.left -= 1
        return super()._call(function, file, *args, **kwargs)


def capture_and_measure(storage: ObjectStorage) -> str:
    """Do both; what went wrong."""
    try:
        case.capture(storage)
        case.measure(storage)
    except (StoreError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_cut_off_after_any_put(step: int) -> None:
    """The record is a batch's last PUT: what is there is whole batches, and a later run ends with the same bytes."""
    whole = in_memory()
    case.capture(whole)
    case.measure(whole)
    expected = content(whole)
    puts = 0
    while True:
        objects = MemoryStore()
        Failing.left = puts
        failing = Failing(objects, whole.location)
        printed = capture_and_measure(failing)
        if not printed:
            break
        assert "the network is gone" in printed
        storage = in_memory(objects)
        if storage.is_there():
            assert verify(storage) == []
            store = AttentionStore.open(storage)
            committed = np.flatnonzero(store.committed_images)
            case.check_maps(store.read(1, committed), "fp16", 1, committed)
        case.capture(storage)
        case.measure(storage)
        assert verify(storage) == []
        assert differing(content(storage), expected) <= CREATED, puts
        puts += step
    assert puts > 50


def test_lost_and_short_objects_are_captured_again() -> None:
    storage = in_memory()
    case.capture(storage)
    lost, short = "attention/layer_00/c.1.0.0.0", "attention/layer_01/c.2.0.0.0"
    before = {file: storage.read(file) for file in (lost, short)}
    storage.remove(lost)
    storage.replace(short, before[short][:-9])
    assert sorted(damage.unit for damage in verify(storage)) == [f"run.zarr/{lost}", f"run.zarr/{short}"]
    with pytest.raises(StoreError, match=r"batch 1: s3://bucket/runs/run.zarr/attention/layer_00/.* is missing"):
        AttentionStore.open(storage).read(0)
    assert case.capture(storage) == [1, 2]
    assert {file: storage.read(file) for file in (lost, short)} == before


def test_a_flipped_bit_is_found_by_who_reads_and_by_verify() -> None:
    storage = in_memory()
    case.capture(storage)
    shard = "attention/layer_00/c.1.0.0.0"
    flipped = bytearray(storage.read(shard))
    flipped[100] ^= 4
    storage.replace(shard, bytes(flipped))
    assert [damage.unit for damage in verify(storage)] == [f"run.zarr/{shard}"]
    with pytest.raises(StoreError, match=r"attention/layer_00, batch 1: .* is damaged .*; delete it and capture this"):
        AttentionStore.open(storage).read(0)
    storage.remove(shard)  # what verify names is removed, and captured again
    assert case.capture(storage) == [1]
    assert verify(storage) == []


def open_writer(storage: ObjectStorage, join: str = "") -> AttentionWriter:
    return AttentionWriter.open(storage, case.make_schema(), **case.fixed(), join=join)


def test_one_run_writes_at_a_time() -> None:
    storage = in_memory()
    with open_writer(storage) as first:
        with pytest.raises(StoreError, match=rf"is locked: process {os.getpid()} on .* delete .*run\.ledger/lock"):
            open_writer(storage)
        first.share()
        with open_writer(storage, join=first.run) as second:
            case.write(second, 2)
        with pytest.raises(StoreError, match="is not shared by the run"):
            open_writer(storage, join="0" * 32)
        for batch in (0, 1):
            case.write(first, batch)
        first.finish()
    case.check_values(storage)
    MetricWriter.open(AttentionStore.open(storage), case.LATER).close()


def test_other_stores_are_left_alone() -> None:
    storage = in_memory()
    storage.replace("zarr.json", b"{}")
    with pytest.raises(StoreError, match="no store of this program"):
        open_writer(storage)
    assert storage.sizes() == {"zarr.json": 2}
    with pytest.raises(StoreError, match=r"there is no store at s3://bucket/runs/run\.zarr"):
        AttentionStore.open(in_memory())


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert location_of(f"file://{tmp_path}/run.zarr/") == tmp_path / "run.zarr"
    odd = tmp_path / "a run, 50 % é.zarr"
    assert location_of(odd.as_uri()) == odd
    assert isinstance(storage_at(f"file://{tmp_path}/run.zarr"), LocalStorage)
    assert location_of("s3://bucket/run.zarr/").name == "run.zarr"
    with pytest.raises(StoreError, match=r"ftp://host/run\.zarr is no URL of a store"):
        AttentionStore.open("ftp://host/run.zarr")
    for module in ("obstore", "obstore.exceptions", "obstore.store"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "store.objects")
    assert main(["info", "s3://bucket/run.zarr"]) == 1
    assert "pip install 'vit-attention-engine[cloud]'" in capsys.readouterr().err


# --- servers --------------------------------------------------------------------------------------------------------


def test_objects_of_others_stay(bucket: str) -> None:
    """Under the prefixes of a store's sample maps and of its ledger; a discarded store takes its own objects alone."""
    for place, file in (("a.samples.zarr", "notes.txt"), ("b.ledger", "accounts.txt")):
        theirs = storage_at(f"{bucket}/{place}")
        theirs.replace(file, b"mine")
        with pytest.raises(InputError, match=f"{place}.* is in the way"):
            require_places(location_of(f"{bucket}/{place[0]}.zarr"))
        assert theirs.read(file) == b"mine"
    with pytest.raises(InputError, match=r"lies inside run\.zarr"):
        require_places(location_of(f"{bucket}/run.zarr/inner.zarr"))
    url = f"{bucket}/run.zarr"
    case.capture(url)
    storage_at(url).replace("notes.txt", b"mine")
    with pytest.raises(StoreError, match=r"notes\.txt is in the way"):
        AttentionWriter.discard(url)
    storage_at(url).remove("notes.txt")
    storage_at(f"{bucket}/run.zarr.txt").replace("notes.txt", b"mine")
    AttentionWriter.discard(url)
    assert not storage_at(url).sizes()
    assert list(storage_at(f"{bucket}/run.zarr.txt").sizes()) == ["notes.txt"]


def test_an_s3_server(bucket: str, tmp_path: Path) -> None:
    url = f"{bucket}/runs/run.zarr"
    assert case.capture(url) == [0, 1, 2]
    assert case.measure(url)
    case.check_values(url)
    assert verify(url) == []
    here = LocalStorage(tmp_path / "run.zarr")
    case.capture(here)
    case.measure(here)
    assert differing(content(storage_at(url)), content(here)) <= CREATED
    maps = AttentionStore.open(url)
    np.testing.assert_array_equal(maps.read(1, [9, 0, 5], [1]), case.expected("fp16", 1)[[9, 0, 5], 1:2])
    with pytest.raises(StoreError, match=r"s3://absent/run\.zarr"):
        AttentionStore.open("s3://absent/run.zarr")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A model's weights and 24 images, as arguments of `capture`."""
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=2).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "photos" / "one").mkdir(parents=True)
    for number in range(24):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "one" / f"{number:02d}.png")
    flags = ["--model.name", "test_vit", "--model.weights", str(tmp_path / "w.safetensors")]
    return ["capture", *flags, "--data.root", str(tmp_path / "photos"), "--batch-size", "1", "--store"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_line_takes_urls(
    bucket: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, here = f"{bucket}/maps.zarr", tmp_path / "here" / "maps.zarr"
    assert main([*arguments, str(here)]) == 0
    assert main([*arguments, url]) == 0
    assert main([*arguments, url]) == 0
    assert differing_maps(url, here) == set()
    samples = storage_at(f"{bucket}/maps.samples.zarr")
    local = LocalStorage(here.parent / "maps.samples.zarr")
    assert {f: samples.read(f) for f in samples.sizes()} == {f: local.read(f) for f in local.sizes()}
    assert main(["verify", url]) == 0
    assert main(["measure", "--store", url, "--metrics", "gini,entropy"]) == 0
    assert main(["measure", "--store", url, "--against", url, "--metrics", "js_divergence"]) == 0
    assert main(["verify", url]) == 0
    capsys.readouterr()
    assert main(["info", url]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {metric["name"] for metric in printed["metrics"]} >= {"gini", "js_divergence", "distance"}
    assert main(["export", "--store", url, "--hdf5", str(tmp_path / "maps.h5")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    two = f"{bucket}/two/maps.zarr"
    done = subprocess.run([*command, "engine.run", *arguments, two], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert differing_maps(two, here) == set()


def differing_maps(url: str, here: Path) -> set[str]:
    parts = ("attention", "metrics", "logits", "images")
    found = [
        {file: place.read(file) for part in parts for file in place.sizes(part)}
        for place in (storage_at(url), LocalStorage(here))
    ]
    return differing(*found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_capture_into_s3_is_killed_and_goes_on(bucket: str, arguments: list[str], tmp_path: Path) -> None:
    here = tmp_path / "here" / "maps.zarr"
    assert main([*arguments, str(here)]) == 0
    cut = 0
    for attempt in range(4):
        url = f"{bucket}/{attempt}/maps.zarr"
        ledger = storage_at(f"{bucket}/{attempt}/maps.ledger")
        command = [sys.executable, "-m", "engine.run", *arguments, url]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and sum("batch" in file for file in ledger.sizes()) < 3 * attempt:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        if storage_at(url).is_there():
            assert verify(url) == []
            cut += 0 < len(AttentionStore.open(url).committed_batches) < 24
        assert main([*arguments, url]) == 0
        assert verify(url) == []
        assert differing_maps(url, here) == set()
    assert cut, "no kill came between the first batch and the last"


class Ranges(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, and parts of them; lists nothing."""

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self.send_error(404)
            return
        whole, wanted = file.read_bytes(), self.headers.get("Range")
        begin, _, end = (wanted or "bytes=0-").removeprefix("bytes=").partition("-")
        part = whole[int(begin) : int(end) + 1 if end else len(whole)]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        if wanted:
            self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(part) - 1}/{len(whole)}")
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_web_server_is_read(tmp_path: Path) -> None:
    case.capture(tmp_path / "run.zarr")
    handler: Callable[..., Ranges] = functools.partial(Ranges, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/run.zarr"
        store = AttentionStore.open(url)
        for layer in store.layers:
            case.check_maps(store.read(layer), "fp16", layer)
        np.testing.assert_array_equal(store.read_metric("entropy")[0], case.metric("entropy"))
        with pytest.raises(StoreError, match=r"run\.ledger cannot be searched"):
            _ = store.metric_names
        with pytest.raises(StoreError, match="cannot be opened for writing"):
            case.capture(url)
    finally:
        server.shutdown()
        server.server_close()
