"""attention_comparison.json: what it holds, and that it is whole, plain and reproducible."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from engine.statistics import (
    Accuracy,
    Comparison,
    Control,
    PairedTest,
    Settings,
    analyse,
    declaration,
    parse_comparison,
    write_comparison,
)
from store import DiskError
from train.errors import InputError

FAST = Settings(permutations=99)
EMPTY = Comparison(settings=FAST)
SELF = Control("self", "Itself", "0", 0.0, True, "2 layers")
HALF = Accuracy(validation=None, test=0.5, chance=0.25, images=8)


@pytest.fixture
def table() -> xr.Dataset:
    rng = np.random.default_rng(0)
    dims = ("condition", "seed", "image", "layer", "head")
    entropy = rng.uniform(1, 5, size=(2, 2, 6, 3, 2))
    entropy[0, 1] = np.nan  # stored for one seed
    entropy[1, :, :, 2] = np.nan  # a layer without a value
    return xr.Dataset(
        {
            "entropy": (dims, entropy, {"units": "nat"}),
            "region_mass": ((*dims, "region"), rng.uniform(size=(2, 2, 6, 3, 2, 2)), {"units": "1"}),
        },
        coords={
            "condition": ["baseline", "finetuned"],
            "seed": [1, 2],
            "layer": [0, 1, 2],
            "site": ("layer", [f"blocks.{i}.attn" for i in range(3)]),
            "region": ["target_digit", "other_digit"],
            "seed_invariant": ("condition", [True, False]),
        },
    )


def written(path: Path, comparison: Comparison) -> dict[str, Any]:
    write_comparison(path, comparison)
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


@pytest.fixture
def document(table: xr.Dataset, tmp_path: Path) -> dict[str, Any]:
    return written(tmp_path / "document.json", analyse(table, FAST))


def test_document_of_a_table(table: xr.Dataset, tmp_path: Path) -> None:
    comparison = replace(analyse(table, FAST), controls=(SELF,), accuracy={"baseline": {"1": HALF}})
    document = written(tmp_path / "attention_comparison.json", comparison)

    names = [field.name for field in fields(Comparison)]
    assert list(document) == names == [*names[:5], *sorted(names[5:])]
    assert document["schema"] == 1
    assert document["layers"] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert document["units"] == {"entropy": "nat", "region_mass": "1"}
    assert document["settings"]["permutations"] == 99
    assert len(document["tests"]) == len(comparison.tests) > 0
    assert document["tests"][0]["ci"] == list(comparison.tests[0].ci or ())
    expected = {"name": "self", "title": "Itself", "expectation": "0", "value": 0.0, "held": True, "detail": "2 layers"}
    assert [list(control.items()) for control in document["controls"]] == [list(expected.items())]
    accuracy = {"validation": None, "test": 0.5, "chance": 0.25, "images": 8}
    assert list(document["accuracy"]["baseline"]["1"].items()) == list(accuracy.items())
    baseline, finetuned = document["conditions"]["baseline"], document["conditions"]["finetuned"]
    assert list(baseline) == ["entropy", "region_mass[target_digit]", "region_mass[other_digit]"]
    np.testing.assert_allclose(baseline["entropy"], table.entropy[0, 0].mean(("image", "head")))
    np.testing.assert_allclose(finetuned["entropy"][:2], table.entropy[1].mean(("seed", "image", "head"))[:2])
    assert finetuned["entropy"][2] is None
    np.testing.assert_allclose(
        finetuned["region_mass[other_digit]"],
        table.region_mass.sel(condition="finetuned", region="other_digit").mean(("seed", "image", "head")),
    )


def test_infinite_values_are_missing(table: xr.Dataset, tmp_path: Path) -> None:
    table["entropy"][0, 0, 0, 0, 0] = np.inf
    document = written(tmp_path / "attention_comparison.json", analyse(table, FAST))
    known = table.entropy.where(np.isfinite(table.entropy)).sel(condition="baseline")
    np.testing.assert_allclose(document["conditions"]["baseline"]["entropy"][0], known[0, :, 0].mean())


def test_what_is_read_back_is_what_was_built(table: xr.Dataset, tmp_path: Path) -> None:
    path = tmp_path / "attention_comparison.json"
    comparison = replace(analyse(table, FAST), controls=(SELF,), accuracy={"baseline": {"1": HALF}})
    assert any(test.p is None and test.degenerate for test in comparison.tests)
    read = parse_comparison(written(path, comparison), path)
    assert read == comparison
    first = path.read_bytes()
    write_comparison(path, read)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == [path.name]  # nothing temporary is left


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("tests", "metric", None, "tests[0] has no metric; expected text"),
        ("tests", "layer", "first", "tests[0].layer is 'first'; expected a whole number"),
        ("tests", "p", [0.1], "tests[0].p is [0.1]; expected a number"),
        ("tests", "ci", [1], "tests[0].ci is [1]; expected two numbers"),
        ("tests", "ci", [1, "x"], "tests[0].ci is [1, 'x']; expected two numbers"),
        ("tests", "level", "token", "tests[0].level is 'token'; expected one of head, layer, class, seed, layer_means"),
        ("trends", "deep_layers", 3, "trends[0].deep_layers is 3; expected whole numbers"),
    ],
)
def test_a_foreign_document_is_one_sentence(
    document: dict[str, Any], part: str, name: str, value: Any, says: str
) -> None:
    document = json.loads(json.dumps(document))
    document[part][0][name] = value
    with pytest.raises(InputError) as caught:
        parse_comparison(document, Path("a.json"))
    assert str(caught.value) == f"a.json: {says}; run the statistics stage again"


def test_a_key_that_is_missing_is_one_sentence(document: dict[str, Any]) -> None:
    """What is always written: without it tests would be left out, or an accuracy shown as 0 %, and nothing said."""
    document["controls"] = [dataclasses.asdict(SELF)]
    document["accuracy"] = {"baseline": {"1": dataclasses.asdict(HALF)}}
    places = {
        "": document,
        "tests[0] ": document["tests"][0],
        "trends[0] ": document["trends"][0],
        "relations[0] ": document["relations"][0],
        "controls[0] ": document["controls"][0],
        "accuracy.baseline.1 ": document["accuracy"]["baseline"]["1"],
        "settings (": document["settings"],
    }
    parse_comparison(document, Path("a.json"))
    for place, entry in places.items():
        for name, value in list(entry.items()):
            del entry[name]
            with pytest.raises(InputError) as caught:
                parse_comparison(document, Path("a.json"))
            entry[name] = value
            said = str(caught.value)
            assert said.startswith("a.json: ")
            assert name in said
            assert place in said
            assert "\n" not in said


def test_parts_that_are_no_lists_are_refused(document: dict[str, Any]) -> None:
    for wrong, says in (
        ({"tests": 3}, "tests is 3; expected a list"),
        ({"tests": ["x"]}, "tests[0] is 'x'; expected an"),
    ):
        with pytest.raises(InputError) as caught:
            parse_comparison(document | wrong, Path("a.json"))
        assert str(caught.value).startswith(f"a.json: {says}")


def test_extra_values_become_plain(tmp_path: Path) -> None:
    data = {"n": np.int64(3), "list": np.array([1.0, np.nan]), "text": "ü", "nested": {"none": None, "yes": np.True_}}
    assert written(tmp_path / "a", replace(EMPTY, data=data))["data"] == {
        "n": 3,
        "list": [1.0, None],
        "text": "ü",
        "nested": {"none": None, "yes": True},
    }


def test_what_cannot_be_said_in_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document\.data\.largest is infinite"):
        write_comparison(tmp_path / "a", replace(EMPTY, data={"largest": np.float32(np.inf)}))
    with pytest.raises(ValueError, match=r"document\.data\.paths\[1\] is a (Posix|Windows)Path"):
        write_comparison(tmp_path / "a", replace(EMPTY, data={"paths": [1, Path("x")]}))
    assert not list(tmp_path.iterdir())


def test_failed_writing_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "attention_comparison.json"
    write_comparison(path, EMPTY)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_comparison(path, replace(EMPTY, data={"x": float("inf")}))

    def full(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="no space left"):
        write_comparison(path, replace(EMPTY, data={"x": 1}))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_declaration_names_every_field_down_to_those_of_the_parts() -> None:
    """It is an input of the stage: without one of them a document would be read that lacks it."""
    whole = declaration(Comparison)
    assert whole["tests"][:2] == [str(tuple), declaration(PairedTest)]
    assert whole["accuracy"][2][2] == declaration(Accuracy)
    assert set(whole) == {entry.name for entry in fields(Comparison)}
