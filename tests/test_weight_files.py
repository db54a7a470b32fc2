"""Files that are no weights are called what they are, and nothing in them runs."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.test_train_layouts import TINY, State, refused, saved
from train.checkpoint import state_digest
from train.models import build_model, load_checkpoint
from train.weight_files import say_once

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 21000000\n"
INDEX = b'{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}'


def archive(*names: str) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return written.getvalue()


FILES: dict[str, tuple[bytes, str]] = {
    "lfs.pth": (POINTER, r"is a Git LFS pointer, .*git lfs pull$"),
    "lfs.safetensors": (POINTER, "is a Git LFS pointer"),
    "page.pth": (b"\n<!DOCTYPE html><html><head><title>Quota exceeded</title>", "is a web page: its download"),
    "denied.pth": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is XML, such as servers answer"),
    "index.json": (INDEX, "is the index of a checkpoint in several files, .*save it as one file"),
    "config.json": (b'{"architectures": []}', "is JSON text; expected safetensors"),
    "empty.safetensors": (b"", "is empty; copy or download it again"),
    "keras.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "is HDF5, as Keras"),
    "packed.pth.gz": (b"\x1f\x8b\x08" + bytes(99), "is compressed with gzip; unpack it first"),
    "packed.tar": (bytes(257) + b"ustar" + bytes(300), "is a tar archive; unpack it"),
    "jax.npz": (archive("a/kernel.npy", "b.npy"), "is a NumPy archive, .*timm.create_model"),
    "other.zip": (archive("readme.txt"), r"is a zip archive that torch.save did not write \(it holds readme.txt\)"),
    "none.zip": (archive(), "is a zip archive that|is not a checkpoint file"),
    "script.pt": (archive("a/data.pkl", "a/constants.pkl", "a/code/a.py"), "is TorchScript, .*torch.jit.load"),
    "other.pkl": (b"\x80\x04\x95abc", "is a pickle that torch.save did not write"),
    "model.onnx": (b"\x08\x07\x12\x07pytorch", "is ONNX"),
    "flax.msgpack": (b"\xde\x00\x01", "is Flax's msgpack"),
    "short.safetensors": (b"\x40\x00\x00\x00\x00\x00\x00\x00{", "is cut short or damaged"),
    "noise": (b"\x01\x02\x03", "is not a checkpoint file"),
}


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return dict(build_model(TINY, num_classes=3).state_dict())


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    caplog.set_level("INFO", logger="train")


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(tmp_path / name))


def test_a_small_file_that_unpacks_to_a_large_one_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\x80\x02}.")
        file.writestr("a/data/0", bytes(1 << 20))
    assert "unpacks to 1048580 bytes, more than weights can" in refused(tmp_path / "a.pth")


def test_real_torchscript_is_called_that(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "a.pt")
    assert "is TorchScript" in refused(tmp_path / "a.pt")


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a named pipe" in refused(tmp_path / "pipe.pth")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert re.search(r"is a folder; give the file .*model\.safetensors", refused(tmp_path))
    assert "cannot be read (File name too long)" in refused(tmp_path / ("a" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", state)
    path.chmod(0)
    assert "cannot be read (Permission denied)" in refused(path)


def test_numbers_and_settings_beside_the_weights_harm_nobody(tmp_path: Path, state: State) -> None:
    beside = {
        "accuracy": np.float64(0.9),
        "epoch": np.int64(3),
        "mean": np.array([0.5, 0.25]),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("/a")),
        "nested": [{"a": np.float32(1)}, np.random.default_rng(0).integers(0, 9, 3)],
    }
    for zipped in (True, False):
        torch.save({"state_dict": state, **beside}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        assert state_digest(load_checkpoint(TINY, tmp_path / "a.pth").state_dict()) == state_digest(state)


class Settings:
    """A class of somebody's own code."""


def test_a_refused_class_is_named(tmp_path: Path, state: State) -> None:
    said = refused(saved(tmp_path / "a.pth", {"state_dict": state, "config": Settings()}))
    assert re.search(r"holds pickled objects \(of \S*test_weight_\S*Settings\) beside tensors", said)
    assert "holds the state of an optimizer and no weights" in refused(
        saved(tmp_path / "a.pth", torch.optim.Adam([torch.nn.Parameter(torch.ones(1))]).state_dict())
    )


def test_dicts_without_end_and_very_deep_ones_end(tmp_path: Path, state: State) -> None:
    itself: dict[str, Any] = {"epoch": 3}
    itself["model"] = itself
    assert "holds no state dict" in refused(saved(tmp_path / "a.pth", itself))
    itself["state_dict"] = state
    assert state_digest(load_checkpoint(TINY, saved(tmp_path / "a.pth", itself)).state_dict()) == state_digest(state)
    deep: dict[str, Any] = {"epoch": 3}
    for _ in range(100):
        deep = {"model": deep, "state_dict": deep}
    assert "holds no state dict" in refused(saved(tmp_path / "a.pth", deep))


def test_a_tensor_of_more_values_than_the_file_holds_is_refused(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {**state, "more": torch.zeros(1).expand(10**13)})
    assert "more stands for 10000000000000 values, more than the file of" in refused(path)


def test_names_that_a_terminal_would_act_on_are_shown_as_text(tmp_path: Path, state: State) -> None:
    for name in ("a\x1b[2J\nb", "b" * 5000):
        path = tmp_path / "a.safetensors"
        save_file({**state, name: torch.zeros(2)}, path)
        said = refused(path)
        assert said.isprintable()
        assert len(said) < 1000


def test_one_part_of_a_checkpoint_in_several_is_called_that(tmp_path: Path, state: State) -> None:
    half = dict(list(state.items())[:10])
    assert "is one part of a checkpoint in several" in refused(saved(tmp_path / "model-00001-of-00002.bin", half))
