"""Faithfulness, localization, noise and similarity on closed cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from engine.relevance.estimates import estimates, mean_of_pairs, ratio_of_means
from engine.relevance.faithfulness import baseline_images, perturbation_curves, random_maps
from engine.relevance.map_measures import (
    between_images,
    localization,
    noise,
    rank_correlation,
    structural_similarity,
)
from train.errors import InputError


class BrightPatch(torch.nn.Module):
    """Logit of class 1 is the brightness of the top left 4×4 pixels, of class 0 nothing."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        bright = 8 * images[:, 0, :4, :4].mean(dim=(1, 2)) - 4
        return torch.stack([torch.zeros_like(bright), bright], dim=1)


def pictures(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.9


def maps_of(patch: int, count: int = 5) -> torch.Tensor:
    maps = torch.zeros(count, 16)
    maps[:, patch] = 1.0
    return maps.reshape(count, 4, 4)


def test_a_map_that_knows_is_faithful_and_one_that_is_wrong_is_not() -> None:
    images, targets = pictures(), torch.ones(5, dtype=torch.long)
    baseline = baseline_images(images, "mean")
    model = BrightPatch()
    right = perturbation_curves(model, images, baseline, targets, maps_of(0), steps=15)
    with torch.no_grad():
        whole = model(images).softmax(-1)[:, 1].numpy()
        none = model(baseline).softmax(-1)[:, 1].numpy()
    # One patch in 16 decides: with it gone all is gone, with it back all is back.
    np.testing.assert_allclose(right.deletion, np.where(np.arange(17) < 1, whole[:, None], none[:, None]), atol=1e-6)
    np.testing.assert_allclose(right.insertion, np.where(np.arange(17) < 1, none[:, None], whole[:, None]), atol=1e-6)
    area = right.measures()["faithfulness"]
    np.testing.assert_allclose(area, (whole - none) * (1 - 1 / 16), atol=1e-6)
    inverse = perturbation_curves(model, images, baseline, targets, 1 - maps_of(0), steps=15).measures()
    np.testing.assert_allclose(inverse["faithfulness"], -area, atol=1e-6)
    assert np.abs(inverse["deletion_auc"] - right.measures()["insertion_auc"]).max() < 0.07


# Of an odd number of patches there is no half.
@pytest.mark.parametrize(("side", "steps"), [(4, 7), (5, 1), (5, 3), (7, 7)])
def test_insertion_is_negative_perturbation_read_backwards(side: int, steps: int) -> None:
    images, targets = pictures(), torch.ones(5, dtype=torch.long)
    baseline = baseline_images(images, "blur")
    maps = random_maps((5, side, side), seed=4)
    forwards = perturbation_curves(BrightPatch(), images, baseline, targets, maps, steps=steps)
    negative = perturbation_curves(BrightPatch(), images, baseline, targets, -maps, steps=steps)
    np.testing.assert_allclose(forwards.insertion, negative.deletion[:, ::-1], atol=1e-7)
    both = forwards.with_reverse()
    np.testing.assert_allclose(both.deletion, (forwards.deletion + negative.deletion) / 2, atol=1e-7)
    assert (both.measures()["faithfulness"] == 0).all(), "an order and its reverse cancel to the last digit"


def test_an_order_without_knowledge_has_no_area_on_average() -> None:
    images, targets = pictures(400), torch.ones(400, dtype=torch.long)
    baseline = baseline_images(images, "mean")
    for maps in (random_maps((400, 4, 4), seed=1), torch.zeros(400, 4, 4)):  # the order of ties is random
        area = perturbation_curves(BrightPatch(), images, baseline, targets, maps).measures()["faithfulness"]
        assert abs(area.mean()) < 4 * area.std() / 20


class LessSure(torch.nn.Module):
    """What a model says, mixed with knowing nothing: probabilities of two classes, each `sure` of the way from 1/2."""

    def __init__(self, model: torch.nn.Module, sure: float) -> None:
        super().__init__()
        self.model, self.sure = model, sure

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.sure * self.model(images).softmax(-1) + (1 - self.sure) / 2).log()


