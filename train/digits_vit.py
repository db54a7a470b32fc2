"""`digits_vit`, the embedded study's Vision Transformer, in timm's registry.

timm's own `VisionTransformer`, unmodified: patch 6 on a 48×48 grey image (8×8 patches and a class token), width 64,
depth 4, 4 heads. The readout is the class token, for every condition. A plain patch projection does not learn in the
study's time (19.5 % after 10,000 images); a small convolutional stem in its place does.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

IMAGE_SIZE = 48
_PATCH_SIZE = 6

# Its operations are too short to share: one thread trains 500 images/s, two on a busy machine 75. And the
# weights do not depend on how many cores there are.
TRAINING_THREADS = {"digits_vit": 1}

default_cfgs = generate_default_cfgs(
    {
        "digits_vit": {
            "url": "",
            "num_classes": 10,
            "input_size": (1, IMAGE_SIZE, IMAGE_SIZE),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "fixed_input_size": True,
            "mean": (0.25,),
            "std": (0.25,),
            "first_conv": "patch_embed.proj.0",
            "classifier": "head",
        }
    }
)


class _ConvStem(PatchEmbed):
    """timm's patch embedding with three convolutions (strides 2, 1, 3) as its projection."""

    def __init__(self, *, in_chans: int = 1, embed_dim: int = 64, patch_size: int = _PATCH_SIZE, **kwargs: Any) -> None:
        if patch_size != _PATCH_SIZE:
            raise ValueError(f"the strides of this stem multiply to {_PATCH_SIZE}, not to a patch size of {patch_size}")
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, patch_size=patch_size, **kwargs)
        self.proj = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(in_chans, 24, 5, stride=2, padding=2, bias=False),
            nn.GroupNorm(4, 24),
            nn.GELU(),
            nn.Conv2d(24, 48, 3, padding=1, bias=False),
            nn.GroupNorm(8, 48),
            nn.GELU(),
            nn.Conv2d(48, embed_dim, 3, stride=3),
        )


@register_model
def digits_vit(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The small model of the embedded study; nothing can be downloaded for it: it is pretrained in the study."""
    arguments: dict[str, Any] = {
        "img_size": IMAGE_SIZE,
        "patch_size": _PATCH_SIZE,
        "in_chans": 1,
        "embed_dim": 64,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 2.0,
        "embed_layer": _ConvStem,
        **kwargs,
    }
    model = build_model_with_cfg(VisionTransformer, "digits_vit", pretrained, **arguments)
    # Sine-cosine positions at half scale: the order of the stem's own output.
    positions = build_sincos2d_pos_embed(list(model.patch_embed.grid_size), dim=model.embed_dim) * 0.5
    assert model.pos_embed is not None
    with torch.no_grad():
        model.pos_embed[:, : model.num_prefix_tokens].zero_()
        model.pos_embed[0, model.num_prefix_tokens :].copy_(positions)
    return model
