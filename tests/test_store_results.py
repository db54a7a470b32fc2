"""Metrics computed later, and tables as HDF5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import store_cases as case
import xarray

from store import AttentionStore, AttentionWriter, StoreError
from store.disk import making_alone
from store.hdf5 import BLOCK_BYTES, read_table, sealed, write_table
from store.ledger import Ledger
from store.results import MetricWriter, has_metric
from store.verify import info, verify

PARAMS = case.LATER["later_a"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    case.capture(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def test_only_what_is_missing_is_asked_for(path: Path) -> None:
    assert not has_metric(AttentionStore.open(path), "later_a", PARAMS)
    everything = dict.fromkeys(range(3), ("later_a", "later_b"))
    assert case.measure(path) == everything
    assert case.measure(path) == {}
    assert has_metric(AttentionStore.open(path), "later_a", PARAMS)
    assert not has_metric(AttentionStore.open(path), "later_a", PARAMS | {"code_version": "2"})
    store = AttentionStore.open(path)
    assert store.metric_names == ("region_mass", "entropy", "later_a", "later_b")
    values, params = store.read_metric("later_a")
    np.testing.assert_array_equal(values, case.metric("later_a"))
    np.testing.assert_array_equal(store.read_undefined("later_a"), case.counts("later_a"))
    assert params == PARAMS
    assert verify(path) == []
    assert {"name": "later_a", "params": PARAMS, "batches": 3} in info(path)["metrics"]


def test_a_measurement_goes_on_where_it_stopped(path: Path) -> None:
    with MetricWriter.open(AttentionStore.open(path), {"later_a": PARAMS}) as writer:
        writer.write_batch(1, {"later_a": case.metric("later_a")[4:8]}, {"later_a": case.counts("later_a")[4:8]})
        writer.flush()
        assert sorted(writer.missing) == [0, 2]
    assert not has_metric(AttentionStore.open(path), "later_a", PARAMS)
    store = AttentionStore.open(path)
    np.testing.assert_array_equal(store.read_metric("later_a", slice(4, 8))[0], case.metric("later_a")[4:8])
    with pytest.raises(StoreError, match=r"batch 0 of metrics/later_a/\w+ is not committed"):
        store.read_metric("later_a")
    assert verify(path) == []
    assert case.measure(path) == {0: ("later_a", "later_b"), 1: ("later_b",), 2: ("later_a", "later_b")}
    assert has_metric(AttentionStore.open(path), "later_a", PARAMS)


def test_info_of_a_store_with_one_damaged_metric_shows_the_rest(path: Path) -> None:
    """A capture tells by it what it wrote, and cannot repair what was measured later."""
    case.measure(path)
    file = next(path.glob("metrics/later_a/*/value/zarr.json"))
    file.unlink()
    found = info(path)
    assert {metric["name"]: metric["batches"] for metric in found["metrics"]} == {
        "region_mass": 3,
        "entropy": 3,
        "later_a": 0,
        "later_b": 3,
    }
    assert [str(file) in sentence and "measure it again" in sentence for sentence in found["damaged"]] == [True]


def test_only_captured_batches_can_be_measured(tmp_path: Path) -> None:
    with AttentionWriter.open(tmp_path / "run.zarr", case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 2)
    assert sorted(case.measure(tmp_path / "run.zarr")) == [2]


def test_a_metric_of_the_capture_is_never_missing(path: Path) -> None:
    assert has_metric(AttentionStore.open(path), "entropy", {"backend": "numba"})
    with MetricWriter.open(AttentionStore.open(path), {"entropy": {"backend": "numba"}}) as writer:
        assert writer.missing == {}
        with pytest.raises(StoreError, match=r"batch 0 of .* lacks \[\]; found values of \['entropy'\]"):
            writer.write_batch(0, {"entropy": case.metric("entropy")[:4]}, {"entropy": case.counts("entropy")[:4]})
    file = next((path / "metrics" / "entropy").rglob("c.1.0.0"))
    file.unlink()
    assert not has_metric(AttentionStore.open(path), "entropy", {"backend": "numba"})


def test_metrics_measured_later_are_listed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an object store, each time is a LIST and a GET per metric."""
    looked: list[Ledger] = []
    read_later = Ledger.read_later

    def counted(self: Ledger) -> Any:
        looked.append(self)
        return read_later(self)

    store = AttentionStore.open(path)
    assert store.metric_names == ("region_mass", "entropy")
    case.measure(path)
    monkeypatch.setattr(Ledger, "read_later", counted)
    assert len(info(path)["metrics"]) == 4
    assert len(looked) == 1
    store.refresh()
    assert store.metric_names == ("region_mass", "entropy", "later_a", "later_b")
    np.testing.assert_array_equal(store.read_metric("later_b")[0], case.metric("later_b"))
    assert len(looked) == 2


