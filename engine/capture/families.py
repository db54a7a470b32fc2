"""What is known of model families, one row each, and what is read off a model by it: stem, tokens, blocks.

Parts are found by their names and checked by what they are, so a model of your own is found too if it names them so.
Where tokens lie is stated by two kinds of stem: timm's embeddings know their grid for any input size (NaFlexViT and
hybrids with a convolutional stem among them); a plain patch convolution has its stride as its kernel. Prefix tokens are
counted by the parameters that hold them; nothing is guessed from the number of tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.capture.interception import named_modules
from kernels import TokenLayout
from train.errors import InputError


class CaptureError(InputError):
    """A model whose attention cannot be captured; the message names the model and the reasons."""


class LayoutError(CaptureError):
    """An input whose tokens form no one grid for all images of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How models of one kind call their parts; () where it is not known."""

    name: str
    stems: tuple[str, ...]  # modules or convolutions that cut the image into patches
    class_tokens: tuple[str, ...]  # parameters that hold a class token
    other_tokens: tuple[str, ...]  # those that hold other prefix tokens: distillation, registers
    num_heads: tuple[str, ...]  # an attention module's number of heads
    first_norms: tuple[str, ...]  # the norm before a block's attention
    blocks: tuple[str, ...] = ()  # the model's row of blocks
    after_map: tuple[str, ...] = ()  # parts of a block after its map: what they change is seen from the next block on
    readout: tuple[str, ...] = ()  # how names of weights behind the last block begin


FAMILIES = (
    Family(
        name="timm",
        stems=("patch_embed", "embeds"),
        class_tokens=("cls_token",),
        other_tokens=("dist_token", "reg_token"),
        num_heads=("num_heads",),
        first_norms=("norm1",),
        blocks=("blocks",),
        after_map=("attn.proj", "ls1", "norm2", "mlp", "ls2"),
        readout=("norm.", "fc_norm.", "head", "attn_pool."),
    ),
    Family(
        name="Hugging Face's ViT, DeiT, BEiT and DINO",
        stems=("patch_embeddings",),
        class_tokens=("cls_token",),
        other_tokens=("distillation_token", "register_tokens"),
        num_heads=("num_attention_heads",),
        first_norms=("layernorm_before", "norm1"),
    ),
    Family(
        name="Hugging Face's CLIP and SigLIP",
        stems=("patch_embedding",),
        class_tokens=("class_embedding",),
        other_tokens=(),
        num_heads=("num_heads",),
        first_norms=("layer_norm1",),
    ),
    Family(
        name="torchvision",
        stems=("conv_proj",),
        class_tokens=("class_token",),
        other_tokens=(),
        num_heads=("num_heads",),
        first_norms=("ln_1",),
    ),
)


def _union(parts: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in parts for name in names))


_STEMS = _union(family.stems for family in FAMILIES)
_CLASS_TOKENS = _union(family.class_tokens for family in FAMILIES)
_OTHER_TOKENS = _union(family.other_tokens for family in FAMILIES)
_NUM_HEADS = _union(family.num_heads for family in FAMILIES)
FIRST_NORMS = _union(family.first_norms for family in FAMILIES)
_BLOCKS = _union(family.blocks for family in FAMILIES)
_READOUT = _union(family.readout for family in FAMILIES)
_IN_BLOCK = re.compile(rf"(?:^|\.)(?:{'|'.join(_BLOCKS)})\.(\d+)\.")
_AFTER_MAP = re.compile(_IN_BLOCK.pattern + f"(?:{'|'.join(map(re.escape, _union(f.after_map for f in FAMILIES)))})\\.")


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
        f"Transformer that cuts the image into one grid of patches by a part called {', '.join(_STEMS)}; "
        "pyramids of several grids have no one map to measure"
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
    stem: Any = patch_stem(vision)
    if isinstance(stem, torch.nn.Conv2d):
        height, width = (int(size) for size in stem.stride)
        rows, cols = image_shape[-2] // height, image_shape[-1] // width
        prefix = _count(vision, (*_CLASS_TOKENS, *_OTHER_TOKENS))
    else:
        height, width = stem.feat_ratio(as_scalar=False)
        if patch_coord is not None:
            rows, cols = _grid_of_patches(patch_coord, patch_valid)
            if len(image_shape) == 5:  # patches of a size of their own
                height, width = image_shape[2:4] if getattr(stem, "channels_last", True) else image_shape[3:5]
        elif len(image_shape) == 4:
            rows, cols = stem.dynamic_feat_size(tuple(image_shape[-2:]))
        else:
            raise LayoutError(
                f"the input is {len(image_shape)}-dimensional; expected images [image, channel, row, col]"
            )
        prefix = getattr(vision, "num_prefix_tokens", 0)
    return TokenLayout(
        grid_rows=rows,
        grid_cols=cols,
        num_prefix_tokens=prefix,
        patch_height_px=height,
        patch_width_px=width,
        class_token=prefix > 0 and any(_count(holder, _CLASS_TOKENS) for holder in (vision, stem)),
    )


def num_heads(module: torch.nn.Module) -> int | None:
    """The number of heads that an attention module states; None for any other module."""
    stated = (vars(module).get(name) for name in _NUM_HEADS)
    return next((heads for heads in stated if isinstance(heads, int)), None)


def attention_weights(model: torch.nn.Module, at_most: int) -> dict[str, torch.Tensor]:
    """Name of each module with heads -> weights of its linear layers in one row, float32; at equal steps `at_most`."""
    with_heads = [name for name, module in named_modules(model) if num_heads(module) is not None]
    rows: dict[str, list[torch.Tensor]] = {}
    for name, module in named_modules(model):
        around = [other for other in with_heads if f"{name}.".startswith(f"{other}.")]
        if isinstance(module, torch.nn.Linear) and around:
            rows.setdefault(max(around, key=len), []).append(module.weight.detach().flatten())
    of_modules = {name: torch.cat(parts) for name, parts in rows.items()}
    return {name: row[:: -(-len(row) // at_most)].float().clone() for name, row in of_modules.items()}


def transformer_blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of the blocks in depth order: the first row of modules each of which holds a module with heads."""
    for name, module in named_modules(model):
        if not isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) or not len(module):
            continue
        if all(any(num_heads(part) is not None for part in child.modules()) for child in module.children()):
            return [(f"{name}.{key}", child) for key, child in module.named_children()]
    return []


