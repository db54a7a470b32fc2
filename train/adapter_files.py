"""Adapters as peft saves them, alone or within a model that they are not merged into: merged into a timm model.

peft itself builds and merges them. What a file cannot say is in the `adapter_config.json` that peft writes beside it:
how adapters are scaled, and whether they are DoRA's.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from train.errors import InputError, brief
from train.files import require_file, what_lies_at
from train.weight_files import say_once, shown
from train.weights import read_state_dict

CONFIG = "adapter_config.json"
_MERGE = "merge them where they were trained (peft's merge_and_unload) and save the model"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# What is followed, and what says nothing of a finished adapter. Anything else must be as peft has it by default.
_FOLLOWED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)
_OF_TRAINING = (
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "megatron_core", "runtime_config", "ensure_weight_tying"),
    *("init_lora_weights", "eva_config", "loftq_config", "corda_config", "qalora_group_size"),  # initial values
)
# Initial values that change the weights below: peft does so again when it loads such adapters, to the same values.
_CHANGING = ("pissa", "olora")
_PLAIN = (True, False, None, "gaussian", "eva", "orthogonal")

_INSIDE = re.compile(r"^(.*\.)?base_model\.model\.")
_PART = re.compile(
    r"^(?P<module>.*)\.(?P<part>lora_(?:A|B|embedding_A|embedding_B)|lora_magnitude_vector)(?:\.(?P<name>[^.]+))?"
    r"(?P<weight>\.weight)?$"
)


@dataclass(frozen=True)
class Adapters:
    """Adapters of one model, and what else was trained with them."""

    path: Path  # of the file, for messages
    settings: dict[str, Any]  # peft's, as far as they are followed
    tensors: dict[str, torch.Tensor]  # under the names of the model's modules, as peft saves them

    def classes(self, classifier: str) -> int | None:
        """Outputs of the classifier that was trained with them; None where none was."""
        head = self.tensors.get(f"{classifier}.weight")
        return None if head is None or not head.ndim else int(head.shape[0])

    @torch.no_grad()
    def merged_into(self, model: nn.Module, name: str) -> nn.Module:
        """The model, changed in place, with the adapters in its weights, in evaluation mode; `name` is the model's."""
        import peft

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice on training
                adapted = peft.get_peft_model(cast(Any, model), peft.LoraConfig(**self.settings))
                names = {f"base_model.model.{key}": tensor for key, tensor in self.tensors.items()}
                missing = {key for key in peft.get_peft_model_state_dict(adapted) if key not in names}
                loaded: Any = peft.set_peft_model_state_dict(adapted, names)
                merged = cast(nn.Module, cast(Any, adapted).merge_and_unload())
        except Exception as error:  # settings of any kind meet peft here: what it raises then cannot be known
            raise InputError(
                f"{self.path}: the adapters do not fit model {name} ({brief(error)}); give the model that they "
                "were trained on"
            ) from error
        odd = [*loaded.unexpected_keys, *sorted(missing)]
        if odd:
            kind = "are not in the file" if missing and not loaded.unexpected_keys else f"are not of model {name}"
            raise InputError(
                f"{self.path}: adapters do not fit model {name}: {shown(_INSIDE.sub('', odd[0]))} and {len(odd) - 1} "
                f"other(s) {kind}; give the model that they were trained on, or {_MERGE}"
            )
        for key, tensor in merged.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputError(f"{self.path}: merging makes NaN or infinity in {key}; save the adapters again")
        return merged.eval()


