"""Adapters as peft saves them, merged into the weights that they were trained on: against peft's own model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from engine.capture import capture_attention
from engine.config import load_study
from engine.run import main
from engine.study.model import checkpoint_of, model_info
from engine.study.training import Run
from tests.photographs import write_photographs
from train.errors import InputError
from train.model_source import ModelSource
from train.models import build_model, head_size, load_checkpoint

TINY = "test_vit"
ATTENTION = r"blocks\.\d+\.attn\.(qkv|proj)"
IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def base(folder: Path, classes: int = 4) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.08)
    save_file(model.state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


def adapted(weights: Path, **settings: Any) -> nn.Module:
    """peft's model, its adapters (and a head, if it is trained) anything but what they were at the start."""
    model = timm.create_model(TINY, num_classes=4)
    model.load_state_dict(load_file(weights))
    if "head" in (settings.get("modules_to_save") or ()):
        model.reset_classifier(3)
    torch.manual_seed(1)
    made = cast(Any, peft.get_peft_model)(model, peft.LoraConfig(**{"r": 3, "target_modules": ATTENTION, **settings}))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


@torch.no_grad()
def assert_same(found: nn.Module, expected: nn.Module) -> None:
    torch.testing.assert_close(found(IMAGES), expected(IMAGES), atol=1e-5, rtol=0)
    inner = expected.get_submodule("base_model.model")
    maps, theirs = capture_attention(found, IMAGES), capture_attention(inner, IMAGES)
    assert list(maps) == list(theirs)
    for site, attention in maps.items():
        torch.testing.assert_close(attention, theirs[site], atol=1e-5, rtol=0)
    assert not any("lora" in name or "base_layer" in name for name in found.state_dict())


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_alpha": 7},
    "rslora": {"lora_alpha": 7, "use_rslora": True},
    "dora": {"lora_alpha": 7, "use_dora": True},
    "head": {"modules_to_save": ["head"], "use_dora": True},
    "everywhere": {"target_modules": ["qkv", "proj", "fc1", "fc2", "head"]},  # proj: the patch embedding's convolution
    "patterns": {
        "target_modules": ["qkv", "fc1"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "blocks",
        "rank_pattern": {"fc1": 2},
        "alpha_pattern": {"fc1": 5},
    },
    "norms": {"modules_to_save": ["norm", "head"]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_are_merged_into_their_weights(tmp_path: Path, kind: str) -> None:
    weights = base(tmp_path)
    made = adapted(weights, **KINDS[kind])
    cast(Any, made).save_pretrained(tmp_path / "lora")
    expected: nn.Module = made
    if kind in ("pissa", "olora"):  # peft changes the weights below them again, whenever it loads such adapters
        model = timm.create_model(TINY, num_classes=4)
        model.load_state_dict(load_file(weights))
        expected = cast(Any, peft.PeftModel).from_pretrained(model, tmp_path / "lora").eval()
    for place in ("lora", "lora/adapter_model.safetensors") if kind == "head" else ("lora",):
        source = ModelSource(TINY, weights=weights, adapter=tmp_path / place)
        assert_same(build_model(source, num_classes=None), expected)
    assert head_size(source) == (3 if "head" in KINDS[kind].get("modules_to_save", ()) else 4)
    if kind == "head":
        assert cast(Any, build_model(source, num_classes=6)).num_classes == 6


@pytest.mark.parametrize(
    ("kind", "wrapper"),
    [("dora", ""), ("rslora", "state_dict"), ("head", "inner"), ("everywhere", ""), ("patterns", ""), ("norms", "")],
)
def test_checkpoints_that_adapters_are_not_merged_into(tmp_path: Path, kind: str, wrapper: str) -> None:
    made = adapted(base(tmp_path), **KINDS[kind])
    cast(Any, made).save_pretrained(tmp_path)
    state = made.get_submodule("base_model.model").state_dict() if wrapper == "inner" else made.state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper == "state_dict" else state, tmp_path / "whole.pth")
    assert_same(load_checkpoint(TINY, tmp_path / "whole.pth"), made)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(
        InputError, match=r"whole\.pth holds adapters of peft, and there is no adapter_config\.json bes"
    ):
        load_checkpoint(TINY, tmp_path / "whole.pth")


def test_adapters_in_a_torch_file(tmp_path: Path) -> None:
    weights = base(tmp_path)
    made = adapted(weights)
    cast(Any, made).save_pretrained(tmp_path / "lora", safe_serialization=False)
    assert (tmp_path / "lora" / "adapter_model.bin").is_file()
    assert_same(build_model(ModelSource(TINY, weights=weights, adapter=tmp_path / "lora"), num_classes=None), made)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    cast(Any, adapted(base(folder))).save_pretrained(folder / "lora")
    return folder


@pytest.fixture
def lora(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True) / "lora"


def changed_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = folder / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values))

    return change


