"""The scalar that is explained: one logit per image, of a model whose weights are constants."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from engine.capture import logits_of
from train.data import ImageSet
from train.errors import InputError


def class_logits(
    model: torch.nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    dtype: torch.dtype | None = None,
    around: AbstractContextManager[Any] | None = None,
) -> torch.Tensor:
    """The target class's logit of each image, [image], in a graph that holds no weights; images may be in it.

    The forward pass, which runs in `dtype` and inside `around`, is on detached weights, so that nothing is kept for
    their gradients, whatever they require; the model itself is not touched.

    Raises:
        InputError: a target that is not a class of the model.
    """

    def constant(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()

    weights = {name: constant(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    inputs = images if dtype is None else images.to(dtype)
    with around or nullcontext():
        output = torch.func.functional_call(model, weights, (inputs,))
    logits = logits_of(output)
    classes = logits.shape[-1]
    if bool(((targets < 0) | (targets >= classes)).any()):
        raise InputError(
            f"targets run from {int(targets.min())} to {int(targets.max())}; the model has {classes} classes"
        )
    return logits.gather(1, targets[:, None])[:, 0]


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def image_logits(model: torch.nn.Module, images: ImageSet, rows: Sequence[int], batch_size: int) -> torch.Tensor:
    """Logits of a model in evaluation mode for at least one image, [row, class], on its device."""
    batches = (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))
    with torch.inference_mode():
        outputs = [model(images.batch(batch).to(device_of(model))) for batch in batches]
    return torch.cat([logits_of(output) for output in outputs])
