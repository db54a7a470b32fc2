"""What rollout, the generic rule and LRP share: maps of one token set, multiplied in depth order and read at one place.

Every method makes one matrix a layer from its attention, [image, query, key], and reads the product of all of them at
the tokens that the prediction is read out from. Only that row is ever computed: from the last layer down, one vector
times one matrix a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.capture import AttentionCall, CaptureError
from kernels import TokenLayout


def check_call(call: AttentionCall, module: str | None, layout: TokenLayout, images: int, pooled: bool) -> bool:
    """Whether a call is attention pooling: one query over all tokens; else it is self-attention over all tokens.

    Args:
        call, module: the call, and who makes it.
        layout, images: what the maps must be over.
        pooled: whether the tokens were pooled before this call.

    Raises:
        CaptureError: it is neither, or the tokens were pooled already.
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


def read_tokens(gradient: torch.Tensor, module: str) -> torch.Tensor:
    """How much of the last attention's rows the prediction is read out from, [query], adding up to 1.

    Behind the last attention nothing mixes tokens but the readout, so exactly those of its outputs have a gradient that
    are read: the class token's; the class and distillation tokens'; the patches' under average pooling.

    Args:
        gradient: of the target logits with respect to the last attention's output, [image, head, query, dim].

    Raises:
        CaptureError: there is no gradient.
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