def changed_tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return changed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), r"there is no adapter_config\.json beside it, which says how"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors does not exist; expected"),
        (lambda f: (f / "adapter_config.json").write_text("{"), r"adapter_config\.json is not readable JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[1]"), r"is no table, and adapters of LoRA and DoRA"),
        (
            changed_config(peft_type="LOHA"),
            r"is of LOHA, and adapters of LoRA and DoRA are merged here; merge them where",
        ),
        (changed_config(bias="all"), r'has bias "all", which is not followed here; merge them where'),
        (changed_config(layer_replication=[[0, 2]]), r"has layer_replication \[\[0, 2\]\], which is not followed"),
        (changed_config(init_lora_weights="loftq"), r'has init_lora_weights "loftq", which changed the weights below'),
        (changed_config(r=2), r"the adapters do not fit model test_vit \(Error\(s\) in loading .*: size mismatch for"),
        (changed_config(r="many"), r"the adapters do not fit model test_vit \("),
        (
            changed_config(target_modules=["query"]),
            r"the adapters do not fit model test_vit \(Target modules {'query'} not found",
        ),
        (changed_config(use_dora=True), r"do not fit model test_vit: .*lora_magnitude_vector.* are not in the file"),
        (changed_config(lora_alpha=float("nan")), r"merging makes NaN or infinity in blocks\.0\.attn\.qkv\.weight"),
        (
            changed_config(target_modules=["qkv"]),
            r"do not fit model test_vit: blocks\.0\.attn\.proj\.lora_A.* are not of",
        ),
        (
            changed_tensors(lambda t: {k: v for k, v in t.items() if ".1." not in k}),
            r"do not fit model test_vit: blocks\.1\.attn\.proj\.lora_A\.weight and \d+ other\(s\) are not in the file",
        ),
        (changed_tensors(lambda t: {"a": torch.zeros(2)}), r"holds no adapters of LoRA or DoRA alone \(it has a\)"),
    ],
)
def test_adapters_that_cannot_be_merged(lora: Path, change: Callable[[Path], None], sentence: str) -> None:
    change(lora)
    source = ModelSource(TINY, weights=lora.with_name("base.safetensors"), adapter=lora)
    with pytest.raises(InputError, match=sentence):
        build_model(source, num_classes=None)


def test_adapters_need_weights(lora: Path) -> None:
    with pytest.raises(InputError, match=r"adapters .*lora need the weights .*; give them with --model\.weights FILE"):
        build_model(ModelSource(TINY, adapter=lora), num_classes=None)
    for path in (lora, lora / "adapter_model.safetensors"):
        with pytest.raises(
            InputError, match=rf"holds adapters .* without .*; name it with --model\.adapter {path}, and"
        ):
            load_checkpoint(TINY, path)
    renamed = shutil.copy(lora / "adapter_model.safetensors", lora.with_name("best.safetensors"))
    with pytest.raises(InputError, match=r"name it with --model\.adapter"):
        load_checkpoint(TINY, renamed)


def test_several_adapters_are_refused(tmp_path: Path) -> None:
    made = cast(Any, adapted(base(tmp_path)))
    made.add_adapter("second", peft.LoraConfig(r=2, target_modules=ATTENTION))
    made.save_pretrained(tmp_path)
    torch.save(made.state_dict(), tmp_path / "whole.pth")
    with pytest.raises(
        InputError, match=r"holds several adapters \(default, second\), and nothing says which is meant"
    ):
        load_checkpoint(TINY, tmp_path / "whole.pth")


def test_a_condition_of_adapters_lies_on_the_models_weights_and_counts_all_its_files(lora: Path) -> None:
    weights = lora.with_name("base.safetensors")
    keys: dict[str, Any] = {"data.kind": "folder", "model.name": TINY, "model.weights": str(weights)}
    keys["conditions"] = {
        name: {"recipe": "checkpoint", "checkpoint": str(path)} for name, path in (("a", weights), ("b", lora))
    }
    config = load_study(None, keys)
    plain, source = checkpoint_of(config, "a"), checkpoint_of(config, "b")
    assert plain == replace(source, adapter="")
    assert source == ModelSource(TINY, weights=str(weights), adapter=str(lora), pretrained=True)
    seen = {Run("b", 0, "checkpoint", plain).digest, Run("b", 0, "checkpoint", source).digest}
    infos = [model_info(plain), model_info(source)]
    changed_config(lora_alpha=9)(lora)
    seen.add(Run("b", 0, "checkpoint", source).digest)
    changed_tensors(lambda t: {k: v + 1 for k, v in t.items()})(lora)
    seen.add(Run("b", 0, "checkpoint", source).digest)
    infos.append(model_info(source))
    base(lora.parent, classes=5)
    seen.add(Run("b", 0, "checkpoint", source).digest)
    assert len(seen) == 5
    assert [info.get("adapter_sha256") is not None for info in infos] == [False, True, True]
    assert infos[1] != infos[2]


def test_what_no_given_checkpoint_is_made_of_is_refused(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, photographs = str(lora.with_name("base.safetensors")), tmp_path / "photographs"
    write_photographs(photographs, per_class=1)
    command = ["compare", "--baseline", weights, "--finetuned", weights, "--model.name", TINY]
    command += ["--data.root", str(photographs), "--outputs", str(tmp_path / "out")]
    assert main([*command, "--model.adapter", str(lora)]) == 2
    assert "which it is not merged into; give the adapters as a condition's checkpoint" in capsys.readouterr().err
    assert main([*command, "--model.weights", weights]) == 2
    assert "checkpoints of whole models, which make no use of it; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_are_not_called_adapters(lora: Path) -> None:
    weights = lora.with_name("base.safetensors")
    with pytest.raises(InputError, match=r"base\.safetensors holds no adapters of LoRA or DoRA alone"):
        build_model(ModelSource(TINY, weights=weights, adapter=weights), num_classes=None)


def test_adapters_on_the_command_line(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lora.parent
    write_photographs(folder / "photographs", per_class=1)
    flags = ["--model.name", TINY, "--data.root", str(folder / "photographs"), "--store", str(folder / "a.zarr")]
    flags += ["--device", "cpu", "--capture.samples", "0", "--capture.sinks", "store"]
    assert main(["capture", *flags, "--model.weights", str(lora)]) == 2
    assert f"name it with --model.adapter {lora}" in capsys.readouterr().err
    weights = ["--model.weights", str(folder / "base.safetensors")]
    assert main(["capture", *flags, *weights, "--model.adapter", str(lora)]) == 0
    assert main(["capture", *flags, *weights]) == 1, "without its adapters it is another model"
    assert "model.adapter_sha256" in capsys.readouterr().err
