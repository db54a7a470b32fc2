"""Whether rollout's peaks are where attention collects: one patch that receives most of a head's attention.

Large pretrained models without registers have such patches. Rollout, which multiplies attention alone, peaks there
whatever the class, and a picture of it passes for a picture of what the prediction rests on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from engine.capture import AttentionSite, AttentionTap, attention_map
from kernels.reference import received_map

# A patch that receives more than this share of all attention in a head dominates it.
DOMINANT_SHARE = 0.5


def rollout_peaks(model: torch.nn.Module, pixels: torch.Tensor, maps: Sequence[np.ndarray]) -> dict[str, Any]:
    """How many maps of rollout have their peak at the patch that receives most, where that patch dominates a head.

    Args:
        model: in evaluation mode, on the device of `pixels`.
        pixels: [image, channel, row, col].
        maps: rollout's of these images, [row, col] on the patch grid.

    Returns:
        `images`, their number; `at_dominant`, the number of those whose peak is the patch with the greatest share of
        received attention in any head (`kernels.reference.sink_share`), a share above `DOMINANT_SHARE`; and of these
        the greatest `share`, with its `layer` and `head`, None where there are none.
    """
    shares: list[np.ndarray] = []  # a head each, [image, patch]
    heads: list[tuple[int, int]] = []

    def keep(
        site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        attention = attention_map(query, key, scale, bias)
        of_images = [received_map(image.double().cpu().numpy(), site.layout) for image in attention]
        shares.extend(np.stack(of_images, axis=1))
        heads.extend((site.layer, head) for head in range(attention.shape[1]))

    with torch.inference_mode(), AttentionTap(model, keep):
        model(pixels)
    found: dict[str, Any] = {"images": len(maps), "at_dominant": 0, "share": None, "layer": None, "head": None}
    of_heads = np.nan_to_num(np.stack(shares))  # [head, image, patch]
    for image, one in enumerate(maps):
        head, patch = np.unravel_index(of_heads[:, image].argmax(), of_heads[:, image].shape)
        share = float(of_heads[head, image, patch])
        if share > DOMINANT_SHARE and int(one.argmax()) == patch:
            found["at_dominant"] += 1
            if found["share"] is None or share > found["share"]:
                found |= {"share": share, "layer": heads[head][0], "head": heads[head][1]}
    return found