def test_a_share_of_the_rise_does_not_depend_on_how_sure_a_model_is() -> None:
    images, targets = pictures(), torch.ones(5, dtype=torch.long)
    baseline, maps = baseline_images(images, "mean"), maps_of(0)
    maps[:, 1, 1] = 2.0  # a patch that does nothing comes first

    def of(sure: float, maps: torch.Tensor) -> dict[str, np.ndarray]:
        model = LessSure(BrightPatch(), sure)
        values = perturbation_curves(model, images, baseline, targets, maps, steps=15).measures()
        return {name: numbers.mean() for name, numbers in estimates(values).items()}

    sure, unsure, better = of(1.0, maps), of(0.3, maps), of(0.3, maps_of(0))
    assert sure["faithfulness"] > 3 * unsure["faithfulness"]
    for name in ("deletion_auc_normalised", "insertion_auc_normalised", "faithfulness_normalised"):
        assert sure[name] == pytest.approx(unsure[name], abs=1e-6)
    # The patch that decides is the second or the first of 16: that much is lost at each end of the curve.
    assert sure["faithfulness_normalised"] == pytest.approx(1 - 3 / 16, abs=1e-5)
    assert better["faithfulness_normalised"] == pytest.approx(1 - 1 / 16, abs=1e-5)
    assert better["faithfulness"] < sure["faithfulness"], "the better order of the less sure model"


def test_a_ratio_of_means_and_its_error() -> None:
    random = np.random.default_rng(0)
    wholes = random.gamma(2.0, 0.2, (400, 50)) - 0.1
    parts = 0.6 * wholes + random.normal(0, 0.1, wholes.shape)
    values = np.stack([ratio_of_means(part, whole) for part, whole in zip(parts, wholes, strict=True)])
    np.testing.assert_allclose(values.mean(axis=1), parts.mean(axis=1) / wholes.mean(axis=1))
    error = np.sqrt(values.var(axis=1, ddof=1).mean() / 50)
    assert values.mean(axis=1).std() == pytest.approx(error, rel=0.1), "their scatter is the ratio's"
    by_image = parts / np.where(wholes > 0.05, wholes, np.nan)
    assert np.nanmean(by_image, axis=1).std() > 1.5 * error, "a mean of ratios scatters more, without a sixth of them"

    parts[0, 3] = np.nan
    one = ratio_of_means(parts[0], wholes[0])
    assert np.isnan(one[3])
    assert np.nanmean(one) == pytest.approx(np.delete(parts[0], 3).mean() / np.delete(wholes[0], 3).mean())
    for whole in (wholes[0] - wholes[0].mean(), -wholes[0], wholes[0, :1], np.array([0.9, -0.3])):
        assert np.isnan(ratio_of_means(np.ones(len(whole)), whole)).all(), "no clear rise"
    np.testing.assert_allclose(ratio_of_means(np.array([1.0, 3.0]), np.array([2.0, 2.0])), [0.5, 1.5])


def test_curves_do_not_depend_on_the_batch_and_leave_the_model_alone() -> None:
    images, targets = pictures(), torch.ones(5, dtype=torch.long)
    baseline, maps = baseline_images(images, "blur"), random_maps((5, 4, 4), seed=2)
    model = BrightPatch().train()
    one = perturbation_curves(model, images, baseline, targets, maps, batch_size=1)
    all_at_once = perturbation_curves(model, images, baseline, targets, maps, batch_size=64)
    np.testing.assert_allclose(one.deletion, all_at_once.deletion, atol=1e-7)
    assert model.training


