"""Which head of one model is which of another, where both do not come from one start."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from engine.statistics.arrays import Floats, defined_mean

DIMS = ("image", "layer", "head", "other_head")


def match_heads(divergence: Any, *, resamples: int = 1000, seed: int = 0) -> xr.Dataset:
    """Pair each head of one model with one of another, layer by layer, so that their attention is most alike.

    The match is the assignment of least total divergence, each averaged over images. An assignment exists for any two
    models, and is the better for having been chosen: what it is worth, its gap, margin and stability say.

    Args:
        divergence: how far apart two heads are on an image, 0 where they are alike, [image, layer, head, other_head],
            as of `engine.measure.head_divergence`. NaN where there is no value; a head without any in a layer is not
            there.
        resamples: bootstrap resamples of the images, for the stability; 0: none.
        seed: of the resamples.
    Returns:
        Dataset over layer and head: `match`, the other model's head that belongs to each (a head that is not there has
        one that is not there either); `matched`, the mean divergence of the two; `gap`, how much greater it is with the
        nearest of the other model's other heads, below 0 where that one is nearer; `stable`, the share of resamples in
        which the head gets the same one. Over layer: `mean_matched`, `mean_same_number` and `mean_all`, the mean
        divergence of matched heads, of heads of one number and of all pairs; `margin`, how much greater the total of
        the next best assignment is; `stability`, the share of resamples that give the same match to all heads. And
        `divergence` [layer, head, other_head], the mean over images. Divergences are in the unit of the input. `gap`
        and `margin` are NaN for a single head, shares for a single image.
    Raises:
        ValueError: another shape; a layer in which the models have different numbers of heads with a value, or none, or
            two heads that have no image in common.
    Source:
        Kuhn (1955), doi:10.1002/nav.3800020109, as `scipy.optimize.linear_sum_assignment`; the next best assignment:
        Murty (1968), doi:10.1287/opre.16.3.682.
    """
    labelled = divergence.transpose(*DIMS) if isinstance(divergence, xr.DataArray) else None
    values = np.asarray(divergence if labelled is None else labelled, dtype=np.float64)
    if values.ndim != 4 or not values.size or values.shape[2] != values.shape[3]:
        raise ValueError(
            f"divergence has the shape {values.shape}; expected [image, layer, head, other_head], as many heads of "
            "either model"
        )
    images, layers, heads, _ = values.shape
    coords: dict[Any, Any] = {"layer": np.arange(layers), "head": np.arange(heads), "other_head": np.arange(heads)}
    if labelled is not None:
        coords |= {name: coord for name, coord in labelled.coords.items() if "image" not in coord.dims}
    drawn = resamples if images > 1 else 0
    counts = np.random.default_rng(seed).multinomial(images, [1 / images] * images, size=drawn).astype(np.float64)
    of_layers = [_match_layer(values[:, layer], counts, coords["layer"][layer]) for layer in range(layers)]
    columns = {name: np.stack([found[name] for found in of_layers]) for name in of_layers[0]}
    columns["match"] = np.asarray(coords["other_head"])[columns["match"]]
    return xr.Dataset(
        {name: (("layer", *DIMS[2:])[: column.ndim], column) for name, column in columns.items()},
        coords,
        {"images": images, "resamples": drawn, "seed": seed} | ({} if labelled is None else labelled.attrs),
    )


def _match_layer(values: Floats, counts: Floats, layer: Any) -> dict[str, Any]:
    """What `match_heads` says of one layer, values [image, head, other head]; `counts` [resample, image] of images."""
    mean = defined_mean(values, axis=0)
    rows, columns = (np.flatnonzero(~np.isnan(mean).all(axis=axis)) for axis in (1, 0))
    cost = mean[np.ix_(rows, columns)]
    if not len(rows) or len(rows) != len(columns) or np.isnan(cost).any():
        raise ValueError(
            f"layer {layer} has {len(rows)} heads of one model and {len(columns)} of the other with a divergence, "
            f"{np.isnan(cost).sum()} pairs of them on no image; expected as many of either, and every pair on some "
            "image: leave the layer out, or give more images"
        )
    best, count = _assign(cost), len(rows)
    each = np.arange(count)
    matched = cost[each, best]
    without = cost.copy()
    without[each, best] = np.inf
    again = np.array([_assign(resampled) for resampled in _resampled(values, counts, mean)[:, rows][:, :, columns]])
    same = again.reshape(-1, count) == best

    match: NDArray[np.intp] = np.empty(len(mean), dtype=np.intp)
    match[rows] = columns[best]
    match[np.setdiff1d(np.arange(len(mean)), rows)] = np.setdiff1d(np.arange(len(mean)), columns)
    of_heads = np.full((3, len(mean)), np.nan)
    of_heads[0, rows] = matched
    if count > 1:
        of_heads[1, rows] = without.min(axis=1) - matched
    if len(same):
        of_heads[2, rows] = same.mean(axis=0)
    return {
        "match": match,
        "matched": of_heads[0],
        "gap": of_heads[1],
        "stable": of_heads[2],
        "mean_matched": matched.mean(),
        "mean_same_number": defined_mean(np.diagonal(mean), axis=0),
        "mean_all": cost.mean(),
        "margin": _next_best(cost, best) - matched.sum() if count > 1 else np.nan,
        "stability": same.all(axis=1).mean() if len(same) else np.nan,
        "divergence": mean,
    }


def _assign(cost: Floats) -> NDArray[np.intp]:
    """The column of each row in an assignment of least total cost: each row's own, where none is better."""
    columns: NDArray[np.intp] = linear_sum_assignment(cost)[1]
    own = np.arange(len(cost))
    return own if np.trace(cost) <= cost[own, columns].sum() else columns


def _next_best(cost: Floats, best: NDArray[np.intp]) -> float:
    """Least total cost of any other assignment, which does without one of the best one's pairs at least."""
    totals = []
    for row, column in enumerate(best):
        without = cost.copy()
        without[row, column] = np.inf
        totals.append(without[linear_sum_assignment(without)].sum())
    return float(min(totals))


def _resampled(values: Floats, counts: Floats, mean: Floats) -> Floats:
    """Means [resample, head, other head] over resampled images; of a pair with none of them, that of all images."""
    flat = values.reshape(len(values), -1)
    defined = counts @ (~np.isnan(flat)).astype(np.float64)
    total = counts @ np.nan_to_num(flat)
    means = np.where(defined > 0, total / np.maximum(defined, 1), mean.reshape(-1))
    return means.reshape(-1, *mean.shape)