def test_values_with_other_parameters_lie_side_by_side(path: Path) -> None:
    for version in ("1", "2"):
        with MetricWriter.open(
            AttentionStore.open(path), {"m": {"code_version": version}}, region_metrics=["m"]
        ) as writer:
            for batch in list(writer.missing):
                rows = writer.schema.batch_rows(batch)
                values = np.full_like(case.metric("region_mass")[rows], int(version))
                writer.write_batch(batch, {"m": values}, {"m": case.counts("m")[rows]})
    store = AttentionStore.open(path)
    assert store.metric_params("m") == [{"code_version": "1"}, {"code_version": "2"}]
    assert (store.read_metric("m", params={"code_version": "2"})[0] == 2).all()
    with pytest.raises(StoreError, match="several parameters"):
        store.read_metric("m")
    with pytest.raises(StoreError, match="has no 'm' with"):
        store.read_metric("m", params={"code_version": "3"})
    with pytest.raises(StoreError, match="has no metric 'n'; it has region_mass, entropy, m"):
        store.read_metric("n")
    # the same name, computed again by the same means as in the capture and by others
    with MetricWriter.open(AttentionStore.open(path), {"entropy": {"backend": "torch"}}) as writer:
        for batch in list(writer.missing):
            rows = writer.schema.batch_rows(batch)
            writer.write_batch(
                batch, {"entropy": np.zeros((len(range(11)[rows]), 2, 3))}, {"entropy": case.counts("entropy")[rows]}
            )
    store = AttentionStore.open(path)
    np.testing.assert_array_equal(store.read_metric("entropy")[0], case.metric("entropy"))
    assert (store.read_metric("entropy", params={"backend": "torch"})[0] == 0).all()
    assert verify(path) == []


def test_a_metric_writer_refuses_what_does_not_fit(path: Path, tmp_path: Path) -> None:
    with MetricWriter.open(AttentionStore.open(path), {"m": {}}) as writer:
        with pytest.raises(StoreError, match=r"metric 'm' has shape \(4, 2, 3, 2\); expected \(4, 2, 3\)"):
            writer.write_batch(0, {"m": case.metric("region_mass")[:4]}, {"m": case.counts("m")[:4]})
        with pytest.raises(StoreError, match="dtype float64; expected integers"):
            writer.write_batch(0, {"m": case.metric("m")[:4]}, {"m": np.zeros((4, 2, 3))})
        with pytest.raises(StoreError, match="is writing this store"):
            MetricWriter.open(AttentionStore.open(path), {"n": {}})
    with pytest.raises(StoreError, match="there is no store at"):
        MetricWriter.open(AttentionStore.open(tmp_path / "typo.zarr"), {"m": {}})
    assert not (tmp_path / "typo.ledger").exists()
    plain = tmp_path / "plain.zarr"
    schema = case.make_schema(regions=(), region_metrics=(), metrics={})
    with AttentionWriter.open(plain, schema, **case.fixed() | {"regions": None}):
        pass
    with pytest.raises(StoreError, match="has no regions, which m needs"):
        MetricWriter.open(AttentionStore.open(plain), {"m": {}}, region_metrics=["m"])


def test_metrics_are_not_added_to_another_capture_than_was_opened(path: Path) -> None:
    store = AttentionStore.open(path)
    AttentionWriter.discard(path)
    case.capture(path)
    with pytest.raises(StoreError, match=r"run\.zarr was captured again since it was opened; open it again"):
        MetricWriter.open(store, {"m": {}})
    assert AttentionStore.open(path).metric_names == ("region_mass", "entropy")


def test_a_writer_sees_the_batches_that_came_since_the_store_was_opened(tmp_path: Path) -> None:
    with AttentionWriter.open(tmp_path / "run.zarr", case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 2)
        store = AttentionStore.open(tmp_path / "run.zarr")
        case.write(writer, 0)
    with MetricWriter.open(store, {"m": {}}) as metrics:
        assert sorted(metrics.missing) == [0, 2]


