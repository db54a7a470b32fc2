"""The weights of a file under the names of a timm model, whatever code they were saved by.

A layout is found by trying: the one is taken by which all weights of the model's backbone appear. First the names as
they are, less what they all begin with (`model.`, `teacher.backbone.`, `visual.trunk.`, …); then those of Hugging
Face's transformers; then what timm's own filter of the family makes of them (DINOv2, I-JEPA, CLIP, SAM, …). Which
tensors of the file each weight comes from is followed through all of it, so that nothing is left out without a word.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from train.errors import InputError
from train.weights import WRAPPERS

Tensors = Mapping[str, torch.Tensor]

# Parts of pretraining that stand beside a backbone under its own names, and that no timm model has.
_PRETRAINING = ("decoder", "mask_token", "predictor", "projector", "pooler", "logit_scale", "n_averaged", "lm_head")


@dataclass(frozen=True)
class Fit:
    """A file's weights under a model's names, as far as they fit."""

    tensors: dict[str, torch.Tensor]  # by own names; those that the model lacks are of the backbone's part of the file
    sources: dict[str, tuple[str, ...]]  # own name -> names in the file that it comes from; none: zeros of a bias
    left_out: tuple[str, ...]  # names in the file from which no weight comes
    problems: int  # number of backbone weights that are missing, of another shape, or not the model's
    start: str = ""  # what the names began with
    other_starts: tuple[str, ...] = ()  # where all weights of the backbone are there as well
    layout: str = ""  # whose names they were, as the end of "names of …"; "" for the model's own


def fit(state: Tensors, model: nn.Module, classifiers: Sequence[str], path: Path) -> Fit:
    """Find the layout of a file by which all weights of a model's backbone appear, or the one that comes closest.
    A file may lack the weights of `classifiers`. Of `model`, names and shapes alone are read: it may be on device meta.
    """
    whole = _Model(model.state_dict(), tuple(classifiers))
    followed: Tensors = {name: _Followed.of(name, tensor) for name, tensor in state.items()}
    best: Fit | None = None
    for layout, candidate in _candidates(followed, model, whole):
        fitting = replace(_at_start(candidate, whole, state, path), layout=layout)
        if best is None or fitting.problems < best.problems:
            best = fitting
        if not best.problems:
            break
    assert best is not None  # the names as they are come first
    return best


def is_position(name: str) -> bool:
    """Whether a weight belongs to positions, of which another grid has another number."""
    leaf = name.rsplit(".", 1)[-1]
    return "pos_embed" in leaf or leaf.startswith(("rel_pos", "relative_position"))


def filter_of(model: nn.Module) -> Callable[[dict[str, torch.Tensor], nn.Module], Any] | None:
    """timm's function that turns checkpoints of a model's family into the model's names and grid."""
    function = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    if function is not None and "adapt_layer_scale" in inspect.signature(function).parameters:
        return functools.partial(function, adapt_layer_scale=True)  # names of DeiT III; others have none like them
    return function


class _Followed(torch.Tensor):
    """A tensor that knows from which tensors of a file it was made."""

    sources: frozenset[str] = frozenset()

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> _Followed:
        followed = tensor.as_subclass(_Followed)
        followed.sources = frozenset([name])
        return followed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(_BY_VALUE.get(func, func), types, args, kwargs or {})
        sources = [value.sources for value in _flat([*args, *(kwargs or {}).values()]) if isinstance(value, _Followed)]
        for value in _flat([made]):
            if isinstance(value, _Followed):
                value.sources = frozenset().union(*sources)
        return made


# A filter that writes `state["cls_token"] += …` gets a new tensor; the file's own stays as it was read.
_BY_VALUE = {getattr(torch.Tensor, f"{name}_"): getattr(torch.Tensor, name) for name in ("add", "sub", "mul", "div")}


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


