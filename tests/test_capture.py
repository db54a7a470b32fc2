"""AttentionTap against timm's own unfused maps, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from timm.utils import AttentionExtract

from engine.capture import AttentionSite, AttentionTap, CaptureError, capture_attention
from engine.interception import ModelInterception
from kernels import TokenLayout


def random_model(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


def images_for(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    height, width = model.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def unfused_maps(model: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Post-softmax maps by timm's own extractor, which needs fused attention off."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with torch.inference_mode():
        return list(AttentionExtract(model, method="hook")(images).values())


FAMILIES = [
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}, (4, 4, 1)),
    ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "depth": 2}, (5, 5, 5)),
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, (4, 4, 2)),
    ("eva02_tiny_patch14_224", {"img_size": 56, "depth": 2}, (4, 4, 1)),
    ("vit_tiny_patch16_224", {"img_size": (32, 96), "depth": 1}, (2, 6, 1)),
]


@pytest.mark.parametrize(("name", "options", "layout"), FAMILIES, ids=lambda value: str(value))
def test_maps_equal_the_unfused_models(name: str, options: dict[str, object], layout: tuple[int, int, int]) -> None:
    model = random_model(name, **options)
    images = images_for(model)
    sites: list[AttentionSite] = []
    with torch.inference_mode(), AttentionTap(model, lambda site, *call: sites.append(site)):
        model(images)
    maps = capture_attention(model, images)
    assert [site.name for site in sites] == list(maps) == [f"blocks.{i}.attn" for i in range(len(maps))]
    assert [site.layer for site in sites] == list(range(len(maps)))
    grid = sites[0].layout
    assert (grid.grid_rows, grid.grid_cols, grid.num_prefix_tokens) == layout
    expected = unfused_maps(model, images)
    assert len(expected) == len(maps)
    for captured, unfused in zip(maps.values(), expected, strict=True):
        assert captured.dtype == torch.float32
        torch.testing.assert_close(captured, unfused, atol=1e-6, rtol=0)


def test_the_model_is_left_as_it_was() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2).train()
    model.blocks[1].attn.fused_attn = False
    images = images_for(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    maps = capture_attention(model, images)
    assert len(maps) == 2, "the block whose fused attention is off is seen all the same"
    assert model.training
    assert model.blocks[0].attn.fused_attn is True
    assert model.blocks[1].attn.fused_attn is False
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_output_is_the_plain_forwards_output() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2)
    images = images_for(model)
    with torch.inference_mode():
        plain = model(images)
        with AttentionTap(model, lambda *call: None):
            tapped = model(images)
    assert torch.equal(plain, tapped)


def test_layers_are_chosen_in_depth_order() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=3)
    maps = capture_attention(model, images_for(model), layers=[2, 0])
    assert list(maps) == ["blocks.0.attn", "blocks.2.attn"]
    with pytest.raises(CaptureError, match="no layer 7; its measurable layers are 0 to 2"):
        capture_attention(model, images_for(model), layers=[7])


def test_gradients_flow_with_trainable_parameters_under_no_grad() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)
    assert any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert len(capture_attention(model, images_for(model))) == 1


def test_windowed_attention_is_refused_by_name_and_reason() -> None:
    model = random_model("swin_tiny_patch4_window7_224")
    with pytest.raises(CaptureError, match=r"no attention of SwinTransformer can be captured.*49×49 tokens"):
        capture_attention(model, images_for(model, 1))


def test_attention_pooling_is_skipped_and_listed_or_raises() -> None:
    model = random_model("vit_base_patch16_siglip_224", img_size=64, depth=1)
    tap = AttentionTap(model, lambda *call: None)
    with torch.inference_mode(), tap:
        model(images_for(model))
    assert list(tap.sites) == ["blocks.0.attn"]
    assert [name for name, _ in tap.skipped] == ["attn_pool"]
    assert "1×16 tokens" in tap.skipped[0][1]
    with (
        pytest.raises(CaptureError, match="attn_pool cannot be measured"),
        torch.inference_mode(),
        AttentionTap(model, lambda *call: None, on_unmeasurable="raise"),
    ):
        model(images_for(model))


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(CaptureError, match="has no patch_embed"):
        capture_attention(timm.create_model("resnet18", num_classes=2), torch.zeros(1, 3, 64, 64))


def test_a_compiled_model_is_refused_with_the_way_out() -> None:
    model = torch.compile(random_model("vit_tiny_patch16_224", img_size=64, depth=1))
    with pytest.raises(TypeError, match="_orig_mod"):
        ModelInterception(model, {})


def test_an_exception_in_the_forward_leaves_nothing_behind() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)

    def fail(*call: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), torch.inference_mode(), AttentionTap(model, fail):
        model(images_for(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(capture_attention(model, images_for(model))) == 1


def test_a_bias_reaches_the_map() -> None:
    model = random_model("beit_base_patch16_224", img_size=64, depth=1)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.relative_position_bias_table, std=1.0)
    images = images_for(model)
    maps = capture_attention(model, images)
    (expected,) = unfused_maps(model, images)
    torch.testing.assert_close(maps["blocks.0.attn"], expected, atol=1e-6, rtol=0)
    np.testing.assert_allclose(maps["blocks.0.attn"].sum(-1), 1.0, atol=1e-5)


def test_layouts_are_plain_numbers() -> None:
    layout = TokenLayout(grid_rows=2, grid_cols=3, num_prefix_tokens=1, patch_height_px=4, patch_width_px=4)
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    assert layout.num_tokens == 7
    assert layout.num_edges == 7
    with pytest.raises(ValueError, match="grid_rows is 0"):
        TokenLayout(grid_rows=0, grid_cols=3, num_prefix_tokens=1, patch_height_px=4, patch_width_px=4)
