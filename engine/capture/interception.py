"""The one function mode that sees a model's operations; capture and relevance both stand on it.

timm, Hugging Face and torchvision models compute attention in `F.scaled_dot_product_attention`. A hook on a module
cannot see that call's arguments, but a `TorchFunctionMode` around the forward pass can, after RoPE and q/k-norm, with
the fused kernel still running. Which module makes the call stands in the interpreter's stack: the innermost frame of
`nn.Module.__call__`. Hooks on every module would say the same at a cost for every call of a module.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Names that wrappers inside a model put between a module and its children; a site is named as without them.
_WRAPPER_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "base_layer"})


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """One call of a torch function."""

    function: Callable[..., Any]  # the torch function
    args: tuple[Any, ...]  # as called
    kwargs: Mapping[str, Any]
    # Name of the innermost module of the model that was running, "" at the model itself; None for a call that none of
    # its modules made. Modules without children count as the one that holds them.
    module: str | None
    caller: torch.nn.Module | None = None  # that module

    def run(self) -> Any:
        """The function's own result."""
        return self.function(*self.args, **self.kwargs)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside `torch.compile`, (Distributed)DataParallel and peft, whose names and tokens are the model's own.

    Raises:
        TypeError: the wrapper hides the model's operations: TorchScript, or DataParallel over several devices.
    """
    peft = sys.modules.get("peft")
    while True:
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                f"{model.original_name} is TorchScript, whose operations run outside Python and cannot be seen; "
                "pass the original module"
            )
        if isinstance(model, torch.nn.DataParallel) and len(model.device_ids) > 1:
            raise TypeError(
                f"DataParallel runs copies of {type(model.module).__name__} on {len(model.device_ids)} devices in "
                "threads of their own, where nothing can be seen; pass and call the original module (model.module)"
            )
        if isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif peft is not None and isinstance(model, peft.PeftModel):
            model = model.get_base_model()
        else:
            return model


def named_modules(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules of an unwrapped model in order, named as without the wrappers that torch and peft put inside."""
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPER_NAMES), module


class ModelInterception(AbstractContextManager["ModelInterception"]):
    """Hands chosen function calls to handlers while the context is open; the model is unchanged afterwards.

    Inside the context the model runs so that its calls can be seen, and after it (after an exception, too) as before:
    modules whose `fused_attn` flag is off are switched to the fused call, Hugging Face models of another attention
    implementation to `sdpa`, and whatever `torch.compile` compiled runs uncompiled. `nn.MultiheadAttention` takes its
    Python path, where `F.multi_head_attention_forward` is followed into its body, instead of its native fast path.

    Calls are seen in the thread that opened the context. Contexts may be nested, on one model or on several.

    Args:
        model: see `unwrapped` for the wrappers that may be around it.
        handlers: torch function -> handler; a handler gets the `FunctionCall` and returns the call's result.
        others: handler of every other torch function; None: they run as they are.

    Raises:
        TypeError: see `unwrapped`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        handlers: Mapping[Callable[..., Any], Callable[[FunctionCall], Any]],
        others: Callable[[FunctionCall], Any] | None = None,
    ) -> None:
        self.model = unwrapped(model)
        self._handlers = dict(handlers)
        self._others = others
        self._names: dict[torch.nn.Module, str] | None = None
        self._open: ExitStack | None = None  # all that is undone at the end

    def __enter__(self) -> ModelInterception:
        if self._open is not None:
            raise RuntimeError("this context is open already; make another one to nest it")
        with ExitStack() as stack:
            if self._names is None:
                stack.enter_context(self.prepared())
            assert self._names is not None
            stack.enter_context(_Mode(self._handlers, self._others, self._names))
            self._open = stack.pop_all()
        return self

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, this context may be opened and closed often at little cost: it looks through the model once."""
        self._names = {module: name for name, module in named_modules(self.model) if module._modules or not name}
        try:
            with ExitStack() as stack:
                stack.enter_context(_fused(self.model))
                if "torch._dynamo" in sys.modules:  # otherwise nothing has been compiled
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                yield
        finally:
            self._names = None

    def __exit__(self, *error: object) -> None:
        assert self._open is not None
        stack, self._open = self._open, None
        stack.close()


class _Mode(TorchFunctionMode):
    """Sees every torch function, most of which it only passes on: that is all that the first lines do."""

    def __init__(
        self,
        handlers: Mapping[Callable[..., Any], Callable[[FunctionCall], Any]],
        others: Callable[[FunctionCall], Any] | None,
        names: Mapping[torch.nn.Module, str],
    ) -> None:
        super().__init__()
        self._handlers, self._others, self._names = handlers, others, names

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is _MULTI_HEAD_ATTENTION:
            with self:
                return _multi_head_attention_body(*args, **(kwargs or {}))
        handler = self._handlers.get(func, self._others)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        caller = _innermost(self._names)
        name = None if caller is None else self._names[caller]
        return handler(FunctionCall(func, args, kwargs or {}, name, caller))


def _innermost(modules: Mapping[torch.nn.Module, str]) -> torch.nn.Module | None:
    """The innermost of these modules that is being called in this thread."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            module: torch.nn.Module = frame.f_locals["self"]
            if module in modules:
                return module
        frame = frame.f_back
    return None


_MODULE_CALL = torch.nn.Module.__call__.__code__

# A mode is handed `F.multi_head_attention_forward` whole. This is the same code without the question at its top
# whether somebody wants it whole, so that under a mode its operations are seen one at a time.
_MULTI_HEAD_ATTENTION = F.multi_head_attention_forward
_multi_head_attention_body = types.FunctionType(
    _MULTI_HEAD_ATTENTION.__code__,
    vars(F) | {"has_torch_function": lambda tensors: False},
    _MULTI_HEAD_ATTENTION.__name__,
    _MULTI_HEAD_ATTENTION.__defaults__,
)


@contextmanager
def _fused(model: torch.nn.Module) -> Iterator[None]:
    """Fused attention on inside, every module's own setting after."""
    hugging_face = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    with ExitStack() as stack:
        for module in model.modules():
            attributes = vars(module)
            if attributes.get("fused_attn") is False:
                attributes["fused_attn"] = True  # timm's own flag, a plain bool beside tensors and modules
                stack.callback(attributes.__setitem__, "fused_attn", False)
            if isinstance(module, hugging_face):
                config = module.config
                before = config._attn_implementation
                if before != "sdpa" and module._supports_sdpa:
                    # The key that attention modules look up at each call; `set_attn_implementation` would load kernels.
                    config._attn_implementation_internal = "sdpa"
                    stack.callback(setattr, config, "_attn_implementation_internal", before)
        yield
