"""A folder of photographs, cut from pictures that ship with dependencies, and files that are no pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def sources() -> dict[str, Image.Image]:
    """scikit-learn's two sample photographs and matplotlib's portrait."""
    samples = load_sample_images()
    names = [Path(name).stem for name in samples.filenames]
    pictures = {name: Image.fromarray(pixels) for name, pixels in zip(names, samples.images, strict=True)}
    portrait = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return pictures | {"portrait": Image.open(portrait).convert("RGB")}


def write_photographs(root: Path, per_class: int = 6, size: int = 160) -> int:
    """`root/<class>/<n>.jpg`: crops at seeded places; returns how many."""
    generator = np.random.default_rng(0)
    for name, picture in sources().items():
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            left = int(generator.integers(picture.width - size))
            top = int(generator.integers(picture.height - size))
            picture.crop((left, top, left + size, top + size)).save(folder / f"{number}.jpg", quality=90)
    return per_class * len(sources())


BROKEN = {
    "china/empty.jpg": b"",
    "china/page.jpg": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "flower/._0.jpg": b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ",
}


def write_broken(root: Path) -> list[str]:
    """Files that are no pictures, among the pictures; returns their ids."""
    for name, content in BROKEN.items():
        (root / name).write_bytes(content)
    whole = (root / "flower" / "1.jpg").read_bytes()
    (root / "flower" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return [*BROKEN, "flower/cut.jpg"]
