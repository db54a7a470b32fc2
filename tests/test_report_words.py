"""What summary and page say: sentences that follow from the numbers, and never more than the unit allows."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from synthetic_study import build_study, payload, results_of, small, texts

from engine.report import text
from engine.report.document import Content, ReportedStudy
from engine.report.inputs import Results
from engine.report.sections.overview import verdicts
from engine.report.write import render_figures
from train.errors import InputError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str, str]:
    """A study with effects: its results, summary and page."""
    outputs = build_study(tmp_path_factory.mktemp("study") / "outputs", metrics=("distance", "entropy", "region_mass"))
    return results_of(outputs), *texts(outputs)


def rows_of(results: Results, condition: str = "finetuned") -> dict[str, tuple[str, Sequence[Content]]]:
    """The overview's row of each metric: its look and its cells."""
    study = ReportedStudy(results)
    table = verdicts(study, next(pair for pair in study.comparisons if pair.condition == condition))
    names = [str(row[0] if isinstance(row[0], str) else row[0][0]) for row in table.rows]
    return {name: (look, cells) for name, look, cells in zip(names, table.looks, table.rows, strict=True)}


def test_every_metric_has_a_verdict(written: tuple[Results, str, str]) -> None:
    """Which layers changed, by how much, is it certain: read off the first screen."""
    results, _, page = written
    for comparison in ReportedStudy(results).comparisons:
        rows = rows_of(results, comparison.condition)
        assert len(rows) == 4  # distance, entropy, and two regions
        for change in comparison.changes:
            look, (_, _, largest, difference, verdict, *_) = rows[results.heading(change.metric, change.region)]
            where = {"condition": comparison.condition, "metric": change.metric, "region": change.region}
            tests = results.select("layer", **where)
            found = [test for test in tests if test.survives(0.05)]  # no bounds are set: what survives changed
            assert look == ("sure" if found else "")
            shown = max(found or tests, key=lambda test: abs(test.difference or 0))
            assert str(largest[0] if isinstance(largest, tuple) else largest).startswith(f"layer {shown.layer}: ")
            assert isinstance(verdict, str)
            assert verdict.startswith("yes, p" if found else "not shown, p")
            assert text.change(shown.difference) in str(difference)
            assert text.change(shown.difference) in page
    first = page.index('class="verdicts"')
    assert first < page.index('id="maps"')


def test_equivalence_is_said_where_a_bound_was_set(tmp_path: Path) -> None:
    outputs = small(tmp_path, effect=0.0, conditions=("baseline", "finetuned"), regions=(), equivalence={"distance": 1})
    summary, page = texts(outputs)
    assert "Shown to lie within ±1.00 image diagonals: all 4 layers." in summary
    assert "within ±1.00 in all 4" in page
    assert "○ survives and its simultaneous interval lies within" in page
    cell = payload(page)["maps"][0]["grids"][0]["cells"][0][0]
    assert (cell["bound"], cell["verdict"]) == (1, "equivalent")
    summary, page = texts(small(tmp_path / "without", conditions=("baseline", "finetuned"), samples=False))
    assert "lie within" not in summary
    assert "Where a bound was set" not in page


def test_what_an_absent_finding_means_is_said(tmp_path: Path) -> None:
    """No difference found: how large a one would have been found."""
    outputs = small(tmp_path, effect=0.0, conditions=("baseline", "finetuned"), regions=(), samples=False)
    test = results_of(outputs).select("layer")[0]
    assert test.mde_dz is not None
    summary, _ = texts(outputs)
    assert f"dz {test.mde_dz:.2f} or more would have been found with a power of 80 %" in summary
    assert "would have been found with a power of 80 %" in summary.split("## Observed patterns")[1]


def test_images_too_few_for_any_test_are_said_to_be(tmp_path: Path) -> None:
    """Sign flips over n images have a least p of 2^(1 − n): over five none is below .05."""
    options: dict[str, Any] = {"conditions": ("baseline", "finetuned"), "regions": (), "samples": False}
    said = "nothing can, over 5 images: exact sign flips need 6"
    assert said in texts(small(tmp_path / "five", images=5, effect=0.0, **options))[0]
    assert "nothing can" not in texts(small(tmp_path / "six", images=6, effect=0.0, **options))[0]


