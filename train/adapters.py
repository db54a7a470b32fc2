"""LoRA and DoRA through peft, and the way back to a plain timm model."""

from __future__ import annotations

import copy
import logging
import re
from typing import Any, cast

import torch
from torch import nn

from train.errors import InputError

__all__ = ["MERGE_TOLERANCE", "MergeError", "add_adapters", "merge_adapters"]

logger = logging.getLogger(__name__)

MERGE_TOLERANCE = 1e-4  # largest difference of a logit; peft's merges on timm's qkv were within 1e-6


class MergeError(RuntimeError):
    """The merged model does not compute what the adapted one did."""


def add_adapters(model: nn.Module, *, kind: str, rank: int, alpha: float, targets: str, seed: int) -> nn.Module:
    """A peft model around `model` with low-rank updates on `targets`; everything else is frozen.

    On timm's fused `qkv`, A is shared by q, k and v, B has its own rows for each; DoRA's magnitude is
    one a output row.

    Args:
        model: changed in place.
        kind: "lora" or "dora".
        rank: of the updates.
        alpha: updates are scaled by alpha / rank.
        targets: regular expression that matches whole module names. A bare "proj" would take the patch
            embedding's convolution too, so names are matched in full.
        seed: of A's initial values (B begins at 0).

    Raises:
        InputError: nothing matches, or something that is not linear.
    """
    import peft

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
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),  # peft divides by it; any number will do
        target_modules=targets,
        use_dora=kind == "dora",
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast(nn.Module, peft.get_peft_model(cast(Any, model), config))


@torch.no_grad()
def merge_adapters(adapted: nn.Module, images: torch.Tensor) -> tuple[nn.Module, float]:
    """The plain timm model with the updates in its weights, and the largest logit difference on `images`.

    Merged and compared in float64, then rounded to the weights' own type: the difference is what merging
    changed (1e-6 or so), not the rounding of two float32 forward passes (3e-5 on logits of 10).

    Args:
        adapted: what `add_adapters` returned; left as it is.
        images: float32 [image, channel, row, col].

    Raises:
        MergeError: a logit differs by 1e-4 or more.
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
