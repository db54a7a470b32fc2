"""Relevance from attention: rollout (Abnar & Zuidema, ACL 2020) and the generic rule (Chefer et al., ICCV 2021).

Both need every layer's post-softmax map, the generic rule its gradient as well. Neither is in the fused call's
output, but with O = A·V the gradient is ∇A = ∇O·Vᵀ: one backward pass to the attention outputs gives all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.capture import CaptureError, attention_map, read_attention_call, token_layout, vision_module
from engine.interception import FunctionCall, ModelInterception
from engine.relevance.targets import class_logits
from kernels import TokenLayout

__all__ = ["generic_maps", "rollout_maps"]


@dataclass(frozen=True)
class _Layer:
    attention: torch.Tensor  # [image, head, query, key]
    value: torch.Tensor  # [image, head, key, dim]
    output: torch.Tensor  # [image, head, query, dim], part of the graph


def _record(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, list[_Layer], TokenLayout]:
    """Target logits and every layer's attention, values and output, by one forward pass."""
    layout = token_layout(vision_module(model), images.shape)
    layers: list[_Layer] = []

    def attend(call: FunctionCall) -> torch.Tensor:
        read = read_attention_call(call)
        if read.query.shape[-2:-1] != (layout.num_tokens,) or read.key.shape[-2:-1] != (layout.num_tokens,):
            raise CaptureError(
                f"relevance through {call.module} is not defined: its map is "
                f"{read.query.shape[-2]}×{read.key.shape[-2]} tokens, expected {layout.num_tokens}×{layout.num_tokens}"
            )
        output: torch.Tensor = call.run()
        if not output.requires_grad:
            # The lowest layer of a frozen model: gradients are wanted at its output all the same.
            output = output.detach().requires_grad_()
        with torch.no_grad():
            layers.append(
                _Layer(attention_map(read.query, read.key, read.scale, read.bias), read.value.detach(), output)
            )
        return output

    with ModelInterception(model, {F.scaled_dot_product_attention: attend}):
        logits = class_logits(model, images, targets)
    if not layers:
        raise CaptureError(f"{type(model).__name__} made no attention call that relevance could follow")
    return logits, layers, layout


def _readout(relevance: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """The class token's row over the patches, or without one the mean over patch queries, [image, row, col]."""
    row: torch.Tensor = layout.class_row(relevance) if layout.class_token else layout.patches(relevance).mean(dim=-2)
    return row.reshape(-1, layout.grid_rows, layout.grid_cols)


def rollout_maps(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Product over layers of rownorm(mean_h A + I): where the class token's information could have come from.

    Args:
        model, images, targets: see `relevance_maps`; the target class does not change the map.

    Returns:
        [image, row, col].
    """
    _, layers, layout = _record(model, images, targets)
    identity = torch.eye(layout.num_tokens, device=images.device, dtype=layers[0].attention.dtype)
    rollout = identity
    for layer in layers:
        step = layer.attention.mean(dim=1) + identity
        rollout = (step / step.sum(dim=-1, keepdim=True)) @ rollout
    return _readout(rollout, layout)


def generic_maps(model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """R ← R + ĀR from R = I, Ā = mean_h (∇A ⊙ A)⁺, read at the class token's row over the patches.

    Args:
        model, images, targets: see `relevance_maps`.

    Returns:
        [image, row, col].
    """
    logits, layers, layout = _record(model, images, targets)
    gradients = torch.autograd.grad(logits.sum(), [layer.output for layer in layers])
    relevance = torch.eye(layout.num_tokens, device=images.device, dtype=layers[0].attention.dtype)
    for layer, gradient in zip(layers, gradients, strict=True):
        of_attention = gradient @ layer.value.transpose(-2, -1)
        weighted = (of_attention * layer.attention).clamp(min=0).mean(dim=1)
        relevance = relevance + weighted @ relevance
    return _readout(relevance, layout)