def test_signs_flipped_of_few_images_are_a_limit_that_is_named(tmp_path: Path) -> None:
    options: Any = {"conditions": ("baseline", "finetuned"), "regions": (), "samples": False, "gradcam": False}
    assert "symmetric about zero" not in texts(small(tmp_path / "many", **options))[0]
    summary, _ = texts(small(tmp_path / "few", images=12, **options))
    assert "With fewer than 20 images signs are flipped" in summary


def test_a_study_without_effect_says_so(tmp_path: Path) -> None:
    outputs = small(tmp_path, effect=0.0, conditions=("baseline", "finetuned"))
    summary, page = texts(outputs)
    first = summary.splitlines()[2]
    assert first.startswith("No difference between finetuned and baseline survives in the primary family (0 of 4 layer")
    assert "no change is claimed" in summary
    assert "Surviving max-T" not in summary
    assert first.split(" (")[0] in page


def test_conditions_that_are_the_same_are_called_the_same(tmp_path: Path) -> None:
    outputs = small(tmp_path, conditions=("baseline", "finetuned"), samples=False, gradcam=False)
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    for test in comparison["tests"]:
        test |= {"difference": 0.0, "dz": None, "gz": None, "t": 0.0, "ci": [0.0, 0.0]}
        test |= {"p": 1.0, "p_max_t": 1.0, "degenerate": "all differences are exactly 0"}
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, _ = texts(outputs)
    assert "equals that of baseline exactly" in summary
    assert "every difference is exactly 0" in summary


@pytest.mark.parametrize(
    ("seeds", "says", "never"),
    [
        ((42,), "these two checkpoints", "training runs like these"),
        ((1, 2, 3), "3 training runs are too few for a seed-level test", "speak of training runs like these on"),
        (tuple(range(6)), "speak of training runs like these on these very images", "runs are too few"),
    ],
)
def test_claims_fit_the_unit(tmp_path: Path, seeds: tuple[int, ...], says: str, never: str) -> None:
    outputs = small(
        tmp_path, seeds=seeds, conditions=("baseline", "finetuned"), samples=False, gradcam=False, permutations=99
    )
    summary, page = texts(outputs)
    assert says in summary
    assert never not in summary
    assert says in page
    assert never not in page


def test_two_given_checkpoints_without_training_regions_samples_or_log(tmp_path: Path) -> None:
    outputs = small(
        tmp_path,
        conditions=("baseline", "finetuned"),
        regions=(),
        metrics=("distance", "morans_i"),
        training=False,
        samples=False,
        gradcam=False,
    )
    (outputs / "study.toml").unlink()
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    comparison |= {"accuracy": {}, "data": {}, "undefined": {}, "controls": []}
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    for absent in ('id="training"', 'id="attention"', 'id="gradcam"', "Test accuracy", "Accuracy on"):
        assert absent not in page
    assert "No negative control was recorded" in summary
    assert "given checkpoint" in summary
    assert "Primary family: " in summary
    assert {name for name, _ in render_figures(results_of(outputs)) if name.endswith("png")} == {
        "layers_distance.png",
        "difference_distance.png",
        "layers_morans_i.png",
        "difference_morans_i.png",
    }


def test_several_runs_of_any_condition_make_its_accuracy_a_mean(tmp_path: Path) -> None:
    outputs = small(tmp_path, regions=(), metrics=("distance",), samples=False, gradcam=False)
    said = "The stroke marks chance, 25.0 %."
    page = texts(outputs)[1]
    assert said in page
    assert "Means over training runs." not in page
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    middle = comparison["accuracy"]["finetuned"]
    middle |= {"43": middle["42"] | {"test": 0.5}}
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    assert f"{said} Means over training runs." in page
    assert "finetuned 67.0 % (mean of 2 runs)" in summary


