"""The CUDA backends against the float64 reference, over the cases of the CPU backends.

On a CUDA device they run on it. Without one, Triton's interpreter and numba's CUDA simulator run them, each in a
process of its own (both read their environment variable at import) and on small grids: this file starts those
processes and is what they run. Neither sees what a compiler would refuse: see test_gpu_compiles.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels import METRICS, BackendUnavailableError, InvalidAttentionError, Measurement, measure_attention, measure_qk
from kernels.backends import BACKENDS
from kernels.inputs import Maps
from tests.cases import CASES, FROM_QK, TOLERANCE, Case, constant, layout, near_uniform, on_prefix, rounded, vit_qk

ROOT = Path(__file__).resolve().parents[1]

CUDA_BACKENDS = {name: spec for name, spec in BACKENDS.items() if "cpu" not in spec.devices}
EMULATED = tuple(name for name, spec in CUDA_BACKENDS.items() if "cpu" in spec.readable_devices)
DEVICE = "cpu" if EMULATED or not torch.cuda.is_available() else "cuda"
# Empty in an ordinary process without a CUDA device: pytest then skips what takes a backend.
RUNNABLE = EMULATED or (tuple(CUDA_BACKENDS) if DEVICE == "cuda" else ())
if EMULATED == ("numba_cuda",):
    sys.setswitchinterval(1e-5)  # the simulator's threads wait for each other by spinning, 5 ms a turn otherwise
FROM_FACTORS = tuple(name for name in RUNNABLE if name != "numba_cuda")

# Row metrics the kernels compute themselves; the class token's row is a row like others.
OWN = (
    "distance",
    "entropy",
    "entropy_normalized",
    "morans_i",
    "gearys_c",
    "prefix_mass",
    "cls_entropy",
    "cls_morans_i",
)
DTYPES_OF = {
    "triton": ("float16", "bfloat16", "float32"),
    "numba_cuda": ("float16", "bfloat16", "float32", "float64"),
}

OF = layout(3, 4, 1)
N = OF.num_tokens


def small(case: Case) -> Case:
    """The case on at most 3×4 patches: an emulator takes milliseconds per row."""
    of = case.layout
    if DEVICE == "cuda":
        return case
    return replace(case, layout=replace(of, grid_rows=min(of.grid_rows, 3), grid_cols=min(of.grid_cols, 4)))


def maps_of(case: Case) -> np.ndarray:
    """Two heads of each image; in an emulator one map, unless images and heads of the case differ in kind."""
    attention = case.attention()[:, :2]
    return attention if DEVICE == "cuda" or case.make in (constant, on_prefix) else attention[:1, :1]


def names_for(of: Any) -> list[str]:
    return [name for name in OWN if of.class_token or not name.startswith("cls_")]


def on_device(values: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(values).to(getattr(torch, dtype)).to(DEVICE)


def assert_close(got: Any, expected: Any, tolerances: dict[str, float], context: str) -> None:
    """Values, the places without one, and the counts of undefined rows."""
    assert got.masked == expected.masked, context
    np.testing.assert_array_equal(got.invalid_rows.cpu(), expected.invalid_rows.cpu(), err_msg=context)
    np.testing.assert_array_equal(got.invalid_patches.cpu(), expected.invalid_patches.cpu(), err_msg=context)
    for name in expected:
        ours, theirs = got[name].cpu().numpy(), expected[name].cpu().numpy()
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=f"{context}: {name}, NaN")
        undefined = got.undefined_rows[name].cpu().numpy(), expected.undefined_rows[name].cpu().numpy()
        np.testing.assert_array_equal(*undefined, err_msg=f"{context}: {name}, undefined")
        worst = np.abs(ours - theirs)[~np.isnan(theirs)].max(initial=0.0)
        assert worst <= tolerances[name], f"{context}: {name} is off by {worst:.2e}, allowed {tolerances[name]:.0e}"


def agree_on(attention: torch.Tensor, of: Any, backend: str, reduce: Any = "none") -> Measurement:
    """What the backend measures, which is what the reference measures."""
    got = measure_attention(attention, of, names_for(of), backend, "mask", reduce)
    assert (got.backend, got.from_reference) == (backend, ())
    expected = measure_attention(attention.cpu(), of, names_for(of), "reference", "mask", reduce)
    assert_close(got, expected, TOLERANCE, f"{backend}, {attention.dtype}")
    return got


@pytest.fixture(scope="module")
def emulator_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """This file in one process for each backend, side by side: the process and where its output goes."""
    runs = {}
    for name, spec in CUDA_BACKENDS.items() if not RUNNABLE else ():
        output = tmp_path_factory.mktemp(name) / "output.txt"
        environment = {**os.environ, spec.emulator: "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu_backends.py"]
        with output.open("w") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True
            )
        runs[name] = process, output
    yield runs
    for process, _ in runs.values():
        process.kill()
        process.wait()


class TestStoredMaps:
    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_agree_with_the_reference(self, backend: str, case: Case) -> None:
        dtypes = DTYPES_OF[backend]
        if EMULATED and CASES.index(case) % 4 != 3:
            dtypes = ("float32",)  # an emulator takes seconds; on a device every case has every dtype
        case = small(case)
        for dtype in dtypes:
            attention = rounded(maps_of(case), dtype)
            agree_on(on_device(attention, dtype), case.layout, backend)

    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_rows_longer_than_a_tile(self, backend: str) -> None:
        of = layout(5, 13, 1)  # 65 patches: two tiles of keys, the last one all but empty
        attention = near_uniform(of, np.random.default_rng(11))[:1, :1]
        agree_on(on_device(attention, "float32"), of, backend, "mean")

    @pytest.mark.parametrize("how", ["heads last", "keys first", "every second image", "part of a larger array"])
    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_are_read_in_place_whatever_their_strides(self, backend: str, how: str) -> None:
        attention = torch.from_numpy(CASES[0].make(OF, np.random.default_rng(2))[:, :1].astype(np.float32)).to(DEVICE)
        larger = torch.full((2, 1, N, N + 3), torch.nan, device=DEVICE)
        larger[..., 1:-2] = attention
        view = {
            "heads last": attention.transpose(0, 2).contiguous().transpose(0, 2),
            "keys first": attention.mT.contiguous().mT,
            "every second image": attention.repeat_interleave(2, dim=0)[::2],
            "part of a larger array": larger[..., 1:-2],
        }[how]
        assert torch.equal(view, attention)
        assert not view.is_contiguous()
        got = measure_attention(view, OF, backend=backend)
        expected = measure_attention(attention, OF, backend=backend)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_halves_may_begin_anywhere(self, backend: str, dtype: str) -> None:
        attention = on_device(CASES[0].make(OF, np.random.default_rng(2))[:1, :1], dtype)
        expected = measure_attention(attention, OF, backend=backend)
        for offset in range(1, 9):
            buffer = torch.full((attention.numel() + 16,), torch.nan, dtype=attention.dtype, device=DEVICE)
            view = buffer[offset:][: attention.numel()].view(attention.shape)
            view.copy_(attention)
            got = measure_attention(view, OF, backend=backend)
            for name in expected:
                assert torch.equal(got[name], expected[name]), (name, offset)

    @pytest.mark.parametrize("leading", [(), (1, 2, 1), (0, 3)])
    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_any_leading_axes(self, backend: str, leading: tuple[int, ...]) -> None:
        attention = torch.full((*leading, N, N), 1 / N, device=DEVICE)
        got = measure_attention(attention, OF, ["entropy", "morans_i"], backend)
        assert tuple(got["entropy"].shape) == leading
        np.testing.assert_allclose(got["entropy"].cpu(), np.log(12), rtol=0, atol=1e-6)
        assert bool(got["morans_i"].isnan().all())  # constant rows

    @pytest.mark.parametrize(
        ("bad", "words"), [(np.nan, "NaN"), (np.inf, "NaN"), (-0.25, "negative"), (0.9, "sums to")]
    )
    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_invalid_rows(self, backend: str, bad: float, words: str) -> None:
        values = np.random.default_rng(0).dirichlet(np.ones(N), size=(2, 2, N))
        values[1, 1, 5, 3] = bad
        values[0, 1, 0, 0] = bad  # a prefix query's row, on a prefix key
        attention = on_device(values, "float32")
        with pytest.raises(InvalidAttentionError, match=f"^2 of {4 * N} .*attention\\[0, 1, 0, :\\] .*{words}"):
            measure_attention(attention, OF, backend=backend)
        got = agree_on(attention, OF, backend)
        assert got.masked == 2
        assert torch.nonzero(got["entropy"].isnan()).tolist() == [[1, 1, 4]]
        assert torch.nonzero(got["cls_entropy"].isnan()).tolist() == [[0, 1]]
        counted = agree_on(attention, OF, backend, "mean")
        assert (counted.invalid_rows.tolist(), counted.invalid_patches.tolist()) == ([[0, 1], [0, 1]], [[0, 0], [0, 1]])

    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_zeros_with_a_sign_and_rows_of_next_to_nothing(self, backend: str) -> None:
        """Rows that the fast way leaves to the exact one, among others that it does not."""
        values = np.random.default_rng(3).dirichlet(np.ones(N), size=(1, 2, N)).astype(np.float32)
        values[0, 0, 3, 4], values[0, 1, 2, 1], values[0, 1, 6, 0] = -0.0, -0.0, -0.0
        values[0, 1, 8, 1:] *= 1e-20
        values[0, 1, 9, 1:] = -0.0
        values[0, 1, 8:10, 0] = 1.0
        agree_on(torch.from_numpy(values / values.sum(-1, keepdims=True)).to(DEVICE), OF, backend)

    @pytest.mark.parametrize("backend", RUNNABLE)
    def test_other_metrics_come_from_the_reference_and_are_named(self, backend: str) -> None:
        attention = torch.from_numpy(CASES[0].make(OF, np.random.default_rng(2))[:, :1].astype(np.float32)).to(DEVICE)
        names = ["gini", "distance", "morans_i_received", "sink_share"]
        got = measure_attention(attention, OF, names, backend)
        expected = measure_attention(attention.cpu(), OF, names, "reference")
        assert got.from_reference == ("gini", "morans_i_received", "sink_share")
        assert_close(got, expected, TOLERANCE, backend)


class TestQueryAndKey:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize(
        ("rows", "cols", "prefix", "head_dim"), [(5, 13, 1, 130), (4, 5, 0, 6), (1, 7, 5, 33), (5, 4, 2, 1)]
    )
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_agree_with_the_reference(
        self, backend: str, dtype: str, rows: int, cols: int, prefix: int, head_dim: int
    ) -> None:
        of = layout(rows, cols, prefix)
        query, key = (on_device(a[:1, :1], dtype) for a in vit_qk(of, head_dim, np.random.default_rng(3)))
        got = measure_qk(query, key, of, names_for(of), backend=backend, reduce="none")
        expected = measure_qk(query.cpu(), key.cpu(), of, names_for(of), backend="reference", reduce="none")
        assert got.from_reference == ()
        assert_close(got, expected, FROM_QK, f"{backend}, {dtype}")

    @pytest.mark.parametrize(
        "kind", ["head", "image and head", "query", "key", "half", "boolean", "boolean key", "every patch hidden"]
    )
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_bias(self, backend: str, kind: str) -> None:
        rng = np.random.default_rng(5)
        query, key = (torch.from_numpy(a).to(DEVICE) for a in vit_qk(OF, 16, rng))
        shapes = {"head": (3, N, N), "image and head": (2, 3, N, N), "query": (N, 1), "key": (N,), "half": (N, N)}
        if kind in shapes:
            bias = on_device(rng.normal(size=shapes[kind]), "float16" if kind == "half" else "float32")
        else:
            shown = rng.uniform(size=(1, N) if kind == "boolean key" else (2, 1, N, N)) < 0.6
            shown[..., 0] = True
            if kind == "every patch hidden":
                OF.patches(shown)[:, :, 4] = False
            bias = torch.from_numpy(shown).to(DEVICE)
        got = measure_qk(query, key, OF, list(OWN), 0.3, bias, backend)
        expected = measure_qk(query.cpu(), key.cpu(), OF, list(OWN), 0.3, bias.cpu(), "reference")
        assert_close(got, expected, FROM_QK, f"{backend}, {kind}")
        if kind == "every patch hidden":
            assert got.undefined["entropy"] == 6  # one query in each of 2 × 3 maps

    @pytest.mark.parametrize("sink", [-90.0, 90.0])
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_a_sink_on_the_prefix_costs_no_accuracy(self, backend: str, sink: float) -> None:
        query, key = (torch.from_numpy(a[:1]).to(DEVICE) for a in vit_qk(OF, 16, np.random.default_rng(8)))
        bias = torch.zeros(N, device=DEVICE)
        bias[: OF.num_prefix_tokens] = sink
        got = measure_qk(query, key, OF, list(OWN), bias=bias, backend=backend)
        expected = measure_qk(query.cpu(), key.cpu(), OF, list(OWN), bias=bias.cpu(), backend="reference")
        assert_close(got, expected, FROM_QK, backend)

    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_views_of_the_fused_projection_are_read_in_place(self, backend: str) -> None:
        fused = torch.randn(2, N, 3, 3, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        query, key, _ = fused.permute(2, 0, 3, 1, 4).unbind(0)
        assert not query.is_contiguous()
        got = measure_qk(query, key, OF, backend=backend)
        expected = measure_qk(query.contiguous(), key.contiguous(), OF, backend=backend)
        for name in expected:
            assert torch.equal(got[name], expected[name]), name

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_logits_without_a_value(self, backend: str, bad: float) -> None:
        query, key = (torch.from_numpy(a[:1]).to(DEVICE) for a in vit_qk(OF, 16, np.random.default_rng(9)))
        query[0, 1, 4, 2] = bad
        with pytest.raises(InvalidAttentionError, match=r"query\[0, 1, 4, :\] holds NaN or infinite values"):
            measure_qk(query, key, OF, backend=backend)
        got = measure_qk(query, key, OF, list(OWN), backend=backend, invalid="mask", reduce="none")
        assert got.masked == 1
        assert torch.nonzero(got["morans_i"].isnan()).tolist() == [[0, 1, 3]]

    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_equal_keys_make_constant_rows(self, backend: str) -> None:
        query = torch.randn(1, 1, N, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        got = measure_qk(query, torch.zeros_like(query), OF, list(OWN), backend=backend)
        assert got.undefined == {name: {"morans_i": 12, "gearys_c": 12, "cls_morans_i": 1}.get(name, 0) for name in OWN}
        assert got["entropy"].item() == pytest.approx(np.log(12), abs=1e-6)

    @pytest.mark.parametrize(("rows", "cols"), [(3, 4), (5, 13), (4, 1)])
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_equal_keys_of_any_value_make_constant_rows(self, backend: str, rows: int, cols: int) -> None:
        """Products of small integers are exact; by a scale that is no power of two, less the greatest, they are not."""
        of = layout(rows, cols, 1)
        query, key = (np.random.default_rng(4).integers(-9, 9, (1, 2, of.num_tokens, 16)) for _ in range(2))
        key[...] = key[:, :, :1]
        got = measure_qk(on_device(query, "float32"), on_device(key, "float32"), of, "morans_i", 0.3, backend=backend)
        assert got.undefined == {"morans_i": 2 * rows * cols}

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    @pytest.mark.parametrize(("rows", "cols", "prefix"), [(6, 12, 5), (5, 13, 0), (8, 8, 9)])
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_programs_that_have_queries_of_two_maps(
        self, backend: str, dtype: str, rows: int, cols: int, prefix: int
    ) -> None:
        of = layout(rows, cols, prefix)
        query, key = (on_device(array, dtype) for array in vit_qk(of, 16, np.random.default_rng(12)))
        query, key = query.transpose(1, 2).contiguous().transpose(1, 2), key  # [image, head], of unlike strides
        got = measure_qk(query, key, of, names_for(of), backend=backend, reduce="none")
        expected = measure_qk(query.cpu(), key.cpu(), of, names_for(of), backend="reference", reduce="none")
        assert_close(got, expected, FROM_QK, f"{backend}, {dtype}")

    @pytest.mark.parametrize("least", [5.0, 40.0, 300.0])
    @pytest.mark.parametrize(("rows", "cols", "prefix"), [(4, 5, 1), (5, 13, 0)])
    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_logits_far_above_those_of_the_first_row(
        self, backend: str, rows: int, cols: int, prefix: int, least: float
    ) -> None:
        of = layout(rows, cols, prefix)
        query, key = (array[:, :2] for array in vit_qk(of, 16, np.random.default_rng(6)))
        query[..., 0], key[..., 0] = 4.0, 0.0
        key[:, :, prefix + 2 * cols :, 0] = least  # logits greater by that much
        query, key = on_device(query, "float32"), on_device(key, "float32")
        got = measure_qk(query, key, of, names_for(of), 0.25, backend=backend)
        expected = measure_qk(query.cpu(), key.cpu(), of, names_for(of), 0.25, backend="reference")
        assert_close(got, expected, FROM_QK, backend)

    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_a_mask_over_the_first_row(self, backend: str) -> None:
        query, key = (torch.from_numpy(a[:1, :1]).to(DEVICE) for a in vit_qk(OF, 16, np.random.default_rng(9)))
        shown = torch.ones(N, N, dtype=torch.bool, device=DEVICE)
        OF.patches(shown)[:, : OF.grid_cols] = False
        bias = torch.where(shown, -200.0, -torch.inf)
        for given in (shown, bias):
            got = measure_qk(query, key, OF, list(OWN), bias=given, backend=backend)
            expected = measure_qk(query.cpu(), key.cpu(), OF, list(OWN), bias=given.cpu(), backend="reference")
            assert_close(got, expected, FROM_QK, backend)

    @pytest.mark.parametrize("backend", FROM_FACTORS)
    def test_a_query_with_no_key_is_invalid(self, backend: str) -> None:
        query, key = (torch.from_numpy(a[:1, :1]).to(DEVICE) for a in vit_qk(OF, 16, np.random.default_rng(9)))
        shown = torch.ones(N, N, dtype=torch.bool, device=DEVICE)
        shown[2] = False
        with pytest.raises(InvalidAttentionError, match="the mask leaves query 0, 0, 2 no key to attend to"):
            measure_qk(query, key, OF, bias=shown, backend=backend)


@pytest.mark.skipif(bool(EMULATED), reason="no emulator has a part in it")
class TestFusedAttention:
    """`sdpa`, which has no kernel of its own: on a CUDA device, or without one on the CPU."""

    NAMES = ("entropy", "entropy_normalized", "prefix_mass", "cls_entropy")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize(
        ("rows", "cols", "prefix", "head_dim"),
        [(14, 14, 1, 64), (5, 13, 1, 130), (4, 5, 0, 6), (1, 7, 5, 33), (5, 4, 2, 1)],
    )
    def test_agrees_with_the_reference_and_triton(
        self, dtype: str, rows: int, cols: int, prefix: int, head_dim: int
    ) -> None:
        of = layout(rows, cols, prefix)
        names = [name for name in self.NAMES if of.class_token or name != "cls_entropy"]
        query, key = (on_device(a, dtype) for a in vit_qk(of, head_dim, np.random.default_rng(3)))
        expected = measure_qk(query.cpu(), key.cpu(), of, names, backend="reference", reduce="none")
        for backend in ("sdpa", "triton") if "triton" in RUNNABLE else ("sdpa",):
            got = measure_qk(query, key, of, names, backend=backend, reduce="none")
            assert (got.backend, got.from_reference) == (backend, ())
            assert_close(got, expected, FROM_QK, f"{backend}, {dtype}")

    @pytest.mark.parametrize("scale", [-0.2, 0.0, 0.3])
    def test_whatever_products_torch_may_round(self, scale: float) -> None:
        of = layout(14, 14, 5)
        query, key = (on_device(a, "float32") for a in vit_qk(of, 64, np.random.default_rng(4)))
        expected = measure_qk(query.cpu(), key.cpu(), of, self.NAMES, scale, backend="reference")
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            got = measure_qk(query, key, of, self.NAMES, scale, backend="sdpa")
        finally:
            torch.set_float32_matmul_precision(before)
        assert_close(got, expected, FROM_QK, f"scale {scale}")

    @pytest.mark.parametrize("how", ["fused projection", "dims first", "one query", "every second dim", "odd start"])
    def test_any_strides(self, how: str) -> None:
        generator = torch.Generator().manual_seed(0)
        fused = torch.randn(2, N, 3, 3, 16, generator=generator).to(DEVICE)
        query, key, _ = fused.permute(2, 0, 3, 1, 4).unbind(0)
        if how == "dims first":
            query, key = (part.mT.contiguous().mT for part in (query, key))
        elif how == "one query":
            query = query[:, :, :1].expand(key.shape)
        elif how == "every second dim":
            query, key = query[..., ::2], key[..., ::2]
        elif how == "odd start":
            query, key = query[..., 3:11], key[..., 3:11]
        assert not query.is_contiguous()
        got, expected = (
            measure_qk(*parts, OF, self.NAMES, backend="sdpa")
            for parts in ((query, key), (query.contiguous(), key.contiguous()))
        )
        for name in expected:
            assert torch.equal(got[name], expected[name]), name

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("token", [0, 4])
    def test_what_is_not_finite(self, bad: float, token: int) -> None:
        query, key = (torch.from_numpy(a[:1]).to(DEVICE) for a in vit_qk(OF, 16, np.random.default_rng(9)))
        broken = query.clone()
        broken[0, 1, token, 2] = bad
        with pytest.raises(InvalidAttentionError, match=rf"^1 of .*query\[0, 1, {token}, :\] holds NaN or infinite"):
            measure_qk(broken, key, OF, self.NAMES, backend="sdpa")
        broken = key.clone()
        broken[0, 1, token, 2] = bad
        with pytest.raises(InvalidAttentionError, match=rf"^{N} of .*key\[0, 1, :, :\] holds NaN or infinite"):
            measure_qk(query, broken, OF, self.NAMES, backend="sdpa")
        got = measure_qk(query, broken, OF, self.NAMES, backend="sdpa", invalid="mask")
        assert got.masked == N
        for name in self.NAMES:
            assert torch.nonzero(got[name].isnan()).tolist() == [[0, 1]]


class TestRefusals:
    @pytest.mark.skipif(bool(EMULATED), reason="emulators read the CPU's memory")
    @pytest.mark.parametrize("backend", list(CUDA_BACKENDS))
    def test_data_on_the_cpu(self, backend: str) -> None:
        attention = torch.full((1, N, N), 1 / N)
        with pytest.raises(BackendUnavailableError, match=f"'{backend}' reads data on cuda, but .* is on 'cpu'"):
            measure_attention(attention, OF, backend=backend)
        # The variable set too late, when the compiler is already imported, changes nothing.
        loaded = CUDA_BACKENDS[backend].load()
        with pytest.raises(BackendUnavailableError, match=f"{CUDA_BACKENDS[backend].emulator}=1 before"):
            loaded.measure_attention(Maps(attention, OF, None, "float32"), [METRICS["distance"]])

    @pytest.mark.skipif("triton" not in RUNNABLE, reason="triton does not run in this process")
    def test_triton_reads_no_float64(self) -> None:
        attention = torch.full((1, N, N), 1 / N, dtype=torch.float64, device=DEVICE)
        with pytest.raises(BackendUnavailableError, match="but the data is float64"):
            measure_attention(attention, OF, backend="triton")

    @pytest.mark.skipif(DEVICE == "cpu", reason="the CPU has such a kernel")
    def test_sdpa_reads_no_float64(self) -> None:
        query = torch.zeros(1, N, 8, dtype=torch.float64, device=DEVICE)
        with pytest.raises(BackendUnavailableError, match="but the data is float64"):
            measure_qk(query, query, OF, "entropy", backend="sdpa")

    @pytest.mark.parametrize("backend", EMULATED)
    def test_an_emulator_reads_numpy(self, backend: str) -> None:
        got = measure_attention(np.full((1, N, N), 1 / N, np.float32), OF, ["entropy"], backend)
        assert isinstance(got["entropy"], np.ndarray)
        np.testing.assert_allclose(got["entropy"], np.log(OF.num_patches), rtol=0, atol=1e-6)

    @pytest.mark.skipif("numba_cuda" not in RUNNABLE, reason="numba_cuda does not run in this process")
    def test_numba_cuda_measures_stored_maps_alone(self) -> None:
        query = torch.zeros(1, N, 8, device=DEVICE)
        with pytest.raises(BackendUnavailableError, match="measures stored attention"):
            measure_qk(query, query, OF, backend="numba_cuda")


@pytest.mark.skipif(bool(RUNNABLE), reason="the backends run in this very process")
@pytest.mark.parametrize("backend", list(CUDA_BACKENDS))
def test_everything_above_through_the_emulator(
    backend: str, emulator_runs: dict[str, tuple[subprocess.Popen[str], Path]]
) -> None:
    process, output = emulator_runs[backend]
    status = process.wait()
    said = output.read_text()
    assert status == 0, said[-8000:]
    passed = re.search(r"(\d+) passed", said)
    assert passed is not None
    assert int(passed[1]) >= len(CASES) + 10, said[-2000:]
