"""What the report says of training runs: which were paired, how far they lie apart, and what holds for more of them."""

from __future__ import annotations

import csv
import io
from base64 import b64decode
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic_study import results_of, small, texts

from engine.report.document import ReportedStudy, Table
from engine.report.downloads import downloads
from engine.report.inputs import Results
from engine.report.run_words import control_sentence, crossed_sentence, scope_sentences, seed_sentence, spread_sentence
from engine.report.sections.overview import verdicts
from engine.report.sections.runs import runs_in_words
from engine.statistics import RunControl, Settings, analyse

FAST = Settings(permutations=99)
SEEDS = (1, 2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of one condition against a baseline that no seed changes."""
    options = {"conditions": ("baseline", "finetuned"), "samples": False, "gradcam": False, "permutations": 99}
    return small(tmp_path_factory.mktemp("study"), seeds=SEEDS, regions=(), metrics=("distance", "entropy"), **options)


@pytest.fixture(scope="module")
def results(outputs: Path) -> Results:
    return results_of(outputs)


def test_first_screen_says_how_much_two_runs_of_one_condition_differ(outputs: Path, results: Results) -> None:
    controls = results.document.run_controls
    assert len(controls) == 15
    middle = sorted(control.cells_differ for control in controls)[7]
    sentence = control_sentence(results, "finetuned")
    assert f"Two training runs of finetuned differ in {middle} of {controls[0].cells} cells" in sentence
    assert "(medians over 15 pairs; " in sentence
    summary, page = texts(outputs)
    assert sentence in summary[: summary.index("## What was compared")]
    assert sentence in page[: page.index('class="cards"')]  # below the headline
    assert control_sentence(results, "baseline") == ""


def test_of_many_pairs_the_sentence_says_that_some_were_left_out(results: Results) -> None:
    assert "medians over the first 3 of 15 pairs" in control_sentence(
        replace(results, document=replace(results.document, run_controls=results.document.run_controls[:3])),
        "finetuned",
    )


def test_one_pair_has_no_median(results: Results) -> None:
    control = RunControl(
        condition="finetuned",
        seeds=(1, 2),
        unit_of_inference="",
        n=9,
        cells=112,
        cells_differ=102,
        layers=28,
        layers_differ=26,
    )
    one = replace(results, document=replace(results.document, run_controls=(control,)))
    one = replace(one, table=one.table.isel(seed=[0, 1]))
    assert control_sentence(one, "finetuned") == (
        "Two training runs of finetuned differ in 102 of 112 cells and 26 of 28 layer means by max-T over images, as "
        "conditions are tested."
    )


def test_summary_has_components_tests_and_runs_needed(outputs: Path, results: Results) -> None:
    (comparison,) = ReportedStudy(results).comparisons
    blocks = list(runs_in_words(ReportedStudy(results)))
    (table,) = (block for block in blocks if isinstance(block, Table))
    tests = [test for test in comparison.crossed if test.level == "layer"]
    assert len(table.rows) == len(tests) == 8
    columns = [str(name) for name in table.header]
    for row, test, look in zip(table.rows, tests, table.looks, strict=True):
        shown = dict(zip(columns, map(str, row), strict=True))
        assert (shown["metric"], shown["layer"]) == (test.metric, str(test.layer))
        assert shown["runs needed"] == ("–" if test.runs_needed is None else f"{test.runs_needed:,}")
        assert (look == "sure") == test.survives(0.05)
    summary, _ = texts(outputs)
    for sentence in (
        spread_sentence(comparison),
        crossed_sentence(results, comparison),
        seed_sentence(results, comparison),
        *scope_sentences(results, [comparison]),
    ):
        assert sentence
        assert sentence in summary
    survived = sum(test.survives(0.05) for test in tests)
    assert f"{survived or 'none'} of 8 layer means" in crossed_sentence(results, comparison).replace("all 8", "8 of 8")
    assert "with these very test images" in seed_sentence(results, comparison)
    assert "take what runs differ by to be normal" in summary


def test_verdicts_count_layers_over_runs_and_images(results: Results) -> None:
    (comparison,) = ReportedStudy(results).comparisons
    table = verdicts(ReportedStudy(results), comparison)
    at = [str(name) for name in table.header].index("over 6 runs and images")
    for change, row in zip(comparison.changes, table.rows, strict=True):
        tests = [t for t in comparison.crossed if (t.level, t.metric) == ("layer", change.metric)]
        survived = sum(test.survives(0.05) for test in tests)
        assert row[at] == ("all 4 layers" if survived == 4 else f"{survived or 'none'} of 4 layers")


def test_runs_are_those_that_were_paired(results: Results) -> None:
    """Two runs of the baseline and six of the other: two pairs, whatever was measured besides."""
    table = results.table.drop_vars("seed_invariant").copy(deep=True)
    for name in table.data_vars:
        table[name].loc[{"condition": "baseline"}] = table[name].loc[{"condition": "finetuned"}] + 1
        table[name].loc[{"condition": "baseline", "seed": list(SEEDS[2:])}] = np.nan
    unequal = replace(results, table=table, document=analyse(table, FAST))
    (comparison,) = ReportedStudy(unequal).comparisons
    assert comparison.runs == 2
    assert not comparison.speaks_of_runs
    (scope,) = scope_sentences(unequal, [comparison])
    assert "2 training runs of finetuned were paired" in scope
    assert "2 training runs are too few for a seed-level test at 0.05 (an exact sign flip needs 6)" in scope
    assert {test.runs for test in comparison.crossed} == {2}


def test_every_table_of_runs_can_be_downloaded(results: Results) -> None:
    files = {name: link for name, link, *_ in downloads(results, "")}
    for name, entries in (
        ("crossed.csv", results.document.crossed),
        ("run_controls.csv", results.document.run_controls),
        ("run_spreads.csv", results.document.run_spreads),
    ):
        content = b64decode(files[name].partition("base64,")[2]).decode()
        assert len(list(csv.DictReader(io.StringIO(content)))) == len(entries) > 0


def test_with_one_run_nothing_is_said_of_runs(tmp_path: Path) -> None:
    options = {"conditions": ("baseline", "finetuned"), "samples": False, "gradcam": False, "permutations": 49}
    summary, page = texts(small(tmp_path, **options))
    for said in ("Two training runs", "runs and images", "runs needed"):
        assert said not in summary
        assert said not in page