def test_one_condition_is_described_and_not_compared(tmp_path: Path) -> None:
    outputs = small(tmp_path, conditions=("pretrained",), training=False)
    summary, page = texts(outputs)
    assert "One condition was measured, so nothing is compared." in summary
    assert "## Tests" not in summary
    assert 'id="maps"' not in page


def test_a_failed_control_is_shouted(tmp_path: Path) -> None:
    outputs = small(tmp_path, controls_hold=False, samples=False, gradcam=False, metrics=("distance",), regions=())
    summary, page = texts(outputs)
    assert summary.splitlines()[2].startswith("**1 of 2 negative controls failed")
    assert "1 of 2 negative controls FAILED" in summary
    assert "1 of 2 negative controls failed" in page


def change_tests(outputs: Path, changes: Callable[[dict[str, Any]], Mapping[str, Any] | None]) -> Path:
    """Gives the tests of a study's document other values: what `changes` returns for each."""
    path = outputs / "metrics/attention_comparison.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for test in document["tests"]:
        test.update(changes(test) or {})
    path.write_text(json.dumps(document), encoding="utf-8")
    return outputs


def two_metrics(tmp_path: Path, **options: Any) -> Path:
    """Two conditions, entropy and Moran's I, four layers: quick to write, and the tests of it are the test's own."""
    options = {"metrics": ("entropy", "morans_i"), "regions": (), "samples": False, "gradcam": False} | options
    return small(tmp_path, conditions=("baseline", "finetuned"), permutations=49, **options)


@pytest.mark.parametrize(
    ("difference", "before", "after", "says"),
    [
        (-0.000102, 4.608312, 4.608210, ("4.60831", "4.60821")),
        (-0.12, 0.323, 0.203, ("0.323", "0.203")),
        (0.3, 116.49, 116.79, ("116.49", "116.79")),
        (31.0, 116.49, 147.49, ("116", "147")),
        (-2e-7, 5.21e-5, 5.19e-5, ("5.210 × 10⁻⁵", "5.190 × 10⁻⁵")),
        (0.1, 9.99, 10.09, ("9.99", "10.09")),
        (1e-12, 4.6083124567, 4.6083124567, ("4.60831246", "4.60831246")),
        (0.0, 4.608312, 4.608312, ("4.61", "4.61")),
        (None, 4.608312, None, ("4.61", "undefined")),
    ],
)
def test_decimals_of_means_follow_their_difference(
    difference: float | None, before: float, after: float | None, says: tuple[str, str]
) -> None:
    shown = text.decimals(difference)
    assert (text.number(before, decimals=shown), text.number(after, decimals=shown)) == says


def test_means_are_written_with_their_difference_everywhere(tmp_path: Path) -> None:
    """A change of 0.0001 nat is not "from 4.61 to 4.60": headline, row, sentence and cell."""
    means = {"mean_against": 4.608312, "mean_condition": 4.608210, "difference": -0.000102, "dz": -1.62, "d_av": -0.9}
    outputs = two_metrics(tmp_path, metrics=("entropy",))
    interval = [-0.000120, -0.000084]
    change_tests(outputs, lambda test: means | {"p_max_t": 0.001, "ci": interval, "ci_simultaneous": interval})
    summary, page = texts(outputs)
    assert (
        "from 4.60831 nat in baseline to 4.60821 nat in finetuned (difference −0.000102 nat" in summary.splitlines()[2]
    )
    assert "0.90 standard deviations between images" in summary.splitlines()[2]
    assert "or any other layer: from 4.60831 nat to 4.60821 nat; difference −0.000102 nat" in summary
    assert "4.60831 → 4.60821 nat" in page
    assert "4.61 " not in summary.split("## Negative")[0]
    cell = payload(page)["maps"][0]["grids"][0]["cells"][0][0]
    assert (cell["a"], cell["b"]) == (4.608312, 4.608210)
    assert text.interval((4.608101, 4.608312)) == "4.60810 to 4.60831"