def has_adapters(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether there are parts of adapters among tensors."""
    return any(_PART.match(name) for name in tensors)


def refuse_adapters_alone(path: Path, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    """Refuse adapters alone where a model's weights are expected; `tensors`: what was read of the file."""
    if holds_adapters_alone(path) if tensors is None else _alone(tensors):
        raise InputError(
            f"{path} holds adapters of peft without the weights that they were trained on; name it with "
            f"--model.adapter {path}, and those weights with --model.weights FILE (none: timm's pretrained ones)"
        )


def holds_adapters_alone(path: Path) -> bool:
    """Whether a file or folder holds adapters without the weights that they were trained on."""
    reason = what_lies_at(path)
    if reason == "is a folder":
        return any((path / name).is_file() for name in (CONFIG, *_FILES))
    if reason:
        return False
    return path.name in _FILES or ((path.parent / CONFIG).is_file() and _alone(read_state_dict(path)))


def _alone(tensors: Mapping[str, torch.Tensor]) -> bool:
    modules = {part["module"] for name in tensors if (part := _PART.match(name))}
    return bool(modules) and not any(f"{m}.{part}weight" in tensors for m in modules for part in ("", "base_layer."))


def adapter_files(path: Path) -> list[Path]:
    """The file of adapters at a path or in a folder, and its configuration; InputError: one of them is not there."""
    path = _adapter_file(path)
    config = path.parent / CONFIG
    if not config.is_file():
        raise InputError(
            f"{path} holds adapters of peft, and there is no {CONFIG} beside it, which says how they are scaled; put "
            f"the one there that peft saved with them, or {_MERGE}"
        )
    return [path, config]


def _adapter_file(path: Path) -> Path:
    if what_lies_at(path) == "is a folder":
        path = next((path / name for name in _FILES if (path / name).is_file()), path / _FILES[0])
    require_file(path, "file of adapters", "expected what peft's save_pretrained writes: a folder or its adapter_model")
    return path


def read_adapters(path: Path) -> Adapters:
    """Adapters alone, of a file or a folder that peft's `save_pretrained` wrote."""
    tensors = read_state_dict(file := _adapter_file(path))
    if not _alone(tensors):
        raise InputError(
            f"{file} holds no adapters of LoRA or DoRA alone (it has {', '.join(map(shown, list(tensors)[:3]))}); "
            "give the folder that peft's save_pretrained wrote"
        )
    file, config = adapter_files(path)
    return Adapters(file, _settings(config), {_INSIDE.sub("", name): tensor for name, tensor in tensors.items()})


def split_adapters(tensors: Mapping[str, torch.Tensor], path: Path) -> tuple[dict[str, torch.Tensor], Adapters]:
    """A model's weights without the adapters in it, and these, with the configuration beside the file."""
    refuse_adapters_alone(path, tensors)
    plain: dict[str, torch.Tensor] = {}
    parts: dict[str, torch.Tensor] = {}
    names = set()
    for full, tensor in tensors.items():
        name = _INSIDE.sub("", full)
        if part := _PART.match(name):
            names.add(part["name"] or "default")
            weight = "" if part["part"] == "lora_magnitude_vector" else part["weight"] or ""
            parts[f"{part['module']}.{part['part']}{weight}"] = tensor
        elif saved := re.match(r"^(.*)\.modules_to_save\.([^.]+)\.(.*)$", name):
            names.add(saved[2])
            plain[f"{saved[1]}.{saved[3]}"] = tensor
        elif ".original_module." not in name:
            plain[name.replace(".base_layer.", ".")] = tensor
    if len(names) > 1:
        raise InputError(
            f"{path} holds several adapters ({', '.join(map(shown, sorted(names)))}), and nothing says which is meant; "
            "merge the one where it was trained (peft's merge_and_unload) and save the model"
        )
    file, config = adapter_files(path)
    say_once(f"{path}: adapters that are not merged yet are merged, as {config.name} beside it says")
    return plain, Adapters(file, _settings(config) | {"modules_to_save": None}, parts)


def _settings(path: Path) -> dict[str, Any]:
    """What peft needs of an `adapter_config.json`."""
    import peft

    try:
        said = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON ({brief(error)}); save the adapters again") from error
    if not isinstance(said, dict) or said.get("peft_type") != "LORA":
        kind = f"of {shown(said.get('peft_type'))}" if isinstance(said, dict) else "no table"
        raise InputError(f"{path} is {kind}, and adapters of LoRA and DoRA are merged here; {_MERGE}")
    usual = peft.LoraConfig().to_dict()
    for key, value in said.items():
        if key not in (*_FOLLOWED, *_OF_TRAINING) and value not in (usual.get(key), None, False, {}, []):
            raise InputError(
                f"{path} has {shown(key)} {shown(json.dumps(value))}, which is not followed here; {_MERGE}"
            )
    initial = said.get("init_lora_weights")
    if initial not in (*_PLAIN, *_CHANGING):
        raise InputError(
            f"{path} has init_lora_weights {shown(json.dumps(initial))}, which changed the weights below in a way that "
            f"cannot be done again; {_MERGE}"
        )
    followed = {key: said[key] for key in _FOLLOWED if said.get(key) is not None}
    return followed | {"init_lora_weights": initial if initial in _CHANGING else True, "lora_dropout": 0.0}