def test_the_blurred_baseline_keeps_the_mean_and_loses_the_detail() -> None:
    images = torch.rand(3, 2, 48, 32, generator=torch.Generator().manual_seed(0))
    blurred = baseline_images(images, "blur")
    assert blurred.shape == images.shape
    assert float((blurred.mean(dim=(2, 3)) - images.mean(dim=(2, 3))).abs().max()) < 0.03
    assert float(blurred.std()) < 0.15 * float(images.std())
    flat = torch.full((1, 1, 20, 20), 0.7)
    torch.testing.assert_close(baseline_images(flat, "blur"), flat)
    with pytest.raises(InputError, match="expected one of blur, mean"):
        baseline_images(images, "black")


def test_bad_requests_are_one_sentence() -> None:
    images, targets = pictures(), torch.ones(5, dtype=torch.long)
    with pytest.raises(InputError, match=r"relevance\.steps is 0"):
        perturbation_curves(BrightPatch(), images, images, targets, maps_of(0), steps=0)
    with pytest.raises(InputError, match="4 maps for 5 images"):
        perturbation_curves(BrightPatch(), images, images, targets, maps_of(0, count=4))


def test_localization_of_known_maps() -> None:
    coverage = np.zeros((4, 2, 16))
    coverage[:, 0, :2] = 1.0  # the first two patches
    coverage[:, 1, 5] = 0.4  # no patch covered by half
    maps = np.zeros((4, 16))
    maps[0, 0] = 2.0  # on the first region
    maps[1, 5] = 1.0  # on the second
    maps[2, [0, 9]] = 1.0  # a peak on it and one off it
    found = localization(maps.reshape(4, 4, 4), coverage)
    np.testing.assert_array_equal(found["region_hit"][:, 0], [1, 0, 0.5, np.nan])
    np.testing.assert_allclose(found["region_share"][:3], [[1, 0], [0, 0.4], [0.5, 0]])
    # The first map's second place is shared by 15 patches, one of them in the region: 16/15 over 4 − 16/15.
    np.testing.assert_allclose(found["region_overlap"][:3, 0], [4 / 11, 1 / 29, 1 / 3])
    assert np.isnan(found["region_overlap"][:, 1]).all(), "a region that covers no patch by half has no overlap"
    assert np.isnan(found["region_hit"][3]).all(), "a map of zeros points nowhere"


def test_overlap_does_not_depend_on_the_corner_a_region_lies_in() -> None:
    maps = np.zeros((1, 8, 8))
    maps[0, 7, 7] = 1.0  # one positive patch, at the bottom right
    coverage = np.zeros((1, 4, 8, 8))
    for region, (row, col) in enumerate([(0, 0), (0, 4), (6, 0), (6, 4)]):
        coverage[0, region, row : row + 2, col : col + 4] = 1.0
    overlap = localization(maps, coverage.reshape(1, 4, 64))["region_overlap"][0]
    # Seven places for 63 patches of 0: eight of them in a region hold 8/9; with the peak, seven of them and 1.
    np.testing.assert_allclose(overlap, [8 / 136, 8 / 136, 8 / 136, 1 / 8])


