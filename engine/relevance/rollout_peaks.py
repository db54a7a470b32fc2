"""Whether rollout's peaks are where attention collects: one patch that receives most of a head's attention.

Large pretrained models without registers have such patches. Rollout, which multiplies attention alone, peaks there
whatever the class, and a picture of it passes for a picture of what the prediction rests on.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.capture import SiteAttention, observe
from engine.relevance.results import RolloutPeaks
from kernels.reference import received_map

# A patch that receives more than this share of all attention in a head dominates it.
DOMINANT_SHARE = 0.5


def rollout_peaks(
    condition: str, model: torch.nn.Module, pixels: torch.Tensor, maps: Sequence[np.ndarray]
) -> RolloutPeaks:
    """How many maps of rollout have their peak at the patch that receives most, where that patch dominates a head."""
    shares: list[np.ndarray] = []  # per head, [image, patch]
    heads: list[tuple[int, int]] = []

    def keep(attention: SiteAttention) -> None:
        site = attention.site
        received = [received_map(image.double().cpu().numpy(), site.layout) for image in attention.maps()]
        shares.extend(np.stack(received, axis=1))
        heads.extend((site.layer, head) for head in range(site.heads))

    observe(model, pixels, keep)
    received_shares = np.nan_to_num(np.stack(shares))  # [head, image, patch]
    dominant = []  # (share, position among the heads) of the images whose peak is there
    for image, one in enumerate(maps):
        head, patch = np.unravel_index(received_shares[:, image].argmax(), received_shares[:, image].shape)
        share = float(received_shares[head, image, patch])
        if share > DOMINANT_SHARE and int(one.argmax()) == patch:
            dominant.append((share, int(head)))
    greatest, position = max(dominant, key=lambda item: item[0], default=(None, 0))
    layer, head = heads[position] if dominant else (None, None)
    return RolloutPeaks(
        condition=condition, images=len(maps), at_dominant=len(dominant), share=greatest, layer=layer, head=head
    )
