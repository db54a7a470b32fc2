"""One picture file → one RGB picture, or the reason why it is none."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import re
import stat
import struct
import threading
import traceback
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from train.data.pixels import UndecodableError, bits_of, rgb_of, stated_greatest, tag_of

if TYPE_CHECKING:
    from PIL import Image, ImageFile

# What cameras, phones, scanners, browsers and older image databases write: one raster picture, decoded by a library in
# this process. Pillow opens more: drawings, for which it starts another program (EPS), textures of games, sets of
# icons, arrays of floats without a range. TGA has no mark by which it is known and is tried last.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "PCX", "SGI", "SUN", "TGA")

# (offset, bytes, what a file is that has them there)
_OTHERS = (
    (0, b"%!PS", "a PostScript (EPS) drawing"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript (EPS) drawing"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\xd7\xcd\xc6\x9a", "a Windows metafile drawing"),
    (40, b" EMF", "a Windows metafile drawing"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML file"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (4, b"ftypavi", "an AVIF picture, for which Pillow was built without a decoder"),
    *((4, b"ftyp" + brand, "a HEIF picture") for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftyp", "an MP4 file"),
    (8, b"AVI ", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
    (0, b"\xff\x0a", "a JPEG XL picture"),
    (4, b"JXL ", "a JPEG XL picture"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"qoif", "a QOI picture"),
    (0, b"\0\0\1\0", "a set of icons"),
    (0, b"\0\0\2\0", "a set of cursors"),
    (0, b"icns", "a set of icons"),
    (0, b"SIMPLE  =", "a FITS file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (128, b"DICM", "a DICOM file"),
    (0, b"\x93NUMPY", "a NumPy array"),
    (0, b"PK\3\4", "a ZIP archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"version https://git-lfs", "a Git LFS pointer (git lfs pull gets the picture)"),
)

# What is held at once, by all threads of the process: decoded pictures, and the files that they are decoded from.
_DECODED_BYTES, _FILE_BYTES = 2 * 2**30, 2**29
# Greatest that decoding takes, in bytes a pixel: the decoder's own memory and the picture, as measured.
_BYTES_A_PIXEL = {"JPEG": 12, "MPO": 12, "WEBP": 17, "AVIF": 16, "JPEG2000": 25}
_BYTES_A_PIXEL_OF_OTHERS = 8
# Of one picture: Pillow's own limit, whatever another library set it to, and what leaves a process below 4 GB.
_MOST_PIXELS, _MOST_BYTES = 178_956_970, 3 * 2**30
_LONGEST_SIDE = 2**20  # a resize takes some 50 bytes for each pixel of a side
_LARGEST_FILE = 2**30
_BLOCK_BYTES = 2**26

_ORIENTATION, _KIND, _TILE_WIDTH, _TILE_LENGTH = 274, 254, 322, 323  # tags of EXIF and TIFF
_PILLOW = re.compile(r"PIL\.")


class _Room:
    """Memory that several threads share; who needs more than there is gets all of it, alone."""

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, needed: int) -> Iterator[None]:
        """Wait for `needed` bytes and hold them."""
        needed = min(needed, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._free >= needed)
            self._free -= needed
        try:
            yield
        finally:
            with self._changed:
                self._free += needed
                self._changed.notify_all()


# Files are read before they are decoded and never the other way round, so that no two threads wait for each other.
_room_for_files, _room_for_pictures = _Room(_FILE_BYTES), _Room(_DECODED_BYTES)


@contextmanager
def picture_bytes(path: Path) -> Iterator[bytes]:
    """The content of a picture file, while there is room for it beside those of other threads.

    Raises:
        UndecodableError: larger than 1 GiB, which no picture within the limits is; a pipe or a device.
        OSError: the file cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):  # it might never end
        raise UndecodableError("not a file")
    if found.st_size > _LARGEST_FILE:
        raise UndecodableError("file of more than 1 GiB")
    with _room_for_files.taken(found.st_size):
        yield path.read_bytes()


@contextmanager
def decoded_image(content: bytes) -> Iterator[Image.Image]:
    """Decode a whole picture file into 8-bit RGB, whatever its name ends in; it is closed at the end.

    The first frame of an animation; EXIF orientation applied; palette, grey and CMYK converted; transparency laid on
    white; colour profiles not applied. Grey of more than 8 bits is scaled by its range (a plain conversion would clip
    it to white); of 16-bit colours the upper 8 bits are taken. Metadata that cannot be read change nothing.

    All threads of the process together decode as many at once as take 2 GiB; one that takes more is decoded alone.

    Args:
        content: the bytes of the file.

    Raises:
        UndecodableError: empty, truncated, damaged, of none of `FORMATS`, of too many pixels, or pixels whose range is
            not known.
    """
    if not content:
        raise UndecodableError("empty file")
    with ExitStack() as held:
        yield _decode_or_say_why(content, held)


