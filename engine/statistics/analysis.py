"""Every analysis of a study's table, with one set of settings."""

from __future__ import annotations

import numpy as np
import xarray as xr

from engine.config import chosen_metrics
from engine.statistics.clusters import layer_clusters
from engine.statistics.comparison import Comparison
from engine.statistics.conditions import compare_conditions
from engine.statistics.multiverse import compare_conventions
from engine.statistics.pairing import metric_series, series_name
from engine.statistics.patterns import layer_trend
from engine.statistics.relations import cross_metric_correlation
from engine.statistics.results import DEFAULTS, Settings, finite
from engine.statistics.runs import compare_runs, control_runs


def analyse(table: xr.Dataset, settings: Settings = DEFAULTS) -> Comparison:
    """What a study says of its table: what `attention_comparison.json` holds of description and inference.

    Args:
        table: metrics over (condition, seed, image, layer, head[, region]), as in `compare_conditions`. The attribute
            `conventions` names, as JSON, those that were measured as other conventions of the rest.
        settings: how tests and intervals are made.
    Returns:
        Layer means of every condition, `tests` (`compare_conditions`), `trends` (`layer_trend`), `clusters`
        (`layer_clusters`) and `relations` (`cross_metric_correlation`), all without the other conventions, which are
        in `multiverse` (`compare_conventions`) alone, empty where none were asked for; where conditions have 2 runs or
        more, `crossed` and `run_spreads` (`compare_runs`) and `run_controls` (`control_runs`). All but the last are
        empty with a single condition, and so is what the study knows besides.
    Raises:
        InputError: as `compare_conditions`.
    """
    multiverse = compare_conventions(table, settings) if "conventions" in table.attrs else []
    table = chosen_metrics(table)
    crossed, spreads = compare_runs(table, settings)
    return Comparison(
        tests=tuple(compare_conditions(table, settings)),
        layers=tuple(str(site) for site in table["site"].values),
        units={str(metric): variable.attrs["units"] for metric, variable in table.data_vars.items()},
        conditions={str(name): _layer_means(table.sel(condition=name)) for name in table["condition"].values},
        clusters=tuple(layer_clusters(table, settings)),
        crossed=tuple(crossed),
        multiverse=tuple(multiverse),
        relations=tuple(cross_metric_correlation(table, settings)),
        run_controls=tuple(control_runs(table, settings)),
        run_spreads=tuple(spreads),
        settings=settings,
        trends=tuple(layer_trend(table, settings)),
    )


def _layer_means(condition: xr.Dataset) -> dict[str, tuple[float | None, ...]]:
    """Of the values that are finite, as in the tests; None where there are none."""
    over = [dim for dim in condition.dims if dim not in ("layer", "region")]
    known = condition.astype(np.float64).where(np.isfinite(condition))
    return {
        series_name(metric, region): tuple(map(finite, means.values))
        for metric, region, means in metric_series(known.mean(over))
    }
