"""Models by name, weights from a file or from timm, and the preprocessing that belongs to them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import nn

from store.disk import disk_error
from train.adapter_files import Adapters, has_adapters, read_adapters, refuse_adapters_alone, split_adapters
from train.checkpoint import checkpoint_facts
from train.data import Preprocessing
from train.errors import InputError, brief
from train.fitting import load_weights
from train.layouts import Fit, fit
from train.model_source import (
    ModelSource,
    as_flag,
    build_timm_model,
    classifier_names,
    creation_keys,
    pretrained_cfg,
    source_of,
)
from train.weight_files import say_once
from train.weights import read_state_dict


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is random on the CPU, such as weights that come from no file, is of `seed`; the caller's state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_model(model: ModelSource | str, *, num_classes: int | None) -> nn.Module:
    """A timm model with a head of `num_classes`, as a start for training; or as its checkpoint has it, to be looked at.

    The backbone comes from the source's `weights`, else from timm's download (`pretrained`), else it is random. The
    weights are a plain state dict or one under a usual key (`train.weights.WRAPPERS`) or under the source's `state`,
    with the model's own names or those of another code (`train.layouts`). A head for another number of classes than
    `weights` holds is a new one, and position embeddings of another grid are resized by timm's own function for the
    family; the log says both. What a checkpoint of ours says of itself is followed: the input size it was trained at,
    unless the source names another, and how its images were prepared, which `preprocessing_of` the model gives. A name
    alone stands for a model with random weights. With `num_classes` None the head is as the model was made, or as
    `weights` holds it, and the model in evaluation mode.

    Raises InputError: an image size that the model refuses, a file that is no sound checkpoint of it, no weights to be
    had; DamagedFileError: a file whose bytes are not the ones that were saved.
    """
    source = source_of(model)
    if source.adapter:
        return _with_adapters(source, num_classes)
    if source.file is None:
        if source.state:
            raise InputError(
                f"model.state is {source.state!r}, a key of a file that is not named: give --model.weights FILE"
            )
        return _create(source, num_classes)
    path, name = source.file, source.name
    said = _said(path, name)
    file, weights, adapters = _read_fitting(source, path)
    classifiers = classifier_names(name)
    classes = num_classes
    if num_classes is None:
        head = weights.tensors.get(f"{classifiers[0]}.weight")
        if head is None:
            say_once(f"{path} has no {classifiers[0]}.weight; {name} is built without a head", logging.WARNING)
        classes = _rows(head)
    built = _create(completed := source.completed(), classes)
    for classifier in classifiers if num_classes is not None else ():
        keys = [f"{classifier}.weight", f"{classifier}.bias"]
        if (before := _rows(weights.tensors.get(keys[0]))) != num_classes:
            left_out = f"its head for {before} classes is left out" if before else "it has no head"
            say_once(f"{path}: {left_out}; a new one for {num_classes} classes is trained")
            new = {key: tensor for key, tensor in built.state_dict().items() if key in keys}
            of_file = {key: origins for key, origins in weights.sources.items() if key not in new}
            weights = replace(weights, tensors={**weights.tensors, **new}, sources=of_file)
    load_weights(built, weights, file, path, completed)
    _prepare_as_said(built, said, source.img_size, path)
    merged = adapters.merged_into(built, name) if adapters else built
    return merged.eval() if num_classes is None else merged


def load_checkpoint(model: ModelSource | str, path: str | Path) -> nn.Module:
    """The model as the file at `path` holds it, whatever weights the source names: `build_model` of it."""
    return build_model(replace(source_of(model), weights=str(path), adapter=""), num_classes=None)


def _with_adapters(source: ModelSource, num_classes: int | None) -> nn.Module:
    """The model of the source with its adapters merged; a head that was trained with them takes the other's place."""
    if source.file is None and not source.pretrained:
        raise InputError(
            f"adapters {source.adapter} need the weights that they were trained on; give them with --model.weights "
            "FILE, or timm's with --model.pretrained true"
        )
    adapters = read_adapters(Path(source.adapter))
    classifier = classifier_names(source.name)[0]
    if source.file is None:
        built = _create(source, None)
    else:
        built = build_model(replace(source, adapter=""), num_classes=None)
    say_once(
        f"{adapters.path}: adapters are merged into {source.file or f'timm’s pretrained weights of {source.name}'}"
    )
    if (classes := adapters.classes(classifier)) is not None:
        cast(Any, built).reset_classifier(classes)
    merged = adapters.merged_into(built, source.name)
    if num_classes is not None and num_classes != cast(Any, merged).num_classes:
        say_once(f"{adapters.path}: its head is left out; a new one for {num_classes} classes is trained")
        cast(Any, merged).reset_classifier(num_classes)
    return merged


