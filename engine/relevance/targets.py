"""The scalar that is explained: one logit an image."""

from __future__ import annotations

import torch

from train.errors import InputError

__all__ = ["class_logits"]


def class_logits(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The target class's logit of each image, [image].

    Raises:
        InputError: a target that is not a class of the model.
    """
    logits: torch.Tensor = model(images)
    classes = logits.shape[-1]
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise InputError(
            f"targets run from {int(targets.min())} to {int(targets.max())}; the model has {classes} classes"
        )
    return logits.gather(1, targets[:, None])[:, 0]
