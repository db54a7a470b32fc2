"""Does a finding depend on the convention? The same comparison by every way to measure a thing and to sum up heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from engine.config import chosen_metrics
from engine.statistics.arrays import Floats, defined_mean
from engine.statistics.paired import compare_columns
from engine.statistics.pairing import ConditionPairs, MetricPairs, paired_conditions
from engine.statistics.results import DEFAULTS, Multiverse, Settings, Specification, build

# Of the greatest value: what multiples of each other may be apart. Sums of rows that were stored as float16 are off 1
# by this much, mean over queries and heads.
_ROUNDING = 1e-4


def compare_conventions(table: xr.Dataset, settings: Settings = DEFAULTS) -> list[Multiverse]:
    """Compare every layer of two conditions by every specification: convention of the metric × what heads become.

    Metrics whose attribute `construct` is the same measure one thing by different conventions. The study's own
    specification is a metric that was asked for, its heads averaged. Heads become their mean, median or greatest value
    in an image (seeds averaged first, as in the layer level of `compare_conditions`). Specifications that differ by a
    constant factor in a layer have the same test and count once: other units (the attribute `convention` is the same),
    the median of two heads, rows that are renormalised where there is no prefix. One that has a single value in all
    images and both conditions measures nothing there and does not count.

    Args:
        table: as in `compare_conditions`; its attribute `conventions` names, as JSON, the metrics that were measured
            beside those asked for.
        settings: as in `compare_conditions`.
    Returns:
        One result per condition, metric asked for (in each of its regions) and layer in which it has a value. A
        specification's `p_max_t` is over its own layers, as if it were the study's only one; its `p_joint` is over the
        layers of all specifications of that metric, and holds the family-wise error whichever of them is picked.
    Raises:
        InputError: as `compare_conditions`.
    Source:
        Steegen et al. (2016), doi:10.1177/1745691616658637; Simonsohn, Simmons and Nelson (2020),
        doi:10.1038/s41562-020-0912-z; the joint test as in Girardi et al. (2024), doi:10.1007/s11336-024-09973-6.
    """
    chosen = set(chosen_metrics(table))
    return [
        result
        for paired in paired_conditions(table, settings.against, None)
        for metric in paired.metrics
        if metric.identity["metric"] in chosen
        for result in _compare(paired, _conventions(table, metric, paired.metrics), settings)
    ]


def _conventions(table: xr.Dataset, own: MetricPairs, metrics: Sequence[MetricPairs]) -> list[MetricPairs]:
    """A metric, then the others that measure the same, in the same region; none that rescales another."""

    def declared(metric: MetricPairs, attribute: str) -> str:
        name = metric.identity["metric"]
        return str(table[name].attrs.get(attribute, name))

    conventions = {declared(own, "convention"): own}
    for metric in metrics:
        same_region = metric.identity["region"] == own.identity["region"]
        if same_region and declared(metric, "construct") == declared(own, "construct"):
            conventions.setdefault(declared(metric, "convention"), metric)
    return list(conventions.values())


def _median(values: Floats) -> Floats:
    """Over the last axis, of the values that are not NaN."""
    ranked = np.sort(values, axis=-1)  # NaN goes last
    count = (~np.isnan(values)).sum(axis=-1, keepdims=True)
    middle = [
        np.take_along_axis(ranked, place, axis=-1)[..., 0] for place in (np.maximum(count - 1, 0) // 2, count // 2)
    ]
    return np.asarray(np.where(count[..., 0] > 0, (middle[0] + middle[1]) / 2, np.nan))


_HEADS: Mapping[str, Callable[[Floats], Floats]] = {
    "mean": lambda values: defined_mean(values, axis=-1),
    "median": _median,
    "max": lambda values: np.fmax.reduce(values, axis=-1),
}


def _compare(paired: ConditionPairs, conventions: Sequence[MetricPairs], settings: Settings) -> Iterator[Multiverse]:
    ways = [(metric, heads) for metric in conventions for heads in _HEADS]
    values = np.stack([_HEADS[heads](metric.over_seeds())[:, :, paired.layers] for metric, heads in ways], axis=2)
    a, b = values
    joint = compare_columns(a.reshape(len(a), -1), b.reshape(len(b), -1), **settings.resampling())
    columns = {name: joint.columns[name].reshape(a.shape[1:]) for name in ("difference", "dz", "p_max_t")}
    columns["p_joint"] = columns.pop("p_max_t")
    alone = [compare_columns(a[:, way], b[:, way], **settings.resampling()) for way in range(len(ways))]
    columns["p_max_t"] = np.stack([one.columns["p_max_t"] for one in alone])
    sign = np.sign(columns["difference"])
    columns["same_sign"] = sign == sign[0]
    for place, layer in enumerate(paired.layers):
        if np.isnan(sign[0, place]):
            continue
        rows = _distinct(values[..., place])
        named = [
            {"metric": metric.identity["metric"], "unit": metric.identity["unit"], "heads": heads}
            for metric, heads in (ways[row] for row in rows)
        ]
        yield Multiverse(
            **conventions[0].identity,
            layer=paired.layer_ids[layer],
            site=paired.sites[layer],
            specifications=tuple(build(Specification, named, {name: of[rows, place] for name, of in columns.items()})),
        )


def _distinct(values: Floats) -> list[int]:
    """Of specifications [side, image, specification], the first and those that it and others do not repeat."""
    kept = [0]
    for way in range(1, values.shape[2]):
        one = values[:, :, way]
        known = one[np.isfinite(one)]
        if known.size and known.min() < known.max() and not any(_proportional(values[:, :, k], one) for k in kept):
            kept.append(way)
    return kept


def _proportional(one: Floats, other: Floats) -> bool:
    """Whether two arrays are constant multiples of each other, by a positive factor and up to rounding."""
    known = np.isfinite(one)
    if (known != np.isfinite(other)).any():
        return False
    one, other = one[known], other[known]
    norm = float(one @ one)
    factor = float(one @ other) / norm if norm else 0.0
    return factor > 0 and bool(np.abs(other - factor * one).max() <= _ROUNDING * np.abs(other).max())
