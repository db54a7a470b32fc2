"""Where the tokens of an attention map lie: prefix tokens first, then a grid of patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """The tokens of one attention map: `num_prefix_tokens` tokens, then `grid_rows × grid_cols` patches.

    Plain numbers, read off a model by capture and stored beside the maps; never guessed from √N.

    Args:
        grid_rows, grid_cols: patches down and across the image.
        num_prefix_tokens: class, distillation and register tokens; they come first.
        patch_height_px, patch_width_px: size of one patch in input pixels.
        class_token: whether token 0 is a class token. None means "if there is a prefix at all", which is
            wrong only for models whose prefix holds registers alone.

    Raises:
        ValueError: a number that is not a whole number, a grid smaller than 1×2, or a class token
            without a prefix.
    """

    grid_rows: int
    grid_cols: int
    num_prefix_tokens: int
    patch_height_px: int
    patch_width_px: int
    class_token: bool | None = None

    def __post_init__(self) -> None:
        least_of = {"grid_rows": 1, "grid_cols": 1, "num_prefix_tokens": 0, "patch_height_px": 1, "patch_width_px": 1}
        for name, least in least_of.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"TokenLayout.{name} is {value!r}; expected a whole number ≥ {least}")
            object.__setattr__(self, name, int(value))
        if self.grid_rows * self.grid_cols < 2:
            raise ValueError("a 1×1 patch grid has no structure to measure; expected at least two patches")
        if self.class_token is None:
            object.__setattr__(self, "class_token", self.num_prefix_tokens > 0)
        elif self.class_token and self.num_prefix_tokens == 0:
            raise ValueError("class_token is True but num_prefix_tokens is 0; a class token is a prefix token")

    @property
    def num_patches(self) -> int:
        """R·C."""
        return self.grid_rows * self.grid_cols

    @property
    def num_tokens(self) -> int:
        """P + R·C: the side of the attention map."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def num_edges(self) -> int:
        """Pairs of patches that share a side (rook neighbours), each counted once; S0 of Moran's I is twice this."""
        return self.grid_rows * (self.grid_cols - 1) + (self.grid_rows - 1) * self.grid_cols

    @property
    def image_height_px(self) -> int:
        return self.grid_rows * self.patch_height_px

    @property
    def image_width_px(self) -> int:
        return self.grid_cols * self.patch_width_px

    @property
    def diagonal_px(self) -> float:
        """√(H² + W²) of the model's input, the unit of `distance`."""
        return math.hypot(self.image_height_px, self.image_width_px)

    def centres_px(self) -> np.ndarray:
        """Patch centres in input pixels, float64 [patch, 2] as (row, col), in token order."""
        rows, cols = np.divmod(np.arange(self.num_patches), self.grid_cols)
        return np.stack(((rows + 0.5) * self.patch_height_px, (cols + 0.5) * self.patch_width_px), axis=-1)

    def distances(self) -> np.ndarray:
        """‖c_q − c_k‖ between patch centres in image diagonals, float64 [query patch, key patch]."""
        centres = self.centres_px()
        offset = centres[:, None, :] - centres[None, :, :]
        return np.asarray(np.hypot(offset[..., 0], offset[..., 1]) / self.diagonal_px)

    def patches(self, attention: Any) -> Any:
        """The patch-query, patch-key part of [..., query, key] (a view)."""
        start = self.num_prefix_tokens
        return attention[..., start:, start:]

    def prefix(self, attention: Any) -> Any:
        """The patch-query, prefix-key part of [..., query, key] (a view)."""
        start = self.num_prefix_tokens
        return attention[..., start:, :start]

    def require_class_token(self) -> None:
        """ValueError for a model without a class token."""
        if not self.class_token:
            raise ValueError("this layout has no class token, so there is no class-token row")

    def class_row(self, attention: Any) -> Any:
        """The class token's row over the patches of [..., query, key] (a view), [..., patch]; or ValueError."""
        self.require_class_token()
        return attention[..., 0, self.num_prefix_tokens :]

    def to_dict(self) -> dict[str, int | bool]:
        """Plain numbers for JSON and Zarr attributes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TokenLayout:
        return cls(**values)

    def __str__(self) -> str:
        return (
            f"{self.grid_rows}×{self.grid_cols} patches of {self.patch_height_px}×{self.patch_width_px} px "
            f"after {self.num_prefix_tokens} prefix token(s)"
        )
