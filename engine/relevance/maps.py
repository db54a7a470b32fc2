"""Class-specific relevance maps of any captured Vision Transformer, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch

from engine.capture import evaluating, unwrapped
from engine.relevance.methods import METHODS
from train.errors import InputError

# Size of the input noise of the stability score, in the model's normalised input units: what rounding could do.
_NOISE = 1e-7

TargetIndices = torch.Tensor | Sequence[int]


@overload
def relevance_maps(
    model: torch.nn.Module,
    images: torch.Tensor,
    targets: TargetIndices,
    method: str = ...,
    return_stability: Literal[False] = ...,
    *,
    dtype: torch.dtype | None = ...,
    batch_size: int = ...,
) -> torch.Tensor: ...
@overload
def relevance_maps(
    model: torch.nn.Module,
    images: torch.Tensor,
    targets: TargetIndices,
    method: str,
    return_stability: Literal[True],
    *,
    dtype: torch.dtype | None = ...,
    batch_size: int = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def relevance_maps(
    model: torch.nn.Module,
    images: torch.Tensor,
    targets: TargetIndices,
    method: str = "generic",
    return_stability: bool = False,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """How much each patch of each image mattered for its target class, by one of `METHODS`.

    Args:
        model: a classifier whose attention can be captured; its weights, modes, flags and gradients are
            left as they were.
        images: what the model takes, [image, channel, row, col].
        targets: one class index per image, [image]. A class-free method does not depend on it.
        method: a name of `METHODS`, as "generic".
        return_stability: also return how reproducible each map is.
        dtype: floating-point type of the computation. None: the method's: float64 for `lrp`, whose quotients are so
            ill-conditioned that its float32 maps are not reproducible; the model's own for the others.
        batch_size: images in memory at a time; a map does not depend on it. For ViT-S/16 at 8 images lrp takes about
            0.8 GB beyond the model in float32 and 1.6 GB in float64, in proportion to images, layers and tokens.

    Returns:
        float32 [image, row, col] on the patch grid, on the images' device; not normalised (0 is "no evidence").
        With `return_stability`, also float32 [image]: the correlation of each map with the map of the same image
        under seeded input noise of standard deviation 1e-7; NaN for a map that is constant.

    Raises:
        InputError: no such method, or targets that are not one class index per image.
        CaptureError: the method cannot be computed for this model.
    """
    if method not in METHODS:
        raise InputError(f"relevance method is {method!r}; expected one of {', '.join(METHODS)}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1 image at a time")
    classes = torch.as_tensor(targets, dtype=torch.long, device=images.device)
    if classes.shape != images.shape[:1]:
        raise InputError(
            f"targets have shape {tuple(classes.shape)} for {images.shape[0]} images; "
            "expected one class index per image"
        )
    model = unwrapped(model)
    declared = METHODS[method]
    precision = declared.dtype if dtype is None else dtype

    def maps_of(inputs: torch.Tensor) -> torch.Tensor:
        batches = zip(inputs.split(batch_size), classes.split(batch_size), strict=True)
        with evaluating(model), torch.enable_grad():
            return torch.cat([declared.maps(model, batch, part, precision).detach() for batch, part in batches])

    images = images.detach()
    maps = maps_of(images)
    if not return_stability:
        return maps.float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wide = images.to(precision) if precision is not None else images
    return maps.float(), _correlation(maps, maps_of(wide + _NOISE * noise.to(wide)))


def _correlation(maps: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Pearson correlation of each pair of maps, float32 [image]; NaN where one is constant."""
    a, b = (values.double().flatten(1) for values in (maps, others))
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    correlation: torch.Tensor = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    return correlation.float()
