"""A file's weights put into a timm model: all of them or none, and what was done to them said."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import torch
from torch import nn

from train.errors import InputError
from train.layouts import Fit, Tensors, filter_of, fit, is_position
from train.model_source import Argument, ModelSource, as_flag, build_timm_model, classifier_names, shown_arguments
from train.weight_files import say_once, shown
from train.weights import refuse_unfit_values

_IN_PARTS = re.compile(r"-\d{5}-of-\d{5}\.")

# Width and number of blocks -> the word for them in timm's names.
_SIZES = {
    (192, 12): "tiny",
    (384, 12): "small",
    (768, 12): "base",
    (1024, 24): "large",
    (1280, 32): "huge",
    (1408, 40): "giant",
}


def load_weights(model: nn.Module, weights: Fit, file: Tensors, path: Path, source: ModelSource) -> None:
    """Load all weights of a file or none; position embeddings of another grid are resized by timm, which the log says.

    `weights` are under the model's names, `file` is what was read, `source` what the model was built from.
    """
    expected = model.state_dict()
    state, sources = dict(weights.tensors), weights.sources
    targets = {name: expected[key] for key, several in sources.items() if key in expected for name in several}
    refuse_unfit_values({name: file[name] for name in targets}, targets, path)
    resized = [key for key in state if key in expected and is_position(key) and state[key].shape != expected[key].shape]
    if resized:
        state = _resize_positions(model, state, resized)
    problems = _problems(state, expected)
    if problems:
        more = f", and {len(problems) - 1} more key(s)" if len(problems) > 1 else ""
        built_with = f" with {as_flag(source.arguments)}" if source.arguments else ""
        advice = _advice(model, weights, file, path, source)
        raise InputError(
            f"checkpoint {path} does not fit model {source.name}{built_with}: {problems[0]}{more}; {advice}"
        )
    _say(weights, state, file, path, source.name)
    model.load_state_dict(state)


def _problems(state: Tensors, expected: Tensors) -> list[str]:
    """What is wrong with each weight that does not fit, the most telling first."""
    shaped = [
        f"{key} is {_shape(state[key])}, expected {_shape(tensor)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    missing = [f"{key} is missing, expected {_shape(tensor)}" for key, tensor in expected.items() if key not in state]
    unexpected = [
        f"{shown(key)} {_shape(tensor)} is not a weight of this model"
        for key, tensor in state.items()
        if key not in expected
    ]
    return shaped + missing + unexpected


def _resize_positions(model: nn.Module, state: dict[str, torch.Tensor], keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Position embeddings at the model's grid, by the family's own `checkpoint_filter_fn`; the rest as it is."""
    expected = model.state_dict()
    filter_fn = filter_of(model)
    if filter_fn is None:
        return state
    try:
        filtered = filter_fn({key: state[key] for key in keys}, model)
    except Exception:  # foreign code on shapes that may be no grid at all: the caller names the key with both shapes
        return state
    return state | {
        key: filtered[key] for key in keys if key in filtered and filtered[key].shape == expected[key].shape
    }


def _say(weights: Fit, state: Tensors, file: Tensors, path: Path, name: str) -> None:
    if weights.layout:
        say_once(f"{path}: its names are those of {weights.layout}")
    if weights.other_starts:
        others = ", ".join(shown(repr(start)) for start in weights.other_starts[:4])
        say_once(
            f"{path}: weights taken from names that begin with {shown(repr(weights.start))}; {others} not used "
            "(model.state chooses another)"
        )
    if count := len(weights.left_out):
        several = ", ".join(shown(origin) for origin in weights.left_out[:5]) + (", …" if count > 5 else "")
        say_once(f"{path}: {count} of {len(file)} tensors are no part of {name} and left out: {several}")
    for key, tensor in state.items():
        if key not in weights.sources:
            continue
        origins = weights.sources[key]
        if not origins:
            say_once(f"{path}: {key} is not in the file; timm's reader of such files makes it", logging.WARNING)
        elif len(origins) == 1 and is_position(key) and file[origins[0]].numel() != tensor.numel():
            before = _shape(file[origins[0]])
            say_once(f"{path}: {key} resized from {before} to {_shape(tensor)} by timm", logging.WARNING)


def _advice(model: nn.Module, weights: Fit, file: Tensors, path: Path, source: ModelSource) -> str:
    """What to do about a file that does not fit, as far as its names and shapes say it."""
    if _IN_PARTS.search(path.name):
        return "the file is one part of a checkpoint in several; save that as one file"
    expected = model.state_dict()
    offered, wanted = _size(file), _size(expected)
    sizes = ""
    if offered and wanted and offered != wanted:
        sizes = f"the file holds {_words(offered)}, {source.name} has {_words(wanted)}"
    if offered and (likely := _likely(offered, file, path)):
        return f"{sizes}; try --model.name {likely}" if sizes else f"it fits with --model.name {likely}"
    arguments = {**source.arguments, **shown_arguments(model, weights.tensors)}  # which the weights show plainly
    if arguments != source.arguments and _fits(file, path, source.name, arguments, source.img_size):
        return f"it fits with {as_flag(arguments)}"
    if sizes:
        return sizes
    if not weights.tensors.keys() & expected.keys():
        return f"its names are such as {_some(file)}, those of {source.name} such as {_some(expected)}"
    more = {key: tensor for key, tensor in weights.tensors.items() if key not in expected}
    beside = f"; the file has {_some(more)}" if more else ""
    return f"expected every weight of {source.name} and, beside its classifier, no other{beside}"


def _fits(file: Tensors, path: Path, name: str, arguments: Mapping[str, Argument], img_size: int = 0) -> bool:
    try:
        with torch.device("meta"):
            outline = build_timm_model(name, arguments, img_size=img_size)
        return not fit(file, outline, classifier_names(name), path).problems
    except InputError:
        return False


def _some(names: Tensors) -> str:
    weights = [name for name in names if name.endswith("weight")] or list(names)
    return ", ".join(shown(name) for name in weights[:3])


def _size(state: Tensors) -> tuple[int, int, int] | None:
    """Blocks, width and pixels of a patch's side, by names and shapes; None where they do not say it."""
    patches = [
        t for key, t in state.items() if t.ndim == 4 and ("patch" in key or "conv1" in key) and key.endswith("weight")
    ]
    numbers = [int(n[1]) for key in state if (n := re.search(r"(?:blocks|layers?)\.(\d{1,4})\.", key))]
    return (max(numbers) + 1, patches[0].shape[0], patches[0].shape[-1]) if patches and numbers else None


def _words(size: tuple[int, int, int]) -> str:
    return f"{size[0]} blocks of width {size[1]} on patches of {size[2]} px"


def _likely(size: tuple[int, int, int], file: Tensors, path: Path) -> str:
    """A timm model of a plain ViT's blocks, width and patches that takes the file's weights; "" where none does."""
    word = _SIZES.get((size[1], size[0]))
    names = timm.list_models(f"vit_{word}_patch{size[2]}_*") if word else []
    plain = [name for name in names if re.search(r"patch\d+_(clip_|reg4_)?(\d+|dinov2)$", name)]
    return next((name for name in plain if _fits(file, path, name, {})), "")


def _shape(tensor: torch.Tensor) -> str:
    more = ", …" if tensor.ndim > 8 else ""
    return f"[{', '.join(map(str, tensor.shape[:8]))}{more}]"
