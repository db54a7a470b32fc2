"""The manifest over a folder with every kind of odd and broken file, and the pictures that come out of it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.augment import Augmentation
from train.data.datasets import build_manifest, prepare_folder
from train.data.decoding import UndecodableError
from train.data.digits import DigitScenes
from train.data.images import FolderImages, ImageSet, Preprocessing
from train.data.manifest import Manifest, split_counts, stratified_split
from train.errors import DamagedFileError, InputError

SMALL = Preprocessing(
    channels=3,
    height_px=16,
    width_px=16,
    mean=(0.5, 0.4, 0.3),
    std=(0.5, 0.5, 0.25),
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
)


def picture(value: int = 0, size: tuple[int, int] = (20, 24), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(value)
    return Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def class_folders(root: Path, classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            (root / name / f"{index}.png").write_bytes(encoded(picture(100 * k + index), "PNG"))
    return root


def odd_files() -> dict[str, tuple[bytes, str]]:
    """Name → (content, status)."""
    jpeg = encoded(picture(1), "JPEG")
    frames = [picture(k, mode="P") for k in range(3)]
    return {
        "bmp inside.jpg": (encoded(picture(2), "BMP"), "ok"),
        "gif.inside.jpg": (encoded(picture(3, mode="P"), "GIF"), "ok"),
        "png_inside.jpg": (encoded(picture(4), "PNG"), "ok"),
        "UPPER.JPG": (encoded(picture(5), "JPEG"), "ok"),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), "ok"),
        "cmyk.jpg": (encoded(picture(6, mode="CMYK"), "JPEG"), "ok"),
        "grey.jpg": (encoded(picture(7, mode="L"), "JPEG"), "ok"),
        "deep.png": (encoded(Image.fromarray(np.full((9, 9), 51400, dtype=np.uint16)), "PNG"), "ok"),
        "palette.png": (encoded(picture(8, mode="P"), "PNG"), "ok"),
        "empty.jpg": (b"", "empty file"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "half.png": (encoded(picture(9), "PNG")[:900], "truncated"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "a web page, which is not opened"),
        "notes.txt": (b"hello", "not an image of a known format"),
        "._real.jpg": (jpeg, "hidden (._) file"),
        ".DS_Store": (b"\0\0\0\1Bud1", "hidden file"),
    }


def test_every_odd_file_gets_its_status_and_none_is_substituted(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    files = odd_files()
    for name, (content, _) in files.items():
        (root / "dog" / name).write_bytes(content)
    manifest = build_manifest(root, split="all")
    found = {record.id: record.status for record in manifest.records}
    assert {name: found[f"dog/{name}"] for name in files} == {name: status for name, (_, status) in files.items()}
    assert manifest.class_names == ("cat", "dog")
    sound = [name for name, (_, status) in files.items() if status == "ok"]
    assert len(manifest.split("test")) == 20 + len(sound)
    assert sum(manifest.dropped.values()) == len(files) - len(sound)

    data = prepare_folder(manifest, preprocessing=SMALL)
    pixels = data.test.pixels(range(len(data.test)))
    assert pixels.shape == (20 + len(sound), 3, 16, 16)
    deep = data.test.picture(data.test.ids.index("dog/deep.png"))
    np.testing.assert_array_equal(deep, np.full((16, 16, 3), 200))  # 51400 / 257


def test_pictures_are_timms_own_evaluation_transform(tmp_path: Path) -> None:
    from timm.data.transforms_factory import create_transform

    data = prepare_folder(build_manifest(class_folders(tmp_path / "data"), split="all"), preprocessing=SMALL).test
    transform = create_transform(
        (3, 16, 16), interpolation="bicubic", mean=SMALL.mean, std=SMALL.std, crop_pct=1.0, is_training=False
    )
    expected = transform(Image.open(tmp_path / "data" / data.ids[3]))
    np.testing.assert_allclose(data.batch([3])[0].numpy(), expected.numpy(), atol=1e-6)
    assert data.picture(3).shape == (16, 16, 3)
    from kernels.layout import TokenLayout

    layout = TokenLayout(grid_rows=2, grid_cols=2, num_prefix_tokens=0, patch_height_px=8, patch_width_px=8)
    assert data.regions(layout) is None
    assert data.region_names == ()


def test_a_file_that_changed_or_vanished_is_named(tmp_path: Path) -> None:
    data = prepare_folder(build_manifest(class_folders(tmp_path / "data"), split="all"), preprocessing=SMALL).test
    (tmp_path / "data" / data.ids[0]).write_bytes(encoded(picture(999), "PNG"))
    with pytest.raises(InputError, match=r"cat/0\.png has changed"):
        data.batch([0, 1])
    (tmp_path / "data" / data.ids[1]).unlink()
    with pytest.raises(InputError, match=r"cat/1\.png was readable"):
        data.batch([1])


def test_a_file_that_can_no_longer_be_decoded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another version of Pillow, or of this program."""
    data = prepare_folder(build_manifest(class_folders(tmp_path / "data"), split="all"), preprocessing=SMALL).test

    def refuse(content: bytes) -> None:
        raise UndecodableError("damaged (some way)")

    monkeypatch.setattr("train.data.images.decoded_image", refuse)
    with pytest.raises(InputError, match=r"cat/0\.png was decoded .* no longer is \(damaged \(some way\)\); delete"):
        data.batch([0])