def test_noise_of_known_maps() -> None:
    checkerboard = np.indices((6, 6)).sum(axis=0) % 2.0
    uniform = np.ones((6, 6))
    found = noise(np.stack([checkerboard, uniform, np.zeros((6, 6)), -uniform]))
    np.testing.assert_allclose(found["total_variation"][:2], [2.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(found["map_entropy"][:2], [np.log(18), np.log(36)])
    np.testing.assert_allclose(found["map_morans_i"][0], -1.0)
    assert np.isnan(found["map_morans_i"][1]), "a constant map has no Moran's I"
    assert all(np.isnan(values[2:]).all() for values in found.values())
    scaled = noise(np.stack([checkerboard]) * 7)
    np.testing.assert_allclose(scaled["total_variation"], 2.0)


def test_rank_correlation_equals_scipys() -> None:
    random = np.random.default_rng(0)
    a, b = np.round(random.random((6, 5, 7)), 1), np.round(random.random((6, 5, 7)), 1)  # with ties
    b[5] = 0.3
    found = rank_correlation(a, b)
    expected = [stats.spearmanr(x.ravel(), y.ravel()).statistic for x, y in zip(a[:5], b[:5], strict=True)]
    np.testing.assert_allclose(found[:5], expected, atol=1e-12)
    assert np.isnan(found[5])


def test_structural_similarity_of_known_pairs() -> None:
    random = np.random.default_rng(0)
    maps = random.random((3, 14, 14))
    np.testing.assert_allclose(structural_similarity(maps, maps), 1.0)
    np.testing.assert_allclose(structural_similarity(maps, 9 * maps), 1.0)
    assert (np.abs(structural_similarity(maps, random.random((3, 14, 14)))) < 0.8).all()
    assert (structural_similarity(maps, maps.max() - maps) < 0.1).all()
    assert np.isnan(structural_similarity(maps, np.zeros_like(maps))).all()
    # Two constants: the luminance term alone.
    flat = structural_similarity(np.ones((1, 8, 8)), np.ones((1, 8, 8)) * 0.5)
    np.testing.assert_allclose(flat, 1.0)


def test_likeness_between_images_is_the_mean_over_all_others() -> None:
    random = np.random.default_rng(0)
    for count in (2, 5, 6):
        maps = random.random((count, 4, 3))
        found = between_images(maps, rank_correlation)
        pairs = np.array([[stats.spearmanr(a.ravel(), b.ravel()).statistic for b in maps] for a in maps])
        np.testing.assert_allclose(found, (pairs.sum(axis=1) - 1) / (count - 1), atol=1e-12)
    maps[1] = 0.5
    found = between_images(maps, rank_correlation)
    assert np.isnan(found[1]), "a constant map has no rank correlation"
    np.testing.assert_allclose(found[[0, 2, 3, 4, 5]], between_images(maps[[0, 2, 3, 4, 5]], rank_correlation))
    assert np.isnan(between_images(maps[:1], structural_similarity)).all()


def test_the_mean_over_pairs_scatters_as_its_numbers_say() -> None:
    random = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(200):  # maps that prefer one place, more or less
        maps = random.normal(0, 1, (25, 4, 4)) + random.gamma(1.0, 2.0, (25, 1, 1)) * np.eye(4)
        numbers = mean_of_pairs(by_image := between_images(maps, rank_correlation))
        assert numbers.mean() == pytest.approx(by_image.mean())
        means.append(numbers.mean())
        errors.append(numbers.var(ddof=1) / 25)
    assert np.std(means) == pytest.approx(np.sqrt(np.mean(errors)), rel=0.15)


def test_likeness_of_classes_is_what_exceeds_that_of_images() -> None:
    """Maps that prefer the centre are alike without knowing image or class; only the image's own part exceeds that."""
    random = np.random.default_rng(0)
    centre = np.exp(-((np.indices((7, 7)) - 3) ** 2).sum(axis=0) / 6)
    of_image = random.normal(0, 0.2, (60, 7, 7))
    excess = []
    for share in (0.0, 1.0):
        maps, others = (centre + share * of_image + random.normal(0, 0.02, of_image.shape) for _ in range(2))
        values = dict.fromkeys(("deletion_auc", "insertion_auc", "faithfulness", "p_none"), np.zeros(60))
        values["p_whole"] = np.ones(60)
        values["class_rank_correlation"] = rank_correlation(maps, others)
        values["image_rank_correlation"] = between_images(maps, rank_correlation)
        assert values["class_rank_correlation"].mean() > 0.9
        excess.append(estimates(values)["class_rank_correlation_excess"].mean())
        assert excess[-1] == pytest.approx(
            rank_correlation(maps, others).mean() - values["image_rank_correlation"].mean()
        )
    assert abs(excess[0]) < 0.01
    assert excess[1] > 0.3
