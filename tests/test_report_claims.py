"""What the report claims and how surely: the primary family first, the largest of many with all that may be it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_study import build_study, payload, results_of, small, texts
from test_report_words import change_tests, rows_of, two_metrics

from engine.relevance import parse_relevance
from engine.report.document import ReportedStudy
from engine.report.families import exploratory_families
from engine.report.findings import largest_layers
from engine.report.inputs import Results
from engine.report.sections.relevance import load_relevance
from engine.report.write import render_figures

TWO: dict[str, Any] = {"conditions": ("baseline", "finetuned"), "samples": False, "gradcam": False}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str, str]:
    """Two primary metrics, two exploratory ones (of which one has regions), two comparisons."""
    metrics = ("distance", "entropy", "prefix_mass", "region_mass")
    outputs = build_study(tmp_path_factory.mktemp("study") / "outputs", metrics=metrics)
    return results_of(outputs), *texts(outputs)


def intervals(outputs: Path, by_layer: dict[int, tuple[float, float]], **values: Any) -> Path:
    """A study whose every test of a layer survives, has this simultaneous interval and its middle as the difference."""
    return change_tests(
        outputs,
        lambda test: (
            {
                "difference": sum(by_layer[test["layer"]]) / 2,
                "ci": [-9.0, 9.0],
                "ci_simultaneous": by_layer[test["layer"]],
                "p_max_t": 0.001,
                **values,
            }
            if test["layer"] is not None
            else None
        ),
    )


@pytest.mark.parametrize(
    ("by_layer", "most", "beside"),
    [
        ({0: (1, 2), 1: (2, 3), 2: (4, 5), 3: (0, 1)}, "layer 2 (blocks.2.attn)", ""),
        ({0: (1, 2), 1: (2, 3), 2: (2.5, 5), 3: (0, 1)}, "layer 2 (blocks.2.attn), or layer 1", "or layer 1"),
        ({0: (-5, -3), 1: (2, 4), 2: (4, 5), 3: (0, 1)}, "layer 2 (blocks.2.attn), or one of layers 0–1", "or one of"),
        ({0: (1, 2), 1: (1, 3), 2: (2, 5), 3: (1, 2)}, "layer 2 (blocks.2.attn), or any other layer", "or any other"),
    ],
)
def test_all_layers_that_may_be_the_largest_are_named(
    tmp_path: Path, by_layer: dict[int, tuple[float, float]], most: str, beside: str
) -> None:
    outputs = intervals(two_metrics(tmp_path, metrics=("entropy",)), by_layer)
    summary, _ = texts(outputs)
    headline = summary.splitlines()[2]
    assert f"Primary family: entropy differs most in {most}" in headline
    assert ("(their intervals do not tell them apart): from" in headline) == bool(beside)
    assert f"- entropy differs most in {most}: from" in summary
    low, high = by_layer[2]
    assert f"95 % simultaneous CI {low:.2f} to {high:.2f}" in headline
    assert "−9.00 to 9.00" not in summary.split("## Tests")[0]
    ((_, cells),) = rows_of(results_of(outputs)).values()
    assert str(cells[2]).startswith("('layer 2: " if beside else "layer 2: ")
    assert beside in str(cells[2])
    assert f"{low:.2f} to {high:.2f}" in str(cells[3])


def test_the_largest_on_regions_is_chosen_among_all_conditions_and_regions(tmp_path: Path) -> None:
    outputs = small(tmp_path, metrics=("region_mass",), **TWO)
    intervals(outputs, {0: (0.1, 0.2), 1: (0.2, 0.3), 2: (0.4, 0.5), 3: (0.0, 0.1)})
    apart = texts(outputs)[0]
    assert "regions differs most in layer 2 (blocks.2.attn). Class" in apart
    near = {"ci_simultaneous": [0.1, 0.45]}
    change_tests(outputs, lambda test: near if test["layer"] == 0 and test["region"] == "small digit" else None)
    assert (
        "differs most in layer 2 (blocks.2.attn), or layer 0 (their intervals do not tell them apart)"
        in texts(outputs)[0]
    )


def test_the_largest_is_not_named_where_nothing_survives(tmp_path: Path) -> None:
    summary, page = texts(small(tmp_path, effect=0.0, regions=(), **TWO))
    assert "differs most" not in summary + page
    assert "distance: the largest estimate is in layer" in summary


def test_primary_comes_first_and_the_rest_is_called_exploratory(written: tuple[Results, str, str]) -> None:
    results, summary, page = written
    assert results.primary == ("distance", "entropy")
    first, second = summary.splitlines()[2:5:2]
    assert first.startswith("Primary family: ")
    assert second.startswith("Exploratory: attention on the annotated regions differs most")
    said = (
        "Primary family: the layer means of distance and entropy, of all comparisons together. All else is exploratory"
    )
    assert summary.count(said) == page.count(said) == 1
    rows = rows_of(results)
    assert list(rows)[:2] == ["Mean attention distance", "Entropy"]
    assert ["exploratory" in str(cells[0]) for _, cells in rows.values()] == [False, False, True, True, True]
    observed = summary.split("### finetuned against baseline")[1].split("###")[0]
    primary, exploratory = observed.split("\n\nExploratory:\n\n")
    assert [line.split(" ")[1] for line in primary.strip().splitlines()] == ["distance", "entropy"]
    assert exploratory.count("\n- ") == 2
    assert all("layers; exploratory: " in line for line in primary.strip().splitlines())
    for section in ("neighbouring layers that change in one direction (", "against upper half of the layers ("):
        assert f"{section}exploratory; " in summary


def test_heads_are_counted_and_among_them_those_whose_layer_differs(written: tuple[Results, str, str]) -> None:
    results, summary, page = written
    for pair in ReportedStudy(results).comparisons:
        heads = [test for test in results.select("head", condition=pair.condition) if test.survives(0.05)]
        gated = [test for test in heads if test.p_gated is not None and test.p_gated <= 0.05]
        assert 0 < len(gated) < len(heads)
        assert {test.metric for test in gated} <= {"distance", "entropy"}
        cells = f"{len(heads)} of 80 layer × head × metric cells, {len(gated)} of them heads whose layer survives in"
        assert f"{cells} the primary family" in summary
        assert f"Exploratory: {cells} the primary family." in page
        layers = results.select("layer", condition=pair.condition, role="primary")
        counted = f"{sum(test.survives(0.05) for test in layers)} of {len(layers)} layer means of the primary family"
        assert f"{pair.pair}: {counted} differ; exploratory: " in summary


def test_without_a_primary_metric_everything_is_exploratory(tmp_path: Path) -> None:
    summary, page = texts(small(tmp_path, metrics=("prefix_mass", "region_mass"), **TWO))
    said = "No metric of the primary family was measured (distance, entropy and morans_i), so everything said here is"
    assert summary.splitlines()[2] == f"{said} exploratory."
    assert summary.splitlines()[4].startswith("Attention on the annotated regions differs most")
    assert "Exploratory:" not in summary
    assert "holds its level" not in summary
    assert "exploratory</small>" not in page


def test_an_exploratory_change_is_no_change_of_the_primary_family(tmp_path: Path) -> None:
    outputs = small(tmp_path, metrics=("distance", "prefix_mass"), regions=(), **TWO)
    change_tests(outputs, lambda test: {"p_max_t": 0.9, "p_gated": 0.9} if test["metric"] == "distance" else None)
    first, second = texts(outputs)[0].splitlines()[2:5:2]
    assert first.startswith("No difference between finetuned and baseline survives in the primary family (0 of 4 layer")
    assert second.startswith("Exploratory: prefix_mass differs most in layer")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (None, "holds the level by itself.\n"),
        (
            {"metrics": ["entropy"], "before": True, "sha256": ""},
            "was named before anything was captured (metrics/primary.json).\n",
        ),
        (
            {"metrics": ["entropy"], "before": False, "sha256": ""},
            "But it was named after the first capture, when the data could have been seen (metrics/primary.json).\n",
        ),
    ],
)
def test_when_the_primary_family_was_named_is_said(tmp_path: Path, record: dict[str, Any] | None, says: str) -> None:
    outputs = two_metrics(tmp_path, metrics=("entropy",))
    path = outputs / "metrics/attention_comparison.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | {"primary": record}), encoding="utf-8")
    summary, _ = texts(outputs)
    assert says in summary
    assert ("over this whole report, provided that it was" in summary) == (not record or not record["before"])


def test_the_error_over_the_whole_report_is_stated(written: tuple[Results, str, str]) -> None:
    """Two comparisons: heads, other layer means, halves, clusters; four classes are too few to claim anything."""
    results, summary, page = written
    families = exploratory_families(results, None)
    assert len(families) == 8
    assert sum("by class" in name or "layer_means" in name for name in families) == 0
    said = "The exploratory families of tests (8) hold it each by itself: of reports like this one in which nothing"
    chance = f", {100 * (1 - 0.95**8):.0f} % (1 − 0.95^8, if families were independent) claim something exploratory."
    for text in (summary, page):
        assert "The primary family holds its level, 0.05, over this whole report, provided that it was named" in text
        assert said in text
        assert chance in text


@pytest.mark.parametrize(("seeds", "flipped"), [((1, 2, 3), False), (tuple(range(6)), True)])
def test_families_that_cannot_claim_anything_do_not_count(
    tmp_path: Path, seeds: tuple[int, ...], flipped: bool
) -> None:
    """Signs of three training runs flipped have a least p of .25; runs crossed with images are another family."""
    options: dict[str, Any] = {"metrics": ("entropy",), "regions": (), "seeds": seeds, "permutations": 199}
    families = exploratory_families(results_of(small(tmp_path, **options, **TWO)), None)
    assert any("by seed" in name for name in families) == flipped
    assert any("runs × images" in name for name in families)


def test_families_of_relevance_maps_count(tmp_path: Path) -> None:
    test = {"than": "random", "measure": "faithfulness", "n": 9, "difference": 0.1, "dz": 1.0, "ci": [0.0, 1.0]}
    test |= {"p": 0.1, "p_max_t": 0.1, "family_size": 2, "degenerate": None}
    tests = [test | {"condition": c, "method": m} for c in ("baseline", "finetuned") for m in ("gradcam", "lrp")]
    empty = ("left_out", "refused", "means", "curves", "rollout_peaks", "link")
    document: dict[str, Any] = {name: [] for name in empty}
    document |= {
        "schema": 1,
        "unit_of_inference": "image",
        "images": 9,
        "target": "true",
        "baseline": "blur",
        "steps": 3,
    }
    document |= {"against": "baseline", "confidence": 0.95, "methods": tests, "conditions": tests[2:], "classes": []}
    results = results_of(two_metrics(tmp_path, metrics=("entropy",)))
    without = exploratory_families(results, None)
    relevance = parse_relevance(document, tmp_path)
    assert len(exploratory_families(results, relevance)) == len(without) + 3  # methods of two conditions, conditions
    assert load_relevance(results) is None


def test_cells_that_were_not_tested_are_counted_with_the_reason(tmp_path: Path) -> None:
    outputs = two_metrics(tmp_path)
    reason = "fewer than 10 pairs differ from the most frequent value"
    few = {"p_max_t": None, "p_gated": None, "ci_simultaneous": None, "degenerate": reason}
    change_tests(outputs, lambda test: few if (test["metric"], test["layer"]) == ("entropy", 1) else None)
    summary, page = texts(outputs)
    said = f"4 cells and 1 layer mean were not tested: {reason}."
    assert said in summary
    assert said in page
    assert "not tested:" not in texts(two_metrics(tmp_path / "all"))[0]
    # Nothing bounds what was not tested: it may be the largest.
    tests = results_of(outputs).select("layer", metric="entropy")
    assert 1 in largest_layers(tests)


def test_where_p_and_intervals_come_from_is_what_the_tests_say(tmp_path: Path) -> None:
    few, many = (texts(small(tmp_path / str(n), images=n, **TWO))[0] for n in (12, 40))
    assert "p max-T: random sign flips; max-T over the family." in few
    assert "Intervals of single layers and heads: Student's t" in few
    assert "p max-T: studentised bootstrap, each tail at half the level; max-T within a metric, Holm" in many
    assert "Intervals of single layers and heads: BCa bootstrap over images." in many


VERDICTS = {0: ("different", (0.2, 0.4), 0.001), 1: ("negligible", (0.1, 0.2), 0.001)}
VERDICTS |= {2: ("equivalent", (-0.1, 0.1), 0.9), 3: ("undecided", (-0.4, 0.1), 0.9)}


def test_the_equivalence_map_is_one_in_page_figure_and_table(tmp_path: Path) -> None:
    outputs = two_metrics(tmp_path, equivalence={"entropy": 0.3})

    def changes(test: dict[str, Any]) -> dict[str, Any] | None:
        if test["metric"] != "entropy" or test["layer"] is None:
            return None
        _, interval, p = VERDICTS[test["layer"]]
        return {"difference": sum(interval) / 2, "ci_simultaneous": interval, "p_max_t": p, "tost_bound": 0.3}

    change_tests(outputs, changes)
    summary, page = texts(outputs)
    data = payload(page)
    cells = next(entry for entry in data["maps"] if entry["metric"] == "entropy")["grids"][0]["cells"]
    assert [{cell["verdict"] for cell in row} for row in cells] == [{verdict} for verdict, *_ in VERDICTS.values()]
    marks = [data["marks"][verdict] for verdict, *_ in VERDICTS.values()]
    assert len(set(marks)) == 4, "told apart without colour"
    assert all(mark in page for mark in marks[1:3])
    for verdict, *_ in VERDICTS.values():
        assert f"| {verdict}, ±0.300 |" in summary
    assert "Surviving max-T and not shown to lie within the bound: 1 of 4 layers" in summary
    assert (
        "Real but negligible: 4 layer × head cells and 1 layer mean. Shown to lie within ±0.300 nat: 2 of 4" in summary
    )
    drawn = {name: content for name, content in render_figures(results_of(outputs)) if name.endswith(".svg")}
    entropy, other = (drawn[f"difference_{metric}.svg"].decode() for metric in ("entropy", "morans_i"))
    assert entropy.count(">≈</text>") == 4
    assert "ring" in entropy
    assert "ring" not in other
    assert "≈" not in other


def test_the_page_opens_on_what_its_first_claim_speaks_of(written: tuple[Results, str, str]) -> None:
    results, summary, page = written
    data = payload(page)
    (entry,) = [entry for entry in data["maps"] if entry["open"] is not None]
    row, column = entry["open"]
    assert summary.splitlines()[2].startswith(f"Primary family: {entry['metric']} differs most in layer {row} ")
    assert column == len(results.heads)
    largest = max(abs(cells[column]["d"]) for grid in entry["grids"] for cells in grid["cells"])
    assert np.isclose(max(abs(grid["cells"][row][column]["d"]) for grid in entry["grids"]), largest)
