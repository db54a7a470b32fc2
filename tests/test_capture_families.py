"""Every family: captured maps against the model's own, computed without the fused call; layouts; what is refused."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from timm.utils import AttentionExtract

from engine.capture import AttentionSite, AttentionTap, CaptureError, attention_weights, capture_attention
from tests.families import MEASURED, REFUSED, Family, images, naflex_patches


def identify(family: Family) -> str:
    return f"{family.library} {family.name}"


def run(model: torch.nn.Module, inputs: Any) -> Any:
    with torch.inference_mode():
        return model(inputs)


def own_maps(family: Family, model: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Post-softmax maps of the measurable sites by the library's own means, which need the fused call off."""
    if family.library == "Hugging Face":
        model.set_attn_implementation("eager")
        return list(model(inputs, output_attentions=True).attentions)
    if family.library == "torchvision":
        return weights_of_multihead_attention(model, inputs)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    maps = AttentionExtract(model, method="hook")(inputs if isinstance(inputs, torch.Tensor) else _PatchBatch(inputs))
    return [maps[f"{name}.attn_drop"] for name in family.measured]


class _PatchBatch(dict):  # type: ignore[type-arg]
    """NaFlexViT's input with the device that AttentionExtract asks of it."""

    device = torch.device("cpu")


def weights_of_multihead_attention(model: torch.nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    """What `nn.MultiheadAttention` returns as weights when asked for them, head by head."""
    maps: list[torch.Tensor] = []

    def ask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    for module in model.modules():
        if isinstance(module, torch.nn.MultiheadAttention):
            module.register_forward_pre_hook(ask, with_kwargs=True)
            module.register_forward_hook(lambda module, args, output: maps.append(output[1]))
    model(inputs)
    return maps


@pytest.mark.parametrize("family", MEASURED, ids=identify)
def test_maps_equal_the_unfused_models_layer_by_layer(family: Family) -> None:
    if family.library == "Hugging Face":
        importlib.import_module("transformers")
    model, inputs = family.build(), family.inputs()
    sites: list[AttentionSite] = []
    tap = AttentionTap(model, lambda site, *call: sites.append(site))
    plain = run(model, inputs)
    with tap:
        tapped = run(model, inputs)
    maps = capture_attention(model, inputs)

    if family.library == "Hugging Face":
        assert [re.findall(r"\d+", name) for name in maps] == [[number] for number in family.measured]
    else:
        assert tuple(maps) == family.measured
    assert [site.name for site in sites] == list(maps)
    assert [site.layer for site in sites] == list(range(len(maps)))
    assert tuple(name for name, _ in tap.skipped) == family.skipped
    assert {name.partition("#")[0] for name in maps} <= attention_weights(model, 100).keys()
    for site in sites:
        found = site.layout
        assert (
            found.grid_rows,
            found.grid_cols,
            found.num_prefix_tokens,
            found.patch_height_px,
            found.patch_width_px,
            found.class_token,
        ) == family.layout

    if family.library == "Hugging Face":
        plain, tapped = plain.last_hidden_state, tapped.last_hidden_state
    if family.library == "torchvision":  # its native fast path stands aside for the Python one
        torch.testing.assert_close(plain, tapped, atol=1e-4, rtol=1e-4)
    else:
        assert torch.equal(plain, tapped)

    with torch.no_grad():
        expected = own_maps(family, model, inputs)
    assert len(expected) == len(maps)
    for captured, unfused in zip(maps.values(), expected, strict=True):
        assert captured.max() > 3 / captured.shape[-1], "a map near uniform would agree with any other"
        assert captured.dtype == torch.float32
        torch.testing.assert_close(captured, unfused.reshape(captured.shape), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", REFUSED, ids=identify)
def test_what_has_no_global_map_is_refused_with_its_name_and_reason(family: Family) -> None:
    model = family.build()
    with pytest.raises(CaptureError, match=rf"{type(model).__name__}.*{family.refused}|{family.refused}"):
        capture_attention(model, family.inputs())


@pytest.mark.parametrize(
    ("skipped", "reason"),
    [("SigLIP", "attention pooling or class attention"), ("SAM (bias)", "windowed")],
)
def test_what_is_skipped_raises_when_asked_to(skipped: str, reason: str) -> None:
    family = next(family for family in MEASURED if family.name == skipped)
    model = family.build()
    with (
        pytest.raises(CaptureError, match=f"{family.skipped[0]} cannot be measured: .*{reason}"),
        AttentionTap(model, lambda *call: None, on_unmeasurable="raise"),
    ):
        run(model, family.inputs())


def test_a_grid_follows_the_size_of_each_batch() -> None:
    family = next(family for family in MEASURED if family.name == "ViT, any image size")
    model = family.build()
    grids: list[tuple[int, int, int]] = []
    with AttentionTap(model, lambda site, *call: grids.append((site.layer, *_grid(site)))):
        run(model, images(64, 64))
        run(model, images(32, 96))
    assert grids == [(0, 4, 4), (1, 4, 4), (0, 2, 6), (1, 2, 6)]


def _grid(site: AttentionSite) -> tuple[int, int]:
    return site.layout.grid_rows, site.layout.grid_cols


def test_a_padded_naflex_batch_is_refused() -> None:
    family = next(family for family in MEASURED if family.name == "NaFlexViT, patches")
    inputs = naflex_patches()
    inputs["patch_valid"] = inputs["patch_valid"].clone()
    inputs["patch_valid"][1, -1] = False
    with pytest.raises(CaptureError, match="padded to the largest; batch them by grid"):
        capture_attention(family.build(), inputs)


def test_naflex_patches_out_of_order_are_refused() -> None:
    family = next(family for family in MEASURED if family.name == "NaFlexViT, patches")
    inputs = naflex_patches()
    inputs["patch_coord"] = inputs["patch_coord"].flip(1)
    with pytest.raises(CaptureError, match="not one grid in row-major order"):
        capture_attention(family.build(), inputs)


def test_eager_hugging_face_models_are_seen_and_left_eager() -> None:
    importlib.import_module("transformers")
    family = next(f for f in MEASURED if f.library == "Hugging Face" and f.name == "ViT")
    model, inputs = family.build(), family.inputs()
    model.set_attn_implementation("eager")
    expected = model(inputs, output_attentions=True).attentions
    maps = capture_attention(model, inputs)
    assert model.config._attn_implementation == "eager"
    assert model(inputs, output_attentions=True).attentions is not None
    for captured, eager in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(captured, eager, atol=1e-4, rtol=0)
