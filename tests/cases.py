"""Attention that is hard to measure, seeded, and the one table of tolerances; shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from kernels import BACKENDS, METRICS, TokenLayout

__all__ = [
    "CASES",
    "CPU_BACKENDS",
    "DTYPES",
    "FROM_QK",
    "QK_BACKENDS",
    "TOLERANCE",
    "Case",
    "layout",
    "metrics_for",
    "rounded",
    "vit_qk",
]

# What measures stored maps on any machine. Backends that need a GPU are held to the same cases in tests of their own.
CPU_BACKENDS = tuple(name for name, spec in BACKENDS.items() if "cpu" in spec.devices and name != "sdpa")
# The same from query and key without a bias.
QK_BACKENDS = (*CPU_BACKENDS, "sdpa")
DTYPES = ("float16", "bfloat16", "float32", "float64")

# Largest absolute error against the float64 reference on the same (rounded) input, in the metric's unit.
TOLERANCE = dict.fromkeys(METRICS, 2e-5) | {
    "distance": 2e-6,
    "distance_px": 1e-3,  # 2e-6 of a diagonal of up to 475 px
    "distance_walmer": 5e-6,  # a diagonal is up to 2.3 sides
    "distance_seed1": 2e-6,
    "entropy": 1e-5,
    "entropy_normalized": 1e-5,
    "entropy_seed1": 1e-5,
    "morans_i_received": 5e-4,
    "sink_share": 2e-6,
    "gearys_c": 5e-5,
    "gini": 5e-6,
    "prefix_mass": 2e-6,
    "cls_entropy": 1e-5,
    "region_mass": 2e-6,
    "js_divergence": 2e-6,
}
# The same from float32 query and key, where logits carry rounding of their own.
FROM_QK = {name: max(tolerance, 2e-5) for name, tolerance in TOLERANCE.items()}


def metrics_for(of: TokenLayout) -> list[str]:
    """The metrics of one attention that this layout has: without a class token, none of its row."""
    return [
        name
        for name, spec in METRICS.items()
        if spec.inputs != "pair" and (of.class_token or not name.startswith("cls_"))
    ]


def layout(rows: int, cols: int, prefix: int, height: int = 16, width: int = 16) -> TokenLayout:
    return TokenLayout(
        grid_rows=rows, grid_cols=cols, num_prefix_tokens=prefix, patch_height_px=height, patch_width_px=width
    )


@dataclass(frozen=True)
class Case:
    """Attention [image, head, query, key] in float64, made from a seed."""

    name: str
    layout: TokenLayout
    make: Callable[[TokenLayout, np.random.Generator], np.ndarray]

    def attention(self) -> np.ndarray:
        """Made once; not to be written to."""
        return _attention(self)

    def regions(self) -> np.ndarray:
        """Coverage [image, region, patch] of two regions in each image."""
        images, _, _, _ = _shape(self.layout)
        return np.random.default_rng(7).uniform(size=(images, 2, self.layout.num_patches))

    def __str__(self) -> str:
        return self.name


@cache
def _attention(case: Case) -> np.ndarray:
    seed = sum(ord(letter) * (i + 1) for i, letter in enumerate(case.name))
    attention = case.make(case.layout, np.random.default_rng(seed))
    attention.setflags(write=False)
    return attention


def rounded(attention: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values after rounding to a dtype: what every backend, the reference included, is given."""
    if dtype == "bfloat16":
        bits = attention.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)  # to nearest, ties to even
        return bits.view(np.float32).astype(np.float64)
    return attention.astype(dtype).astype(np.float64)


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _shape(of: TokenLayout) -> tuple[int, int, int, int]:
    images = 2 if of.num_patches < 400 else 1  # the reference takes a second a map on the large grids
    return images, 3, of.num_tokens, of.num_tokens


