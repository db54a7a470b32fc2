"""attention_comparison.json: every condition's mean a layer, and every test."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from train.whole_files import write_atomically

SCHEMA = 1


def comparison_document(
    table: xr.Dataset, tests: Sequence[Mapping[str, Any]], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The document: `schema`, `layers`, `units`, `conditions`, `tests`, then the keys of `extra` in alphabetical order.

    `conditions` holds a list a condition and metric with one value a layer: the mean over seeds, images and heads of
    the values that are defined, in the metric's unit. A metric with regions has a list a region under
    "metric[region]", for example `region_mass[target_digit]`. NaN is null.

    Args:
        table: metrics over (condition, seed, image, layer, head[, region]), with `site` [layer] and attributes `units`.
        tests: entries of `engine.statistics.compare_conditions`.
        extra: further keys, such as `controls`, `data` or `accuracy`; NumPy scalars and arrays become plain.
    Raises:
        ValueError: a key of `extra` is one of the document's own, or a value is infinite or cannot be written as JSON.
    """
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "layers": [str(site) for site in table["site"].values],
        "units": {str(metric): variable.attrs.get("units") for metric, variable in table.data_vars.items()},
        "conditions": {
            str(condition): _layer_means(table.sel(condition=condition)) for condition in table["condition"].values
        },
        "tests": list(tests),
    }
    extra = extra or {}
    taken = sorted(set(document) & set(extra))
    if taken:
        raise ValueError(f"the extra keys {', '.join(taken)} are the document's own; give them other names")
    document |= {key: extra[key] for key in sorted(extra)}
    plain: dict[str, Any] = _plain(document, "document")
    return plain


def write_comparison(path: str | os.PathLike[str], document: Mapping[str, Any]) -> None:
    """Write a document as JSON: all of it or nothing, the same bytes for the same document.

    Raises:
        ValueError: the document holds NaN or infinity.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(Path(path), text.encode("utf-8"))


def _layer_means(condition: xr.Dataset) -> dict[str, list[float]]:
    """Metric, or metric[region] -> mean over seeds, images and heads, one value a layer."""
    means = {}
    for metric, variable in condition.data_vars.items():
        over = [dim for dim in variable.dims if dim not in ("layer", "region")]
        layers = variable.astype(np.float64).mean(over, skipna=True)
        if "region" in layers.dims:
            for region, values in zip(layers["region"].values, layers.transpose("region", "layer").values, strict=True):
                means[f"{metric}[{region}]"] = values.tolist()
        else:
            means[str(metric)] = layers.values.tolist()
    return means


def _plain(value: Any, where: str) -> Any:
    """The value in JSON's own types, NaN as None; `where` names it in errors."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist(), where)
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"{where} is infinite; JSON has finite numbers and null only")
        return None if math.isnan(value) else value
    if value is None or isinstance(value, (str, int, bool)):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}; expected numbers, text, lists and mappings")
