"""Files of weights: sound ones in every layout and format, their bytes and their structure changed."""

from __future__ import annotations

import argparse
import functools
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from tests.fuzz import Trial, changed, random_of
from train.checkpoint import state_digest
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint
from train.weight_files import say_once

SHARE = 30
MODEL = "test_vit"

State = dict[str, torch.Tensor]
Random = np.random.Generator


def trials(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    torch.manual_seed(0)
    state = dict(build_model(MODEL, num_classes=3).state_dict())
    layouts = _layouts(state)
    files = tuple(content for layout in layouts.values() for content in _formats(layout).values())
    whole = {state_digest(state), state_digest({k: v for k, v in state.items() if not k.startswith("head")})}
    for number in range(count):
        random = random_of(seed, number)
        name = str(random.choice(list(layouts)))
        say_once.cache_clear()  # what was said of one file is of no use to the next
        if random.random() < 0.4:
            formats = _formats(layouts[name])
            kind = str(random.choice(list(formats)))
            content = changed(formats[kind], random, files)
            what, known = f"{name}, {kind}, bytes", whole if kind == "zip" else None
        else:
            what, content = _restructured(name, layouts[name], random, folder)
            known = None
        path = folder / f"{number % 8}{random.choice(['.pth', '.ckpt', '.safetensors', '.pth.tar', ''])}"
        path.write_bytes(content)
        yield Trial(what, functools.partial(_load, path, _asked(random), known, folder / "ran"))


def _asked(random: Random) -> dict[str, Any]:
    return {
        "img_size": int(random.choice([0, 0, 0, 96, 64])),
        "state": str(random.choice([*[""] * 12, "model", "teacher", "model.teacher", "student.backbone"])),
        "num_classes": random.choice([None, None, 3, 5]),
    }


def _load(path: Path, asked: dict[str, Any], known: set[str] | None, canary: Path) -> None:
    classes = asked.pop("num_classes")
    source = ModelSource(MODEL, weights=path, **asked)
    try:
        model = load_checkpoint(source, path) if classes is None else build_model(source, num_classes=int(classes))
    finally:
        assert not canary.exists(), "code in a file was run"
        path.unlink()
    state = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    if known is not None and not asked["img_size"] and not asked["state"] and classes is None:
        assert state_digest(state) in known, "weights changed that a checksum holds"


# ------------------------------------------------------------------------------------------------ sound files


def _begun(start: str, state: State) -> State:
    return {start + name: tensor for name, tensor in state.items()}


def _layouts(state: State) -> dict[str, Any]:
    body = {name: tensor for name, tensor in state.items() if not name.startswith("head")}
    half = {name: tensor * 0.5 for name, tensor in body.items()}
    return {
        "plain": state,
        "timm": {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5)},
        "lightning": {"state_dict": _begun("model.", state), "pytorch-lightning_version": "2.2"},
        "compiled": {"model": _begun("_orig_mod.module.", state)},
        "dino": {"student": _begun("module.backbone.", half), "teacher": _begun("backbone.", body)},
        "two starts": {"model": {**_begun("teacher.backbone.", body), **_begun("student.backbone.", half)}},
        "deepspeed": {"module": state, "dp_world_size": 1},
        "average": {"n_averaged": torch.tensor(3), **_begun("module.", state)},
        "ijepa": {"encoder": _begun("module.", body), "predictor": {"a": torch.zeros(2)}, "opt": {"state": {}}},
        "openclip": {**_begun("visual.trunk.", body), "logit_scale": torch.zeros(())},
        "dinov2": {**body, "mask_token": torch.zeros(1, 64)},
        "transformers": _begun("vit.", _of_transformers(body)),
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
        "adapters": {f"base_model.model.{name}.lora_A.weight": torch.zeros(2, 64) for name in ("a", "b")},
    }


