"""Checkpoints of other code: whatever the layout, the same weights end in the same places, or nothing is loaded."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models import vision_transformer, vision_transformer_sam
from torch import nn

from train.checkpoint import state_digest
from train.errors import InputError
from train.fitting import load_weights
from train.layouts import fit
from train.model_source import ModelSource
from train.models import build_model, load_checkpoint
from train.weight_files import say_once
from train.weights import read_state_dict

TINY = "test_vit"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    torch.manual_seed(0)
    return dict(build_model(TINY, num_classes=3).state_dict())


@pytest.fixture(autouse=True)
def _said(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    caplog.set_level("INFO", logger="train")


def begun(start: str, state: State) -> State:
    return {start + name: tensor for name, tensor in state.items()}


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("head")}


def other(state: State) -> State:
    return {name: tensor * 0.5 for name, tensor in state.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------------------ wrappers and starts

# Name of the file -> what is saved, and what the log says of it.
LAYOUTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "timm.pth.tar": (lambda s: {"epoch": 1, "arch": TINY, "state_dict": s, "args": argparse.Namespace(lr=0.1)}, ""),
    "mocov3_linear.pth.tar": (lambda s: {"state_dict": begun("module.", s)}, ""),
    "lightning.ckpt": (lambda s: {"state_dict": begun("model.", s), "pytorch-lightning_version": "2.2"}, ""),
    "deepspeed.pt": (lambda s: {"module": s, "dp_world_size": 1}, ""),
    "no_suffix": (lambda s: {"net": {"params": s}}, ""),
    "average.model": (lambda s: {"n_averaged": torch.tensor(3), **begun("module.", s)}, "left out: n_averaged"),
    "own_key.pth": (lambda s: {"my_model": s, "epoch": 3, "rng": torch.zeros(3)}, ""),
    "beside.pth": (lambda s: {**s, "epoch": 3, "best": None}, ""),
    "fsdp.pth": (
        lambda s: {name.replace("blocks.", "blocks._fsdp_wrapped_module."): t for name, t in s.items()},
        "",
    ),
    "two.pth": (
        lambda s: {"model": {**begun("teacher.backbone.", s), **begun("student.backbone.", other(s))}},
        "begin with 'teacher.backbone.'; 'student.backbone.' not used (model.state chooses another)",
    ),
    "average_beside.pth": (
        lambda s: {**begun("model_ema.", other(s)), **begun("model.", s)},
        "begin with 'model.'; 'model_ema.' not used",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_whatever_is_around_the_weights_they_are_found(
    tmp_path: Path, state: State, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, said = LAYOUTS[name]
    path = saved(tmp_path / name, make(state))
    assert state_digest(load_checkpoint(TINY, path).state_dict()) == state_digest(state)
    assert said in caplog.text
    if not said:
        assert "left out" not in caplog.text


HEADLESS: dict[str, tuple[Callable[[State], Any], str]] = {
    "backbone.pth": (
        lambda s: {**begun("backbone.", body(s)), "fc.weight": s["head.weight"], "fc.bias": s["head.bias"]},
        "2 of {all} tensors are no part of test_vit and left out: fc.weight, fc.bias",
    ),
    "dino.pth": (
        lambda s: {
            "student": begun("module.backbone.", other(body(s))),
            "teacher": {**begun("backbone.", body(s)), "head.mlp.0.weight": torch.zeros(2, 2)},
        },
        "weights taken from 'teacher'; 'student' not used (model.state chooses another)",
    ),
    "mocov3.pth": (
        lambda s: {
            "state_dict": {
                **begun("module.base_encoder.", {**body(s), "head.0.weight": torch.zeros(2, 64)}),
                **begun("module.momentum_encoder.", other(body(s))),
                "module.predictor.0.weight": torch.zeros(2),
            }
        },
        "begin with 'base_encoder.'; 'momentum_encoder.' not used",
    ),
    "mae.pth": (
        lambda s: {"model": {**body(s), "mask_token": torch.zeros(1), "decoder_blocks.0.norm1.weight": torch.ones(2)}},
        "2 of {all} tensors are no part of test_vit and left out: mask_token, decoder_blocks.0.norm1.weight",
    ),
    "openclip.pth": (
        lambda s: {**begun("visual.trunk.", body(s)), "logit_scale": torch.ones(()), "text.ln.weight": torch.ones(3)},
        "2 of {all} tensors are no part of test_vit and left out: logit_scale, text.ln.weight",
    ),
    "ijepa.pth.tar": (
        lambda s: {
            "encoder": begun("module.", body(s)),
            "predictor": begun("module.", {"norm.weight": torch.ones(3)}),
            "target_encoder": begun("module.", other(body(s))),
        },
        "weights taken from 'encoder'; 'predictor', 'target_encoder' not used",
    ),
}


@pytest.mark.parametrize("name", HEADLESS)
def test_a_backbone_beside_other_things_is_found_and_these_are_named(
    tmp_path: Path, state: State, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, said = HEADLESS[name]
    path = saved(tmp_path / name, make(state))
    assert state_digest(load_checkpoint(TINY, path).state_dict()) == state_digest(body(state))
    assert said.format(all=len(read_state_dict(path))) in caplog.text
    assert "built without a head" in caplog.text
    assert build_model(TINY, num_classes=5).state_dict()["head.weight"].shape == (5, 64)


@pytest.mark.parametrize("chosen", ["student", "model.student", "student.backbone", "student.backbone."])
def test_weights_are_chosen_by_key_by_keys_and_by_the_beginning_of_names(
    tmp_path: Path, state: State, chosen: str
) -> None:
    nested = {"model": {"teacher": state, "student": other(state)}, "student": other(state)}
    names = {**begun("teacher.backbone.", state), **begun("student.backbone.", other(state))}
    path = saved(tmp_path / "a.pth", names if "backbone" in chosen else nested)
    assert state_digest(read_state_dict(path, chosen)) == state_digest(other(state))


def test_two_models_of_which_nothing_says_which_is_meant(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {**begun("left.", state), **begun("right.", state)})
    with pytest.raises(
        InputError, match=r"behind 'left\.' and behind 'right\.', .* choose with model\.state, such as left"
    ):
        load_checkpoint(TINY, path)


def test_what_stands_within_the_model_and_is_not_of_it_is_refused(tmp_path: Path, state: State) -> None:
    for more in ("norm_pre.weight", "reg_token", "blocks.0.ls1.gamma", "blocks.6.norm1.weight"):
        advice = "the file holds 7 blocks" if "6" in more else "expected every weight of test_vit and, beside"
        path = saved(tmp_path / "a.pth", {"state_dict": begun("model.", {**state, more: torch.zeros(64)})})
        with pytest.raises(InputError, match=rf"{re.escape(more)} \[64\] is not a weight of this model; {advice}"):
            load_checkpoint(TINY, path)


def test_names_that_would_become_one_are_left_as_they_are(tmp_path: Path, state: State) -> None:
    path = saved(tmp_path / "a.pth", {**state, "_orig_mod.norm.weight": torch.zeros(64)})
    with pytest.raises(InputError, match=r"_orig_mod\.norm\.weight \[64\] is not a weight of this model"):
        load_checkpoint(TINY, path)


# ------------------------------------------------------------------------------------------------ layouts of other code


def random_weights(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


def loaded(model: nn.Module, state: State, classifiers: tuple[str, ...] = ("head",)) -> nn.Module:
    path = Path("a.pth")
    with torch.device("meta"):
        outline = type(model)(**model.arguments)
    load_weights(model, fit(state, outline, classifiers, path), state, path, ModelSource(TINY))
    return model.eval()


def vit(**arguments: Any) -> nn.Module:
    """A tiny ViT of timm, the size of `hugging_face`'s."""
    of = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    kind = arguments.pop("kind", vision_transformer.VisionTransformer)
    model = kind(**of | arguments)
    model.arguments = of | arguments
    return model


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def hugging_face(name: str, *, labels: int = 0, **more: Any) -> Any:
    config = getattr(transformers, f"{name.partition('Model')[0].partition('For')[0]}Config")
    of = {**SIZES, "intermediate_size": 128, **({"num_labels": labels} if labels else {}), **more}
    if "Dinov2" in name:
        of |= {"mlp_ratio": 4}
        del of["intermediate_size"]
    return random_weights(getattr(transformers, name)(config(**of)))


