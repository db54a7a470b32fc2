"""AttentionTap: the model stays as it was; layers, several taps, exceptions, train mode, autocast. One ViT for all."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

from engine.capture import AttentionSite, AttentionTap, CaptureError, attention_map, capture_attention
from kernels import TokenLayout


def random_model(name: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).eval()


def images_for(model: torch.nn.Module, count: int = 2) -> torch.Tensor:
    height, width = model.patch_embed.img_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


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


def test_gradients_reach_the_projection_and_under_no_grad_there_are_none() -> None:
    """Of a map's entropy: those of the map that query and key make by hand."""
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)
    images = images_for(model)
    weight = model.blocks[0].attn.qkv.weight
    maps: list[torch.Tensor] = []

    def keep(site: AttentionSite, *call: Any) -> None:
        maps.append(attention_map(*call))

    with AttentionTap(model, keep):
        model(images)
        with torch.no_grad():
            model(images)
    attention, without = maps
    assert attention.requires_grad
    assert not without.requires_grad
    torch.testing.assert_close(without, attention.detach())

    tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    block = model.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, 3, 64)).permute(2, 0, 3, 1, 4)
    by_hand = (q @ k.mT * 64**-0.5).softmax(-1)
    expected, found = (torch.autograd.grad(-(m * m.log()).sum(-1).mean(), weight)[0] for m in (by_hand, attention))
    assert found.abs().max() > 0
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    assert torch.equal(found[128 * 3 :], torch.zeros_like(found[128 * 3 :])), "a map does not depend on the values"


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(CaptureError, match="ResNet has no known patch embedding"):
        capture_attention(timm.create_model("resnet18", num_classes=2), torch.zeros(1, 3, 64, 64))


def test_an_exception_in_the_forward_leaves_nothing_behind() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)

    def fail(*call: object) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), torch.inference_mode(), AttentionTap(model, fail):
        model(images_for(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(capture_attention(model, images_for(model))) == 1


def test_layouts_are_plain_numbers() -> None:
    layout = TokenLayout(grid_rows=2, grid_cols=3, num_prefix_tokens=1, patch_height_px=4, patch_width_px=4)
    assert TokenLayout.from_dict(layout.to_dict()) == layout
    assert layout.num_tokens == 7
    assert layout.num_edges == 7
    with pytest.raises(ValueError, match="grid_rows is 0"):
        TokenLayout(grid_rows=0, grid_cols=3, num_prefix_tokens=1, patch_height_px=4, patch_width_px=4)


def test_a_forward_pass_by_parts_is_seen() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2)
    sites: list[str] = []
    with torch.inference_mode(), AttentionTap(model, lambda site, *call: sites.append(site.name)) as tap:
        model.forward_features(images_for(model))
        model.forward_features(images_for(model))
    assert sites == 2 * ["blocks.0.attn", "blocks.1.attn"]
    assert list(tap.sites) == ["blocks.0.attn", "blocks.1.attn"]


def test_a_context_in_which_the_model_never_ran_is_an_error() -> None:
    model, other = (random_model("vit_tiny_patch16_224", img_size=64, depth=1) for _ in range(2))
    with pytest.raises(CaptureError, match="no forward pass of it ran"), AttentionTap(model, lambda *call: None):
        other(images_for(other))


def test_each_of_two_taps_sees_its_own_model_alone() -> None:
    one = random_model("vit_tiny_patch16_224", img_size=64, depth=2)
    two = random_model("vit_tiny_patch16_224", img_size=32, depth=1)
    seen: list[tuple[str, str, int]] = []

    def keep(which: str) -> Callable[..., None]:
        return lambda site, query, *call: seen.append((which, site.name, query.shape[2]))

    with torch.inference_mode(), AttentionTap(one, keep("one")), AttentionTap(two, keep("two")):
        one(images_for(one))
        two(images_for(two))
    assert seen == [("one", "blocks.0.attn", 17), ("one", "blocks.1.attn", 17), ("two", "blocks.0.attn", 5)]


def test_two_taps_on_one_model_see_the_same_calls() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2)
    model.blocks[0].attn.fused_attn = False
    outer: list[torch.Tensor] = []
    inner: list[torch.Tensor] = []
    with torch.inference_mode(), AttentionTap(model, lambda site, query, *call: outer.append(query)):
        with AttentionTap(model, lambda site, query, *call: inner.append(query)):
            model(images_for(model))
        assert model.blocks[0].attn.fused_attn is True, "the outer tap still needs it"
        model(images_for(model))
    assert model.blocks[0].attn.fused_attn is False
    assert len(inner) == 2
    assert len(outer) == 4
    assert all(torch.equal(a, b) for a, b in zip(inner, outer, strict=False))


def test_a_tap_is_not_entered_twice_at_once() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)
    tap = AttentionTap(model, lambda *call: None)
    with torch.inference_mode():
        with tap:
            model(images_for(model))
            with pytest.raises(RuntimeError, match="open already"), tap:
                pass
            model(images_for(model))
        with tap:  # one after the other is fine
            model(images_for(model))


