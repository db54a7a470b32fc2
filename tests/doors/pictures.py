"""Picture files of every format that Pillow writes or opens, changed, under right and wrong names, on the road of a
folder: examined, made into a manifest, and read as a model's input."""

from __future__ import annotations

import functools
import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from tests import fuzz
from train.data.datasets import build_manifest
from train.data.images import FolderImages, Preprocessing
from train.data.listing import Entry, examine
from train.data.manifest import Record

SHARE = 150

_SUFFIXES = (".jpg", ".png", ".gif", ".tif", ".webp", ".bmp", ".ppm", ".tga", ".eps", ".JPEG", "")
_WAYS = [
    Preprocessing(
        channels=channels,
        height_px=height,
        width_px=width,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=mode,
    )
    for channels, height, width, interpolation, crop_pct, mode in (
        (3, 32, 32, "bicubic", 0.9, "center"),
        (3, 16, 48, "bilinear", 1.0, "center"),
        (1, 32, 32, "bicubic", 1.0, "squash"),
        (3, 48, 32, "bicubic", 0.95, "border"),
    )
]


def trials(folder: Path, count: int, seed: int) -> Iterator[fuzz.Trial]:
    """Single files and, one time in eight, whole folders; a `gs` in the path says whether a drawing was opened."""
    started = folder / "gs was started"
    program = folder / "programs" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{started}'\n")
    program.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{program.parent}:{path}"
    try:
        for number in range(count):
            random = fuzz.random_of(seed, number)
            way = _WAYS[int(random.integers(len(_WAYS)))]
            base = folder / str(number)
            if number % 8 == 0:
                chosen = [_changed(random) for _ in range(6)]
                for name in ("cat", "dog"):
                    (base / name).mkdir(parents=True)
                    (base / name / "sound.png").write_bytes(_sound()["PNG RGB"])
                for place, (_, content) in enumerate(chosen):
                    (base / "cat" / f"{place}{_suffix(random)}").write_bytes(content)
                names = ", ".join(name for name, _ in chosen)
                yield fuzz.Trial(f"folder of {names}", functools.partial(_read_folder, base, way, started))
            else:
                name, content = _changed(random)
                base.mkdir()
                file = base / f"picture{_suffix(random)}"
                file.write_bytes(content)
                yield fuzz.Trial(name, functools.partial(_read_file, file, way, started))
    finally:
        os.environ["PATH"] = path


def _read_file(path: Path, way: Preprocessing, started: Path) -> None:
    (status,) = examine([Entry(path, path.name, "cat", "test")], workers=1)
    _check_reason(status.text)
    if status.text == "ok":
        _check_pixels(
            FolderImages(path.parent, [Record(path.name, 0, "cat", "test", "ok", status.sha256)], ["cat"], way)
        )
    _check_no_program(started)


def _read_folder(root: Path, way: Preprocessing, started: Path) -> None:
    manifest = build_manifest(root, split="all", workers=2)
    assert len(manifest.records) == 8
    for record in manifest.records:
        _check_reason(record.status)
    _check_pixels(FolderImages(root, manifest.split("test"), manifest.class_names, way, workers=2))
    _check_no_program(started)


def _check_no_program(started: Path) -> None:
    if started.exists():
        started.unlink()
        raise AssertionError("a drawing was opened by another program")


def _check_reason(text: str) -> None:
    assert text.isprintable(), text
    assert 0 < len(text) < 150, text


def _check_pixels(images: FolderImages) -> None:
    way = images.preprocessing
    pixels = images.pixels(range(len(images)))
    assert tuple(pixels.shape) == (len(images), way.channels, way.height_px, way.width_px)
    assert str(pixels.dtype) == "torch.uint8"


def _suffix(random: np.random.Generator) -> str:
    return _SUFFIXES[int(random.integers(len(_SUFFIXES)))]


def _changed(random: np.random.Generator) -> tuple[str, bytes]:
    """(what it is, bytes) of a sound file, a changed one, or one that is no picture at all."""
    kinds = list(_sound())
    kind = kinds[int(random.integers(len(kinds)))]
    content = _sound()[kind]
    if random.random() < 0.1:
        return f"sound {kind}", content
    if random.random() < 0.1:
        size = struct.pack(">II", *(int(2 ** random.uniform(0, 18)) for _ in range(2)))
        return "PNG of any size", _png_of(size)
    return f"changed {kind}", fuzz.changed(content, random, tuple(_sound().values()))


