"""What decides a model: its name among timm's and the other keys of `[model]`, declared once."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.adapter_files import adapter_files
from train.checkpoint import checkpoint_facts
from train.errors import InputError
from train.model_arguments import Argument, refuse_arguments
from train.weight_files import say_once

# How a model of timm's is called on the Hugging Face Hub: `timm/NAME`, also as an address.
_HUB = re.compile(r"(?:hf[-_]hub:|(?:https?://)?(?:www\.)?huggingface\.co/)?timm/")


@dataclass(frozen=True)
class ModelSource:
    """All that a model is built from, but for the number of its classes.

    Args:
        name: a timm model name, or `digits_vit`; one that timm has given up, or of the Hugging Face Hub
            (`hf-hub:timm/NAME`), becomes timm's present one.
        arguments: what timm builds the model with besides, such as {"global_pool": "avg"}.
        img_size: input size in pixels; 0: what the checkpoint was trained at, else the model's own.
        weights: a file of safetensors or of torch.save, whatever its name; empty: timm's or random weights.
        adapter: peft's adapters, a file or the folder it saved, that are merged into these weights.
        state: which weights of that file, where it holds several; see `train.weights.read_state_dict`.
        pretrained: let timm fetch or find its weights where no file is named.

    Raises:
        InputError: timm has no model of that name, or an argument has a key of its own.
    """

    name: str
    _: dataclasses.KW_ONLY
    arguments: Mapping[str, Argument] = field(default_factory=dict, hash=False)
    img_size: int = 0
    weights: str | Path = ""
    adapter: str | Path = ""
    state: str = ""
    pretrained: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _present_name(self.name))
        refuse_arguments(self.arguments)

    @property
    def files(self) -> list[Path]:
        """Every file that the model is made from.

        Raises:
            InputError: an adapter's file or its configuration is not there.
        """
        return [*([self.file] if self.file else []), *(adapter_files(Path(self.adapter)) if self.adapter else [])]

    @property
    def file(self) -> Path | None:
        """Of the weights, where one is named."""
        return Path(self.weights) if self.weights else None

    def completed(self) -> ModelSource:
        """With what a checkpoint of ours says of itself, where the source leaves it open.

        Raises:
            DamagedFileError: its sidecar is not as it was written.
        """
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
    import timm

    return timm.get_pretrained_cfg(name, allow_unregistered=False)


def classifier_names(name: str) -> tuple[str, ...]:
    """The layers of a model that map its readout to classes.

    Raises:
        InputError: timm names none.
    """
    classifier = pretrained_cfg(name).classifier
    if not classifier:
        raise InputError(
            f"timm names no classifier for {name}, so its number of classes cannot be read off a checkpoint"
        )
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _present_name(given: str) -> str:
    """timm's name of today for one of the past, or for one as the Hugging Face Hub has it; the log says a change.

    Raises:
        InputError: there is no such model, or no such weights of it.
    """
    import timm

    importlib.import_module("train.digits_vit")  # puts digits_vit into timm's registry
    plain = _HUB.sub("", given).rstrip("/") if _HUB.match(given) else given
    name = timm.models.get_deprecated_models().get(plain) or plain
    meant = f" (which {given!r} stands for)" if name != given else ""
    architecture, dot, tag = name.partition(".")
    if not timm.is_model(architecture):
        asked = re.split(r"[/:]", architecture)[-1].lower().replace("-", "_")
        near = difflib.get_close_matches(asked, timm.list_models(), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
        file = (
            "; give the weights of any other repository or folder as a file: --model.weights" if asked != name else ""
        )
        raise InputError(f"unknown model {name!r}{meant}; expected a timm model name or digits_vit ({hint}){file}")
    if dot and name not in timm.list_models(f"{architecture}.*", pretrained=True):
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(
            f"model {architecture} has no weights tagged {tag!r}{meant}; expected one of {', '.join(tags) or '—'}"
        )
    if plain != given:
        say_once(f"{given} is timm's {plain}")
    if name != plain:
        say_once(f"{plain} is now {name}")
    return name
