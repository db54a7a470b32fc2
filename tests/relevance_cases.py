"""Small seeded models of every family that relevance is computed for, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers.norm import RmsNorm
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from train.adapters import add_adapters, merge_adapters

CLASSES = 5
SIZE_PX = 32
_SMALL: dict[str, Any] = {
    "img_size": SIZE_PX,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": CLASSES,
}


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights that give attention some structure."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.2, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


def adapted(kind: str) -> torch.nn.Module:
    """The plain model with adapters that change its attention, not merged."""
    plain = _randomised(VisionTransformer(**_SMALL))
    model = add_adapters(plain, dora=kind == "dora", rank=2, alpha=4.0, targets="attention", seed=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model.eval()


def _merged_in_place(kind: str) -> torch.nn.Module:
    model: Any = adapted(kind)
    model.merge_adapter()  # the adapters' wrappers stay, as peft leaves them
    return model


_FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": lambda: VisionTransformer(**_SMALL),
    "distilled": lambda: VisionTransformerDistilled(**_SMALL),
    "registers": lambda: VisionTransformer(**_SMALL, reg_tokens=4, no_embed_class=True),
    "layer_scale": lambda: VisionTransformer(**_SMALL, init_values=0.3),
    "qk_norm": lambda: VisionTransformer(**_SMALL, qk_norm=True),
    "rms_norm": lambda: VisionTransformer(**_SMALL, qk_norm=True, norm_layer=RmsNorm),
    "average_pool": lambda: VisionTransformer(**_SMALL, global_pool="avg", class_token=False),
    "attention_pool": lambda: VisionTransformer(**_SMALL, global_pool="map", class_token=False),
    "parallel": lambda: VisionTransformer(**_SMALL, block_fn=ParallelScalingBlock),
    "bias": lambda: Beit(**_SMALL, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.3, head_init_scale=1.0),
    "rope_swiglu": lambda: Eva(
        **_SMALL, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, head_init_scale=1.0
    ),
    "rope_registers": lambda: Eva(
        **_SMALL,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        rope_rotate_half=True,
        rope_type="dinov3",
        init_values=0.3,
        head_init_scale=1.0,
        global_pool="token",
    ),
}
_ADAPTED: dict[str, Callable[[], torch.nn.Module]] = {
    "lora_merged_in_place": lambda: _merged_in_place("lora"),
    "dora_merged": lambda: merge_adapters(adapted("dora"), inputs()[0])[0],
}
FAMILIES = (*_FAMILIES, *_ADAPTED)


def family(name: str) -> torch.nn.Module:
    """A float32 model in eval mode."""
    torch.manual_seed(0)
    return _ADAPTED[name]() if name in _ADAPTED else _randomised(_FAMILIES[name]())


def inputs(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeded images and target classes."""
    images = torch.randn(count, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(2))
    return images, torch.arange(count) % CLASSES
