"""Post-softmax attention of every layer, head and image, while the model runs at full speed.

`AttentionTap` sees the exact q, k, scale and bias of every attention call and hands them to a callback; the sinks
that stream a data set through it are in `engine.sinks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F

from engine.interception import FunctionCall, ModelInterception
from kernels import TokenLayout
from train.errors import InputError

__all__ = [
    "AttentionCall",
    "AttentionSite",
    "AttentionTap",
    "CaptureError",
    "attention_map",
    "capture_attention",
    "discover_sites",
    "evaluating",
    "read_attention_call",
    "token_layout",
    "vision_module",
]

Callback = Callable[["AttentionSite", torch.Tensor, torch.Tensor, float, torch.Tensor | None], None]


class CaptureError(InputError):
    """A model whose attention cannot be captured; the message names the model and the reasons."""


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention call of a model whose map is [image, head, prefix + grid, prefix + grid].

    Args:
        name: the module that makes the call, e.g. "blocks.0.attn".
        layer: index among the measurable sites in depth order, from 0.
        heads: number of heads.
        layout: where its tokens lie.
    """

    name: str
    layer: int
    heads: int
    layout: TokenLayout


class AttentionTap(AbstractContextManager["AttentionTap"]):
    """Inside the context, every attention call of `model` is handed to `on_attention`; the model is not changed.

        with AttentionTap(model, on_attention=callback) as tap:
            model(images)

    Args:
        model: any uncompiled model that computes attention by `F.scaled_dot_product_attention`.
        on_attention: called as `(site, query, key, scale, bias)` in depth order, while the forward pass is running;
            query and key are [image, head, token, head_dim] after RoPE and q/k-norm, scale multiplies q·k, bias is
            None, additive or boolean (True = attend), broadcastable to [image, head, query, key]. They are the
            model's own tensors: read them, don't keep them.
        layers: layers to hand over, counted in depth order from 0 over the measurable sites; None: all.
        on_unmeasurable: what to do with a call whose map does not have that shape (windowed, pooled keys,
            class-attention, attention pooling): "skip" lists it in `skipped`, "raise" raises.

    Attributes:
        sites: module name -> AttentionSite, in depth order, of what was seen.
        skipped: list of (module name, reason).

    Raises:
        CaptureError: after the first forward pass, if it had no measurable site (or none of the chosen layers).
        TypeError: the model is wrapped by `torch.compile`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        on_attention: Callback,
        *,
        layers: Collection[int] | None = None,
        on_unmeasurable: Literal["skip", "raise"] = "skip",
    ) -> None:
        if on_unmeasurable not in ("skip", "raise"):
            raise ValueError(f"on_unmeasurable is {on_unmeasurable!r}; expected 'skip' or 'raise'")
        self.model = model
        self.sites: dict[str, AttentionSite] = {}
        self.skipped: list[tuple[str, str]] = []
        self._callback = on_attention
        self._layers = None if layers is None else frozenset(layers)
        self._on_unmeasurable = on_unmeasurable
        self._interception = ModelInterception(model, {F.scaled_dot_product_attention: self._attend})
        self._vision = vision_module(model)
        self._image_shape: tuple[int, ...] | None = None
        self._seen_in_forward: dict[str, int] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> AttentionTap:
        self._hooks.append(self._vision.register_forward_pre_hook(self._note_image_shape, with_kwargs=True))
        self._hooks.append(self.model.register_forward_hook(self._after_forward))
        self._interception.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._interception.__exit__(exc_type, exc, traceback)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _note_image_shape(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = args[0] if args else next(iter(kwargs.values()), None)
        self._image_shape = tuple(images.shape) if isinstance(images, torch.Tensor) and images.ndim == 4 else None
        self._seen_in_forward.clear()

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        name = type(self.model).__name__
        if not self.sites:
            reasons = "; ".join(f"{site}: {reason}" for site, reason in self.skipped)
            raise CaptureError(
                f"no attention of {name} can be captured: "
                + (reasons or "its forward pass never called F.scaled_dot_product_attention")
                + "; expected self-attention over all patches of the image"
            )
        if self._layers is not None and (missing := sorted(self._layers - {s.layer for s in self.sites.values()})):
            raise CaptureError(
                f"{name} has no layer {missing[0]}; its measurable layers are 0 to {len(self.sites) - 1}"
            )

    def _attend(self, call: FunctionCall) -> Any:
        read = read_attention_call(call)
        name = call.module or type(self.model).__name__
        count = self._seen_in_forward[name] = self._seen_in_forward.get(name, 0) + 1
        if count > 1:
            name = f"{name}#{count}"  # a module that attends twice in one forward pass has two sites
        layout = token_layout(self._vision, self._image_shape)
        reason = self._unmeasurable(read, layout)
        if reason is not None:
            if self._on_unmeasurable == "raise":
                raise CaptureError(f"the attention of {name} cannot be measured: {reason}")
            if (name, reason) not in self.skipped:
                self.skipped.append((name, reason))
            return call.run()
        site = self.sites.get(name)
        if site is None or site.layout != layout:
            layer = len(self.sites) if site is None else site.layer
            site = self.sites[name] = AttentionSite(name, layer, read.query.shape[1], layout)
        if self._layers is None or site.layer in self._layers:
            self._callback(site, read.query, read.key, read.scale, read.bias)
        return call.run()

    def _unmeasurable(self, call: AttentionCall, layout: TokenLayout) -> str | None:
        """Why the map of this call is not [image, head, prefix + grid, prefix + grid]; None when it is."""
        query, key = call.query, call.key
        if call.causal:
            return "it is causal: no query sees the whole grid"
        if query.ndim != 4 or key.ndim != 4:
            return f"query and key are {query.ndim}- and {key.ndim}-dimensional, expected [image, head, token, dim]"
        if query.shape[1] != key.shape[1]:
            return f"{query.shape[1]} query heads share {key.shape[1]} key heads"
        tokens = layout.num_tokens
        if query.shape[2] != tokens or key.shape[2] != tokens:
            return (
                f"its map is {query.shape[2]}×{key.shape[2]} tokens, expected {tokens}×{tokens} ({layout}): "
                "windowed, pooled or class attention"
            )
        if self._image_shape is not None and query.shape[0] != self._image_shape[0]:
            return f"its batch holds {query.shape[0]} windows for {self._image_shape[0]} images"
        return None


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The operands of one `F.scaled_dot_product_attention` call: [image, head, token, dim] and what shapes its map."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    causal: bool


def read_attention_call(call: FunctionCall) -> AttentionCall:
    """Names the arguments of an intercepted attention call and fills in the default scale, head_dim ** -0.5."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    scale = given.get("scale")
    return AttentionCall(
        query=given["query"],
        key=given["key"],
        value=given["value"],
        bias=given.get("attn_mask"),
        scale=float(scale) if scale is not None else 1.0 / math.sqrt(given["query"].shape[-1]),
        causal=bool(given.get("is_causal", False)),
    )


