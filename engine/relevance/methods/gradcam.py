"""Grad-CAM on token grids (Selvaraju et al., ICCV 2017, doi:10.1109/ICCV.2017.74). Illustrative, not evidential."""

from __future__ import annotations

from typing import Any

import torch

from engine.capture import FIRST_NORMS, CaptureError, first_norm, token_layout, transformer_blocks, vision_module
from engine.relevance.method import relevance_method
from engine.relevance.targets import class_logits


@relevance_method()
def gradcam_maps(
    model: torch.nn.Module, images: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """ReLU(Σ_c α_c A_c) over the patches, α_c the mean over patches of ∂y_target / ∂A_c, [image, row, col].

    A is the output of the last block's first norm. Later places give all-zero maps where the head reads the class
    token alone: no gradient reaches the other tokens there.
    """
    blocks = transformer_blocks(model)
    norm = first_norm(blocks[-1][1]) if blocks else None
    if norm is None:
        raise CaptureError(
            f"Grad-CAM needs the norm before the last block's attention ({', '.join(FIRST_NORMS)}), which "
            f"{type(model).__name__} does not have; use another method"
        )
    activations: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        # A leaf of its own: gradients are wanted here whatever the weights' requires_grad.
        leaf = output.detach().requires_grad_()
        activations.append(leaf)
        return leaf

    with norm.register_forward_hook(keep):
        logits = class_logits(model, images, targets, dtype)
    (tokens,) = activations
    (gradients,) = torch.autograd.grad(logits.sum(), [tokens])
    layout = token_layout(vision_module(model), images.shape)
    start = layout.num_prefix_tokens
    weights = gradients[:, start:].mean(dim=1, keepdim=True)
    maps = (weights * tokens[:, start:]).sum(dim=-1).relu()
    return maps.reshape(-1, layout.grid_rows, layout.grid_cols)
