"""Adapters and compressed weights on models: what they compute, what they change, and what does not fit."""

from __future__ import annotations

import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from engine.capture import capture_attention
from train.adapters import MergeError, add_adapters, compress, merge_adapters
from train.choices import Init
from train.errors import InputError
from train.model_source import ModelSource
from train.models import build_model


@pytest.mark.parametrize("dora", [False, True])
def test_merged_adapters_compute_the_same(dora: bool) -> None:
    torch.manual_seed(0)
    model = build_model("test_vit", num_classes=5)
    images = torch.randn(4, 3, 160, 160)
    before = model.eval()(images)
    adapted = add_adapters(model, dora=dora, rank=4, alpha=8, targets=r"blocks\.\d+\.attn\.(qkv|proj)", seed=0)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert names
    assert all("blocks" in name and "lora" in name for name in names), "the patch embedding's proj is no target"
    torch.testing.assert_close(adapted.eval()(images), before, atol=1e-5, rtol=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    merged, difference = merge_adapters(adapted, images)
    assert type(merged).__name__ == "VisionTransformer"
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert difference < 1e-5
    torch.testing.assert_close(merged(images), adapted(images), atol=1e-5, rtol=0)
    assert (merged(images) - before).abs().max() > 1e-2


def test_a_merge_that_changes_logits_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("test_vit", num_classes=5)
    adapted = add_adapters(model, dora=False, rank=4, alpha=8, targets=r"blocks\.\d+\.attn\.qkv", seed=0)
    real = type(adapted).__getattr__

    def merge_wrongly(**options: Any) -> nn.Module:
        merged = build_model("test_vit", num_classes=5)
        return merged

    monkeypatch.setattr(
        type(adapted),
        "__getattr__",
        lambda self, name: merge_wrongly if name == "merge_and_unload" else real(self, name),
    )
    with pytest.raises(MergeError, match="merging the adapters changes a logit by"):
        merge_adapters(adapted, torch.randn(2, 3, 160, 160))


def test_adapter_targets_that_do_not_fit() -> None:
    model = build_model("test_vit", num_classes=5)
    options: dict[str, Any] = {"dora": False, "rank": 2, "alpha": 4, "seed": 0}
    with pytest.raises(InputError, match="match no module"):
        add_adapters(model, targets=r"layers\.\d+", **options)
    with pytest.raises(InputError, match=r"match patch_embed\.proj, a Conv2d"):
        add_adapters(model, targets=r".*proj", **options)
    with pytest.raises(InputError, match="not a regular expression"):
        add_adapters(model, targets="(", **options)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", typing.get_args(Init))
def test_every_init_begins_as_the_model_and_merges(dora: bool, init: Any) -> None:
    torch.manual_seed(0)
    model = build_model(ModelSource("test_vit", img_size=32), num_classes=5).eval()
    images = torch.randn(12, 3, 32, 32)
    before = model(images)
    arguments: dict[str, Any] = {"dora": dora, "rank": 3, "alpha": 6, "targets": "attention", "seed": 1, "init": init}
    adapted = add_adapters(model, batches=[images[:6], images[6:]], **arguments).eval()
    torch.testing.assert_close(adapted(images), before, atol=1e-5, rtol=0)
    ranks = {p.shape[0] for name, p in adapted.named_parameters() if "lora_A" in name}
    assert ranks == {3}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    merged, difference = merge_adapters(adapted, images)
    assert difference < 1e-5
    torch.testing.assert_close(merged(images), adapted(images), atol=1e-5, rtol=0)


def test_ranks_and_inits_that_do_not_exist() -> None:
    arguments: dict[str, Any] = {"dora": False, "alpha": 4, "targets": "attention", "seed": 0}
    with pytest.raises(InputError, match=r"rank 65 is more than blocks\.0\.attn\.qkv has \(192×64\)"):
        add_adapters(build_model("test_vit", num_classes=5), rank=65, **arguments)
    with pytest.raises(InputError, match="unknown init 'svd'; expected one of paper, pissa"):
        add_adapters(build_model("test_vit", num_classes=5), rank=2, init="svd", **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown compression 'int2'; expected one of plain, sparse, int1"):
        compress(build_model("test_vit", num_classes=5), "int2", sparsity=0.5)  # type: ignore[arg-type]


def test_dora_on_fc1_of_block_9_leaves_the_attention_of_blocks_0_to_9() -> None:
    torch.manual_seed(0)
    model = build_model(ModelSource("vit_tiny_patch16_224", img_size=32), num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    before = capture_attention(model, images)
    adapted = add_adapters(model, dora=True, rank=4, alpha=8, targets="block9_fc1", seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    merged, _ = merge_adapters(adapted, images)
    after = capture_attention(merged, images)
    same = [np.array_equal(before[site], after[site]) for site in before]
    assert same == [True] * 10 + [False] * 2


def test_compressed_weights_are_what_the_papers_say() -> None:
    torch.manual_seed(0)
    for name, first, head in (("test_vit", "patch_embed.proj", "head"), ("test_resnet", "conv1.0", "fc")):
        before = build_model(name, num_classes=5)
        layers = {n: m for n, m in before.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        assert next(iter(layers)) == first
        for kind in ("plain", "sparse", "int1"):
            after = build_model(name, num_classes=5)
            after.load_state_dict(before.state_dict())
            share = compress(after, kind, sparsity=0.6, keep=(head,))  # type: ignore[arg-type]
            changed = {n for n, t in before.state_dict().items() if not torch.equal(t, after.state_dict()[n])}
            if kind == "plain":
                assert not changed
                assert share == 0
                continue
            assert changed == {f"{n}.weight" for n in layers if n not in (first, head)}
            assert 0.5 < share < 1
            for layer in changed:
                old, new = before.state_dict()[layer], after.state_dict()[layer]
                if kind == "sparse":
                    assert int((new == 0).sum()) == round(0.6 * new.numel())
                    assert old[new == 0].abs().max() <= old[new != 0].abs().min()
                    assert torch.equal(new[new != 0], old[new != 0])
                else:
                    rows = new.flatten(1)
                    torch.testing.assert_close(rows.abs(), old.flatten(1).abs().mean(1, keepdim=True).expand_as(rows))
                    assert torch.equal(rows.sign(), torch.where(old.flatten(1) < 0, -1.0, 1.0))
