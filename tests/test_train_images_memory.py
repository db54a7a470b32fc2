"""Pictures that would take too much: pixels, bytes, threads; the room that all threads share is given back."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_train_images import GREY, WIDE, decode_image, png, saved, tiff
from train.data import decoding
from train.data.decoding import UndecodableError, decoded_image, picture_bytes


@pytest.mark.parametrize("pillows", [None, 89478485, 10**9])
def test_too_many_pixels_whatever_the_limit_of_pillow(pillows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    for size in ((18900, 18900), (2**31 - 1, 1)):
        header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
        content = png(GREY, 0, bits=8).replace(
            png(GREY, 0, bits=8)[16:33], header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        )
        with pytest.raises(UndecodableError, match="too many pixels"):
            decode_image(content)
    long = saved(Image.new("1", (2**20 + 1, 1)))
    with pytest.raises(UndecodableError, match="a side of more than 1048576 pixels"):
        decode_image(long)


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path: Path) -> None:
    film = tmp_path / "film.jpg"
    film.touch()
    with open(film, "r+b") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(UndecodableError, match="file of more than 1 GiB"), picture_bytes(film):
        pass


def test_threads_share_the_room_for_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 8 × 32 bytes in a room of 1000: three at once, and one that needs more than all alone."""
    monkeypatch.setattr(decoding, "_room_for_pictures", decoding._Room(1000))
    small, large = png(GREY, 0, bits=8), png(GREY.repeat(5, 0), 0, bits=8)
    lock, held, most = threading.Lock(), [0], [0]

    def decode(content: bytes) -> int:
        with decoded_image(content) as picture:
            needed = 8 * picture.width * picture.height
            with lock:
                held[0] += needed
                most[0] = max(most[0], held[0])
            assert needed < 1000 or held[0] == needed
            threading.Event().wait(0.002)
            with lock:
                held[0] -= needed
            return needed

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(decode, [small, small, large, small] * 10)) == 30 * 256 + 10 * 1280
    assert 256 < most[0] <= 1280


def test_room_is_given_back_by_a_picture_that_fails() -> None:
    room = decoding._room_for_pictures
    before = room._free
    for content in (png(GREY, 0, bits=8)[:60], tiff(WIDE.astype(np.float32), 32, format=3)):
        with pytest.raises(UndecodableError):
            decode_image(content)
    assert room._free == before


@pytest.mark.slow
def test_sixteen_threads_on_sixteen_bombs_stay_below_four_gigabytes(tmp_path: Path) -> None:
    """The largest pictures that are decoded, in a process of their own."""
    side = 13370
    for color, channels, number_of_files in ((0, 1, 14), (6, 4, 2)):
        packer = zlib.compressobj(9)
        rows = b"".join(packer.compress(bytes(1 + channels * side)) for _ in range(side)) + packer.flush()
        header = struct.pack(">IIBBBBB", side, side, 8, color, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
            for name, data in chunks
        )
        (tmp_path / "cat").mkdir(exist_ok=True)
        for number in range(number_of_files):
            (tmp_path / "cat" / f"{color} {number}.png").write_bytes(content)
    program = (
        "import sys; from pathlib import Path; from train.data.datasets import build_manifest; "
        "manifest = build_manifest(sys.argv[1], split='all', workers=16); "
        "status = Path('/proc/self/status').read_text(); "
        "print(len(manifest.split('test')), status.split('VmHWM:')[1].split()[0])"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    decoded, kilobytes = map(int, ended.stdout.split())
    assert decoded == 16
    assert kilobytes < 4 * 2**20