@functools.cache
def _sound() -> dict[str, bytes]:
    """Every format that Pillow writes, in every mode in which it does, and beginnings of those that it only opens."""
    Image.init()
    row, col = np.mgrid[:20, :28]
    colors = Image.fromarray(np.stack([9 * col, 12 * row, 5 * (row + col)], -1).astype(np.uint8))
    deep = Image.fromarray((row * 3276 + col).astype(np.uint16))
    pictures = {mode: colors.convert(mode) for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "YCbCr", "I", "F")}
    files = {}
    for kind in sorted(Image.SAVE):
        for mode, picture in {**pictures, "I;16": deep}.items():
            if content := _written(picture, kind):
                files[f"{kind} {mode}"] = content
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "Maker", 72.0
    exif.get_ifd(0x8769)[0x829A] = 0.01
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"):
        files[f"{kind} with metadata"] = _written(colors, kind, exif=exif, icc_profile=icc)
    for kind in ("GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"):
        files[f"{kind} of frames"] = _written(colors, kind, save_all=True, append_images=[colors.rotate(90), colors])
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"):
        picture = pictures["1"] if compression == "group4" else colors
        files[f"TIFF {compression}"] = _written(picture, "TIFF", compression=compression)
    files["JPEG progressive"] = _written(colors, "JPEG", progressive=True)
    files["TGA compressed"] = _written(colors, "TGA", compression="tga_rle")
    files["PPM plain"] = b"P3 2 2 255 " + b"255 0 0 " * 4
    files["PGM of 12 bits"] = b"P5 4 2 4095\n" + bytes(range(16))
    files["SUN"] = struct.pack(">8I", 0x59A66A95, 28, 20, 24, 1680, 1, 0, 0) + colors.tobytes()
    files["PNG 60000×1"] = _png_of(struct.pack(">II", 60000, 1))
    for name, start in _BEGINNINGS.items():
        files[name] = start + colors.tobytes()
    return files


def _written(picture: Image.Image, kind: str, **options: object) -> bytes:
    """What Pillow writes; nothing where it has no way to."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Pillow will not write some of them for ever
            picture.save(file, kind, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return b""
    return file.getvalue()


def _png_of(size: bytes) -> bytes:
    """A grey PNG of (width, height) that says nothing of its pixels but the first ones."""
    chunks = ((b"IHDR", size + b"\x08\0\0\0\0"), (b"IDAT", zlib.compress(bytes(2**18))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


_BEGINNINGS = {
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 20, 28, 8, 3) + bytes(14),
    "CUR": b"\0\0\2\0\1\0\x10\x10\0\0\0\0\0\0\x68\x04\0\0\x16\0\0\0",
    "ICO": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0\x68\x04\0\0\x16\0\0\0",
    "DCX": b"\xb1\x68\xde\x3a" + struct.pack("<II", 12, 0),
    "FITS": b"".join(card.ljust(80) for card in (b"SIMPLE  =                    T", b"BITPIX  =  8", b"END")),
    "FLI": struct.pack("<IHHHHHHI", 2000, 0xAF12, 1, 28, 20, 8, 3, 10) + bytes(108),
    "FTEX": b"FTU2" + struct.pack("<8i", 2, 28, 20, 1, 1, 1, 0, 64),
    "GBR": struct.pack(">7I", 28, 2, 28, 20, 3, 0x47494D50, 10),
    "IPTC": b"\x1c\x03\x3c\0\2\3\1",
    "MCIDAS": bytes(7) + b"\4" + bytes(248),
    "MPEG": b"\0\0\1\xb3\1\xc0\x14",
    "PCD": bytes(2048) + b"PCD_" + bytes(2048),
    "PIXAR": b"\x80\xe8\0\0" + bytes(1020),
    "XPM": b'/* XPM */\nstatic char *a[] = {\n"2 2 2 1",\n"a c #000000",\n"b c #ffffff",\n"ab",\n"ba"};\n',
    "XVTHUMB": b"P7 332\n#XVVERSION\n#END_OF_COMMENTS\n28 20 255\n",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 20\n%%EndComments\nshowpage\n%%EOF\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(18) + b"\1\0\t\0" + bytes(14),
    "HEIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "MP4": b"\0\0\0\x18ftypisom\0\0\0\0isomiso2",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="28" height="20"></svg>',
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "ZIP": b"PK\3\4\x14\0\0\0\0\0",
    "noise": b"\x93\x11\x71\x05",
}