def test_grey_models_get_one_channel(tmp_path: Path) -> None:
    grey = Preprocessing(**{**SMALL.to_dict(), "channels": 1, "mean": (0.5,), "std": (0.5,)})
    manifest = build_manifest(class_folders(tmp_path / "data"), split="all")
    images = FolderImages(manifest.root, manifest.split("test"), manifest.class_names, grey)
    assert images.batch([0, 1]).shape == (2, 1, 16, 16)
    assert images.picture(0).shape == (16, 16, 3)


def way(mode: str, size: tuple[int, int] = (16, 16), crop_pct: float = 0.9) -> Preprocessing:
    """How pictures become grey input of (height, width)."""
    values = SMALL.to_dict() | {"channels": 1, "mean": (0.5,), "std": (0.5,), "interpolation": "bicubic"}
    values |= {"height_px": size[0], "width_px": size[1], "crop_mode": mode, "crop_pct": crop_pct}
    return Preprocessing(**values)


def one_image(root: Path, image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """[row, col] of a folder's only picture."""
    (root / "cat").mkdir(parents=True, exist_ok=True)
    (root / "cat" / "0.png").write_bytes(encoded(image, "PNG"))
    return prepare_folder(build_manifest(root, split="all"), preprocessing=preprocessing).test.pixels([0])[0, 0].numpy()


@pytest.mark.parametrize("tall", [False, True])
def test_pictures_one_pixel_thin_take_little_memory_and_show_what_they_hold(tall: bool, tmp_path: Path) -> None:
    """Thirds of 0, 100 and 200: the middle is kept, all of it is squashed, or it is a line between borders."""
    values = np.repeat(np.array([0, 100, 200], dtype=np.uint8), 20_000)[None]
    line = Image.fromarray(values.T if tall else values)

    def read(mode: str, size: tuple[int, int] = (16, 16)) -> np.ndarray:
        found = one_image(tmp_path, line, way(mode, size[::-1] if tall else size))
        return found.T if tall else found

    assert (read("center") == 100).all()
    assert (read("center", (8, 32)) == 100).all()
    squashed = read("squash")
    assert set(squashed[0]) >= {0, 100, 200}
    assert (squashed == squashed[0]).all()
    bordered = read("border")
    lines = np.flatnonzero((bordered != 128).any(axis=1))
    assert len(lines) == 1
    np.testing.assert_array_equal(bordered[lines[0]], squashed[0])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(600, 1), (1, 600), (700, 2), (2, 700), (90, 60), (64, 64)])
