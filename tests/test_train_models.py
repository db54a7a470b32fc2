"""Checkpoints as people save them, and the sentence for each way in which one does not fit."""

from __future__ import annotations

import argparse
import io
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from store import DiskError
from tests.test_import_rule import PACKAGES
from train.checkpoint import read_checkpoint, save_checkpoint, sidecar_path, state_digest
from train.errors import DamagedFileError, InputError
from train.model_source import ModelSource
from train.models import build_model, classifier_name, load_checkpoint, preprocessing_of, readout, seeded
from train.whole_files import write_atomically

TINY = "test_vit"  # timm's own tiny ViT: 160 px, width 64


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_model(TINY, num_classes=7).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    return state_digest(a.state_dict()) == state_digest(b.state_dict())


def test_save_and_read_back(tmp_path: Path, model: nn.Module) -> None:
    path = tmp_path / "deep" / "a.safetensors"
    sha256 = save_checkpoint(path, model.state_dict(), {"model": TINY, "history": [{"epoch": 0, "loss": 1.5}]})
    found = read_checkpoint(path)
    assert found.metadata["sha256"] == sha256
    assert found.metadata["history"] == [{"epoch": 0, "loss": 1.5}]
    assert state_digest(found.tensors) == state_digest(model.state_dict())
    assert same(load_checkpoint(TINY, path), model)
    before = path.read_bytes(), sidecar_path(path).read_bytes()
    save_checkpoint(path, model.state_dict(), {"model": TINY, "history": [{"epoch": 0, "loss": 1.5}]})
    assert (path.read_bytes(), sidecar_path(path).read_bytes()) == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["a.json", "a.safetensors"]


def test_weights_that_come_from_no_file_are_of_the_seed_and_leave_the_callers_randomness() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = []
    for _ in range(2):
        with seeded(1):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.rand(3), expected)
    files = (path for package in PACKAGES for path in (Path(__file__).parents[1] / package).rglob("*.py"))
    seeding = {
        path.name for path in files if re.search(r"\b(torch\.manual_seed|random\.seed)\(", path.read_text("utf-8"))
    }
    assert seeding == {"models.py", "loop.py"}, "elsewhere: `seeded`; the loop seeds inside `training_mode`"


def test_every_flipped_bit_is_detected_and_the_file_named(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    save_checkpoint(path, {"weight": torch.arange(12.0)}, {})
    content = path.read_bytes()
    for position in np.random.default_rng(0).choice(len(content) * 8, 60, replace=False):
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"small\.safetensors is damaged"):
            read_checkpoint(path)
        with pytest.raises(DamagedFileError, match=r"small\.safetensors is damaged"):
            load_checkpoint(TINY, path)
    path.write_bytes(content)
    assert torch.equal(read_checkpoint(path).tensors["weight"], torch.arange(12.0))
    sidecar_path(path).write_text("{")
    with pytest.raises(DamagedFileError, match=r"small\.json is not readable JSON"):
        read_checkpoint(path)
    sidecar_path(path).unlink()
    with pytest.raises(InputError, match="its save was not finished"):
        read_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "model_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapped_and_prefixed_files_load(tmp_path: Path, model: nn.Module, wrapper: str, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    path = tmp_path / "user.pth"
    torch.save({wrapper: state, "epoch": 3, "args": argparse.Namespace(lr=1e-4)} if wrapper else state, path)
    loaded = load_checkpoint(TINY, path)
    assert same(loaded, model)
    assert not loaded.training


def test_the_number_of_classes_is_read_off_the_head(tmp_path: Path) -> None:
    for name, classes in ((TINY, 3), ("test_resnet", 5), ("digits_vit", 10)):
        model = build_model(name, num_classes=classes)
        save_file(model.state_dict(), tmp_path / "a.safetensors")
        assert load_checkpoint(name, tmp_path / "a.safetensors").get_submodule(classifier_name(model)).weight.shape[
            0
        ] == (classes)


