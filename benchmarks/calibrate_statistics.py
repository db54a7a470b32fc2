"""Does the inference over images do what it says? Null studies by the thousand, through the functions a study calls.

    python -m engine.run        once: a study, whose own differences are drawn from, beside the simulated ones
    python -m benchmarks.calibrate_statistics [--table outputs/metrics/attention_metrics.zarr] [--parts study,report]

writes docs/statistics_calibration.json, entry by entry as they are done, and from it docs/statistics_calibration.svg;
40 minutes of one core. The same numbers each time. `tests/test_statistics_calibration.py` runs the same
simulations with fewer studies.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

from benchmarks.calibration_figure import draw
from benchmarks.null_studies import (
    ALPHA,
    KINDS,
    Floats,
    Indices,
    Population,
    autoregressive,
    correlated,
    exchangeable,
    of_study,
    simulated,
)
from engine.statistics import Settings, analyse
from engine.statistics.bootstrap import Bootstrap, bootstrap_max_t
from engine.statistics.clusters import cluster_test
from engine.statistics.multiplicity import benjamini_hochberg, holm, holm_over_families
from engine.statistics.permutation import sign_flip

SIZES = (20, 50, 200, 1000)
RESAMPLES = 1199  # 5 % shared by 3 or 6 families, half of it for each tail, is a whole number of 1,200
MORE_RESAMPLES = 5999
SHIFT = 4.5  # standard errors
PARTS = ("simulated", "study", "few_images", "more_resamples", "report", "layer_means")
PLACES = (3, 4)  # layers whose first head has an effect
REPORT = {"images": 60, "metrics": 4, "layers": 6, "heads": 4, "classes": 6}


def of_t(d: Floats) -> dict[str, Floats]:
    """p-values [test] of Student's t of differences [image, test], by adjustment."""
    p = stats.ttest_1samp(d, 0).pvalue
    return {"holm": holm(p), "benjamini_hochberg": benjamini_hochberg(p), "uncorrected": p}


def max_t(
    d: Floats, shifted: Floats, changed: Indices, families: Indices, seed: int, resamples: int
) -> tuple[Bootstrap, Floats, Floats]:
    """The bootstrap of d [image, test], and adjusted p-values [test]: of d, and of it with the `changed` tests shifted.

    Centred, a shifted test is what it was: beside its twin it adds nothing to its family's greatest t, so that one set
    of resamples gives both.
    """
    both = np.concatenate([d, shifted[:, changed]], axis=1)
    of_both = np.concatenate([families, families[changed]])
    found = bootstrap_max_t(both, of_both, resamples=resamples, confidence=1 - ALPHA, seed=seed)
    of_null, of_changed = np.split(found.p_max_t, [families.size])
    of_shifted = of_null.copy()
    of_shifted[changed] = of_changed
    return found, holm_over_families(of_null, families), holm_over_families(of_shifted, families)