def _read_fitting(source: ModelSource, path: Path) -> tuple[dict[str, torch.Tensor], Fit, Adapters | None]:
    """The tensors of a file, which of the model's weights they are, and adapters that are not merged into them yet."""
    refuse_adapters_alone(path)
    file, adapters = read_state_dict(path, source.state), None
    if has_adapters(file):
        file, adapters = split_adapters(file, path)
    with torch.device("meta"):  # names and shapes alone, in a moment
        outline = _create(source.completed(), None)
    return file, fit(file, outline, classifier_names(source.name), path), adapters


def _rows(head: torch.Tensor | None) -> int:
    return 0 if head is None or not head.ndim else int(head.shape[0])


def _said(path: Path, model_name: str) -> dict[str, Any]:
    """What a checkpoint of ours says of itself; nothing of any other."""
    said = checkpoint_facts(path)
    trained = said.get("model", model_name)
    if trained.partition(".")[0] != model_name.partition(".")[0]:
        raise InputError(
            f"checkpoint {path} is of model {trained}, as its sidecar says, and model.name is {model_name}; give "
            f"--model.name {trained}"
        )
    return said


def _prepare_as_said(model: nn.Module, said: Mapping[str, Any], img_size: int, path: Path) -> None:
    """Let `preprocessing_of` the model give what its checkpoint was trained with, at the size it was built for."""
    if "preprocessing" not in said:
        return
    trained = said["preprocessing"]
    size = (trained["height_px"], trained["width_px"])
    if img_size and (img_size, img_size) != size:
        say_once(f"{path} was trained at {size[0]}×{size[1]} px and is used at model.img_size {img_size}")
        size = (img_size, img_size)
    taken = {name: trained[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    timm_model = cast(Any, model)
    timm_model.pretrained_cfg = timm_model.pretrained_cfg | taken | {"input_size": (trained["channels"], *size)}


def head_size(source: ModelSource) -> int | None:
    """Classes of the trained head that the start of `build_model` comes with; None where no head is trained."""
    if source.adapter and (classes := read_adapters(Path(source.adapter)).classes(classifier_names(source.name)[0])):
        return classes
    if source.file is not None:
        _, weights, _ = _read_fitting(source, source.file)
        head = weights.tensors.get(f"{classifier_names(source.name)[0]}.weight")
        return None if head is None else _rows(head)
    return int(pretrained_cfg(source.name).num_classes) if source.pretrained else None


def classifier_name(model: nn.Module) -> str:
    """The one linear layer that maps the readout to classes (timm's `default_cfg["classifier"]`), or InputError."""
    classifier = cast(Any, model).default_cfg["classifier"] or ()
    names: tuple[str, ...] = (classifier,) if isinstance(classifier, str) else tuple(classifier)
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
    """Mean, std, size, crop and interpolation from the model's own pretrained_cfg, at the model's actual size.

    Of a model that was loaded from a checkpoint of ours: as that was trained.
    """
    config = resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    colours, channels = channels, getattr(model, "in_chans", channels)
    if channels != colours:  # shades of grey where the family has colours: all alike, as their mean is
        config |= {key: (sum(config[key]) / len(config[key]),) * channels for key in ("mean", "std")}
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


def _create(source: ModelSource, num_classes: int | None) -> nn.Module:
    """The model without the weights of a file: random, or timm's where the source asks for them and names no file."""
    name, arguments, downloads = source.name, source.arguments, source.pretrained and not source.weights
    if arguments or not downloads:  # wrong arguments are found before anything is downloaded
        built = build_timm_model(name, arguments, num_classes=num_classes, img_size=source.img_size)
        if not downloads:
            return built
    advice = "give a file with --model.weights FILE, or start from random weights with --model.pretrained false"
    if source.adapter:
        advice = f"give those that adapters {source.adapter} were trained on with --model.weights FILE"
    try:
        with _offline_if_unreachable():
            keys = creation_keys(arguments, num_classes, source.img_size)
            return timm.create_model(name, pretrained=True, **keys)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            kept = error.filename or "the folder of downloaded weights (HF_HOME)"
            raise disk_error(f"pretrained weights of {name}: {kept} cannot be written", error) from error
        # huggingface_hub's "not in the cache and no connection" is an OSError, as are the socket's own.
        raise InputError(f"pretrained weights of {name} are neither cached nor to be downloaded; {advice}") from error
    except RuntimeError as error:
        if "No pretrained weights" in str(error) or "Pretrained weights" in str(error):
            raise InputError(f"timm has no pretrained weights for {name}; {advice}") from error
        if not arguments:
            raise
        raise InputError(
            f"timm's pretrained weights of {name} do not fit {as_flag(arguments)} ({brief(error)}); {advice}"
        ) from error


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
