"""LRP through a Vision Transformer (Chefer et al., CVPR 2021, `transformer_attribution`), batched, for any class.

    Ā_b = I + mean_h (∇A_b ⊙ R_A,b)⁺, multiplied over the blocks, read where the prediction is read out

The model runs once, unmodified and with fused attention, under a function mode that turns each operation into a node of
`engine.relevance.rules`; two backward passes give ∇A and R_A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import resolve_name

from engine.capture import (
    CaptureError,
    FunctionCall,
    ModelInterception,
    patch_stem,
    read_attention_call,
    token_layout,
    transformer_blocks,
    vision_module,
)
from engine.relevance.chain import check_call, product_row, read_tokens, with_identity
from engine.relevance.method import relevance_method
from engine.relevance.rules import (
    AttentionRule,
    LinearRule,
    Passes,
    ProbeRule,
    ProductRule,
    ResidualRule,
    Rule,
    UnitRule,
    VjpRule,
    named_arguments,
    node,
)
from engine.relevance.targets import class_logits
from kernels import TokenLayout

# Relevance that is lost or made on the way beyond this share means that a rule does not fit the model.
_LEAK = 0.01

# What only moves numbers about: autograd's own backward moves relevance back. Dropout is one of them in eval mode.
_SHAPES = {"flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}
_AXES = {"T", "flip", "mT", "movedim", "permute", "roll", "swapaxes", "swapdims", "t", "transpose"}
_PIECES = {"__getitem__", "chunk", "gather", "index_select", "narrow", "select", "split", "tensor_split", "unbind"}
_COPIES = {"cat", "clone", "concat", "concatenate", "contiguous", "dropout", "expand", "expand_as", "pad", "stack"}
_TYPES = {"bfloat16", "double", "float", "half", "to", "type_as"}
_MOVES = _SHAPES | _AXES | _PIECES | _COPIES | _TYPES
# One operand in, the same shape out: relevance passes through.
_ACTIVATIONS = {"elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "selu"}
_PASSES = _ACTIVATIONS | {"neg", "sigmoid", "silu", "softplus", "tanh", "layer_norm", "rms_norm", "group_norm"}
_WITH_A_CONSTANT = {"add", "div", "mul", "sub", "true_divide"}
_OVER_AN_AXIS = {"mean", "sum"}
# New tensors that hold none of the old one's numbers.
_FRESH = {"empty_like", "full_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"}


class Propagation:
    """One forward pass of `model` under the rules; a context manager around it, and two backward passes after it."""

    def __init__(self, model: torch.nn.Module, layout: TokenLayout, num_images: int) -> None:
        self.passes = Passes()
        self.attention: list[tuple[str, AttentionRule]] = []  # with the module that calls, in depth order
        self._model, self._layout, self._num_images = model, layout, num_images
        self._lowest: torch.Tensor | None = None
        self._pooled = False
        self._unit: tuple[torch.nn.Module, torch.Tensor] | None = None  # the norm that is running, and its input
        self._replaced: list[torch.Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the model's operations become nodes, from the output of its patch embedding on."""
        with ExitStack() as hooks:
            hooks.enter_context(patch_stem(vision_module(self._model)).register_forward_hook(self._begin))
            for name, block in transformer_blocks(self._model):
                hooks.enter_context(block.register_forward_hook(self._probing(name)))
            for module in self._model.modules():
                # A norm is one operation, whether it calls one (F.layer_norm) or is written out (timm's RmsNorm).
                if "Norm" in type(module).__name__ and not any(module.children()):
                    hooks.enter_context(module.register_forward_pre_hook(self._enter_unit))
                    hooks.enter_context(module.register_forward_hook(self._leave_unit))
            with ModelInterception(self._model, {F.scaled_dot_product_attention: self._attend}, others=self._operate):
                yield

    def backward(self, logits: torch.Tensor) -> None:
        """Both passes, from relevance 1 at each image's logit to the lowest attention call; it must not leak."""
        if self._lowest is None:
            raise CaptureError(f"{type(self._model).__name__} made no attention call that relevance could follow")
        lowest = self.attention[0][1]
        (lowest.output_gradient,) = torch.autograd.grad(logits.sum(), [self._lowest], retain_graph=True)
        self.passes.relevance = True
        (relevance,) = torch.autograd.grad(logits.sum(), [self._lowest])
        lowest.attribute(relevance)
        if not self.passes.stream:
            raise CaptureError(
                f"lrp finds no blocks of {type(self._model).__name__} behind which it could check that relevance is "
                "conserved; use method generic"
            )
        for name, total, expected in self.passes.stream:
            off = float((total - expected).abs().max())
            if not off <= _LEAK:
                raise CaptureError(
                    f"lrp does not fit {type(self._model).__name__}: of a relevance of 1, {off:.2g} is lost or made "
                    f"above {name}; use method generic"
                )

    def _begin(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            raise CaptureError(
                f"lrp needs a patch embedding that returns one tensor; that of {type(self._model).__name__} returns "
                f"a {type(output).__name__}"
            )
        return output.detach().requires_grad_()

    def _probing(self, name: str) -> Any:
        def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
            tokens, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            if not _carries(tokens):
                return output
            probed = node(self.passes, ProbeRule(name), tokens)
            return probed if rest is None else (probed, *rest)

        return after

    def _enter_unit(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._unit is not None or not args or not _carries(args[0]):
            return args
        self._unit = (module, args[0])
        return (args[0].detach().requires_grad_(), *args[1:])

    def _leave_unit(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        if self._unit is None or self._unit[0] is not module:
            return output
        result = node(self.passes, UnitRule(args[0], output), self._unit[1])
        self._unit = None
        return result

    def _attend(self, call: FunctionCall) -> torch.Tensor:
        self._check_replaced(call)
        read = read_attention_call(call)
        self._pooled = check_call(read, call.module, self._layout, self._num_images, self._pooled)
        if read.bias is not None and read.bias.requires_grad:
            raise self._no_rule(call, "its bias carries relevance")
        rule = AttentionRule(call, _places(call))
        output = rule.apply(self.passes)
        if not output.requires_grad:
            raise self._no_rule(call, "nothing that comes from the patch embedding reaches it")
        self.attention.append((call.module or "the model", rule))
        if self._lowest is None:
            self._lowest = output
        return output

    def _operate(self, call: FunctionCall) -> Any:
        """Every other operation: run as it is, or as a node, or refused."""
        name = _name(call)
        if self._unit is not None:
            return call.run()
        if self._replaced:
            self._check_replaced(call)
        if not _carries((call.args, call.kwargs)) or name in _MOVES or name in _FRESH:
            return call.run()
        operation = name.removesuffix("_")
        # What is done in place is done beside the tensor instead.
        beside = call if operation == name else replace(call, function=getattr(torch, operation, call.function))
        rule = self._rule(operation, beside)
        if rule is None:
            result = call.run()
            if _holds(result, torch.Tensor.is_floating_point):
                raise self._no_rule(call, "no rule is known for it here")
            return result
        if not torch.is_grad_enabled():
            raise self._no_rule(call, "gradients are switched off there")
        if beside is not call:
            self._replaced.append(call.args[0])  # whoever goes on with it instead of the result is found out
        return rule.apply(self.passes)

    def _rule(self, name: str, call: FunctionCall) -> Rule | None:
        """The rule of an operation on these operands; None where there is none."""
        places = _places(call)
        if len(places) != sum(tensor.requires_grad for tensor in _tensors((call.args, call.kwargs))):
            return None  # a carrier inside a list
        operands = [named_arguments(call)[place] for place in places]
        first = places[0] in (0, "input")
        if first and len(places) == 1:
            if name == "linear":
                return LinearRule(call, places)
            if name in _PASSES:
                return Rule(call, places)
            if name in _OVER_AN_AXIS:
                return VjpRule(call, places)
        if name in _WITH_A_CONSTANT and len(places) == 1:
            shapes = [value.shape for value in call.args if isinstance(value, torch.Tensor)]
            if operands[0].shape == torch.broadcast_shapes(*shapes) and (first or name in ("add", "mul")):
                return Rule(call, places)
        if name == "mul" and len(places) == 2:
            return ProductRule(call, places)
        if name == "add" and len(places) == 2 and not call.kwargs and operands[0].shape == operands[1].shape:
            # Heads apart inside an attention module: the two halves of a rotary embedding, not a residual stream.
            if operands[0].ndim == 4 and hasattr(call.caller, "num_heads"):
                return VjpRule(call, places)
            if operands[0].shape[0] == self._num_images:
                return ResidualRule(call, places)
        return None

    def _check_replaced(self, call: FunctionCall) -> None:
        if _holds((call.args, call.kwargs), lambda tensor: any(tensor is old for old in self._replaced)):
            raise self._no_rule(call, "it goes on with a tensor that was changed in place")

    def _no_rule(self, call: FunctionCall, reason: str) -> CaptureError:
        operation = resolve_name(call.function) or str(call.function)
        where = f"{call.module} ({type(call.caller).__name__})" if call.module else type(self._model).__name__
        return CaptureError(f"lrp cannot follow {operation} in {where}: {reason}; use method generic")


@relevance_method(dtype=torch.float64)
def lrp_maps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Product over layers of I + mean_h (∇A ⊙ R_A)⁺, read where the prediction is read out, [image, row, col].

    CaptureError where an operation that carries relevance has no rule, or relevance is not conserved.
    """
    _check_model(model)
    layout = token_layout(vision_module(model), images.shape)
    propagation = Propagation(model, layout, images.shape[0])
    logits = class_logits(model, images, targets, dtype, propagation.watching())
    propagation.backward(logits)
    steps = [with_identity(rule.weighted) for _, rule in propagation.attention]
    last, top = propagation.attention[-1]
    return product_row(steps, read_tokens(top.output_gradient, last), layout)


def _check_model(model: torch.nn.Module) -> None:
    """Refuses adapters that are not merged, and recomputation of activations."""
    for name, module in model.named_modules():
        if getattr(module, "active_adapters", None) and getattr(module, "merged", True) is False:
            raise CaptureError(
                f"lrp needs adapters merged into the weights; those of {name} are not (merge_and_unload)"
            )
        if getattr(module, "grad_checkpointing", False) is True:
            raise CaptureError("lrp cannot follow recomputed activations; call model.set_grad_checkpointing(False)")


def _name(call: FunctionCall) -> str:
    """ "add" for torch.add and torch.Tensor.add, "add_" in place, "mT" for the property."""
    name = str(getattr(call.function, "__name__", call.function))
    if name == "__get__":
        return (resolve_name(call.function) or name).split(".")[-2]
    return name


def _places(call: FunctionCall) -> list[int | str]:
    """Positions and keywords of the arguments that carry relevance."""
    return [place for place, value in named_arguments(call).items() if _carries(value)]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _holds(value: Any, condition: Callable[[torch.Tensor], bool]) -> bool:
    return any(condition(tensor) for tensor in _tensors(value))


def _carries(value: Any) -> bool:
    return _holds(value, lambda tensor: tensor.requires_grad)