@pytest.fixture(params=["as saved", "as in memory"])
def state_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Any], State]:
    """The names in files of `save_pretrained` are not those in memory since transformers 5."""

    def read(model: Any) -> State:
        if request.param == "as in memory":
            return dict(model.state_dict())
        model.save_pretrained(tmp_path)
        return read_state_dict(tmp_path / "model.safetensors")

    return read


IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ViTModel", {}),
        ("Dinov2Model", {"init_values": 1.0}),
        ("Dinov2WithRegistersModel", {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}),
        ("CLIPVisionModel", {"pre_norm": True, "norm_layer": nn.LayerNorm}),
    ],
)
def test_features_of_transformers_models_are_the_same(
    name: str, arguments: dict[str, Any], state_of: Callable[[Any], State]
) -> None:
    theirs = hugging_face(name, **({"hidden_act": "gelu"} if "CLIP" in name else {}))
    ours = loaded(vit(**arguments), state_of(theirs))
    found = ours.forward_features(IMAGES)
    expected = theirs(IMAGES).last_hidden_state
    if "CLIP" in name:  # whose last norm is of the class token alone there
        found, expected = found[:, 0], theirs(IMAGES).pooler_output
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_of_transformers_classifiers_are_the_same(state_of: Callable[[Any], State]) -> None:
    theirs = hugging_face("ViTForImageClassification", labels=5)
    ours = loaded(vit(num_classes=5), state_of(theirs))
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_both_heads_of_a_distilled_model_are_taken(state_of: Callable[[Any], State]) -> None:
    theirs = hugging_face("DeiTForImageClassificationWithTeacher", labels=5)
    ours = vit(num_classes=5, kind=timm.models.deit.VisionTransformerDistilled)
    loaded(ours, state_of(theirs), ("head", "head_dist"))
    torch.testing.assert_close(ours(IMAGES), theirs(IMAGES).logits, rtol=1e-5, atol=1e-5)


