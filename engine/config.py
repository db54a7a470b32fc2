"""The study as dataclasses and TOML: every key here is a key of `study.toml` and a flag of the command line.

Nothing heavy is imported: `--help` reads this module and answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "CaptureConfig",
    "ConditionConfig",
    "DataConfig",
    "MeasureConfig",
    "ModelConfig",
    "PretrainConfig",
    "RelevanceConfig",
    "StatisticsConfig",
    "StudyConfig",
    "TrainConfig",
]

_FORBID = {"extra": "forbid", "frozen": True, "strict": False}


def _key(default: Any, help: str) -> Any:
    """A configuration key with its one-line help."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which Vision Transformer."""

    __pydantic_config__ = _FORBID
    name: str = _key(
        "vit_base_patch16_224.augreg_in21k",
        "a timm model name, or digits_vit: the small model of the embedded study",
    )
    pretrained: bool = _key(True, "let timm download pretrained weights when no file is given")
    weights: str = _key("", "a .safetensors or .pth file; nothing is downloaded then")
    img_size: int = _key(0, "input size in pixels; 0: the model's own")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images."""

    __pydantic_config__ = _FORBID
    kind: Literal["digits", "folder"] = _key(
        "digits", "digits: embedded scenes of handwritten digits; folder: class folders under root"
    )
    root: str = _key("", "the folder of class folders (or of train/, val/ and test/ with class folders in each)")
    split: Literal["stratified", "folders", "all"] = _key(
        "stratified",
        "stratified: 70/15/15 within each class; folders: train/val/test folders; all: every image is test",
    )
    seed: int = _key(42, "seed of the split, or of the composed scenes")
    train_scenes: int = _key(8000, "digits: scenes in the target task's training split")
    validation_scenes: int = _key(1024, "digits: scenes in each validation split")
    test_scenes: int = _key(1024, "digits: scenes in each test split")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pretraining of the embedded study's backbone on the source task (digits only)."""

    __pydantic_config__ = _FORBID
    scenes: int = _key(8000, "scenes in the source task's training split")
    epochs: int = _key(3, "passes over them")
    batch_size: int = _key(32, "scenes a step")
    lr: float = _key(3e-3, "peak learning rate")
    seed: int = _key(0, "seed of initial weights and data order")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What all conditions share."""

    __pydantic_config__ = _FORBID
    seeds: tuple[int, ...] = _key((42,), "one training run a condition and seed")
    epochs: int = _key(30, "passes over the training split")
    batch_size: int = _key(64, "images a step")
    weight_decay: float = _key(0.05, "AdamW's decoupled weight decay")
    warmup_fraction: float = _key(0.1, "share of the steps in linear warm-up, cosine after it")
    label_smoothing: float = _key(0.1, "mass moved from the true class to all")
    clip_norm: float = _key(1.0, "gradient norm above which gradients are scaled down; 0: never")
    flip: bool = _key(True, "augment with horizontal flips")
    rotation_degrees: float = _key(10.0, "augment with rotations up to this many degrees either way")
    color_jitter: float = _key(0.2, "augment brightness, contrast and saturation by up to this fraction")
    precision: Literal["auto", "bf16", "fp32"] = _key(
        "auto", "forward precision; auto: bf16 where the device has it in hardware"
    )
    deterministic: bool = _key(True, "deterministic algorithms, the same result on the same machine")


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """One way of fine-tuning, or a checkpoint that somebody trained."""

    __pydantic_config__ = _FORBID
    recipe: Literal["probe", "full", "lora", "dora", "checkpoint"] = _key(
        "full",
        "probe: frozen backbone; full: all weights, layer-wise rates; lora, dora: adapters; checkpoint: no training",
    )
    lr: float = _key(1e-4, "peak learning rate")
    layer_decay: float = _key(0.75, "full: each block's rate is this times the rate of the block above it")
    rank: int = _key(8, "lora, dora: rank")
    alpha: float = _key(16.0, "lora, dora: scale numerator")
    targets: str = _key(r"blocks\.\d+\.attn\.(qkv|proj)", "lora, dora: regular expression of the adapted linear layers")
    epochs: int = _key(0, "passes over the training split; 0: train.epochs")
    checkpoint: str = _key("", "checkpoint: the file")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Attention capture."""

    __pydantic_config__ = _FORBID
    sinks: tuple[Literal["metrics", "store"], ...] = _key(
        ("metrics",), "metrics: measure on the spot; store: keep the maps"
    )
    encoding: Literal["fp16"] = _key("fp16", "how stored maps are encoded")
    batch_size: int = _key(32, "images a forward pass, and a shard of the store")
    layers: tuple[int, ...] = _key((), "layers to capture, in depth order from 0; empty: all")
    samples: int = _key(8, "seeded images whose whole maps are kept for the report")
    store: str = _key("", "capture: the store to write")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Metrics over captured attention."""

    __pydantic_config__ = _FORBID
    metrics: tuple[str, ...] = _key(
        ("distance", "entropy", "morans_i", "prefix_mass"), "metric names, or module:name of your own"
    )
    backend: str = _key("auto", "auto, reference, numba, torch")
    store: str = _key("", "measure: the store to read")


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Paired comparisons."""

    __pydantic_config__ = _FORBID
    permutations: int = _key(9999, "sign flips of the max-T test")
    bootstrap: int = _key(2000, "resamples of the BCa intervals")
    confidence: float = _key(0.95, "coverage of the intervals")
    alpha: float = _key(0.05, "level below which an adjusted p-value is marked")
    seed: int = _key(0, "seed of flips and resamples")


@dataclass(frozen=True, kw_only=True)
class RelevanceConfig:
    """Relevance maps of sample images."""

    __pydantic_config__ = _FORBID
    methods: tuple[Literal["gradcam"], ...] = _key(("gradcam",), "relevance methods")
    images: int = _key(8, "sample images")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study."""

    __pydantic_config__ = _FORBID
    outputs: str = _key("outputs", "folder of everything the study writes")
    device: Literal["auto", "cpu", "cuda"] = _key("auto", "auto: cuda when there is one")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    conditions: dict[str, ConditionConfig] = field(
        default_factory=lambda: {
            "baseline": ConditionConfig(recipe="probe"),
            "finetuned": ConditionConfig(recipe="full"),
            "dora": ConditionConfig(recipe="dora"),
        }
    )
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    relevance: RelevanceConfig = field(default_factory=RelevanceConfig)
