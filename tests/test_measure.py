"""`measure` on a stored capture: the same values however the work is shared out; what is wrong is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import store_cases as case

from engine import stored
from engine.measure import measure_store
from engine.run import main
from kernels import TokenLayout, measure_attention
from kernels.threads import set_num_threads
from store import AttentionStore
from store.verify import verify

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
            measured = measure_store(path, METRICS, "auto")
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
