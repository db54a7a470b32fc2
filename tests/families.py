"""Small instances of every family whose attention can be captured, and of those where it cannot.

Tests and the table of `docs/families.md` read the same list. Weights are random, spread so that maps are far from
uniform: with a fresh initialisation any two models' maps agree to 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# grid rows, grid cols, prefix tokens, patch height and width in pixels, class token
Layout = tuple[int, int, int, int, int, bool]


@dataclass(frozen=True)
class Family:
    """One family: how a small instance is made, what it is given, and what capture must find.

    Args:
        name: as in the table.
        example: the model that the instance is cut down from.
        build: the instance.
        inputs: what it is called with, [image, channel, row, col] for all but NaFlex.
        layout: of its measurable sites.
        measured: names of the measurable sites, in depth order (Hugging Face: their numbers alone, since names follow
            its version).
        skipped: names of those that are not.
        refused: instead of all that, what the error says.
    """

    name: str
    example: str
    build: Callable[[], torch.nn.Module]
    inputs: Callable[[], Any]
    layout: Layout | None = None
    measured: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    refused: str = ""
    note: str = ""
    library: str = field(default="timm", kw_only=True)


def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Eval mode, and weights that make maps far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "norm" not in name:
                fan_in = parameter[0].numel() if parameter.ndim > 2 or parameter.shape[0] > 1 else 1
                table = any(part in name for part in ("rel_pos", "relative_position", "token", "cls", "pos_embed"))
                std = 0.5 if table else 1.6 * fan_in**-0.5
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            elif "gamma" in name or "lambda" in name:  # layer scale, which starts near 0
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def _timm(name: str, **options: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        import timm

        return spread(timm.create_model(name, num_classes=5, **options))

    return build


def _torchvision() -> torch.nn.Module:
    from torchvision.models import VisionTransformer

    return spread(
        VisionTransformer(
            image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=64, num_classes=5
        )
    )


def _hugging_face(name: str, implementation: str = "sdpa", **options: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            attn_implementation=implementation,
            **options,
        )
        return spread(getattr(transformers, f"{name}Model")(config))

    return build


def naflex_patches() -> dict[str, torch.Tensor]:
    """Two images of 2×3 patches as NaFlexViT takes them."""
    rows, cols = 2, 3
    coord = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).expand(2, -1, -1)
    patches = torch.randn(2, rows * cols, 16 * 16 * 3, generator=torch.Generator().manual_seed(1))
    return {"patches": patches, "patch_coord": coord, "patch_valid": torch.ones(2, rows * cols, dtype=torch.bool)}


def _blocks(count: int = 2) -> tuple[str, ...]:
    return tuple(f"blocks.{block}.attn" for block in range(count))


SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 3}

MEASURED = [
    Family(
        "ViT",
        "vit_base_patch16_224",
        _timm("vit_tiny_patch16_224", img_size=(32, 96), depth=2),
        lambda: images(32, 96),
        (2, 6, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "ViT, patches higher than wide",
        "vit_base_patch16_224",
        _timm("vit_tiny_patch16_224", img_size=(64, 48), patch_size=(16, 8), depth=2),
        lambda: images(64, 48),
        (4, 6, 1, 16, 8, True),
        _blocks(),
    ),
    Family(
        "ViT, any image size",
        "vit_base_patch16_224, dynamic_img_size",
        _timm("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True, depth=2),
        lambda: images(50, 80),
        (4, 5, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "ViT with q/k-norm and registers, no class token",
        "vit_betwixt_patch16_reg4_gap_256",
        _timm("vit_betwixt_patch16_reg4_gap_256", img_size=64, qk_norm=True, **SMALL),
        lambda: images(64, 64),
        (4, 4, 4, 16, 16, False),
        _blocks(),
    ),
    Family(
        "Hybrid ViT",
        "vit_base_r50_s16_224",
        _timm("vit_tiny_r_s16_p8_224", img_size=(128, 256), depth=2),
        lambda: images(128, 256),
        (4, 8, 1, 32, 32, True),
        _blocks(),
    ),
    Family(
        "DeiT, distilled",
        "deit_base_distilled_patch16_224",
        _timm("deit_tiny_distilled_patch16_224", img_size=(48, 64), depth=2),
        lambda: images(48, 64),
        (3, 4, 2, 16, 16, True),
        _blocks(),
    ),
    Family(
        "DeiT3",
        "deit3_base_patch16_224",
        _timm("deit3_small_patch16_224", img_size=64, **SMALL),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "CLIP",
        "vit_base_patch16_clip_224",
        _timm("vit_base_patch16_clip_224", img_size=64, **SMALL),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "SigLIP",
        "vit_base_patch16_siglip_224",
        _timm("vit_base_patch16_siglip_224", img_size=(64, 32), **SMALL),
        lambda: images(64, 32),
        (4, 2, 0, 16, 16, False),
        _blocks(),
        ("attn_pool",),
        note="attention pooling is 1 × N",
    ),
    Family(
        "EVA-02 (RoPE)",
        "eva02_base_patch14_224",
        _timm("eva02_tiny_patch14_224", img_size=(56, 70), depth=2),
        lambda: images(56, 70),
        (4, 5, 1, 14, 14, True),
        _blocks(),
    ),
    Family(
        "DINOv2 with registers",
        "vit_base_patch14_reg4_dinov2",
        _timm("vit_small_patch14_reg4_dinov2", img_size=(56, 70), **SMALL),
        lambda: images(56, 70),
        (4, 5, 5, 14, 14, True),
        _blocks(),
    ),
    Family(
        "DINOv3 (RoPE, registers)",
        "vit_base_patch16_dinov3",
        _timm("vit_small_patch16_dinov3", img_size=(64, 96), **SMALL),
        lambda: images(64, 96),
        (4, 6, 5, 16, 16, True),
        _blocks(),
    ),
    Family(
        "Perception Encoder (RoPE)",
        "vit_pe_core_base_patch16_224",
        _timm("vit_pe_core_tiny_patch16_384", img_size=64, depth=2),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        _blocks(),
        ("attn_pool",),
        note="attention pooling is 1 × N",
    ),
    Family(
        "BEiT (bias)",
        "beit_base_patch16_224",
        _timm("beit_base_patch16_224", img_size=(64, 48), **SMALL),
        lambda: images(64, 48),
        (4, 3, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "BEiT v2 (bias)",
        "beitv2_base_patch16_224",
        _timm("beitv2_base_patch16_224", img_size=64, **SMALL),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "ViT with relative positions (bias)",
        "vit_relpos_base_patch16_224",
        _timm("vit_relpos_small_patch16_224", img_size=64, **SMALL),
        lambda: images(64, 64),
        (4, 4, 0, 16, 16, False),
        _blocks(),
    ),
    Family(
        "ViT with relative positions and a class token",
        "vit_relpos_base_patch16_clsgap_224",
        _timm("vit_relpos_base_patch16_clsgap_224", img_size=64, **SMALL),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        _blocks(),
    ),
    Family(
        "NaFlexViT, images",
        "naflexvit_base_patch16_gap",
        _timm("naflexvit_base_patch16_gap", **SMALL),
        lambda: images(64, 96),
        (4, 6, 4, 16, 16, False),
        _blocks(),
    ),
    Family(
        "NaFlexViT, patches",
        "naflexvit_base_patch16_gap",
        _timm("naflexvit_base_patch16_gap", **SMALL),
        naflex_patches,
        (2, 3, 4, 16, 16, False),
        _blocks(),
        note="batches of one grid; padded batches are skipped",
    ),
    Family(
        "SAM (bias)",
        "samvit_base_patch16",
        _timm("samvit_base_patch16", img_size=(96, 128), window_size=3, global_attn_indexes=(1,), **SMALL),
        lambda: images(96, 128),
        (6, 8, 0, 16, 16, False),
        ("blocks.1.attn",),
        ("blocks.0.attn",),
        note="global blocks; windowed ones are skipped",
    ),
    Family(
        "AIMv2",
        "aimv2_large_patch14_224",
        _timm("aimv2_large_patch14_224", img_size=56, **SMALL),
        lambda: images(56, 56),
        (4, 4, 0, 14, 14, False),
        _blocks(),
    ),
    Family(
        "ViT",
        "ViTModel",
        _hugging_face("ViT", image_size=(32, 96), patch_size=16),
        lambda: images(32, 96),
        (2, 6, 1, 16, 16, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "DeiT, distilled",
        "DeiTModel",
        _hugging_face("DeiT", image_size=64, patch_size=16),
        lambda: images(64, 64),
        (4, 4, 2, 16, 16, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "DINOv2",
        "Dinov2Model",
        _hugging_face("Dinov2", image_size=70, patch_size=14),
        lambda: images(42, 70),
        (3, 5, 1, 14, 14, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "DINOv2 with registers",
        "Dinov2WithRegistersModel",
        _hugging_face("Dinov2WithRegisters", image_size=70, patch_size=14, num_register_tokens=4),
        lambda: images(42, 70),
        (3, 5, 5, 14, 14, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "DINOv3 (RoPE, registers)",
        "DINOv3ViTModel",
        _hugging_face("DINOv3ViT", image_size=64, patch_size=16, num_register_tokens=4),
        lambda: images(64, 96),
        (4, 6, 5, 16, 16, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "CLIP",
        "CLIPVisionModel",
        _hugging_face("CLIPVision", image_size=64, patch_size=16),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "SigLIP",
        "SiglipVisionModel",
        _hugging_face("SiglipVision", image_size=64, patch_size=16),
        lambda: images(64, 64),
        (4, 4, 0, 16, 16, False),
        ("0", "1"),
        ("head.attention",),
        note="attention pooling is 1 × N",
        library="Hugging Face",
    ),
    Family(
        "BEiT (bias)",
        "BeitModel",
        _hugging_face("Beit", image_size=64, patch_size=16, use_relative_position_bias=True),
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        ("0", "1"),
        library="Hugging Face",
    ),
    Family(
        "ViT",
        "vit_b_16",
        _torchvision,
        lambda: images(64, 64),
        (4, 4, 1, 16, 16, True),
        tuple(f"encoder.layers.encoder_layer_{layer}.self_attention" for layer in range(2)),
        note="`nn.MultiheadAttention`",
        library="torchvision",
    ),
]

REFUSED = [
    Family(
        "Swin",
        "swin_tiny_patch4_window7_224",
        _timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1, 1, 1)),
        lambda: images(56, 56),
        refused="49×49 tokens, expected 196×196",
    ),
    Family(
        "CaiT",
        "cait_xxs24_224",
        _timm("cait_xxs24_224", img_size=64, depth=2),
        lambda: images(64, 64),
        refused=r"blocks.0.attn … blocks.1.attn \(2 calls\): it does not call F.scaled_dot_product_attention",
    ),
    Family(
        "ConViT",
        "convit_tiny",
        _timm("convit_tiny", img_size=64, depth=2, local_up_to_layer=1),
        lambda: images(64, 64),
        refused="it does not call F.scaled_dot_product_attention",
    ),
    Family(
        "XCiT",
        "xcit_nano_12_p16_224",
        _timm("xcit_nano_12_p16_224", img_size=64, depth=2),
        lambda: images(64, 64),
        refused="Xcit has no known patch embedding",
    ),
    Family(
        "PVTv2",
        "pvt_v2_b0",
        _timm("pvt_v2_b0"),
        lambda: images(64, 64),
        refused="PyramidVisionTransformerV2 has no known patch embedding",
    ),
    Family(
        "Twins",
        "twins_svt_small",
        _timm("twins_svt_small", depths=(1, 1, 1, 1)),
        lambda: images(64, 64),
        refused="Twins has no known patch embedding",
    ),
    Family(
        "MaxViT",
        "maxvit_tiny_rw_224",
        _timm("maxvit_pico_rw_256", img_size=64),
        lambda: images(64, 64),
        refused="MaxxVit has no known patch embedding",
    ),
]
