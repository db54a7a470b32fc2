"""Does the inference do what it says? Null studies by the thousand, through the functions that a study calls.

    python -m benchmarks.calibrate_statistics [--studies 2000] [--docs docs]

writes docs/statistics_calibration.json and, drawn from it, docs/statistics_calibration.svg. The same numbers each time.
`tests/test_statistics_calibration.py` runs the same simulations with fewer studies.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from engine.statistics import compare_paired
from engine.statistics.bootstrap import bootstrap_interval
from engine.statistics.clusters import cluster_test
from engine.statistics.permutation import sign_flip

Floats = NDArray[np.float64]

ALPHA = 0.05
LAYERS, HEADS, METRICS = 6, 4, 3
IMAGES = 200
FLIPS = 999  # p = 50/1000 is exactly 5 %
RESAMPLES = 999
RUN_NOISE, IMAGE_NOISE = 0.05, 0.10


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


def null_differences(rng: np.random.Generator, images: int = IMAGES, skewed: bool = False) -> Floats:
    """Differences without an effect, [image, layer, head, metric]: correlated along every axis but the images.

    Layers .8 from neighbour to neighbour, heads .3, metrics .6; some images vary more than others, so that tails are
    heavy. Skewed: z + (z² − 1)/2 instead of z, of skewness 2.
    """
    factors = (autoregressive(LAYERS, 0.8), exchangeable(HEADS, 0.3), exchangeable(METRICS, 0.6))
    z = rng.normal(size=(images, LAYERS, HEADS, METRICS))
    z = np.einsum("ilhm,Ll,Hh,Mm->iLHM", z, *map(np.linalg.cholesky, factors), optimize=True)
    if skewed:
        z = z + (z**2 - 1) / 2
    return z * np.sqrt(rng.gamma(2.0, 0.5, size=(images, 1, 1, 1)))


def image_level(studies: int, seed: int, skewed: bool = False, flips: int = FLIPS) -> dict[str, float]:
    """Share of null studies in which anything is called different, by method, and how often intervals cover 0.

    Coverage is of one test a study, so that the trials are independent.
    """
    found: Counter[str] = Counter()
    for study in range(studies):
        d = null_differences(np.random.default_rng([seed, study]), skewed=skewed)
        result = compare_paired(np.zeros_like(d), d, permutations=flips, seed=study)
        clusters = cluster_test(np.moveaxis(d.mean(axis=2), 1, 2), permutations=flips, seed=study)
        low, high = bootstrap_interval(d[:, 0, 0, :1], resamples=RESAMPLES, confidence=1 - ALPHA, seed=study)
        found["one t-test"] += float(result.p_t[0, 0, 0]) <= ALPHA
        found["uncorrected"] += bool((result.p_t <= ALPHA).any())
        found["benjamini_hochberg"] += bool((result.p_bh <= ALPHA).any())
        found["holm"] += bool((result.p_holm <= ALPHA).any())
        found["max_t"] += bool((result.p_max_t <= ALPHA).any())
        found["clusters"] += any(cluster.p <= ALPHA for cluster in clusters)
        found["bca_coverage"] += bool(low[0] <= 0 <= high[0])
    return {name: count / studies for name, count in found.items()}


def skewed_images(studies: int, seed: int, images: int, flips: int = FLIPS) -> dict[str, float]:
    """Share of null studies with skewed differences in which max-T finds anything, and skewness/√n (median test)."""
    found, skewness = 0, 0.0
    for study in range(studies):
        d = null_differences(np.random.default_rng([seed, images, study]), images, skewed=True).reshape(images, -1)
        found += bool((sign_flip(d, permutations=flips, seed=study).p_max_t <= ALPHA).any())
        skewness += float(np.median(stats.skew(d, axis=0))) / np.sqrt(images) / studies
    return {"rate": found / studies, "skewness_by_root_n": float(skewness)}


def run_noise(studies: int, seed: int, images: int, runs: int, flips: int = FLIPS) -> dict[str, float]:
    """No effect of fine-tuning on average, but every run lands somewhere of its own: which tests hold their level?

    The first test of layers × metrics by itself, and the whole family; image-level tests of the first run and of the
    mean of all runs, and sign flips over the runs.
    """
    layers, metrics = autoregressive(LAYERS, 0.8), exchangeable(METRICS, 0.6)
    mix = np.linalg.cholesky(np.kron(layers, metrics))
    found: Counter[str] = Counter()
    for study in range(studies):
        rng = np.random.default_rng([seed, images, runs, study])
        of_runs = RUN_NOISE * rng.normal(size=(runs, 1, len(mix))) @ mix.T
        d = of_runs + IMAGE_NOISE * rng.normal(size=(runs, images, len(mix))) @ mix.T
        nothing = np.zeros(d.shape[1:])
        one = compare_paired(nothing, d[0], permutations=flips, seed=study)
        mean = compare_paired(nothing, d.mean(axis=0), permutations=flips, seed=study)
        over = compare_paired(np.zeros((runs, len(mix))), d.mean(axis=1), permutations=4095, seed=study)
        found["images_of_one_run"] += float(one.p_t[0]) <= ALPHA
        found["images_of_all_runs"] += float(mean.p_t[0]) <= ALPHA
        found["over_runs"] += float(over.p_resampled[0]) <= ALPHA
        found["images_of_one_run_family"] += bool((one.p_max_t <= ALPHA).any())
        found["over_runs_family"] += bool((over.p_max_t <= ALPHA).any())
        first = d[:, :, 0]
        half = stats.t.isf(ALPHA / 2, runs - 1) * stats.sem(first.mean(axis=1))
        found["student_coverage"] += bool(abs(first.mean()) <= half)
        low, high = bootstrap_interval(first[0][:, None], resamples=RESAMPLES, confidence=1 - ALPHA, seed=study)
        found["bca_of_one_run_coverage"] += bool(low[0] <= 0 <= high[0])
    return {name: count / studies for name, count in found.items()}


def nested_coverage(studies: int, seed: int, images: int, runs: int) -> float:
    """How often the nested interval (runs, then images) covers 0 under run noise."""
    groups = np.repeat(np.arange(runs), images)[:, None]
    covered = 0
    for study in range(studies):
        rng = np.random.default_rng([seed, images, runs, study])
        d = RUN_NOISE * rng.normal(size=(runs, 1)) + IMAGE_NOISE * rng.normal(size=(runs, images))
        low, high = bootstrap_interval(
            d.reshape(-1, 1), resamples=RESAMPLES, confidence=1 - ALPHA, seed=study, groups=groups
        )
        covered += bool(low[0] <= 0 <= high[0])
    return covered / studies


def layer_means(studies: int, seed: int, rho: float, layers: int = 12) -> float:
    """Share of null studies in which a paired t-test over layer means is below 5 %, layers correlated at ρ."""
    mix = np.linalg.cholesky(autoregressive(layers, rho))
    d = np.random.default_rng([seed, round(100 * rho)]).normal(size=(studies, layers)) @ mix.T
    return float((stats.ttest_1samp(d, 0, axis=1).pvalue <= ALPHA).mean())


def bca_coverage(studies: int, seed: int, images: int) -> float:
    """How often the BCa interval covers 0, one test a study."""
    covered = 0
    for study in range(studies):
        d = null_differences(np.random.default_rng([seed, images, study]), images)[:, 0, 0, :1]
        low, high = bootstrap_interval(d, resamples=RESAMPLES, confidence=1 - ALPHA, seed=study)
        covered += bool(low[0] <= 0 <= high[0])
    return covered / studies


def calibrate(studies: int, seed: int = 1) -> dict[str, Any]:
    """All simulations, as docs/statistics_calibration.json holds them; rates are shares of the studies."""
    fewer = studies // 2
    return {
        "alpha": ALPHA,
        "seed": seed,
        "design": {
            "images": IMAGES,
            "layers": LAYERS,
            "heads": HEADS,
            "metrics": METRICS,
            "tests": LAYERS * HEADS * METRICS,
            "flips": FLIPS,
            "resamples": RESAMPLES,
            "run_noise": RUN_NOISE,
            "image_noise": IMAGE_NOISE,
        },
        "image_level": {"studies": studies, **image_level(studies, seed)},
        "image_level_skewed": {"studies": fewer, **image_level(fewer, seed + 1, skewed=True)},
        "skewed_images": [
            {"studies": fewer, "images": images, **skewed_images(fewer, seed + 6, images)}
            for images in (200, 500, 1000, 2500)
        ],
        "run_noise": [
            {"studies": fewer, "images": images, "runs": runs, **run_noise(fewer, seed + 2, images, runs)}
            for images, runs in ((50, 6), (200, 6), (800, 6), (3200, 6), (200, 10))
        ],
        "layer_means": [
            {"studies": 10 * studies, "rho": rho, "rate": layer_means(10 * studies, seed + 3, rho)}
            for rho in (0.0, 0.5, 0.8, 0.9)
        ],
        "bca_coverage": [
            {"studies": studies, "images": images, "rate": bca_coverage(studies, seed + 4, images)}
            for images in (20, 50, 200, 1000)
        ],
        "nested_coverage": [
            {"studies": fewer, "images": 100, "runs": runs, "rate": nested_coverage(fewer, seed + 5, 100, runs)}
            for runs in (3, 6, 12, 24)
        ],
    }


STYLE: dict[Any, Any] = {
    "svg.hashsalt": "vit-attention-engine",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same glyphs on every machine
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 4.5,
}


def figure(results: Mapping[str, Any]) -> Any:
    """Three panels: the family-wise error, the unit of inference, the intervals."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from engine.report.marks import PALETTE

    blue, vermilion, green, grey = PALETTE[0], PALETTE[1], PALETTE[2], "#777777"
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(10.4, 3.5), layout="constrained")
        FigureCanvasAgg(drawn)
        errors, units, cover = drawn.subplots(1, 3, width_ratios=(1.0, 1.1, 1.0))

        image = results["image_level"]
        names = {
            "uncorrected": "t-tests",
            "benjamini_hochberg": "BH",
            "holm": "Holm",
            "max_t": "max-T",
            "clusters": "clusters of\nlayers",
        }
        low, high = (100 * edge for edge in band(image["studies"]))
        errors.axhspan(low, high, color=green, alpha=0.25, linewidth=0)
        errors.axhline(5, color=green, linewidth=0.8)
        for place, key in enumerate(names):
            rate = 100 * image[key]
            color = blue if low <= rate <= high else vermilion if rate > high else grey
            errors.bar(place, rate, color=color, width=0.6)
            errors.text(place, rate + 1, f"{rate:.1f}", ha="center", fontsize=8)
        errors.set_xticks(range(len(names)), names.values(), fontsize=7)
        errors.set_ylim(0, 100)
        errors.set_ylabel("null studies with any finding (%)")
        errors.set_title("Family-wise error")

        by_images = [entry for entry in results["run_noise"] if entry["runs"] == 6]
        x = [entry["images"] for entry in by_images]
        lines = (
            ("images_of_one_run", "images of one run", vermilion, "s"),
            ("images_of_all_runs", "images, mean of 6 runs", PALETTE[4], "^"),
            ("over_runs", "6 runs (sign flip)", blue, "o"),
        )
        for key, name, color, marker in lines:
            units.plot(x, [100 * entry[key] for entry in by_images], color=color, marker=marker, label=name)
        units.axhline(5, color=green, linewidth=0.8)
        units.set_xscale("log")
        units.set_xticks(x, [f"{n:,}" for n in x])
        units.minorticks_off()
        units.set_ylim(0, 100)
        units.set_xlabel("images")
        units.set_ylabel("null studies rejected (%), one test")
        units.set_title("The unit of inference")
        units.legend(title="unit", fontsize=7.5, title_fontsize=7.5)

        series = (
            ("bca_coverage", "images", "BCa, by images", blue, "o"),
            ("nested_coverage", "runs", "nested, by runs", PALETTE[3], "D"),
        )
        for key, axis, name, color, marker in series:
            rows = results[key]
            cover.plot(
                [row[axis] for row in rows], [100 * row["rate"] for row in rows], color=color, marker=marker, label=name
            )
        low, high = (100 * edge for edge in band(results["bca_coverage"][0]["studies"], 0.95))
        cover.axhspan(low, high, color=green, alpha=0.25, linewidth=0)
        cover.axhline(95, color=green, linewidth=0.8)
        cover.set_xscale("log")
        cover.set_xticks([3, 6, 12, 24, 50, 200, 1000], ["3", "6", "12", "24", "50", "200", "1,000"])
        cover.minorticks_off()
        cover.set_ylim(70, 100)
        cover.set_xlabel("images, or runs")
        cover.set_ylabel("intervals that cover the truth (%)")
        cover.set_title("95 % intervals")
        cover.legend(fontsize=7.5, loc="lower right")
    return drawn


def draw(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure(results).savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--draw-only", action="store_true", help="only the figure, from the JSON that is there")
    arguments = parser.parse_args()
    path = arguments.docs / "statistics_calibration.json"
    if not arguments.draw_only:
        path.write_text(json.dumps(calibrate(arguments.studies), indent=1) + "\n", encoding="utf-8")
    draw(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