def test_a_classifier_of_other_features_is_left_out(state_of: Callable[[Any], State]) -> None:
    """DINOv2's in transformers reads the class token and the mean patch."""
    theirs = hugging_face("Dinov2ForImageClassification", labels=5)
    state = state_of(theirs)
    with torch.device("meta"):
        found = fit(state, vit(init_values=1.0), ("head",), Path("a.pth"))
    assert set(found.left_out) == {"classifier.weight", "classifier.bias", "dinov2.embeddings.mask_token"}
    assert not found.problems


def as_sam(state: State) -> State:
    names = {name: name.replace("mlp.fc", "mlp.lin") for name in state}
    return {**begun("image_encoder.", {names[name]: t for name, t in state.items()}), "mask_decoder.a": torch.ones(1)}


def as_openai(state: State) -> State:
    """Of timm's names, those of OpenAI's CLIP: timm's own way back is the other function."""
    found = {}
    for name, tensor in state.items():
        for timms, openais in (
            ("patch_embed.proj", "conv1"),
            ("blocks.", "transformer.resblocks."),
            ("attn.qkv.", "attn.in_proj_"),
            ("attn.proj", "attn.out_proj"),
            ("norm_pre", "ln_pre"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(timms, openais)
        name = re.sub(r"norm(\d)", r"ln_\1", name)
        name = re.sub(r"^norm\.", "ln_post.", name)
        found[f"visual.{name}"] = tensor
    found["visual.class_embedding"] = found.pop("visual.cls_token")[0, 0]
    found["visual.positional_embedding"] = found.pop("visual.pos_embed")[0]
    return {**found, "logit_scale": torch.ones(())}


def as_dinov2(state: State) -> State:
    return {**state, "mask_token": torch.zeros(1, 32)}


def as_dinov2_with_registers(state: State) -> State:
    found = as_dinov2(state)
    found["register_tokens"] = found.pop("reg_token")
    found["pos_embed"] = torch.cat([torch.full((1, 1, 32), 0.25), state["pos_embed"]], 1)
    found["cls_token"] = state["cls_token"] - 0.25
    return found


OFFICIAL: dict[str, tuple[Callable[[State], State], dict[str, Any], set[str]]] = {
    "dinov2": (as_dinov2, {"init_values": 1.0}, {"mask_token"}),
    "registers": (
        as_dinov2_with_registers,
        {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True},
        {"mask_token"},
    ),
    "openai": (as_openai, {"pre_norm": True}, {"logit_scale"}),
}


@pytest.mark.parametrize("start", ["", "model.", "a.b."])
@pytest.mark.parametrize("name", OFFICIAL)
def test_what_timm_knows_of_other_code_is_used_whatever_the_names_begin_with(name: str, start: str) -> None:
    make, arguments, left = OFFICIAL[name]
    expected = random_weights(vit(**arguments)).state_dict()
    file = begun(start, make(dict(expected)))
    with torch.device("meta"):
        outline = vit(**arguments)
    found = fit(file, outline, ("head",), Path("a.pth"))
    assert found.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found.tensors[key], tensor)
    assert set(found.left_out) == {start + key for key in left}
    assert not found.problems


def test_segment_anything_is_read_as_timm_does() -> None:
    with torch.device("meta"):
        model = vision_transformer_sam.VisionTransformerSAM(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=0, global_attn_indexes=(0,)
        )
    expected = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    for start in ("", "model."):
        found = fit(begun(start, as_sam(expected)), model, ("head.fc",), Path("a.pth"))
        assert state_digest(found.tensors) == state_digest(expected)
        assert found.left_out == (f"{start}mask_decoder.a",)


def test_positions_that_a_filter_resizes_are_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    arguments = {"init_values": 1.0, "reg_tokens": 4, "no_embed_class": True}
    file = as_dinov2_with_registers(dict(random_weights(vit(**arguments)).state_dict()))
    model = loaded(vit(**arguments, img_size=48), file)
    assert model.state_dict()["pos_embed"].shape == (1, 36, 32)
    assert "pos_embed resized from [1, 17, 32] to [1, 36, 32] by timm" in caplog.text
    assert "its names are those of the original code" in caplog.text
    file["pos_embed"][0, 3, 5] = torch.nan
    with pytest.raises(InputError, match=r"a\.pth: pos_embed\[0, 3, 5\] is nan"):
        loaded(vit(**arguments, img_size=48), file)


def test_patches_of_another_size_are_not_resized_by_a_filter(tmp_path: Path, state: State) -> None:
    changed = {**state, "mask_token": torch.zeros(1, 64), "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}
    with pytest.raises(InputError, match=r"patch_embed\.proj\.weight is \[64, 3, 8, 8\], expected \[64, 3, 16, 16\]"):
        load_checkpoint(TINY, saved(tmp_path / "a.pth", changed))


def test_a_filter_that_adds_in_place_does_not_change_what_was_read() -> None:
    """NaFlexVit's adds the position of the class token to it."""
    model = timm.create_model("naflexvit_base_patch16_gap", embed_dim=32, depth=1, num_heads=2, class_token=True)
    own = vit(img_size=32, patch_size=16, depth=1)
    file = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in file.items()}
    fit(file, model, ("head",), Path("a.pth"))
    assert state_digest(file) == state_digest(before)


# ------------------------------------------------------------------------------------------------ what does not fit


def refused(path: Path, name: str = TINY) -> str:
    with pytest.raises(InputError) as caught:
        load_checkpoint(name, path)
    return str(caught.value)


def test_a_file_of_another_size_is_called_that_and_a_model_of_its_size_named(tmp_path: Path, state: State) -> None:
    other_size = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    said = refused(saved(tmp_path / "a.pth", other_size))
    assert "the file holds 12 blocks of width 192 on patches of 16 px, test_vit has 6 of width 64 on" not in said
    assert re.search(
        r"the file holds 12 blocks of width 192 on patches of 16 px, test_vit has \d+ blocks of width 64 on patches of "
        r"16 px; try --model\.name vit_tiny_patch16_224$",
        said,
    )


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda s: begun("x", s), "its names are such as xpatch_embed.proj.weight, "),
        (
            lambda s: {**s, "blocks.0.attn.qkv.lora_A.weight": s["norm.weight"]},
            "holds adapters of peft, and there is no",
        ),
        (
            lambda s: {
                name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in s.items()
            },
            "it fits with --model.arguments global_pool=avg",
        ),
        (lambda s: {name: t for name, t in s.items() if name != "norm.bias"}, "expected every weight of test_vit and"),
    ],
)
def test_the_advice_says_what_the_names_say(
    tmp_path: Path, state: State, change: Callable[[State], State], advice: str
) -> None:
    said = refused(saved(tmp_path / "a.pth", change(state)))
    assert advice in said
    assert "model name it was trained with" not in said


def test_no_model_is_named_that_does_not_take_the_file(tmp_path: Path) -> None:
    """BEiT has the sizes of a plain ViT, and other weights."""
    config = transformers.BeitConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768
    )
    beit = saved(tmp_path / "a.pth", transformers.BeitModel(config).state_dict())
    assert "test_vit has 6 blocks of width 64 on patches of 16 px" in refused(beit)
    assert "try" not in refused(beit)
    assert "the file has blocks.0.lambda_1" in refused(beit, "vit_tiny_patch16_224")
