"""Values and what they were made of: those of maps that changed since are not given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import store_cases as case
from test_store_digests import capture_other, heal

from store import AttentionStore, AttentionWriter, MetricWriter, StoreError, has_metric
from store.schema import metric_path
from store.verify import info, verify

ENCODINGS = ("fp16", "bf16", "qk")
LATER_A = metric_path("later_a", case.LATER["later_a"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A complete store with metrics computed later."""
    case.capture(tmp_path / "run.zarr")
    case.measure(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


def test_values_of_maps_that_were_written_again_are_stale(path: Path) -> None:
    heal(path)
    record = f"run.ledger/{LATER_A}/batch_000001.json"
    stale = "was measured from other maps than the store holds now"
    assert f"{record} {stale}; measure it again" in [str(damage) for damage in verify(path)]
    assert len(verify(path)) == len(case.LATER)
    assert not has_metric(AttentionStore.open(path), "later_a", case.LATER["later_a"])
    store = AttentionStore.open(path)
    assert next(each for each in info(path)["metrics"] if each["name"] == "later_a")["batches"] == 2
    np.testing.assert_array_equal(store.read_metric("later_a", slice(0, 4))[0], case.metric("later_a")[:4])
    for read in (store.read_metric, store.read_undefined):
        with pytest.raises(StoreError, match=rf"batch 1 cannot be trusted: .*{stale}; measure it again"):
            read("later_a")
    assert case.measure(path) == {1: ("later_a", "later_b")}
    assert verify(path) == []
    assert case.measure(path) == {}
    # The capture's own values come out of the pass that gave the maps: one record, written again as a whole.
    assert AttentionStore.open(path).read_metric("entropy")[0].shape == case.metric("entropy").shape


def test_the_same_maps_written_again_leave_their_values(path: Path) -> None:
    (path / "attention/layer_00/c.1.0.0.0").unlink()
    assert not AttentionStore.open(path).complete or verify(path)
    assert case.capture(path) == [1]
    assert verify(path) == []
    assert case.measure(path) == {}


def test_values_of_maps_that_are_not_there_yet_are_not_given(path: Path) -> None:
    """Between the record that was withdrawn and the batch written again, nobody knows what it will hold."""
    (path / "attention/layer_00/c.1.0.0.0").unlink()
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()):
        pass
    assert verify(path) == []
    store = AttentionStore.open(path)
    with pytest.raises(StoreError, match="batch 1 cannot be trusted"):
        store.read_metric("later_a")
    assert not has_metric(AttentionStore.open(path), "later_a", case.LATER["later_a"])


def test_pair_values_are_tied_to_both_stores(path: Path) -> None:
    other = capture_other(path.parent / "other/run.zarr")
    params = {"against": "other"}

    def measure() -> list[int]:
        against = AttentionStore.open(other)
        with MetricWriter.open(AttentionStore.open(path), {"pair": params}, against={"pair": against}) as writer:
            missing = list(writer.missing)
            for batch in missing:
                rows = writer.schema.batch_rows(batch)
                writer.write_batch(batch, {"pair": case.metric("pair")[rows]}, {"pair": case.counts("pair")[rows]})
        assert has_metric(AttentionStore.open(path), "pair", params, against)
        return missing

    assert measure() == [0, 1, 2]
    assert measure() == []
    heal(other, 2)
    assert not has_metric(AttentionStore.open(path), "pair", params, AttentionStore.open(other))
    assert measure() == [2]
    heal(path, 0)
    assert measure() == [0]
    assert case.measure(path) == {0: ("later_a", "later_b")}


def test_a_damaged_metrics_record_harms_no_other_metric(path: Path) -> None:
    file = path.with_suffix(".ledger") / LATER_A / "metadata.json"
    sound = file.read_bytes()
    file.write_bytes(sound.replace(b"numba", b"numbb"))
    assert [damage.unit for damage in verify(path)] == [str(file.relative_to(path.parent))]
    store = AttentionStore.open(path)
    np.testing.assert_array_equal(store.read_metric("later_b")[0], case.metric("later_b"))
    assert store.metric_names == ("region_mass", "entropy", "later_b")
    assert store.damaged_metrics == (
        f"ledger record {file} is damaged (its checksum does not match); measure it again",
    )
    assert info(path)["damaged"] == list(store.damaged_metrics)
    for params in (None, case.LATER["later_a"]):
        with pytest.raises(StoreError, match=r"metadata\.json is damaged .*; measure it again"):
            store.read_metric("later_a", params=params)
    with pytest.raises(StoreError, match="has no metric 'later'"):
        store.read_metric("later")
    # Its values are as good as before; its record is written again, by a measurement of whatever metric.
    MetricWriter.open(AttentionStore.open(path), {"another": {}}).close()
    assert file.read_bytes() == sound
    assert case.measure(path) == {}
    assert verify(path) == []
