"""LRP against the published code's numbers, conservation in every family, and what it refuses."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from engine.capture.families import CaptureError, token_layout, vision_module
from engine.relevance import METHODS, relevance_maps
from engine.relevance.methods.lrp import Propagation
from engine.relevance.targets import class_logits
from tests.relevance_cases import FAMILIES, adapted, family, inputs

FIXTURE = Path(__file__).parent / "data" / "relevance_micro.npz"


def propagate(
    model: nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
) -> tuple[Propagation, torch.Tensor]:
    propagation = Propagation(model, token_layout(vision_module(model), images.shape), len(images))
    with torch.enable_grad():
        logits = class_logits(model, images, targets, dtype, propagation.watching())
        propagation.backward(logits)
    return propagation, logits.detach()


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    with np.load(FIXTURE) as stored:
        return {key: stored[key] for key in stored.files}


@pytest.fixture(scope="module")
def micro(published: dict[str, np.ndarray]) -> nn.Module:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    weights = {key[2:]: torch.from_numpy(value) for key, value in published.items() if key.startswith("w.")}
    model.load_state_dict(weights)
    return model.eval()


def test_maps_equal_the_published_codes_in_float64(micro: nn.Module, published: dict[str, np.ndarray]) -> None:
    images, targets = torch.from_numpy(published["x"]), torch.from_numpy(published["cls"])
    maps = METHODS["lrp"].maps(micro.double(), images.double(), targets, None).detach().numpy()
    expected = published["ta0"].reshape(maps.shape)
    peak = expected.max(axis=(1, 2), keepdims=True)
    # 3.8e-7 of the peak: the published code adds its 1e-9 once more where a tensor is used twice.
    assert np.abs((maps - expected) / peak).max() < 1e-5


def test_every_layers_gradient_and_relevance_equal_the_published_codes(
    micro: nn.Module, published: dict[str, np.ndarray]
) -> None:
    images, targets = torch.from_numpy(published["x"]), torch.from_numpy(published["cls"])
    propagation, _ = propagate(micro, images, targets, torch.float64)
    expected = (published["dA"] * published["RA"]).clip(min=0).mean(axis=2)  # [image, layer, query, key]
    for layer, (_, rule) in enumerate(propagation.attention):
        assert rule.weighted is not None
        worst = np.abs(rule.weighted.numpy() - expected[:, layer]).max()
        assert worst < 1e-5 * expected[:, layer].max()


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_conserved_down_the_stream(name: str) -> None:
    model = family(name)
    images, targets = inputs()
    propagation, logits = propagate(model, images, targets, torch.float64)
    assert len(propagation.passes.stream) == 3, "one sum a block"
    pooled = name == "attention_pool"
    for _, found, _ in propagation.passes.stream:
        # A pooling query is a constant and takes its quarter along: a constant factor of the map.
        torch.testing.assert_close(found, torch.full_like(found, 0.75 if pooled else 1.0), atol=1e-6, rtol=0)
    with torch.no_grad():
        plain = model.double()(images.double()).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logits, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["rollout", "generic", "lrp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_equals_single_images_in_every_family(name: str, method: str) -> None:
    model = family(name)
    images, targets = inputs(2)
    batch = relevance_maps(model, images, targets, method, dtype=torch.float64)
    single = relevance_maps(model, images, targets, method, dtype=torch.float64, batch_size=1)
    assert batch.shape == (2, 4, 4)
    assert float(batch.abs().max()) > 0
    torch.testing.assert_close(batch, single, atol=1e-6 * float(batch.abs().max()), rtol=0)


def test_conservation_does_not_hang_on_float64() -> None:
    propagation, _ = propagate(family("plain"), *inputs(), torch.float32)
    for _, found, _ in propagation.passes.stream:
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-3, rtol=0)


def test_merging_adapters_in_place_or_for_good_gives_one_map() -> None:
    images, targets = inputs()
    adapted_model: Any = adapted("lora")
    adapted_model.merge_adapter()
    in_place = relevance_maps(adapted_model, images, targets, "lrp")
    for_good = relevance_maps(adapted_model.merge_and_unload(), images, targets, "lrp")
    torch.testing.assert_close(in_place, for_good)


def test_the_readout_follows_the_model() -> None:
    """Class and distillation tokens' rows under a distilled head, all patches' under average pooling."""
    images, targets = inputs()
    for name, expected in (("distilled", [0, 1]), ("plain", [0]), ("average_pool", list(range(16)))):
        propagation, _ = propagate(family(name), images, targets, torch.float64)
        gradient = propagation.attention[-1][1].output_gradient
        assert gradient is not None
        assert (gradient != 0).any(dim=3).any(dim=1).any(dim=0).nonzero()[:, 0].tolist() == expected


def test_the_model_is_left_as_it_was() -> None:
    model = family("plain").train()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].attn.fused_attn = False
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    relevance_maps(model, *inputs(), "lrp")
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.training
    assert model.blocks[1].attn.fused_attn is False
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_outlives_its_batch() -> None:
    gc.collect()
    gc.disable()
    try:
        propagation, logits = propagate(family("plain"), *inputs(), torch.float32)
        alive = [weakref.ref(rule) for _, rule in propagation.attention]
        del propagation, logits
        assert not any(reference() is not None for reference in alive), "a cycle keeps the batch's graph in memory"
    finally:
        gc.enable()


class Surgery(nn.Module):
    """Does something between two blocks."""

    def __init__(self, block: nn.Module, operation: Any) -> None:
        super().__init__()
        self.block, self.operation = block, operation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.operation(self.block(x))
        return result


def changed_in_place(x: torch.Tensor) -> torch.Tensor:
    x.mul_(2.0)
    return x


def without_gradients(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x * 2


OPERATIONS = {
    "torch.cumsum": lambda x: torch.cumsum(x, dim=1),
    "torch.Tensor.detach": lambda x: x.detach(),
    "torch.Tensor.data": lambda x: x.data,
    "torch.nn.functional.softmax": lambda x: F.softmax(x, dim=-1),
    "torch.matmul": lambda x: torch.matmul(x, x.transpose(1, 2)) @ x,
    "torch.Tensor.sub": lambda x: x - x.roll(1, 0),
    "torch.Tensor.__rtruediv__": lambda x: 1 / x,
    "torch.Tensor.add": lambda x: x + x[:, :1],
    "torch.where": lambda x: torch.where(x > 0, x, 0.0),
    "torch.Tensor.clamp": lambda x: x.clamp(min=0),
    "changed in place": changed_in_place,
    "gradients are switched off": without_gradients,
    "torch.nn.functional.conv1d": lambda x: F.conv1d(x, torch.ones(17, 17, 1).to(x)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_without_a_rule_raises_by_name(operation: str) -> None:
    model = family("plain")
    model.blocks[1] = Surgery(model.blocks[1], OPERATIONS[operation])
    images, targets = inputs()
    with pytest.raises(CaptureError, match=operation.replace(".", r"\.")) as raised:
        relevance_maps(model, images, targets, "lrp")
    assert "blocks.1 (Surgery)" in str(raised.value) or operation == "changed in place"
    assert not any(module._forward_hooks for module in model.modules()), "hooks are removed after an error, too"


@pytest.mark.parametrize(
    "operation",
    [lambda x: x * 2 + 1, lambda x: x.clone().mul_(2).add_(1), lambda x: F.silu(x.flip(0).flip(0), inplace=False)],
)
def test_operations_with_a_rule_conserve_relevance(operation: Any) -> None:
    model = family("plain")
    model.blocks[1] = Surgery(model.blocks[1], operation)
    propagation, _ = propagate(model, *inputs(), torch.float64)
    for _, found, _ in propagation.passes.stream:
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-6, rtol=0)


def test_relevance_that_leaks_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.relevance import rules

    monkeypatch.setattr(rules.Rule, "redistribute", lambda rule, upstream, passes: (0.9 * upstream,))
    with pytest.raises(CaptureError, match=r"of a relevance of 1, 0\.1.* is lost or made above blocks\.2"):
        relevance_maps(family("plain"), *inputs(), "lrp")


def test_what_a_method_cannot_do_is_refused_by_name() -> None:
    images, targets = inputs()
    with pytest.raises(CaptureError, match="lrp needs adapters merged"):
        relevance_maps(adapted("dora"), images, targets, "lrp")
    checkpointing = family("plain")
    checkpointing.set_grad_checkpointing(True)
    with pytest.raises(CaptureError, match="recomputed activations"):
        relevance_maps(checkpointing, images, targets, "lrp")
    with pytest.raises(CaptureError, match="Grad-CAM needs the norm before"):
        relevance_maps(family("parallel"), images, targets, "gradcam")
    class_attention = timm.create_model("cait_xxs24_224", depth=1, img_size=32, num_classes=5).eval()
    windows = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(3, 6)).eval()
    for model, size in ((class_attention, 32), (windows, 56)):
        picture = torch.randn(1, 3, size, size)
        for method in ("rollout", "generic", "lrp"):
            with pytest.raises(CaptureError, match=r"is not defined|no attention call|cannot follow"):
                relevance_maps(model, picture, [0], method)


def test_float32_is_possible_and_close_where_the_model_is_well_conditioned() -> None:
    model = family("plain")
    single = relevance_maps(model, *inputs(), "lrp", dtype=torch.float32).flatten(1)
    double, stability = relevance_maps(model, *inputs(), "lrp", return_stability=True)
    for a, b in zip(single, double.flatten(1), strict=True):
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.9
    assert stability.shape == (3,)
    assert float(stability.min()) > 0.9


def torchvision_model() -> nn.Module:
    from torchvision.models import VisionTransformer as TorchvisionTransformer

    return TorchvisionTransformer(32, 8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5)


def hugging_face_model() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    model: nn.Module = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **sizes))
    return model


@pytest.mark.parametrize("make", [torchvision_model, hugging_face_model])
def test_other_libraries_models_have_maps_and_conserve_relevance(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    images, targets = inputs(2)
    propagation, _ = propagate(model, images, targets, torch.float64)
    assert len(propagation.passes.stream) == 2
    for _, found, _ in propagation.passes.stream:
        torch.testing.assert_close(found, torch.ones_like(found), atol=1e-6, rtol=0)
    for method in METHODS:
        maps = relevance_maps(model, images, targets, method)
        assert maps.shape == (2, 4, 4)
        assert float(maps.max()) > 0
