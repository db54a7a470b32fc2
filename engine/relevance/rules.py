"""Relevance rules of a model's operations (Chefer et al., CVPR 2021), as autograd nodes with two kinds of backward.

During one forward pass every operation that carries relevance becomes a node that remembers its operands. Two backward
passes go through the same graph: the first takes true gradients, the second redistributes relevance by the rules here,
chosen by `Passes.relevance`. Operations that only move numbers about are left to autograd, whose backward is their
rule. An operation without a rule raises: it never passes silently.

α = 1, β = 0 throughout, as in the published code; a quotient R/Z is `over(R, Z)`. Sums that the published code takes
over the batch are taken image by image, so that a batch gives what single images give.

Nodes keep detached tensors only: a tensor of the outer graph in a node would be a cycle that nothing frees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from engine.capture import FunctionCall, attention_map, read_attention_call

_EPS = 1e-9


def over(relevance: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """R / (Z + 1e-9), and 0 where Z is 0; the constant is added whatever the sign of Z, as in the published code."""
    shifted = total + _EPS
    zero = total == 0
    shifted.masked_fill_(shifted == 0, _EPS)
    return torch.div(relevance, shifted, out=shifted).masked_fill_(zero, 0.0)


@dataclass
class Passes:
    """What the two backward passes of one forward pass share."""

    relevance: bool = False  # whether backward redistributes relevance; it takes gradients before that
    lost: torch.Tensor | float = 0.0  # [image], relevance that constant operands took with them, out of 1
    # Module, relevance [image] at each probe, from the last one down, and what of 1 should be there.
    stream: list[tuple[str, torch.Tensor, torch.Tensor | float]] = field(default_factory=list)


class _Node(torch.autograd.Function):
    """A node whose backward is its rule's `gradient` or its `redistribute`."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, rule: Rule, *carriers: torch.Tensor) -> torch.Tensor:
        ctx.passes, ctx.rule = passes, rule
        return rule.forward(*carriers)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rule: Rule = ctx.rule
        parts = rule.redistribute(upstream[0], ctx.passes) if ctx.passes.relevance else rule.gradient(upstream[0])
        return (None, None, *parts)


def named_arguments(call: FunctionCall) -> dict[int | str, Any]:
    """All arguments of a call, by position or keyword."""
    return dict([*enumerate(call.args), *call.kwargs.items()])


def node(passes: Passes, rule: Rule, *carriers: torch.Tensor) -> torch.Tensor:
    """The rule's value, as a node behind the tensors of the outer graph that carry relevance to it."""
    result: torch.Tensor = _Node.apply(passes, rule, *carriers)
    return result


