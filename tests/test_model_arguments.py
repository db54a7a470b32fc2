"""What decides a model besides its weights: its name among timm's of today and of the past, and its arguments."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from timm.models import get_deprecated_models, model_entrypoint

from engine.capture import capture_attention
from engine.config import load_study, parse_value
from engine.run import main
from engine.study.model import model_info
from engine.study.study import Study
from engine.study.training import Run
from store import AttentionStore
from tests.photographs import write_photographs
from train.checkpoint import save_checkpoint, state_digest
from train.data.datasets import build_manifest, prepare_folder
from train.errors import InputError
from train.model_source import ModelSource, pretrained_cfg
from train.models import build_model, load_checkpoint, preprocessing_of
from train.weight_files import say_once

TINY = "test_vit"

# timm maps them to a tag that it has no weights of, and cannot build them either.
LOST = {"vit_base_patch16_224_sam", "vit_base_patch32_224_sam"}


@pytest.mark.filterwarnings("ignore:Mapping deprecated")
def test_every_name_that_timm_has_given_up_becomes_the_one_that_timm_builds() -> None:
    names = get_deprecated_models()
    assert len(names) > 200
    for old in sorted(names.keys() - LOST):
        shim = inspect.getclosurevars(model_entrypoint(old)).nonlocals
        now = shim["current_fn"].__name__ + (f".{shim['current_tag']}" if shim["current_tag"] else "")
        assert ModelSource(old).name == now
        assert pretrained_cfg(now).architecture == shim["current_fn"].__name__
    for old in LOST:
        with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
            timm.create_model(old)
        with pytest.raises(InputError, match=rf"has no weights tagged 'sam' \(which '{old}' stands for\); expected"):
            ModelSource(old)


def test_a_change_of_name_is_said_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    say_once.cache_clear()
    keys = {"data.kind": "folder", "model.name": "vit_base_patch16_224_in21k", "outputs": str(tmp_path)}
    assert Study(load_study(None, keys)).config.model.name == "vit_base_patch16_224.augreg_in21k"
    assert "vit_base_patch16_224_in21k is now vit_base_patch16_224.augreg_in21k" in caplog.messages


@pytest.mark.parametrize("prefix", ["timm/", "hf-hub:timm/", "hf_hub:timm/", "https://huggingface.co/timm/"])
def test_names_as_the_hub_has_them(prefix: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert ModelSource(f"{prefix}vit_tiny_patch16_224.augreg_in21k").name == "vit_tiny_patch16_224.augreg_in21k"
    assert f"{prefix}vit_tiny_patch16_224.augreg_in21k is timm's vit_tiny_patch16_224.augreg_in21k" in caplog.messages


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "hf-hub:google/ViT-base-patch16-224", "a/b/../c", ""])
def test_names_of_no_timm_model(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown model '.*'; expected a timm model name, as") as refused:
        ModelSource(name)
    if "patch16" in name:
        assert "; did you mean vit_base_patch16_224" in str(refused.value)
        assert "as a file: --model.weights" in str(refused.value)


@pytest.mark.parametrize("tag", [".", ".none", ".*", ".[a-z]*"])
def test_tags_of_no_weights(tag: str) -> None:
    with pytest.raises(InputError, match=r"model vit_tiny_patch16_224 has no weights tagged '.*'; expected one of aug"):
        ModelSource(f"vit_tiny_patch16_224{tag}")


def saved(folder: Path, name: str = TINY, file: str = "a.safetensors", **arguments: Any) -> Path:
    """A checkpoint as timm's users have it: of a model made with arguments, without a word of them."""
    torch.manual_seed(0)
    save_file(timm.create_model(name, num_classes=3, **arguments).state_dict(), folder / file)
    return folder / file


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"global_pool": "avg"}, "global_pool=avg"),
        ({"in_chans": 1}, "in_chans=1"),
        ({"init_values": 0.1}, "init_values=1e-05"),
        ({"patch_size": 8}, "patch_size=8"),
        ({"reg_tokens": 4}, "reg_tokens=4"),
        ({"reg_tokens": 4, "no_embed_class": True}, "reg_tokens=4,no_embed_class=true"),
        ({"class_token": False, "global_pool": "avg"}, "global_pool=avg,class_token=false"),
        ({"qk_norm": True, "in_chans": 1, "img_size": 96}, "in_chans=1,qk_norm=true"),
    ],
)
def test_arguments_that_the_weights_show_are_named_and_load_them(
    tmp_path: Path, arguments: dict[str, Any], flag: str
) -> None:
    path = saved(tmp_path, **arguments)
    with pytest.raises(InputError, match=rf"does not fit model {TINY}: .*; it fits with --model\.arguments {flag}$"):
        load_checkpoint(TINY, path)
    source = ModelSource(TINY, arguments=parse_value("model.arguments", flag), img_size=arguments.get("img_size", 0))
    assert state_digest(load_checkpoint(source, path).state_dict()) == state_digest(load_file(path))


