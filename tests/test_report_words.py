"""What summary and page say: sentences that follow from the numbers, and never more than the unit allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_study import build_study, payload, small, texts

from engine.report.figures import render_figures
from engine.report.findings import comparisons
from engine.report.inputs import Results, load_results
from engine.report.verdicts import verdicts


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str, str]:
    """A study with effects: its results, summary and page."""
    outputs = build_study(tmp_path_factory.mktemp("study") / "outputs", metrics=("distance", "entropy", "region_mass"))
    return load_results(outputs), *texts(outputs)


def test_every_metric_has_a_verdict(told: tuple[Results, str, str]) -> None:
    """Which layers changed, by how much, is it certain: read off the first screen."""
    results, _, page = told
    for comparison in comparisons(results):
        rows = verdicts(results, comparison)
        assert len(rows) == 4  # distance, entropy, and two regions
        for row in rows:
            where = {"condition": comparison.condition, "metric": row.metric, "region": row.region or None}
            tests = results.select("layer", **where)
            found = [test for test in tests if test.survives(0.05)]
            assert row.certain == bool(found)
            shown = max(found or tests, key=lambda test: abs(test.difference or 0))
            assert row.layer == shown.layer
            assert row.verdict.startswith("yes, p" if found else "not shown, p")
            assert row.difference in page
    first = page.index('class="verdicts"')
    assert first < page.index('id="maps"')


def test_equivalence_is_said_where_a_bound_was_set(tmp_path: Path) -> None:
    outputs = small(tmp_path, effect=0.0, conditions=("baseline", "finetuned"), regions=(), equivalence={"distance": 1})
    summary, page = texts(outputs)
    assert "Equivalent within ±1.00 image diagonals (TOST, Holm): all 4 layers." in summary
    assert "within ±1.00 in all 4" in page
    assert "◍" in page
    cell = payload(page)["maps"][0]["grids"][0]["cells"][0][0]
    assert (cell["bound"], cell["within"], cell["sure"]) == (1, True, False)
    summary, page = texts(small(tmp_path / "without", conditions=("baseline", "finetuned"), samples=False))
    assert "TOST" not in summary
    assert "shown to lie within the bounds" not in page


def test_what_an_absent_finding_means_is_said(tmp_path: Path) -> None:
    """No difference found: how large a one would have been found."""
    outputs = small(tmp_path, effect=0.0, conditions=("baseline", "finetuned"), regions=(), samples=False)
    test = load_results(outputs).select("layer")[0]
    assert test.mde_dz is not None
    summary, _ = texts(outputs)
    assert f"dz {test.mde_dz:.2f} or more would have been found with a power of 80 %" in summary
    assert "would have been found with a power of 80 %" in summary.split("## Observed patterns")[1]


def test_skewed_differences_are_a_limit_that_is_named(tmp_path: Path) -> None:
    outputs = small(tmp_path, conditions=("baseline", "finetuned"), regions=(), samples=False, gradcam=False)
    assert "symmetric about zero" not in texts(outputs)[0]
    path = outputs / "metrics/attention_comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    for test in comparison["tests"]:
        test["skewness"] = -2.0 if test["level"] == "head" and test["layer"] == 1 else 0.1
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    assert "In 4 of 20 image-level tests they are skewed" in summary
    cells = payload(page)["maps"][0]["grids"][0]["cells"]
    assert ["skewed" in cell["note"] for cell in cells[1]] == [True] * 4 + [False]


def test_patterns_along_the_layers_come_from_their_tests(told: tuple[Results, str, str]) -> None:
    results, summary, _ = told
    clusters = results.clusters(condition="dora", metric="entropy")
    assert clusters
    for cluster in clusters:
        assert f"{cluster.direction} in layer" in summary
    assert "cluster permutation over images" in summary
    (trend,) = results.trends(condition="dora", metric="distance")
    assert trend.p_max_t is not None
    assert ("no evidence that the change differs with depth" in summary) == any(
        not one.survives(0.05) for one in results.analyses.trends
    )
    assert "within a layer" in summary.split("## Between metrics")[1]
    assert "classes counts alike" in summary.split("## Classes")[1]


def test_a_study_without_effect_says_so(tmp_path: Path) -> None:
    outputs = small(tmp_path, effect=0.0, conditions=("baseline", "finetuned"))
    summary, page = texts(outputs)
    first = summary.splitlines()[2]
    assert first.startswith("No difference between finetuned and baseline survives the family-wise test (0 of 48")
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
        ((1, 2, 3), "3 training runs are too few for a seed-level test", "training runs like these"),
        (tuple(range(6)), "speak of training runs like these", "runs are too few"),
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
    for key in ("accuracy", "data", "undefined", "controls"):
        del comparison[key]
    path.write_text(json.dumps(comparison), encoding="utf-8")
    summary, page = texts(outputs)
    for absent in ('id="training"', 'id="attention"', 'id="gradcam"', "Test accuracy"):
        assert absent not in page
    assert "No negative control was recorded" in summary
    assert "given checkpoint" in summary
    assert "The clearest change is in" in summary
    assert {name for name, _ in render_figures(load_results(outputs)) if name.endswith("png")} == {
        "layers_distance.png",
        "difference_distance.png",
        "layers_morans_i.png",
        "difference_morans_i.png",
    }


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
