"""The decoded image cache: the same pixels, made once, shared by content, and sound or said not to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import train.data.cache
from store import DiskError
from tests.miniatures import write_sports100
from train.data.datasets import build_manifest, prepare_folder
from train.data.images import DataSplits, FolderImages, Preprocessing
from train.errors import InputError

SMALL = Preprocessing(
    channels=3,
    height_px=24,
    width_px=16,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    interpolation="bicubic",
    crop_pct=0.9,
    crop_mode="center",
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sports100(tmp_path / "sports", train=6, held_out=3)
    return tmp_path / "sports"


def prepared(root: Path, cache: Path | None, preprocessing: Preprocessing = SMALL) -> DataSplits:
    return prepare_folder(build_manifest(root, kind="sports100"), preprocessing=preprocessing, cache=cache)


def pixels(data: DataSplits) -> list[np.ndarray]:
    return [images.pixels(range(len(images))).numpy() for images in (data.train, data.validation, data.test)]


def test_cached_pictures_are_the_decoded_ones(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    expected = pixels(prepared(root, None))
    for found, decoded in zip(pixels(prepared(root, cache)), expected, strict=True):
        np.testing.assert_array_equal(found, decoded)
    assert sorted(file.suffix for file in cache.iterdir() if not file.name.startswith(".")) == [".json", ".npy"]

    def no_decoding(*arguments: object) -> None:
        raise AssertionError("decoded twice")

    monkeypatch.setattr(FolderImages, "_read", no_decoding)
    again = prepared(root, cache)
    for found, decoded in zip(pixels(again), expected, strict=True):
        np.testing.assert_array_equal(found, decoded)
    order = np.array([3, 0, 3])
    np.testing.assert_array_equal(again.train.pixels(order).numpy(), expected[0][order])


def test_a_flipped_bit_anywhere_in_the_header_changes_no_pixel(root: Path, tmp_path: Path) -> None:
    expected = pixels(prepared(root, tmp_path / "cache"))
    (path,) = (tmp_path / "cache").glob("*.npy")
    content = path.read_bytes()
    for position in (*range(12), 60, 74, 77, 91, 127):
        damaged = bytearray(content)
        damaged[position] ^= 8
        path.write_bytes(damaged)
        for found, decoded in zip(pixels(prepared(root, tmp_path / "cache")), expected, strict=True):
            np.testing.assert_array_equal(found, decoded)


def test_the_key_is_content_and_transform(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def files() -> int:
        return len(list(cache.glob("*.npy")))

    pixels(prepared(root, cache))
    root.rename(tmp_path / "moved")
    pixels(prepared(tmp_path / "moved", cache))
    drawn = build_manifest(tmp_path / "moved", kind="sports100", split="stratified")
    pixels(prepare_folder(drawn, preprocessing=SMALL, cache=cache))
    assert files() == 1, "neither the place nor the split matters"
    other_mean = Preprocessing(**{**SMALL.to_dict(), "mean": (0.1, 0.1, 0.1)})
    pixels(prepared(tmp_path / "moved", cache, other_mean))
    assert files() == 1, "normalisation comes later"
    pixels(prepared(tmp_path / "moved", cache, Preprocessing(**{**SMALL.to_dict(), "interpolation": "bilinear"})))
    assert files() == 2
    picture = tmp_path / "moved" / "train" / "air hockey" / "001.jpg"
    shutil.copy(tmp_path / "moved" / "train" / "giant slalom" / "002.jpg", picture)
    pixels(prepared(tmp_path / "moved", cache))
    assert files() == 3


@pytest.mark.parametrize("where", [0, 1000, -1])
def test_a_flipped_bit_is_found_and_that_picture_alone_decoded_anew(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, where: int
) -> None:
    cache = tmp_path / "cache"
    expected = pixels(prepared(root, cache))
    path = next(cache.glob("*.npy"))
    sound = path.read_bytes()
    count = sum(map(len, expected))
    size = 3 * 24 * 16
    damaged = bytearray(sound)
    damaged[len(sound) - count * size + (where % (count * size))] ^= 4
    path.write_bytes(damaged)
    for found, right in zip(pixels(prepared(root, cache)), expected, strict=True):
        np.testing.assert_array_equal(found, right)
    assert caplog.text.count("is damaged and decoded again") == 1
    assert path.read_bytes() == sound


def test_damage_to_the_files_of_the_cache_is_said_and_mended(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    expected = pixels(prepared(root, cache))
    path = next(cache.glob("*.npy"))
    sidecar = path.with_suffix(".json")
    sound = path.read_bytes(), sidecar.read_bytes()

    def read_again(message: str) -> None:
        caplog.clear()
        for found, right in zip(pixels(prepared(root, cache)), expected, strict=True):
            np.testing.assert_array_equal(found, right)
        assert message in caplog.text
        assert (path.read_bytes(), sidecar.read_bytes()) == sound

    path.write_bytes(sound[0][:-100])
    read_again("it is made again")
    path.write_bytes(b"")
    read_again("it is made again")
    sidecar.write_text("{")
    read_again("it is made again")
    document = json.loads(sound[1])
    document["crc32"][2] ^= 1
    sidecar.write_text(json.dumps(document))
    read_again("is damaged and decoded again")
    sidecar.write_bytes(sound[1].replace(b"torchvision", b"torchvisiom"))
    read_again("it is made again")
    sidecar.unlink()  # a build that was killed before it was committed
    read_again("")


def test_a_disk_without_room_is_said_before_anything_is_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(train.data.cache.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(InputError, match=r"needs 0\.0 GB and .* left; give another folder with --data\.cache_folder"):
        pixels(prepared(root, tmp_path / "cache"))
    monkeypatch.undo()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.data.cache.os, "fsync", full)
    with pytest.raises(DiskError, match=r"\.npy cannot be written: no space left"):
        pixels(prepared(root, tmp_path / "cache"))
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_a_file_where_the_cache_would_be_is_said(root: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(InputError, match=r"taken \(File exists\); give another folder with --data\.cache_folder DIR"):
        pixels(prepared(root, tmp_path / "taken"))
