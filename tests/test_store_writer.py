"""A capture written, read back, resumed and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import store_cases as case
import torch
import xarray
import zarr

from store import AttentionStore, AttentionWriter, DiskError, LayerSchema, StoreError, StoreSchema, estimate_bytes
from store.system import lock_file
from store.verify import info, verify
from tests.full_disk import file_size_limit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def test_round_trip(path: Path) -> None:
    assert case.capture(path) == [0, 1, 2]
    store = AttentionStore.open(path)
    schema = case.make_schema()
    assert store.schema == schema
    assert store.layers == (0, 1)
    assert store.sites == ("blocks.0.attn", "blocks.1.attn")
    assert store.layout(1) == case.LAYOUT
    assert store.image_ids == schema.image_ids
    assert store.class_names == tuple(case.fixed()["class_names"])
    assert store.manifest == case.fixed()["manifest"]
    np.testing.assert_array_equal(store.labels, case.fixed()["labels"])
    np.testing.assert_array_equal(store.regions, case.fixed()["regions"])
    assert store.complete
    assert store.read(0).dtype == np.float32
    assert np.abs(store.read(0) - case.maps(0)).max() <= 2**-12  # half of fp16's spacing below 1
    case.check_values(path)
    values, params = store.read_metric("region_mass")
    assert values.dtype == np.float32
    assert params == {"backend": "numba"}
    assert verify(path) == []


@pytest.mark.parametrize(
    "images", [slice(2, 9), slice(None, None, 3), [10, 0, 5, 5], np.arange(11) % 2 == 0, slice(4, 4)]
)
@pytest.mark.parametrize("heads", [slice(1, None), [2, 0]])
def test_reads_select_images_and_heads_as_numpy_does(path: Path, images: Any, heads: Any) -> None:
    case.capture(path)
    store = AttentionStore.open(path)
    whole = store.read(0)
    np.testing.assert_array_equal(store.read(0, images, heads), whole[images][:, heads])
    stored = store.read_stored(0, images, heads)
    assert stored.dtype == np.float16
    np.testing.assert_array_equal(stored, whole[images][:, heads])
    np.testing.assert_array_equal(store.read_metric("entropy", images)[0], case.metric("entropy")[images])


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_every_precision_are_taken_as_they_are(path: Path, encoding: str, dtype: torch.dtype) -> None:
    schema = case.make_schema(encoding, metrics={}, region_metrics=(), num_classes=0)
    given = {layer: torch.from_numpy(case.maps(layer)[:4]).to(dtype) for layer in (0, 1)}
    with AttentionWriter.open(path, schema, **case.fixed()) as writer:
        for layer, maps in given.items():
            writer.add_attention(0, layer, maps)
        writer.commit(0)
        with pytest.raises(StoreError, match="attention of layer 0 cannot be read as a NumPy array"):
            writer.add_attention(1, 0, torch.zeros(4, 3, 14, 14, requires_grad=True))
    kept = given[1].to({"fp16": torch.float16, "bf16": torch.bfloat16}[encoding]).float().numpy()
    np.testing.assert_array_equal(AttentionStore.open(path).read(1, slice(0, 4)), kept)


def test_plain_zarr_and_xarray_read_it_without_this_project(path: Path) -> None:
    case.capture(path)
    group = zarr.open_group(path, mode="r")
    array = group["attention/layer_00"]
    assert isinstance(array, zarr.Array)
    np.testing.assert_array_equal(np.asarray(array[:]), case.maps(0).astype(np.float16))
    assert array.shards == (4, 3, 14, 14)
    assert array.attrs["site"] == "blocks.0.attn"
    assert array.attrs["layout"] == case.LAYOUT
    codecs = json.loads((path / "attention/layer_00/zarr.json").read_text())["codecs"][0]["configuration"]
    assert [codec["name"] for codec in codecs["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert codecs["codecs"][1]["configuration"] == {
        "typesize": 2,
        "cname": "lz4",
        "clevel": 5,
        "shuffle": "bitshuffle",
        "blocksize": 0,
    }
    assert [codec["name"] for codec in codecs["index_codecs"]] == ["bytes", "crc32c"]

    images = xarray.open_zarr(path, group="images", consolidated=False)
    assert images["id"].dims == ("image",)
    assert images["id"].values.tolist() == list(case.make_schema().image_ids)
    assert images["regions"].dims == ("image", "region", "patch")
    name = next((path / "metrics" / "entropy").glob("*/value")).parent
    metric = xarray.open_zarr(path, group=str(name.relative_to(path)), consolidated=False)
    assert metric["value"].dims == ("image", "layer", "head")
    np.testing.assert_array_equal(metric["value"].values, case.metric("entropy"))
    logits = xarray.open_zarr(path, consolidated=False)["logits"]
    np.testing.assert_array_equal(logits.values, case.logits())
    attention = xarray.open_zarr(path, group="attention", consolidated=False, drop_variables="layer_01")
    assert attention["layer_00"].dims == ("image", "head", "query", "key")


@pytest.mark.parametrize("batch_size", [1, 3, 6, 7, 32])
def test_any_batch_size(path: Path, batch_size: int) -> None:
    schema = case.make_schema(batch_size=batch_size)
    case.capture(path, schema)
    case.check_values(path)
    assert verify(path) == []
    array = zarr.open_array(path / "attention/layer_00", mode="r")
    assert array.shards is not None
    assert array.shards[0] == batch_size
    assert batch_size % array.chunks[0] == 0


def test_metrics_only(path: Path) -> None:
    case.capture(path, case.make_schema(encoding=""))
    assert not (path / "attention").exists()
    store = AttentionStore.open(path)
    np.testing.assert_array_equal(store.read_metric("entropy")[0], case.metric("entropy"))
    with pytest.raises(StoreError, match="holds metrics only"):
        store.read(0)
    assert verify(path) == []


def test_maps_of_nothing_but_nan_are_kept_not_lost(path: Path) -> None:
    schema = case.make_schema(metrics={}, region_metrics=(), num_classes=0)
    with AttentionWriter.open(path, schema, **case.fixed()) as writer:
        for batch in range(3):
            for layer in (0, 1):
                writer.add_attention(batch, layer, np.full_like(case.maps(layer)[schema.batch_rows(batch)], np.nan))
            writer.commit(batch)
        writer.finish()
    assert verify(path) == []
    assert np.isnan(AttentionStore.open(path).read(0)).all()


def test_an_interrupted_capture_shows_only_what_is_committed(path: Path) -> None:
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 1)
        assert writer.committed == {1}
        with pytest.raises(StoreError, match="2 of 3 batches are missing, the first is 0"):
            writer.finish()
        with pytest.raises(StoreError, match=r"batch 1 .* is committed already"):
            case.write(writer, 1)
    store = AttentionStore.open(path)
    assert not store.complete
    assert np.flatnonzero(store.committed_images).tolist() == [4, 5, 6, 7]
    assert np.isfinite(store.read(0, slice(4, 8))).all()
    for read in (store.read_logits, lambda: store.read(0, slice(3, 5)), lambda: store.read_metric("entropy")):
        with pytest.raises(StoreError, match=r"batch 0 is not committed .*run\.ledger"):
            read()
    # what a reader without the ledger sees in their place
    assert np.isnan(np.asarray(zarr.open_array(path / "attention/layer_00", mode="r")[:4])).all()
    assert verify(path) == []
    assert info(path)["batches"] == {"committed": 1, "total": 3}
    assert case.capture(path) == [0, 2]
    case.check_values(path)


def test_bytes_do_not_depend_on_the_order_or_the_run(path: Path, tmp_path: Path) -> None:
    case.capture(path)
    other = tmp_path / "other.zarr"
    for batch in (2, 0, 1):
        with AttentionWriter.open(other, case.make_schema(), **case.fixed()) as writer:
            case.write(writer, batch)
    for part in ("attention", "metrics", "logits", "images"):
        assert case.file_bytes(path / part) == case.file_bytes(other / part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bfloat16"}, "another precision: found 'float32', expected 'bfloat16'"),
        ({"model": {"name": "vit_test", "weights_sha256": "f" * 64}}, r"another model\.weights_sha256: found '000"),
        ({"metrics": {"entropy": {"backend": "torch"}, "region_mass": {}}}, r"another metrics\.entropy\.backend"),
        ({"batch_size": 8}, "another batch_size: found 4, expected 8"),
        ({"layers": case.make_schema().layers[:1]}, "another number of layers: found 2, expected 1"),
        ({"encoding": "qk"}, "another encoding: found 'fp16', expected 'qk'"),
        (
            {"image_ids": tuple(f"{row}.png" for row in range(11))},
            "another images/id: row 0 is classe é/0.png, expected 0.png",
        ),
    ],
)
def test_another_schema_is_refused_by_its_first_difference(path: Path, changes: dict[str, Any], message: str) -> None:
    case.capture(path)
    before = case.file_bytes(path)
    schema = case.make_schema(**changes)
    with pytest.raises(StoreError, match=message):
        AttentionWriter.open(path, schema, **case.fixed(schema))
    assert case.file_bytes(path) == before
    case.capture(path)  # the lock was let go and nothing is left in the way


def test_other_labels_and_class_names_are_refused(path: Path) -> None:
    case.capture(path)
    with pytest.raises(StoreError, match="another images/label: row 2 is 2, expected 4"):
        AttentionWriter.open(path, case.make_schema(), **case.fixed() | {"labels": [0, 1, 4] + [0] * 8})
    other = np.where(np.arange(11)[:, None, None] == 7, 0, case.fixed()["regions"])
    with pytest.raises(StoreError, match="another images/regions: row 7 differs"):
        AttentionWriter.open(path, case.make_schema(), **case.fixed() | {"regions": other})
    with pytest.raises(StoreError, match=r"another class_names\[0\]: found 'class 0', expected 'z'"):
        AttentionWriter.open(path, case.make_schema(), **case.fixed() | {"class_names": list("zyxwv")})


def test_another_schema_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        for module in ("schema", "metadata", "reader"):
            patch.setattr(f"store.{module}.SCHEMA", "vit-attention/0")
        case.capture(path)
    expected = "schema is 'vit-attention/0'; this version (reads|writes) 'vit-attention/1'"
    with pytest.raises(StoreError, match=expected):
        AttentionStore.open(path)
    with pytest.raises(StoreError, match=expected):
        case.capture(path)
    assert [damage for damage in verify(path) if "vit-attention/0" in damage.problem]


def test_what_is_not_a_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        AttentionStore.open(tmp_path / "nothing.zarr")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"photos is no store of attention .* no ledger photos\.ledger beside it"):
        AttentionStore.open(folder)
    with pytest.raises(StoreError, match="no store of this program"):
        AttentionWriter.open(folder, case.make_schema(), **case.fixed())
    with pytest.raises(StoreError, match="is no store of attention"):
        verify(folder)
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="it has no attribute `schema`"):
        AttentionStore.open(tmp_path / "other.zarr")
    zarr.create_group(tmp_path / "other.zarr", overwrite=True, attributes={"schema": "vit-attention-samples/1"})
    for look in (verify, AttentionStore.open):  # a study's sample maps are sound without a ledger
        with pytest.raises(StoreError, match=r"is no store of attention \(its schema is 'vit-attention-samples/1'\)"):
            look(tmp_path / "other.zarr")
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["cat.jpg", "other.zarr", "photos", "zarr.json"]


def test_a_store_moved_without_its_ledger_says_so(path: Path) -> None:
    case.capture(path)
    moved = path.with_name("moved.zarr")
    path.rename(moved)
    with pytest.raises(StoreError, match=r"moved\.zarr has no ledger at .*moved\.ledger"):
        AttentionStore.open(moved)
    with pytest.raises(StoreError, match=r"takes its ledger along, as moved\.ledger beside it"):
        case.capture(moved)


def test_a_second_writer_is_refused_even_from_another_process(path: Path) -> None:
    script = Path(case.__file__)
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        with pytest.raises(StoreError, match=f"process {os.getpid()} is writing this store"):
            case.capture(path)
        other = subprocess.run([sys.executable, script, path], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()} is writing this store" in other.stderr
        case.write(writer, 0)
    assert case.capture(path) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (0,)}, r"layers of attention are \[0\]; the store's schema has \[0, 1\]"),
        ({"metrics": {}}, r"metrics are \[\]; the store's schema has \['entropy', 'region_mass'\]"),
        ({"undefined": {}}, "undefined counts are"),
        ({"logits": None}, "logits are missing"),
        ({"logits": np.ones((4, 6), np.float32)}, r"logits has shape \(4, 6\); expected \(4, 5\)"),
        ({"batch": 3}, "batch is 3; this store has batches 0 to 2"),
    ],
)
def test_a_wrong_batch_is_refused_and_commits_nothing(path: Path, changes: dict[str, Any], message: str) -> None:
    names = ("entropy", "region_mass")
    whole: dict[str, Any] = {
        "batch": 0,
        "layers": (0, 1),
        "metrics": {name: case.metric(name)[:4] for name in names},
        "undefined": {name: case.counts(name)[:4] for name in names},
        "logits": case.logits()[:4],
    }
    wrong = whole | changes
    layers = wrong.pop("layers")
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        for layer in layers:
            writer.add_attention(0, layer, case.maps(layer)[:4])
        with pytest.raises(StoreError, match=message):
            writer.commit(**wrong)
        for layer in whole.pop("layers")[len(layers) :]:
            writer.add_attention(0, layer, case.maps(layer)[:4])
        writer.commit(**whole)
        writer.flush()
        assert writer.committed == {0}


def test_wrong_attention_is_refused(path: Path) -> None:
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        for layer, maps, message in (
            (0, case.maps(0)[:3], r"shape \(3, 3, 14, 14\); expected \(4, 3, 14, 14\)"),
            (0, np.ones((4, 3, 14, 14), int), "dtype int64; expected floating point"),
            (2, case.maps(0)[:4], "layer is 2; .* keeps layers 0, 1"),
            (0, case.factors(0, slice(0, 4)), "is given as query and key; fp16 keeps maps"),
        ):
            with pytest.raises(StoreError, match=message):
                writer.add_attention(0, layer, maps)
        writer.add_attention(0, 0, case.maps(0)[:4])
        with pytest.raises(StoreError, match=r"layer 0 of batch 0 .* was written already"):
            writer.add_attention(0, 0, case.maps(0)[:4])
        assert writer.committed == set()


def test_bad_schemas_are_refused() -> None:
    layer = LayerSchema(layer=1, site="a", heads=1, layout=dict(case.LAYOUT))
    with pytest.raises(StoreError, match="different numbers in depth order"):
        case.make_schema(layers=(layer, layer))
    with pytest.raises(StoreError, match="0 images"):
        case.make_schema(image_ids=())
    with pytest.raises(StoreError, match="encoding is 'fp8'; expected one of fp16"):
        estimate_bytes(case.make_schema(encoding="fp8"))
    with pytest.raises(StoreError, match=r"metric name '\.\./x' cannot be stored"):
        estimate_bytes(case.make_schema(metrics={"../x": {}}, region_metrics=()))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = case.make_schema()
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=estimate_bytes(schema) - 1))
    with pytest.raises(StoreError, match=r"may need 1\.\d MiB, but .* has 1\.\d MiB free"):
        AttentionWriter.open(path, schema, **case.fixed())
    assert not path.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=estimate_bytes(schema)))
    case.capture(path)


def test_the_estimate_bounds_what_is_written(path: Path) -> None:
    """Even for maps that no codec can compress."""
    schema = case.make_schema(metrics={}, region_metrics=(), num_classes=0)
    noise = np.random.default_rng(0).integers(0, 2**15 - 1024, (11, 3, 14, 14), dtype=np.uint16).view(np.float16)
    with AttentionWriter.open(path, schema, **case.fixed()) as writer:
        for batch in range(3):
            rows = schema.batch_rows(batch)
            writer.add_attention(batch, 0, noise[rows])
            writer.add_attention(batch, 1, noise[rows, :2])
            writer.commit(batch)
    written = sum(len(content) for content in case.file_bytes(path.parent).values())
    assert written <= estimate_bytes(schema)
    attention = sum(layer.heads * layer.tokens**2 * 2 * 11 for layer in schema.layers)
    assert attention < estimate_bytes(schema) < attention + 2**21


def test_a_disk_that_fails_leaves_the_last_commit_intact(path: Path) -> None:
    with AttentionWriter.open(path, case.make_schema(), **case.fixed()) as writer:
        case.write(writer, 0)
        with file_size_limit(2048), pytest.raises(DiskError, match=r"batch 1 of .* could not be written .*: .*larger"):
            case.write(writer, 1)
        assert writer.committed == {0}
        assert verify(path) == []
        np.testing.assert_array_equal(AttentionStore.open(path).read_logits(slice(0, 4)), case.logits()[:4])
    assert case.capture(path) == [1, 2]
    case.check_values(path)


def test_a_read_only_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"run\.ledger cannot be made: .*file is in the way"):
        AttentionWriter.open(tmp_path / "file" / "run.zarr", case.make_schema(), **case.fixed())


def test_the_schema_survives_its_attributes() -> None:
    schema = case.make_schema(extra={"grid": [1, 2]})
    assert StoreSchema.from_attrs(json.loads(json.dumps(schema.to_attrs())), schema.image_ids) == schema
    with pytest.raises(StoreError, match="do not describe"):
        StoreSchema.from_attrs({"schema": "vit-attention/1"}, schema.image_ids)


@pytest.mark.parametrize("instead", ["folder", "link", "pipe", "deep", "not UTF-8", "1e400"])
def test_what_lies_in_the_place_of_a_record_is_named_and_nothing_hangs(path: Path, instead: str) -> None:
    """Of a batch's record, of the metadata's and of a metadata file: `verify` names it, and reading ends at once."""
    case.capture(path)
    ledger = path.with_suffix(".ledger")
    for file in (ledger / "batch_000001.json", ledger / "metadata.json", path / "logits" / "zarr.json"):
        sound = file.read_bytes()
        file.unlink()
        if instead == "folder":
            file.mkdir()
        elif instead == "link":
            file.symlink_to(file.name)
        elif instead == "pipe":
            os.mkfifo(file)
        else:
            wrong = {"deep": b'{"record":' * 100_000, "not UTF-8": b"\xff" + sound, "1e400": b'{"record": 1e400}'}
            file.write_bytes(wrong[instead])
        assert any(file.name in damage.unit for damage in verify(path))
        with pytest.raises(StoreError, match=rf"{file.name}|has no ledger|batch 1"):
            AttentionStore.open(path).read(0)
        file.rmdir() if instead == "folder" else file.unlink()
        file.write_bytes(sound)
    assert verify(path) == []


def test_a_lock_that_is_removed_while_it_is_taken_is_not_held(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`discard` removes the file that another process has just opened; the next one makes another."""
    case.capture(path)
    lock = path.with_suffix(".ledger") / "lock"

    def removed_meanwhile(file: Any, **options: Any) -> None:
        lock.unlink()
        lock_file(file, **options)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("store.local.lock_file", removed_meanwhile)
        with pytest.raises(StoreError, match="has just been removed by another process; start again"):
            AttentionWriter.open(path, case.make_schema(), **case.fixed())
    AttentionWriter.open(path, case.make_schema(), **case.fixed()).close()
    AttentionWriter.discard(path)
    assert [file.name for file in path.parent.iterdir()] == []