def vision_module(model: torch.nn.Module) -> torch.nn.Module:
    """The part of `model` that cuts images into patches (the model itself for timm models).

    Raises:
        CaptureError: no module has a `patch_embed` with a `patch_size`.
    """
    for module in model.modules():
        if hasattr(getattr(module, "patch_embed", None), "patch_size"):
            return module
    raise CaptureError(
        f"{type(model).__name__} has no patch_embed with a patch_size, so the grid of its tokens is unknown; "
        "expected a Vision Transformer with timm's interface"
    )


def token_layout(vision: torch.nn.Module, image_shape: Sequence[int] | None = None) -> TokenLayout:
    """Grid, prefix and patch size as the model states them; the grid follows the input for dynamic sizes.

    Args:
        vision: a module with `patch_embed` (timm's interface).
        image_shape: shape of its input [image, channel, row, col], if known.
    """
    embed: Any = vision.patch_embed
    patch = embed.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    if image_shape is not None and hasattr(embed, "dynamic_feat_size"):
        rows, cols = embed.dynamic_feat_size(tuple(image_shape[-2:]))
    else:
        rows, cols = embed.grid_size
    return TokenLayout(
        grid_rows=rows,
        grid_cols=cols,
        num_prefix_tokens=getattr(vision, "num_prefix_tokens", 0),
        patch_height_px=patch_height,
        patch_width_px=patch_width,
        class_token=getattr(vision, "cls_token", None) is not None,
    )


def attention_map(query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None) -> torch.Tensor:
    """softmax(scale · q kᵀ + bias) in float32 (float64 for float64 input), [image, head, query, key]."""
    precise = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(precise) * scale) @ key.to(precise).transpose(-2, -1)
    if bias is not None:
        logits = logits.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else logits + bias.to(precise)
    return logits.softmax(dim=-1)


def capture_attention(
    model: torch.nn.Module, images: torch.Tensor, *, layers: Collection[int] | None = None
) -> dict[str, torch.Tensor]:
    """Maps of one batch, whole, in memory: for a look, not for a data set.

    Args:
        model: see `AttentionTap`; run in eval mode and put back as it was.
        images: what `model` takes, [image, channel, row, col].
        layers: layers to keep; None: all.

    Returns:
        {"blocks.0.attn": float32 [image, head, query, key] on the CPU, ...} in depth order.

    Raises:
        CaptureError: the model has no measurable attention.
    """
    maps: dict[str, torch.Tensor] = {}

    def keep(
        site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        maps[site.name] = attention_map(query, key, scale, bias).float().cpu()

    with evaluating(model), torch.inference_mode(), AttentionTap(model, keep, layers=layers):
        model(images)
    return maps


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode after."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def discover_sites(
    model: torch.nn.Module, images: torch.Tensor, layers: Collection[int] | None = None
) -> tuple[list[AttentionSite], list[tuple[str, str]], int]:
    """Measurable sites in depth order, what was skipped and why, and the number of logits, by one forward pass."""
    found: list[AttentionSite] = []
    tap = AttentionTap(model, lambda site, *call: found.append(site), layers=layers)
    with evaluating(model), torch.inference_mode(), tap:
        logits = model(images)
    return found, tap.skipped, int(logits.shape[-1])
