"""`measure` on a stored capture: the same values however the work is shared out; what is wrong is one sentence."""

from __future__ import annotations

import dataclasses
import importlib
import json
import linecache
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import store_cases as case
import torch

from engine.config import TABLE_COORDINATES
from engine.measure import units as stored
from engine.measure.store import measure_store
from engine.measure.table import build_table
from engine.run import main
from kernels import BackendUnavailableError, InvalidAttentionError, TokenLayout, measure_attention, measure_pair
from kernels.cpu.threads import set_num_threads
from store import AttentionStore
from store.local import LocalStorage
from store.verify import verify
from train.errors import InputError

LAYOUT = TokenLayout.from_dict(case.LAYOUT)
METRICS = ("distance", "entropy", "morans_i", "cls_entropy", "region_mass")


def store_of(path: Path, encoding: str = "fp16", **changes: object) -> Path:
    case.capture(path, case.make_schema(encoding, **{"metrics": {}, "region_metrics": ()} | changes))
    return path


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_bits_do_not_depend_on_threads_or_units(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image a unit in one thread, or whole batches in five."""
    found = []
    for threads, unit_bytes in ((1, 1), (5, stored.UNIT_BYTES)):
        monkeypatch.setattr(stored, "UNIT_BYTES", unit_bytes)
        set_num_threads(threads)
        try:
            path = store_of(tmp_path / f"{threads}.zarr", encoding, batch_size=3)
            measured = AttentionStore.open(path)
            measure_store(measured, METRICS, "auto")
        finally:
            set_num_threads(None)
        assert verify(path) == []
        found.append([(measured.read_metric(name)[0], measured.read_undefined(name)) for name in METRICS])
    for name, (values, counts), (others, other_counts) in zip(METRICS, *found, strict=True):
        np.testing.assert_array_equal(values, others, err_msg=name)
        np.testing.assert_array_equal(counts, other_counts, err_msg=name)


@pytest.mark.parametrize("encoding", ["fp16", "bf16"])
def test_rows_that_are_no_attention_are_left_out_and_counted(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of NaN, one negative, one that sums to 2, and a whole map of infinities."""
    broken = case.maps(0)
    broken[1, 0, 5], broken[1, 1, 6, 3], broken[9, 2, 7] = np.nan, -0.5, 2 / case.TOKENS
    broken[10, 1] = np.inf
    whole = case.maps
    monkeypatch.setattr(case, "maps", lambda layer: broken if layer == 0 else whole(layer))
    path = store_of(tmp_path / "run.zarr", encoding)
    assert main(["measure", "--store", str(path), "--metrics", "distance"]) == 0
    assert f"run.zarr: {3 + case.TOKENS} rows are no post-softmax attention" in "".join(capsys.readouterr())
    store = AttentionStore.open(path)
    values, counts = store.read_metric("distance")[0][:, 0], store.read_undefined("distance")[:, 0]
    expected = np.zeros((case.IMAGES, 3), int)
    expected[1, 0] = expected[1, 1] = expected[9, 2] = 1
    expected[10, 1] = LAYOUT.num_patches
    np.testing.assert_array_equal(counts, expected)
    np.testing.assert_array_equal(np.isnan(values), expected == LAYOUT.num_patches)
    rows = measure_attention(whole(0), LAYOUT, "distance", "reference", reduce="none")["distance"][1, 0]
    left = np.delete(rows, 5 - LAYOUT.num_prefix_tokens)
    np.testing.assert_allclose(values[1, 0], left.mean(), atol=1e-4)
    assert np.isfinite(values[0]).all()


# ------------------------------------------------------------------------------------------------- a user's own metrics

OWN = """
import numpy as np
from kernels import MetricSpec

def spec(reference, name="own", inputs="rows", **more):
    return MetricSpec(name=name, unit="1", inputs=inputs, reference=reference, **more)

shape = spec(lambda p, layout: p[:, :3, 0])
nothing = spec(lambda p, layout: None)
imaginary = spec(lambda p, layout: 1j * p.max((1, 2)))
text = spec(lambda p, layout: np.array(["x"] * len(p)))
infinite = spec(lambda p, layout: np.full(len(p), np.inf))
raising = spec(lambda p, layout: p[:, 1000])
arguments = spec(lambda p: p)
leaving = spec(lambda p, layout: exit(3))
changing = spec(lambda p, layout: np.multiply(p, 0, out=p).max((1, 2)))
pair = spec(lambda p, q, layout: p - q, inputs="pair")
regions = spec(lambda p, layout, regions: p.max((1, 2)), inputs="regions")
implemented = spec(lambda p, layout: p.max((1, 2)), implementations={"numba": lambda result: result})
elsewhere = spec(lambda p, layout: p.max((1, 2)), implementations={"numba": "no.such:thing"})
entropy = spec(lambda p, layout: p.max((1, 2)), name="entropy")
number = 3
good = spec(lambda p, layout: p.max((1, 2)))
twin = spec(lambda p, layout: p.min((1, 2)))
axis = spec(lambda p, layout: p.max((1, 2)), name="image")
"""


@pytest.fixture(scope="module")
def measurable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of(tmp_path_factory.mktemp("own") / "run.zarr")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of a module called own_metrics, importable."""
    (tmp_path / "own_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "own_metrics.py"
    sys.modules.pop("own_metrics", None)


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        ("shape", r"metric 'own': its reference, .* returned shape \(2, 3\) for 2 map\(s\); expected \(2, 12\) or"),
        ("nothing", "returned object values; expected real numbers"),
        ("imaginary", "returned complex128 values; expected real numbers"),
        ("text", "returned <U1 values; expected real numbers"),
        ("infinite", "returned infinite values; give NaN where there is no value"),
        ("raising", r"called with \(p, layout\), raised IndexError: index 1000 .*own_metrics\.py, line 13\)"),
        ("arguments", r"called with \(p, layout\), raised TypeError: .* takes 1 positional argument but 2 were given"),
        ("leaving", "raised SystemExit: 3"),
        ("changing", "raised ValueError: output array is read-only"),
        ("pair", r"called with \(p, other, layout\), returned shape"),
        ("regions", r"called with \(p, layout, regions\), returned shape \(2,\) for 2 map\(s\); expected \(2, 2\)"),
        ("implemented", r"its implementation for numba is a function; expected a kernels\.backends\.Reading"),
        ("elsewhere", "no.such:thing, its implementation for numba, cannot be imported"),
        ("entropy", "is called 'entropy', as a metric of kernels is; give it another name"),
        ("number", "is a int; expected a kernels.MetricSpec"),
        ("absent", "module 'own_metrics' has no 'absent'"),
        ("", "is not of the form module:name"),
        ("axis", "own_metrics:axis is called 'image', as a coordinate of the table is; give it another name"),
        ("good,own_metrics:twin", "own_metrics:good and own_metrics:twin are both called 'own'"),
    ],
)
def test_a_users_metric_that_is_wrong_is_one_sentence(
    metric: str, sentence: str, measurable: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against = ["--against", str(measurable)] if metric == "pair" else []
    command = ["measure", "--store", str(measurable), "--metrics", f"own_metrics:{metric}", *against]
    assert main([*command, "--measure.backend", "numba"]) == 2
    assert re.search(sentence, error := capsys.readouterr().err), error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("raise RuntimeError('at import')", r"cannot be imported \(RuntimeError: at import\)"),
        ("def (", r"cannot be imported \(SyntaxError: invalid syntax"),
        ("import sys; sys.exit(5)", r"cannot be imported \(SystemExit: 5\)"),
        ("bad = spec(abs, name='../evil')", r"a metric's name is '\.\./evil'; expected a letter"),
        ("bad = spec(abs, inputs='columns')", "inputs is 'columns'; expected 'rows', 'regions' or 'pair'"),
        ("bad = spec('module:function')", "reference is 'module:function'; expected a callable"),
        ("bad = MetricSpec(name='own', unit=3, inputs='rows', reference=abs)", "unit is 3; expected text"),
    ],
)
def test_a_users_module_that_is_wrong_is_one_sentence(
    line: str, sentence: str, measurable: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.write_text(OWN + line)
    assert main(["measure", "--store", str(measurable), "--metrics", "own_metrics:good"]) == 2
    assert re.search(sentence, error := capsys.readouterr().err), error
    assert error.count("\n") == 1


def test_a_users_metric_that_has_changed_is_measured_anew(
    tmp_path: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_of(tmp_path / "run.zarr")
    command = ["measure", "--store", str(path), "--metrics", "own_metrics:good"]
    for text, answer in ((OWN, "measured own"), (OWN, "already"), (OWN + "# another", "measured own")):
        own.write_text(text)
        sys.modules.pop("own_metrics", None)
        linecache.clearcache()
        importlib.invalidate_caches()
        assert main(command) == 0
        assert answer in capsys.readouterr().out
    first, second = AttentionStore.open(path).metric_params("own")
    assert first["definition"] != second["definition"]


# --------------------------------------------------------------------------------------------------------------- faults


def test_bad_flags_are_one_sentence(
    measurable: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*flags: str) -> str:
        assert main(["measure", "--store", str(measurable), *flags]) == 2
        return capsys.readouterr().err

    assert "backend is 'numbaa'; expected auto or one of reference" in error("--measure.backend", "numbaa")
    assert "--measure.metrics is an empty list; expected a list that is not empty" in error("--metrics", "")
    monkeypatch.setenv("NUMBA_NUM_THREADS", "many")
    assert "NUMBA_NUM_THREADS is 'many'; expected a positive number" in error("--metrics", "gini")


def test_a_capture_that_was_measured_on_a_gpu_asks_for_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = store_of(tmp_path / "run.zarr")
    assert measure_store(AttentionStore.open(path), ["entropy"], "reference") == ("entropy",)
    assert measure_store(AttentionStore.open(path), ["entropy"], "triton") == ()
    with pytest.raises(BackendUnavailableError, match="the attention is on 'cpu'"):
        measure_store(AttentionStore.open(path), ["entropy", "gini"], "triton")


def test_a_damaged_record_is_named_and_its_batch_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store_of(tmp_path / "run.zarr")
    record = tmp_path / "run.ledger" / "batch_000001.json"
    record.write_bytes(record.read_bytes().replace(b"batch_000001", b"batch_000002", 1))
    assert main(["measure", "--store", str(path), "--metrics", "entropy"]) == 0
    printed = "".join(capsys.readouterr())
    assert "only 7 of 11 images are captured" in printed
    assert re.search(r"batch 1 cannot be trusted: .*batch_000001\.json is damaged", printed)


def test_a_store_of_which_nothing_can_be_measured_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was said to be measured, over no image at all."""
    path = store_of(tmp_path / "run.zarr")
    (tmp_path / "run.ledger" / "complete.json").unlink()
    for record in (tmp_path / "run.ledger").glob("batch_*"):
        record.unlink()
    assert main(["measure", "--store", str(path), "--metrics", "entropy"]) == 1
    assert "holds no batch that can be measured; capture it first" in capsys.readouterr().err
    assert "entropy" not in AttentionStore.open(path).metric_names


def test_values_follow_the_maps_they_were_measured_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shard of another store is measured by nobody; after the capture wrote it again, exactly its batch is."""
    path, other = store_of(tmp_path / "run.zarr"), store_of(tmp_path / "other.zarr")
    command = ["measure", "--store", str(path), "--metrics"]
    pair = ["js_divergence", "--against", str(other)]
    assert main([*command, "distance"]) == main([*command, *pair]) == 0
    before = AttentionStore.open(path).read_metric("distance")[0]
    shard = path / "attention/layer_00/c.1.0.0.0"
    shutil.copyfile(path / "attention/layer_00/c.0.0.0.0", shard)
    monkeypatch.setattr("store.rows.size_problem", lambda size, entry: "")  # as if it were of the same size
    assert main([*command, "entropy"]) == 1
    assert re.search(r"batch 1: .*its SHA-256 is not the one in the ledger", capsys.readouterr().err)
    whole = case.maps
    monkeypatch.setattr(case, "maps", lambda layer: whole(layer)[..., ::-1])  # as another machine would round
    assert case.capture(path, case.make_schema(metrics={}, region_metrics=())) == [1]
    for metrics in (["distance"], pair):
        assert main([*command, *metrics]) == 0
        assert "measured" in capsys.readouterr().out
        assert main([*command, *metrics]) == 0
        assert "already" in capsys.readouterr().out
    store = AttentionStore.open(path)
    after = store.read_metric("distance")[0]
    right = measure_attention(store.read_stored(0), LAYOUT, "distance")["distance"]
    np.testing.assert_array_equal(np.delete(after, slice(4, 8), 0), np.delete(before, slice(4, 8), 0))
    np.testing.assert_allclose(after[:, 0], right, rtol=1e-6)
    assert (store.read_metric("js_divergence")[0][4:8, 0] > 0.01).all()
    assert (store.read_metric("js_divergence")[0][:4, 0] == 0).all()
    assert verify(path) == []


def test_pair_metrics_compare_the_same_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids are names of files: two captures over the same names saw the same images only if the files were the same."""
    fixed, paths = case.fixed, {}
    for name, content in (("one", "a"), ("same", "a"), ("changed", "b")):
        records = [{"id": id, "sha256": content * 64} for id in case.make_schema().image_ids]
        monkeypatch.setattr(
            case, "fixed", lambda schema, records=records: fixed(schema) | {"manifest": {"records": records}}
        )
        paths[name] = str(store_of(tmp_path / f"{name}.zarr"))
    command = ["measure", "--store", paths["one"], "--metrics", "js_divergence", "--against"]
    assert main([*command, paths["changed"]]) == 2
    assert re.search(
        r"classe é/0\.png is another picture in .*changed\.zarr than in .*one\.zarr", capsys.readouterr().err
    )
    assert main([*command, paths["same"]]) == 0


def test_a_table_is_of_one_architecture_at_one_size(tmp_path: Path) -> None:
    """Equal names of layers and numbers of heads, another grid."""
    schema = case.make_schema(metrics={"distance": {"backend": "numba"}}, region_metrics=())
    other = tuple(
        dataclasses.replace(layer, layout=layer.layout | {"grid_rows": 4, "grid_cols": 3}) for layer in schema.layers
    )
    stores = {}
    for seed, layers in enumerate((schema.layers, other)):
        path = tmp_path / f"{seed}.zarr"
        case.capture(path, dataclasses.replace(schema, layers=layers))
        stores["full", seed] = AttentionStore.open(path)
    with pytest.raises(InputError, match=r"full seed 1 has other layers, heads or tokens than 0\.zarr"):
        build_table(stores, ["distance"], seed_invariant=[], attributes={})


# ---------------------------------------------------------------------------------------------- what read gives, counts


@pytest.mark.parametrize("encoding", ["fp16", "bf16", "qk"])
def test_what_read_gives_can_be_measured(tmp_path: Path, encoding: str) -> None:
    """Its rows sum to 1 as far as the rounding to 16 bits lets them, and the values are those of `measure`."""
    path = store_of(tmp_path / "run.zarr", encoding)
    store = AttentionStore.open(path)
    measure_store(store, METRICS[:4], "auto")
    for layer, heads in enumerate(case.HEADS):
        maps = store.read(layer)
        assert maps.dtype == np.float32
        found = measure_attention(maps, LAYOUT, METRICS[:4])
        for name in METRICS[:4]:
            values = store.read_metric(name)[0][:, layer, :heads]
            np.testing.assert_allclose(found[name], values, rtol=2e-5 if encoding == "qk" else 1e-6, atol=1e-6)
            assert found.undefined[name] == store.read_undefined(name)[:, layer, :heads].sum()
        for part in (maps[3:, 1:], maps[[2, 0]], maps.copy(), maps.astype(np.float64), store.read(layer, [4], [0])):
            measure_attention(part, LAYOUT, "distance", "reference")
    if encoding == "qk":  # computed in float32
        return
    for plain in (np.concatenate([maps, maps]), torch.from_numpy(maps), maps * 1):
        assert getattr(plain, "precision", "") == ""
        with pytest.raises(InvalidAttentionError, match=r"expected 1 within 0\.0001 for float32; .* or precision="):
            measure_attention(plain, LAYOUT, "distance")
        found = measure_attention(plain, LAYOUT, "distance", precision=store.precision(layer))
        assert torch.as_tensor(found["distance"]).isfinite().all()
        measure_pair(plain, plain, LAYOUT, precision=store.precision(layer))
    with pytest.raises(ValueError, match="precision is 'half'; expected one of bfloat16, float16"):
        measure_attention(maps, LAYOUT, "distance", precision="half")
    off = maps + np.float32(0.02 / case.TOKENS)
    with pytest.raises(InvalidAttentionError, match=rf"for {store.precision(layer)}"):
        measure_attention(off, LAYOUT, "distance", precision=store.precision(layer))
    exact = maps / maps.sum(axis=-1, keepdims=True)
    measure_pair(maps, exact, LAYOUT)  # as far off as the coarser of the two


def test_a_bad_row_is_counted_once_a_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One in this store, one in both, one in the other alone: three, however many metrics look at them."""
    whole, bad = case.maps, {"run": [(0, 0, 3), (5, 1, 4)], "other": [(5, 1, 4), (7, 2, 6)]}
    for name, rows in bad.items():
        broken = whole(0)
        for row in rows:
            broken[row] = np.nan
        monkeypatch.setattr(case, "maps", lambda layer, broken=broken: broken if layer == 0 else whole(layer))
        store_of(tmp_path / f"{name}.zarr")
    command = ["measure", "--store", str(tmp_path / "run.zarr"), "--metrics"]
    assert main([*command, "distance,js_divergence,gini", "--against", str(tmp_path / "other.zarr")]) == 0
    assert "run.zarr or other.zarr: 3 rows are no post-softmax" in "".join(capsys.readouterr())
    assert main([*command, "entropy,morans_i"]) == 0
    assert "run.zarr: 2 rows are no post-softmax" in "".join(capsys.readouterr())
    store = AttentionStore.open(tmp_path / "run.zarr")
    assert store.read_undefined("distance").clip(min=0).sum() == 2
    assert store.read_undefined("js_divergence").clip(min=0).sum() == 3


def test_a_table_counts_each_capture_once_and_lacks_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds, and a condition that no seed can change: its two rows without a value are two, not six."""
    whole = case.maps
    stores = {}
    for condition, seed, bad in (("probe", 1, 2), ("full", 1, 1), ("full", 2, 0), ("full", 3, 4)):
        broken = whole(0)
        broken[0, 0, 2 : 2 + bad] = np.nan
        monkeypatch.setattr(case, "maps", lambda layer, broken=broken: broken if layer == 0 else whole(layer))
        path = store_of(tmp_path / f"{condition}_{seed}.zarr", precision="bfloat16")
        store = stores[condition, seed] = AttentionStore.open(path)
        measure_store(store, ["distance", "gini"], "auto")
    metrics = ["distance", "gini", "distance"]
    table = build_table(stores, metrics, seed_invariant=["probe"], attributes={})
    expected = {"probe": 2, "full": 5}
    assert json.loads(table.attrs["undefined"]) == {"distance": expected, "gini": expected}
    assert json.loads(table.attrs["metrics"]) == ["distance", "gini"]
    assert table.attrs["precision"] == "bfloat16"
    assert set(table.coords) <= TABLE_COORDINATES, "no metric may have one of their names"
    covered = AttentionStore.open(tmp_path / "probe_1.zarr").regions
    np.testing.assert_allclose(table["region_area"], covered.mean(axis=2), rtol=1e-6)
    assert table["region_area"].dims == ("image", "region")
    for seed in (1, 2, 3):
        for condition, of in (("probe", ("probe", 1)), ("full", ("full", seed))):
            values = table["distance"].sel(condition=condition, seed=seed).values
            np.testing.assert_array_equal(values, stores[of].read_metric("distance")[0])
    del stores["full", 2], stores["full", 3]
    stores["dora", 2] = stores["probe", 1]
    with pytest.raises(InputError, match="full has no capture of seed 2, which another condition has; capture it too"):
        build_table(stores, metrics, seed_invariant=["probe"], attributes={})


def test_a_store_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether there is everything to measure or nothing: a store's metadata are read and hashed as it is opened."""
    one, two = store_of(tmp_path / "one.zarr"), store_of(tmp_path / "two.zarr")
    opened: list[str] = []
    read = LocalStorage.read

    def counted(self: LocalStorage, file: str) -> bytes:
        if file == "zarr.json":
            opened.append(self.name)
        return read(self, file)

    monkeypatch.setattr(LocalStorage, "read", counted)
    flags = ["--metrics", "entropy,js_divergence", "--against", str(two)]
    for _ in range(2):
        assert main(["measure", "--store", str(one), *flags]) == 0
        assert sorted(opened) == ["one.zarr", "two.zarr"]
        opened.clear()


def test_no_metric_is_not_nothing_to_do(measurable: Path) -> None:
    with pytest.raises(InputError, match="there is no metric to measure"):
        measure_store(AttentionStore.open(measurable), [], "numba")
