"""Attention rollout (Abnar & Zuidema, ACL 2020): attention alone, multiplied over the layers."""

from __future__ import annotations

import torch

from engine.relevance.chain import product_row, read_tokens, record_attention, with_identity
from engine.relevance.method import relevance_method


@relevance_method(class_free=True)
def rollout_maps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Product over layers of rownorm(mean_h A + I), [image, row, col]: where what is read out could have come from."""
    logits, layers, layout = record_attention(model, images, targets, dtype)
    (gradient,) = torch.autograd.grad(logits.sum(), [layers[-1].output])
    steps = []
    for layer in layers:
        step = with_identity(layer.attention().mean(dim=1))
        steps.append(step / step.sum(dim=-1, keepdim=True))
    return product_row(steps, read_tokens(gradient, layers[-1].module), layout)
