"""Whether heads of given checkpoints belong together by their numbers: their weights say so, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.capture import attention_weights
from engine.statistics import HeadPairing

COMMON_START = 0.5
"""Cosine of a layer's attention weights from which on two checkpoints count as trained from one model. Found: 0.78 to
1.00 after fine-tuning at usual rates and 0.43 to 0.89 at far greater ones, 0.07 to 0.35 between models trained from the
same random weights, and within 0.02 of 0 between unrelated ones."""
NUMBERS = 2**18  # of a layer that are looked at: chance alone gives a cosine of 0.002

Weights = Mapping[str, torch.Tensor]


def weights_of(model: torch.nn.Module) -> Weights:
    """What `head_pairing` needs of a model: a megabyte a layer at most."""
    return attention_weights(model, NUMBERS)


def head_pairing(condition: str, against: str, weights: Mapping[str, Weights], sites: Sequence[str]) -> HeadPairing:
    """How alike the attention weights of two conditions are in each layer, and what follows for their heads.

    Args:
        condition, against: names of the two.
        weights: condition -> its `weights_of`.
        sites: the layers' modules, in depth order.
    """
    similarity: dict[str, float] = {}
    for site in sites:
        module = site.partition("#")[0]
        ours, theirs = (weights[name].get(module) for name in (condition, against))
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            similarity[site] = round(float(torch.cosine_similarity(ours.double(), theirs.double(), dim=0)), 4)
    return HeadPairing(against=against, similarity=similarity, note=_note(condition, against, similarity))


def _note(condition: str, against: str, similarity: Mapping[str, float]) -> str:
    apart = {site: value for site, value in similarity.items() if value < COMMON_START}
    if not apart:
        return ""
    where = "" if len(apart) == len(similarity) else f" in {', '.join(apart)}"
    ends = (f"{round(value, 2) + 0.0:.2f}".replace("-", "−") for value in (min(apart.values()), max(apart.values())))
    cosines = " to ".join(dict.fromkeys(ends))
    return (
        f"Heads of {condition} and {against} are not paired{where}: the weights of their attention have too little in "
        f"common (cosine {cosines} by layer; after training from one model {COMMON_START:g} or more is "
        "expected), so head 3 of one need not be head 3 of the other. Layer means do not depend on that; for single "
        "heads, match the heads first (docs/statistics.md, “Which head is which”)."
    )