def test_the_clearest_change_is_the_largest_and_its_row_says_the_same(tmp_path: Path) -> None:
    """By the size beside how much images differ, and not by how even the change is (|dz|)."""

    def changes(test: dict[str, Any]) -> dict[str, Any]:
        if test["metric"] == "entropy":  # tiny, and very even
            layer = test["layer"] or 0
            return {
                "difference": -0.0001 * (1 + layer),
                "dz": -9.0 + layer,
                "d_av": -0.01 * (1 + layer),
                "p_max_t": 0.001,
                "ci_simultaneous": [-0.00011 * (1 + layer), -0.00009 * (1 + layer)],
            }
        # in layer 1 the largest, in layer 2 the most even
        difference, dz, size = {1: (-0.12, -1.1, -2.4), 2: (-0.05, -3.0, -2.9)}.get(test["layer"], (0.001, 0.1, 0.0))
        interval = [difference - 0.01, difference + 0.01]
        return {
            "difference": difference,
            "dz": dz,
            "d_av": size,
            "p_max_t": 0.001 if difference < 0 else 0.9,
            "ci_simultaneous": interval,
        }

    outputs = change_tests(two_metrics(tmp_path), changes)
    results = results_of(outputs)
    summary, page = texts(outputs)
    first = summary.splitlines()[2]
    assert first.startswith("Primary family: morans_i differs most in layer 1 (blocks.1.attn): from")
    assert "2.4 standard deviations between images" in first
    assert first.split(" (")[0] in page
    rows = {name: (layers, str(largest)) for name, (_, (_, layers, largest, *_)) in rows_of(results).items()}
    assert rows["Moran's I"][0] == "layers 1–2 (2 of 4)"
    assert rows["Moran's I"][1].startswith("layer 1: ")
    assert rows["Entropy"][1].startswith("layer 3: ")
    assert "- morans_i differs most in layer 1 (blocks.1.attn): from" in summary
    assert "; difference −0.120" in summary


def test_a_change_of_the_size_of_rounding_is_called_that(tmp_path: Path) -> None:
    """A copy whose weights differ by 1e-6 differs in every image, which a test finds and nobody should build upon."""
    outputs = small(tmp_path, conditions=("baseline", "finetuned"), regions=(), samples=False, gradcam=False)
    said = "That is less than a hundredth of what images differ by; rounding alone"
    assert said not in texts(outputs)[0]
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    for test in comparison["tests"]:
        if test.get("d_av") is not None:
            test["d_av"] *= 1e-4
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    assert said in summary.split("## What was compared")[0]
    assert said in page


def test_one_layer_that_changed_does_not_read_as_a_number_of_layers(tmp_path: Path) -> None:
    outputs = two_metrics(tmp_path, metrics=("entropy",))
    change_tests(outputs, lambda test: {"p_max_t": 0.001 if test["layer"] == 3 else 0.9})
    results = results_of(outputs)
    ((_, cells),) = rows_of(results).values()
    assert cells[1] == "layer 3 (1 of 4)"


