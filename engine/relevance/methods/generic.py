"""The generic rule (Chefer et al., ICCV 2021): attention and its gradient, added up over the layers.

∇A is not in the fused call's output, but with O = A·V it is ∇O·Vᵀ: one backward pass to these outputs gives all.
"""

from __future__ import annotations

import torch

from engine.relevance.chain import product_row, read_tokens, record_attention, with_identity
from engine.relevance.method import relevance_method


@relevance_method()
def generic_maps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """R ← R + ĀR from R = I, Ā = mean_h (∇A ⊙ A)⁺, read where the prediction is read out, [image, row, col]."""
    logits, layers, layout = record_attention(model, images, targets, dtype)
    gradients = torch.autograd.grad(logits.sum(), [layer.output for layer in layers])
    steps = []
    for layer, gradient in zip(layers, gradients, strict=True):
        relevance = gradient @ layer.call.value.transpose(-2, -1)
        steps.append(with_identity(relevance.mul_(layer.attention()).clamp_(min=0).mean(dim=1)))
    return product_row(steps, read_tokens(gradients[-1], layers[-1].module), layout)
