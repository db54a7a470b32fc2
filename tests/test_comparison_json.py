"""attention_comparison.json: what it holds, and that it is whole, plain and reproducible."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from engine.statistics import compare_conditions
from engine.statistics.document import comparison_document, write_comparison
from store import DiskError


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


def test_document_of_a_table(table: xr.Dataset, tmp_path: Path) -> None:
    tests = compare_conditions(table, permutations=99, bootstrap=50)
    write_comparison(
        tmp_path / "attention_comparison.json", comparison_document(table, tests, {"controls": {"self": 0.0}})
    )
    document = json.loads((tmp_path / "attention_comparison.json").read_text(encoding="utf-8"))

    assert list(document) == ["schema", "layers", "units", "conditions", "tests", "controls"]
    assert document["schema"] == 1
    assert document["layers"] == ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]
    assert document["units"] == {"entropy": "nat", "region_mass": "1"}
    assert document["tests"] == tests
    baseline, finetuned = document["conditions"]["baseline"], document["conditions"]["finetuned"]
    assert list(baseline) == ["entropy", "region_mass[target_digit]", "region_mass[other_digit]"]
    np.testing.assert_allclose(baseline["entropy"], table.entropy[0, 0].mean(("image", "head")))
    np.testing.assert_allclose(finetuned["entropy"][:2], table.entropy[1].mean(("seed", "image", "head"))[:2])
    assert finetuned["entropy"][2] is None
    np.testing.assert_allclose(
        finetuned["region_mass[other_digit]"],
        table.region_mass.sel(condition="finetuned", region="other_digit").mean(("seed", "image", "head")),
    )


def test_same_document_same_bytes(table: xr.Dataset, tmp_path: Path) -> None:
    for name, extra in (("a", {"x": 1, "data": [2]}), ("b", {"data": [2], "x": 1})):
        write_comparison(tmp_path / name, comparison_document(table, [], extra))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]  # nothing temporary is left


def test_extra_values_become_plain(table: xr.Dataset) -> None:
    extra = {"n": np.int64(3), "list": np.array([1.0, np.nan]), "text": "ü", "nested": {"none": None, "yes": np.True_}}
    document = comparison_document(table, [], extra)
    assert {key: document[key] for key in extra} == {
        "n": 3,
        "list": [1.0, None],
        "text": "ü",
        "nested": {"none": None, "yes": True},
    }
    assert "2024" in json.dumps(comparison_document(table, [], {"year": 2024}), allow_nan=False)


def test_what_cannot_be_said_in_json_is_refused(table: xr.Dataset) -> None:
    with pytest.raises(ValueError, match=r"document\.data\.largest is infinite"):
        comparison_document(table, [], {"data": {"largest": np.float32(np.inf)}})
    with pytest.raises(ValueError, match=r"document\.data\[1\] is a Path|document\.data\[1\] is a PosixPath"):
        comparison_document(table, [], {"data": [1, Path("x")]})
    with pytest.raises(ValueError, match="extra keys tests are the document's own"):
        comparison_document(table, [], {"tests": []})


def test_failed_writing_leaves_the_previous_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "attention_comparison.json"
    write_comparison(path, {"schema": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_comparison(path, {"schema": float("nan")})

    def full(source: str, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DiskError, match="no space left"):
        write_comparison(path, {"schema": 2})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