def test_a_picture_made_shorter_first_gives_the_pixels_of_a_whole_one(
    mode: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8))
    whole = one_image(tmp_path, noise, way(mode, (32, 32)))
    monkeypatch.setattr("train.data.images._RESIZED_PIXELS", 1)
    short = one_image(tmp_path, noise, way(mode, (32, 32)))
    assert np.abs(short.astype(int) - whole).max() <= 4  # squash: the two passes round in another order


def roads(root: Path, cache: Path, preprocessing: Preprocessing) -> dict[str, ImageSet]:
    """The same pictures from everywhere that they are read from."""
    manifest = build_manifest(root, split="all")
    records, names = manifest.split("test"), manifest.class_names

    def cached() -> ImageSet:
        return prepare_folder(manifest, preprocessing=preprocessing, cache=cache).test

    return {
        "one thread": FolderImages(root, records, names, preprocessing, workers=1),
        "three threads": FolderImages(root, records, names, preprocessing, workers=3),
        "cache, built here": cached(),
        "cache, opened": cached(),
    }


def is_in_order(images: torch.Tensor) -> bool:
    """Whether [image, channel, row, col] lies in that order, down to the strides of axes of length 1."""
    _, channels, rows, cols = images.shape
    return images.stride() == (channels * rows * cols, rows * cols, cols, 1)


@pytest.mark.parametrize("channels", [3, 1])
def test_pixels_lie_in_one_order_wherever_they_come_from(tmp_path: Path, channels: int) -> None:
    """Equal pixels in two layouts are rounded in two ways by convolutions and sums, on some CPUs and not on others."""
    preprocessing = replace(SMALL, channels=channels, height_px=12, mean=(0.5,) * channels, std=(0.25,) * channels)
    sets = roads(class_folders(tmp_path / "data", count=4), tmp_path / "cache", preprocessing)
    if channels == 1:
        of_scenes = replace(preprocessing, height_px=48, width_px=48)
        sets["scenes"] = DigitScenes(task="target", split="test", count=8, seed=1, preprocessing=of_scenes)
    augment = Augmentation(flip=True, rotation_degrees=10, color_jitter=0.2)
    for name, images in sets.items():
        for rows in ([0], [5, 1, 1], np.arange(8), range(2, 4)):
            pixels = images.pixels(rows)
            assert pixels.dtype == torch.uint8
            assert is_in_order(pixels), (name, rows)
            assert is_in_order(images.batch(rows)), (name, rows)
            if name != "scenes":
                assert torch.equal(pixels, sets["one thread"].pixels(range(8))[list(rows)])
            for part in (slice(None), slice(0, 1), slice(-2, None)):  # as a batch is divided into passes
                scaled = pixels[part].float().div_(255)
                for augmentation in (Augmentation(), Augmentation(flip=True), augment):
                    augmented = augmentation.apply(scaled, seed=1, epoch=0, indices=rows[part])
                    assert is_in_order(images.preprocessing.normalize(augmented)), (name, rows, augmentation)
        assert all(is_in_order(batch) for _, batch in images.batches([np.arange(3), np.arange(1)]))


def test_manifest_round_trip_and_hash(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    manifest = build_manifest(root)
    manifest.save(tmp_path / "manifest.json")
    again = Manifest.load(tmp_path / "manifest.json")
    assert again == manifest
    assert again.sha256 == manifest.sha256 == build_manifest(root).sha256

    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert build_manifest(moved).sha256 == manifest.sha256
    assert build_manifest(moved, seed=1).sha256 != manifest.sha256
    (moved / "cat" / "0.png").write_bytes(encoded(picture(999), "PNG"))
    assert build_manifest(moved).sha256 != manifest.sha256

    document = json.loads((tmp_path / "manifest.json").read_text())
    document["records"][0]["label"] = 1
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DamagedFileError, match="changed after it was written"):
        Manifest.load(tmp_path / "manifest.json")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DamagedFileError, match="is not readable JSON"):
        Manifest.load(tmp_path / "manifest.json")


