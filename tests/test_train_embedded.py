"""Digit scenes: a function of their names, splits that share no digit, boxes that hold the digits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from kernels.layout import TokenLayout
from train.data.digits import SCENE_SIZE, DigitScenes, compose_scene, prepare_digits, split_digits
from train.data.images import Preprocessing, region_coverage
from train.errors import InputError
from train.pretrain import token_targets

GREY = Preprocessing(
    channels=1,
    height_px=SCENE_SIZE,
    width_px=SCENE_SIZE,
    mean=(0.25,),
    std=(0.25,),
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="center",
)
LAYOUT = TokenLayout(grid_rows=8, grid_cols=8, num_prefix_tokens=1, patch_height_px=6, patch_width_px=6)


def scenes(count: int = 40, **changes: object) -> DigitScenes:
    arguments = {"task": "target", "split": "test", "count": count, "seed": 42, "preprocessing": GREY, **changes}
    return DigitScenes(**arguments)  # type: ignore[arg-type]


def test_a_scene_depends_on_seed_task_split_and_index_alone() -> None:
    few, many = scenes(5), scenes(9)
    np.testing.assert_array_equal(few.scenes, many.scenes[:5])
    assert few.ids == ("target/test/00000", "target/test/00001", "target/test/00002", "target/test/00003", few.ids[4])
    reference = compose_scene(42, "target", "test", 3)
    np.testing.assert_array_equal(reference.pixels, few.scenes[3])
    for other in ((43, "target", "test", 3), (42, "source", "test", 3), (42, "target", "train", 3)):
        assert (compose_scene(*other).pixels != reference.pixels).any()


def test_splits_share_no_source_digit_and_use_all() -> None:
    parts = {split: np.concatenate(classes) for split, classes in split_digits(42).items()}
    together = np.concatenate(list(parts.values()))
    assert len(together) == len(set(together.tolist())) == 1797
    shares = {split: len(part) / 1797 for split, part in parts.items()}
    assert shares == pytest.approx({"train": 0.66, "validation": 0.17, "test": 0.17}, abs=0.005)
    for classes in split_digits(42).values():
        assert len(classes) == 10
        assert min(map(len, classes)) > 20


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_draws_scenes_of_its_own_and_no_test_digit(seed: int) -> None:
    fixed, drawn = split_digits(42), split_digits(42, seed)
    for label in range(10):
        np.testing.assert_array_equal(drawn["test"][label], fixed["test"][label])
        for split in ("train", "validation"):
            assert len(drawn[split][label]) == len(fixed[split][label])
            assert set(drawn[split][label]) != set(fixed[split][label])
        rest = (np.concatenate([of["train"][label], of["validation"][label]]) for of in (drawn, fixed))
        assert set(next(rest)) == set(next(rest))
    prepare = partial(prepare_digits, preprocessing=GREY, train_scenes=12, validation_scenes=6, test_scenes=6)
    one, own = prepare(), prepare(draw=seed)
    np.testing.assert_array_equal(own.test.pixels(range(6)), one.test.pixels(range(6)))
    assert own.test.ids == one.test.ids
    for images, others in ((own.train, one.train), (own.validation, one.validation)):
        assert not np.array_equal(images.pixels(range(len(images))), others.pixels(range(len(images))))
        assert not set(images.ids) & set(others.ids)
    assert own.train.ids[0] == f"target/train/seed{seed}/00000"
    assert own.manifest.split("test") == one.manifest.split("test")


def test_boxes_hold_the_digits_and_do_not_touch() -> None:
    data = scenes(60)
    for picture, boxes in zip(data.scenes.astype(float) / 255, data.boxes, strict=True):
        outside = np.ones_like(picture, dtype=bool)
        peaks = []
        for row0, col0, row1, col1 in boxes:
            assert 0 <= row0 < row1 <= SCENE_SIZE
            assert 0 <= col0 < col1 <= SCENE_SIZE
            assert outside[row0:row1, col0:col1].all(), "the boxes overlap"
            outside[row0:row1, col0:col1] = False
            peaks.append(picture[row0:row1, col0:col1].max())
        # The large digit (brightness ≥ .85) is the only thing so bright: none of it lies outside its box.
        assert peaks[0] > peaks[1]
        assert picture[outside].max() < 0.75 < peaks[0]
    large, small = np.diff(data.boxes[:, :, [0, 2]], axis=-1)[..., 0].mean(axis=0)
    assert large > small > 10


def test_labels_are_of_the_task_and_all_classes_occur() -> None:
    target, source = scenes(300), scenes(300, task="source")
    np.testing.assert_array_equal(target.labels, target.both_labels[:, 1])
    np.testing.assert_array_equal(source.labels, source.both_labels[:, 0])
    assert set(target.labels.tolist()) == set(range(10))


def test_batch_picture_and_regions() -> None:
    data = scenes(4)
    batch = data.batch([2, 0])
    assert batch.shape == (2, 1, SCENE_SIZE, SCENE_SIZE)
    np.testing.assert_allclose(batch[0, 0].numpy() * 0.25 + 0.25, data.scenes[2] / 255, atol=1e-6)
    picture = data.picture(1)
    assert picture.shape == (SCENE_SIZE, SCENE_SIZE, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[..., 2], data.scenes[1])
    regions = data.regions(LAYOUT)
    assert regions.shape == (4, 2, 64)
    assert regions.dtype == np.float32
    assert data.region_names == ("source_digit", "target_digit")


def test_region_coverage_is_the_share_of_each_patch() -> None:
    layout = TokenLayout(grid_rows=2, grid_cols=3, num_prefix_tokens=1, patch_height_px=4, patch_width_px=5)
    boxes = np.array([[[0, 0, 4, 5], [2, 3, 7, 10]]])
    covered = region_coverage(boxes, layout)[0]
    np.testing.assert_allclose(covered[0], [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(covered[1], [0.5 * 0.4, 0.5, 0, 0.75 * 0.4, 0.75, 0], rtol=1e-6)
    # By counting pixels.
    mask = np.zeros((8, 15))
    mask[2:7, 3:10] = 1
    np.testing.assert_allclose(covered[1], mask.reshape(2, 4, 3, 5).mean(axis=(1, 3)).ravel(), rtol=1e-6)
    with pytest.raises(ValueError, match="leaves the 8×15 px image"):
        region_coverage(np.array([[[0, 0, 9, 5]]]), layout)
    with pytest.raises(ValueError, match="expected"):
        region_coverage(np.zeros((3, 4)), layout)


def test_token_targets_are_the_digit_under_each_patch_centre() -> None:
    data = scenes(20)
    targets = token_targets(data, (8, 8), 6)
    for scene in range(20):
        for patch in range(64):
            row, col = divmod(patch, 8)
            centre = (row * 6 + 3, col * 6 + 3)
            expected = 10
            for region, (row0, col0, row1, col1) in enumerate(data.boxes[scene]):
                if row0 <= centre[0] < row1 and col0 <= centre[1] < col1:
                    expected = data.both_labels[scene, region]
            assert targets[scene, patch] == expected


def test_manifest_of_scenes_names_their_content() -> None:
    arguments = {"preprocessing": GREY, "train_scenes": 3, "validation_scenes": 2, "test_scenes": 2}
    one, same = prepare_digits(**arguments), prepare_digits(**arguments)
    other = prepare_digits(**arguments, seed=1)
    assert one.manifest.sha256 == same.manifest.sha256 != other.manifest.sha256
    assert [record.id for record in one.manifest.split("test")] == list(one.test.ids)
    assert not one.manifest.dropped


def test_bad_requests_are_refused_in_one_sentence() -> None:
    with pytest.raises(InputError, match="0 test scenes"):
        scenes(0)
    wide = replace(GREY, channels=3, height_px=224, width_px=224)
    with pytest.raises(InputError, match="224×224 with 3 channel"):
        scenes(2, preprocessing=wide)
    with pytest.raises(InputError, match="unknown task 'big'"):
        prepare_digits(preprocessing=GREY, task="big")
