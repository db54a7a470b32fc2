"""Data that ships with a dependency: scenes composed of scikit-learn's 1,797 handwritten digits.

A scene holds one large bright digit, one small dim digit, a dim fragment of a third, a smooth background and noise. The
source task is to name the large digit, the target task the small one, so that fine-tuning has to move attention from
one place to another, and both places are known: every scene keeps the boxes of its two digits. Digits are split into
train, validation and test before anything is composed of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from train.data.images import DataSplits, ImageSet, Preprocessing
from train.data.manifest import SPLITS, Manifest, Record, redrawn_rule
from train.errors import InputError, require_known

SCENE_SIZE = 48  # px, square
TASKS = ("source", "target")
REGION_NAMES = ("source_digit", "target_digit")
CLASS_NAMES = tuple("0123456789")

_SHARES = (0.66, 0.17)  # train, validation of the source digits; the rest is test
_GAP = 1  # px between the boxes of two things in a scene
_VISIBLE = 0.15  # share of full ink from which a pixel belongs to a digit's box


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Ink of scikit-learn's digits in 0..1, float64 [digit, 10, 10] with an empty cell all round, and their classes."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return np.pad(loaded.images / 16.0, ((0, 0), (1, 1), (1, 1))), loaded.target


@lru_cache(maxsize=8)
def split_digits(seed: int, draw: int | None = None) -> dict[str, tuple[np.ndarray, ...]]:
    """Which source digits each split may be composed of: split → indices into `load_digits()` for each class.

    `draw`, where it is given, draws those of train and validation again; those of test stay.
    """
    _, classes = _digits()
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for label in range(len(CLASS_NAMES)):
        members = np.random.default_rng([seed, label]).permutation(np.flatnonzero(classes == label))
        ends = np.cumsum([round(share * len(members)) for share in _SHARES])
        if draw is not None:
            members[: ends[-1]] = np.random.default_rng([draw, label, 1]).permutation(members[: ends[-1]])
        for split, part in zip(SPLITS, np.split(members, ends), strict=True):
            parts[split].append(part)
    return {split: tuple(part) for split, part in parts.items()}


@dataclass(frozen=True)
class _Scene:
    pixels: np.ndarray  # uint8 [row, col]
    classes: tuple[int, int]  # of the large and of the small digit
    boxes: np.ndarray  # int32 [region, (row0, col0, row1, col1)], half-open


def compose_scene(seed: int, task: str, split: str, index: int, draw: int | None = None) -> _Scene:
    """One scene, a function of its arguments alone; `draw` is of `split_digits`."""
    own = () if draw is None else (draw,)
    rng = np.random.default_rng([seed, TASKS.index(task), SPLITS.index(split), index, *own])
    members = split_digits(seed, draw)[split]
    ink, _ = _digits()
    classes = rng.integers(len(CLASS_NAMES), size=3).tolist()
    large, small, other = (ink[members[label][rng.integers(len(members[label]))]] for label in classes)
    fragment = np.zeros_like(other)  # 3×3 of the 8×8 cells
    row, col = rng.integers(2, 6, size=2).tolist()
    fragment[row : row + 3, col : col + 3] = other[row : row + 3, col : col + 3]
    shapes = [_warp(rng, large, 20, 25), _warp(rng, small, 16, 20), _warp(rng, fragment, 16, 20)]
    brightness = rng.uniform((0.85, 0.55, 0.4), (1.0, 0.7, 0.6)).tolist()
    boxes = _place(rng, [shape.shape for shape in shapes])
    smoothing = _smoothing()
    picture = np.asarray(smoothing @ rng.uniform(0.0, 0.3, (4, 4)) @ smoothing.T)
    for shape, bright, (row0, col0, row1, col1) in zip(shapes, brightness, boxes.tolist(), strict=True):
        view = picture[row0:row1, col0:col1]
        view += shape * (bright - view)
    picture += 0.03 * rng.standard_normal(picture.shape)
    pixels = np.rint(picture.clip(0, 1) * 255).astype(np.uint8)
    return _Scene(pixels, (classes[0], classes[1]), boxes[:2])


def _warp(rng: np.random.Generator, cells: np.ndarray, least_px: float, most_px: float) -> np.ndarray:
    """A digit's 8×8 cells drawn at a size, rotated ±0.2 rad, sheared ±0.15, aspect e^±0.1, cut to what is visible."""
    size, angle, shear, stretch = rng.uniform((least_px, -0.2, -0.15, -0.1), (most_px, 0.2, 0.15, 0.1)).tolist()
    scale, aspect = size / 8, math.exp(stretch)
    cos, sin = math.cos(angle), math.sin(angle)
    # px → cell in (row, col): the inverse of a turn after a shear and a stretch.
    inverse = np.array([[1 / aspect, 0.0], [-shear, aspect]]) @ np.array([[cos, sin], [-sin, cos]]) / scale
    side = math.ceil(size * 1.5)
    offset = (len(cells) - 1) / 2 - inverse.sum(axis=1) * (side - 1) / 2
    drawn = ndimage.affine_transform(cells, inverse, offset=offset, output_shape=(side, side), order=1)
    visible = drawn > _VISIBLE
    rows, cols = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    if not len(rows):  # a fragment from an empty corner
        return np.zeros((1, 1))
    return np.asarray(drawn[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])