def test_stratified_split_is_disjoint_complete_and_by_class(tmp_path: Path) -> None:
    classes = {"a": [f"a/{k}" for k in range(100)], "b": [f"b/{k}" for k in range(3)]}
    assigned = stratified_split(classes, seed=42)
    assert set(assigned) == {*classes["a"], *classes["b"]}
    count = {split: sum(assigned[i] == split for i in classes["a"]) for split in ("train", "validation", "test")}
    assert count == {"train": 70, "validation": 15, "test": 15}
    assert sorted(assigned[i] for i in classes["b"]) == ["test", "train", "validation"]
    # Another class beside it changes nothing for a class, and neither does the order of its members.
    alone = stratified_split({"a": classes["a"][::-1]}, seed=42)
    assert alone == {i: assigned[i] for i in classes["a"]}
    assert stratified_split(classes, seed=43) != assigned
    assert split_counts(7, 0.15, 0.15) == (5, 1, 1)
    with pytest.raises(InputError, match="class 'b' has 2 image"):
        stratified_split({"b": classes["b"][:2]}, seed=42)


def test_split_by_folders(tmp_path: Path) -> None:
    for k, name in enumerate(("train", "valid", "test")):
        class_folders(tmp_path / "data" / name, count=4 - k)
    manifest = build_manifest(tmp_path / "data", split="folders")
    assert [len(manifest.split(name)) for name in ("train", "validation", "test")] == [8, 6, 4]
    assert manifest.split("validation")[0].id == "valid/cat/0.png"
    # The same pictures were written into all three: that is said, and where.
    assert ("test/cat/0.png", "train/cat/0.png", "valid/cat/0.png") in manifest.leaks()
    (tmp_path / "data" / "val").mkdir()
    with pytest.raises(InputError, match="val and valid, which are both the validation split"):
        build_manifest(tmp_path / "data", split="folders")
    class_folders(tmp_path / "flat")
    with pytest.raises(InputError, match="holds none of train, val"):
        build_manifest(tmp_path / "flat", split="folders")


def test_bad_folders_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root is empty"):
        build_manifest("")
    with pytest.raises(InputError, match="nowhere does not exist"):
        build_manifest(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"is a file; give the folder with --data\.root DIR; expected class folders"):
        build_manifest(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty; expected class folders"):
        build_manifest(tmp_path / "empty")
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="no file in them"):
        build_manifest(tmp_path / "hollow")
    (tmp_path / "hollow" / "cat" / "x.jpg").write_text("<html>")
    with pytest.raises(InputError, match=r"no readable image among 1 file\(s\) \(1 a web page, which is not opened\)"):
        build_manifest(tmp_path / "hollow")
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "1.png").write_bytes(encoded(picture(), "PNG"))
    with pytest.raises(InputError, match="but no class folders; expected class folders with images"):
        build_manifest(tmp_path / "loose")
    class_folders(tmp_path / "one", classes=("cat",), count=1)
    with pytest.raises(InputError, match="class 'cat' has 1 image"):
        build_manifest(tmp_path / "one")
    assert len(build_manifest(tmp_path / "one", split="all").split("test")) == 1


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data")
    (root / "cat" / "again.png").symlink_to(root / "cat" / "0.png")
    assert build_manifest(root, split="all").dropped == {}
    (tmp_path / "secret.png").write_bytes(encoded(picture(), "PNG"))
    (root / "cat" / "out.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"out\.png is a link to .*secret\.png, outside the folder"):
        build_manifest(root)
    (root / "cat" / "out.png").unlink()
    (tmp_path / "bird").mkdir()
    (root / "bird").symlink_to(tmp_path / "bird")
    with pytest.raises(InputError, match="outside the folder"):
        build_manifest(root)
