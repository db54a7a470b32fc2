"""One picture file → one 8-bit RGB picture, or the reason why it is none."""

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
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, _imaging

# TIFF: BitsPerSample, PhotometricInterpretation, MaxSampleValue, PlanarConfiguration, SampleFormat.
_BITS, _PHOTOMETRIC, _GREATEST, _PLANES, _SAMPLE_FORMAT = 258, 262, 281, 284, 339
_BLOCK_PIXELS = 2**20  # converted at once


class UndecodableError(ValueError):
    """A file that is no sound picture; the message is the reason in a few words, as the manifest records it."""


def rgb_of(opened: Image.Image, bits: int, stated: int) -> Image.Image:
    """Loaded pixels as 8-bit RGB, rows by rows, so that no step holds a second whole picture."""
    deep = opened.mode in ("I", "F") or opened.mode.startswith("I;16")
    clear = opened.has_transparency_data
    if deep:
        greatest = _check_grey(opened, bits, stated)
    elif bits > 8:
        _check_colors(opened, bits, stated)
    if opened.mode == "RGB" and not clear:
        return opened
    picture = Image.new("RGB", opened.size)
    for box in _blocks(opened):
        block = opened.crop(box)
        if deep:
            block = Image.fromarray(_scaled(opened, _values(block, bits), greatest))
        elif clear:
            block = block.convert("RGBA")
            block = Image.alpha_composite(Image.new("RGBA", block.size, "white"), block)
        picture.paste(block.convert("RGB"), box)
    return picture


