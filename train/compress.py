"""Backbones made cheaper before adapters are put on them: magnitude-pruned, or binarised."""

from __future__ import annotations

import logging
from collections.abc import Collection

import torch
from torch import nn

from train.settings import Compression

logger = logging.getLogger(__name__)


@torch.no_grad()
def compress(model: nn.Module, compression: Compression, *, sparsity: float, keep: Collection[str] = ()) -> float:
    """Compress the weights of every linear layer and convolution but the first, in place.

    `sparse`: the `sparsity` share of each layer's weights that are smallest in magnitude become 0 (Han et al. 2015).
    `int1`: every weight becomes ±s, s the mean magnitude of its output row or channel, which is the closest such
    matrix in the squared error (Rastegari et al. 2016, XNOR-Net, eq. 6). `plain`: nothing. The first layer reads
    pixels, and as in those papers stays as it is. Values stay floating-point numbers: what is measured is the
    accuracy of such a model, not its speed. Layers to `keep`, such as a head that is trained whole, stay, too.

    Returns the share of the model's numbers that were compressed.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    chosen = [layer for name, layer in layers[1:] if name not in keep] if compression != "plain" else []
    for layer in chosen:
        weight = layer.weight
        if compression == "sparse":
            weight.copy_(_pruned(weight, sparsity))
        else:
            scale = weight.abs().mean(dim=tuple(range(1, weight.ndim)), keepdim=True)
            weight.copy_(torch.where(weight < 0, -scale, scale))
    total = sum(parameter.numel() for parameter in model.parameters())
    share = sum(layer.weight.numel() for layer in chosen) / total
    logger.info("backbone %s: %d layers, %.1f %% of the parameters", compression, len(chosen), 100 * share)
    return share


def _pruned(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The smallest weights in magnitude set to 0; among equals the first ones."""
    count = round(sparsity * weight.numel())
    flat = weight.flatten().clone()
    flat[flat.abs().argsort(stable=True)[:count]] = 0
    return flat.view_as(weight)
