"""Device code that reads stored maps: a thread's columns of one row of the grid.

Rows of halves begin anywhere, so a thread reads the aligned 16 bytes that hold its columns, twice, and shifts them into
place: two loads for up to nine columns, where each load of a warp touches sixteen rows or so.
"""

# Triton types device code: its parameters take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,var-annotated,assignment,misc"
# Nor does it know starred tuples.
# ruff: noqa: RUF005

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from kernels.cuda.triton_rows import widened


@triton.jit
def shifted(low, high, shift, FAST: tl.constexpr):
    """The word that begins `shift` bits, 0 or 16, into two of them."""
    if FAST:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return tl.where(shift == 0, low, ((low >> 16) & 0xFFFF) | (high << 16))


@triton.jit
def four_words(address, left, FAST: tl.constexpr):
    """Of 16 aligned bytes of which `left` are the row's own, if any; of what they lie in, the cache is to get 128."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $5, 0; @p ld.global.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4]; }",
            "=&r,=&r,=&r,=&r,l,r",
            [address, left],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        at = address.to(tl.pointer_type(tl.int32), bitcast=True)
        words = ()
        for j in tl.static_range(4):
            words = words + (tl.load(at + j, mask=left > 0, other=0),)
        return words


@triton.jit
def first_half(word, IS_BFLOAT16: tl.constexpr):
    return widened((word & 0xFFFF).to(tl.int16), True) if IS_BFLOAT16 else as_half(word)


@triton.jit
def second_half(word, IS_BFLOAT16: tl.constexpr):
    return (word & -65536).to(tl.float32, bitcast=True) if IS_BFLOAT16 else as_half(word >> 16)


@triton.jit
def as_half(word):
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def loaded(
    place, r, stride_k,
    GRID_COLS: tl.constexpr, LOADS: tl.constexpr, SURE: tl.constexpr, WORDS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What holds a thread's columns in row r of the grid, and the next column.

    WORDS: eight words, of 16 aligned bytes each four; the bytes that the columns begin after are the last element.
    Otherwise the first SURE loads lie in the row for every thread; the others have pointers of their own, `ends`.
    """
    raw = ()
    if WORDS:
        base, offset, size = place
        here = offset + r * (GRID_COLS * 2)
        vector = here & -16
        address = base + vector.to(tl.int64)
        raw = four_words(address, size, FAST) + four_words(address + 16, size - 16 - vector, FAST) + (here,)
    else:
        at, ends = place
        for j in tl.static_range(LOADS):
            if j < SURE:
                raw = raw + (tl.load(at + r * GRID_COLS * stride_k + j * stride_k),)
            else:
                raw = raw + (tl.load(ends[j - SURE] + r * GRID_COLS * stride_k),)
    return raw


@triton.jit
def loaded_row(
    places, r, stride_k, MAPS: tl.constexpr,
    GRID_COLS: tl.constexpr, LOADS: tl.constexpr, SURE: tl.constexpr, WORDS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    raws = ()
    for k in tl.static_range(MAPS):
        raws = raws + (loaded(places[k], r, stride_k, GRID_COLS, LOADS, SURE, WORDS, FAST),)
    return raws


@triton.jit
def in_place(raw):
    """The words from the one on that holds a thread's first column: at most nine halves."""
    two, one = raw[8] & 8 != 0, raw[8] & 4 != 0
    half_way, words = (), ()
    for j in tl.static_range(6):
        half_way = half_way + (tl.where(two, raw[j + 2], raw[j]),)
    for j in tl.static_range(5):
        words = words + (tl.where(one, half_way[j + 1], half_way[j]),)
    return words


@triton.jit
def columns_of(
    raw, is_full, GRID_COLS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
    IS_BFLOAT16: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """float32 of a thread's columns and of the next one; then sign bits."""
    x = ()
    bits = tl.zeros_like(is_full.to(tl.int32))
    if WORDS:
        words = in_place(raw)
        shift = (raw[8] & 2) * 8
        for j in tl.static_range((SLOTS + 1) // 2):
            word = shifted(words[j], words[min(j + 1, (SLOTS + 2) // 2 - 1)], shift, FAST)
            # Only a thread's own columns: the next one may lie outside the map.
            if 2 * j + 1 < WIDTH:
                bits |= word
            elif 2 * j < WIDTH:
                bits |= word & 0x8000
            x = x + (first_half(word, IS_BFLOAT16), second_half(word, IS_BFLOAT16))
    else:
        for j in tl.static_range(SLOTS):
            x = x + (widened(raw[j], IS_BFLOAT16),)
            if j < WIDTH:
                bits |= x[j].to(tl.int32, bitcast=True)
    cut: tl.constexpr = GRID_COLS % WIDTH if GRID_COLS % WIDTH else WIDTH
    there = ()
    for j in tl.static_range(SLOTS):
        there = there + (tl.where(is_full, x[j], 0.0) if j >= cut and j < WIDTH else x[j],)
    return there, bits
