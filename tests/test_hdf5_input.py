"""What a user's HDF5 file may be and hold: each kind is one sentence before anything is written, or is imported."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from engine.run import main
from store import AttentionStore, AttentionWriter
from store.hdf5_input import fatality

SHAPE = (3, 2, 5, 5)
GRID = ["--grid", "2,2", "--axes", "image,head,query,key"]


def maps() -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(5), size=SHAPE[:3]).astype(np.float32)


def sound(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["attn/layer_0"] = maps()
        file["images/id"] = ["a", "b", "c"]
    return path


def imported(path: Path, capsys: pytest.CaptureFixture[str], code: int) -> str:
    """Import it; what was said, in one line if it was refused."""
    store = path.with_name("own.zarr")
    assert main(["import", "--hdf5", str(path), "--store", str(store), *GRID]) == code
    said = capsys.readouterr()
    if code:
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        assert not store.exists()
        assert not path.with_name("own.ledger").exists()
    return said.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n", "is a Git LFS pointer, .* git lfs pull"),
        (b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(128), "is a MATLAB file of an earlier format; .* -v7.3"),
        (b"CDF\1" + bytes(64), "is a netCDF-3 file; convert it with nccopy"),
        (b"PK\3\4" + bytes(64), "is a zip archive"),
        (b"\x93NUMPY\1\0", "is a NumPy array"),
        (b"\x89HDF\r\n\x1a\n", r"cannot be read as HDF5 \(.*\); copy it again, or write it again"),
    ],
)
def test_another_kind_of_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "own.h5"
    path.write_bytes(content)
    assert re.search(message, imported(path, capsys, 2))


def linked(file: Any) -> None:
    file["attn/layer_1"] = h5py.ExternalLink("other.h5", "/attn/layer_0")


def linked_names(file: Any) -> None:
    del file["images"]
    file["images"] = h5py.ExternalLink("other.h5", "/images")


def virtual(file: Any) -> None:
    layout = h5py.VirtualLayout(shape=SHAPE, dtype="f4")
    layout[...] = h5py.VirtualSource("other.h5", "attn/layer_0", shape=SHAPE)
    file.create_virtual_dataset("attn/layer_1", layout)


def external(file: Any) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_external(b"/etc/hostname", 0, h5py.h5f.UNLIMITED)
    h5py.h5d.create(file.id, b"attn/layer_1", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(SHAPE), plist)


def compressed(file: Any) -> None:
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((1, *SHAPE[1:]))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
    space = h5py.h5s.create_simple(SHAPE)
    data = h5py.h5d.create(file.id, b"attn/layer_1", h5py.h5t.IEEE_F32LE, space, plist)
    for image in range(SHAPE[0]):
        data.write_direct_chunk((image, 0, 0, 0), b"compressed", 0)


def huge(file: Any) -> None:
    file.create_dataset("attn/layer_1", (10**6, 12, 1025, 1025), "f2", chunks=(1, 1, 5, 5))


def huge_names(file: Any) -> None:
    del file["images/id"]
    file.create_dataset("images/id", (10**10,), "i8", chunks=(1000,))


def large_chunks(file: Any) -> None:
    shape = (4, 1, 20_000, 20_000)
    file.create_dataset("attn/layer_1", shape, "f2", chunks=shape, compression="gzip")
    file["attn/layer_1"].id.write_direct_chunk((0, 0, 0, 0), bytes(2_000_000))


def nothing(file: Any) -> None:
    del file["images/id"]
    file["images/id"] = h5py.Empty("S3")


def dangling_cell(file: Any) -> None:
    del file["images/id"]
    cells = file.create_dataset("images/id", (3,), h5py.ref_dtype)
    for row in range(3):
        cells[row] = file["attn"].ref


def other_type(file: Any) -> None:
    file.create_dataset("attn/layer_1", SHAPE, [("r", "f4"), ("i", "f4")])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (linked, r"attn/layer_1 is a link into another file, other\.h5, and other files are not read"),
        (linked_names, r"images is a link into another file, other\.h5, and other files are not read"),
        (virtual, "attn/layer_1 keeps its values in another file, and other files are not read"),
        (external, "attn/layer_1 keeps its values in another file, and other files are not read"),
        (compressed, r"attn/layer_1 is compressed by a plugin that is not here \(Zstandard, filter 32015\)"),
        (huge, r"attn/layer_1 states 25,215\.0 GB of values and holds 0\.0 MB; it was not written to its end"),
        (huge_names, r"images/id states 80\.0 GB of values and holds 0\.0 MB"),
        (large_chunks, r"attn/layer_1 is stored in chunks of 3\.2 GB"),
        (nothing, "images/id is empty; expected values"),
        (dangling_cell, "images/id holds a reference that leads to no text"),
        (other_type, "attn/layer_1 is .*; expected post-softmax attention, floats"),
    ],
)
def test_what_a_file_may_hold_is_refused_by_name_and_takes_no_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Callable[[Any], None], message: str
) -> None:
    sound(tmp_path / "other.h5")
    with h5py.File(sound(tmp_path / "own.h5"), "r+") as file:
        edit(file)
    assert re.search(message, imported(tmp_path / "own.h5", capsys, 2))


def test_links_in_the_file_odd_attributes_and_names_are_no_trouble(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(sound(tmp_path / "own.h5"), "r+") as file:
        file["attn"]["again"] = h5py.SoftLink("/attn/layer_0")
        file["attn"]["nowhere"] = h5py.SoftLink("/nothing")
        file["attn"]["above"] = file["/"]
        file["attn/layer_0"].attrs["layout"] = "[" * 100_000
        file["attn/layer_0"].attrs["site"] = np.arange(3)
        file["attn/layer_0"].attrs["precision"] = [b"a", b"b"]
        file.attrs["class_names"] = "{"
        file.create_dataset(b"attn/layer_caf\xe9", data=maps())
        file.move("images/id", "names")
        file["images/id"] = h5py.SoftLink("/names")
    imported(tmp_path / "own.h5", capsys, 0)
    store = AttentionStore.open(tmp_path / "own.zarr")
    assert store.sites == ("array([0, 1, 2])", "attn/layer_café")
    assert store.image_ids == ("a", "b", "c")
    np.testing.assert_array_equal(store.read(1), maps().astype(np.float16).astype(np.float32))


def test_a_file_that_ends_the_process_which_reads_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def stay() -> None:
        while True:
            pass

    assert fatality(end) == "HDF5's library fails on it"
    assert fatality(lambda: 1 / 0) == ""
    with monkeypatch.context() as soon:
        soon.setattr("store.hdf5_input._SECONDS", 1)
        assert fatality(stay) == "HDF5's library does not come back from it in 1 s"
    monkeypatch.setattr("store.hdf5_attention.open_hdf5", end)
    message = imported(sound(tmp_path / "own.h5"), capsys, 2)
    assert "is damaged: HDF5's library fails on it; copy it again, or write it again" in message


def test_a_file_that_another_program_writes_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sound(tmp_path / "own.h5")
    write = f"import h5py; file = h5py.File({str(path)!r}, 'r+'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", write], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert "is open for writing in another program; close it there" in imported(path, capsys, 2)
        other.communicate(b"\n")


@pytest.mark.parametrize("size", ["1", "2", "3"])
def test_an_image_of_nan_alone_is_counted_whatever_the_batch_size(
    size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = maps()
    values[1] = np.nan
    path, store = tmp_path / "own.h5", tmp_path / "own.zarr"
    with h5py.File(path, "w") as file:
        file["attn/layer_0"] = values
    assert main(["import", "--hdf5", str(path), "--store", str(store), *GRID, "--batch-size", size]) == 0
    assert "10 rows of attn/layer_0 hold NaN" in capsys.readouterr().out
    with h5py.File(path, "w") as file:
        file["attn/layer_0"], file["attn/layer_1"] = values, np.full(SHAPE, np.nan, np.float32)
    store = tmp_path / "none.zarr"
    assert main(["import", "--hdf5", str(path), "--store", str(store), *GRID, "--batch-size", size]) == 2
    assert "every row of attn/layer_1 holds NaN; expected post-softmax attention" in capsys.readouterr().err
    assert not store.exists()


def test_an_import_that_goes_on_counts_all_rows_of_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = maps()
    values[0, 0, 0] = np.nan
    path = tmp_path / "own.h5"
    with h5py.File(path, "w") as file:
        file["attn/layer_0"] = values
    command = ["import", "--hdf5", str(path), "--store", str(tmp_path / "own.zarr"), *GRID, "--batch-size", "1"]
    commit = AttentionWriter.commit

    def interrupted(self: AttentionWriter, batch: int) -> None:
        if batch:
            raise KeyboardInterrupt
        commit(self, batch)

    monkeypatch.setattr(AttentionWriter, "commit", interrupted)
    assert main(command) == 130
    monkeypatch.undo()
    assert main(command) == 0
    assert "1 rows of attn/layer_0 hold NaN" in capsys.readouterr().out
    read = AttentionStore.open(tmp_path / "own.zarr").read(0)
    np.testing.assert_allclose(read, values, atol=1e-3)