def _of_transformers(state: State) -> State:
    """Under the names of ViTModel, with query, key and value apart."""
    found: State = {}
    for name, tensor in state.items():
        for ours, theirs in (
            (r"^(cls_token|patch_embed)", r"embeddings.\1"),
            (r"patch_embed\.", "patch_embeddings."),
            (r"^pos_embed$", "embeddings.position_embeddings"),
            (r"^norm\.", "layernorm."),
            (r"^blocks\.", "encoder.layer."),
            (r"norm1\.", "layernorm_before."),
            (r"norm2\.", "layernorm_after."),
            (r"attn\.proj\.", "attention.output.dense."),
            (r"mlp\.fc1\.", "intermediate.dense."),
            (r"mlp\.fc2\.", "output.dense."),
        ):
            name = re.sub(ours, theirs, name)
        name = name.replace("patch_embeddings.proj.", "patch_embeddings.projection.")
        if ".attn.qkv." in name:
            for part, of in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = of
        else:
            found[name] = tensor
    return found


def _formats(content: Any) -> dict[str, bytes]:
    """The content as torch saves it, zipped and as before 1.6, and as safetensors where that can hold it."""
    found = {"zip": _saved(content), "legacy": _saved(content, zipped=False)}
    if all(isinstance(value, torch.Tensor) for value in content.values()):
        found["safetensors"] = save({name: tensor.contiguous().clone() for name, tensor in content.items()})
    return found


def _saved(content: Any, zipped: bool = True) -> bytes:
    written = io.BytesIO()
    torch.save(content, written, _use_new_zipfile_serialization=zipped)
    return written.getvalue()


# ------------------------------------------------------------------------------------------------ changed structure


