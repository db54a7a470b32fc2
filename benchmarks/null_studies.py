"""Studies without an effect: paired differences whose true mean is zero, simulated, or drawn from a study's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

ALPHA = 0.05
METRICS, LAYERS, HEADS = 3, 6, 4


def band(studies: int, rate: float = ALPHA) -> tuple[float, float]:
    """Shares of `studies` that a true rate of `rate` gives with a probability of 99 %."""
    low, high = stats.binom.interval(0.99, studies, rate)
    return float(low) / studies, float(high) / studies


def autoregressive(size: int, rho: float) -> Floats:
    """Correlation ρ^|i−j|, as of neighbouring layers."""
    return rho ** np.abs(np.subtract.outer(np.arange(size), np.arange(size)))


def exchangeable(size: int, rho: float) -> Floats:
    """Correlation ρ between any two, as of heads or metrics."""
    return (1 - rho) * np.eye(size) + rho


def correlated(rng: np.random.Generator, images: int, *factors: Floats) -> Floats:
    """Standard normal values [image, ...], one trailing axis for each correlation matrix."""
    z = rng.normal(size=(images, *map(len, factors)))
    for axis, factor in enumerate(factors, start=1):
        z = np.moveaxis(np.tensordot(z, np.linalg.cholesky(factor), axes=(axis, 1)), -1, axis)
    return z


def _scales(rng: np.random.Generator, z: Floats, drawn: Callable[[int], Floats]) -> Floats:
    """One scale per image, that multiplies all its differences."""
    return drawn(len(z)).reshape(-1, *[1] * (z.ndim - 1))


def _t4(rng: np.random.Generator, z: Floats) -> Floats:
    return z / np.sqrt(_scales(rng, z, lambda n: rng.chisquare(4, n) / 2))


def _mixture(rng: np.random.Generator, z: Floats) -> Floats:
    outlying = _scales(rng, z, lambda n: (rng.random(n) < 0.1).astype(np.float64))
    return ((1 + 2 * outlying) * z + outlying - 0.1) / np.sqrt(1.89)


def _lognormal(sigma: float) -> Callable[[np.random.Generator, Floats], Floats]:
    mean = np.exp(sigma**2 / 2)
    return lambda rng, z: (np.exp(sigma * z) - mean) / (mean * np.sqrt(np.expm1(sigma**2)))


def _skewed(rng: np.random.Generator, z: Floats) -> Floats:
    return (z + (z**2 - 1) / 2) * np.sqrt(_scales(rng, z, lambda n: rng.gamma(2.0, 0.5, n)) / 1.5)


KINDS: Mapping[str, Callable[[np.random.Generator, Floats], Floats]] = {
    "normal": lambda rng, z: z,
    "t4": _t4,  # multivariate: one scale per image
    "mixture": _mixture,  # one image in ten: a mean of 1 and three times the spread
    "exponential": lambda rng, z: -np.log(ndtr(-z)) - 1,
    "lognormal .5": _lognormal(0.5),
    "lognormal 1": _lognormal(1.0),
    "skewed": _skewed,  # z + (z² − 1)/2, and images that vary more than others
}
"""Differences of mean 0 and variance 1 from correlated standard normal ones, [image, ...]."""


@dataclass(frozen=True)
class Population:
    """Where null studies come from: differences [image, line, layer, head] whose mean is zero in every test.

    A line is a metric, or one region of a metric; families are the metrics.
    """

    name: str
    draw: Callable[[np.random.Generator, int], Floats]
    sd: Floats  # [line, layer, head]
    line_families: Indices  # [line]

    @property
    def families(self) -> Indices:
        """[test], in the order of the differences."""
        return np.repeat(self.line_families, self.sd[0].size)


def simulated(kind: str) -> Population:
    """Metrics correlated at .6, layers at .8 from neighbour to neighbour, heads at .3, all in a Gaussian copula."""
    factors = exchangeable(METRICS, 0.6), autoregressive(LAYERS, 0.8), exchangeable(HEADS, 0.3)
    margin = KINDS[kind]
    return Population(
        kind,
        lambda rng, images: margin(rng, correlated(rng, images, *factors)),
        np.ones((METRICS, LAYERS, HEADS)),
        np.arange(METRICS),
    )


def of_table(table: xr.Dataset, condition: str, against: str = "baseline") -> Population:
    """A study's own differences, centred; images are drawn with replacement, all their differences together."""
    lines, families = [], []
    for family, name in enumerate(sorted(map(str, table.data_vars))):  # in one order, however the table lists them
        values = table[name]
        d = (values.sel(condition=condition) - values.sel(condition=against)).mean("seed").astype(np.float64)
        d = d.expand_dims("region") if "region" not in d.dims else d
        lines.append(d.transpose("image", "region", "layer", "head").values)
        families += [family] * d.sizes["region"]
    rows = np.concatenate(lines, axis=1)
    rows -= rows.mean(axis=0)
    return Population(
        f"study: {condition}",
        lambda rng, images: rows[rng.integers(0, len(rows), images)],
        rows.std(axis=0),
        np.array(families),
    )


def of_study(path: Path) -> list[Population]:
    """The populations of `attention_metrics.zarr`: one of each condition but the baseline."""
    table = xr.open_zarr(path, consolidated=False).load()
    return [of_table(table, str(name)) for name in table["condition"].values if name != "baseline"]
