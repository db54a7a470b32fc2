"""The numbers of one condition, and which of them a recipe's result depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from train.adapters import INITS, TARGETS, Init
from train.augment import Augmentation
from train.compress import COMPRESSIONS, Compression
from train.data import DataSplits
from train.errors import InputError
from train.loop import Schedule

Recipe = Literal["probe", "full", "lora", "dora"]
RECIPES = ("probe", "full", "lora", "dora")
ADAPTERS = frozenset({"lora", "dora"})
SEED_INVARIANT = frozenset({"probe"})  # recipes that no seed can change

_ADAPTERS_ALONE = {"rank", "alpha", "targets", "init", "compression", "sparsity"}
_FULL_ALONE = {"layer_decay", "weight_decay"}


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """Numbers of one condition; those that a recipe does not use have no effect on it.

    Args:
        epochs, batch_size, accumulate, lr, warmup_fraction, clip_norm, ema_decay, patience, precision: see
            `train.loop.Schedule`; precision may be "auto".
        weight_decay: AdamW's, of matrices (timm leaves biases, norms and position embeddings out); none on adapters.
        label_smoothing: mass moved from the true class to all, in the probe too.
        layer_decay: full: each block's rate is this times the rate of the block above it.
        rank, alpha, targets, init: lora, dora; see `train.adapters.add_adapters`.
        compression, sparsity: lora, dora: of the frozen weights below the adapters; see `train.compress`.
        head: "probe": a classifier fitted to the data begins; "own": the one that the weights came with.
        augmentation: of every recipe but the probe, whose features are computed once.
    """

    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    patience: int = 0
    label_smoothing: float = 0.1
    layer_decay: float = 0.75
    rank: int = 8
    alpha: float = 16.0
    targets: str = TARGETS["attention"]
    init: Init = "paper"
    compression: Compression = "plain"
    sparsity: float = 0.5
    head: Literal["probe", "own"] = "probe"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    augmentation: Augmentation = field(default_factory=Augmentation)

    def schedule(self, precision: str, seed: int) -> Schedule:
        """For the loop; `precision` is the one that "auto" came to."""
        return Schedule(
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            lr=self.lr,
            warmup_fraction=self.warmup_fraction,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
            patience=self.patience,
            precision=precision,
            seed=seed,
        )

    def used_by(self, recipe: str, precision: str) -> dict[str, Any]:
        """The values that a recipe's result depends on, as JSON values."""
        if recipe == "probe":
            return {"label_smoothing": self.label_smoothing}
        others = _FULL_ALONE if recipe in ADAPTERS else _ADAPTERS_ALONE
        values = {name: value for name, value in asdict(self).items() if name not in others}
        if "targets" in values:
            values["targets"] = TARGETS.get(self.targets, self.targets)
        if values.get("compression") != "sparse":
            values.pop("sparsity", None)
        return values | {"precision": precision}


def check_condition(recipe: str, data: DataSplits, hyper: Hyperparameters) -> None:
    """Raise the sentence for what cannot be trained.

    Raises:
        InputError: an unknown recipe, init or compression, a split without images, numbers out of range.
    """
    for what, value, known in (
        ("recipe", recipe, RECIPES),
        ("init", hyper.init, INITS),
        ("compression", hyper.compression, COMPRESSIONS),
    ):
        if value not in known:
            raise InputError(f"unknown {what} {value!r}; expected one of {', '.join(known)}")
    if hyper.compression != "plain" and recipe not in ADAPTERS:
        raise InputError(f"compression {hyper.compression} is of weights below adapters; recipe {recipe} has none")
    for split, images in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if not len(images):
            raise InputError(
                f"the {split} split has no images, and training needs all three; use --data.split stratified, or "
                "folders with train, val and test"
            )
    if min(hyper.epochs, hyper.batch_size, hyper.accumulate) < 1:
        raise InputError(
            f"epochs {hyper.epochs}, batch_size {hyper.batch_size} and accumulate {hyper.accumulate} must each be at "
            "least 1"
        )
