"""A training run, described once: sections of study.toml, which recipes and loop read. Nothing heavy is imported.

Adding a field to a section makes a key of study.toml and a flag of it, which enters the hash of the results.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le, MinLen

from train.choices import TARGETS, Compile, Compression, Init, Precision, SweepInit, target_pattern
from train.keys import STRICT, Count, Fraction, Name, Natural, NonNegative, Place, Rate, Real, Scenes, Text, key
from train.recipes import RECIPES

if TYPE_CHECKING:
    from train.augment import Augmentation

    RecipeName = str
    AdapterName = str
else:
    RecipeName = Literal[tuple(RECIPES)]
    AdapterName = Literal[tuple(name for name, recipe in RECIPES.items() if recipe.adapters)]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining of the embedded study's backbone on the source task (digits only)."""

    __pydantic_config__ = STRICT
    scenes: Scenes = key(8000, "scenes in the source task's training split")
    epochs: Count = key(3, "passes over them")
    batch_size: Count = key(32, "scenes per step")
    lr: Rate = key(3e-3, "peak learning rate")
    seed: Natural = key(0, "seed of initial weights and data order")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all conditions share."""

    __pydantic_config__ = STRICT
    seeds: Annotated[tuple[Natural, ...], MinLen(1)] = key((42,), "one training run per condition and seed")
    resplit: bool = key(
        False,
        "each seed also draws its own training and validation images, out of all that are not test images; false: all "
        "seeds have those of data.seed",
    )
    epochs: Count = key(30, "passes over the training split")
    batch_size: Count = key(64, "images per step")
    accumulate: Count = key(1, "forward and backward passes that a step's images are divided into, to save memory")
    weight_decay: NonNegative = key(0.05, "AdamW's decoupled weight decay")
    warmup_fraction: Fraction = key(0.1, "share of the steps in linear warm-up, cosine after it")
    label_smoothing: Fraction = key(0.1, "mass moved from the true class to all")
    clip_norm: NonNegative = key(1.0, "gradient norm above which gradients are scaled down; 0: never")
    ema_decay: Fraction = key(
        0.0, "decay of a moving average of the weights, which is then validated and kept; 0: none"
    )
    patience: Natural = key(0, "epochs without a better validation accuracy after which training stops; 0: never")
    flip: bool = key(True, "augment with horizontal flips")
    rotation_degrees: Annotated[NonNegative, Le(180.0)] = key(
        10.0, "augment with rotations up to this many degrees either way"
    )
    color_jitter: Annotated[NonNegative, Le(1.0)] = key(
        0.2, "augment brightness, contrast and saturation by up to this fraction"
    )
    precision: Precision = key("auto", "forward precision; auto: bf16 where the device has it in hardware")
    compile: Compile = key(
        "off",
        "run transformer blocks under torch.compile: takes a while to begin, then faster on a GPU, other last bits; "
        "auto: on a GPU, in long runs",
    )
    deterministic: bool = key(True, "deterministic algorithms, the same result on the same machine")
    tensorboard: bool = key(False, "write the curves for TensorBoard too, into tensorboard/ (needs the extra)")


def _read_by_some(name: str, default: Any, help: str) -> Any:
    """A key of a condition that some recipes read, which its help names."""
    readers = tuple(recipe for recipe, known in RECIPES.items() if name in known.reads)
    others = [recipe for recipe in RECIPES if recipe not in readers]
    whose = f"all but {others[0]}" if len(others) == 1 else ", ".join(readers)
    return key(default, f"{whose}: {help}", readers)


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """One way of fine-tuning, or a checkpoint that somebody trained."""

    __pydantic_config__ = STRICT
    recipe: RecipeName = key(
        "full",
        "; ".join(f"{', '.join(names)}: {help}" for help, names in groupby(RECIPES, lambda name: RECIPES[name].help)),
    )
    lr: Rate = _read_by_some("lr", 1e-4, "peak learning rate")
    layer_decay: Annotated[Real, Gt(0.0), Le(1.0)] = _read_by_some(
        "layer_decay", 0.75, "each block's rate is this times the rate of the block above it"
    )
    rank: Count = _read_by_some("rank", 8, "rank")
    alpha: Rate = _read_by_some("alpha", 16.0, "scale numerator")
    targets: Name = _read_by_some(
        "targets",
        TARGETS["attention"],
        f"regular expression of the adapted linear layers, or {', '.join(TARGETS)}",
    )
    init: Init = _read_by_some(
        "init", "paper", "initial values; paper: Kaiming and zero; pissa: singular vectors; olora; eva: from images"
    )
    epochs: Natural = _read_by_some("epochs", 0, "passes over the training split; 0: train.epochs")
    checkpoint: Place = _read_by_some("checkpoint", "", "the file")
    state: Text = _read_by_some("state", "", "key of the file under which the weights are; empty: model.state")
    classes: Place = _read_by_some("classes", "", "file of the class names of its outputs; empty: model.classes")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Adapters of several ranks on compressed backbones (the command sweep)."""

    __pydantic_config__ = STRICT
    init: SweepInit = key(
        "paper_init", "initial values of adapters; paper_init: Kaiming and zero; svd_init: singular vectors (PiSSA)"
    )
    recipe: AdapterName = key("lora", "kind of adapters")
    bases: Annotated[tuple[Compression, ...], MinLen(1)] = key(
        ("plain", "sparse", "int1"), "backbones; sparse: smallest weights set to 0; int1: weights of one bit"
    )
    sparsity: Fraction = key(0.5, "sparse: share of each layer's weights that become 0")
    ranks: Annotated[tuple[Count, ...], MinLen(1)] = key((1, 2, 4, 8, 16, 32), "ranks of the adapters")
    trials: Count = key(20, "trials of hyper-parameters for each backbone and rank")
    epochs: Natural = key(0, "passes over the training split in a trial; 0: train.epochs")
    lr_low: Rate = key(1e-4, "lower end of the learning rates that are tried")
    lr_high: Rate = key(3e-2, "upper end of the learning rates that are tried")
    targets: Text = key(
        "", "regular expression of the adapted layers; empty: attention of a transformer, else the classifier"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training run: all that decides its result, but for the weights it starts from and the images."""

    condition: ConditionConfig  # its recipe, and what is set for this condition alone
    shared: TrainConfig = field(default_factory=TrainConfig)  # `seeds`, `resplit`, `tensorboard` are none of a run's
    seed: int = 42  # of data order, augmentation, dropout and new weights
    compression: Compression = "plain"  # of the frozen weights below adapters; see `train.adapters.compress`
    sparsity: float = 0.5
    own_head: bool = False  # begin with the head that the weights came with; otherwise a probe's is fitted, or taken

    @property
    def epochs(self) -> int:
        return self.condition.epochs or self.shared.epochs

    @property
    def augmentation(self) -> Augmentation:
        """Of every recipe but the probe, whose features are computed once."""
        from train.augment import Augmentation

        return Augmentation(**self.values()["augmentation"])

    def values(self) -> dict[str, Any]:
        """Every number of the run by its name, as JSON values; `seed` and `deterministic` apart."""
        numbers = asdict(self.shared) | asdict(self.condition)
        for other in ("seeds", "resplit", "deterministic", "tensorboard", "recipe", "checkpoint", "state", "classes"):
            numbers.pop(other)
        if numbers["compile"] == "off":
            del numbers["compile"]  # results from before there was this key stay what they are
        augmentation = {name: numbers.pop(name) for name in ("flip", "rotation_degrees", "color_jitter")}
        return {
            **numbers,
            "epochs": self.epochs,
            "augmentation": augmentation,
            "compression": self.compression,
            "sparsity": self.sparsity,
            "head": "own" if self.own_head else "probe",
        }

    def used_values(self) -> dict[str, Any]:
        """Those that the result depends on."""
        recipe, values = RECIPES[self.condition.recipe], self.values()
        if recipe.depends_on:
            return {name: values[name] for name in recipe.depends_on}
        others = {name for known in RECIPES.values() for name in known.reads} - {*recipe.reads} | {*recipe.ignores}
        values = {name: value for name, value in values.items() if name not in others}
        if "targets" in values:
            values["targets"] = target_pattern(values["targets"])
        if not recipe.adapters:
            del values["compression"]
        if values.get("compression") != "sparse":
            del values["sparsity"]
        return values