def test_another_image_size_resizes_positions_and_says_so(
    tmp_path: Path, model: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(model.state_dict(), tmp_path / "a.pt")
    small = load_checkpoint(ModelSource(TINY, img_size=96), tmp_path / "a.pt")
    assert small(torch.zeros(1, 3, 96, 96)).shape == (1, 7)
    assert "pos_embed resized from [1, 101, 64] to [1, 37, 64] by timm" in caplog.text
    assert torch.equal(small.state_dict()["blocks.0.attn.qkv.weight"], model.state_dict()["blocks.0.attn.qkv.weight"])
    assert preprocessing_of(small).height_px == 96
    with pytest.raises(InputError, match=r"model\.img_size is 100, expected a multiple of the 16×16 px patches"):
        load_checkpoint(ModelSource(TINY, img_size=100), tmp_path / "a.pt")


def test_weights_that_do_not_fit_name_key_and_shapes(tmp_path: Path, model: nn.Module) -> None:
    state = model.state_dict()

    def refused(changed: dict[str, torch.Tensor], name: str = TINY) -> str:
        torch.save(changed, tmp_path / "a.pth")
        with pytest.raises(InputError) as caught:
            load_checkpoint(name, tmp_path / "a.pth")
        return str(caught.value)

    wrong = {**state, "blocks.1.attn.qkv.weight": torch.zeros(5, 64)}
    assert "blocks.1.attn.qkv.weight is [5, 64], expected [192, 64];" in refused(wrong)
    # A patch embedding of another patch size is another model: not resized, though timm could.
    assert "patch_embed.proj.weight is [64, 3, 8, 8], expected [64, 3, 16, 16]" in refused(
        {**state, "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}
    )
    assert "pos_embed is [1, 101, 32], expected [1, 101, 64]" in refused(
        {**state, "pos_embed": torch.zeros(1, 101, 32)}
    )
    missing = {key: tensor for key, tensor in state.items() if key not in ("norm.weight", "norm.bias")}
    assert "norm.weight is missing, expected [64], and 1 more key(s)" in refused(missing)
    assert "extra.weight [2] is not a weight of this model;" in refused({**state, "extra.weight": torch.zeros(2)})
    assert "does not fit model digits_vit" in refused(dict(state), "digits_vit")


class Evil:
    """Would write a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (Path.write_text, (self.target, "run"))  # type: ignore[return-value]


def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, model: nn.Module) -> None:
    for content in ({"state_dict": model.state_dict(), "hook": Evil(tmp_path / "ran")}, model):
        torch.save(content, tmp_path / "evil.pth")
        with pytest.raises(InputError, match=r"pickled objects .* refused; save model\.state_dict"):
            load_checkpoint(TINY, tmp_path / "evil.pth")
    torch.save(Evil(tmp_path / "ran"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="refused"):
        load_checkpoint(TINY, tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoints(tmp_path: Path, model: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    cases: dict[str, tuple[bytes, str]] = {
        "text.pth": (b"hello", r"not a checkpoint file \(it begins with b'hello'\)"),
        "short.pth": (buffer.getvalue()[:5000], "or it is cut short"),
        "text.safetensors": (b"hello", "not a checkpoint file"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            load_checkpoint(TINY, tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(InputError, match=r"holds no state dict \(keys 'epoch'\)"):
        load_checkpoint(TINY, tmp_path / "none.pth")
    with pytest.raises(InputError, match="does not exist"):
        load_checkpoint(TINY, tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="is a folder"):
        load_checkpoint(TINY, tmp_path)


def test_names_and_weights_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"unknown model 'vit_tny_patch16_224'; expected .*; did you mean vit_tiny_patch16_224"
    ):
        build_model("vit_tny_patch16_224", num_classes=3)
    with pytest.raises(InputError, match="no weights tagged 'none'; expected one of augreg_in21k"):
        build_model("vit_tiny_patch16_224.none", num_classes=3)
    with pytest.raises(InputError, match=r"timm has no pretrained weights for digits_vit.*--model\.weights"):
        build_model(ModelSource("digits_vit", pretrained=True), num_classes=3)


def test_no_network_says_how_to_give_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from huggingface_hub import constants

    def unreachable(*arguments: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(
        InputError, match=r"neither cached nor to be downloaded; give a file with --model\.weights FILE"
    ):
        build_model(ModelSource("vit_tiny_patch16_224.augreg_in21k", pretrained=True), num_classes=3)
    assert before == constants.HF_HUB_OFFLINE


def test_a_head_for_other_classes_starts_anew(tmp_path: Path, model: nn.Module) -> None:
    torch.save(model.state_dict(), tmp_path / "a.pth")
    other = build_model(ModelSource(TINY, weights=tmp_path / "a.pth"), num_classes=4)
    kept = build_model(ModelSource(TINY, weights=tmp_path / "a.pth"), num_classes=7)
    assert same(kept, model)
    assert other.get_submodule("head").weight.shape == (4, 64)
    assert torch.equal(other.state_dict()["norm.weight"], model.state_dict()["norm.weight"])


def test_preprocessing_is_the_models_own() -> None:
    found = preprocessing_of(build_model("vit_tiny_patch16_224", num_classes=2))
    assert found.to_dict() == {
        "channels": 3,
        "height_px": 224,
        "width_px": 224,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


def test_preprocessing_is_one_line_of_the_log() -> None:
    line = str(preprocessing_of(build_model("vit_tiny_patch16_224", num_classes=2)))
    assert line == "224×224×3, bicubic, crop 0.9 (center), mean 0.5 0.5 0.5, std 0.5 0.5 0.5"


def test_digits_vit_is_timms_own_class_and_reads_out_from_the_class_token() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = build_model("digits_vit", num_classes=10).eval()
    assert type(model) is VisionTransformer
    images = torch.randn(2, 1, 48, 48)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 65, 64)
    torch.testing.assert_close(readout(model, images), tokens[:, 0])
    with pytest.raises(InputError, match="no single linear classifier"):
        classifier_name(build_model("deit_tiny_distilled_patch16_224", num_classes=3))
