"""Post-softmax attention of every layer, head and image, while the model runs at full speed.

`AttentionTap` sees the exact q, k, scale and bias of every attention call and hands them to a callback. From there, a
data set's attention goes through `engine.capture.stream` to its sinks and into the store.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F

from engine.capture.attention_call import (
    AttentionSite,
    SiteAttention,
    by_head,
    no_autocast,
    of_heads,
    read_attention_call,
    unmeasurable,
)
from engine.capture.families import CaptureError, LayoutError, num_heads, patch_stem, token_layout, vision_module
from engine.capture.interception import FunctionCall, ModelInterception, named_modules, unwrapped
from kernels import TokenLayout
from train.precision import float32_convolutions

Callback = Callable[[AttentionSite, torch.Tensor, torch.Tensor, float, torch.Tensor | None], object]


class AttentionTap(AbstractContextManager["AttentionTap"]):
    """Inside the context, every attention call of `model` is handed to `on_attention`; the model is not changed.

        with AttentionTap(model, on_attention=callback) as tap:
            model(images)

    Works for timm, Hugging Face and torchvision models; in eval and train mode (maps are those before dropout); under
    autocast (query and key have the type that the kernel computes in); with gradient checkpointing (what is recomputed
    in the backward pass is not handed over again); wrapped by peft, by DistributedDataParallel and by `torch.compile`,
    whose graphs run uncompiled inside the context. Several taps may be open at once, on one model or on several.
    Opening one looks through the model; inside `with tap.prepared():` it does so once for all batches:

        with tap.prepared():
            for images in batches:
                with tap:
                    model(images)

    Args:
        model: any model that computes attention by `F.scaled_dot_product_attention`, directly or in
            `nn.MultiheadAttention`.
        on_attention: called as `(site, query, key, scale, bias)` in depth order, while the forward pass is running;
            query and key are [image, head, token, head_dim] after RoPE and q/k-norm, scale multiplies q·k, bias is
            None, additive or boolean (True = attend), broadcastable to [image, head, query, key]. They are the
            model's own tensors, part of its autograd graph if there is one: read them, don't keep them.
        layers: layers to hand over, counted in depth order from 0 over the measurable sites; None: all.
        heads: heads of each layer to hand over, counted from 0; None: all.
        on_unmeasurable: what to do with a call whose map does not have that shape (windowed, pooled keys,
            class-attention, attention pooling): "skip" lists it in `skipped`, "raise" raises.

    Attributes:
        on_attention: may be set to another one between forward passes.
        sites: module name -> AttentionSite, in depth order, of what was seen.
        skipped: list of (module name, reason).

    Raises:
        CaptureError: the model's patch grid is unknown; after the first forward pass, if it had no measurable site
            (or lacks one of the chosen layers or heads); at the end of the context, if no forward pass ran inside.
        TypeError: a wrapper hides the model's operations, see `engine.capture.interception.unwrapped`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        on_attention: Callback,
        *,
        layers: Collection[int] | None = None,
        heads: Collection[int] | None = None,
        on_unmeasurable: Literal["skip", "raise"] = "skip",
    ) -> None:
        if on_unmeasurable not in ("skip", "raise"):
            raise ValueError(f"on_unmeasurable is {on_unmeasurable!r}; expected 'skip' or 'raise'")
        self.model = unwrapped(model)
        self.sites: dict[str, AttentionSite] = {}
        self.skipped: list[tuple[str, str]] = []
        self.on_attention = on_attention
        self._layers = None if layers is None else frozenset(layers)
        self._heads = () if heads is None else tuple(sorted(set(heads)))
        self._on_unmeasurable = on_unmeasurable
        self._interception = ModelInterception(model, {F.scaled_dot_product_attention: self._attend})
        self._vision = vision_module(self.model)
        self._images = 0  # in the batch whose forward pass is running
        self._layout: TokenLayout | str = "no images passed through its patch embedding"  # or why there is none
        self._calls: dict[str, int] = {}  # a site's calls in this forward pass
        self._attending: dict[torch.nn.Module, str] = {}  # attention modules and their names
        self._ran: dict[str, None] = {}  # those that ran, in order, whether or not their call was seen
        self._checked = False
        self._open = ExitStack()
        self._noting = ExitStack()  # hooks of the first forward pass alone

    def __enter__(self) -> AttentionTap:
        with ExitStack() as stack:
            stack.enter_context(
                patch_stem(self._vision).register_forward_pre_hook(self._begin_forward, with_kwargs=True)
            )
            if not self._checked:
                stack.enter_context(self._noting)
                for name, module in _attention_modules(self.model):
                    self._attending[module] = name
                    self._noting.enter_context(module.register_forward_pre_hook(self._note_run))
                self._noting.enter_context(self.model.register_forward_hook(self._after_forward))
            stack.enter_context(self._interception)
            self._open = stack.pop_all()
        return self

    def prepared(self) -> AbstractContextManager[None]:
        """Inside, this tap may be opened and closed often at little cost."""
        return self._interception.prepared()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._open.close()
        if kind is None and not self._checked:
            self._check()  # a forward pass by parts, as by `forward_features`, or none

    def _begin_forward(self, stem: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = args[0] if args else next(iter(kwargs.values()))
        self._images = images.shape[0]
        self._calls.clear()
        try:
            self._layout = token_layout(
                self._vision, images.shape, kwargs.get("patch_coord"), kwargs.get("patch_valid")
            )
        except LayoutError as error:
            self._layout = str(error)

    def _note_run(self, module: torch.nn.Module, args: Any) -> None:
        self._ran[self._attending[module]] = None

    def _after_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._check()

    def _check(self) -> None:
        """After the first forward pass: what was measurable, and what was not seen at all."""
        self._checked = True
        self._noting.close()
        seen = {name.partition("#")[0] for name in (*self.sites, *(name for name, _ in self.skipped))}
        for name in self._ran:
            if not any(other == name or other.startswith(f"{name}.") for other in seen):
                self._skip(name, "it does not call F.scaled_dot_product_attention")
        model = type(self.model).__name__
        if not self.sites:
            reasons = _grouped(self.skipped) or (
                "no forward pass of it ran inside the context"
                if not self._images
                else "its forward pass never called F.scaled_dot_product_attention"
            )
            raise CaptureError(
                f"no attention of {model} can be captured: {reasons}; expected self-attention over all patches of the "
                "image"
            )
        if self._layers is not None and (missing := sorted(self._layers - {s.layer for s in self.sites.values()})):
            raise CaptureError(
                f"{model} has no layer {missing[0]}; its measurable layers are 0 to {len(self.sites) - 1}"
            )

    def _attend(self, call: FunctionCall) -> Any:
        if call.module is None or torch._C._current_graph_task_id() != -1:
            return call.run()  # another model's, or recomputed in the backward pass by gradient checkpointing
        read = by_head(read_attention_call(call), call.caller, self._images)
        name = call.module or type(self.model).__name__
        count = self._calls[name] = self._calls.get(name, 0) + 1
        if count > 1:
            name = f"{name}#{count}"  # a module that attends twice in one forward pass has two sites
        layout = self._layout
        reason = layout if isinstance(layout, str) else unmeasurable(read, layout, self._images)
        if isinstance(layout, str) or reason is not None:
            self._skip(name, str(reason))
            return call.run()
        site = self.sites.get(name)
        if site is None or site.layout != layout:
            layer = len(self.sites) if site is None else site.layer
            heads = self._check_heads(name, read.query.shape[1])
            site = self.sites[name] = AttentionSite(name, layer, heads, layout, self._heads)
        if self._layers is None or site.layer in self._layers:
            if self._heads:
                read = of_heads(read, self._heads)
            with no_autocast(read.query):  # measuring is no part of the model
                self.on_attention(site, read.query, read.key, read.scale, read.bias)
        return call.run()

    def _check_heads(self, name: str, count: int) -> int:
        """How many of a site's `count` heads are handed over."""
        missing = [head for head in self._heads if not 0 <= head < count]
        if missing:
            raise CaptureError(f"{name} has no head {missing[0]}; its heads are 0 to {count - 1}")
        return len(self._heads) or count

    def _skip(self, name: str, reason: str) -> None:
        if self._on_unmeasurable == "raise":
            raise CaptureError(f"the attention of {name} cannot be measured: {reason}")
        if (name, reason) not in self.skipped:
            self.skipped.append((name, reason))


def _attention_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Innermost modules that state a number of heads: those that should be seen attending when they run."""
    stated = [(name, module) for name, module in named_modules(model) if num_heads(module) is not None]
    outer = {".".join(name.split(".")[:depth]) for name, _ in stated for depth in range(len(name.split("."))) if name}
    return ((name, module) for name, module in stated if name not in outer)


def _grouped(skipped: list[tuple[str, str]]) -> str:
    """Skipped sites in one line, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped:
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(
        f"{names[0] if len(names) == 1 else f'{names[0]} … {names[-1]} ({len(names)} calls)'}: {reason}"
        for reason, names in by_reason.items()
    )


def capture_attention(
    model: torch.nn.Module,
    images: torch.Tensor,
    *,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> dict[str, torch.Tensor]:
    """Maps of one batch, whole, in memory: for a look, not for a data set.

    Args:
        model: see `AttentionTap`; run in eval mode and put back as it was.
        images: what `model` takes, [image, channel, row, col].
        layers, heads: those to keep; None: all.

    Returns:
        {"blocks.0.attn": float32 [image, head, query, key] on the CPU, ...} in depth order.

    Raises:
        CaptureError: the model has no measurable attention.
    """
    maps: dict[str, torch.Tensor] = {}

    def keep(attention: SiteAttention) -> None:
        maps[attention.site.name] = attention.maps().float().cpu()

    observe(model, images, keep, layers=layers, heads=heads)
    return maps


def observe(
    model: torch.nn.Module,
    images: torch.Tensor,
    look: Callable[[SiteAttention], object],
    *,
    layers: Collection[int] | None = None,
    heads: Collection[int] | None = None,
) -> tuple[Any, AttentionTap]:
    """One forward pass in eval mode without gradients, in which `look` is called at each site.

    Args:
        model, layers, heads: see `AttentionTap`.
        images: what `model` takes.

    Returns:
        What the model puts out, and the tap with its `sites` and what it `skipped`.

    Raises:
        CaptureError: the model has no measurable attention.
    """
    tap = AttentionTap(model, lambda *call: look(SiteAttention(*call)), layers=layers, heads=heads)
    with evaluating(model), torch.inference_mode(), tap:
        output = model(images)
    return output, tap


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, and float32 that is float32; every module's own mode after."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with float32_convolutions():
            yield
    finally:
        for module, training in before:
            module.training = training


def has_classes(model: torch.nn.Module, output: Any = None) -> bool:
    """Whether a model scores classes; False where it says itself that it has no head, or its `output` has no logits."""
    bare = unwrapped(model)
    count = getattr(bare, "num_classes", getattr(bare, "num_labels", None))  # timm's name, and Hugging Face's
    return count != 0 and (output is None or isinstance(getattr(output, "logits", output), torch.Tensor))


def logits_of(output: Any) -> torch.Tensor:
    """Scores [image, class] in what a model puts out: all of it, or the logits of a Hugging Face model's record.

    Raises:
        CaptureError: a record without logits.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise CaptureError(
            f"the model puts out a {type(output).__name__}, which has no logits; expected scores of classes, so take a "
            "model with a head"
        )
    return logits
