"""Does a finding depend on the convention: what is one, what each says, and where a study says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from safetensors.torch import save_file

from engine.config import all_metrics, chosen_metrics, conventions
from engine.config.study import MeasureConfig
from engine.measure.table import read_table
from engine.run import main
from engine.statistics import (
    Multiverse,
    Settings,
    Specification,
    analyse,
    compare_conventions,
    compare_paired,
    parse_comparison,
    write_comparison,
)
from kernels import METRICS, load_metrics, other_conventions
from tests.cases import layout
from tests.photographs import write_photographs
from tests.synthetic_study import build_study, results_of, texts

IMAGES, LAYERS, HEADS = 40, 3, 4
SETTINGS = Settings(permutations=199)


class TestDeclared:
    def test_conventions_lead_to_a_metric_that_is_none_itself(self) -> None:
        for name, spec in METRICS.items():
            assert not (spec.convention_of and spec.rescales), name
            assert METRICS[spec.convention].convention == spec.convention, name
            assert METRICS[spec.construct].construct == spec.construct == METRICS[spec.construct].name, name
            assert METRICS[spec.construct].inputs == spec.inputs, name

    def test_what_rescales_is_a_multiple_and_what_is_a_convention_is_none(self) -> None:
        """Over random maps of a layout with a prefix: a constant ratio is a unit, and no specification of its own."""
        of = layout(5, 7, 1)
        attention = np.random.default_rng(0).dirichlet(np.full(of.num_tokens, 0.3), (40, of.num_tokens))
        values = {name: spec.reference(attention, of) for name, spec in METRICS.items() if spec.inputs == "rows"}
        for name, spec in METRICS.items():
            if spec.rescales or spec.convention_of:
                one, other = (
                    values[key].reshape(40, -1).mean(axis=1) for key in (name, spec.rescales or spec.construct)
                )
                assert (np.ptp(one / other) < 1e-12 * (one / other).max()) == bool(spec.rescales), name

    def test_those_of_a_choice_are_each_once_and_none_in_another_unit(self) -> None:
        def others(*metrics: str) -> list[str]:
            return [spec.name for spec in other_conventions(load_metrics(metrics))]

        assert others("distance") == others("distance_walmer") == ["distance_px"]
        assert others("distance_seed1") == ["distance"]
        assert others("distance", "distance_px", "gini") == []
        assert others("morans_i", "entropy_normalized") == ["entropy_seed1", "morans_i_received", "morans_i_seed1"]

    def test_a_configuration_measures_them_where_it_says_so(self) -> None:
        assert conventions(MeasureConfig()) is None
        asked = MeasureConfig(metrics=("gini", "entropy"), conventions=True)
        assert conventions(asked) == ("entropy_seed1",)
        assert all_metrics(asked) == ("gini", "entropy", "entropy_seed1")
        assert conventions(MeasureConfig(metrics=("gini",), conventions=True)) == ()


def table_of(
    differences: Mapping[str, np.ndarray], others: Sequence[str] = (), **attributes: Mapping[str, str]
) -> xr.Dataset:
    """A table of two conditions whose differences [image, layer, head] these are, over noise that both share.

    `others` were not asked for.
    """
    random = np.random.default_rng(7)
    variables = {}
    for name, difference in differences.items():
        base = 10 + random.normal(size=difference.shape) + 3 * np.arange(difference.shape[2])
        described = {"units": "1"} | dict(attributes.get(name, {}))
        values = np.stack([base, base + difference])[:, np.newaxis]
        variables[name] = (("condition", "seed", "image", "layer", "head"), values, described)
    layers, heads = difference.shape[1:]
    coords = {
        "condition": ["baseline", "finetuned"],
        "seed": [0],
        "image": np.arange(len(difference)),
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "site": ("layer", [f"blocks.{i}.attn" for i in range(layers)]),
    }
    return xr.Dataset(variables, coords, {"conventions": json.dumps(list(others))})


def effect(size: float, heads: int = HEADS, seed: int = 1) -> np.ndarray:
    """Differences [image, layer, head] about `size`, each head's by its own noise."""
    return size + 0.3 * np.random.default_rng(seed).normal(size=(IMAGES, LAYERS, heads))


def ways(result: Multiverse) -> dict[tuple[str, str], Specification]:
    return {(one.metric, one.heads): one for one in result.specifications}