def test_a_model_that_calls_another_inside_its_forward_has_its_own_sites_alone() -> None:
    teacher = random_model("vit_tiny_patch16_224", img_size=64, depth=1)

    class Student(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = random_model("vit_tiny_patch16_224", img_size=64, depth=2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.backbone(images) - self.backbone(images).detach()

    student = Student()
    sites: list[str] = []
    with torch.inference_mode(), AttentionTap(student, lambda site, *call: sites.append(site.name)):
        student(images_for(teacher))
        teacher(images_for(teacher))
    assert sites == 2 * ["backbone.blocks.0.attn", "backbone.blocks.1.attn"]


def test_another_thread_is_not_seen() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)
    images = images_for(model)
    sites: list[str] = []
    with torch.no_grad(), AttentionTap(model, lambda site, *call: sites.append(site.name)):
        model(images)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(model, images).result()
        model(images)
    assert sites == 2 * ["blocks.0.attn"]


def test_train_mode_hands_over_maps_before_dropout_with_their_graph() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2, attn_drop_rate=0.5, drop_path_rate=0.5)
    images = images_for(model)
    expected = capture_attention(model, images)["blocks.0.attn"]
    model.train()
    entropies: list[torch.Tensor] = []

    def keep(site: AttentionSite, *call: Any) -> None:
        attention = attention_map(*call)
        if site.layer == 0:
            torch.testing.assert_close(attention, expected, atol=1e-6, rtol=0)
        entropies.append(-(attention * attention.log()).sum(-1).mean())

    with AttentionTap(model, keep):
        model(images)
    assert model.training
    sum(entropies).backward()  # type: ignore[union-attr]
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_dropped_patches_are_listed_not_measured() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1, patch_drop_rate=0.5).train()
    with (
        pytest.raises(CaptureError, match="its map is 9×9 tokens, expected 17×17"),
        AttentionTap(model, lambda *call: None),
    ):
        model(images_for(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_gradient_checkpointing_recomputes_is_not_handed_over_again(reentrant: bool) -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2).train()
    images = images_for(model)
    plain = torch.autograd.grad(model(images).sum(), model.blocks[0].attn.qkv.weight)[0]
    model.blocks = Checkpointed(*model.blocks, reentrant=reentrant)
    sites: list[str] = []
    with AttentionTap(model, lambda site, *call: sites.append(site.name)) as tap:
        model(images.requires_grad_()).sum().backward()
    assert sites == ["blocks.0.attn", "blocks.1.attn"] == list(tap.sites)
    torch.testing.assert_close(model.blocks[0].attn.qkv.weight.grad, plain)


class Checkpointed(torch.nn.Sequential):
    """Blocks of which each is recomputed in the backward pass."""

    def __init__(self, *blocks: torch.nn.Module, reentrant: bool) -> None:
        super().__init__(*blocks)
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for block in self:
            tokens = checkpoint(block, tokens, use_reentrant=self.reentrant)
        return tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_under_autocast_q_and_k_are_what_the_kernel_computes_with(name: str, dtype: torch.dtype) -> None:
    model = random_model(name, img_size=56 if "14" in name else 64, depth=2)
    images = images_for(model)
    plain: list[torch.Tensor] = []
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def keep(site: AttentionSite, query: torch.Tensor, key: torch.Tensor, *call: Any) -> None:
        seen.append((query.dtype, key.dtype))
        plain.append(attention_map(query, key, *call))

    with torch.inference_mode(), AttentionTap(model, keep):
        with torch.autocast("cpu", dtype):
            model(images)
        model(images)
    half, single = plain[:2], plain[2:]
    assert seen == 2 * [(dtype, dtype)] + 2 * [(torch.float32, torch.float32)]
    for mixed, exact in zip(half, single, strict=True):
        torch.testing.assert_close(mixed, exact, atol=2e-2, rtol=0)


def test_a_model_in_half_precision_hands_over_its_own_type() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1).bfloat16()
    (attention,) = capture_attention(model, images_for(model).bfloat16()).values()
    assert attention.dtype == torch.float32
    torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))


@pytest.mark.parametrize("heads", [[0, 2], [1, 2], [2]])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_heads_are_chosen_with_their_bias(name: str, heads: list[int]) -> None:
    model = random_model(name, img_size=64, depth=2, embed_dim=96, num_heads=3)
    for module in model.modules():
        if hasattr(module, "relative_position_bias_table"):
            torch.nn.init.normal_(module.relative_position_bias_table)
    images = images_for(model)
    sites: list[AttentionSite] = []
    with torch.inference_mode(), AttentionTap(model, lambda site, *call: sites.append(site), heads=heads):
        model(images)
    assert [(site.heads, site.head_ids) for site in sites] == 2 * [(len(heads), tuple(heads))]
    every, chosen = capture_attention(model, images), capture_attention(model, images, heads=heads)
    for site in every:
        torch.testing.assert_close(chosen[site], every[site][:, heads])


def test_a_head_that_is_not_there_is_named() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=1)
    with pytest.raises(CaptureError, match=r"blocks\.0\.attn has no head 3; its heads are 0 to 2"):
        capture_attention(model, images_for(model), heads=[0, 3])


def test_a_prepared_tap_hands_each_forward_pass_to_whom_it_is_told() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2)
    images = images_for(model)
    first: list[str] = []
    second: list[str] = []
    plain = capture_attention(model, images)
    tap = AttentionTap(model, lambda site, *call: first.append(site.name))
    with torch.inference_mode(), tap.prepared():
        with tap:
            model(images)
        model(images)  # nobody looks
        tap.on_attention = lambda site, *call: second.append(site.name)
        with tap:
            model(images)
        assert not any(module._forward_hooks for module in model.modules()), "nothing is noted after the first"
    assert first == second == list(plain)


def test_a_module_whose_forward_raised_is_not_running() -> None:
    model = random_model("vit_tiny_patch16_224", img_size=64, depth=2)
    names: list[str] = []
    with torch.inference_mode(), AttentionTap(model, lambda site, *call: names.append(site.name)):
        with pytest.raises(RuntimeError):
            model.blocks[0](torch.zeros(1))
        torch.nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 1, 17, 8))  # nobody's
        model(images_for(model))
    assert names == ["blocks.0.attn", "blocks.1.attn"]