class _Model:
    def __init__(self, expected: Tensors, classifiers: tuple[str, ...]) -> None:
        self.expected, self.classifiers = expected, classifiers
        self.heads = {f"{name}.{part}" for name in classifiers for part in ("weight", "bias")}
        self.backbone = frozenset(expected) - self.heads
        self.depth = max((name.count(".") for name in expected), default=0) + 1  # of names
        # Names that are not the model's and begin so belong to pretraining, or to a head that is no linear classifier.
        self.left_out = (*_PRETRAINING, *(f"{classifier}." for classifier in classifiers))


def _candidates(state: Tensors, model: nn.Module, whole: _Model) -> Iterator[tuple[str, Tensors]]:
    """The file's tensors under the names of each layout that there may be, most likely first."""
    yield "", state
    converted = _hugging_face(state, whole.classifiers)
    if converted is not None:
        yield "Hugging Face's transformers", converted
    filter_fn = filter_of(model)
    if filter_fn is None:
        return
    for names, layout in ((converted, "Hugging Face's transformers"), (state, "the original code, as timm reads them")):
        for start in _starts_to_try(names or {}, whole):
            inside = {name.removeprefix(start): t for name, t in (names or {}).items() if name.startswith(start)}
            filtered = _filtered(filter_fn, inside, model)
            if filtered:
                yield layout, filtered


