"""Reads where a model's tokens lie off the model itself; nothing is guessed from the number of tokens.

Two interfaces cover the field: timm's embeddings, which state their grid for any input size (`patch_embed`, NaFlexViT's
`embeds`, hybrids with a convolutional stem), and a plain patch convolution whose kernel is its stride (Hugging Face,
torchvision, models with a `patch_embed` of their own). Prefix tokens are counted by the parameters that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kernels import TokenLayout
from train.errors import InputError


class CaptureError(InputError):
    """A model whose attention cannot be captured; the message names the model and the reasons."""


class LayoutError(CaptureError):
    """An input whose tokens form no one grid for all images of a batch."""


# Where a patch convolution is found: timm's name, Hugging Face's two, torchvision's.
_CONVOLUTIONS = ("patch_embed", "patch_embeddings", "patch_embedding", "conv_proj")
_CLASS_TOKENS = ("cls_token", "class_embedding", "class_token")
_OTHER_PREFIX_TOKENS = ("dist_token", "distillation_token", "reg_token", "register_tokens")


def vision_module(model: torch.nn.Module) -> torch.nn.Module:
    """The part of `model` that cuts images into patches and puts prefix tokens before them.

    Raises:
        CaptureError: no module cuts the image into one grid of patches in a known way.
    """
    for module in model.modules():
        if _timm_stem(module) is not None or _convolution(module) is not None:
            return module
    raise CaptureError(
        f"{type(model).__name__} has no known patch embedding, so the grid of its tokens is unknown; expected a Vision "
        "Transformer that cuts the image into one grid of patches (timm's patch_embed or embeds, Hugging Face's "
        "patch_embeddings, torchvision's conv_proj); pyramids of several grids have no one map to measure"
    )


def patch_stem(vision: torch.nn.Module) -> torch.nn.Module:
    """The submodule of a `vision_module` whose input is the batch of images."""
    stem = _timm_stem(vision) or _convolution(vision)
    assert stem is not None, "not a vision_module"
    return stem


def token_layout(
    vision: torch.nn.Module,
    image_shape: Sequence[int],
    patch_coord: torch.Tensor | None = None,
    patch_valid: torch.Tensor | None = None,
) -> TokenLayout:
    """Grid, prefix and patch size as the model states them for an input of this shape.

    Args:
        vision: a `vision_module`.
        image_shape: shape of the stem's input: [image, channel, row, col], or NaFlexViT's [image, patch, ...].
        patch_coord: (row, col) of each patch, [image, patch, 2], where NaFlexViT is given patches.
        patch_valid: False for padding, [image, patch], likewise.

    Raises:
        LayoutError: patches of images whose grids differ, padded, or not in row-major order.
    """
    stem: Any = _timm_stem(vision)
    if stem is None:
        convolution = _convolution(vision)
        assert convolution is not None, "not a vision_module"
        height, width = (int(size) for size in convolution.stride)
        rows, cols = image_shape[-2] // height, image_shape[-1] // width
        class_tokens = _count(vision, _CLASS_TOKENS)
        prefix = class_tokens + _count(vision, _OTHER_PREFIX_TOKENS)
        return TokenLayout(
            grid_rows=rows,
            grid_cols=cols,
            num_prefix_tokens=prefix,
            patch_height_px=height,
            patch_width_px=width,
            class_token=class_tokens > 0,
        )
    height, width = stem.feat_ratio(as_scalar=False)
    if patch_coord is not None:
        rows, cols = _grid_of_patches(patch_coord, patch_valid)
        if len(image_shape) == 5:  # patches of a size of their own
            height, width = image_shape[2:4] if getattr(stem, "channels_last", True) else image_shape[3:5]
    elif len(image_shape) == 4:
        rows, cols = stem.dynamic_feat_size(tuple(image_shape[-2:]))
    else:
        raise LayoutError(f"the input is {len(image_shape)}-dimensional; expected images [image, channel, row, col]")
    prefix = getattr(vision, "num_prefix_tokens", 0)
    has_class_token = any(getattr(holder, "cls_token", None) is not None for holder in (vision, stem))
    return TokenLayout(
        grid_rows=rows,
        grid_cols=cols,
        num_prefix_tokens=prefix,
        patch_height_px=height,
        patch_width_px=width,
        class_token=prefix > 0 and has_class_token,
    )


def _timm_stem(module: torch.nn.Module) -> torch.nn.Module | None:
    """timm's embedding, which knows its grid for any input size and the pixels of a patch behind any backbone."""
    for name in ("patch_embed", "embeds"):
        stem = getattr(module, name, None)
        if isinstance(stem, torch.nn.Module) and hasattr(stem, "dynamic_feat_size") and hasattr(stem, "feat_ratio"):
            return stem
    return None


def _convolution(module: torch.nn.Module) -> torch.nn.Conv2d | None:
    """The convolution that cuts the image into patches without overlap: its kernel is its stride, without padding."""
    for name in _CONVOLUTIONS:
        found = getattr(module, name, None)
        for candidate in (found, getattr(found, "projection", None), getattr(found, "proj", None)):
            if (
                isinstance(candidate, torch.nn.Conv2d)
                and candidate.kernel_size == candidate.stride
                and candidate.padding in ("valid", (0, 0))
            ):
                return candidate
    return None


def _count(vision: torch.nn.Module, names: Sequence[str]) -> int:
    """Tokens held by parameters of these names: [dim] is one token, [..., token, dim] as many as it says."""
    held = [getattr(vision, name, None) for name in names]
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in held if isinstance(p, torch.Tensor))


def _grid_of_patches(coord: torch.Tensor, valid: torch.Tensor | None) -> tuple[int, int]:
    """(rows, cols) of the grid that all images of a NaFlex batch share."""
    if valid is not None and not bool(valid.all()):
        raise LayoutError("its images have grids of different sizes, padded to the largest; batch them by grid")
    rows, cols = (int(last) + 1 for last in coord.amax(dim=(0, 1)))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).to(coord.device)
    if coord.shape[1] != rows * cols or not bool((coord == grid).all()):
        raise LayoutError("its patches are not one grid in row-major order for all images; batch them by grid")
    return rows, cols