def test_what_lies_within_the_bounds_is_real_but_negligible_and_no_change(tmp_path: Path) -> None:
    outputs = two_metrics(tmp_path, equivalence={"entropy": 0.5})
    inside = {"difference": 0.01, "dz": 5.0, "d_av": 3.0, "p_max_t": 0.001, "tost_bound": 0.5}
    inside["ci_simultaneous"] = [-0.49, 0.02]
    changed = {"difference": 0.1, "dz": 1.0, "d_av": 1.0, "p_max_t": 0.001}
    change_tests(outputs, lambda test: inside if test["metric"] == "entropy" else changed)
    results = results_of(outputs)
    (comparison,) = ReportedStudy(results).comparisons
    assert (comparison.changed, comparison.negligible) == (16, 16)
    assert (comparison.layers_changed, comparison.layers_negligible) == (4, 4)
    rows = rows_of(results)
    assert {name: look for name, (look, _) in rows.items()} == {"Moran's I": "sure", "Entropy": "negligible"}
    _, entropy = rows["Entropy"]
    assert entropy[1] == "none of 4"
    assert entropy[4] == "real but negligible, p 0.001; within ±0.500 in all 4"
    summary, page = texts(outputs)
    assert summary.splitlines()[2].startswith("Primary family: morans_i differs"), "however large the sizes of entropy"
    assert "Real but negligible: 16 layer × head cells and 4 layer means. Shown to lie within ±0.500 nat" in summary
    within = "Different, but within the bound (real but negligible): 16 layer × head cells and 4 layer means."
    assert f" images). {within}" in summary
    assert '<tr class="negligible"><th scope="row">Entropy</th>' in page
    assert "16 more differ within the bounds set beforehand: real but negligible" in page

    change_tests(outputs, lambda test: {"p_max_t": 0.9} if test["metric"] == "morans_i" else None)
    summary, page = texts(outputs)
    assert summary.splitlines()[2].startswith(
        "What differs between finetuned and baseline in the primary family is real but negligible: 4 layer means "
        "survive the family-wise correction, and each is shown to lie within its bound (entropy ±0.500 nat)."
    )
    assert "no change beyond the bounds is shown" in page

    # Within the bound in one layer alone: the row says where.
    alone = {"ci_simultaneous": [-0.5, 0.02], "p_max_t": 0.9}
    change_tests(outputs, lambda test: alone if test["metric"] == "entropy" and test["layer"] != 2 else None)
    results = results_of(outputs)
    look, cells = rows_of(results)["Entropy"]
    assert cells[4] == "real but negligible in layer 2, p 0.001; within ±0.500 in 1 of 4"
    assert look == ""


def test_settings_are_those_of_the_results(tmp_path: Path) -> None:
    """The study.toml of a later command names other ones: intervals keep their level, and the page says both."""
    statistics = {"confidence": 0.9, "alpha": 0.01, "power": 0.7}
    outputs = two_metrics(tmp_path, statistics=statistics, seeds=(1, 2, 3, 4, 5, 6))
    study = outputs / "study.toml"
    assert "confidence = 0.95" in study.read_text()
    study.write_text(study.read_text().replace("0.95", "0.5"))
    summary, page = texts(outputs)
    assert "90 % CI" in summary
    assert "50 %" not in summary
    assert "95 %" not in summary
    assert "(family-wise level α = 0.01, n = 24 images)" in summary
    assert "a power of 70 %" in summary
    assert "6 training runs are too few for a seed-level test at 0.01 (an exact sign flip needs 8)" in summary
    assert "difference (90 % simultaneous CI)" in page
    assert "says now: confidence 0.5 (the tests: 0.9), alpha 0.05 (the tests: 0.01)" in page
    drawn = next(content for name, content in render_figures(results_of(outputs)) if name == "layers_entropy.svg")
    assert b"90 % t interval" in drawn
    path = outputs / "metrics/attention_comparison.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["settings"]["alpha"], document["settings"]["power"]
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match=r"does not say with which settings \(alpha, power\)"):
        results_of(outputs)


def test_what_lies_on_a_region_is_said_beside_its_area(tmp_path: Path) -> None:
    outputs = small(tmp_path, metrics=("region_mass",), conditions=("baseline", "finetuned"), samples=False)
    summary, page = texts(outputs)
    means = results_of(outputs).document.conditions["baseline"]["region_mass[small digit]"]
    layer = int(re.search(r"differs most in layer (\d)", summary)[1])
    lift = f"({text.number(means[layer] / 0.1, 2)} times that)"
    region = r"on small digit \(0\.100 of the area\)"
    said = rf"{region}, \S+ in baseline {re.escape(lift)} and \S+ in finetuned \(\S+ times that\)"
    assert re.search(said, summary)
    assert re.search(rf"- region_mass {region} differs most in layer .* and \S+ times that\); diff", summary)
    assert "share of the area: 0.300 on big digit and 0.100 on small digit." in page

    path = outputs / "metrics/attention_metrics.zarr"  # as of a version that did not keep the area
    table = xr.load_dataset(path, engine="zarr", consolidated=False).drop_vars("region_area")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's remark that string arrays have no specification yet
        table.to_zarr(path, mode="w", zarr_format=3, consolidated=False)
    for without in texts(outputs):
        assert "of the area" not in without
        assert "times that" not in without