class Canary:
    """Would write a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "ran"))


def _restructured(name: str, layout: Any, random: Random, folder: Path) -> tuple[str, bytes]:
    content, done = layout, []
    for _ in range(int(random.choice([1, 1, 1, 2, 3]))):
        change = list(_CHANGES)[int(random.integers(0, len(_CHANGES)))]
        content = _CHANGES[change](content, random)
        done.append(change)
    if random.random() < 0.1:
        content = {**content, "hook": Canary(folder / "ran")}
        done.append("canary")
    what = f"{name}, {', '.join(done)}"
    if random.random() < 0.1:
        return f"{what}, deep", _deep(int(random.choice([100, 10_000])))
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor) and isinstance(k, str)}
    if tensors and random.random() < 0.2:
        try:
            return f"{what}, safetensors", save({k: v.contiguous().clone() for k, v in tensors.items()})
        except (ValueError, RuntimeError, NotImplementedError, KeyError):  # what safetensors has no form for
            pass
    return what, _saved(content, zipped=bool(random.random() < 0.7))


def _deep(levels: int) -> bytes:
    """A file of dicts within each other, deeper than pickle writes."""
    pickled = b"\x80\x02" + b"}X\x05\x00\x00\x00model" * levels + b"}" + b"s" * levels + b"."
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
    return written.getvalue()


def _deepest(content: Any, change: Callable[[State], Any]) -> Any:
    """Change the first dict of tensors that there is, wherever it lies."""
    if any(isinstance(value, torch.Tensor) for value in content.values()):
        return change(dict(content))
    for key, value in content.items():
        if isinstance(value, dict) and value and value is not content:
            return {**content, key: _deepest(value, change) if len(value) < 1000 else value}
    return content


def _one(change: Callable[[torch.Tensor, Random], Any]) -> Callable[[Any, Random], Any]:
    """A change of one tensor."""

    def of(content: Any, random: Random) -> Any:
        def at(state: State) -> State:
            names = [name for name, value in state.items() if isinstance(value, torch.Tensor)]
            name = names[int(random.integers(0, len(names)))]
            if state[name].numel() > 10**7:  # huge already: counting its values would take hours
                return state
            try:
                return {**state, name: change(state[name], random)}
            except (RuntimeError, NotImplementedError, IndexError, TypeError):  # of a kind that has no such form
                return state

        return _deepest(content, at)

    return of


def _names(change: Callable[[str, Random], Any], share: float) -> Callable[[Any, Random], Any]:
    """A change of a share of the names."""

    def of(content: Any, random: Random) -> Any:
        return _deepest(
            content, lambda state: {change(k, random) if random.random() < share else k: v for k, v in state.items()}
        )

    return of


def _dropped(content: Any, random: Random) -> Any:
    share = random.choice([0.01, 0.1, 0.9])
    return _deepest(content, lambda state: {k: v for k, v in state.items() if random.random() > share})


def _swapped(content: Any, random: Random) -> Any:
    def at(state: State) -> State:
        names, values = list(state), list(state.values())
        return dict(zip(names, [values[i] for i in random.permutation(len(values))], strict=True))

    return _deepest(content, at)


def _added(content: Any, random: Random) -> Any:
    names = (
        "norm_pre.weight",
        "reg_token",
        "blocks.6.norm1.weight",
        "decoder_blocks.0.a",
        "x" * 5000,
        "a\x1b[2J\nb",
        "",
    )
    name, shape = str(random.choice(names)), [int(n) for n in random.integers(0, 5, int(random.integers(0, 4)))]
    return _deepest(content, lambda state: {**state, name: torch.zeros(shape)})


def _beside(content: Any, random: Random) -> Any:
    values: tuple[Any, ...] = (None, 3, "text", [], {}, {"a": {}}, (1, 2), np.float64(1), torch.zeros(3), 10**400, b"b")
    key: Any = random.choice(np.array(["epoch", "model", "state_dict", "teacher", "module", "optimizer"]))
    key = str(key) if random.random() < 0.8 else int(random.integers(0, 9))
    return {**content, key: values[int(random.integers(0, len(values)))]}


def _itself(content: Any, random: Random) -> Any:
    changed_content = dict(content)
    changed_content[str(random.choice(["model", "state_dict", "other"]))] = changed_content
    return changed_content


_CHANGES: dict[str, Callable[[Any, Random], Any]] = {
    "nothing": lambda content, random: content,
    "dropped": _dropped,
    "added": _added,
    "swapped": _swapped,
    "beside": _beside,
    "itself": _itself,
    "wrapped": lambda content, random: {str(random.choice(["model", "net", "ema", "mine"])): content},
    "twice": lambda content, random: {"model": content, "model_ema": content},
    "listed": lambda content, random: {"model": list(content.items()) if random.random() < 0.3 else content},
    "started": _names(lambda name, random: f"a.b.{name}", 1.0),
    "some started": _names(lambda name, random: f"a.{name}", 0.5),
    "renamed": _names(lambda name, random: f"{name}x", 0.02),
    "numbered": _names(lambda name, random: int(random.integers(0, 99)), 0.1),
    "very long": _names(lambda name, random: f"{'a.' * 20_000}{name}", 0.01),
    "of projection": _names(lambda name, random: f"head.0.{name}", 0.02),
    "transposed": _one(lambda tensor, random: tensor.transpose(0, -1)),
    "cut": _one(lambda tensor, random: tensor[..., :-1]),
    "flat": _one(lambda tensor, random: tensor.reshape(-1)),
    "more axes": _one(lambda tensor, random: tensor[(None,) * int(random.integers(1, 40))]),
    "empty": _one(lambda tensor, random: tensor[:0]),
    "one number": _one(lambda tensor, random: torch.tensor(1.0)),
    "huge": _one(lambda tensor, random: torch.zeros(1).expand(10**13)),
    "strided": _one(lambda tensor, random: torch.zeros(4).as_strided((10**7, 10**7), (0, 0))),
    "not finite": _one(lambda tensor, random: tensor / 0),
    "double": _one(lambda tensor, random: tensor.double() * random.choice([1, 1e300])),
    "half": _one(lambda tensor, random: tensor.half()),
    "int8": _one(lambda tensor, random: tensor.to(torch.int8)),
    "int64": _one(lambda tensor, random: tensor.long()),
    "bool": _one(lambda tensor, random: tensor > 0),
    "complex": _one(lambda tensor, random: tensor.to(torch.complex64)),
    "float8": _one(lambda tensor, random: tensor.to(torch.float8_e4m3fn)),
    "sparse": _one(lambda tensor, random: tensor.to_sparse()),
    "huge sparse": _one(
        lambda tensor, random: torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**9, 10**9))
    ),
    "quantised": _one(lambda tensor, random: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)),
    "meta": _one(lambda tensor, random: tensor.to("meta")),
    "parameter": _one(lambda tensor, random: torch.nn.Parameter(tensor)),
    "no tensor": _one(lambda tensor, random: [None, "text", 3, {"a": tensor}][int(random.integers(0, 4))]),
}
