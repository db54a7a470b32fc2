"""Attention as HDF5, out and in; metrics of two stores; a user's own metrics; all by the command line."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import store_cases as case

from engine.measure import measure_store
from engine.run import main
from kernels import MetricSpec, TokenLayout, measure_attention, measure_pair
from store import AttentionStore
from store.verify import verify
from train.errors import InputError

LAYOUT = TokenLayout.from_dict(case.LAYOUT)

# What a user keeps in a module of their own.
own_peak = MetricSpec(
    name="own_peak",
    unit="1",
    inputs="rows",
    reference=lambda p, layout: layout.patches(p).max(axis=-1),
    undefined="a row without mass on the patches",
    source="this test",
)
own_overlap = MetricSpec(
    name="own_overlap",
    unit="1",
    inputs="pair",
    reference=lambda p, q, layout: np.minimum(layout.patches(p), layout.patches(q)).sum(axis=-1),
    undefined="a row without mass on the patches in either",
    source="this test",
)


def store_of(path: Path, encoding: str = "fp16", **changes: object) -> Path:
    case.capture(path, case.make_schema(encoding, **changes))
    return path


def stores(folder: Path, first: str = "fp16", second: str = "fp16") -> tuple[Path, Path]:
    """Two conditions: one case as it is, and one whose layers hold other maps."""
    one, two = store_of(folder / "one.zarr", first), folder / "two.zarr"
    schema = case.make_schema(second, model={"name": "vit_test", "weights_sha256": "2" * 64})
    with case.AttentionWriter.open(two, schema, **case.fixed(schema)) as writer:
        for batch in writer.missing:
            rows = schema.batch_rows(batch)
            for layer in (0, 1):
                turned = case.maps(layer)[::-1].copy()
                writer.add_attention(
                    batch, layer, case.attention(schema, layer, rows) if second == "qk" else turned[rows]
                )
            writer.commit(
                batch,
                {name: case.metric(name)[rows] for name in schema.metrics},
                {name: case.counts(name)[rows] for name in schema.metrics},
                case.logits()[rows],
            )
        writer.finish()
    return one, two


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("first", "second"), [("fp16", "fp16"), ("bf16", "bf16"), ("qk", "qk"), ("fp16", "bf16"), ("qk", "fp16")]
)
def test_pair_metrics_of_two_stores(tmp_path: Path, first: str, second: str) -> None:
    one, two = stores(tmp_path, first, second)
    store = measure_store(one, ["js_divergence", "distance"], "auto", against=two)
    other = AttentionStore.open(two)
    values, parameters = store.read_metric("js_divergence")
    assert parameters["against"] == {"store": "two.zarr", "capture": other.digest}
    for layer in (0, 1):
        heads = case.HEADS[layer]
        expected = measure_pair(*(_exact(each.read(layer)) for each in (store, other)), LAYOUT, backend="reference")
        atol = 1e-6 if first == second else {"fp16": 2e-3, "bf16": 2e-3, "qk": 1e-4}[first]
        np.testing.assert_allclose(values[:, layer, :heads], expected["js_divergence"], atol=atol)
        assert np.isnan(values[:, layer, heads:]).all()
        alone = measure_attention(_exact(store.read(layer)), LAYOUT, ["distance"], backend="reference")
        np.testing.assert_allclose(store.read_metric("distance")[0][:, layer, :heads], alone["distance"], atol=1e-6)
    assert verify(one) == []


def _exact(maps: np.ndarray) -> np.ndarray:
    """Rows that sum to 1, so that the reference takes 16-bit maps as float64; pair metrics renormalise them anyway."""
    wide = maps.astype(np.float64)
    return wide / wide.sum(axis=-1, keepdims=True)


def test_a_condition_against_itself_differs_by_nothing(tmp_path: Path) -> None:
    one = store_of(tmp_path / "one.zarr")
    values, _ = measure_store(one, ["js_divergence"], "auto", against=one).read_metric("js_divergence")
    assert np.nanmax(np.abs(values)) == 0


def test_only_what_both_have_is_compared_and_later_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = store_of(tmp_path / "one.zarr"), tmp_path / "two.zarr"
    schema = case.make_schema()
    with case.AttentionWriter.open(two, schema, **case.fixed()) as writer:
        case.write(writer, 1)
    measure = ["measure", "--store", str(one), "--metrics", "js_divergence", "--against", str(two)]
    assert main(measure) == 0
    assert "only 4 of 11 images" in "".join(capsys.readouterr())
    case.capture(two)
    assert main(measure) == 0
    assert main(measure) == 0
    assert "holds js_divergence already" in capsys.readouterr().out
    assert np.isfinite(AttentionStore.open(one).read_metric("js_divergence")[0][:, 0]).all()


def test_another_store_is_another_measurement(tmp_path: Path) -> None:
    one, two = stores(tmp_path)
    measure_store(one, ["js_divergence"], "auto", against=two)
    store = measure_store(one, ["js_divergence"], "auto", against=one)
    assert len(store.metric_params("js_divergence")) == 2


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    one = store_of(tmp_path / "one.zarr")
    with pytest.raises(InputError, match="js_divergence compares two captures; name the other one with --against"):
        measure_store(one, ["distance", "js_divergence"], "auto")
    with pytest.raises(InputError, match="none of distance compares two captures"):
        measure_store(one, ["distance"], "auto", against=one)
    other = store_of(tmp_path / "other.zarr", image_ids=tuple(f"{row}.png" for row in range(11)))
    with pytest.raises(InputError, match="captured over other images than"):
        measure_store(one, ["js_divergence"], "auto", against=other)
    plain = store_of(tmp_path / "plain.zarr", encoding="")
    with pytest.raises(InputError, match=r"plain\.zarr holds no attention maps, so js_divergence"):
        measure_store(one, ["js_divergence"], "auto", against=plain)


def test_a_users_metrics_of_one_and_of_two_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    one, two = stores(tmp_path)
    names = "test_store_exchange:own_peak,test_store_exchange:own_overlap"
    assert main(["measure", "--store", str(one), "--metrics", names, "--against", str(two)]) == 0
    store = AttentionStore.open(one)
    p, q = (LAYOUT.patches(_exact(AttentionStore.open(path).read(0))) for path in (one, two))
    np.testing.assert_allclose(store.read_metric("own_peak")[0][:, 0], p.max(-1).mean(-1), atol=1e-3)
    np.testing.assert_allclose(store.read_metric("own_overlap")[0][:, 0], np.minimum(p, q).sum(-1).mean(-1), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- HDF5


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_out_and_in_again(tmp_path: Path, encoding: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, file, back = store_of(tmp_path / "one.zarr", encoding), tmp_path / "maps.h5", tmp_path / "back.zarr"
    assert main(["export", "--store", str(one), "--hdf5", str(file)]) == 0
    store = AttentionStore.open(one)
    with h5py.File(file) as opened:
        for layer in (0, 1):
            dataset = opened[f"attention/layer_0{layer}"]
            np.testing.assert_array_equal(dataset[...].astype(np.float32), store.read(layer))
            assert [dim.label for dim in dataset.dims] == ["image", "head", "query", "key"]
        assert [name.decode() for name in opened["images/id"]] == list(store.image_ids)
    kept = "fp16" if encoding == "fp16" else "bf16"
    assert main(["import", "--hdf5", str(file), "--store", str(back), "--encoding", kept, "--batch-size", "5"]) == 0
    assert "11 images, 2 layers" in capsys.readouterr().out
    again = AttentionStore.open(back)
    assert (again.image_ids, again.sites, again.layouts) == (store.image_ids, store.sites, store.layouts)
    np.testing.assert_array_equal(again.labels, store.labels)
    if encoding != "qk":
        np.testing.assert_array_equal(again.read(1), store.read(1))
    assert verify(back) == []
    assert main(["measure", "--store", str(back), "--metrics", "distance,entropy"]) == 0
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith("maps")) == ["maps.h5"]


@pytest.mark.parametrize("one_array", [True, False])
def test_a_users_own_file(tmp_path: Path, one_array: bool) -> None:
    """Plain arrays: one a layer under names that are no numbers' order as text, or one for all layers."""
    rng = np.random.default_rng(0)
    maps = {f"block{layer}": rng.dirichlet(np.ones(14), size=(6, 2, 14)).astype(np.float32) for layer in (2, 10)}
    with h5py.File(tmp_path / "own.h5", "w") as file:
        if one_array:
            file["attention"] = np.stack(list(maps.values()), axis=1)
        else:
            for name in ("block10", "block2"):
                file[f"vit/{name}"] = maps[name]
    command = ["import", "--hdf5", str(tmp_path / "own.h5"), "--store", str(tmp_path / "own.zarr")]
    assert main([*command, "--grid", "3,4", "--hdf5.prefix_tokens", "2", "--hdf5.patch_px", "4,4"]) == 0
    store = AttentionStore.open(tmp_path / "own.zarr")
    assert store.sites == (("attention[0]", "attention[1]") if one_array else ("vit/block2", "vit/block10"))
    assert store.layouts[0] == case.LAYOUT
    for layer, expected in enumerate(maps.values()):
        np.testing.assert_array_equal(store.read(layer), expected.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        ({"a": np.full((2, 1, 14, 14), 1 / 14)}, [], "does not say how its 14 tokens lie; give --grid ROWS,COLS"),
        ({"a": np.full((2, 1, 14, 14), 1 / 14)}, ["--grid", "3,3"], "a grid of 3×3 with 1 prefix tokens has 10"),
        ({"a": np.full((2, 1, 13, 13), 0.5)}, ["--grid", "3,4"], "the row of image 0, head 0, query 0 sums to 6.5"),
        ({"a": np.ones((2, 1, 13, 12))}, ["--grid", "3,4"], "as many queries as keys"),
        ({"a": np.ones((2, 1, 13, 13), int)}, ["--grid", "3,4"], "a is int64"),
        ({"a": np.ones((2, 3))}, [], "holds no attention; expected a dataset"),
        ({}, ["--encoding", "qk"], "encoding qk keeps query and key, and a file of maps has none"),
    ],
)
def test_files_that_hold_something_else_are_one_sentence(
    tmp_path: Path, content: dict[str, np.ndarray], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with h5py.File(tmp_path / "own.h5", "w") as file:
        for name, values in content.items():
            file[name] = values
    assert main(["import", "--hdf5", str(tmp_path / "own.h5"), "--store", str(tmp_path / "s.zarr"), *flags]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_an_incomplete_store_is_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with case.AttentionWriter.open(tmp_path / "run.zarr", case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 1)
    assert main(["export", "--store", str(tmp_path / "run.zarr"), "--hdf5", str(tmp_path / "maps.h5")]) == 1
    assert "lacks 7 images; resume its capture" in capsys.readouterr().err
    assert not (tmp_path / "maps.h5").exists()
