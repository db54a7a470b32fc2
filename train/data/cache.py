"""Decoded pictures on disk: every file is decoded and resized once, and read at the speed of memory after that.

<key>.npy     uint8 [picture, channel, row, col], in the order of the files' sha256
<key>.json    schema, what was decoded how, and a CRC-32 of every picture; written last, so it is the commit

The key is a hash of the files' contents and of the transform, so studies of the same pictures share a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from store.disk import making, writing
from store.system import lock_file, sync_folder
from train.data.images import FolderImages, ImageSet
from train.errors import InputError
from train.whole_files import write_atomically

logger = logging.getLogger(__name__)

SCHEMA = "vit-image-cache/2"
_BLOCK = 256  # pictures decoded between two writes
_ADVICE = "give another folder with --data.cache_folder DIR, or decode every time with --data.cache false"


class ImageCache:
    """The decoded pictures of a data set, made when they are first asked for, by one process while others wait."""

    def __init__(self, folder: str | Path, pictures: FolderImages) -> None:
        self.folder = Path(folder)
        # Files with the same bytes are one picture.
        first = {record.sha256: index for index, record in reversed(list(enumerate(pictures.records)))}
        self._sources = [first[sha256] for sha256 in sorted(first)]
        self._pictures = pictures
        self.rows = {sha256: row for row, sha256 in enumerate(sorted(first))}
        preprocessing = pictures.preprocessing
        self._shape = (len(first), preprocessing.channels, preprocessing.height_px, preprocessing.width_px)
        self._transform = _transform_of(pictures)
        content = json.dumps([SCHEMA, self._transform, sorted(first)], sort_keys=True)
        self.path = self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npy"

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Pictures, uint8 [image, channel, row, col]; each is checked when it is first read, decoded again if bad."""
        pixels, checksums, sound = self._opened
        for row in rows[~sound[rows]]:
            if not sound[row] and zlib.crc32(pixels[row]) != checksums[row]:
                self._repair(int(row))
            sound[row] = True
        return np.asarray(pixels[rows])

    @cached_property
    def _opened(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(pixels, CRC-32 per picture, whether it was checked in this process)."""
        with writing(self.path), self._locked():
            if (opened := self._open()) is None:
                self._build()
                opened = self._open()
        if opened is None:
            raise OSError(5, "the image cache cannot be read back after it was written", str(self.path))
        return *opened, np.zeros(len(opened[0]), dtype=bool)

    def _open(self) -> tuple[np.ndarray, np.ndarray] | None:
        sidecar = self.path.with_suffix(".json")
        if not self.path.is_file() or not sidecar.is_file():
            return None
        try:
            content = sidecar.read_bytes()
            checksums = np.array(json.loads(content)["crc32"], dtype=np.uint32)
            if content != self._sidecar(checksums.tolist()):
                raise ValueError(f"{sidecar.name} is not as it was written")
            pixels = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, KeyError, TypeError, OverflowError, EOFError, SyntaxError, tokenize.TokenError) as error:
            logger.warning("image cache %s is damaged (%s); it is made again", self.path, error)
            return None
        if pixels.shape != self._shape or pixels.dtype != np.uint8 or checksums.shape != self._shape[:1]:
            logger.warning("image cache %s is %s, expected %s; it is made again", self.path, pixels.shape, self._shape)
            return None
        return pixels, checksums

    def _build(self) -> None:
        """Decode every picture into a file beside, then put it and its checksums in place."""
        needed = int(np.prod(self._shape)) + 4096
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"the image cache needs {needed / 1e9:.1f} GB and {self.folder} has {free / 1e9:.1f} GB left; {_ADVICE}"
            )
        checksums: list[int] = []
        bar = tqdm(total=len(self._sources), desc="image cache", unit=" images", disable=None, delay=1)
        # Named by a hash, as no other file is. Plain writes: on a full disk they raise, where writing to a memory map
        # would kill the process.
        with making(self.path, Path.is_file) as partial, bar, open(partial, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": self._shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(self._sources), _BLOCK):
                block = self._pictures.pixels(self._sources[start : start + _BLOCK]).numpy()
                checksums += [zlib.crc32(picture) for picture in block]
                file.write(block.data)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.folder)
        write_atomically(self.path.with_suffix(".json"), self._sidecar(checksums))

    def _repair(self, row: int) -> None:
        """One picture again from its file, which is checked against its own hash."""
        source = self._sources[row]
        logger.warning("image cache %s: %s is damaged and decoded again", self.path, self._pictures.ids[source])
        pixels, checksums, _ = self._opened
        content = self._pictures.pixels([source]).numpy()[0]
        with writing(self.path), open(self.path, "r+b") as file:
            file.seek(self.path.stat().st_size - pixels.nbytes + row * content.nbytes)
            file.write(content.tobytes())
        if zlib.crc32(content) != checksums[row]:  # it was the checksum that was damaged
            checksums[row] = zlib.crc32(content)
            write_atomically(self.path.with_suffix(".json"), self._sidecar(checksums.tolist()))

    def _sidecar(self, checksums: Sequence[int]) -> bytes:
        document = {"schema": SCHEMA, "transform": self._transform, "crc32": list(checksums)}
        return json.dumps(document).encode()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"no image cache can be made in {self.folder} ({error.strerror}); {_ADVICE}") from error
        with open(self.folder / f".{self.path.stem}.lock", "a") as lock:
            lock_file(lock, wait=True)
            yield


class CachedImages(ImageSet):
    """The pictures of one split, read from the cache of the whole data set."""

    def __init__(self, cache: ImageCache, images: FolderImages) -> None:
        self.ids, self.labels, self.class_names = images.ids, images.labels, images.class_names
        self.preprocessing = images.preprocessing
        self._cache = cache
        self._rows = np.array([cache.rows[record.sha256] for record in images.records], dtype=np.int64)

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._cache.read(self._rows[np.asarray(indices, dtype=np.int64)])


def _transform_of(pictures: FolderImages) -> dict[str, Any]:
    """All that decides the pixels but the file: normalisation comes later and is no part of it."""
    import torchvision

    transform = pictures.preprocessing.to_dict()
    del transform["mean"], transform["std"]
    return transform | {"pillow": PIL.__version__, "torchvision": torchvision.__version__}