class Rule:
    """One operation: its value, its gradient and its relevance.

    The default runs the operation on operands of its own, which keep a small graph, and passes relevance on unchanged:
    the rule of activations, norms, signs, and of products and sums with a constant. `places` says where among the
    call's arguments the operands stand that carry relevance: positions, or keywords.
    """

    keeps_graph = False  # whether `redistribute` needs the small graph, too
    operands: list[torch.Tensor]
    output: torch.Tensor

    def __init__(self, call: FunctionCall, places: Sequence[int | str]) -> None:
        self._call = call
        self._places = places

    def apply(self, passes: Passes) -> torch.Tensor:
        """The operation's result, as a node."""
        arguments = named_arguments(self._call)
        result = node(passes, self, *(arguments[place] for place in self._places))
        del self._call  # its arguments belong to the outer graph
        return result

    def forward(self, *carriers: torch.Tensor) -> torch.Tensor:
        self.operands = [carrier.detach().requires_grad_() for carrier in carriers]
        with torch.enable_grad():
            self.output = self.evaluate(self.operands)
        return self.output.detach()

    def evaluate(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        arguments = named_arguments(self._call) | dict(zip(self._places, operands, strict=True))
        if arguments.get("inplace"):
            arguments["inplace"] = False
        args = [arguments[place] for place in range(len(self._call.args))]
        result: torch.Tensor = self._call.function(*args, **{name: arguments[name] for name in self._call.kwargs})
        return result

    def gradient(self, upstream: torch.Tensor) -> Sequence[torch.Tensor]:
        gradients = torch.autograd.grad(self.output, self.operands, upstream, retain_graph=self.keeps_graph)
        if not self.keeps_graph:
            del self.output
        return gradients

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        return (upstream,)


class ProbeRule(Rule):
    """No operation: a place where the relevance of each image is summed into `passes.stream`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def forward(self, *carriers: torch.Tensor) -> torch.Tensor:
        return carriers[0]

    def gradient(self, upstream: torch.Tensor) -> Sequence[torch.Tensor]:
        return (upstream,)

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        passes.stream.append((self.name, upstream.flatten(1).sum(dim=1), 1.0 - passes.lost))
        return (upstream,)


class UnitRule(Rule):
    """Several operations as one, such as a norm written out in them: relevance passes through.

    `output` is what they made of `operand`, which requires a gradient and is outside the outer graph.
    """

    def __init__(self, operand: torch.Tensor, output: torch.Tensor) -> None:
        self.operands, self.output = [operand], output

    def forward(self, *carriers: torch.Tensor) -> torch.Tensor:
        return self.output.detach()


class LinearRule(Rule):
    """R_j = Σ_k (x⁺_j w⁺_jk + x⁻_j w⁻_jk) R_k / Z_k, Z_k the sum of those terms over j; the bias takes no share."""

    def __init__(self, call: FunctionCall, places: Sequence[int | str]) -> None:
        super().__init__(call, places)
        arguments = dict(zip(("input", "weight", "bias"), call.args, strict=False)) | dict(call.kwargs)
        self.weight: torch.Tensor = arguments["weight"].detach()
        self.bias: torch.Tensor | None = arguments.get("bias")

    def forward(self, *carriers: torch.Tensor) -> torch.Tensor:
        self.operands = [carriers[0].detach()]
        return F.linear(carriers[0], self.weight, self.bias)

    def gradient(self, upstream: torch.Tensor) -> Sequence[torch.Tensor]:
        return (upstream @ self.weight,)

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        (x,) = self.operands
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        signed = torch.cat([rows.clamp(min=0), rows.clamp(max=0)], dim=1)  # [row, x⁺ then x⁻]
        weight = torch.cat([self.weight.clamp(min=0), self.weight.clamp(max=0)], dim=1)  # [out, w⁺ then w⁻]
        share = over(upstream.reshape(-1, weight.shape[0]), signed @ weight.T)
        parts = (share @ weight).mul_(signed)
        return ((parts[:, :width] + parts[:, width:]).reshape(x.shape),)


class VjpRule(Rule):
    """R_x = x · ∂Z/∂x (R / Z): sums and means over an axis, and the sum inside a rotary position embedding."""

    keeps_graph = True

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        share = over(upstream, self.output.detach())
        parts = torch.autograd.grad(self.output, self.operands, share)
        del self.output
        return [operand.detach() * part for operand, part in zip(self.operands, parts, strict=True)]


class ProductRule(VjpRule):
    """A product of two operands that both carry relevance, such as a gate: half to each."""

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        return [part / 2 for part in super().redistribute(upstream, passes)]


class ResidualRule(Rule):
    """a + b: shares a R/Z and b R/Z, then scaled so that the operands' totals stand as |Σa| to |Σb|, image by image."""

    def forward(self, *carriers: torch.Tensor) -> torch.Tensor:
        self.operands = [carrier.detach() for carrier in carriers]
        return self.evaluate(self.operands)

    def gradient(self, upstream: torch.Tensor) -> Sequence[torch.Tensor]:
        return (upstream, upstream)

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        a, b = self.operands
        share = over(upstream, a + b)
        parts = [a * share, share.mul_(b)]
        totals = [part.flatten(1).sum(dim=1) for part in parts]
        whole = upstream.flatten(1).sum(dim=1)
        both = totals[0].abs() + totals[1].abs()
        image = (-1,) + (1,) * (upstream.ndim - 1)
        return [
            part.mul_(over(over(total.abs(), both) * whole, total).reshape(image))
            for part, total in zip(parts, totals, strict=True)
        ]


class AttentionRule(Rule):
    """One `F.scaled_dot_product_attention` call, run by the fused kernel; its map is made again, image by image.

    Both products are halved between their operands, and the map's own relevance is read after the first halving:
    R_A = A ⊙ ((R/O) Vᵀ) / 2. Softmax passes R_A on to the logits; the scale cancels there, and a mask or bias is a
    constant. A query that is a constant (attention pooling) takes its quarter of the relevance with it.
    """

    output_gradient: torch.Tensor  # after the first pass, [image, head, query, dim]
    weighted: torch.Tensor  # after the second pass, mean over heads of (∇A ⊙ R_A)⁺, [image, query, key]

    def __init__(self, call: FunctionCall, places: Sequence[int | str]) -> None:
        super().__init__(call, places)
        read = read_attention_call(call)
        self._factors = {name: getattr(read, name).detach() for name in ("query", "key", "value")}
        self._carrying = [("query", "key", "value")[p] if isinstance(p, int) else p for p in places]
        self._scale, self._bias = read.scale, read.bias

    def forward(self, *carriers: torch.Tensor) -> torch.Tensor:
        self._result = super().forward(*carriers)
        # A second tensor on the same numbers: the one returned becomes part of the outer graph.
        return self._result.detach()

    def gradient(self, upstream: torch.Tensor) -> Sequence[torch.Tensor]:
        self.output_gradient = upstream
        return super().gradient(upstream)

    def redistribute(self, upstream: torch.Tensor, passes: Passes) -> Sequence[torch.Tensor]:
        parts = self.attribute(upstream)
        passes.lost = passes.lost + sum(
            (part.flatten(1).sum(dim=1) for name, part in parts.items() if name not in self._carrying), start=0.0
        )
        return [parts[name] for name in self._carrying]

    def attribute(self, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sets `weighted`; returns the relevance of query, key and value."""
        share = over(upstream, self._result)
        parts = {name: torch.empty_like(factor) for name, factor in self._factors.items()}
        images, heads, queries, _ = self._result.shape
        keys = self._factors["key"].shape[2]
        bias = None if self._bias is None else self._bias.expand(images, heads, queries, keys)
        self.weighted = share.new_empty(images, queries, keys)
        for image in range(images):  # an image's maps fit a core's cache; the batch's would not
            query, key, value = (self._factors[name][image] for name in ("query", "key", "value"))
            attention = attention_map(query, key, self._scale, None if bias is None else bias[image])
            of_attention = (share[image] @ value.transpose(-2, -1)).mul_(attention).div_(2)
            gradient = self.output_gradient[image] @ value.transpose(-2, -1)
            torch.mean(gradient.mul_(of_attention).clamp_(min=0), dim=0, out=self.weighted[image])
            torch.mul(attention.transpose(-2, -1) @ share[image], value / 2, out=parts["value"][image])
            of_logits = over(of_attention, query @ key.transpose(-2, -1)).div_(2)
            torch.mul(of_logits @ key, query, out=parts["query"][image])
            torch.mul(of_logits.transpose(-2, -1) @ query, key, out=parts["key"][image])
        return parts
