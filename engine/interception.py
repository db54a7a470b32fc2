"""The one function mode that sees a model's operations; capture and relevance both stand on it.

timm, Hugging Face and torchvision models compute attention in `F.scaled_dot_product_attention`. A hook on a module
cannot see that call's arguments, but a `TorchFunctionMode` around the forward pass can, after RoPE and q/k-norm, with
the fused kernel still running. What it cannot see by itself is which module makes the call, so forward hooks keep
the name of the innermost running module beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = ["FunctionCall", "ModelInterception"]


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of a torch function inside a model's forward pass.

    Args:
        function: the torch function.
        args, kwargs: as called.
        module: name of the innermost module that was running, "" at the model itself.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    module: str

    def run(self) -> Any:
        """The function's own result."""
        return self.function(*self.args, **self.kwargs)


class ModelInterception(TorchFunctionMode):
    """Hands chosen function calls of `model`'s forward passes to handlers; the model is unchanged afterwards.

    Inside the context, modules whose `fused_attn` flag is off are switched to the fused call (which is what can be
    seen); the flags are restored on the way out, after an exception too.

    Args:
        model: an uncompiled module.
        handlers: torch function -> handler; a handler gets the `FunctionCall` and returns the call's result.

    Raises:
        TypeError: the model was compiled: its graph no longer makes the calls one at a time.
    """

    def __init__(
        self, model: torch.nn.Module, handlers: Mapping[Callable[..., Any], Callable[[FunctionCall], Any]]
    ) -> None:
        super().__init__()
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            raise TypeError(
                f"{type(model._orig_mod).__name__} is wrapped by torch.compile, whose graph does not make its "
                "attention calls one at a time; pass the original module (model._orig_mod)"
            )
        self.model = model
        self._handlers = dict(handlers)
        self._running: list[str] = []
        self._hooks: list[RemovableHandle] = []
        self._fused_before: list[tuple[torch.nn.Module, bool]] = []

    @property
    def running_module(self) -> str:
        """Name of the innermost module that is running now."""
        return self._running[-1] if self._running else ""

    def __enter__(self) -> ModelInterception:
        for name, module in self.model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name)))
            # always_call: the name must leave the stack when the forward raises, too.
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
            fused = getattr(module, "fused_attn", None)
            if isinstance(fused, bool):
                self._fused_before.append((module, fused))
                vars(module)["fused_attn"] = True  # timm's own flag, a plain bool beside tensors and modules
        super().__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        for hook in self._hooks:
            hook.remove()
        for module, fused in self._fused_before:
            vars(module)["fused_attn"] = fused
        self._hooks.clear()
        self._fused_before.clear()
        self._running.clear()

    def _entering(self, name: str) -> Callable[[torch.nn.Module, Any], None]:
        def enter(module: torch.nn.Module, args: Any) -> None:
            self._running.append(name)

        return enter

    def _leaving(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(FunctionCall(func, args, kwargs or {}, self.running_module))