def test_arguments_are_added_to_those_that_are_given(tmp_path: Path) -> None:
    path = saved(tmp_path, "vit_small_patch14_reg4_dinov2", depth=1, img_size=56, reg_tokens=2, in_chans=1)
    source = ModelSource("vit_small_patch14_reg4_dinov2", arguments={"depth": 1}, img_size=56)
    with pytest.raises(InputError, match=r"it fits with --model\.arguments depth=1,in_chans=1,reg_tokens=2$"):
        load_checkpoint(source, path)
    for arguments in ({"depth": 2}, {"depth": 1, "embed_dim": 96}):  # what the model's name decides is not guessed
        with pytest.raises(InputError, match=r"does not fit .*; (?!it fits with)"):
            load_checkpoint(ModelSource(source.name, arguments=arguments, img_size=56), path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("-1", -1),
        ("1e-5", 1e-5),
        (".5", 0.5),
        ("2.", 2.0),
        ("true", True),
        ("False", False),
        ("avg", "avg"),
        ("1x", "1x"),
        ("nan", "nan"),
    ],
)
def test_text_of_a_flag_is_a_number_true_false_or_text(text: str, value: object) -> None:
    found = parse_value("model.arguments", f"a={text}")["a"]
    assert (found, type(found)) == (value, type(value))
    assert parse_value("statistics.equivalence", "distance=0.1") == {"distance": "0.1"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_classes": 3}, r"names num_classes; the number of classes is read off"),
        ({"img_size": 64}, r"names img_size; give the size with --model\.img_size"),
        ({"pretrained": True}, r"names pretrained; say it with --model\.pretrained"),
        ({"checkpoint_path": "/etc/passwd"}, r"names checkpoint_path; name the file with --model\.weights"),
        ({"pretrained_cfg_overlay": "x"}, r"names pretrained_cfg_overlay, by which timm loads"),
        ({"features_only": True}, r"names features_only, by which timm loads"),
        ({"cache_dir": "/tmp"}, r"names cache_dir, by which timm loads"),
        (
            {"init_value": 1},
            r"takes no argument init_value; did you mean init_values\? \(it takes patch_size, in_chans",
        ),
        ({"a b": 1}, r"takes no argument a b \(it takes patch_size, "),
        ({"in_chans": 4}, r"has in_chans=4; pictures have 3 channels, or 1 as shades of grey"),
        ({"num_heads": 7}, r"cannot be built with --model\.arguments num_heads=7 \(dim should be divisible"),
        ({"block_fn": "os.system"}, r"cannot be built with --model\.arguments block_fn=os\.system \('str' object"),
        ({"act_layer": "none"}, r"cannot be built with --model\.arguments act_layer=none \(KeyError"),
        ({"patch_size": "x"}, r"cannot be built with --model\.arguments patch_size=x \("),
        ({"depth": -1, "patch_size": 0}, r"cannot be built with --model\.arguments depth=-1,patch_size=0 \("),
    ],
)
def test_arguments_that_no_model_is_built_with(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build_model(ModelSource(TINY, arguments=arguments), num_classes=2)


@pytest.mark.parametrize("value", [[8, 16], {"b": 1}, float("nan"), float("inf")])
def test_arguments_are_plain_values(value: object) -> None:
    expected = "expected true or false or a whole number or a number or text"
    with pytest.raises(InputError, match=rf"model\.arguments\.a is .*; {expected}"):
        load_study(None, {"data.kind": "folder", "model.arguments": {"a": value}})


def test_a_checkpoint_of_ours_remembers_its_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    say_once.cache_clear()
    arguments = {"global_pool": "avg", "in_chans": 1, "init_values": 1e-5}
    path, trained = tmp_path / "a.safetensors", build_model(ModelSource(TINY, arguments=arguments), num_classes=2)
    save_checkpoint(path, trained.state_dict(), {"model": TINY, "arguments": arguments})
    assert state_digest(load_checkpoint(TINY, path).state_dict()) == state_digest(trained.state_dict())
    again = build_model(ModelSource(TINY, weights=path), num_classes=2)
    assert state_digest(again.state_dict()) == state_digest(trained.state_dict())
    info = model_info(ModelSource(TINY, weights=path))
    assert info["arguments"] == arguments
    load_checkpoint(ModelSource(TINY, arguments={"init_values": 0.1}), path)
    assert (
        f"{path} was trained with init_values=1e-05 and is used with model.arguments init_values=0.1" in caplog.messages
    )


def test_other_arguments_are_another_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    sources = [ModelSource(TINY, weights=path, arguments=given) for given in ({}, {"drop_rate": 0.1}, {"drop_rate": 0})]
    assert len({Run("a", 0, "checkpoint", source).digest for source in sources}) == 3
    assert model_info(sources[0]) | {"arguments": {"drop_rate": 0.1}} == model_info(sources[1])


def test_grey_models_get_one_channel(tmp_path: Path) -> None:
    """The road of a grey checkpoint: the pictures' grey, normalised by the mean of the family's colours."""
    write_photographs(tmp_path / "photographs", per_class=1)
    path = saved(tmp_path, "vit_tiny_patch16_224", depth=1, in_chans=1, img_size=32)
    store = tmp_path / "a.zarr"
    flags = ["--model.name", "vit_tiny_patch16_224", "--model.weights", str(path), "--model.img_size", "32"]
    flags += ["--data.root", str(tmp_path / "photographs"), "--capture.samples", "1", "--device", "cpu"]
    given = ["--model.arguments", "in_chans=1,depth=1"]
    assert main(["capture", *flags, *given, "--store", str(store), "--capture.sinks", "store"]) == 0
    source = ModelSource("vit_tiny_patch16_224", arguments={"in_chans": 1, "depth": 1}, weights=path, img_size=32)
    model = build_model(source, num_classes=None)
    coloured = ModelSource("vit_small_patch14_reg4_dinov2", arguments={"depth": 1, "in_chans": 1})
    assert preprocessing_of(build_model(coloured, num_classes=2)).mean == pytest.approx((0.449,), abs=1e-3)
    prepared = preprocessing_of(model)
    assert (prepared.channels, prepared.mean, prepared.std) == (1, (0.5,), (0.5,))
    images = prepare_folder(build_manifest(tmp_path / "photographs", split="all"), preprocessing=prepared).test
    transform = create_transform((1, 32, 32), interpolation="bicubic", crop_pct=0.9, mean=(0.5,), std=(0.5,))
    pictures = [Image.open(tmp_path / "photographs" / name).convert("RGB").convert("L") for name in images.ids]
    inputs = torch.stack([cast(Any, transform)(picture) for picture in pictures])
    torch.testing.assert_close(images.batch(range(len(images))), inputs)
    expected = capture_attention(model, inputs)["blocks.0.attn"].numpy()
    found = AttentionStore.open(store)
    np.testing.assert_allclose(found.read(0), expected, atol=5e-4)
    assert found.schema.model["arguments"] == {"in_chans": 1, "depth": 1}
    assert main(["capture", *flags, "--model.arguments", "in_chans=1,depth=1,drop_rate=.1", "--store", str(store)]) == 1