def _filtered(filter_fn: Callable[..., Any], state: dict[str, torch.Tensor], model: nn.Module) -> Tensors:
    """What timm's filter makes of a state; {} where it is not made for such names."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some print
            filtered = filter_fn(dict(state), model)
    except Exception:  # foreign code on names it may not be made for: what it stumbles over cannot be known
        return {}
    tensors = {}
    for name, tensor in filtered.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            continue
        before = state.get(name)
        if before is not None and tensor.ndim == 4 and tensor.shape != before.shape:
            tensor = before  # patches of another size are another model's: not resized
        tensors[str(name)] = tensor
    return tensors


def _at_start(state: Tensors, whole: _Model, file: Tensors, path: Path) -> Fit:
    """The weights behind the one start of names at which all of the backbone's appear, or most of them."""
    counts = _starts(state, whole)
    complete = [start for start, count in counts.items() if count == len(whole.backbone)]
    start = _first(complete, path) if complete else max(counts, key=lambda start: counts[start], default="")
    tensors: dict[str, torch.Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    problems = len(whole.backbone) - counts.get(start, 0)
    for name, tensor in state.items():
        key = name.removeprefix(start)
        known = key in whole.expected or key in whole.heads
        if not name.startswith(start) or (not known and key.startswith(whole.left_out)):
            continue
        if key in whole.backbone:
            problems += not is_position(key) and tensor.shape != whole.expected[key].shape
        elif key not in whole.heads:
            problems += 1
        origins = getattr(tensor, "sources", frozenset()) or (frozenset([name]) & frozenset(file))
        tensors[key] = tensor.as_subclass(torch.Tensor)
        sources[key] = tuple(sorted(origins))
    used = {name for origins in sources.values() for name in origins}
    left_out = tuple(name for name in file if name not in used)
    others = tuple(other for other in complete if other != start)
    return Fit(tensors, sources, left_out, problems, start, others)


def _starts(state: Tensors, whole: _Model) -> Counter[str]:
    """How many of the backbone's weights stand behind each start of names."""
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for at in range(max(0, len(parts) - whole.depth), len(parts)):
            if ".".join(parts[at:]) in whole.backbone:
                counts["".join(f"{part}." for part in parts[:at])] += 1
    return counts


def _first(starts: list[str], path: Path) -> str:
    """The start that is taken of several: plain names, then by the order of `WRAPPERS`."""

    def rank(start: str) -> list[int]:
        parts = start.split(".")[:-1]
        return [WRAPPERS.index(part) if part in WRAPPERS else len(WRAPPERS) for part in parts]

    ordered = sorted(starts, key=rank)
    if len(ordered) > 1 and rank(ordered[0]) == rank(ordered[1]):
        raise InputError(
            f"checkpoint {path}: weights of the model stand behind {' and behind '.join(map(repr, ordered[:4]))}, and "
            f"nothing says which are meant; choose with model.state, such as {ordered[0].removesuffix('.')}"
        )
    return ordered[0]


def _starts_to_try(state: Tensors, whole: _Model) -> list[str]:
    """Each leading part of the likeliest start, and of what all names begin with: timm's filters know some of them."""
    counts = _starts(state, whole)
    likeliest = max(counts, key=lambda start: counts[start], default="")
    columns = zip(*(name.split(".")[:-1] for name in state), strict=False)
    common = "".join(f"{column[0]}." for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    starts = [""]
    for start in (likeliest, common):
        parts = start.split(".")[:-1][:8]
        starts += ["".join(f"{part}." for part in parts[: n + 1]) for n in range(len(parts))]
    return list(dict.fromkeys(starts))


# Names of transformers' ViT, DeiT, DINOv2 and CLIP vision models (as saved, and as in memory since its version 5),
# behind what they begin with -> timm's. In this order, each on what the one before it left.
_HUGGING_FACE = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.(cls_token|class_embedding)$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.(mask_token|register_tokens)$", r"\1"),
        (r"^embeddings\.(position_embeddings|position_embedding\.weight)$", "pos_embed"),
        (r"^embeddings\.(patch_embeddings\.projection|patch_embedding)\.", "patch_embed.proj."),
        (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
        (r"^(blocks\.\d+)\.(attention\.attention|attention|self_attn)\.(q|k|v)(uery|ey|alue|_proj)\.", r"\1.attn.\3."),
        (r"^(blocks\.\d+)\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", r"\1.attn.proj."),
        (r"^(blocks\.\d+)\.(intermediate\.dense|mlp\.weights_in)\.", r"\1.mlp.fc1."),
        (r"^(blocks\.\d+)\.(output\.dense|mlp\.weights_out)\.", r"\1.mlp.fc2."),
        (r"^(blocks\.\d+)\.(layernorm_before|layer_norm1)\.", r"\1.norm1."),
        (r"^(blocks\.\d+)\.(layernorm_after|layer_norm2)\.", r"\1.norm2."),
        (r"^(blocks\.\d+)\.layer_scale([12])\.lambda1$", r"\1.ls\2.gamma"),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(layernorm|post_layernorm)\.", "norm."),
    )
)
_HEADS = {"classifier": 0, "cls_classifier": 0, "distillation_classifier": 1}
_PATCHES = re.compile(r"^(.*?)embeddings\.(patch_embeddings\.projection|patch_embedding)\.weight$")


def _hugging_face(state: Tensors, classifiers: tuple[str, ...]) -> dict[str, torch.Tensor] | None:
    """Tensors under the names of transformers, under timm's; None where there is not one such model."""
    starts = [(match[1], tensor) for name, tensor in state.items() if (match := _PATCHES.match(name))]
    if len(starts) != 1 or starts[0][1].ndim != 4:
        return None
    start, width = starts[0][0], starts[0][1].shape[0]
    beside = re.sub(r"[^.]+\.$", "", start)  # classifiers stand beside the backbone
    converted: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        head, _, part = name.removeprefix(beside).rpartition(".")
        if head in _HEADS and name.startswith(beside):
            weight = state.get(f"{beside}{head}.weight")
            if weight is not None and weight.shape[-1:] == (width,) and len(classifiers) > _HEADS[head]:
                converted[f"{classifiers[_HEADS[head]]}.{part}"] = tensor
        elif name.startswith(start):
            key = name.removeprefix(start)
            for pattern, of_timm in _HUGGING_FACE:
                key = pattern.sub(of_timm, key)
            tokens = key in ("cls_token", "pos_embed") and tensor.ndim
            converted[key] = tensor.reshape(1, -1, tensor.shape[-1]) if tokens else tensor
    return _joined(converted)


def _joined(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Query, key and value of each block as the one layer that timm has for them."""
    for name in [name for name in state if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        parts = [name.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if all(part in state and state[part].shape == state[name].shape for part in parts):
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(part) for part in parts])
    return state
