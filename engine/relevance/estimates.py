"""Estimates over images that are no plain means, as one number per image: what intervals and tests are made of.

Their mean is the estimate, and to first order its error is that of their mean, so that tests and intervals of means are
tests and intervals of it (linearisation: Woodruff 1971, doi:10.1080/01621459.1971.10482279).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.statistics import Floats, defined_mean

# Below so many standard errors above 0 nothing is divided by a mean: where it may be 0, a ratio may be anything
# (Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x).
_LEAST_ERRORS = 2


def estimates(values: Mapping[str, Floats]) -> dict[str, Floats]:
    """Measure -> [image]: those of single images, and what takes several images to say.

    `deletion_auc_normalised`, `insertion_auc_normalised`, `faithfulness_normalised`: areas as shares of the rise from
    `p_none` to `p_whole`, a ratio of means over images. An area is as large as the model is confident; a share is not.
    `class_…_excess`: how much more alike maps of two classes of an image are than maps of two images.
    """
    rise = values["p_whole"] - values["p_none"]
    areas = {name: values[name] - values["p_none"] for name in ("deletion_auc", "insertion_auc")}
    areas["faithfulness"] = values["faithfulness"]
    found = {**values, **{f"{name}_normalised": ratio_of_means(area, rise) for name, area in areas.items()}}
    for name in (name for name in values if name.startswith("image_")):
        of_classes = name.replace("image_", "class_")
        found[name] = mean_of_pairs(values[name])
        found[f"{of_classes}_excess"] = values[of_classes] - found[name]
    return found


def comparable(measure: str) -> bool:
    """Whether a measure can be compared between models.

    A probability, or an area of it, is as large as a model is confident; the area of a region is the image's; how alike
    maps are says something beside how alike maps of other images are.
    """
    other = ("p_", "deletion_auc", "insertion_auc", "faithfulness", "region_area", "class_", "image_")
    return measure.endswith(("_normalised", "_excess")) or not measure.startswith(other)


def ratio_of_means(parts: Floats, wholes: Floats) -> Floats:
    """Numbers [image] whose mean is mean(parts) / mean(wholes); NaN where the mean of `wholes` may be 0 or less.

    That is, unless it lies two standard errors above 0; with one image this is not known. An image without one of its
    two numbers is left out. A mean of ratios would let the images with the smallest wholes decide, and needs a bound
    below which they are left out.
    """
    known = np.isfinite(parts) & np.isfinite(wholes)
    values = np.full(len(known), np.nan)
    part, whole = parts[known], wholes[known]
    if len(whole) >= 2 and whole.mean() > _LEAST_ERRORS * whole.std(ddof=1) / np.sqrt(len(whole)):
        ratio = part.mean() / whole.mean()
        values[known] = ratio + (part - ratio * whole) / whole.mean()
    return values


def mean_of_pairs(by_image: Floats) -> Floats:
    """Numbers [image] whose mean is that of `by_image`, each of which is a mean over pairs with all other images.

    An image is in its own mean and in those of the others: the mean over all pairs scatters twice as much as that of
    independent numbers (Hoeffding 1948, doi:10.1214/aoms/1177730196).
    """
    mean = defined_mean(by_image, axis=0)
    return np.asarray(mean + 2 * (by_image - mean))
