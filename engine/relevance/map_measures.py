"""Numbers of single maps and of pairs of maps: where they point, how noisy they are, how alike two of them are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from engine.statistics import Floats, defined_mean
from kernels import TokenLayout
from kernels.reference import entropy, morans_i

# Wang et al. (2004), doi:10.1109/TIP.2003.819861: the window's standard deviation and the two stabilisers.
_SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 1.5, 0.01, 0.03
_SSIM_TRUNCATE = 3.5


def localization(maps: Floats, coverage: Floats) -> dict[str, Floats]:
    """Whether maps fall on annotated regions, [image, region] each; NaN where a map has no positive value.

    `region_hit`: 1 where the map's peak lies on a patch that the region covers by half or more (the pointing game of
    Zhang et al., doi:10.1007/s11263-017-1059-x; a peak that several patches share counts by its share);
    `region_share`: the region's share of the map's mass, patches weighted by coverage;
    `region_overlap`: intersection over union of those patches and as many of the map's greatest ones, among which
    patches of equal value share the places that are left for them;
    `region_area`: the region's share of the area, which is its share of an even map.
    Maps are [image, row, col], and what is negative counts as 0; coverage is [image, region, patch].
    """
    flat = np.maximum(maps.reshape(len(maps), 1, -1), 0.0)
    inside = coverage >= 0.5
    defined = flat.max(axis=2) > 0
    total = np.where(defined, flat.sum(axis=2), 1.0)
    peak = flat == flat.max(axis=2, keepdims=True)
    hit = (peak & inside).sum(axis=2) / peak.sum(axis=2)
    share = (flat * coverage).sum(axis=2) / total
    size = inside.sum(axis=2)
    common = (_greatest(flat, size) * inside).sum(axis=2)
    overlap = common / np.where(size > 0, 2 * size - common, np.nan)
    found = {"region_hit": hit, "region_share": share, "region_overlap": overlap}
    measures = {name: np.where(defined, value, np.nan) for name, value in found.items()}
    return measures | {"region_area": coverage.mean(axis=2)}


def _greatest(flat: Floats, size: NDArray[np.int64]) -> Floats:
    """How far each patch is among the `size` [image, region] greatest of flat [image, 1, patch], 0 to 1."""
    ordered = -np.sort(-flat[:, 0], axis=1)
    least = np.take_along_axis(ordered, np.maximum(size - 1, 0), axis=1)[..., None]
    above, equal = flat > least, flat == least
    left = size[..., None] - above.sum(axis=2, keepdims=True)
    return np.asarray(above + equal * left / equal.sum(axis=2, keepdims=True))


def noise(maps: Floats) -> dict[str, Floats]:
    """How noisy maps [image, row, col] are; what is negative counts as 0, and a map without a positive value is NaN.

    `total_variation` [image]: mean absolute difference of neighbouring patches, in units of the map's mean;
    `map_entropy` (nat) and `map_morans_i` of the map as a distribution over patches: the kernels' definitions.
    """
    positive = np.maximum(maps, 0.0)
    mean = positive.mean(axis=(1, 2))
    scaled = positive / np.where(mean > 0, mean, np.nan)[:, None, None]
    steps = [np.abs(np.diff(scaled, axis=axis)).reshape(len(maps), -1) for axis in (1, 2)]
    rows, cols = maps.shape[1:]
    layout = TokenLayout(grid_rows=rows, grid_cols=cols, num_prefix_tokens=0, patch_height_px=1, patch_width_px=1)
    row = scaled.reshape(1, len(maps), -1) / (rows * cols)
    return {
        "total_variation": np.concatenate(steps, axis=1).mean(axis=1),
        "map_entropy": entropy(row, layout)[0],
        "map_morans_i": morans_i(row, layout)[0],
    }


def rank_correlation(maps: Floats, others: Floats) -> Floats:
    """Spearman's rank correlation of each pair of maps over patches, [image]; NaN where one is constant."""
    a, b = (stats.rankdata(values.reshape(len(values), -1), axis=1) for values in (maps, others))
    a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    norm = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return np.asarray((a * b).sum(axis=1) / np.where(norm > 0, norm, np.nan))


def structural_similarity(maps: Floats, others: Floats) -> Floats:
    """SSIM of each pair of maps, each scaled to a peak of 1, on the patch grid, [image]; NaN where one has no peak.

    A Gaussian window of 1.5 patches, mirrored at the edges; the mean over all patches. Maps are scaled because it is
    their shape that is compared: a less probable class has a weaker map.
    Source: Wang et al. (2004), doi:10.1109/TIP.2003.819861.
    """
    peaks = [values.max(axis=(1, 2), keepdims=True) for values in (maps, others)]
    a, b = (v / np.where(peak > 0, peak, np.nan) for v, peak in zip((maps, others), peaks, strict=True))

    def local(values: Floats) -> Floats:
        return np.asarray(ndimage.gaussian_filter(values, (0, _SSIM_SIGMA, _SSIM_SIGMA), truncate=_SSIM_TRUNCATE))

    mean_a, mean_b = local(a), local(b)
    variance_a, variance_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    c1, c2 = _SSIM_K1**2, _SSIM_K2**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity /= (mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2)
    return np.asarray(similarity.mean(axis=(1, 2)))


LIKENESS: dict[str, Callable[[Floats, Floats], Floats]] = {
    "rank_correlation": rank_correlation,
    "ssim": structural_similarity,
}
"""How alike each pair of maps is: name -> function of two arrays [image, row, col], to [image]."""


def between_images(maps: Floats, likeness: Callable[[Floats, Floats], Floats]) -> Floats:
    """How alike each map [image, row, col] is to those of the other images, mean over them, [image]; NaN without any.

    What two maps have in common whatever the image, such as a preference for the centre: the reference for maps of two
    classes of one image. `likeness` is symmetric.
    """
    images = len(maps)
    found = [np.full(images, np.nan)]
    for shift in range(1, images // 2 + 1):
        alike = likeness(maps, np.roll(maps, -shift, axis=0))  # of image and image + shift
        found += [alike] if 2 * shift == images else [alike, np.roll(alike, shift)]
    return defined_mean(np.stack(found), axis=0)
