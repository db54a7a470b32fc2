"""Splits of labelled images, decided class by class."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from train.errors import InputError

SPLITS = ("train", "validation", "test")

# Folder names of a ready-made split, lower case → split.
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


def split_counts(count: int, validation: float, test: float) -> tuple[int, int, int]:
    """How many of `count` images go to train, validation and test.

    Rounded, and from 3 on at least one to each split whose share is not 0.
    """
    least = 1 if count >= 3 else 0
    n_validation = max(least, round(count * validation)) if validation else 0
    n_test = max(least, round(count * test)) if test else 0
    return count - n_validation - n_test, n_validation, n_test


def stratified_split(
    classes: Mapping[str, Sequence[str]], *, seed: int, validation: float = 0.15, test: float = 0.15
) -> dict[str, str]:
    """Split each class by the same shares.

    A class's split depends on its own name and members and on the seed, not on the other classes.

    Args:
        classes: class name → ids of its readable images.
        seed: of the shuffles.
        validation, test: shares; the rest is train.

    Returns:
        id → "train", "validation" or "test".

    Raises:
        InputError: a class has fewer than three images.
    """
    result: dict[str, str] = {}
    for name in sorted(classes):
        ids = sorted(classes[name])
        if len(ids) < 3:
            raise InputError(
                f"class {name!r} has {len(ids)} image(s), expected at least 3 to split into train, "
                "validation and test; add images, or use --data.split folders (all, where nothing is trained)"
            )
        order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(len(ids))
        n_train, n_validation, _ = split_counts(len(ids), validation, test)
        for position, index in enumerate(order):
            place = 0 if position < n_train else 1 if position < n_train + n_validation else 2
            result[ids[index]] = SPLITS[place]
    return result
