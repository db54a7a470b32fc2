"""One picture file: gradients whose true values are known, out of every kind of pixels, or the reason for none."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import decoding
from train.data.decoding import UndecodableError, decoded_image

GREY = np.arange(0, 256, 17, dtype=np.uint8)[None].repeat(2, axis=0)  # [2, 16], 0 to 255
WIDE = GREY.astype(np.uint16) * 257


def decode_image(content: bytes) -> Image.Image:
    with decoded_image(content) as picture:
        return picture.copy()


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(values: np.ndarray, color: int, *chunks: tuple[bytes, bytes], bits: int = 16) -> bytes:
    """A PNG of [row, col(, channel)]; color: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2" if bits == 16 else "u1"))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    whole = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in whole
    )


def tiff(values: np.ndarray, bits: int, *, planes: bool = False, **tags: int) -> bytes:
    """A little-endian TIFF of [row, col(, channel)] without compression.

    Args:
        values: of a type of `bits` bits; packed bytes for 12.
        planes: one strip a channel.
        tags: photometric (0: white is zero), greatest, format (1 unsigned, 2 signed, 3 float), orientation, width,
            kind (1: a smaller copy).
    """
    channels = values.shape[2] if values.ndim == 3 else 1
    data = (np.moveaxis(values, -1, 0) if planes else values).tobytes()
    strips = channels if planes else 1
    entries = {
        254: [tags["kind"]] if "kind" in tags else [],
        256: [tags.get("width", values.shape[1])],
        257: [values.shape[0]],
        258: [bits] * channels,
        259: [1],
        262: [tags.get("photometric", 2 if channels == 3 else 1)],
        274: [tags.get("orientation", 1)],
        277: [channels],
        278: [values.shape[0]],
        279: [len(data) // strips] * strips,
        281: [tags["greatest"]] * channels if "greatest" in tags else [],
        284: [2 if planes else 1],
        339: [tags.get("format", 1)] * channels,
    }
    entries = {tag: content for tag, content in entries.items() if content}
    place = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[273] = [place + k * (len(data) // strips) for k in range(strips)]
    directory = struct.pack("<H", len(entries))
    after = data
    for tag, content in sorted(entries.items()):
        packed = struct.pack(f"<{len(content)}I", *content)
        directory += struct.pack("<HHI", tag, 4, len(content))
        directory += packed if len(packed) == 4 else struct.pack("<I", place + len(after))
        after += b"" if len(packed) == 4 else packed
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + after


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, grey[:, ::-1], np.full_like(grey, grey[0, 8])], axis=-1)


def pgm(values: np.ndarray, greatest: int) -> bytes:
    return b"P5 16 2 %d\n" % greatest + values.astype(">u2").tobytes()


def twelve_bits(values: np.ndarray) -> np.ndarray:
    """Two samples in three bytes, as TIFF packs them."""
    one, two = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([one >> 4, (one & 15) << 4 | two >> 8, two & 255], axis=-1)
    return packed.reshape(len(values), -1).astype(np.uint8)


def fits(values: np.ndarray) -> bytes:
    cards = {"SIMPLE": "T", "BITPIX": 16, "NAXIS": 2, "NAXIS1": 16, "NAXIS2": 2}
    header = "".join(f"{key:8}= {value:>20}".ljust(80) for key, value in cards.items()) + "END"
    return header.ljust(2880).encode() + values.astype(">u2").tobytes().ljust(2880, b"\0")


DEEP: dict[str, Callable[[], bytes]] = {
    "png 16": lambda: png(WIDE, 0),
    "png 16 with 12 significant bits, which are the upper ones": lambda: png(WIDE & 0xFFF0, 0, (b"sBIT", b"\x0c")),
    "png 16 with grey and alpha": lambda: png(np.stack([WIDE, np.full_like(WIDE, 65535)], -1), 4),
    "png 8 with grey and alpha": lambda: png(np.stack([GREY, np.full_like(GREY, 255)], -1), 4, bits=8),
    "pgm of 65535": lambda: pgm(WIDE, 65535),
    "pgm of 4095": lambda: pgm(np.rint(WIDE * (4095 / 65535)), 4095),
    "jpeg 2000 of 16": lambda: saved(Image.fromarray(WIDE.repeat(8, 0).repeat(2, 1)), "JPEG2000", irreversible=False),
    "tiff 8, white is zero": lambda: tiff(255 - GREY, 8, photometric=0),
    "tiff 12": lambda: tiff(twelve_bits(np.rint(WIDE * (4095 / 65535))), 12, width=16),
    "tiff 16": lambda: tiff(WIDE, 16),
    "tiff 16, compressed": lambda: saved(Image.fromarray(WIDE), "TIFF", compression="tiff_lzw"),
    "tiff 16, white is zero": lambda: tiff(65535 - WIDE, 16, photometric=0),
    "tiff 16 that says 4095": lambda: tiff(np.rint(WIDE * (4095 / 65535)).astype(np.uint16), 16, greatest=4095),
    "tiff 16 with the greatest it happens to have": lambda: tiff(WIDE, 16, greatest=64000),
    "tiff 32": lambda: tiff((GREY.astype(np.int64) * 16843009).astype(np.uint32), 32),
    "tiff 32 that says 65535": lambda: tiff(WIDE.astype(np.uint32), 32, greatest=65535),
}


@pytest.mark.parametrize("kind", DEEP)
def test_grey_of_more_than_8_bits_is_scaled_by_its_range(kind: str) -> None:
    found = np.asarray(decode_image(DEEP[kind]()))
    rows, cols = found.shape[0] // 2, found.shape[1] // 16
    np.testing.assert_array_equal(found, GREY.repeat(rows, 0).repeat(cols, 1)[..., None].repeat(3, -1))


def test_scaling_rounds_to_the_nearest() -> None:
    values = np.array([[0, 128, 129, 32767, 32768, 65406, 65407, 65535]])
    np.testing.assert_array_equal(np.asarray(decode_image(png(values, 0)))[0, :, 0], np.rint(values[0] / 257))
    # A picture that is dark by the file's own word stays dark.
    dark = np.asarray(decode_image(tiff(values.astype(np.uint16) // 16, 16, greatest=65535)))
    np.testing.assert_array_equal(dark[0, :, 0], np.rint(values[0] // 16 / 257))


@pytest.mark.parametrize("wide", [lambda v: png(v, 2), lambda v: tiff(v, 16), lambda v: tiff(v, 16, greatest=65535)])
def test_of_16_bit_colours_the_upper_8_bits_are_taken(wide: Callable[[np.ndarray], bytes]) -> None:
    np.testing.assert_array_equal(np.asarray(decode_image(wide(rgb(WIDE)))), rgb(GREY))
    between = np.asarray(decode_image(wide(rgb(WIDE - WIDE // 300)))).astype(float)
    assert np.abs(between - rgb(WIDE - WIDE // 300) / 257).max() < 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: png(WIDE // 16, 0), r"16-bit pixels that fill 12 bits, in a range that the file does not say"),
        (lambda: png(WIDE // 4, 0), r"16-bit pixels that fill 14 bits"),
        (lambda: tiff(WIDE // 16, 16), "16-bit pixels that fill 12 bits"),
        (lambda: tiff(WIDE // 16, 16, greatest=4000), "16-bit pixels that fill 12 bits"),
        (lambda: tiff(WIDE // 16, 16, greatest=1023), "16-bit pixels that fill 12 bits"),
        (lambda: tiff(WIDE.astype(np.uint32), 32), "32-bit pixels that fill 16 bits"),
        (lambda: tiff(WIDE.astype(np.int32), 32, format=2), "signed 32-bit pixels without a range"),
        (lambda: tiff(WIDE.view(np.int16), 16, format=2), "signed 16-bit pixels without a range"),
        (lambda: tiff(WIDE.astype(np.float32), 32, format=3), "floating-point pixels without a range"),
        (lambda: saved(Image.fromarray(GREY / np.float32(255)), "TIFF"), "floating-point pixels without a range"),
        (lambda: fits(WIDE), "a FITS file, which is not opened"),
        (lambda: png(rgb(WIDE // 16), 2), "16-bit colours that fill 12 bits, in a range that the file does not say"),
        (lambda: png(rgb(WIDE // 257), 2), "16-bit colours that fill 8 bits"),
        (lambda: tiff(rgb(WIDE // 2), 16, greatest=32767), "colours of 15 bits in 16"),
        (lambda: tiff(rgb(WIDE), 16, planes=True), "16-bit pixels in separate planes"),
    ],
)
def test_pixels_whose_range_is_not_known_are_left_out(content: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(UndecodableError, match=reason):
        decode_image(content())


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int, wide: bool) -> None:
    """As EXIF says where the first row and the first column belong."""
    stored = WIDE if wide else GREY
    upright = {
        1: lambda v: v,
        2: lambda v: v[:, ::-1],
        3: lambda v: v[::-1, ::-1],
        4: lambda v: v[::-1],
        5: lambda v: v.T,
        6: lambda v: v[::-1].T,
        7: lambda v: v[::-1, ::-1].T,
        8: lambda v: v[:, ::-1].T,
    }[orientation](np.stack([GREY[0], 255 - GREY[0]]))
    stored = np.stack([stored[0], stored[0, -1] - stored[0]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    kinds = [saved(Image.fromarray(stored), exif=exif), tiff(stored, 16 if wide else 8, orientation=orientation)]
    for content in kinds:
        np.testing.assert_array_equal(np.asarray(decode_image(content))[..., 0], upright)


def test_transparency_is_laid_on_white() -> None:
    alpha = np.full_like(GREY, 51)
    on_white = np.rint(255 - (255 - GREY.astype(float)) * 51 / 255)
    colors = np.dstack([rgb(GREY), alpha])
    for content in (
        saved(Image.fromarray(np.stack([GREY, alpha], -1), "LA")),
        saved(Image.fromarray(np.stack([GREY, GREY, GREY, alpha], -1))),
        png(np.stack([WIDE, alpha * np.uint16(257)], -1), 4),
    ):
        assert np.abs(np.asarray(decode_image(content))[..., 0] - on_white).max() <= 1
    expected = 255 - (255 - rgb(GREY).astype(float)) * 51 / 255
    assert np.abs(np.asarray(decode_image(saved(Image.fromarray(colors)))) - expected).max() <= 1
    # One colour or one grey that stands for no ink: black here.
    black = GREY.copy()
    black[:, 0] = 255
    for content in (
        png(GREY, 0, (b"tRNS", struct.pack(">H", 0)), bits=8),
        png(WIDE, 0, (b"tRNS", struct.pack(">H", 0))),
        png(GREY[..., None].repeat(3, -1), 2, (b"tRNS", bytes(6)), bits=8),
    ):
        np.testing.assert_array_equal(np.asarray(decode_image(content))[..., 0], black)
    palette = Image.fromarray(GREY).convert("P")
    palette.putpalette([v for grey in range(256) for v in (grey, grey, grey)])
    clear = saved(palette, transparency=bytes([0] + [255] * 254 + [51]))
    np.testing.assert_array_equal(np.asarray(decode_image(clear))[..., 0], black)


def test_palettes_cmyk_and_few_bits_have_their_colours() -> None:
    palette = Image.fromarray(GREY).convert("P")
    palette.putpalette([v for k in range(256) for v in (k, 255 - k, 7)])
    expected = np.stack([GREY, 255 - GREY, np.full_like(GREY, 7)], -1)
    for kind in ("PNG", "GIF", "TIFF", "BMP"):
        np.testing.assert_array_equal(np.asarray(decode_image(saved(palette, kind))), expected)
    ink = np.dstack([rgb(GREY), np.full_like(GREY, 51)])
    found = np.asarray(decode_image(saved(Image.fromarray(ink, "CMYK"), "TIFF"))).astype(float)
    assert np.abs(found - (255 - rgb(GREY).astype(float)) * 204 / 255).max() <= 1
    bars = np.tile(np.array([[0, 255]], dtype=np.uint8), (8, 8))
    for kind in ("PNG", "TIFF", "GIF", "BMP"):
        found = np.asarray(decode_image(saved(Image.fromarray(bars).convert("1"), kind)))
        np.testing.assert_array_equal(found, bars[..., None].repeat(3, -1))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_taken(kind: str) -> None:
    red, blue = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    animated = saved(red, kind, save_all=True, append_images=[blue], **options)
    assert Image.open(io.BytesIO(animated)).n_frames == 2
    assert decode_image(animated).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", [*DEEP, "palette", "alpha", "cmyk"])
def test_pictures_are_converted_rows_by_rows_to_the_same_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = Image.fromarray(np.dstack([rgb(GREY), GREY[:, ::-1]]))
    colors = {"palette": alpha.convert("P"), "alpha": alpha, "cmyk": alpha.convert("CMYK")}
    content = DEEP[kind]() if kind in DEEP else saved(colors[kind], "TIFF" if kind == "cmyk" else "PNG")
    whole = np.asarray(decode_image(content))
    monkeypatch.setattr(decoding, "_BLOCK_PIXELS", 1)
    np.testing.assert_array_equal(np.asarray(decode_image(content)), whole)


def exif_of(*entries: tuple[int, int, bytes]) -> bytes:
    """EXIF data of (tag, type, four bytes of value or place)."""
    return (
        b"Exif\0\0II*\0"
        + struct.pack("<IH", 8, len(entries))
        + b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in entries)
    )


TURNED = (0x0112, 3, b"\6\0\0\0")  # the first row belongs to the right


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        (exif_of(TURNED, (0x011B, 9, struct.pack("<i", -5))), True),  # a negative resolution
        (exif_of(TURNED, (0x011A, 5, b"\xff\xff\xff\x7f")), True),  # one that lies behind the end
        (exif_of(TURNED)[:-3], False),
        (b"Exif\0\0XX*\0" + exif_of(TURNED)[10:], False),
        (b"Exif\0\0", False),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_metadata_that_cannot_be_read_leave_a_sound_picture(kind: str, exif: bytes, turned: bool) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    grey = Image.fromarray(GREY)
    upright = np.asarray(decode_image(saved(grey.convert("RGB"), kind, **options)))
    found = np.asarray(decode_image(saved(grey.convert("RGB"), kind, exif=exif, **options)))
    np.testing.assert_array_equal(found, np.rot90(upright, -1) if turned else upright)


def test_a_png_is_decoded_without_the_chunks_that_change_no_pixel() -> None:
    expected = np.asarray(decode_image(png(GREY, 0, bits=8)))
    content = png(GREY, 0, (b"iCCP", b"p\0\0not zlib"), (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**22))), bits=8)
    np.testing.assert_array_equal(np.asarray(decode_image(content)), expected)
    place = content.index(b"iCCP")
    np.testing.assert_array_equal(np.asarray(decode_image(content[:place] + b"iCCPq" + content[place + 5 :])), expected)
    place = content.index(b"IDAT")
    with pytest.raises(UndecodableError, match="damaged"):
        decode_image(content[: place + 12] + b"\0\1" + content[place + 14 :])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (saved(Image.fromarray(rgb(GREY)), "EPS"), r"a PostScript \(EPS\) drawing, which is not opened"),
        (saved(Image.fromarray(rgb(GREY)), "PDF"), "a PDF document, which is not opened"),
        (saved(Image.fromarray(rgb(GREY)), "DDS"), "a DDS texture, which is not opened"),
        (saved(Image.fromarray(rgb(GREY)), "ICO"), "a set of icons, which is not opened"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIF picture, which is not opened"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isom", "an MP4 file, which is not opened"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"a Git LFS pointer \(git lfs pull gets the picture\)"),
        (b"<!doctype HTML><html>", "a web page, which is not opened"),
        (b"hello", "not an image of a known format"),
        (b"GIF89a", r"damaged \(header of GIF\)"),
    ],
)
def test_what_is_no_picture_is_named_and_never_opened(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow starts `gs` for an EPS, whatever the file's name ends in."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'started'}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UndecodableError, match=f"^{reason}"):
        decode_image(content)
    assert not (tmp_path / "started").exists()


def test_the_thumbnail_of_a_raw_file_is_not_taken_for_the_picture() -> None:
    assert decode_image(tiff(GREY, 8, kind=0)).size == (16, 2)
    with pytest.raises(UndecodableError, match="the first picture in it is marked as a smaller copy"):
        decode_image(tiff(GREY, 8, kind=1))


def test_pillow_and_libtiff_print_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And other warnings stay as they are, whatever threads decode."""
    fax = saved(Image.fromarray(GREY.repeat(9, 0)).convert("1"), "TIFF", compression="group4")
    damaged = fax.replace(fax[8:12], b"\x55\x55\x55\x55", 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)  # Pillow warns of 32
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(reason_of, [damaged, exif_of(TURNED), png(GREY, 0)] * 8))
        assert warnings.filters[1][:3] == ("always", None, Warning)
    assert "".join(capfd.readouterr()) == ""


def test_of_many_frames_only_the_first_is_looked_for() -> None:
    """A GIF that shows its second frame 100,000 times, and a TIFF whose first page is the page after it."""
    first = saved(Image.fromarray(GREY), "GIF")
    both = saved(Image.fromarray(GREY), "GIF", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    second = both[both.rindex(b"\x21\xf9") : -1]
    np.testing.assert_array_equal(decode_image(both[:-1] + 100_000 * second + b";"), decode_image(first))
    ring = bytearray(tiff(GREY, 8))
    entries = int.from_bytes(ring[8:10], "little")
    ring[10 + 12 * entries : 14 + 12 * entries] = struct.pack("<I", 8)
    np.testing.assert_array_equal(decode_image(bytes(ring)), decode_image(first))


def reason_of(content: bytes) -> str:
    try:
        decode_image(content)
    except UndecodableError as error:
        return str(error)
    return "ok"


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, struct.error])
def test_whatever_a_decoder_raises_is_a_reason(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken files make decoders raise what their own code meets first."""

    def broken(self: Image.Image) -> None:
        raise error("bad field 7")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    with pytest.raises(UndecodableError, match=r"damaged \(bad field 7\)"):
        decode_image(png(WIDE, 0))