def _decode_or_say_why(content: bytes, held: ExitStack) -> Image.Image:
    _prepare_pillow()
    try:
        return _decode(content, held)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's door: a broken stream makes a decoder raise whatever its code meets first
        traceback.clear_frames(error.__traceback__)  # they hold pixels, and their room is given back
        if isinstance(error, UndecodableError):
            raise
        raise UndecodableError(_reason_of(error, content)) from error


def _reason_of(error: Exception, content: bytes) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return _kind_of(content)
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    return "truncated" if _is_truncation(error) else f"damaged ({_words(error)})"


def _prepare_pillow() -> None:
    """Set what other libraries may have set otherwise."""
    from PIL import ImageFile

    ImageFile.LOAD_TRUNCATED_IMAGES = False  # or half an image would pass as a whole one
    # Pillow warns of odd metadata and many pixels, a line a file; what is wrong with a file is its reason. Off for the
    # whole process: `warnings.catch_warnings` in several threads can leave all warnings off for good.
    if not any(action == "ignore" and module == _PILLOW for action, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
    _prepare_libraries()


@functools.cache
def _prepare_libraries() -> None:
    """Settings of the C code, once a process."""
    from PIL import _imaging

    # Blocks of above 32 MB go back to the system when they are freed; of Pillow's own 16 MB every thread keeps a
    # gigabyte after a large picture.
    _imaging.set_block_size(max(_BLOCK_BYTES, _imaging.get_block_size()))
    # libtiff prints a line for each odd tag and each damaged row. Pillow learns of errors all the same.
    library = ctypes.CDLL(_imaging.__file__)  # finds the names of what that is linked with, too
    with contextlib.suppress(AttributeError):  # built without libtiff, or with its names hidden
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            handler = getattr(library, name)
            handler.argtypes, handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            handler(None)


def _is_truncation(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(
        sign in text for sign in ("truncated", "unexpected end", "broken data stream", "not enough", "eof")
    )


def _words(error: BaseException) -> str:
    """What a decoder says, as one short line that every terminal can show."""
    said = " ".join(str(error).split()) or type(error).__name__
    return (said if said.isprintable() else ascii(said))[:100]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has: AVIF came with 11.3."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _kind_of(content: bytes) -> str:
    """The reason for a file that Pillow opens as none of `FORMATS`."""
    from PIL import Image

    for name in _formats():
        accept = Image.OPEN[name][1]
        if accept is not None and accept(content[:16]) is True:
            return f"damaged (header of {name})"
    for offset, mark, kind in _OTHERS:
        if content[offset : offset + len(mark)].lower() == mark.lower():
            return f"{kind}, which is not opened"
    return "not an image of a known format"


def _decode(content: bytes, held: ExitStack) -> Image.Image:
    """The picture; `held` gets the room that it takes and closes it before that is given back."""
    from PIL import Image

    opened = Image.open(io.BytesIO(_without_metadata(content)), formats=_formats())
    held.enter_context(_room_for_pictures.taken(_bytes_of(opened)))
    held.callback(opened.close)
    bits, stated = bits_of(opened), stated_greatest(opened)  # before `load` forgets how the pixels lie in the file
    opened.load()
    turn = _turn(opened)
    picture = rgb_of(opened, bits, stated)
    if picture is not opened:
        opened.close()
    if turn is not None:
        picture = picture.transpose(turn)
    held.callback(picture.close)
    return picture


def _without_metadata(content: bytes) -> bytes:
    """A PNG without the chunks that change no pixel: Pillow refuses the picture for damage in one, browsers show it.

    Orientation (eXIf) stays where its checksum is right.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept, place = [content[:8]], 8
    while place + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        if name == b"eXIf":
            needed = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        else:
            needed = name[:1].isupper() or name in (b"tRNS", b"acTL", b"fcTL", b"fdAT")
        if needed or len(chunk) < 12 + length:
            kept.append(chunk)
        place += 12 + length
    return b"".join(kept)


def _bytes_of(opened: ImageFile.ImageFile) -> int:
    """Memory that the picture takes until it is RGB.

    Raises:
        UndecodableError: more than a process has, or it is a small copy of the picture.
    """
    if tag_of(opened, _KIND, 0) & 1:
        raise UndecodableError("the first picture in it is marked as a smaller copy, as in a camera's raw file")
    sizes = [opened.size, (tag_of(opened, _TILE_WIDTH, 0), tag_of(opened, _TILE_LENGTH, 0))]
    pixels = max(int(width) * int(height) for width, height in sizes)
    taken = pixels * _BYTES_A_PIXEL.get(opened.format or "", _BYTES_A_PIXEL_OF_OTHERS)
    if pixels > _MOST_PIXELS or taken > _MOST_BYTES:
        raise UndecodableError("too many pixels")
    if max(opened.size) > _LONGEST_SIDE:
        raise UndecodableError(f"a side of more than {_LONGEST_SIDE} pixels")
    return taken


def _turn(opened: Image.Image) -> Image.Transpose | None:
    """How a picture has to be turned or mirrored to be upright, by its EXIF data or TIFF tag."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    try:
        return turns.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's door again: EXIF data that cannot be read; viewers show such a picture as it lies
        return None
