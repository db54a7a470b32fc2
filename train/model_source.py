"""What decides a model: the keys of `[model]`, declared once, and the arguments that timm builds it with."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import train.digits_vit  # noqa: F401 (puts digits_vit into timm's registry)
from train.adapter_files import adapter_files
from train.checkpoint import checkpoint_facts
from train.errors import InputError, brief, nearest
from train.weight_files import say_once

Argument = str | int | float | bool

# Arguments of timm's that another key stands for, or that are no choice of the user's.
_OTHER_KEYS = {
    "num_classes": "the number of classes is read off the checkpoint, or off the class folders; leave it out",
    "img_size": "give the size with --model.img_size",
    "pretrained": "say it with --model.pretrained",
    "pretrained_cfg": "name the weights in --model.name, as in NAME.TAG",
    "checkpoint_path": "name the file with --model.weights",
}
# What the factories behind `timm.create_model` take for themselves and do not say in a signature.
_FACTORY = ("features_only", "out_indices", "feature_cls", "pruned", "use_naflex", "device", "dtype")


def as_flag(arguments: Mapping[str, Argument]) -> str:
    """As the command line takes them: `--model.arguments global_pool=avg,in_chans=1`."""
    texts = (f"{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in arguments.items())
    return f"--model.arguments {','.join(texts)}"


def refuse_arguments(arguments: Mapping[str, Argument]) -> None:
    """Raise InputError for arguments that have a key of their own, or that would load or run something."""
    for name in arguments:
        if advice := _OTHER_KEYS.get(name):
            raise InputError(f"model.arguments names {name}; {advice}")
        if name in _factory_arguments():
            raise InputError(
                f"model.arguments names {name}, by which timm loads or wraps a model and does not decide what it is; "
                "leave it out"
            )


@functools.cache
def _factory_arguments() -> frozenset[str]:
    factories = (timm.create_model, timm.models.build_model_with_cfg)
    return frozenset({*_FACTORY, *(name for factory in factories for name in inspect.signature(factory).parameters)})


def creation_keys(arguments: Mapping[str, Argument], num_classes: int | None, img_size: int) -> dict[str, Any]:
    """What `timm.create_model` takes: arguments, and what else is not as the model has it by itself."""
    keys = {**arguments, "num_classes": num_classes, "img_size": img_size or None}
    return {name: value for name, value in keys.items() if value is not None}


def build_timm_model(
    name: str, arguments: Mapping[str, Argument], *, num_classes: int | None = None, img_size: int = 0
) -> nn.Module:
    """A timm model with random weights; `num_classes` None: as the model has it. InputError where there is none."""
    size = f"{img_size}×{img_size} px images"
    try:
        model = timm.create_model(name, **creation_keys(arguments, num_classes, img_size))
    except Exception as error:  # any class of any family gets any value: what it raises then cannot be known
        if arguments:
            raise _refusal(name, arguments, f" for {size}" if img_size else "", error) from error
        if img_size and isinstance(error, TypeError | AssertionError | ValueError):
            raise InputError(f"model {name} cannot be built for {size} ({error})") from error
        raise
    channels = getattr(model, "in_chans", 3)
    if channels not in (1, 3):
        raise InputError(f"model.arguments has in_chans={channels}; pictures have 3 channels, or 1 as shades of grey")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
    if img_size and (img_size % patch[0] or img_size % patch[1]):
        raise InputError(
            f"model.img_size is {img_size}, expected a multiple of the {patch[0]}×{patch[1]} px patches of {name}"
        )
    return model


def _refusal(name: str, arguments: Mapping[str, Argument], purpose: str, error: Exception) -> InputError:
    with torch.device("meta"):
        taken = _taken(type(build_timm_model(name, {})))
    unknown = [argument for argument in arguments if argument not in taken]
    if unknown and isinstance(error, TypeError):
        hint = nearest(unknown[0], taken)
        return InputError(f"model {name} takes no argument {unknown[0]}{hint} (it takes {', '.join(taken)})")
    return InputError(
        f"model {name} cannot be built{purpose} with {as_flag(arguments)} ({brief(error)}); change or leave out"
    )


def _taken(model_class: type) -> list[str]:
    """Names of the arguments that a model of the class is made with and that may be given."""
    names: dict[str, None] = {}
    for base in model_class.__mro__:
        parameters = inspect.signature(base.__init__).parameters  # type: ignore[misc]
        names |= dict.fromkeys(
            key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        )
        if all(p.kind != p.VAR_KEYWORD for p in parameters.values()):
            break
    return [key for key in names if key != "self" and key not in _OTHER_KEYS and key not in _factory_arguments()]


def shown_arguments(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, Argument]:
    """Arguments by which weights, under the model's names, plainly differ from a model that they do not fit."""
    expected = model.state_dict()
    shown: dict[str, Argument] = {}

    def has(pattern: str, where: Mapping[str, torch.Tensor]) -> bool:
        return any(re.fullmatch(pattern, key) for key in where)

    if has(r"attn_pool\..*", state) and not has(r"attn_pool\..*", expected):
        shown["global_pool"] = "map"
    elif has(r"fc_norm\..*", state) and not has(r"norm\..*", state) and not has(r"fc_norm\..*", expected):
        shown["global_pool"] = "avg"
    elif has(r"norm\..*", state) and not has(r"fc_norm\..*", state) and has(r"fc_norm\..*", expected):
        shown["global_pool"] = "token"
    nothing = torch.empty(0)
    patches, expected_patches = (where.get("patch_embed.proj.weight", nothing) for where in (state, expected))
    if patches.ndim == expected_patches.ndim == 4:
        if patches.shape[1] != expected_patches.shape[1]:
            shown["in_chans"] = patches.shape[1]
        if patches.shape[2:] != expected_patches.shape[2:] and patches.shape[2] == patches.shape[3]:
            shown["patch_size"] = patches.shape[2]
    scales = r"blocks\.\d+\.(ls1\.gamma|gamma_1)"
    if has(scales, state) and not has(scales, expected):
        shown["init_values"] = 1e-5  # any number: the weights hold the values
    norms = r"blocks\.\d+\.attn\.q_norm\.weight"
    if has(norms, state) != has(norms, expected):
        shown["qk_norm"] = has(norms, state)
    registers = (where.get("reg_token", nothing) for where in (state, expected))
    count, expected_count = (tokens.shape[1] if tokens.ndim == 3 else 0 for tokens in registers)
    if count != expected_count:
        shown["reg_tokens"] = shown["num_reg_tokens"] = count  # one of them is the family's
    if ("cls_token" in state) != ("cls_token" in expected):
        shown["class_token"] = "cls_token" in state
    positions, expected_positions = (where.get("pos_embed", nothing) for where in (state, expected))
    if positions.ndim == expected_positions.ndim == 3:
        tokens, prefix = positions.shape[1], count + ("cls_token" in state)
        if prefix and tokens != expected_positions.shape[1] and _is_square(tokens) and not _is_square(tokens - prefix):
            shown["no_embed_class"] = True
    taken = _taken(type(model))
    return {key: value for key, value in shown.items() if key in taken}


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


