"""Models by name, weights from a file or from timm, and the preprocessing that belongs to them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from torch import nn

from train.checkpoint import has_sidecar, read_checkpoint
from train.data import Preprocessing
from train.errors import InputError

__all__ = [
    "build_model",
    "classifier_name",
    "head_size",
    "load_checkpoint",
    "preprocessing_of",
    "read_state_dict",
    "readout",
]

logger = logging.getLogger(__name__)

# Where training scripts put the weights in what they save; the first that is there is taken.
WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def build_model(
    name: str, *, num_classes: int | None, pretrained: bool = False, weights: str | Path = "", img_size: int = 0
) -> nn.Module:
    """A timm model with a head of `num_classes`, as a start for training.

    The backbone comes from `weights`, else from timm's download (`pretrained`), else it is random. A
    head for another number of classes than `weights` holds starts anew, which the log says.

    Args:
        name: a timm model name, or `digits_vit`.
        num_classes: size of the head; None: as the model was made, or as many as `weights` holds.
        pretrained: let timm fetch or find its weights; ignored when `weights` is given.
        weights: a `.safetensors`, `.pth`, `.pt` or `.bin` file.
        img_size: input size in pixels; 0: the model's own.

    Raises:
        InputError: unknown name, an image size that the model refuses, a bad file, weights of another
            shape, no weights to be had.
    """
    if not weights:
        return _create(name, num_classes=num_classes, pretrained=pretrained, img_size=img_size)
    path = Path(weights)
    state = read_state_dict(path)
    if num_classes is None:
        return load_checkpoint(name, path, img_size)
    model = _create(name, num_classes=num_classes, img_size=img_size)
    for classifier in _classifier_names(name):
        keys = [f"{classifier}.weight", f"{classifier}.bias"]
        found = state[keys[0]].shape[0] if keys[0] in state else 0
        if found != num_classes:
            logger.info("%s: head for %d classes left out, a new one for %d starts anew", path, found, num_classes)
            own = model.state_dict()
            state |= {key: own[key] for key in keys if key in own}
    _load(model, state, path, name)
    return model


def load_checkpoint(model_name: str, path: str | Path, img_size: int = 0) -> nn.Module:
    """A fine-tuned model as it was saved, in evaluation mode; the number of classes is read off its head.

    Plain state dicts and ones wrapped under `state_dict`, `model_state_dict`, `model` or
    `state_dict_ema`; prefixes of DistributedDataParallel and torch.compile are taken off. Position
    embeddings of another grid are resized by timm's own function for the family, which the log says.

    Raises:
        InputError: unknown name, no such file, not a checkpoint, pickled objects, weights of another shape.
        DamagedFileError: a checkpoint of ours whose bytes changed.
    """
    classifiers = _classifier_names(model_name)
    state = read_state_dict(Path(path))
    head = state.get(f"{classifiers[0]}.weight")
    if head is None:
        logger.warning("%s has no %s.weight; %s is built without a head", path, classifiers[0], model_name)
    model = _create(model_name, num_classes=0 if head is None else int(head.shape[0]), img_size=img_size)
    _load(model, state, Path(path), model_name)
    return model.eval()


def head_size(name: str, *, pretrained: bool, weights: str | Path) -> int | None:
    """Classes of the trained head that the start of `build_model` comes with; None where no head is trained.

    Raises:
        InputError: unknown name, a bad file.
    """
    if weights:
        head = read_state_dict(Path(weights)).get(f"{_classifier_names(name)[0]}.weight")
        return None if head is None else int(head.shape[0])
    return int(_pretrained_cfg(name).num_classes) if pretrained else None


def classifier_name(model: nn.Module) -> str:
    """The module that maps the readout to classes (timm's `default_cfg["classifier"]`).

    Raises:
        InputError: the model has none, or several, or it is not one linear layer.
    """
    names = _as_names(cast(Any, model).default_cfg["classifier"])
    head = model.get_submodule(names[0]) if len(names) == 1 else None
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(model).__name__} has no single linear classifier (found {', '.join(names) or 'none'}), which "
            "training needs; choose a model with one"
        )
    return names[0]


def readout(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the model's linear classifier reads, [image, feature]: pooled and normed as the model does it."""
    timm_model = cast(Any, model)
    return cast(torch.Tensor, timm_model.forward_head(timm_model.forward_features(images), pre_logits=True))


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """Mean, std, size, crop and interpolation from the model's own pretrained_cfg, at the model's actual size."""
    from timm.data.config import resolve_model_data_config

    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        height, width = size
    return Preprocessing(
        channels=channels,
        height_px=int(height),
        width_px=int(width),
        mean=tuple(float(value) for value in config["mean"]),
        std=tuple(float(value) for value in config["std"]),
        interpolation=config["interpolation"],
        crop_pct=float(config["crop_pct"]),
        crop_mode=config["crop_mode"],
    )


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file under plain names.

    Raises:
        InputError: no such file, unknown suffix, unreadable, pickled objects, no weights inside.
        DamagedFileError: its sidecar has another sha256.
    """
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"checkpoint {path} {kind}; expected a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise InputError(f"checkpoint {path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    return _plain_names(_unwrap(content, path))


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if has_sidecar(path):
        return read_checkpoint(path).tensors
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"checkpoint {path} is not a readable safetensors file ({error})") from error


def _read_torch(path: Path) -> Any:
    try:
        # A Namespace of the command line's arguments is what timm's and DeiT's own scripts save beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each way a file can be broken
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise InputError(
                f"checkpoint {path} holds pickled objects beside tensors, which could run code and are refused; save "
                "model.state_dict() alone, or a .safetensors file"
            ) from error
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise InputError(
            f"checkpoint {path} is not a file that torch.save wrote, or it is cut short ({reason}); save it again"
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    while isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        others = [key for key in WRAPPERS if key != wrapper and isinstance(content.get(key), Mapping)]
        if others:
            logger.info("%s: weights taken from %r; %s not used", path, wrapper, ", ".join(map(repr, others)))
        content = content[wrapper]
    found = (
        f"keys {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) else type(content).__name__
    )
    raise InputError(
        f"checkpoint {path} holds no state dict ({found}); expected name → tensor, plain or under one of "
        f"{', '.join(WRAPPERS)}"
    )


def _plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefixes of torch.compile (`_orig_mod.`, anywhere) and DistributedDataParallel (`module.`)."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _create(name: str, *, num_classes: int | None, img_size: int, pretrained: bool = False) -> nn.Module:
    import timm

    _pretrained_cfg(name)
    arguments: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if img_size:
        arguments["img_size"] = img_size
    if not pretrained:
        try:
            model = timm.create_model(name, **arguments)
        except (TypeError, AssertionError, ValueError) as error:
            if not img_size:
                raise
            raise InputError(f"model {name} cannot be built for {img_size}×{img_size} px images ({error})") from error
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        if img_size and (img_size % patch[0] or img_size % patch[1]):
            raise InputError(
                f"model.img_size is {img_size}, expected a multiple of the {patch[0]}×{patch[1]} px patches of {name}"
            )
        return model
    advice = "give a file with --model.weights FILE, or start from random weights with --model.pretrained false"
    try:
        with _offline_if_unreachable():
            return timm.create_model(name, pretrained=True, **arguments)
    except OSError as error:
        # huggingface_hub's "not in the cache and no connection" is an OSError, as are the socket's own.
        raise InputError(f"pretrained weights of {name} are neither cached nor to be downloaded; {advice}") from error
    except RuntimeError as error:
        if "No pretrained weights" not in str(error) and "Pretrained weights" not in str(error):
            raise
        raise InputError(f"timm has no pretrained weights for {name}; {advice}") from error


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Let huggingface_hub look into its cache alone when its host has no address: its own retries take 46 s."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    before = constants.HF_HUB_OFFLINE
    if host is not None and not proxied:
        try:
            socket.getaddrinfo(host, 443)
        except socket.gaierror:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _pretrained_cfg(name: str) -> Any:
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


def _classifier_names(name: str) -> tuple[str, ...]:
    names = _as_names(_pretrained_cfg(name).classifier)
    if not names:
        raise InputError(
            f"timm names no classifier for {name}, so its number of classes cannot be read off a checkpoint"
        )
    return names


def _as_names(classifier: Any) -> tuple[str, ...]:
    if not classifier:
        return ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _is_position(key: str) -> bool:
    leaf = key.rsplit(".", 1)[-1]
    return "pos_embed" in leaf or leaf.startswith(("rel_pos", "relative_position"))


def _load(model: nn.Module, state: dict[str, torch.Tensor], path: Path, name: str) -> None:
    """Load all of `state` or none of it."""
    expected = model.state_dict()
    resized = [
        key for key in state if key in expected and _is_position(key) and state[key].shape != expected[key].shape
    ]
    if resized:
        state = _resize_positions(model, state, resized, path)
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    shaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    count = len(missing) + len(unexpected) + len(shaped)
    if count:
        more = f", and {count - 1} more key(s)" if count > 1 else ""
        if shaped:
            key = shaped[0]
            problem = f"{key} is {_shape(state[key])}, expected {_shape(expected[key])}"
        elif missing:
            problem = f"{missing[0]} is missing, expected {_shape(expected[missing[0]])}"
        else:
            problem = f"{unexpected[0]} {_shape(state[unexpected[0]])} is not a weight of this model"
        raise InputError(
            f"checkpoint {path} does not fit model {name}: {problem}{more}; give the model name it was trained with"
        )
    model.load_state_dict(state)


def _resize_positions(
    model: nn.Module, state: dict[str, torch.Tensor], keys: list[str], path: Path
) -> dict[str, torch.Tensor]:
    """Position embeddings at the model's grid, by the family's own `checkpoint_filter_fn`; the rest as it is."""
    expected = model.state_dict()
    family = importlib.import_module(type(model).__module__)
    filter_fn = getattr(family, "checkpoint_filter_fn", None)
    if filter_fn is None:
        return state
    try:
        filtered = filter_fn({key: state[key] for key in keys}, model)
    except (RuntimeError, ValueError, AssertionError):
        return state  # not a grid at all: the caller names the key with both shapes
    fitting = {key: filtered[key] for key in keys if key in filtered and filtered[key].shape == expected[key].shape}
    for key, tensor in fitting.items():
        logger.warning("%s: %s resized from %s to %s by timm", path, key, _shape(state[key]), _shape(tensor))
    return state | fitting


def _shape(tensor: torch.Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
