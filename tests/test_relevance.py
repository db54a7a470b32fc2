"""Relevance maps against the published code's maps on seeded weights, and against closed cases."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from engine.relevance import METHODS, relevance_maps
from engine.relevance.choice import choose_targets
from engine.relevance.targets import class_logits
from train.errors import InputError

FIXTURE = Path(__file__).parent / "data" / "relevance_micro.npz"


@pytest.fixture(scope="module")
def micro() -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    with np.load(FIXTURE) as stored:
        arrays = {key: stored[key] for key in stored.files}
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    model.load_state_dict({key[2:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("w.")})
    return model.double().eval(), arrays


@pytest.mark.parametrize(("method", "key"), [("generic", "gen0"), ("rollout", "roll")])
def test_maps_equal_the_published_codes_in_float64(micro, method: str, key: str) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    with torch.enable_grad():
        maps = METHODS[method].maps(
            model, torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["cls"]), None
        )
    expected = arrays[key].reshape(maps.shape)
    np.testing.assert_allclose(maps.numpy(), expected, atol=1e-12 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_equals_single_images(micro, method: str) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    images, targets = torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["cls"])
    batch = relevance_maps(model, images, targets, method)
    single = torch.cat([relevance_maps(model, images[i : i + 1], targets[i : i + 1], method) for i in range(3)])
    assert batch.shape == (3, 4, 4)
    torch.testing.assert_close(batch, single, atol=1e-6 * float(batch.abs().max()), rtol=0)


def test_a_method_may_take_the_gradient_of_the_images(micro) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    images, targets = torch.from_numpy(arrays["x"]).requires_grad_(), torch.from_numpy(arrays["cls"])
    for dtype in (None, torch.float32):
        logits = class_logits(model, images.double() if dtype is None else images, targets, dtype)
        (gradient,) = torch.autograd.grad(logits.sum(), [images])
        assert gradient.shape == images.shape
        assert bool((gradient.flatten(1).abs().amax(dim=1) > 0).all())


def test_gradcam_follows_its_formula(micro) -> None:  # type: ignore[no-untyped-def]
    """Against a plain autograd computation that keeps the whole graph and uses no hook."""
    model, arrays = micro
    images, targets = torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["cls"])
    x = model.patch_embed(images)
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    for block in model.blocks[:-1]:
        x = block(x)
    last = model.blocks[-1]
    tokens = last.norm1(x).detach().requires_grad_()
    x = x + last.attn(tokens)
    x = x + last.mlp(last.norm2(x))
    logits = model.forward_head(model.norm(x))
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), [tokens])
    expected = (gradient[:, 1:].mean(1, keepdim=True) * tokens[:, 1:]).sum(-1).relu().reshape(3, 4, 4)
    maps = relevance_maps(model, images, targets, "gradcam")
    torch.testing.assert_close(maps, expected.float(), atol=1e-7, rtol=1e-5)
    assert float(maps.max()) > 0


def test_gradcam_equals_the_grad_cam_package(micro) -> None:  # type: ignore[no-untyped-def]
    """Before resizing: the package's own up-sampling and scaling of each map to 0..1 come after."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, arrays = micro
    images, targets = torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["cls"])
    single = copy.deepcopy(model).float()

    def grid(tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, single.num_prefix_tokens :].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)

    with GradCAM(single, [single.blocks[-1].norm1], reshape_transform=grid) as cam:
        cam(images, [ClassifierOutputTarget(int(target)) for target in targets])
        activations, gradients = (
            kept[0].numpy() for kept in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
        )
        expected = cam.get_cam_image(images, single.blocks[-1].norm1, None, activations, gradients, False).clip(min=0)
    maps = relevance_maps(single, images, targets, "gradcam").numpy()
    for ours, theirs in zip(maps, expected, strict=True):
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] >= 0.9999


def test_weights_and_flags_are_left_alone_and_frozen_models_work(micro) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    images, targets = torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["cls"])
    free = {method: relevance_maps(model, images, targets, method) for method in METHODS}
    model.requires_grad_(False)
    try:
        for method in METHODS:
            torch.testing.assert_close(relevance_maps(model, images, targets, method), free[method])
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.requires_grad_(True)


def test_the_target_class_matters_where_it_should(micro) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    images = torch.from_numpy(arrays["x"]).double()
    one, other = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    for method in ("gradcam", "generic"):
        assert not torch.allclose(
            relevance_maps(model, images, one, method), relevance_maps(model, images, other, method)
        )


def test_stability_is_a_correlation_near_one_for_these_rules(micro) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    images, targets = torch.from_numpy(arrays["x"]).double(), torch.from_numpy(arrays["cls"])
    for method in ("gradcam", "rollout", "generic"):
        maps, stability = relevance_maps(model, images, targets, method, return_stability=True)
        torch.testing.assert_close(maps, relevance_maps(model, images, targets, method))
        assert stability.shape == (3,)
        assert float(stability.min()) > 0.9999


def test_bad_requests_are_one_sentence(micro) -> None:  # type: ignore[no-untyped-def]
    model, arrays = micro
    images = torch.from_numpy(arrays["x"]).double()
    with pytest.raises(InputError, match="relevance method is 'saliency'; expected one of"):
        relevance_maps(model, images, [0, 0, 0], "saliency")
    with pytest.raises(InputError, match="expected one class index per image"):
        relevance_maps(model, images, [0, 0], "generic")
    with pytest.raises(InputError, match="batch_size is 0"):
        relevance_maps(model, images, [0, 0, 0], "generic", batch_size=0)
    with pytest.raises(InputError, match="the model has 5 classes"):
        relevance_maps(model, images, [0, 9, 0], "generic")


def test_the_other_class_is_never_the_true_one() -> None:
    labels = np.arange(1000) % 7
    other = choose_targets(labels, 7, seed=3)
    assert (other != labels).all()
    assert set(other) == set(range(7))
    assert (choose_targets(labels, 7, seed=3) == other).all()