def image_level(
    population: Population, images: int, studies: int, seed: int, resamples: int = RESAMPLES
) -> dict[str, Any]:
    """Studies without an effect, and the same with one of `SHIFT` standard errors in one test of each family.

    `error`: share of null studies in which anything is called different, by method. `coverage`: share in which all
    simultaneous intervals cover 0, and in which a random test's own interval does. `power`: share of the effects that
    are found; they are in random tests, in either direction.
    """
    families = population.families
    each = np.unique(families)
    error, covered, power = Counter[str](), Counter[str](), Counter[str]()
    for study in range(studies):
        rng = np.random.default_rng([seed, images, study])
        null = population.draw(rng, images)
        d = null.reshape(images, -1)
        changed = np.array([rng.choice(np.flatnonzero(families == family)) for family in each])
        size = SHIFT * population.sd.ravel()[changed] / np.sqrt(images)
        shifted = d.copy()
        shifted[:, changed] += size * rng.choice([-1, 1], each.size)

        found, p_null, p_shifted = max_t(d, shifted, changed, families, study, resamples)
        by_method = {"max_t": p_null}
        by_method["sign_flip"] = sign_flip(d, permutations=resamples, seed=study).p_max_t
        by_method |= of_t(d)
        error.update(name for name, p in by_method.items() if (p <= ALPHA).any())
        clusters = cluster_test(null.mean(axis=3), permutations=resamples, seed=study)
        error["clusters"] += any(cluster.p <= ALPHA for cluster in clusters)
        low, high = found.simultaneous[:, : families.size]
        covered["simultaneous"] += not ((low > 0) | (high < 0)).any()
        covered["bca"] += bool(np.prod(found.interval[:, rng.integers(families.size)]) <= 0)

        by_method = {"max_t": p_shifted}
        by_method["sign_flip"] = sign_flip(shifted, permutations=resamples, seed=study).p_max_t
        by_method |= of_t(shifted)
        power.update({name: int((p[changed] <= ALPHA).sum()) for name, p in by_method.items()})
    return {
        "kind": population.name,
        "images": images,
        "tests": families.size,
        "families": each.size,
        "studies": studies,
        "resamples": resamples,
        "error": {name: error[name] / studies for name in (*by_method, "clusters")},
        "coverage": {name: count / studies for name, count in covered.items()},
        "power": {name: power[name] / (studies * each.size) for name in by_method if name != "uncorrected"},
    }


def report_table(rng: np.random.Generator, effect: float = 0.0) -> xr.Dataset:
    """A small study of two conditions and a baseline; an effect, if any, in the first head of the layers `PLACES`.

    Differences are "lognormal .5", correlated over conditions (.5), metrics (.6), layers (.8) and heads (.3).
    """
    images, metrics, layers, heads = (REPORT[name] for name in ("images", "metrics", "layers", "heads"))
    factors = exchangeable(2, 0.5), exchangeable(metrics, 0.6), autoregressive(layers, 0.8), exchangeable(heads, 0.3)
    d = KINDS["lognormal .5"](rng, correlated(rng, images, *factors))
    d[:, :, :, PLACES, 0] += effect
    baseline = rng.normal(size=d[:, :1].shape)
    values = np.moveaxis(np.concatenate([baseline, baseline + d], axis=1), (2, 1), (0, 1))[:, :, None]
    dims = ("condition", "seed", "image", "layer", "head")
    names = ("distance", "entropy", "morans_i", "prefix_mass")  # all but the last are primary
    return xr.Dataset(
        {name: (dims, of_metric, {"units": "1"}) for name, of_metric in zip(names, values, strict=True)},
        {
            "condition": ["baseline", "first", "second"],
            "seed": [0],
            "layer": np.arange(layers),
            "site": ("layer", [f"blocks.{layer}.attn" for layer in range(layers)]),
            "head": np.arange(heads),
            "class_name": ("image", [str(image % REPORT["classes"]) for image in range(images)]),
        },
    )


