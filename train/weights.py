"""The weights in a checkpoint file of any origin: found, checked against every checksum there is, under plain names."""

from __future__ import annotations

import argparse
import functools
import logging
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import has_sidecar, read_checkpoint
from train.errors import DamagedFileError, InputError
from train.files import require_file

__all__ = ["SUFFIXES", "read_state_dict", "refuse_unfit_values", "say_once"]

logger = logging.getLogger(__name__)

# Where training scripts put the weights in what they save; the first that is there is taken unless another is chosen.
WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

_ZIP = b"PK\x03\x04"
# What zipfile raises for the ways in which a record can be damaged.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def read_state_dict(path: Path, state: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint file under plain names.

    Args:
        path: a `.safetensors`, `.pth`, `.pt` or `.bin` file.
        state: key of the file under which the weights are, such as `model_ema`; empty: the first of `WRAPPERS` that
            is there, which the log says where there are several.

    Raises:
        InputError: no such file, unknown suffix, unreadable, pickled objects, no weights inside or none under `state`,
            tensors that are sparse, quantised, complex, of 8-bit floats or without values.
        DamagedFileError: a checksum does not match: of the sidecar, of the file as the sidecar has it, or of a record.
    """
    require_file(path, "checkpoint", f"expected a file that ends in {', '.join(SUFFIXES)}")
    if path.suffix not in SUFFIXES:
        raise InputError(f"checkpoint {path} ends in {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    tensors = _plain_names(_unwrap(content, path, state))
    for name, tensor in tensors.items():
        if kind := _unusual(tensor):
            raise InputError(
                f"checkpoint {path}: {name} is {kind}, expected plain numbers (float32, float16, bfloat16, float64); "
                "weights are not converted here: save them as float32"
            )
    return tensors


def refuse_unfit_values(tensors: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], path: Path) -> None:
    """Look at every value once: what would be cast or is not finite is refused.

    Infinity may stand where the model's own buffer holds the same (bounds of a clamp that does nothing).

    Args:
        tensors: as read.
        own: the state of the model as it was built.
        path: of the file, for messages.

    Raises:
        InputError: integers where the model has real numbers or the other way round, NaN or infinity; the message
            names file and tensor.
    """
    kinds = {torch.float32: "real numbers", torch.bool: "true and false"}
    for name, tensor in tensors.items():
        if name not in own:
            continue
        expected = own[name]
        if _kind(tensor) != _kind(expected):
            raise InputError(
                f"checkpoint {path}: {name} is {_name(tensor.dtype)}, expected "
                f"{kinds.get(expected.dtype, 'integers')} ({_name(expected.dtype)}); weights are not converted here: "
                f"save them as {_name(expected.dtype)}"
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
            f"checkpoint {path}: {name}[{place}] is {float(values[~finite][0])}{more}; a model with such weights has "
            "no attention to measure: take a checkpoint from before its training diverged, or copy the file again"
        )
    others = sorted({_name(t.dtype) for t in tensors.values() if t.dtype in _FLOATS[1:]})
    if others:
        say_once(f"{path}: weights of {', '.join(others)} are computed with in float32")


def _kind(tensor: torch.Tensor) -> str:
    if tensor.is_floating_point():
        return "float"
    return "bool" if tensor.dtype == torch.bool else "integer"


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


@functools.cache
def say_once(sentence: str, level: int = logging.INFO) -> None:
    """A file is read by several stages; what is said of it is said once."""
    logger.log(level, "%s", sentence)


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
        _check_records(path)
        # A Namespace of the command line's arguments is what timm's and DeiT's own scripts save beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedFileError:
        raise
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


def _check_records(path: Path) -> None:
    """Compare every record of a file that torch.save wrote with its CRC-32, which torch.load does not do.

    Raises:
        DamagedFileError: a record changed.
        zipfile.BadZipFile: the list of records cannot be read.
    """
    with open(path, "rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    if not zipped:
        say_once(f"{path} is in torch's format before 1.6, which holds no checksum: damage cannot be seen")
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.CRC for record in records):
            say_once(f"{path} was saved without checksums (set_crc32_options): damage cannot be seen")
            return
        for record in records:
            try:
                with archive.open(record) as content:
                    while content.read(1 << 20):
                        pass
            except _ZIP_ERRORS as error:
                raise DamagedFileError(
                    f"checkpoint {path} is damaged: its record {record.filename} is not as it was saved ({error}); "
                    "copy or download the file again"
                ) from error


def _unwrap(content: Any, path: Path, state: str) -> dict[str, torch.Tensor]:
    if state:
        if not isinstance(content, Mapping) or not isinstance(content.get(state), Mapping):
            raise InputError(
                f"checkpoint {path} holds no weights under {state!r} (it has {_found(content)}); name a key of the "
                "file, or leave model.state out"
            )
        content = content[state]
    seen: list[Any] = []  # a dict may hold itself
    while isinstance(content, Mapping) and not any(content is before for before in seen):
        if _is_state(content):
            return {str(name): tensor for name, tensor in content.items()}
        seen.append(content)
        wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            break
        others = [repr(key) for key, value in content.items() if key != wrapper and _is_state(value)]
        if others:
            say_once(
                f"{path}: weights taken from {wrapper!r}; {', '.join(others)} not used (model.state chooses another)"
            )
        content = content[wrapper]
    raise InputError(
        f"checkpoint {path} holds no state dict ({_found(content)}); expected name → tensor, plain or under one of "
        f"{', '.join(WRAPPERS)}"
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, torch.Tensor) for v in value.values())


def _found(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"keys {', '.join(map(repr, list(content)[:5]))}"
    return type(content).__name__


def _plain_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefixes of torch.compile (`_orig_mod.`, anywhere) and DistributedDataParallel (`module.`)."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state