def table() -> xarray.Dataset:
    rng = np.random.default_rng(0)
    return xarray.Dataset(
        {
            "distance": (("condition", "layer", "head"), rng.random((2, 3, 4)), {"unit": "image diagonals"}),
            "defined": (("condition", "layer"), rng.random((2, 3)) > 0.5),
            "rows": (("layer",), np.arange(3, dtype=np.int32)),
            "total": ((), 3.5),
            "title": ((), "Σ attention"),
        },
        {
            "condition": ["baseline", "dora"],
            "layer": [0, 1, 2],
            "site": ("layer", ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"], {"note": "module"}),
        },
        {"seeds": "[42, 43]", "p": 0.05, "name": "étude", "bounds": np.array([0.0, 1.0])},
    )


def test_tables_survive_hdf5(tmp_path: Path) -> None:
    path = tmp_path / "table.h5"
    dataset = table()
    dataset["distance"][0, 0, 0] = np.nan
    write_table(dataset, path)
    write_table(dataset, path)  # replaces
    for back in (read_table(path), xarray.load_dataset(path, engine="h5netcdf")):
        np.testing.assert_array_equal(back.attrs["bounds"], dataset.attrs["bounds"])
        xarray.testing.assert_equal(back, dataset)
        for name, values in dataset.variables.items():
            assert back[name].attrs == values.attrs
            assert back[name].dtype.kind in "OTU" or back[name].dtype == values.dtype
        assert {name: back.attrs[name] for name in ("seeds", "p", "name")} == {
            name: dataset.attrs[name] for name in ("seeds", "p", "name")
        }
    assert [file.name for file in tmp_path.iterdir()] == ["table.h5"]


def test_a_file_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    """What two put together lies under one name."""
    path = tmp_path / "maps.h5"
    for content in (b"first", b"second"):
        with sealed(path, "kind/1", Path.is_file) as partial:
            partial.write_bytes(bytes(BLOCK_BYTES) + content)
            for write in (sealed(path, "kind/1", Path.is_file), making_alone(path)):
                with (
                    pytest.raises(StoreError, match=r"maps\.h5 is being written by another process; wait for it"),
                    write,
                ):
                    pass
        assert path.read_bytes().endswith(content)
        assert [file.name for file in tmp_path.iterdir()] == ["maps.h5"]


def test_a_table_has_the_same_bytes_whenever_it_is_written(tmp_path: Path) -> None:
    """HDF5 can keep times, to the second; a process of its own has other addresses and hashes."""
    write_table(table(), tmp_path / "first.h5")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[3])\n"
        "from test_store_results import table, write_table\n"
        "time.sleep(max(0.0, Path(sys.argv[1]).stat().st_mtime + 1.1 - time.time()))\n"
        "write_table(table(), sys.argv[2])"
    )
    files = [str(tmp_path / name) for name in ("first.h5", "second.h5")]
    command = [sys.executable, "-c", code, *files, str(Path(__file__).parent)]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "1"})
    assert (tmp_path / "first.h5").read_bytes() == (tmp_path / "second.h5").read_bytes()


def test_no_flipped_bit_of_an_hdf5_table_is_believed(tmp_path: Path) -> None:
    """HDF5 has checksums of chunks alone: of strings, labels and attributes too, what is read is what was written."""
    path = tmp_path / "table.h5"
    write_table(table(), path)
    content, written = path.read_bytes(), read_table(path)
    for position in range(0, len(content), 131):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        if 110 < position < 512:  # the padding of the user block means nothing
            xarray.testing.assert_identical(read_table(path), written)
            continue
        with pytest.raises(StoreError, match=r"is damaged|was not written by write_table"):
            read_table(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreError, match="is damaged"):
        read_table(path)


def test_plain_h5py_sees_dimension_scales(tmp_path: Path) -> None:
    write_table(table(), tmp_path / "table.h5")
    with h5py.File(tmp_path / "table.h5") as file:
        distance = file["distance"]
        assert [dim[0].name for dim in distance.dims] == ["/condition", "/layer", "/head"]
        assert distance.dims[0][0][:].tolist() == [b"baseline", b"dora"]
        assert distance.dims[1][0][:].tolist() == [0, 1, 2]
        assert distance.attrs["unit"] == "image diagonals"
        assert distance.fletcher32


def test_bad_tables_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "table.h5"
    write_table(table(), path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"cannot be written as a table: .*'capture'"):
        write_table(table().assign_attrs(capture={"batch_size": 32}), path)
    with pytest.raises(StoreError, match="cannot be written as a table: "):
        write_table(xarray.Dataset({"s": ("i", np.array(["a", 1], dtype=object))}), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["table.h5"]
    with pytest.raises(StoreError, match="cannot be written"):
        write_table(table(), tmp_path / "nowhere" / "table.h5")
    with pytest.raises(StoreError, match="cannot be read as a table"):
        read_table(tmp_path / "nothing.h5")
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(StoreError, match="was not written by write_table"):
        read_table(tmp_path / "other.h5")