class TestCompared:
    def test_numbers_are_those_of_a_comparison_of_each_specification(self) -> None:
        table = table_of({"a": effect(0.1), "b": effect(0.1, seed=2)}, b={"construct": "a"}, others=["b"])
        first, second, third = compare_conventions(table, SETTINGS)
        assert [first.layer, second.layer, third.layer] == [0, 1, 2]
        assert (first.metric, first.site, first.specifications[0].metric) == ("a", "blocks.0.attn", "a")
        assert list(ways(first)) == [(m, h) for m in ("a", "b") for h in ("mean", "median", "max")]
        sides = {
            (metric, heads): [take(values, axis=-1) for values in table[metric].values[:, 0]]
            for metric in ("a", "b")
            for heads, take in (("mean", np.mean), ("median", np.median), ("max", np.max))
        }
        together = compare_paired(*np.stack(list(sides.values()), axis=2), **SETTINGS.resampling())["p_max_t"].values
        for number, (way, (before, after)) in enumerate(sides.items()):
            alone = compare_paired(before, after, **SETTINGS.resampling())
            for layer, result in enumerate((first, second, third)):
                one = ways(result)[way]
                assert one.difference == pytest.approx((after - before)[:, layer].mean(), abs=1e-12)
                assert one.dz == pytest.approx(float(alone["dz"][layer]), rel=1e-9)
                assert one.p_max_t == alone["p_max_t"][layer]
                assert one.p_joint == together[number, layer] >= one.p_max_t

    def test_a_convention_that_reverses_the_sign_opposes(self) -> None:
        table = table_of({"a": effect(1), "b": effect(-1)}, others=["b"], b={"construct": "a"})
        for result in compare_conventions(table, SETTINGS):
            assert len(result.specifications) == 6
            assert result.agreeing == result.claiming(0.05) == result.claiming(0.05, jointly=True) == 3
            assert result.opposing(0.05) == 3
            assert {one.metric for one in result.specifications if one.same_sign} == {"a"}

    def test_what_cancels_in_the_mean_of_heads_does_not_in_their_maximum(self) -> None:
        """Half of the heads rise and half fall as much: the mean sees nothing, the greatest one what it does."""
        turned = effect(0) + np.array([-1, -1, 1, 1])
        turned -= turned.mean(axis=-1, keepdims=True)  # exactly what cancels, but for a hundredth
        turned += 0.01 * np.random.default_rng(3).normal(size=(IMAGES, LAYERS, 1))
        for result in compare_conventions(table_of({"a": turned}), SETTINGS):
            mean, greatest = ways(result)["a", "mean"], ways(result)["a", "max"]
            assert not mean.survives(0.05)
            assert greatest.survives(0.05, jointly=True)
            assert greatest.difference == pytest.approx(1, abs=0.2)

    def test_a_constant_factor_is_no_other_specification(self) -> None:
        """Another unit, whether it is declared or not; the mean of one or of two heads under another name."""
        table, others = table_of({"a": effect(1)}), {"conventions": '["b"]'}
        for named in ({"construct": "a", "convention": "a"}, {"construct": "a"}):
            again = (16 * table["a"].astype(np.float32)).assign_attrs(units="px", **named)
            for result in compare_conventions(table.assign(b=again).assign_attrs(others), SETTINGS):
                assert list(ways(result)) == [("a", "mean"), ("a", "median"), ("a", "max")]
        for heads, distinct in ((1, ["mean"]), (2, ["mean", "max"])):
            for result in compare_conventions(table_of({"a": effect(1, heads)}), SETTINGS):
                assert [one.heads for one in result.specifications] == distinct

    def test_a_specification_without_any_value_but_one_says_nothing(self) -> None:
        table = table_of({"a": effect(1)})
        constant = xr.zeros_like(table["a"]).assign_attrs(construct="a", units="1")
        table = table.assign(b=constant).assign_attrs(conventions='["b"]')
        assert {one.metric for one in compare_conventions(table, SETTINGS)[0].specifications} == {"a"}

    def test_heads_without_a_pair_are_left_out_on_both_sides(self) -> None:
        table = table_of({"a": effect(1)})
        table["a"][0, 0, :, :, 3] = np.nan  # the greatest head of the baseline
        assert ways(compare_conventions(table, SETTINGS)[0])["a", "max"].difference == pytest.approx(1, abs=0.2)
        table["a"][0, 0, :, 1] = np.nan
        assert [result.layer for result in compare_conventions(table, SETTINGS)] == [0, 2]