# How a model of timm's is called on the Hugging Face Hub: `timm/NAME`, also as an address.
_HUB = re.compile(r"(?:hf[-_]hub:|(?:https?://)?(?:www\.)?huggingface\.co/)?timm/")


@dataclass(frozen=True)
class ModelSource:
    """All that a model is built from, but for the number of its classes.

    Raises InputError: timm has no model of that name, or an argument has a key of its own.
    """

    # A timm model name, or `digits_vit`; one that timm has given up, or of the Hugging Face Hub (`hf-hub:timm/NAME`),
    # becomes timm's present one.
    name: str
    _: dataclasses.KW_ONLY
    # What timm builds the model with besides, such as {"global_pool": "avg"}.
    arguments: Mapping[str, Argument] = field(default_factory=dict, hash=False)
    img_size: int = 0  # in pixels; 0: what the checkpoint was trained at, else the model's own
    weights: str | Path = ""  # a file of safetensors or of torch.save, whatever its name; empty: timm's or random ones
    adapter: str | Path = ""  # peft's adapters, a file or the folder it saved, that are merged into these weights
    state: str = ""  # which weights of the file, where it holds several; see `train.weights.read_state_dict`
    pretrained: bool = False  # let timm fetch or find its weights where no file is named

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _present_name(self.name))
        refuse_arguments(self.arguments)

    @property
    def files(self) -> list[Path]:
        """Every file that the model is made from; InputError: an adapter's file or its configuration is not there."""
        return [*([self.file] if self.file else []), *(adapter_files(Path(self.adapter)) if self.adapter else [])]

    @property
    def file(self) -> Path | None:
        """Of the weights, where one is named."""
        return Path(self.weights) if self.weights else None

    def completed(self) -> ModelSource:
        """With what a checkpoint of ours says of itself, where the source leaves it open."""
        if self.file is None:
            return self
        said = checkpoint_facts(self.file)
        for name, trained in said.get("arguments", {}).items():
            if (asked := self.arguments.get(name, trained)) != trained:
                say_once(
                    f"{self.file} was trained with {name}={trained} and is used with model.arguments {name}={asked}"
                )
        return dataclasses.replace(
            self,
            arguments={**said.get("arguments", {}), **self.arguments},
            img_size=self.img_size or int(said.get("img_size", 0)),
        )


def source_of(model: ModelSource | str) -> ModelSource:
    """A name alone stands for a model with random weights."""
    return ModelSource(model) if isinstance(model, str) else model


def pretrained_cfg(name: str) -> Any:
    """What timm knows of a model by its present name: classifier, input size, classes, …."""
    return timm.get_pretrained_cfg(name, allow_unregistered=False)


def classifier_names(name: str) -> tuple[str, ...]:
    """The layers of a model that map its readout to classes; InputError where timm names none."""
    classifier = pretrained_cfg(name).classifier
    if not classifier:
        raise InputError(
            f"timm names no classifier for {name}, so its number of classes cannot be read off a checkpoint"
        )
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _present_name(asked_for: str) -> str:
    """timm's name of today for one of the past, or for one as the Hugging Face Hub has it; the log says a change."""
    plain = _HUB.sub("", asked_for).rstrip("/") if _HUB.match(asked_for) else asked_for
    name = timm.models.get_deprecated_models().get(plain) or plain
    meant = f" (which {asked_for!r} stands for)" if name != asked_for else ""
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        asked = re.split(r"[/:]", architecture)[-1].lower().replace("-", "_")
        hint = nearest(asked, timm.list_models())
        file = (
            "; give the weights of any other repository or folder as a file: --model.weights" if asked != name else ""
        )
        raise InputError(
            f"unknown model {name!r}{meant}; expected a timm model name, as timm.list_models() lists them, or "
            f"digits_vit{file}{hint}"
        )
    if dot and name not in timm.list_models(f"{architecture}.*", pretrained=True):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(
            f"model {architecture} has no weights tagged {tag!r}{meant}; expected one of {', '.join(tags) or '—'}"
        )
    if plain != asked_for:
        say_once(f"{asked_for} is timm's {plain}")
    if name != plain:
        say_once(f"{plain} is now {name}")
    return name
