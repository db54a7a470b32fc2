"""How alike every head of one model is to every head of another: in their attention, and in the weights behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from engine.capture import AttentionSite, SiteAttention, observe
from engine.measure.store import require_comparable, require_maps
from engine.measure.units import Stored, Unit, images_at_once, in_one_precision
from engine.progress import ImageProgress
from kernels import METRICS, TokenLayout, measure_pair, resolve
from store import AttentionStore
from train.errors import InputError

if TYPE_CHECKING:
    import xarray

DIVERGENCE = METRICS["js_divergence"]


@overload
def head_divergence(
    one: AttentionStore, other: AttentionStore, images: slice = slice(None), *, backend: str = "auto"
) -> xarray.DataArray: ...
@overload
def head_divergence(
    one: torch.nn.Module,
    other: torch.nn.Module,
    images: torch.Tensor | Iterable[torch.Tensor],
    *,
    backend: str = "auto",
) -> xarray.DataArray: ...
def head_divergence(one: Any, other: Any, images: Any = slice(None), *, backend: str = "auto") -> xarray.DataArray:
    """Jensen–Shannon divergence between every head of one model and every head of another, on the same images.

    That of two heads is `js_divergence`: of their rows over the patches, the mean over patch queries. From it
    `engine.statistics.match_heads` finds which head is which. One layer of some images is in memory at a time.

    Args:
        one, other: two open stores with maps; or two models, see `engine.capture.AttentionTap`.
        images: of stores, the rows to look at, neighbours; of models, what both take: one batch
            [image, channel, row, col], or batches one after the other.
        backend: see `kernels.resolve`.
    Returns:
        float64 [image, layer, head, other_head] in nat, 0 to ln 2; NaN where a head has no value on an image, and where
        a layer has fewer heads than others. `image` holds the stores' ids, `site` the layers' modules.
    Raises:
        InputError: the two have other layers, heads or tokens, or other images, or there are none; a store has no maps.
        CaptureError: a model has no measurable attention.
        StoreError: a store is damaged, or lacks some of the images.
    """
    import xarray

    if isinstance(one, AttentionStore):
        require_comparable(one, other, "heads of two models are compared on the same images")
        for store in (one, other):
            require_maps(store, [DIVERGENCE])
        rows = range(len(one.image_ids))[images]
        parts = list(_of_stores(one, other, rows, backend))
        layers = [(layer.layer, layer.site) for layer in one.schema.layers]
        ids, heads = list(one.image_ids[images]), one.schema.head_ids or range(one.schema.max_heads)
    else:
        sites: dict[int, AttentionSite] = {}
        batches = [images] if isinstance(images, torch.Tensor) else images
        parts = [_of_models(one, other, batch, sites, backend) for batch in batches]
        layers = [(site.layer, site.name) for site in sites.values()]
        ids, heads = list(range(sum(map(len, parts)))), range(max((site.heads for site in sites.values()), default=0))
    if not ids:
        raise InputError("there are no images to compare heads on; give at least one")
    coords = {
        "image": ids,
        "layer": [layer for layer, _ in layers],
        "head": list(heads),
        "other_head": list(heads),
        "site": ("layer", [site for _, site in layers]),
    }
    attributes = {"units": DIVERGENCE.unit, "title": DIVERGENCE.title, "source": DIVERGENCE.source}
    dims = ("image", "layer", "head", "other_head")
    return xarray.DataArray(np.concatenate(parts), coords, dims, DIVERGENCE.name, attributes)


def _of_stores(one: AttentionStore, other: AttentionStore, rows: range, backend: str) -> Iterator[np.ndarray]:
    """[image, layer, head, other head] of some images at a time."""
    chosen = resolve(backend, "cpu").name
    step = min(images_at_once(store, layer, whole_maps=True) for store in (one, other) for layer in store.layers)
    with ImageProgress("compare heads", len(rows), 0, 0) as progress:
        for begin in range(rows.start, rows.stop, step):
            layers = []
            for layer in one.layers:
                unit = Unit(layer, slice(begin, min(begin + step, rows.stop)))
                ours, theirs = Stored.read(one, unit, "ours"), Stored.read(other, unit, "theirs")
                maps = in_one_precision(ours.maps(), theirs.maps())
                layers.append(_divergence(*maps, TokenLayout.from_dict(one.layout(layer)), chosen))
            yield _stacked(layers)
            progress.update(len(layers[0]))


def _of_models(
    one: torch.nn.Module, other: torch.nn.Module, images: torch.Tensor, sites: dict[int, AttentionSite], backend: str
) -> np.ndarray:
    """[image, layer, head, other head] of one batch; `sites` learns the first model's, by layer."""
    ours: dict[int, SiteAttention] = {}
    layers: list[np.ndarray] = []

    def keep(attention: SiteAttention) -> None:
        sites[attention.site.layer] = attention.site
        ours[attention.site.layer] = replace(attention, query=attention.query.clone(), key=attention.key.clone())

    def compare(theirs: SiteAttention) -> None:
        layer, layout = theirs.site.layer, theirs.site.layout
        mine = ours.pop(layer, None)
        if mine is None or (mine.site.heads, mine.site.layout) != (theirs.site.heads, layout):
            raise InputError(
                f"the models differ in layer {layer}: {_described(mine)}, and {_described(theirs)}; {_ALIKE}"
            )
        layers.append(_divergence(mine.maps().float(), theirs.maps().float(), layout, backend))

    observe(one, images, keep)
    observe(other, images, compare)
    if ours:
        raise InputError(f"the first model has {len(sites)} layers of attention and the second {len(layers)}; {_ALIKE}")
    return _stacked(layers)


_ALIKE = "heads can be compared between models of one architecture at one input size"


def _described(attention: SiteAttention | None) -> str:
    return "no attention" if attention is None else f"{attention.site.heads} heads over {attention.site.layout}"


def _divergence(ours: Any, theirs: Any, layout: TokenLayout, backend: str) -> np.ndarray:
    """[image, head, other head] of maps [image, head, query, key]."""
    every = torch.broadcast_to if isinstance(ours, torch.Tensor) else np.broadcast_to
    columns = []
    for head in range(theirs.shape[1]):  # one against all: a backend that copies what is broadcast copies no more
        pair = ours, every(theirs[:, head : head + 1], ours.shape)
        measured = measure_pair(*pair, layout, [DIVERGENCE], backend, invalid="mask")[DIVERGENCE.name]
        columns.append(torch.as_tensor(measured).cpu().numpy())
    return np.stack(columns, axis=-1)


def _stacked(layers: Sequence[np.ndarray]) -> np.ndarray:
    """[image, layer, head, other head] of each layer's [image, head, other head], NaN where one has fewer heads."""
    images, most = len(layers[0]), max(layer.shape[1] for layer in layers)
    stacked = np.full((images, len(layers), most, most), np.nan)
    for layer, values in enumerate(layers):
        heads = values.shape[1]
        stacked[:, layer, :heads, :heads] = values
    return stacked
