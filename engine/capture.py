"""Post-softmax attention of every layer, head and image, while the model runs at full speed."""

from __future__ import annotations

from dataclasses import dataclass

from kernels import TokenLayout

__all__ = ["AttentionSite"]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention call of a model whose map is [image, head, prefix + grid, prefix + grid].

    Args:
        name: the module that makes the call, e.g. "blocks.0.attn".
        layer: index among the measurable sites in depth order, from 0.
        heads: number of heads.
        layout: where its tokens lie.
    """

    name: str
    layer: int
    heads: int
    layout: TokenLayout
