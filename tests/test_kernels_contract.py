"""`measure_attention` and `measure_qk`: what they accept, what they refuse, and what they say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import (
    BACKENDS,
    METRICS,
    BackendUnavailableError,
    InvalidAttentionError,
    Measurement,
    MetricSpec,
    TokenLayout,
    load_metric,
    measure_attention,
    measure_qk,
)
from kernels.inputs import ROW_SUM_TOLERANCE
from kernels.torch_ops import IMPLEMENTATIONS
from tests.cases import CPU_BACKENDS, DTYPES, QK_BACKENDS, layout, metrics_for

OF = layout(3, 4, 1)
N = OF.num_tokens


def uniform(*leading: int) -> np.ndarray:
    return np.full((*leading, N, N), 1 / N)


def random_rows(*leading: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(N), size=(*leading, N))


class TestInvalidRows:
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize(
        ("bad", "words"),
        [
            (np.nan, r"attention\[1, 2, 5, :\] holds 1 value\(s\) that are NaN or infinite"),
            (np.inf, r"attention\[1, 2, 5, :\] holds 1 value\(s\) that are NaN or infinite"),
            (-0.25, r"attention\[1, 2, 5, :\] holds 1 negative value\(s\), the least -0.25"),
            (0.9, r"attention\[1, 2, 5, :\] sums to 1\.\d+, expected 1 within 0.0001 for float32"),
        ],
    )
    def test_raise_names_the_first_position_and_counts(self, backend: str, bad: float, words: str) -> None:
        attention = random_rows(2, 3).astype(np.float32)
        attention[1, 2, 5, 3] = bad
        with pytest.raises(InvalidAttentionError, match=f"^1 of 78 attention rows are invalid: row {words}"):
            measure_attention(attention, OF, backend=backend)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_mask_leaves_them_out_and_counts(self, backend: str) -> None:
        attention = random_rows(2, 3).astype(np.float32)
        clean = measure_attention(attention, OF, backend=backend, reduce="none")
        attention[1, 2, 5, 3] = np.nan
        got = measure_attention(attention, OF, backend=backend, invalid="mask")
        rows = measure_attention(attention, OF, backend=backend, invalid="mask", reduce="none")
        assert got.masked == 1
        assert got.undefined == {"distance": 0, "entropy": 0, "morans_i": 0}
        for name in got:
            assert np.isnan(rows[name][1, 2, 4])  # token 5 is patch query 4
            assert np.isnan(rows[name]).sum() == 1
            kept = np.delete(clean[name][1, 2].astype(np.float64), 4)
            assert got[name][1, 2] == pytest.approx(kept.mean(), abs=1e-12)
            np.testing.assert_allclose(got[name][0], clean[name][0].mean(axis=-1, dtype=np.float64), atol=1e-12)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_a_map_without_a_valid_row_is_nan(self, backend: str) -> None:
        attention = uniform(2)
        attention[0] = np.nan
        regions = np.ones((1, OF.num_patches))
        got = measure_attention(attention, OF, metrics_for(OF), backend, "mask", regions=regions)
        assert got.masked == N
        for name in got:
            assert np.isnan(got[name][0]).all()
        assert got["entropy"][1] == pytest.approx(np.log(12), abs=1e-6)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("leading", [(), (2, 3)])
    def test_masking_leaves_the_input_as_it_was(self, backend: str, leading: tuple[int, ...]) -> None:
        attention = random_rows(*leading)
        attention[..., 5, 3] += 0.5
        before = attention.copy()
        measure_attention(attention, OF, metrics_for(OF), backend, "mask", regions=np.ones((*leading[:-1], 1, 12)))
        np.testing.assert_array_equal(attention, before)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_prefix_rows_are_checked_too(self, backend: str) -> None:
        attention = random_rows(1)
        attention[0, 0] *= 1.5
        with pytest.raises(InvalidAttentionError, match=r"attention\[0, 0, :\] sums to 1\.5"):
            measure_attention(attention, OF, backend=backend)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rounding_of_each_dtype_is_allowed_and_no_more(self, backend: str, dtype: str) -> None:
        tolerance = ROW_SUM_TOLERANCE[dtype]
        attention = torch.from_numpy(uniform(1))

        def off_by(share: float) -> Any:
            changed = attention.clone()
            changed[0, 3, 2] += share * tolerance  # a value of 1/13: dtypes resolve it finely enough
            return changed.to(getattr(torch, dtype))

        assert measure_attention(off_by(0.5), OF, backend=backend).masked == 0
        with pytest.raises(InvalidAttentionError, match=f"for {dtype}"):
            measure_attention(off_by(2.0), OF, backend=backend)

    def test_logits_are_not_attention(self) -> None:
        logits = np.random.default_rng(0).normal(size=(1, N, N))
        with pytest.raises(InvalidAttentionError, match="13 of 13 attention rows are invalid"):
            measure_attention(logits, OF)


class TestInvalidQueryAndKey:
    query, key = np.random.default_rng(1).normal(size=(2, 2, 3, N, 8)).astype(np.float32)

    @pytest.mark.parametrize("backend", QK_BACKENDS)
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_query(self, backend: str, value: float) -> None:
        query = self.query.copy()
        query[1, 0, 4, 2] = value
        with pytest.raises(InvalidAttentionError, match=r"^1 of 78 .* query\[1, 0, 4, :\] holds NaN or infinite"):
            measure_qk(query, self.key, OF, backend=backend)
        assert measure_qk(query, self.key, OF, backend=backend, invalid="mask").masked == 1

    @pytest.mark.parametrize("backend", QK_BACKENDS)
    def test_key(self, backend: str) -> None:
        key = self.key.copy()
        key[1, 0, 4, 2] = np.nan
        with pytest.raises(InvalidAttentionError, match=r"^13 of 78 .* key\[1, 0, :, :\] holds NaN or infinite"):
            measure_qk(self.query, key, OF, backend=backend)
        got = measure_qk(self.query, key, OF, backend=backend, invalid="mask")
        assert got.masked == 13
        assert (got.invalid_rows[1, 0], got.invalid_patches[1, 0]) == (N, N - 1)
        assert np.isnan(got["entropy"][1, 0])
        assert np.isfinite(np.delete(got["entropy"].ravel(), 3)).all()

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_a_query_with_no_key(self, backend: str) -> None:
        mask = np.ones((N, N), dtype=bool)
        mask[7] = False
        with pytest.raises(InvalidAttentionError, match=r"^6 of 78 .* leaves query 0, 0, 7 no key to attend to"):
            measure_qk(self.query, self.key, OF, bias=mask, backend=backend)
        got = measure_qk(self.query, self.key, OF, bias=mask, backend=backend, invalid="mask")
        assert got.masked == 6
        assert got.undefined == {"distance": 0, "entropy": 0, "morans_i": 0}

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_infinite_logits(self, backend: str) -> None:
        bias = np.zeros((N, N), np.float32)
        bias[7, 2] = np.inf
        with pytest.raises(InvalidAttentionError, match="the logits of query 0, 0, 7 are NaN or infinite"):
            measure_qk(self.query, self.key, OF, bias=bias, backend=backend)


class TestRefusals:
    def test_shape(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(1, 12, 12\); expected \[..., 13, 13\] for 3×4 patches of 16×16"):
            measure_attention(np.full((1, 12, 12), 1 / 12), OF)
        with pytest.raises(ValueError, match=r"shape \(13,\)"):
            measure_attention(np.full(13, 1 / 13), OF)
        with pytest.raises(ValueError, match=r"expected both \[..., 13, head_dim\]"):
            measure_qk(np.zeros((1, 13, 4)), np.zeros((1, 12, 4)), OF)

    def test_dtype_and_kind(self) -> None:
        with pytest.raises(TypeError, match="attention is int64; expected one of float16"):
            measure_attention(np.ones((1, N, N), dtype=np.int64), OF)
        with pytest.raises(TypeError, match="attention is a list"):
            measure_attention(uniform(1).tolist(), OF)
        with pytest.raises(TypeError, match="query is NumPy float64 and key is NumPy float32"):
            measure_qk(np.zeros((1, N, 4)), np.zeros((1, N, 4), np.float32), OF)
        with pytest.raises(TypeError, match="query is torch float32 and key is NumPy float32"):
            measure_qk(torch.zeros(1, N, 4), np.zeros((1, N, 4), np.float32), OF)

    def test_bias(self) -> None:
        zeros = np.zeros((2, N, 4), np.float32)
        with pytest.raises(ValueError, match=r"bias has shape \(3, 13, 13\); expected one that broadcasts"):
            measure_qk(zeros, zeros, OF, bias=np.zeros((3, N, N)))
        with pytest.raises(TypeError, match="bias is int64"):
            measure_qk(zeros, zeros, OF, bias=np.zeros((N, N), dtype=np.int64))
        with pytest.raises(TypeError, match="bias is a Tensor; expected the kind of array that query is"):
            measure_qk(zeros, zeros, OF, bias=torch.zeros(N, N))

    def test_options(self) -> None:
        with pytest.raises(ValueError, match='invalid is \'ignore\'; expected "raise" or "mask"'):
            measure_attention(uniform(1), OF, invalid="ignore")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="reduce is 'sum'"):
            measure_attention(uniform(1), OF, reduce="sum")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="scale is nan"):
            measure_qk(np.zeros((1, N, 4)), np.zeros((1, N, 4)), OF, scale=float("nan"))

    def test_metrics(self) -> None:
        with pytest.raises(ValueError, match="no metric is called 'entropi'; did you mean 'entropy'"):
            measure_attention(uniform(1), OF, ["entropi"])
        with pytest.raises(ValueError, match="metrics is empty"):
            measure_attention(uniform(1), OF, [])
        with pytest.raises(ValueError, match="one metric twice"):
            measure_attention(uniform(1), OF, ["entropy", "entropy"])
        pair = MetricSpec(name="pair", unit="1", inputs="pair", reference=lambda p, q, of: p)
        with pytest.raises(ValueError, match="'pair' compares two conditions"):
            measure_attention(uniform(1), OF, [pair])

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_class_metrics_without_a_class_token(self, backend: str) -> None:
        of = layout(2, 2, 0)
        with pytest.raises(ValueError, match="no class token"):
            measure_attention(np.full((1, 4, 4), 0.25), of, "cls_entropy", backend)

    def test_regions(self) -> None:
        attention = uniform(2, 3)
        with pytest.raises(ValueError, match="'region_mass' needs regions"):
            measure_attention(attention, OF, "region_mass")
        with pytest.raises(ValueError, match=r"expected \[..., region, 12\]"):
            measure_attention(attention, OF, "region_mass", regions=np.zeros((2, 1, 13)))
        with pytest.raises(ValueError, match="values from 0 to 7"):
            measure_attention(attention, OF, "region_mass", regions=7 * np.eye(12)[None, :1])
        with pytest.raises(ValueError, match=r"its leading axes to match \(2,\)"):
            measure_attention(attention, OF, "region_mass", regions=np.zeros((4, 1, 12)))


class TestBackends:
    def test_auto_says_what_it_picked(self) -> None:
        assert measure_attention(uniform(1), OF).backend == "numba"
        assert measure_attention(torch.from_numpy(uniform(1)), OF).backend == "numba"

    def test_unknown_backend(self) -> None:
        with pytest.raises(ValueError, match=f"backend is 'cupy'; expected auto or one of {', '.join(BACKENDS)}"):
            measure_attention(uniform(1), OF, backend="cupy")

    def test_one_that_cannot_read_the_device_raises(self) -> None:
        on_meta = torch.empty(1, N, N, device="meta")
        for backend in ("numba", "reference", "auto"):
            with pytest.raises(BackendUnavailableError, match="'meta'"):
                measure_attention(on_meta, OF, backend=backend)

    def test_a_missing_import_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in list(sys.modules):
            if name.startswith("kernels.cpu."):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "numba", None)
        with pytest.raises(BackendUnavailableError, match=r"backend 'numba' cannot run: .*numba"):
            measure_attention(uniform(1), OF, backend="numba")

    def test_every_implementation_is_of_a_metric(self) -> None:
        for name, backend in BACKENDS.items():
            loaded = backend.load()
            assert loaded.name == name
            assert set(loaded.implementations) <= set(METRICS)
            assert all(callable(implementation) for implementation in loaded.implementations.values())

    def test_metrics_are_declared_in_full(self) -> None:
        for name, spec in METRICS.items():
            assert spec.name == name
            assert spec.unit
            assert spec.title
            least, greatest = spec.bounds(OF)
            assert np.isfinite([least, greatest]).all()
            assert least < greatest


class TestGradients:
    @pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if METRICS[name].inputs == "rows"])
    def test_torch_is_differentiable_in_attention(self, name: str) -> None:
        """Against finite differences along a direction that keeps the rows' sums."""
        attention = torch.from_numpy(random_rows(1, seed=5)).requires_grad_()
        got = measure_attention(attention, OF, name)
        assert got.backend == "torch"  # what auto picks where a gradient is wanted
        got[name].sum().backward()
        assert attention.grad is not None
        direction = torch.from_numpy(random_rows(1, seed=6) - random_rows(1, seed=7))
        step = 1e-6
        with torch.no_grad():
            up, down = (
                measure_attention(attention + s * step * direction, OF, name, backend="torch")[name].sum()
                for s in (1, -1)
            )
        slope = float((attention.grad * direction).sum())
        assert slope == pytest.approx(float((up - down) / (2 * step)), rel=1e-4, abs=1e-7)

    def test_gradients_stay_finite_beside_undefined_rows(self) -> None:
        rows = random_rows(1)
        rows[0, 2] = 0.0
        rows[0, 2, 0] = 1.0  # all on the prefix
        rows[0, 3] = 1 / N  # constant
        rows[0, 4] = np.eye(N)[5]  # one-hot: 0 ln 0
        attention = torch.from_numpy(rows).requires_grad_()
        names = ["distance", "entropy", "morans_i", "morans_i_received", "sink_share", "prefix_mass"]
        got = measure_attention(attention, OF, names)
        sum(got[name].sum() for name in names).backward()
        assert attention.grad is not None
        assert torch.isfinite(attention.grad).all()

    def test_from_query_and_key(self) -> None:
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(1, N, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        query.requires_grad_()
        names = ["distance", "entropy", "morans_i", "prefix_mass"]

        def total(q: torch.Tensor) -> torch.Tensor:
            got = measure_qk(q, key, OF, names, backend="torch")
            return torch.stack([got[name].sum() for name in names]).sum()

        assert torch.autograd.gradcheck(total, (query,))

    @pytest.mark.parametrize("backend", ["numba", "reference"])
    def test_a_backend_without_gradient_refuses(self, backend: str) -> None:
        attention = torch.from_numpy(uniform(1)).requires_grad_()
        with pytest.raises(BackendUnavailableError, match="has no gradient"):
            measure_attention(attention, OF, backend=backend)
        with torch.no_grad():
            assert measure_attention(attention, OF, backend=backend).backend == backend


USER_MODULE = '''
import numpy as np
from kernels import MetricSpec


def peak(p, layout):
    """Greatest renormalised value of each row."""
    patches = layout.patches(p)
    return (patches / patches.sum(-1, keepdims=True)).max(-1)


greatest = MetricSpec(name="greatest", unit="1", inputs="rows", reference=peak)
of_map = MetricSpec(name="of_map", unit="1", inputs="rows", reference=lambda p, layout: p[:, 1, 1])
wrong = MetricSpec(name="wrong", unit="1", inputs="rows", reference=lambda p, layout: p[..., 0, :3])
not_a_metric = 3
'''


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "user_metrics.py").write_text(USER_MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "user_metrics"
    sys.modules.pop("user_metrics", None)


class TestUserMetrics:
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_its_reference_alone_is_enough(self, user_module: str, backend: str, kind: str) -> None:
        attention: Any = random_rows(2, 3).astype(np.float32)
        patches = OF.patches(attention.astype(np.float64))
        expected = (patches / patches.sum(-1, keepdims=True)).max(-1).mean(-1)
        if kind == "torch":
            attention = torch.from_numpy(attention)
        got = measure_attention(attention, OF, ["entropy", f"{user_module}:greatest", f"{user_module}:of_map"], backend)
        assert list(got) == ["entropy", "greatest", "of_map"]
        assert isinstance(got["greatest"], torch.Tensor if kind == "torch" else np.ndarray)
        np.testing.assert_allclose(np.asarray(got["greatest"]), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(np.asarray(got["of_map"]), attention[:, :, 1, 1], rtol=0, atol=1e-12)
        assert got.from_reference == (() if backend == "reference" else ("greatest", "of_map"))

    def test_from_query_and_key(self, user_module: str) -> None:
        zeros = np.zeros((2, N, 4), np.float32)
        got = measure_qk(zeros, zeros, OF, ["entropy", f"{user_module}:greatest"])
        np.testing.assert_allclose(got["greatest"], 1 / 12, rtol=0, atol=1e-12)
        assert got.from_reference == ("greatest",)

    def test_a_wrong_shape_is_named(self, user_module: str) -> None:
        with pytest.raises(ValueError, match=r"'wrong': .* returned shape \(2, 3\) for 2 map\(s\); expected \(2, 12\)"):
            measure_attention(uniform(2), OF, [f"{user_module}:wrong"])

    def test_what_cannot_be_loaded(self, user_module: str) -> None:
        for name, words in (
            ("no_such_module:metric", "cannot be imported"),
            (f"{user_module}:nothing", "has no 'nothing'"),
            (f"{user_module}:not_a_metric", "is a int; expected a kernels.MetricSpec"),
        ):
            with pytest.raises(ValueError, match=words):
                load_metric(name)


def test_a_measurement_is_a_mapping_that_can_be_printed() -> None:
    got = measure_attention(uniform(2, 3), OF)
    assert isinstance(got, Measurement)
    assert list(got) == ["distance", "entropy", "morans_i"]
    assert len(got) == 3
    assert dict(got).keys() == got.undefined.keys()
    assert got.undefined_rows["morans_i"].tolist() == [[12] * 3] * 2
    assert "morans_i (2, 3); backend='numba'" in repr(got)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_reduce_none_keeps_the_query_axis(backend: str) -> None:
    attention = random_rows(2, 3)
    names = ["distance", "prefix_mass", "morans_i_received", "cls_entropy"]
    rows = measure_attention(attention, OF, names, backend, reduce="none")
    mean = measure_attention(attention, OF, names, backend)
    assert rows["distance"].shape == rows["prefix_mass"].shape == (2, 3, 12)
    assert rows["morans_i_received"].shape == rows["cls_entropy"].shape == (2, 3)
    np.testing.assert_allclose(rows["distance"].mean(-1), mean["distance"], rtol=0, atol=1e-12)


def test_registers_without_a_class_token() -> None:
    of = TokenLayout(
        grid_rows=2, grid_cols=2, num_prefix_tokens=2, patch_height_px=8, patch_width_px=8, class_token=False
    )
    attention = np.full((1, 6, 6), 1 / 6)
    got = measure_attention(attention, of, ["prefix_mass", "entropy"])
    assert got["prefix_mass"][0] == pytest.approx(1 / 3)
    assert got["entropy"][0] == pytest.approx(np.log(4))
