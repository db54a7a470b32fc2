"""One picture file → one RGB picture, or the reason why it is none."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["UndecodableError", "decode_image"]


class UndecodableError(ValueError):
    """A file that is no sound picture; the message is the reason in a few words, as the manifest records it."""


def decode_image(content: bytes) -> Image.Image:
    """Decode a whole picture file into 8-bit RGB, whatever its name ends in.

    The first frame of an animation; EXIF orientation applied; palette, grey and CMYK converted; 16-bit
    grey scaled by 1/257 (a plain conversion would clip it to white); transparency laid on white.

    Args:
        content: the bytes of the file.

    Raises:
        UndecodableError: empty, truncated, not an image, or of a pixel type without a range (float).
    """
    from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

    if not content:
        raise UndecodableError("empty file")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        # Set by some other library, it would let half an image pass as a whole one.
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; the pixels decide
            opened = Image.open(io.BytesIO(content))
            opened.load()
            image = ImageOps.exif_transpose(opened)
    except UnidentifiedImageError as error:
        raise UndecodableError("not an image") from error
    except Image.DecompressionBombError as error:
        raise UndecodableError("too many pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError) as error:
        # What PIL's decoders raise for broken streams, by format.
        raise UndecodableError("truncated" if _is_truncation(error) else f"damaged ({error})") from error
    return _to_rgb(image)


def _is_truncation(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(
        sign in text for sign in ("truncated", "unexpected end", "broken data stream", "not enough", "eof")
    )


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise UndecodableError("floating-point pixels without a range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8), mode="L").convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
