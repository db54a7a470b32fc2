"""Random pictures in memory, as capture and training take them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from train.data.images import ImageSet, Preprocessing

__all__ = ["Pictures", "vit"]


class Pictures(ImageSet):
    """`count` images of which at most 1,024 differ, uint8; decoding is no part of what is measured."""

    def __init__(self, count: int, size: int, classes: int) -> None:
        self.ids = tuple(f"{row}.png" for row in range(count))
        self.labels = np.random.default_rng(0).integers(classes, size=count)
        self.class_names = tuple(map(str, range(classes)))
        half = (0.5, 0.5, 0.5)
        self.preprocessing = Preprocessing(
            channels=3, height_px=size, width_px=size, mean=half, std=half, interpolation="bicubic", crop_pct=0.9,
            crop_mode="center",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        shape = (min(count, 1024), 3, size, size)
        self._pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).numpy()

    def _read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self._pixels[np.asarray(indices) % len(self._pixels)]


def vit(small: bool, classes: int, device: torch.device) -> torch.nn.Module:
    """ViT-B/16 at 224 px with random weights; small: three blocks of ViT-Ti/16 at 64 px."""
    import timm

    torch.manual_seed(0)
    if small:
        model = timm.create_model("vit_tiny_patch16_224", num_classes=classes, img_size=64, depth=3)
    else:
        model = timm.create_model("vit_base_patch16_224", num_classes=classes)
    return model.to(device)
