"""A disk that takes no more, at every writer: one error that names what could not be written, and nothing half-written.

What a whole command does on a disk that becomes full is tried by `tests.full_disk`, for long.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_cases as case
import timm
import torch
import xarray

from engine.capture import SampleMaps
from engine.measure.table import write_table
from engine.progress import MemoryExhaustedError, exit_code, foreseen
from engine.run import main
from engine.study.journal import Journal
from store import AttentionStore, DiskError
from store.disk import making, writing
from store.hdf5 import new_hdf5
from store.hdf5_attention import export_attention
from tests import full_disk
from tests.full_disk import file_size_limit
from train.checkpoint import save_checkpoint
from train.model_source import ModelSource
from train.models import build_model
from train.sweep import TrialsFile
from train.whole_files import replace_files, write_atomically

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 2048  # bytes of a file
LARGE = np.random.default_rng(0).bytes(4 * LIMIT).hex()
AXES = ("condition", "seed", "image", "layer", "head")


class Pictures:
    """Of a data set, what sample maps need."""

    ids, labels, class_names, region_names, boxes = ("a", "b"), np.array([0, 1]), ("one", "two"), (), None

    def picture(self, row: int) -> np.ndarray:
        return np.random.default_rng(row).integers(0, 255, (64, 64, 3), np.uint8)


def table(values: np.ndarray) -> xarray.Dataset:
    names = {"condition": ["a", "b"], "image": [f"image_{i:02d}" for i in range(64)], "site": ["s", "t", "u", "v"]}
    coords: dict[str, Any] = {axis: np.array(of, dtype=object) for axis, of in names.items()}
    coords |= {
        "seed": [0],
        "layer": range(4),
        "head": range(4),
        "site": ("layer", np.array(list("abcd"), dtype=object)),
    }
    variables = {"distance": (AXES, values.reshape(2, 1, 64, 4, 4))}
    return xarray.Dataset(variables, coords, {"metrics": "", "undefined": ""})


def captured(folder: Path) -> AttentionStore:
    """A store, made when the disk had space."""
    path = folder / "material" / "a.zarr"
    if not path.exists():
        path.parent.mkdir()
        case.capture(path)
    return AttentionStore.open(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "file": lambda folder: write_atomically(folder / "a.bin", LARGE.encode()),
    "files of a folder": lambda folder: replace_files(folder, [("a.bin", LARGE.encode())]),
    "checkpoint": lambda folder: save_checkpoint(folder / "a.safetensors", {"w": torch.ones(LIMIT)}, {}),
    "journal": lambda folder: Journal(folder / "run.jsonl").stage("train", {}, [], lambda: {"note": LARGE}),
    "trials": lambda folder: TrialsFile(folder / "trials.jsonl", "study").append_logs([{"note": LARGE}]),
    "samples": lambda folder: SampleMaps.create(folder / "samples.zarr", Pictures(), [0, 1]),  # type: ignore[arg-type]
    "table": lambda folder: write_table(table(np.random.default_rng(0).random(2048)), folder),
    "export": lambda folder: export_attention(captured(folder.parent), folder / "a.h5", lambda count: None),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_writer_names_what_it_could_not_write(tmp_path: Path, kind: str) -> None:
    captured(tmp_path)
    folder = tmp_path / "disk"
    folder.mkdir()
    with file_size_limit(LIMIT), pytest.raises(DiskError, match="larger than its file system or a limit") as error:
        WRITERS[kind](folder)
    assert str(error.value).startswith(str(folder))
    assert "cannot be written" in str(error.value)
    assert exit_code(error.value) == 1
    assert not [path for path in folder.rglob("*") if ".partial" in path.name]
    WRITERS[kind](folder)  # with space


def test_a_journal_whose_first_line_found_no_space_is_not_there(tmp_path: Path) -> None:
    """An empty one would be taken for another program's."""
    with file_size_limit(0), pytest.raises(DiskError, match=r"run\.jsonl cannot be written"):
        Journal(tmp_path / "run.jsonl").stage("train", {}, [], lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_table_of_hdf5_and_of_text(tmp_path: Path) -> None:
    """Equal values make small files of Zarr, so that the other two are reached."""
    same = table(np.zeros(2048))
    sizes = [path.stat().st_size for path in write_table(same, tmp_path / "whole")[1:]]
    for name, size in zip(("attention_metrics.h5", "attention_metrics.csv"), sizes, strict=True):
        with file_size_limit(size - 1), pytest.raises(DiskError, match=rf"{name} cannot be written"):
            write_table(same, tmp_path / "disk")
    write_table(same, tmp_path / "disk")


def test_hdf5_reads_what_the_disk_refused(tmp_path: Path) -> None:
    """So that it closes the file in good order."""
    values = np.random.default_rng(0).random((8, 4096))

    def write() -> None:
        with new_hdf5(tmp_path / "a.h5", "schema", lambda path: True) as (file, _):
            dataset = file.create_dataset("a", values.shape, "f8", chunks=(1, 4096), compression="gzip")
            for row, content in enumerate(values):
                dataset[row] = content
            for number in range(200):
                file.attrs[f"attribute {number}"] = LARGE[:300]
            dataset.id.refresh()  # forget what is in memory
            np.testing.assert_array_equal(dataset[...], values)

    with file_size_limit(3 * LIMIT), pytest.raises(DiskError, match=r"a\.h5 cannot be written"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_downloaded_weights_that_find_no_space(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(timm, "create_model", full)
    with pytest.raises(DiskError, match=r"weights of test_vit\.r160_in1k: .*HF_HOME.* no space left"):
        build_model(ModelSource("test_vit.r160_in1k", pretrained=True), num_classes=3)


SENTENCES = {
    errno.ENOSPC: "no space left on its disk; free some space there, and run the same command again",
    errno.EDQUOT: "no space left in the quota of its disk; free some space there",
    errno.EROFS: "its disk can only be read; give another place",
    errno.ENAMETOOLONG: "the path is too long; give another place",
    errno.EMFILE: r"too many files are open; raise the limit \(ulimit -n\)",
    errno.EIO: r"its disk failed \(input/output error\)",
    errno.EACCES: "permission denied; give another place",
}


@pytest.mark.parametrize("number", SENTENCES)
def test_each_refusal_has_its_sentence(number: int) -> None:
    with pytest.raises(DiskError, match=f"^/a/b cannot be written: {SENTENCES[number]}"), writing("/a/b"):
        raise OSError(number, os.strerror(number))


def test_an_error_of_the_disk_is_found_wherever_it_came_from() -> None:
    def wrapped() -> Exception:
        try:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("a library's own words") from error
        except RuntimeError as error:
            return error

    for error in (OSError(errno.ENOSPC, "x"), OSError(errno.ENOSPC, "x", "/a/b"), wrapped()):
        found = foreseen(error)
        assert exit_code(found) == 1
        assert "no space left on its disk; free some space" in str(found)
    assert "/a/b" in str(foreseen(OSError(errno.ENOSPC, "x", "/a/b")))
    no_folder = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")
    assert "set TMPDIR" in str(foreseen(no_folder))
    for fault in (RuntimeError("a fault of ours"), FileNotFoundError(errno.ENOENT, "x", "/a/b"), KeyError(28)):
        assert foreseen(fault) is fault


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 93.1 TiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_memory_that_cannot_be_had_names_the_key_to_lower(error: Exception) -> None:
    found = foreseen(error, ["train.batch_size", "capture.batch_size"])
    assert isinstance(found, MemoryExhaustedError)
    assert exit_code(found) == 1
    assert "lower --train.batch_size or --capture.batch_size" in str(found)
    assert len(str(found).splitlines()) == 1
    assert "lower" not in str(foreseen(error))


def test_memory_that_no_machine_has_in_the_words_of_today() -> None:
    for allocate in (lambda: torch.empty(1 << 60, dtype=torch.uint8), lambda: np.empty(1 << 60, np.uint8)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate()
        assert isinstance(foreseen(error.value), MemoryExhaustedError)


@pytest.mark.parametrize("name", ["a" * 300, "file/out", "file"])
def test_outputs_that_can_be_no_folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["train", "--outputs", str(tmp_path / name)]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(tmp_path) in line
    assert "give another place" in line


def test_what_failed_first_is_said(tmp_path: Path) -> None:
    """Not what failed next, while what was begun is removed."""

    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            (tmp_path / "gone").unlink()

    with pytest.raises(DiskError, match=r"a\.zarr cannot be written: no space left"), writing(tmp_path / "a.zarr"):
        write()


def test_what_another_thread_still_writes_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zarr's threads go on after one of them failed."""
    late = iter(range(2))

    def write_late(seconds: float) -> None:
        for number in late:
            (partial / str(number)).mkdir(parents=True)
            return

    monkeypatch.setattr("store.removal.time.sleep", write_late)
    with pytest.raises(DiskError, match="no space left"), making(tmp_path / "a", Path.is_dir) as partial:  # noqa: PT012
        partial.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", full_disk.COMMANDS)
def test_every_command_on_a_disk_that_becomes_full(command: str) -> None:
    """At 20 sizes: one sentence, the last commit intact; with space again the outputs of an undisturbed run."""
    if full_disk.namespace() is None:
        pytest.skip("no file system can be mounted here")
    words = [sys.executable, "-m", "tests.full_disk", command, "--sizes", "20"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
