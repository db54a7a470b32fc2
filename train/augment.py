"""Augmentation of whole batches on the device, a pure function of (seed, epoch, image)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

__all__ = ["Augmentation"]

# Rec. 601 luma, the grey that saturation mixes with.
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Horizontal flip, small rotation and colour jitter.

    Args:
        flip: mirror half of the images.
        rotation_degrees: rotate by up to this much either way; what turns in from outside is reflected.
        color_jitter: scale brightness, contrast and saturation by 1 ± up to this.
    """

    flip: bool = False
    rotation_degrees: float = 0.0
    color_jitter: float = 0.0

    @property
    def active(self) -> bool:
        return self.flip or self.rotation_degrees > 0 or self.color_jitter > 0

    def apply(
        self, scaled: torch.Tensor, *, seed: int, epoch: int, indices: Sequence[int] | np.ndarray
    ) -> torch.Tensor:
        """Augment pixels in 0..1, float32 [image, channel, row, col]; `indices` are the images' places in the split."""
        if not self.active:
            return scaled
        # One generator an image, so that the draw does not depend on the batch it lies in.
        draws = np.stack([np.random.default_rng([seed, epoch, int(i), 1]).random(5) for i in indices])
        chance = torch.from_numpy(draws.astype(np.float32)).to(scaled.device)
        if self.flip or self.rotation_degrees > 0:
            scaled = self._move(scaled, chance[:, 0], chance[:, 1])
        if self.color_jitter > 0:
            scaled = self._recolor(scaled, chance[:, 2:])
        return scaled

    def _move(self, scaled: torch.Tensor, flip: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
        height, width = scaled.shape[-2:]
        mirror = torch.where(flip < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(flip)
        angle = (2 * turn - 1) * float(np.deg2rad(self.rotation_degrees))
        cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
        # Rows of the map from output to input in grid_sample's (col, row) order; a non-square image rotates in pixels.
        col = torch.stack([mirror * cos, -mirror * sin * (height / width), zero], dim=-1)
        row = torch.stack([sin * (width / height), cos, zero], dim=-1)
        grid = functional.affine_grid(torch.stack([col, row], dim=1), list(scaled.shape), align_corners=False)
        return functional.grid_sample(scaled, grid, padding_mode="reflection", align_corners=False)

    def _recolor(self, scaled: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        factors = 1 + self.color_jitter * (2 * chance - 1)
        brightness, contrast, saturation = (factors[:, k].view(-1, 1, 1, 1) for k in range(3))
        scaled = scaled * brightness
        mean = scaled.mean(dim=(1, 2, 3), keepdim=True)
        scaled = mean + (scaled - mean) * contrast
        if scaled.shape[1] == 3:
            luma = torch.tensor(_LUMA, device=scaled.device).view(1, 3, 1, 1)
            grey = (scaled * luma).sum(dim=1, keepdim=True)
            scaled = grey + (scaled - grey) * saturation
        return scaled.clamp(0, 1)
