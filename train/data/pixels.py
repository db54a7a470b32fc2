"""Pixels as they lie in a file → 8-bit RGB, by the range that the file states or that follows from its bits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFile

# TIFF: BitsPerSample, PhotometricInterpretation, MaxSampleValue, PlanarConfiguration, SampleFormat.
_BITS, _PHOTOMETRIC, _GREATEST, _PLANES, _SAMPLE_FORMAT = 258, 262, 281, 284, 339
_BLOCK_PIXELS = 2**20  # converted at once


class UndecodableError(ValueError):
    """A file that is no sound picture; the message is the reason in a few words, as the manifest records it."""


def rgb_of(opened: Image.Image, bits: int, stated: int) -> Image.Image:
    """Loaded pixels as 8-bit RGB, rows by rows, so that no step holds a second whole picture."""
    from PIL import Image

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
    """Bits that a sample has in the file; 8 stands for fewer as well, which Pillow scales.

    Raises:
        UndecodableError: a TIFF of more than 8 bits in separate planes, whose bytes Pillow takes for pixels.
    """
    if opened.format != "TIFF":
        arguments = opened.tile[0].args if opened.tile else None
        mode = arguments if isinstance(arguments, str) else opened.mode
        return 16 if opened.mode == "I" or re.match(r"(I|L|LA|RGB[AXa]?|CMYK);16", mode) else 8
    bits = int(np.max(tag_of(opened, _BITS, 1)))
    if bits > 8 and tag_of(opened, _PLANES, 1) == 2:
        raise UndecodableError(f"{bits}-bit pixels in separate planes")
    return max(8, bits)


def stated_greatest(opened: ImageFile.ImageFile) -> int:
    """The greatest value that loaded pixels can have by the file's own word; 0: it does not say."""
    if opened.format == "PPM":  # Pillow scales by the header's maximum where that is not the whole range
        return 65535 if opened.tile and isinstance(opened.tile[0].args, tuple) else 0
    stated = int(np.min(tag_of(opened, _GREATEST, 0)))
    # All ones in n bits is a range. Anything else is the greatest value that the picture happens to have.
    return 0 if stated & (stated + 1) else stated


def _check_grey(opened: Image.Image, bits: int, stated: int) -> int:
    """The value that is white in loaded grey of more than 8 bits.

    Raises:
        UndecodableError: it is not known.
    """
    if opened.mode == "F":
        raise UndecodableError("floating-point pixels without a range")
    if opened.format not in ("PNG", "TIFF", "PPM", "JPEG2000"):
        raise UndecodableError(f"{opened.format} pixels without a range")
    if np.max(tag_of(opened, _SAMPLE_FORMAT, 1)) != 1:
        raise UndecodableError(f"signed {bits}-bit pixels without a range")
    found = max(int(_values(opened.crop(box), bits).max()) for box in _blocks(opened))
    return _greatest(found, bits, stated)


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


def _greatest(found: int, bits: int, stated: int) -> int:
    """The value that is white in a picture whose greatest value is `found`.

    Cameras and scanners of 10 to 14 bits write into 16 and often do not say so. A picture that leaves the upper three
    quarters of its range empty is taken for one of these: by 65535 it would come out nearly black, in a few shades.
    """
    if stated >= found and stated:
        return stated
    whole = (1 << bits) - 1
    if found > whole // 4 or bits not in (16, 32):
        return whole
    raise UndecodableError(
        f"{bits}-bit pixels that fill {found.bit_length()} bits, in a range that the file does not say"
    )


def _check_colors(image: Image.Image, bits: int, stated: int) -> None:
    """Of colours Pillow hands over the upper 8 of 16 bits: right where they fill 16 bits.

    Raises:
        UndecodableError: they do not, or that is not known (see `_greatest`).
    """
    if stated not in (0, 65535):
        raise UndecodableError(f"colours of {stated.bit_length()} bits in {bits}")
    found = max(int(np.max(image.getchannel(band).getextrema())) for band in image.getbands() if band not in "Aa")
    if not stated and found < 64:
        filled = bits - 8 + found.bit_length()
        raise UndecodableError(f"{bits}-bit colours that fill {filled} bits, in a range that the file does not say")
