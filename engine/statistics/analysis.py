"""Every analysis of a study's table, with one set of settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import xarray as xr

from engine.statistics.clusters import layer_clusters
from engine.statistics.conditions import compare_conditions
from engine.statistics.patterns import cross_metric_correlation, layer_trend


def analyse(
    table: xr.Dataset,
    *,
    against: str = "baseline",
    permutations: int = 9999,
    bootstrap: int = 2000,
    confidence: float = 0.95,
    alpha: float = 0.05,
    power: float = 0.8,
    equivalence: Mapping[str, float] | None = None,
    cluster_alpha: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """What a study says of its table: the parts of attention_comparison.json that are inference or description.

    Args:
        table, against, permutations, bootstrap, confidence, alpha, power, equivalence, seed: as in
            `compare_conditions`.
        cluster_alpha: as in `layer_clusters`.
    Returns:
        `settings` (the arguments: a reader of the results learns there how they were made), `tests`
        (`compare_conditions`), `trends` (`layer_trend`), `clusters` (`layer_clusters`) and `relations`
        (`cross_metric_correlation`); all but the settings are empty with a single condition.
    Raises:
        InputError: as `compare_conditions`.
    """
    settings = {
        "against": against,
        "permutations": permutations,
        "bootstrap": bootstrap,
        "confidence": confidence,
        "alpha": alpha,
        "power": power,
        "equivalence": dict(equivalence or {}),
        "cluster_alpha": cluster_alpha,
        "seed": seed,
    }
    return {
        "settings": settings,
        "tests": compare_conditions(
            table,
            against=against,
            permutations=permutations,
            bootstrap=bootstrap,
            confidence=confidence,
            seed=seed,
            alpha=alpha,
            power=power,
            equivalence=equivalence,
        ),
        "trends": layer_trend(
            table, against=against, permutations=permutations, bootstrap=bootstrap, confidence=confidence, seed=seed
        ),
        "clusters": layer_clusters(
            table, against=against, permutations=permutations, cluster_alpha=cluster_alpha, seed=seed
        ),
        "relations": cross_metric_correlation(table, against=against),
    }
