"""What decides a model: its name among timm's and the other keys of `[model]`, declared once."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import checkpoint_facts
from train.errors import InputError

__all__ = ["ModelSource", "pretrained_cfg", "source_of"]


@dataclass(frozen=True)
class ModelSource:
    """All that a model is built from, but for the number of its classes.

    Args:
        name: a timm model name, or `digits_vit`.
        img_size: input size in pixels; 0: what the checkpoint was trained at, else the model's own.
        weights: a `.safetensors`, `.pth`, `.pt` or `.bin` file; empty: timm's or random weights.
        state: key of that file under which the weights are; see `train.weights.read_state_dict`.
        pretrained: let timm fetch or find its weights where no file is named.

    Raises:
        InputError: timm has no model of that name.
    """

    name: str
    _: dataclasses.KW_ONLY
    img_size: int = 0
    weights: str | Path = ""
    state: str = ""
    pretrained: bool = False

    def __post_init__(self) -> None:
        pretrained_cfg(self.name)

    @property
    def file(self) -> Path | None:
        """Of the weights, where one is named."""
        return Path(self.weights) if self.weights else None

    def completed(self) -> ModelSource:
        """With what a checkpoint of ours says of itself, where the source leaves it open.

        Raises:
            DamagedFileError: its sidecar is not as it was written.
        """
        if self.img_size or self.file is None:
            return self
        return dataclasses.replace(self, img_size=int(checkpoint_facts(self.file).get("img_size", 0)))


def source_of(model: ModelSource | str) -> ModelSource:
    """A name alone stands for a model with random weights."""
    return ModelSource(model) if isinstance(model, str) else model


def pretrained_cfg(name: str) -> Any:
    """What timm knows of a model by its name: classifier, input size, classes, ….

    Raises:
        InputError: there is no such model, or no such weights of it.
    """
    import timm

    importlib.import_module("train.digits_vit")  # puts digits_vit into timm's registry
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
        raise InputError(f"unknown model {name!r}; expected a timm model name or digits_vit ({hint})")
    config = timm.get_pretrained_cfg(name, allow_unregistered=False) if _has_tag(name, tag) else None
    if config is None:
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(
            f"model {architecture} has no weights tagged {tag!r}; expected one of {', '.join(tags) or '—'}"
        )
    return config


def _has_tag(name: str, tag: str) -> bool:
    import timm

    return not tag or name in timm.list_models(f"{name}*", pretrained=True)
