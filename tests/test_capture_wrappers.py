"""Models in wrappers: peft adapters, torch.compile, DataParallel and DistributedDataParallel, TorchScript."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from engine.capture import AttentionTap, capture_attention
from engine.capture.interception import ModelInterception, unwrapped
from tests.families import MEASURED, images, spread
from train.adapters import add_adapters, merge_adapters


def vit(depth: int = 2) -> torch.nn.Module:
    return spread(timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=depth))


def assert_same_maps(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_capture_alike_wrapped_and_merged(kind: str) -> None:
    inputs = images(64, 64)
    before = capture_attention(vit(), inputs)
    adapted = add_adapters(vit(), dora=kind == "dora", rank=4, alpha=8.0, targets="attention", seed=0)
    assert_same_maps(capture_attention(adapted, inputs), before)  # B begins at 0
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    wrapped = capture_attention(adapted, inputs)
    merged, _ = merge_adapters(adapted, inputs)
    assert_same_maps(capture_attention(merged, inputs), wrapped, atol=1e-5)
    assert (wrapped["blocks.1.attn"] - before["blocks.1.attn"]).abs().max() > 1e-2, "the adapters change something"


def test_adapters_on_multihead_attention_keep_the_sites_names() -> None:
    peft = importlib.import_module("peft")
    family = next(family for family in MEASURED if family.library == "torchvision")
    inputs = family.inputs()
    plain = capture_attention(family.build(), inputs)
    adapted = peft.get_peft_model(family.build(), peft.LoraConfig(r=2, target_modules=r".*self_attention"))
    assert_same_maps(capture_attention(adapted, inputs), plain, atol=1e-5)


@pytest.fixture
def compiled_parts() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiled_parts")
@pytest.mark.parametrize("how", ["wrapped", "in place", "a block", "a block in place", "a forward method"])
def test_compiled_models_are_captured_and_stay_compiled(how: str) -> None:
    inputs = images(64, 64)
    expected = capture_attention(vit(), inputs)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, example: object) -> object:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = vit()
    if how == "wrapped":
        model = torch.compile(model, backend=backend)
    elif how == "in place":
        model.compile(backend=backend)
    elif how == "a block":
        model.blocks[1] = torch.compile(model.blocks[1], backend=backend)
    elif how == "a block in place":
        model.blocks[1].compile(backend=backend)
    else:
        model.blocks[1].attn.forward = torch.compile(model.blocks[1].attn.forward, backend=backend)
    assert_same_maps(capture_attention(model, inputs), expected)
    assert graphs == 0, "nothing is compiled for the context's sake"
    with torch.inference_mode():
        model(inputs)
        assert graphs > 0
        model(inputs)
    assert_same_maps(capture_attention(model, inputs), expected)


@pytest.mark.usefixtures("compiled_parts")
def test_a_tap_on_the_original_sees_calls_through_the_compiled_model() -> None:
    model, inputs = vit(), images(64, 64)
    compiled = torch.compile(model, backend="eager")
    sites: list[str] = []
    with torch.inference_mode():
        compiled(inputs)  # compiled before, and its graph would run unseen
        with AttentionTap(model, lambda site, *call: sites.append(site.name)):
            compiled(inputs)
    assert sites == ["blocks.0.attn", "blocks.1.attn"]


def test_data_parallel_wrappers_are_seen_through(tmp_path: Path) -> None:
    model, inputs = vit(), images(64, 64)
    expected = capture_attention(model, inputs)
    assert_same_maps(capture_attention(torch.nn.DataParallel(model), inputs), expected)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        distributed = torch.nn.parallel.DistributedDataParallel(model)
        assert_same_maps(capture_attention(distributed, inputs), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_over_several_devices_is_refused_with_the_way_out() -> None:
    parallel = torch.nn.DataParallel(vit(1))
    parallel.device_ids = [0, 1]
    with pytest.raises(TypeError, match=r"on 2 devices in threads .* \(model\.module\)"):
        AttentionTap(parallel, lambda *call: None)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_is_refused_with_the_way_out() -> None:
    traced = torch.jit.trace(vit(1), images(64, 64))
    with pytest.raises(TypeError, match=r"VisionTransformer is TorchScript.*pass the original module"):
        ModelInterception(traced, {})


def test_wrappers_come_off_in_any_order() -> None:
    model = vit(1)
    assert unwrapped(model) is model
    assert unwrapped(torch.compile(torch.nn.DataParallel(model))) is model
    assert unwrapped(torch.nn.DataParallel(torch.compile(model))) is model
