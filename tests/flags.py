"""Flags of a test's own beside those that its file shares, as each is given once."""

from __future__ import annotations

from collections.abc import Sequence


def flags(usual: Sequence[str], own: Sequence[str]) -> list[str]:
    """`usual` flags, each with its value, but for those that a test has of its `own`, which follow."""
    kept = [pair for pair in zip(usual[::2], usual[1::2], strict=True) if pair[0] not in own[::2]]
    return [*(word for pair in kept for word in pair), *own]
