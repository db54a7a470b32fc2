"""One attention call: its operands as the kernel gets them, where in the model it is made, and its map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.capture.families import num_heads
from engine.capture.interception import FunctionCall
from kernels import Measurement, MetricSpec, TokenLayout, measure_qk


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The operands of one `F.scaled_dot_product_attention` call: [image, head, token, dim] and what shapes its map."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    causal: bool


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention call of a model whose map is [image, head, prefix + grid, prefix + grid].

    Args:
        name: the module that makes the call, e.g. "blocks.0.attn", named as in the model without wrappers.
        layer: index among the measurable sites in depth order, from 0.
        heads: number of heads that are handed over.
        layout: where its tokens lie.
        head_ids: their numbers in the model where some were chosen, in ascending order; () for all.
    """

    name: str
    layer: int
    heads: int
    layout: TokenLayout
    head_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteAttention:
    """What makes a site's maps in one forward pass: the model's own tensors, which are read and not kept."""

    site: AttentionSite  # where the call is made
    query: torch.Tensor  # [image, head, token, head_dim], after RoPE and q/k-norm
    key: torch.Tensor
    scale: float  # multiplies q·k
    bias: torch.Tensor | None  # None, additive or boolean (True = attend), broadcastable to [image, head, query, key]

    def maps(self) -> torch.Tensor:
        """Post-softmax attention, see `attention_map`."""
        return attention_map(self.query, self.key, self.scale, self.bias)

    def measure(self, metrics: Sequence[MetricSpec], backend: str, regions: Any = None) -> Measurement:
        """Metrics of the maps, which are not built; rows that are no attention are left out. See `measure_qk`."""
        layout, scale, bias = self.site.layout, self.scale, self.bias
        return measure_qk(self.query, self.key, layout, metrics, scale, bias, backend, invalid="mask", regions=regions)


def read_attention_call(call: FunctionCall) -> AttentionCall:
    """Names the arguments of an intercepted attention call, as the kernel gets them.

    The default scale, head_dim ** -0.5, is filled in; under autocast, tensors have the type that it casts them to.
    """
    given = {**dict(zip(_OPERANDS, call.args, strict=False)), **call.kwargs}
    query, scale = given["query"], given.get("scale")
    operands = query, given["key"], given["value"], given.get("attn_mask")
    if torch.is_autocast_enabled(query.device.type):
        operands = tuple(map(_autocast, operands))
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[-1])
    return AttentionCall(*operands, float(scale), bool(given.get("is_causal", False)))


_OPERANDS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def _autocast(tensor: Any) -> Any:
    """What autocast makes of an operand of attention: everything but float64 becomes its type."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def no_autocast(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Autocast off on the tensor's device: under it a product of float32 is computed in 16 bits."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def by_head(call: AttentionCall, caller: torch.nn.Module | None, images: int) -> AttentionCall:
    """A call whose images and heads share one axis, [image · head, token, dim], with an axis for each (views)."""
    if caller is None or call.query.ndim != 3 or call.key.ndim != 3 or (heads := num_heads(caller)) is None:
        return call
    if images == 0 or call.query.shape[0] != images * heads or call.key.shape[0] != images * heads:
        return call
    query, key, value = (t.unflatten(0, (images, heads)) for t in (call.query, call.key, call.value))
    bias = call.bias
    if bias is not None and bias.ndim == 3:
        bias = bias.unflatten(0, (images, heads)) if bias.shape[0] > 1 else bias.unsqueeze(0)
    return replace(call, query=query, key=key, value=value, bias=bias)


def of_heads(call: AttentionCall, heads: tuple[int, ...]) -> AttentionCall:
    """The call with these heads alone; neighbours are a view."""
    neighbours = heads == tuple(range(heads[0], heads[-1] + 1))
    chosen = slice(heads[0], heads[-1] + 1) if neighbours else list(heads)
    bias = call.bias
    if bias is not None and bias.ndim >= 3 and bias.shape[-3] > 1:
        bias = bias[..., chosen, :, :]
    query, key, value = (t[:, chosen] for t in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, bias=bias)


def unmeasurable(call: AttentionCall, layout: TokenLayout, images: int) -> str | None:
    """Why the map of this call is not [image, head, prefix + grid, prefix + grid]; None when it is."""
    query, key = call.query, call.key
    tokens = layout.num_tokens
    if call.causal:
        return "it is causal: no query sees the whole grid"
    queries, keys = query.shape[-2], key.shape[-2]
    if (queries, keys) != (tokens, tokens):
        if queries == 1:
            kind = "attention pooling or class attention"
        elif queries != keys:
            kind = "pooled keys or cross-attention"
        else:
            kind = "windowed, or over another grid than the patches'"
        return f"its map is {queries}×{keys} tokens, expected {tokens}×{tokens} ({layout}): {kind}"
    if query.ndim != 4 or key.ndim != 4:
        return f"query and key are {query.ndim}- and {key.ndim}-dimensional, expected [image, head, token, dim]"
    if query.shape[1] != key.shape[1]:
        return f"{query.shape[1]} query heads share {key.shape[1]} key heads"
    if query.shape[0] != images:
        return f"its batch holds {query.shape[0]} windows for {images} images"
    return None


def attention_map(query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """softmax(scale · q kᵀ + bias) in float32 (float64 for float64 input), [image, head, query, key]."""
    precise = torch.promote_types(query.dtype, torch.float32)
    with no_autocast(query):
        logits = (query.to(precise) * scale) @ key.to(precise).transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias.to(precise)
    return logits.softmax(dim=-1)