def trained(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """Local and scattered heads of several temperatures, with a sink on the prefix, as trained models have."""
    logits = rng.normal(size=_shape(of)) * np.array([0.5, 2.0, 5.0])[:, None, None]
    nearness = -of.distances() * np.array([2.0, 20.0, 6.0])[:, None, None]
    patches = of.patches(logits)
    patches += nearness
    of.prefix(logits)[...] += 3.0
    return _softmax(logits)


def near_uniform(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """Rows with a relative spread of 5e-4: uncentred float32 sums turn to noise here."""
    return _softmax(5e-4 * rng.normal(size=_shape(of)))


def constant(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """Uniform rows among others: no Moran's I, entropy ln N."""
    attention = trained(of, rng)
    attention[0] = 1.0 / of.num_tokens
    attention[1, 0, ::2] = 1.0 / of.num_tokens
    return attention


def one_hot(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """All mass on one key, a prefix token at times: rows wholly on the prefix are undefined."""
    attention = np.zeros(_shape(of))
    keys = rng.integers(of.num_tokens, size=attention.shape[:-1])
    np.put_along_axis(attention, keys[..., None], 1.0, axis=-1)
    return attention


def on_prefix(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """Maps with every row on the first token, and maps with some; without a prefix that token is a patch."""
    attention = trained(of, rng)
    attention[0, 0] = 0.0
    attention[0, 0, :, 0] = 1.0
    attention[1, 1, ::3] = 0.0
    attention[1, 1, ::3, 0] = 1.0
    return attention


def subnormal(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """All but 1e-38 to 1e-43 of a row on the first token: squares of what is left underflow in float32.

    In float16 these rows are wholly on that token.
    """
    scale = 10.0 ** -np.array([38.0, 40.5, 43.0])[:, None, None]
    attention = rng.uniform(0.5, 8.0, size=_shape(of)) * scale
    attention[..., 0] = 1.0
    return attention


def double_subnormal(of: TokenLayout, rng: np.random.Generator) -> np.ndarray:
    """The same at the end of float64's range; in the other dtypes these rows are wholly on the first token."""
    attention = rng.uniform(0.5, 8.0, size=_shape(of)) * 1e-310
    attention[..., 0] = 1.0
    return attention


CASES = (
    Case("trained 14×14, prefix 1", layout(14, 14, 1), trained),
    Case("trained 7×11, prefix 0", layout(7, 11, 0, 16, 32), trained),
    Case("trained 1×13, prefix 2", layout(1, 13, 2), trained),
    Case("trained 13×1, prefix 1", layout(13, 1, 1), trained),
    Case("trained 1×2, prefix 1", layout(1, 2, 1), trained),
    Case("trained 24×24, prefix 5", layout(24, 24, 5, 14, 14), trained),
    Case("near-uniform 14×14, prefix 1", layout(14, 14, 1), near_uniform),
    Case("near-uniform 7×11, prefix 5", layout(7, 11, 5), near_uniform),
    Case("constant 7×11, prefix 1", layout(7, 11, 1), constant),
    Case("constant 6×6, prefix 0", layout(6, 6, 0), constant),
    Case("one-hot 7×11, prefix 2", layout(7, 11, 2), one_hot),
    Case("on the prefix 7×11, prefix 5", layout(7, 11, 5), on_prefix),
    Case("on one patch 7×11, prefix 0", layout(7, 11, 0), on_prefix),
    Case("subnormal 7×11, prefix 1", layout(7, 11, 1), subnormal),
    Case("float64's subnormals 5×6, prefix 1", layout(5, 6, 1), double_subnormal),
)


def vit_qk(
    of: TokenLayout, head_dim: int, rng: np.random.Generator, spread: float = 1.5
) -> tuple[np.ndarray, np.ndarray]:
    """query and key [image, head, token, head_dim] float32, logits with a standard deviation of spread²."""
    shape = (2, 3, of.num_tokens, head_dim)
    query, key = (spread * rng.normal(size=shape).astype(np.float32) for _ in range(2))
    return query.astype(np.float32), key.astype(np.float32)
