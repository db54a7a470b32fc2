"""Relevance from attention: rollout (Abnar & Zuidema, ACL 2020) and the generic rule (Chefer et al., ICCV 2021).

Both need every layer's post-softmax map, the generic rule its gradient as well. Neither is in the fused call's
output, but with O = A·V the gradient is ∇A = ∇O·Vᵀ: one backward pass to the attention outputs gives all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.capture import (
    AttentionCall,
    CaptureError,
    FunctionCall,
    ModelInterception,
    attention_map,
    read_attention_call,
    token_layout,
    vision_module,
)
from engine.relevance.chain import check_call, product_row, read_tokens, with_identity
from engine.relevance.targets import class_logits
from kernels import TokenLayout


@dataclass(frozen=True)
class _Layer:
    module: str
    query: torch.Tensor  # [image, head, query, dim]
    key: torch.Tensor  # [image, head, key, dim]
    value: torch.Tensor  # [image, head, key, dim]
    scale: float
    bias: torch.Tensor | None
    output: torch.Tensor  # [image, head, query, dim], part of the graph

    def attention(self) -> torch.Tensor:
        """[image, head, query, key]; made when needed, so that one layer's maps are in memory at a time."""
        return attention_map(self.query, self.key, self.scale, self.bias)


def _record(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, list[_Layer], TokenLayout]:
    """Target logits and every layer's attention call, by one forward pass."""
    layout = token_layout(vision_module(model), images.shape)
    layers: list[_Layer] = []
    pooled = False

    def attend(call: FunctionCall) -> torch.Tensor:
        nonlocal pooled
        read: AttentionCall = read_attention_call(call)
        pooled = check_call(read, call.module, layout, images.shape[0], pooled)
        output: torch.Tensor = call.run()
        if not output.requires_grad:
            # The lowest layer: weights and images are constants, and gradients are wanted at its output.
            output = output.detach().requires_grad_()
        query, key, value = (tensor.detach() for tensor in (read.query, read.key, read.value))
        layers.append(_Layer(call.module or "the model", query, key, value, read.scale, read.bias, output))
        return output

    interception = ModelInterception(model, {F.scaled_dot_product_attention: attend})
    logits = class_logits(model, images, targets, dtype, interception)
    if not layers:
        raise CaptureError(f"{type(model).__name__} made no attention call that relevance could follow")
    return logits, layers, layout


def rollout_maps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Product over layers of rownorm(mean_h A + I): where the information that is read out could have come from.

    Args:
        model, images, targets, dtype: see `relevance_maps`; the target class does not change the map.

    Returns:
        [image, row, col].
    """
    logits, layers, layout = _record(model, images, targets, dtype)
    (gradient,) = torch.autograd.grad(logits.sum(), [layers[-1].output])
    steps = []
    for layer in layers:
        step = with_identity(layer.attention().mean(dim=1))
        steps.append(step / step.sum(dim=-1, keepdim=True))
    return product_row(steps, read_tokens(gradient, layers[-1].module), layout)


def generic_maps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """R ← R + ĀR from R = I, Ā = mean_h (∇A ⊙ A)⁺, read where the prediction is read out.

    Args:
        model, images, targets, dtype: see `relevance_maps`.

    Returns:
        [image, row, col].
    """
    logits, layers, layout = _record(model, images, targets, dtype)
    gradients = torch.autograd.grad(logits.sum(), [layer.output for layer in layers])
    steps = []
    for layer, gradient in zip(layers, gradients, strict=True):
        of_attention = gradient @ layer.value.transpose(-2, -1)
        steps.append(with_identity(of_attention.mul_(layer.attention()).clamp_(min=0).mean(dim=1)))
    return product_row(steps, read_tokens(gradients[-1], layers[-1].module), layout)
