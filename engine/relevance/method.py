"""What a relevance method declares of itself. Each is one module of `engine.relevance.methods`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Maps = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.dtype | None], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A relevance method."""

    # (model, images, targets, dtype) -> [image, row, col], as `relevance_maps` says; of a model in evaluation mode,
    # with gradients on. It raises CaptureError where the method cannot be computed for this model.
    maps: Maps
    # Whether a map is made of attention alone, the same for every class: other methods are compared with it, as with a
    # random map.
    class_free: bool = False
    # Floating-point type of the computation where none is asked for; None: the model's own.
    dtype: torch.dtype | None = None


METHODS: dict[str, Method] = {}
"""Name -> method; `engine.relevance.methods` fills it."""


def relevance_method(*, class_free: bool = False, dtype: torch.dtype | None = None) -> Callable[[Maps], Maps]:
    """Declares a function as the method that its module is called after; see `Method`."""

    def declare(maps: Maps) -> Maps:
        METHODS[maps.__module__.rpartition(".")[2]] = Method(maps, class_free, dtype)
        return maps

    return declare
