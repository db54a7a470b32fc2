"""What keys of the configuration may be, by name. Nothing heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

# Data sets, and what the help says of each; how those on disk are read is in `train.data.datasets.KINDS`.
DATA_KINDS = {
    "digits": "embedded scenes of handwritten digits",
    "folder": "class folders under root",
    "indoor67": "MIT Indoor-67",
    "sports100": "100 Sports",
}
SplitRule = Literal["auto", "stratified", "official", "folders", "all"]
Precision = Literal["auto", "bf16", "fp32"]
Compile = Literal["auto", "on", "off"]
# paper: A Kaiming-uniform, B zero (Hu et al. 2021). pissa: the principal singular vectors of the weight, which keeps
# the rest (Meng et al. 2024). olora: a QR decomposition of it (Büyükakyüz 2024). eva: A from the singular vectors of
# the layer's inputs on training images, B zero (Paischer et al. 2024).
Init = Literal["paper", "pissa", "olora", "eva"]
Compression = Literal["plain", "sparse", "int1"]
# The names of initial values in the study that the sweep comes from.
SWEEP_INITS: dict[str, Init] = {"paper_init": "paper", "svd_init": "pissa"}

if TYPE_CHECKING:
    SweepInit = str
    DataKind = str
else:
    SweepInit = Literal[tuple(SWEEP_INITS)]
    DataKind = Literal[tuple(DATA_KINDS)]

# Placements of adapters by name; anything else is a regular expression.
TARGETS = {
    "attention": r"blocks\.\d+\.attn\.(qkv|proj)",
    "mlp": r"blocks\.\d+\.mlp\.(fc1|fc2)",
    "block9_fc1": r"blocks\.9\.mlp\.fc1",  # behind block 9's attention: the attention of blocks 0 to 9 cannot change
}


def target_pattern(targets: str) -> str:
    return TARGETS.get(targets, targets)
