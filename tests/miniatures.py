"""Miniatures of MIT Indoor-67 and of 100 Sports: their folder layout, list format, and every kind of file met there."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOMS = ("airport_inside", "bar", "church_inside")
SPORTS = ("air hockey", "giant slalom", "wheelchair basketball")


def picture(label: int, number: int, size: int = 48) -> Image.Image:
    """A seeded texture whose mean brightness tells its class."""
    generator = np.random.default_rng([label, number])
    coarse = generator.integers(0, 100, (6, 6, 3)) + 60 * label
    return Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((size, size + 8), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _numbers() -> Iterator[int]:
    number = 1000
    while True:
        yield number
        number += 1


def odd_files(label: int) -> dict[str, bytes]:
    """Sound pictures under odd names or of odd kinds: all must be used."""
    new = (picture(label, number) for number in _numbers())
    frames = [next(new).convert("P") for _ in range(3)]
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = np.asarray(next(new).convert("L")).astype(np.uint16) * 257
    return {
        "name with spaces.jpg": encoded(next(new)),
        "with.extra.dots.jpg": encoded(next(new)),
        "UPPER_case.JPG": encoded(next(new)),
        "picture_bmp.jpg": encoded(next(new), "BMP"),
        "picture_gif.jpg": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "picture_png.jpg": encoded(next(new), "PNG"),
        "grey.jpg": encoded(next(new).convert("L")),
        "cmyk.jpg": encoded(next(new).convert("CMYK")),
        "sixteen_bit.jpg": encoded(Image.fromarray(deep), "PNG"),
        "turned.jpg": encoded(next(new), exif=turned),
    }


def bad_files(label: int) -> dict[str, tuple[bytes, str]]:
    """No pictures: name → (content, the status that the manifest must give)."""
    whole = encoded(picture(label, 2000))
    return {
        "cut short.jpg": (whole[: len(whole) // 2], "truncated"),
        "empty.jpg": (b"", "empty file"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404 not found</body></html>", "a web page, which is not opened"),
        "159.lnk": (b"L\0\0\0\x01\x14\x02\0", "not an image of a known format"),
        "._0001.jpg": (b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ", "hidden (._) file"),
    }


def write_indoor67(root: Path, train: int = 10, test: int = 4, unlisted: int = 3) -> dict[str, str]:
    """Images/<class>/<name>.jpg with TrainImages.txt and TestImages.txt beside it; the status of every bad file by id.

    Odd and bad files lie in the second class; in the lists, some of them are named for training and some for testing.
    Like the real lists these name only a part of the images and end without a newline.
    """
    listed: dict[str, list[str]] = {"TrainImages.txt": [], "TestImages.txt": []}
    for label, room in enumerate(ROOMS):
        folder = root / "Images" / room
        folder.mkdir(parents=True)
        for number in range(train + test + unlisted):
            name = f"{room}_{number:04d}.jpg"
            (folder / name).write_bytes(encoded(picture(label, number)))
            if number < train + test:
                listed["TrainImages.txt" if number < train else "TestImages.txt"].append(f"{room}/{name}")
    odd, bad = odd_files(1), bad_files(1)
    folder = root / "Images" / ROOMS[1]
    for position, (name, content) in enumerate(
        [*odd.items(), *((name, content) for name, (content, _) in bad.items())]
    ):
        (folder / name).write_bytes(content)
        listed["TestImages.txt" if position % 4 == 3 else "TrainImages.txt"].append(f"{ROOMS[1]}/{name}")
    for name, lines in listed.items():
        (root / name).write_bytes("\n".join(lines).encode())
    return {f"{ROOMS[1]}/{name}": status for name, (_, status) in bad.items()}


def write_sports100(root: Path, train: int = 10, held_out: int = 5) -> dict[str, str]:
    """train|valid|test/<class with spaces>/NNN.jpg and sports.csv; the status of every bad file by id.

    Odd and bad files lie in the second class's training folder; like the real table, sports.csv names files that are
    not there.
    """
    rows = ["class id,filepaths,labels,data set"]
    for split, count in (("train", train), ("valid", held_out), ("test", held_out)):
        for label, sport in enumerate(SPORTS):
            folder = root / split / sport
            folder.mkdir(parents=True)
            for number in range(count):
                name = f"{number + 1:03d}.jpg"
                seed = number + {"train": 0, "valid": 300, "test": 600}[split]
                (folder / name).write_bytes(encoded(picture(label, seed)))
                rows.append(f"{label},{split}/{sport}/{name},{sport},{split}")
    rows.append(f"0,train/{SPORTS[0]}/999.jpg,{SPORTS[0]},train")
    (root / "sports.csv").write_text("\n".join(rows), encoding="utf-8")
    (root / "model.h5").write_bytes(b"\x89HDF")
    folder = root / "train" / SPORTS[1]
    for name, content in odd_files(1).items():
        (folder / name).write_bytes(content)
    bad = bad_files(1)
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    return {f"train/{SPORTS[1]}/{name}": status for name, (_, status) in bad.items()}