def test_other_analyses_are_those_of_the_chosen_metrics(tmp_path: Path) -> None:
    asked = table_of({"a": effect(1), "b": effect(-1), "c": effect(0)}, others=["b"], b={"construct": "a"})
    table = asked.drop_attrs(deep=False)
    assert list(chosen_metrics(asked)) == ["a", "c"]
    found = analyse(asked, SETTINGS)
    assert replace(found, multiverse=()) == analyse(table[["a", "c"]], SETTINGS)
    assert analyse(table, SETTINGS).multiverse == ()
    assert [(one.metric, one.layer) for one in found.multiverse] == [(m, i) for m in "ac" for i in range(LAYERS)]
    write_comparison(tmp_path / "comparison.json", found)
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert parse_comparison(document, tmp_path) == found


def with_conventions(outputs: Path) -> Path:
    """A study whose first metric was measured by another convention, too: the opposite one."""
    path = outputs / "metrics" / "attention_metrics.zarr"
    table = read_table(path).load()
    other = (1 - table["distance"]).assign_attrs(units="px", construct="distance", convention="other")
    table = table.assign(other=other).assign_attrs(conventions='["other"]', metrics=json.dumps([*table, "other"]))
    table.to_zarr(path, mode="w", zarr_format=3, consolidated=False)
    comparison = parse_comparison(json.loads((outputs / "metrics/attention_comparison.json").read_text()), outputs)
    found = analyse(table, comparison.settings)
    write_comparison(outputs / "metrics/attention_comparison.json", replace(comparison, multiverse=found.multiverse))
    return outputs


@pytest.mark.filterwarnings("ignore:.*Zarr")
def test_the_report_says_which_findings_depend_on_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"metrics": ("distance", "entropy"), "regions": (), "images": 24, "samples": False}
    without = texts(build_study(tmp_path / "without", **options))
    outputs = with_conventions(build_study(tmp_path / "with", **options))
    results, (summary, page) = results_of(outputs), texts(outputs)
    assert results.metrics == ("distance", "entropy")
    for text in without:
        assert "Does it depend on the convention?" not in text
    for text in (summary, page):
        assert "Does it depend on the convention?" in text
    before, after = summary.split("## Does it depend on the convention?")
    assert before + after[after.index("\n## ") + 1 :] == without[0], "all else is as without"
    changes = [line for line in after.splitlines() if line.startswith("- distance in layer ")]
    assert len(changes) == 2
    assert "3 of 6 specifications have this sign, 3 of 6 claim it, 3 of 6 claim the opposite" in changes[0]
    assert "other, max" in page
    assert "distance, mean*" in page


@pytest.mark.filterwarnings("ignore:.*Zarr")
def test_a_study_toml_asks_for_it(tmp_path: Path) -> None:
    """Two checkpoints: conventions are in the store and the table, and in the comparison as what they are."""
    write_photographs(tmp_path / "photos", per_class=4)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / f"{name}.safetensors")
    (tmp_path / "study.toml").write_text(
        f'outputs = "{(tmp_path / "out").as_posix()}"\nmodel.name = "test_vit"\ncapture.samples = 0\n'
        f'data = {{kind = "folder", root = "{(tmp_path / "photos").as_posix()}", split = "all", cache = false}}\n'
        "[conditions]\n"
        f'baseline = {{recipe = "checkpoint", checkpoint = "{(tmp_path / "a.safetensors").as_posix()}"}}\n'
        f'finetuned = {{recipe = "checkpoint", checkpoint = "{(tmp_path / "b.safetensors").as_posix()}"}}\n'
        '[measure]\nmetrics = ["distance_walmer", "prefix_mass"]\nconventions = true\nbackend = "torch"\n'
        "[statistics]\npermutations = 199\n"
    )
    assert main(["stats", "--config", str(tmp_path / "study.toml")]) == 0
    table = read_table(tmp_path / "out/metrics/attention_metrics.zarr")
    assert list(table) == ["distance_walmer", "prefix_mass", "distance_px"]
    assert list(chosen_metrics(table)) == ["distance_walmer", "prefix_mass"]
    document = json.loads((tmp_path / "out/metrics/attention_comparison.json").read_text())
    for tested in ({test["metric"] for test in document["tests"]}, set(document["undefined"])):
        assert tested == {"distance_walmer", "prefix_mass"}
    of_heads = ("mean", "max") if table.sizes["head"] == 2 else ("mean", "median", "max")
    for entry in document["multiverse"]:
        expected = ["prefix_mass"] if entry["metric"] == "prefix_mass" else ["distance_walmer", "distance_px"]
        found = [(one["metric"], one["heads"]) for one in entry["specifications"]]
        assert found == [(metric, heads) for metric in expected for heads in of_heads]
