"""LoRA and DoRA through peft and the way back to a plain timm model; and backbones made cheaper below them."""

from __future__ import annotations

import copy
import logging
import re
import typing
import warnings
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import nn

from train.choices import Compression, Init, target_pattern
from train.errors import InputError, require_known
from train.models import classifier_name, seeded

logger = logging.getLogger(__name__)

MERGE_TOLERANCE = 1e-4  # largest difference of a logit; peft's merges on timm's qkv were within 1e-6


class MergeError(RuntimeError):
    """The merged model does not compute what the adapted one did."""


def add_adapters(
    model: nn.Module,
    *,
    dora: bool,
    rank: int,
    alpha: float,
    targets: str,
    seed: int,
    init: Init = "paper",
    batches: Sequence[torch.Tensor] = (),
) -> nn.Module:
    """A peft model around `model`, which is changed, with low-rank updates on `targets`; everything else is frozen.

    On timm's fused `qkv`, A is shared by q, k and v, B has its own rows for each; DoRA has a magnitude per output row.

    Updates are scaled by alpha / rank. With any init (`train.choices.Init`) the adapted model begins as `model` was.
    `targets` is a name of `train.choices.TARGETS`, or a regular expression that matches whole module names, as a bare
    "proj" would take the patch embedding's convolution too. `seed` is of A where that is random; `batches` are eva's:
    training images, float32 [image, channel, row, col] each.
    """
    import peft

    require_known("init", init, typing.get_args(Init))
    check_adapters(model, rank=rank, targets=targets)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # peft divides by it; any number will do
        target_modules=target_pattern(targets),
        use_dora=dora,
        lora_dropout=0.0,
        init_lora_weights=True if init == "paper" else init,
        # rho 1: every layer keeps the rank that was asked for.
        eva_config=peft.EvaConfig(rho=1.0) if init == "eva" else None,
    )
    with seeded(seed):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="lora with eva initialization")  # advice on very large models
            adapted = cast(nn.Module, peft.get_peft_model(cast(Any, model), config))
        if init == "eva":
            _initialize_eva(adapted, batches)
    return adapted


def check_adapters(model: nn.Module, *, rank: int, targets: str) -> None:
    """Raise InputError where nothing matches, or something that is not linear, or a layer has no such rank."""
    targets = target_pattern(targets)
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise InputError(f"targets {targets!r} is not a regular expression ({error})") from error
    matched = {name: module for name, module in model.named_modules() if pattern.fullmatch(name)}
    if not matched:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise InputError(
            f"targets {targets!r} match no module of the model; linear layers are {', '.join(linear[:4])}, …"
        )
    for name, module in matched.items():
        if not isinstance(module, nn.Linear):
            raise InputError(
                f"targets {targets!r} match {name}, a {type(module).__name__}; expected linear layers alone"
            )
        if rank > min(module.in_features, module.out_features):
            raise InputError(
                f"rank {rank} is more than {name} has ({module.out_features}×{module.in_features}); give a lower one"
            )


def whole_classifier(model: nn.Module, targets: str) -> tuple[str, ...]:
    """The classifier that is trained whole beside adapters; () where it is one of their targets."""
    classifier = classifier_name(model)
    return () if re.fullmatch(target_pattern(targets), classifier) else (classifier,)


def _initialize_eva(adapted: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    import peft

    try:
        peft.initialize_lora_eva_weights(
            cast(Any, adapted),
            dataloader=list(batches),
            forward_fn=lambda model, images: model(images),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    except ValueError as error:
        raise InputError(
            f"init eva cannot be computed on {sum(map(len, batches))} training images ({error}); give more images, a "
            "lower rank, or another init"
        ) from error


@torch.no_grad()
def merge_adapters(adapted: nn.Module, images: torch.Tensor) -> tuple[nn.Module, float]:
    """The plain timm model with the updates in its weights, and the largest logit difference on `images`.

    Merged and compared in float64, then rounded to the weights' own type: the difference is what merging changed (about
    1e-6), not the rounding of two float32 forward passes (3e-5 on logits of 10). `adapted` is left as it is.
    """
    dtype = next(adapted.parameters()).dtype
    exact = copy.deepcopy(adapted).double().eval()
    before = exact(images.double())
    merged = cast(nn.Module, cast(Any, exact).merge_and_unload(safe_merge=True)).to(dtype).eval()
    difference = float((copy.deepcopy(merged).double()(images.double()) - before).abs().max())
    if not difference < MERGE_TOLERANCE:
        raise MergeError(
            f"merging the adapters changes a logit by {difference:.1e}, expected less than {MERGE_TOLERANCE:.0e}"
        )
    logger.info("adapters merged: largest logit difference %.1e", difference)
    return merged, difference


@torch.no_grad()
def compress(model: nn.Module, compression: Compression, *, sparsity: float, keep: Collection[str] = ()) -> float:
    """Compress the weights of every linear layer and convolution but the first, in place.

    `sparse`: the `sparsity` share of each layer's weights that are smallest in magnitude become 0 (Han et al. 2015).
    `int1`: every weight becomes ±s, s the mean magnitude of its output row or channel, which is the closest such
    matrix in the squared error (Rastegari et al. 2016, XNOR-Net, eq. 6). `plain`: nothing. The first layer reads
    pixels, and as in those papers stays as it is. Values stay floating-point numbers: what is measured is the
    accuracy of such a model, not its speed. Layers to `keep`, such as a head that is trained whole, stay, too. Returns
    the share of the model's numbers that were compressed.
    """
    require_known("compression", compression, typing.get_args(Compression))
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
