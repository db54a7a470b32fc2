"""Class-specific relevance maps of any captured Vision Transformer, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from engine.capture import evaluating
from engine.relevance.chefer import generic_maps, rollout_maps
from engine.relevance.gradcam import gradcam_maps
from train.errors import InputError

__all__ = ["METHODS", "relevance_maps"]

Method = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]

METHODS: dict[str, Method] = {"gradcam": gradcam_maps, "rollout": rollout_maps, "generic": generic_maps}


def relevance_maps(
    model: torch.nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor | Sequence[int],
    method: str = "generic",
) -> torch.Tensor:
    """How much each patch of each image mattered for its target class, by one of `METHODS`.

    Args:
        model: an uncompiled classifier whose attention can be captured; its weights, modes, flags and gradients are
            left as they were.
        images: what the model takes, [image, channel, row, col].
        targets: a class index an image, [image]. `rollout` does not depend on it.
        method: "gradcam", "rollout" or "generic".

    Returns:
        float32 [image, row, col] on the patch grid, on the images' device; not normalised (0 is "no evidence").

    Raises:
        InputError: no such method, or targets that are not one class index an image.
        CaptureError: the method cannot be computed for this model.
    """
    if method not in METHODS:
        raise InputError(f"relevance method is {method!r}; expected one of {', '.join(METHODS)}")
    classes = torch.as_tensor(targets, dtype=torch.long, device=images.device)
    if classes.shape != images.shape[:1]:
        raise InputError(
            f"targets have shape {tuple(classes.shape)} for {images.shape[0]} images; expected one class index an image"
        )
    with evaluating(model), torch.enable_grad():
        return METHODS[method](model, images.detach(), classes).detach().float()
