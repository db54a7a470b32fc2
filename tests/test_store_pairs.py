"""Metrics of two stores, and a user's own metrics, by the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import store_cases as case

from engine.measure.store import measure_store
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


def measured(path: Path, metrics: list[str], against: Path | None = None) -> AttentionStore:
    store = AttentionStore.open(path)
    measure_store(store, metrics, "auto", AttentionStore.open(against) if against else None)
    return store


@pytest.mark.parametrize(
    ("first", "second"), [("fp16", "fp16"), ("bf16", "bf16"), ("qk", "qk"), ("fp16", "bf16"), ("qk", "fp16")]
)
def test_pair_metrics_of_two_stores(tmp_path: Path, first: str, second: str) -> None:
    one, two = stores(tmp_path, first, second)
    store = measured(one, ["js_divergence", "distance"], against=two)
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
    values, _ = measured(one, ["js_divergence"], against=one).read_metric("js_divergence")
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
    measured(one, ["js_divergence"], against=two)
    store = measured(one, ["js_divergence"], against=one)
    assert len(store.metric_params("js_divergence")) == 2


def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path) -> None:
    one = store_of(tmp_path / "one.zarr")
    with pytest.raises(InputError, match="js_divergence compares two captures; name the other one with --against"):
        measured(one, ["distance", "js_divergence"])
    with pytest.raises(InputError, match="none of distance compares two captures"):
        measured(one, ["distance"], against=one)
    other = store_of(tmp_path / "other.zarr", image_ids=tuple(f"{row}.png" for row in range(11)))
    with pytest.raises(InputError, match="captured over other images than"):
        measured(one, ["js_divergence"], against=other)
    chosen, others = (
        store_of(tmp_path / f"{first}.zarr", head_ids=tuple(range(first, first + max(case.HEADS)))) for first in (0, 4)
    )
    with pytest.raises(InputError, match=r"4\.zarr has other layers, heads or tokens than \S+0\.zarr"):
        measured(chosen, ["js_divergence"], against=others)
    plain = store_of(tmp_path / "plain.zarr", encoding="")
    with pytest.raises(InputError, match=r"plain\.zarr holds no attention maps, so js_divergence"):
        measured(one, ["js_divergence"], against=plain)


def test_a_users_metrics_of_one_and_of_two_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    one, two = stores(tmp_path)
    names = "test_store_pairs:own_peak,test_store_pairs:own_overlap"
    assert main(["measure", "--store", str(one), "--metrics", names, "--against", str(two)]) == 0
    store = AttentionStore.open(one)
    p, q = (LAYOUT.patches(_exact(AttentionStore.open(path).read(0))) for path in (one, two))
    np.testing.assert_allclose(store.read_metric("own_peak")[0][:, 0], p.max(-1).mean(-1), atol=1e-3)
    np.testing.assert_allclose(store.read_metric("own_overlap")[0][:, 0], np.minimum(p, q).sum(-1).mean(-1), atol=1e-3)
