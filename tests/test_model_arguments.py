"""What decides a model besides its weights: its name among timm's of today and of the past."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import timm
from timm.models import get_deprecated_models, model_entrypoint

from engine.config import load_study
from engine.study import Study
from train.errors import InputError
from train.model_source import ModelSource, pretrained_cfg
from train.weights import say_once

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
    with pytest.raises(InputError, match=r"unknown model '.*'; expected a timm model name or digits_vit \(") as refused:
        ModelSource(name)
    if "patch16" in name:
        assert "nearest: vit_base_patch16_224" in str(refused.value)
        assert "as a file: --model.weights" in str(refused.value)


@pytest.mark.parametrize("tag", [".", ".none", ".*", ".[a-z]*"])
def test_tags_of_no_weights(tag: str) -> None:
    with pytest.raises(InputError, match=r"model vit_tiny_patch16_224 has no weights tagged '.*'; expected one of aug"):
        ModelSource(f"vit_tiny_patch16_224{tag}")