def _blocks(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows, from top to bottom."""
    rows = max(1, _BLOCK_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield 0, top, image.width, min(top + rows, image.height)


def tag_of(opened: Image.Image, number: int, otherwise: Any) -> Any:
    """A TIFF's tag; `otherwise` where there is none, and for other formats."""
    return opened.tag_v2.get(number, otherwise) if opened.format == "TIFF" else otherwise  # type: ignore[attr-defined]


def bits_of(opened: ImageFile.ImageFile) -> int:
    """Bits that a sample has in the file; 8 stands for fewer as well, which Pillow scales."""
    if opened.format != "TIFF":
        arguments = opened.tile[0].args if opened.tile else None
        mode = arguments if isinstance(arguments, str) else opened.mode
        return 16 if opened.mode == "I" or re.match(r"(I|L|LA|RGB[AXa]?|CMYK);16", mode) else 8
    bits = int(np.max(tag_of(opened, _BITS, 1)))
    if bits > 8 and tag_of(opened, _PLANES, 1) == 2:
        raise UndecodableError(f"{bits}-bit pixels in separate planes")
    return max(8, bits)


def stated_greatest(opened: ImageFile.ImageFile) -> int:
    """The greatest value that loaded pixels can have as the file says; 0: it does not."""
    if opened.format == "PPM":  # Pillow scales by the header's maximum where that is not the whole range
        return 65535 if opened.tile and isinstance(opened.tile[0].args, tuple) else 0
    stated = int(np.min(tag_of(opened, _GREATEST, 0)))
    # All ones in n bits is a range. Anything else is the greatest value that the picture happens to have.
    return 0 if stated & (stated + 1) else stated


def _check_grey(opened: Image.Image, bits: int, stated: int) -> int:
    """The value that is white in loaded grey of more than 8 bits."""
    if opened.mode == "F":
        raise UndecodableError("floating-point pixels without a range")
    if opened.format not in ("PNG", "TIFF", "PPM", "JPEG2000"):
        raise UndecodableError(f"{opened.format} pixels without a range")
    if np.max(tag_of(opened, _SAMPLE_FORMAT, 1)) != 1:
        raise UndecodableError(f"signed {bits}-bit pixels without a range")
    brightest = max(int(_values(opened.crop(box), bits).max()) for box in _blocks(opened))
    return _greatest(brightest, bits, stated)


def _values(block: Image.Image, bits: int) -> np.ndarray:
    """int64 [row, col]; Pillow keeps 32 bits as signed."""
    return np.asarray(block).astype(np.int64) % (1 << bits)


def _scaled(opened: Image.Image, values: np.ndarray, greatest: int) -> np.ndarray:
    """Grey of more than 8 bits in 0..255, uint8 [row, col]."""
    scaled: np.ndarray = ((510 * values + greatest) // (2 * greatest)).astype(np.uint8)  # rounded
    if tag_of(opened, _PHOTOMETRIC, 1) == 0:  # 0 is white; Pillow sees to it for 8 bits alone
        scaled = 255 - scaled
    if "transparency" in opened.info:
        scaled[values == opened.info["transparency"]] = 255
    return scaled


def _greatest(brightest: int, bits: int, stated: int) -> int:
    """The value that is white in a picture whose greatest value is `brightest`.

    Cameras and scanners of 10 to 14 bits write into 16 and often do not say so. A picture that leaves the upper three
    quarters of its range empty is taken for one of these: by 65535 it would come out nearly black, in a few shades.
    """
    if stated >= brightest and stated:
        return stated
    whole = (1 << bits) - 1
    if brightest > whole // 4 or bits not in (16, 32):
        return whole
    raise UndecodableError(
        f"{bits}-bit pixels that fill {brightest.bit_length()} bits, in a range that the file does not say"
    )


def _check_colors(image: Image.Image, bits: int, stated: int) -> None:
    """Of colours Pillow hands over the upper 8 of 16 bits, which is right where they fill 16 (see `_greatest`)."""
    if stated not in (0, 65535):
        raise UndecodableError(f"colours of {stated.bit_length()} bits in {bits}")
    brightest = max(int(np.max(image.getchannel(band).getextrema())) for band in image.getbands() if band not in "Aa")
    if not stated and brightest < 64:
        filled = bits - 8 + brightest.bit_length()
        raise UndecodableError(f"{bits}-bit colours that fill {filled} bits, in a range that the file does not say")


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
# Greatest that decoding takes, in bytes per pixel: the decoder's own memory and the picture, as measured.
_BYTES_A_PIXEL = {"JPEG": 12, "MPO": 12, "WEBP": 17, "AVIF": 16, "JPEG2000": 25}
_BYTES_A_PIXEL_OF_OTHERS = 8
# Of one picture: Pillow's own limit, whatever another library set it to, and what leaves a process below 4 GB.
_MOST_PIXELS, _MOST_BYTES = 178_956_970, 3 * 2**30
_LONGEST_SIDE = 2**20  # a resize takes some 50 bytes for each pixel of a side
_LARGEST_FILE = 2**30
_BLOCK_BYTES = 2**26

_ORIENTATION, _KIND, _TILE_WIDTH, _TILE_LENGTH = 274, 254, 322, 323  # tags of EXIF and TIFF
_PILLOW = re.compile(r"PIL\.")
_TRUNCATED = ("truncated", "unexpected end", "broken data stream", "not enough", "eof")  # as decoders say it


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
    """The content of a picture file, while there is room for it beside those of other threads; or OSError."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):  # it might never end
        raise UndecodableError("not a file")
    if state.st_size > _LARGEST_FILE:  # no sound picture
        raise UndecodableError("file of more than 1 GiB")
    with _room_for_files.taken(state.st_size):
        yield path.read_bytes()


@contextmanager
def decoded_image(content: bytes) -> Iterator[Image.Image]:
    """Decode a whole picture file, given its bytes, into 8-bit RGB, whatever its name ends in; it is closed at the end.

    The first frame of an animation; EXIF orientation applied; palette, grey and CMYK converted; transparency laid on
    white; colour profiles not applied. Grey of more than 8 bits is scaled by its range (a plain conversion would clip
    it to white); of 16-bit colours the upper 8 bits are taken. Metadata that cannot be read change nothing.
    All threads of the process together decode as many at once as take 2 GiB; one that takes more is decoded alone.
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
    except Exception as error:  # of any class: on a broken stream a decoder raises whatever its code meets first
        traceback.clear_frames(error.__traceback__)  # they hold pixels, and their room is given back
        if isinstance(error, UndecodableError):
            raise
        raise UndecodableError(_reason_of(error, content)) from error


def _reason_of(error: Exception, content: bytes) -> str:
    """Why a file is no picture, as one short line that every terminal can show."""
    if isinstance(error, UnidentifiedImageError):
        return _kind_of(content)
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    text = str(error).lower()
    if isinstance(error, EOFError) or any(sign in text for sign in _TRUNCATED):
        return "truncated"
    said = " ".join(str(error).split()) or type(error).__name__
    return f"damaged ({(said if said.isprintable() else ascii(said))[:100]})"


def _prepare_pillow() -> None:
    """Set what other libraries may have set otherwise."""
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # or half an image would pass as a whole one
    # Pillow warns of odd metadata and many pixels, a line per file; what is wrong with a file is its reason. Off for
    # the whole process: `warnings.catch_warnings` in several threads can leave all warnings off for good.
    if not any(action == "ignore" and module == _PILLOW for action, _, _, module, _ in warnings.filters):
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)
    _prepare_libraries()


@functools.cache
def _prepare_libraries() -> None:
    """Settings of the C code, once a process."""
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


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has: AVIF came with 11.3."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _kind_of(content: bytes) -> str:
    """The reason for a file that Pillow opens as none of `FORMATS`."""
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
    """A PNG without the chunks that change no pixel: Pillow refuses the picture for damage in one, browsers show it."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept, place = [content[:8]], 8
    while place + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        chunk = content[place : place + 12 + length]
        if name == b"eXIf":  # orientation stays where its checksum is right
            needed = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        else:
            needed = name[:1].isupper() or name in (b"tRNS", b"acTL", b"fcTL", b"fdAT")
        if needed or len(chunk) < 12 + length:
            kept.append(chunk)
        place += 12 + length
    return b"".join(kept)


def _bytes_of(opened: ImageFile.ImageFile) -> int:
    """Memory that the picture takes until it is RGB; refused where that is more than a process has."""
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
    except Exception:  # of any class: EXIF data that Pillow cannot read; viewers show such a picture as it lies
        return None