def whole_report(studies: int, seed: int, effect: float = 0.0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Share of studies in which a report claims something that is not there, by what makes the claim.

    `primary`: the primary layer means; `gated`: these, or a head with p_gated. Without an effect also the others, over
    both conditions, and `anything`: any of them. With an effect only the layers and heads that have none count.
    """
    found = Counter[str](primary=0, gated=0)
    for study in range(studies):
        table = report_table(np.random.default_rng([seed, study]), effect)
        result = analyse(table, Settings(permutations=resamples, seed=study))
        tests = [test for test in result.tests if not (effect and test.layer in PLACES and test.head in (None, 0))]
        claims = {
            "primary" if test.role == "primary" else test.level
            for test in tests
            if test.level != "layer_means" and test.survives(ALPHA)
        }
        gated = any(test.p_gated is not None and test.p_gated <= ALPHA for test in tests)
        found["gated"] += gated or "primary" in claims
        if effect:
            found["primary"] += "primary" in claims
            continue
        claims |= {"clusters" for cluster in result.clusters if cluster.survives(ALPHA)}
        claims |= {"trends" for trend in result.trends if trend.survives(ALPHA)}
        found.update(claims)
        found["anything"] += bool(claims)
    shares = {name: count / studies for name, count in sorted(found.items())}
    return {"effect": effect, "studies": studies, "resamples": resamples, "claimed": shares}


def layer_means(studies: int, seed: int, rho: float, layers: int = 12) -> float:
    """Share of null studies in which a paired t-test over layer means is below 5 %, layers correlated at ρ."""
    mix = np.linalg.cholesky(autoregressive(layers, rho))
    d = np.random.default_rng([seed, round(100 * rho)]).normal(size=(studies, layers)) @ mix.T
    return float((stats.ttest_1samp(d, 0, axis=1).pvalue <= ALPHA).mean())


def entries(part: str, studies: int, table: Path, seed: int = 1) -> Iterator[dict[str, Any]]:
    """The simulations of one part of docs/statistics_calibration.json, in turn; rates are shares of the studies."""
    match part:
        case "simulated":
            for place, kind in enumerate(KINDS):
                for images in SIZES:
                    yield image_level(simulated(kind), images, studies, 100 * seed + place)
        case "study":
            for place, population in enumerate(of_study(table)):
                for images in SIZES:
                    yield image_level(population, images, studies, 100 * seed + 50 + place)
        case "few_images":  # where `compare_paired` flips signs
            for place, population in enumerate([simulated("normal"), simulated("exponential"), *of_study(table)]):
                yield image_level(population, 12, studies, 100 * seed + 60 + place)
        case "more_resamples":
            for place, kind in enumerate(KINDS):
                if kind in ("normal", "lognormal 1"):
                    yield image_level(simulated(kind), 50, studies, 100 * seed + place, MORE_RESAMPLES)
        case "report":
            for effect in (0.0, 4.0):
                yield whole_report(studies // 2, seed + 1, effect)
        case "layer_means":
            for rho in (0.0, 0.5, 0.8, 0.9):
                yield {"studies": 10 * studies, "rho": rho, "rate": layer_means(10 * studies, seed + 3, rho)}


def page_table(results: Mapping[str, Any]) -> list[str]:
    """The rows of docs/statistics.md's table: errors, then power, in %, at each number of images."""
    columns = [("error", name) for name in ("max_t", "sign_flip", "benjamini_hochberg", "clusters")]
    columns += [("power", name) for name in ("max_t", "sign_flip")]
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for entry in (*results["simulated"], *results["study"]):
        by_kind.setdefault(entry["kind"], []).append(entry)
    digits = {"error": 1, "power": 0}
    return [
        "| "
        + " | ".join(
            [kind]
            + [" / ".join(f"{100 * cell[group][name]:.{digits[group]}f}" for cell in cells) for group, name in columns]
        )
        + " |"
        for kind, cells in by_kind.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--table", type=Path, default=Path("outputs/metrics/attention_metrics.zarr"))
    parser.add_argument("--parts", default=",".join(PARTS), help="only these, comma-separated; none: only the figure")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    parts = [part for part in arguments.parts.split(",") if part != "none"]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no part is called {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    if {"study", "few_images"} & set(parts) and not arguments.table.exists():
        parser.error(f"--table: {arguments.table} is not there; make it with `python -m engine.run`")
    path = arguments.docs / "statistics_calibration.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in parts:
        results[part] = []
        for entry in entries(part, arguments.studies, arguments.table):
            results[part].append(entry)
            path.write_text(
                json.dumps({key: results[key] for key in PARTS if key in results}, indent=1) + "\n", encoding="utf-8"
            )
            print(part, entry, flush=True)
    draw(results, path.with_suffix(".svg"))
    print(*page_table(results), sep="\n")


if __name__ == "__main__":
    main()
