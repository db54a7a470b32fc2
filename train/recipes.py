"""The recipes: the ways in which a condition is trained. One entry of `RECIPES` is all that is known of one.

Nothing heavy is imported, as keys of study.toml come from here: what trains is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from train.settings import TrainingRun
    from train.training import Task, Trained

_MERGE_IMAGES = 8  # on which merging is checked, in float64
_EVA_BATCHES = 4  # of training images whose activations make EVA's directions


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way of training."""

    help: str  # what is trained, in a few words
    reads: tuple[str, ...]  # keys of `[conditions.NAME]` that it makes use of; where others are set, that is refused
    train: Callable[[nn.Module, Task], Trained] | None = None  # None: a checkpoint that somebody trained
    ignores: tuple[str, ...] = ()  # keys of `[train]` that its result does not depend on
    # The only keys that it does depend on; empty: all that it reads, and all of `[train]` but `ignores`.
    depends_on: tuple[str, ...] = ()
    seed_invariant: bool = False  # of the same images no seed can change its result, as its backbone is frozen
    adapters: bool = False  # it trains low-rank updates of frozen weights, and these may be compressed
    whole: bool = False  # it trains all weights, so its state takes as much as several models


def _train_probe(model: nn.Module, task: Task) -> Trained:
    """The classifier alone, on features of a frozen backbone."""
    from train.models import classifier_name
    from train.training import Trained, backbone_digest

    history = task.fit_head(model)
    if backbone_digest(model) != task.backbone:
        raise RuntimeError(f"{task.label}: the frozen backbone changed while the probe was fitted")
    count = sum(parameter.numel() for parameter in model.get_submodule(classifier_name(model)).parameters())
    return Trained(model, history, {"trainable_parameters": count, "merge_difference": None})


def _train_full(model: nn.Module, task: Task) -> Trained:
    task.begin_with_head(model)
    return task.fit(model, layerwise_groups(model, task.run))


def layerwise_groups(model: nn.Module, run: TrainingRun) -> list[dict[str, Any]]:
    """An optimizer's groups of all weights, with timm's layer-wise rates and its choice of what decays."""
    from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]

    kept_out: set[str] = getattr(model, "no_weight_decay", set)()
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        model,
        weight_decay=run.shared.weight_decay,
        no_weight_decay_list=kept_out,
        layer_decay=run.condition.layer_decay,
    )
    return groups


def _train_adapters(model: nn.Module, task: Task, *, dora: bool = False) -> Trained:
    """Low-rank updates of frozen weights, merged into them at the end; the classifier whole, unless it is a target."""
    from train.adapters import add_adapters, compress, merge_adapters, whole_classifier

    task.begin_with_head(model)
    run, condition = task.run, task.run.condition
    whole = whole_classifier(model, condition.targets)
    compress(model, run.compression, sparsity=run.sparsity, keep=whole)
    heads = [model.get_submodule(name) for name in whole]
    adapted = add_adapters(
        model,
        dora=dora,
        rank=condition.rank,
        alpha=condition.alpha,
        targets=condition.targets,
        seed=run.seed,
        init=condition.init,
        batches=task.first_batches(_EVA_BATCHES) if condition.init == "eva" else (),
    )
    for head in heads:
        head.requires_grad_(True)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    trained = task.fit(adapted, [{"params": parameters, "weight_decay": 0.0}])
    images = range(min(_MERGE_IMAGES, len(task.data.validation)))
    merged, difference = merge_adapters(adapted, task.data.validation.batch(images).to(task.device))
    return replace(trained, model=merged, facts=trained.facts | {"merge_difference": difference})


_TRAINED = ("lr", "epochs")
_LOW_RANK = Recipe(
    help="adapters",
    reads=(*_TRAINED, "rank", "alpha", "targets", "init"),
    train=_train_adapters,
    ignores=("weight_decay",),
    adapters=True,
)

RECIPES: dict[str, Recipe] = {
    "probe": Recipe(
        help="frozen backbone",
        reads=(),
        train=_train_probe,
        depends_on=("label_smoothing",),
        seed_invariant=True,
    ),
    "full": Recipe(
        help="all weights, layer-wise rates", reads=(*_TRAINED, "layer_decay"), train=_train_full, whole=True
    ),
    "lora": _LOW_RANK,
    "dora": replace(_LOW_RANK, train=partial(_train_adapters, dora=True)),
    "checkpoint": Recipe(help="no training", reads=("checkpoint", "state", "classes")),
}
HEAD_RECIPE = "probe"  # whose classifier the others begin with
