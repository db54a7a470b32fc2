"""One picture file → one RGB picture, or the reason why it is none."""

from __future__ import annotations

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image, ImageFile

__all__ = ["UndecodableError", "decode_image"]


# TIFF: BitsPerSample, PhotometricInterpretation, MaxSampleValue, PlanarConfiguration, SampleFormat.
_BITS, _PHOTOMETRIC, _GREATEST, _PLANES, _SAMPLE_FORMAT = 258, 262, 281, 284, 339


class UndecodableError(ValueError):
    """A file that is no sound picture; the message is the reason in a few words, as the manifest records it."""


def decode_image(content: bytes) -> Image.Image:
    """Decode a whole picture file into 8-bit RGB, whatever its name ends in.

    The first frame of an animation; EXIF orientation applied; palette, grey and CMYK converted; transparency laid on
    white; colour profiles not applied. Grey of more than 8 bits is scaled by its range (a plain conversion would clip
    it to white); of 16-bit colours the upper 8 bits are taken.

    Args:
        content: the bytes of the file.

    Raises:
        UndecodableError: empty, truncated, damaged, not an image, or pixels whose range is not known.
    """
    from PIL import Image, ImageFile, UnidentifiedImageError

    if not content:
        raise UndecodableError("empty file")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # Set by some other library, it would let half an image pass as a whole one.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels decide
            return _decode(Image.open(io.BytesIO(content)))
    except (UndecodableError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UndecodableError("not an image") from error
    except Image.DecompressionBombError as error:
        raise UndecodableError("too many pixels") from error
    except Exception as error:  # a broken stream makes a decoder raise whatever its code meets first
        raise UndecodableError("truncated" if _is_truncation(error) else f"damaged ({error})") from error


def _is_truncation(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(
        sign in text for sign in ("truncated", "unexpected end", "broken data stream", "not enough", "eof")
    )


def _decode(opened: ImageFile.ImageFile) -> Image.Image:
    from PIL import Image, ImageOps

    bits, stated = _bits(opened), _stated_greatest(opened)  # before `load` forgets how the pixels lie in the file
    opened.load()
    image = ImageOps.exif_transpose(opened)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(opened, image, bits, stated)).convert("RGB")
    if bits > 8:
        _check_colors(image, bits, stated)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")


def _tags(opened: Image.Image) -> dict[int, Any]:
    """A TIFF's tags; no other format's."""
    return dict(getattr(opened, "tag_v2", {})) if opened.format == "TIFF" else {}


def _bits(opened: ImageFile.ImageFile) -> int:
    """Bits that a sample has in the file; 8 stands for fewer as well, which Pillow scales.

    Raises:
        UndecodableError: a TIFF of more than 8 bits in separate planes, whose bytes Pillow takes for pixels.
    """
    tags = _tags(opened)
    if not tags:
        arguments = opened.tile[0].args if opened.tile else None
        mode = arguments if isinstance(arguments, str) else opened.mode
        return 16 if opened.mode == "I" or re.match(r"(I|L|LA|RGB[AXa]?|CMYK);16", mode) else 8
    bits = int(np.max(tags.get(_BITS, 1)))
    if bits > 8 and tags.get(_PLANES) == 2:
        raise UndecodableError(f"{bits}-bit pixels in separate planes")
    return max(8, bits)


def _stated_greatest(opened: ImageFile.ImageFile) -> int:
    """The greatest value that loaded pixels can have by the file's own word; 0: it does not say."""
    if opened.format == "PPM":  # Pillow scales by the header's maximum where that is not the whole range
        return 65535 if opened.tile and isinstance(opened.tile[0].args, tuple) else 0
    stated = int(np.min(_tags(opened).get(_GREATEST, 0)))
    # All ones in n bits is a range. Anything else is the greatest value that the picture happens to have.
    return 0 if stated & (stated + 1) else stated


def _scaled(opened: Image.Image, image: Image.Image, bits: int, stated: int) -> np.ndarray:
    """Grey of more than 8 bits in 0..255, uint8 [row, col]."""
    tags = _tags(opened)
    if image.mode == "F":
        raise UndecodableError("floating-point pixels without a range")
    if opened.format not in ("PNG", "TIFF", "PPM", "JPEG2000"):
        raise UndecodableError(f"{opened.format} pixels without a range")
    if np.max(tags.get(_SAMPLE_FORMAT, 1)) != 1:
        raise UndecodableError(f"signed {bits}-bit pixels without a range")
    values = np.asarray(image).astype(np.int64) % (1 << bits)  # Pillow keeps 32 bits as signed
    greatest = _greatest(int(values.max()), bits, stated)
    scaled: np.ndarray = ((510 * values + greatest) // (2 * greatest)).astype(np.uint8)  # rounded
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow sees to it for 8 bits alone
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
    found = max(int(np.asarray(image.getchannel(band)).max()) for band in image.getbands() if band not in "Aa")
    if not stated and found < 64:
        filled = bits - 8 + found.bit_length()
        raise UndecodableError(f"{bits}-bit colours that fill {filled} bits, in a range that the file does not say")