def _place(rng: np.random.Generator, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Boxes for all shapes inside the scene that do not touch, int32 [shape, 4]; the first of many tries that fits."""
    sizes = np.array(shapes)
    for _ in range(100):
        first = rng.integers(0, SCENE_SIZE - sizes + 1, size=(64, *sizes.shape))  # [try, shape, (row, col)]
        last = first + sizes + _GAP
        apart = (first[:, :, None] >= last[:, None]).any(axis=-1)  # [try, shape, other]: below or right of it
        fits = (apart | apart.swapaxes(1, 2) | np.eye(len(sizes), dtype=bool)).all(axis=(1, 2))
        if fits.any():
            corners = first[fits.argmax()]
            return np.concatenate([corners, corners + sizes], axis=1).astype(np.int32)
    raise RuntimeError(f"found no place for shapes of {sizes.tolist()} px in a {SCENE_SIZE} px scene")


@lru_cache(maxsize=1)
def _smoothing() -> np.ndarray:
    """4 knots → a scene's side, piecewise linear, [px, knot]."""
    at = np.linspace(0, 3, SCENE_SIZE)
    return np.stack([np.interp(at, np.arange(4), np.eye(4)[knot]) for knot in range(4)], axis=1)


class DigitScenes(ImageSet):
    """Composed scenes of one task and split, kept in memory (2.3 kB a scene)."""

    region_names = REGION_NAMES
    boxes: np.ndarray

    def __init__(
        self, *, task: str, split: str, count: int, seed: int, preprocessing: Preprocessing, draw: int | None = None
    ) -> None:
        """Compose `count` scenes; the first of a longer set are those of a shorter one; `draw` is of `split_digits`."""
        if count < 1:
            raise InputError(f"{count} {split} scenes were asked for, expected at least 1")
        takes = (preprocessing.channels, preprocessing.height_px, preprocessing.width_px)
        if takes != (1, SCENE_SIZE, SCENE_SIZE):
            raise InputError(
                f"data.kind digits makes {SCENE_SIZE}×{SCENE_SIZE} grey scenes, but the model takes "
                f"{takes[1]}×{takes[2]} with {takes[0]} channel(s); use --model.name digits_vit, or --data.kind folder"
            )
        name = f"{task}/{split}" if draw is None else f"{task}/{split}/seed{draw}"
        indices = tqdm(range(count), desc=f"composing {name}", unit=" scenes", disable=None, delay=1)
        composed = [compose_scene(seed, task, split, index, draw) for index in indices]
        self.task, self.split = task, split
        self.scenes = np.stack([scene.pixels for scene in composed])  # uint8 [scene, row, col]
        self.boxes = np.stack([scene.boxes for scene in composed])
        # The class in each box, [scene, region]; `labels` is the task's column of it.
        self.both_labels = np.array([scene.classes for scene in composed], dtype=np.int64)
        self.ids = tuple(f"{name}/{index:05d}" for index in range(count))
        self.labels = self.both_labels[:, TASKS.index(task)].copy()
        self.class_names = CLASS_NAMES
        self.preprocessing = preprocessing

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.asarray(self.scenes[np.asarray(indices)][:, None])

    def records(self) -> tuple[Record, ...]:
        """One a scene; the hash is of pixels, boxes and classes."""
        scenes = zip(self.scenes, self.boxes, self.both_labels, strict=True)
        hashes = [hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() for parts in scenes]
        return tuple(
            Record(identity, int(label), CLASS_NAMES[label], self.split, "ok", sha256)
            for identity, label, sha256 in zip(self.ids, self.labels, hashes, strict=True)
        )


def prepare_digits(
    *,
    preprocessing: Preprocessing,
    task: str = "target",
    seed: int = 42,
    train_scenes: int = 8000,
    validation_scenes: int = 1024,
    test_scenes: int = 1024,
    draw: int | None = None,
) -> DataSplits:
    """The scenes of one task in three splits that share no source digit; for a model that takes 48×48 grey alone.

    `draw`, where it is given, draws training and validation scenes again, and the digits that they are composed of;
    test scenes stay.
    """
    require_known("task", task, TASKS)
    counts = (train_scenes, validation_scenes, test_scenes)
    train, validation, test = sets = [
        DigitScenes(
            task=task,
            split=split,
            count=count,
            seed=seed,
            preprocessing=preprocessing,
            draw=None if split == "test" else draw,
        )
        for split, count in zip(SPLITS, counts, strict=True)
    ]
    records = sorted((record for scenes in sets for record in scenes.records()), key=lambda record: record.id)
    rule = "source digits 66/17/17"
    rule = rule if draw is None else redrawn_rule(rule, draw)
    manifest = Manifest("digits", "", CLASS_NAMES, tuple(records), rule)
    return DataSplits(train, validation, test, manifest)
