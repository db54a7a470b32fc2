"""The weights in a checkpoint file of any origin: found among what was saved with them, and checked value by value."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.errors import InputError
from train.weight_files import read_content, say_once, shown

# Where training scripts put the weights in what they save, as keys or at the beginning of names. The first that is
# there is taken unless another is chosen: the model itself before averages of it, a teacher before its student.
WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights"),
    *("teacher", "encoder", "base_encoder", "backbone", "target_encoder", "student", "momentum_encoder"),
    *("state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema"),  # averages
)

# What wrappers of torch put into names: torch.compile, FullyShardedDataParallel, activation checkpointing.
_TORCH_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

_MOST_LEVELS = 50  # of dicts within each other

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_state_dict(path: Path, state: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file under the names that they have there, less what wrappers of torch put into them.

    `state` is a key of the file, such as `model_ema`, keys of dicts within each other (`model.teacher`), or the
    beginning of names (`student.backbone`); empty: the first of `WRAPPERS` that is there, which the log says where
    there are several. Raises InputError for a file that holds no such weights, or numbers of a kind that no model has;
    DamagedFileError: a checksum does not match: of the sidecar, of the file as the sidecar has it, or of a record.
    """
    content = read_content(path)
    size = path.stat().st_size
    tensors = {name: tensor.detach() for name, tensor in _plain_names(_chosen(content, path, state)).items()}
    for name, tensor in tensors.items():
        if kind := _unusual(tensor):
            raise InputError(
                f"checkpoint {path}: {shown(name)} is {kind}, expected plain numbers (float32, float16, bfloat16, "
                "float64); weights are not converted here: save them as float32"
            )
        if tensor.numel() * tensor.element_size() > max(size, tensor.untyped_storage().nbytes()):
            raise InputError(
                f"checkpoint {path}: {shown(name)} stands for {tensor.numel()} values, more than the file of {size} "
                "bytes holds (expanded or strided); save it with .contiguous()"
            )
    return tensors


def refuse_unfit_values(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], path: Path) -> None:
    """Look at every value once: raise InputError, naming file and tensor, for what would be cast or is not finite.

    Infinity may stand where the model's tensor in `targets`, as it was built, holds the same (bounds of an idle clamp).
    """
    for name, tensor in tensors.items():
        if name not in targets:
            continue
        expected = targets[name]
        if _kind(tensor) != _kind(expected):
            raise InputError(
                f"checkpoint {path}: {shown(name)} is {_name(tensor.dtype)}, expected {_kind(expected)} "
                f"({_name(expected.dtype)}); weights are not converted here: save them as {_name(expected.dtype)}"
            )
        if not tensor.is_floating_point():
            continue
        values = tensor.to(expected.dtype)  # float64 may hold more than float32 can
        finite = torch.isfinite(values)
        if finite.all() or (values.shape == expected.shape and torch.equal(values[~finite], expected[~finite])):
            continue
        place = ", ".join(map(str, (~finite).nonzero()[0].tolist()))
        count = int((~finite).sum())
        more = f", and {count - 1} more of its values are NaN or infinite" if count > 1 else ""
        raise InputError(
            f"checkpoint {path}: {shown(name)}[{place}] is {float(values[~finite][0])}{more}; a model with such "
            "weights has no attention to measure: take a checkpoint from before its training diverged, or copy the "
            "file again"
        )
    others = sorted({_name(t.dtype) for t in tensors.values() if t.dtype in _FLOATS[1:]})
    if others:
        say_once(f"{path}: weights of {', '.join(others)} are computed with in float32")


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_floating_point():
        return "real numbers"
    return "true and false" if tensor.dtype == torch.bool else "integers"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unusual(tensor: torch.Tensor) -> str:
    """What keeps a tensor from being plain numbers in memory; "" for one that is."""
    if tensor.is_quantized:
        return f"quantised ({_name(tensor.dtype)})"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')}, {_name(tensor.dtype)})"
    if tensor.is_meta:
        return f"a shape without values (device meta, {_name(tensor.dtype)})"
    if tensor.is_nested:
        return f"nested ({_name(tensor.dtype)})"
    return "" if tensor.dtype in (*_FLOATS, *_INTEGERS, torch.bool) else _name(tensor.dtype)


def _chosen(content: Any, path: Path, state: str) -> Mapping[str, torch.Tensor]:
    if not state:
        return _unwrap(content, path)
    within = content
    for key in [state] if isinstance(content, Mapping) and state in content else state.split("."):
        within = within.get(key) if isinstance(within, Mapping) else None
    if isinstance(within, Mapping):
        return _unwrap(within, path)
    tensors = _unwrap(content, path)
    start = f"{state.removesuffix('.')}."
    named = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    if named:
        return named
    raise InputError(
        f"checkpoint {path} holds no weights under {state!r} (it has {_found(content)}); name a key of the file or the "
        "beginning of names, or leave model.state out"
    )


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    """The tensors in the dicts of what was saved; what else lies beside them is passed over."""
    for _ in range(_MOST_LEVELS):  # a dict may hold itself
        if _is_state(content):
            return _tensors(content)
        if not isinstance(content, Mapping):
            break
        wrapper = next((key for key in WRAPPERS if _holds_tensors(content.get(key))), None)
        if wrapper is None:
            tensors, inner = _tensors(content), [key for key, value in content.items() if _is_state(value)]
            if len(tensors) > 1:
                return tensors
            if len(inner) != 1:
                break
            wrapper = inner[0]
        others = [repr(key) for key, value in content.items() if key != wrapper and _is_state(value)]
        if others:
            say_once(
                f"{path}: weights taken from {shown(repr(wrapper))}; {shown(', '.join(others))} not used (model.state "
                "chooses another)"
            )
        content = content[wrapper]
    if isinstance(content, Mapping) and "param_groups" in content:
        raise InputError(f"checkpoint {path} holds the state of an optimizer and no weights; give the model's own file")
    raise InputError(
        f"checkpoint {path} holds no state dict ({_found(content)}); expected name → tensor, plain or under a key such "
        f"as {', '.join(WRAPPERS[:3])}"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _tensors(content: Mapping[Any, Any]) -> dict[str, torch.Tensor]:
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}


def _holds_tensors(content: Any) -> bool:
    """Whether there is a tensor by name in a dict, or in the dicts that it holds."""
    to_see, seen = [content], set()
    while to_see:
        value = to_see.pop()
        if isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            if any(isinstance(inner, torch.Tensor) for inner in value.values()):
                return True
            to_see.extend(value.values())
    return False


def _found(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"keys {', '.join(shown(repr(key)) for key in list(content)[:5])}" if content else "an empty dict"
    return type(content).__name__


def _plain_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what wrappers of torch put into names, and without DistributedDataParallel's `module.` before all."""
    names = {name: name for name in state}
    for wrapper in _TORCH_WRAPPERS:
        names = {name: plain.replace(wrapper, "") for name, plain in names.items()}
    while names and all(plain.startswith("module.") for plain in names.values()):
        names = {name: plain.removeprefix("module.") for name, plain in names.items()}
    if len(set(names.values())) < len(names):  # two would become one
        return dict(state)
    return {plain: state[name] for name, plain in names.items()}
