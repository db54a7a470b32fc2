"""What rollout, the generic rule and LRP share: maps of one token set, multiplied in depth order and read at one place.

Every method makes one matrix per layer from its attention, [image, query, key], and reads the product of all of them at
the tokens that the prediction is read out from. Only that row is ever computed: from the last layer down, one vector
times one matrix per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
from engine.relevance.targets import class_logits
from kernels import TokenLayout


def check_call(call: AttentionCall, module: str | None, layout: TokenLayout, images: int, pooled: bool) -> bool:
    """Whether a call is attention pooling: one query over all tokens; else it is self-attention over all tokens.

    Raises CaptureError where it is neither, or the tokens were pooled already.
    """
    queries, keys = call.query.shape[-2], call.key.shape[-2]
    tokens = layout.num_tokens
    whole = call.query.ndim == 4 and call.query.shape[0] == images and call.query.shape[1] == call.key.shape[1]
    if whole and not pooled and not call.causal and keys == tokens and queries in (1, tokens):
        return queries == 1
    reason = "it is causal" if call.causal else f"its map is {queries}×{keys} tokens"
    if whole and pooled:
        reason = "it comes after attention pooling"
    elif call.query.shape[0] != images:
        reason = f"its batch holds {call.query.shape[0]} windows for {images} images"
    raise CaptureError(
        f"relevance through {module or 'the model'} is not defined: {reason}; expected self-attention over all "
        f"{tokens}×{tokens} tokens"
    )


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's attention call."""

    module: str
    call: AttentionCall  # of tensors outside the graph
    output: torch.Tensor  # [image, head, query, dim], part of the graph

    def attention(self) -> torch.Tensor:
        """[image, head, query, key]; made when needed, so that one layer's maps are in memory at a time."""
        return attention_map(self.call.query, self.call.key, self.call.scale, self.call.bias)


def record_attention(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, list[AttentionLayer], TokenLayout]:
    """Target logits [image], every layer's attention call in depth order, and the layout, by one forward pass.

    Raises CaptureError for a call that is not over all tokens, and where there is none.
    """
    layout = token_layout(vision_module(model), images.shape)
    layers: list[AttentionLayer] = []
    pooled = False

    def attend(call: FunctionCall) -> torch.Tensor:
        nonlocal pooled
        read = read_attention_call(call)
        pooled = check_call(read, call.module, layout, images.shape[0], pooled)
        output: torch.Tensor = call.run()
        if not output.requires_grad:
            # The lowest layer: weights and images are constants, and gradients are wanted at its output.
            output = output.detach().requires_grad_()
        read = replace(read, query=read.query.detach(), key=read.key.detach(), value=read.value.detach())
        layers.append(AttentionLayer(call.module or "the model", read, output))
        return output

    interception = ModelInterception(model, {F.scaled_dot_product_attention: attend})
    logits = class_logits(model, images, targets, dtype, interception)
    if not layers:
        raise CaptureError(f"{type(model).__name__} made no attention call that relevance could follow")
    return logits, layers, layout


def read_tokens(gradient: torch.Tensor, module: str) -> torch.Tensor:
    """How much of the last attention's rows the prediction is read out from, [query], adding up to 1.

    Behind the last attention nothing mixes tokens but the readout, so exactly those of its outputs have a gradient that
    are read: the class token's; the class and distillation tokens'; the patches' under average pooling. `gradient` is
    that of the target logits, [image, head, query, dim]; CaptureError where it is 0 throughout.
    """
    read = (gradient != 0).any(dim=3).any(dim=1).any(dim=0)
    if not bool(read.any()):
        raise CaptureError(f"the logits do not depend on {module}: no gradient reaches its output")
    return read.to(gradient.dtype) / read.sum()


def with_identity(step: torch.Tensor) -> torch.Tensor:
    """I + Ā, [image, query, key]: the residual stream beside the attention. A pooling query has no stream: Ā alone."""
    if step.shape[-2] == 1:
        return step
    return step + torch.eye(step.shape[-1], dtype=step.dtype, device=step.device)


def product_row(steps: Sequence[torch.Tensor], read: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Row `read` of the product of `steps` (depth order), at the patches, [image, row, col]."""
    row = read.expand(steps[-1].shape[0], 1, -1)
    for step in reversed(steps):
        row = row @ step
    return row[:, 0, layout.num_prefix_tokens :].reshape(-1, layout.grid_rows, layout.grid_cols)