def first_norm(block: torch.nn.Module) -> torch.nn.Module | None:
    """The norm before a block's attention."""
    return next((getattr(block, name) for name in FIRST_NORMS if hasattr(block, name)), None)


def num_blocks(model: torch.nn.Module) -> int:
    """Length of the model's row of blocks; 0 where it has none of a known name."""
    return next((len(getattr(model, name)) for name in _BLOCKS if hasattr(model, name)), 0)


def block_of(name: str) -> int | None:
    """Number of the block that a weight or a module lies in; None outside of the blocks."""
    match = _IN_BLOCK.search(f"{name}.")
    return int(match[1]) if match else None


def reached_block(weight: str) -> int | None:
    """The first block whose attention a weight has a part in; None for the readout, which has none.

    A weight before the blocks reaches block 0, one behind a block's attention map the next block.
    """
    block = block_of(weight)
    if block is None:
        return None if weight.startswith(_READOUT) else 0
    return block + 1 if _AFTER_MAP.search(f"{weight}.") else block


def _timm_stem(module: torch.nn.Module) -> torch.nn.Module | None:
    """timm's embedding, which knows its grid for any input size and the pixels of a patch behind any backbone."""
    for name in _STEMS:
        stem = getattr(module, name, None)
        if isinstance(stem, torch.nn.Module) and hasattr(stem, "dynamic_feat_size") and hasattr(stem, "feat_ratio"):
            return stem
    return None


def _convolution(module: torch.nn.Module) -> torch.nn.Conv2d | None:
    """The convolution that cuts the image into patches without overlap: its kernel is its stride, without padding."""
    for name in _STEMS:
        stem = getattr(module, name, None)
        for candidate in (stem, getattr(stem, "projection", None), getattr(stem, "proj", None)):
            if (
                isinstance(candidate, torch.nn.Conv2d)
                and candidate.kernel_size == candidate.stride
                and candidate.padding in ("valid", (0, 0))
            ):
                return candidate
    return None


def _count(holder: torch.nn.Module, names: Sequence[str]) -> int:
    """Tokens held by parameters of these names: [dim] is one token, [..., token, dim] as many as it says."""
    parameters = [getattr(holder, name, None) for name in names]
    return sum(1 if p.ndim == 1 else p.shape[-2] for p in parameters if isinstance(p, torch.Tensor))


def _grid_of_patches(coord: torch.Tensor, valid: torch.Tensor | None) -> tuple[int, int]:
    """(rows, cols) of the grid that all images of a NaFlex batch share."""
    if valid is not None and not bool(valid.all()):
        raise LayoutError("its images have grids of different sizes, padded to the largest; batch them by grid")
    rows, cols = (int(last) + 1 for last in coord.amax(dim=(0, 1)))
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).to(coord.device)
    if coord.shape[1] != rows * cols or not bool((coord == grid).all()):
        raise LayoutError("its patches are not one grid in row-major order for all images; batch them by grid")
    return rows, cols
