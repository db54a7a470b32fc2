"""Every backend × metric × dtype × hard case agrees with the float64 reference on the same rounded input."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
import torch

from kernels import Measurement, measure_attention, measure_qk
from kernels.cpu import backend as numba_cpu
from kernels.cpu.lane_types import EIGHT, widest
from kernels.reference import softmax_rows
from tests.cases import CASES, CPU_BACKENDS, DTYPES, FROM_QK, TOLERANCE, Case, layout, metrics_for, rounded, vit_qk

# numba as on CPUs with fewer vector registers than this one has.
LESSER = {"numba on any CPU": None, "numba, eight lanes": EIGHT}
FAST = (*(name for name in CPU_BACKENDS if name != "reference"), *LESSER)
# In float64 every CPU takes the same loops.
FAST_DTYPES = [(name, dtype) for name in FAST for dtype in DTYPES if name not in LESSER or dtype != "float64"]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend's name; for those of `LESSER` numba with the loops that it takes on a lesser CPU."""
    if request.param not in LESSER:
        return str(request.param)
    width = LESSER[request.param]
    if width is not None and widest() is None:
        pytest.skip(f"this CPU has no registers of {width.lanes} lanes")
    monkeypatch.setattr(numba_cpu, "vector_width", lambda: width)
    return "numba"


def as_kind(attention: np.ndarray, dtype: str, kind: str) -> Any:
    """Rounded float64 values as an array that holds them exactly."""
    if kind == "torch":
        return torch.from_numpy(attention).to(getattr(torch, dtype))
    return attention.astype(dtype)


@cache
def expected_of(case: Case, dtype: str, reduce: Literal["mean", "none"]) -> Measurement:
    """The reference's answer, worked out once for all backends."""
    attention = as_kind(rounded(case.attention(), dtype), dtype, "torch" if dtype == "bfloat16" else "numpy")
    names = metrics_for(case.layout)
    return measure_attention(attention, case.layout, names, "reference", "mask", reduce, case.regions())


def assert_close(got: Any, expected: Any, tolerances: dict[str, float], context: str) -> None:
    """Values, the places without one, and the counts of undefined rows."""
    for name in expected:
        ours, theirs = np.asarray(got[name]), np.asarray(expected[name])
        assert ours.shape == theirs.shape, f"{context}: {name}"
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs), err_msg=f"{context}: {name}, NaN")
        np.testing.assert_array_equal(
            np.asarray(got.undefined_rows[name]), expected.undefined_rows[name], err_msg=f"{context}: {name}, undefined"
        )
        defined = ~np.isnan(theirs)
        worst = np.abs(ours - theirs)[defined].max(initial=0.0)
        assert worst <= tolerances[name], f"{context}: {name} is off by {worst:.2e}, allowed {tolerances[name]:.0e}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), FAST_DTYPES, indirect=["backend"])
def test_agrees_with_the_reference(backend: str, case: Case, dtype: str) -> None:
    attention = rounded(case.attention(), dtype)
    names, regions = metrics_for(case.layout), case.regions()
    kind = "torch" if dtype == "bfloat16" else "numpy"
    stored = as_kind(attention, dtype, kind)
    reductions: tuple[Literal["mean"], Literal["none"]] = ("mean", "none")
    for reduce in reductions:
        # Rounding alone can take a row's sum out of tolerance: such rows are masked alike.
        got = measure_attention(stored, case.layout, names, backend, "mask", reduce, regions)
        expected = expected_of(case, dtype, reduce)
        assert got.masked == expected.masked
        assert_close(got, expected, TOLERANCE, f"{backend}, {dtype}, reduce={reduce}")


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("key", [0, 1, 2, 17, 18, 19, 101])
def test_a_negative_value_is_found_wherever_it_is(backend: str, dtype: str, key: int) -> None:
    """Its row sums to 1 all the same. Keys 0 and 1 are the prefix, 17 is a register's last, 18 and 19 end a row."""
    of = layout(5, 20, 2)
    attention = np.full((1, 2, of.num_tokens, of.num_tokens), 1 / of.num_tokens)
    attention[0, 1, 7, key] *= -1
    attention[0, 1, 7, (key + 1) % of.num_tokens] *= 3
    attention[0, 0, 4, key] = -0.0  # as good as 0
    attention[0, 0, 4, (key + 1) % of.num_tokens] *= 2
    got = measure_attention(attention.astype(dtype), of, ["distance", "prefix_mass"], backend, "mask", "none")
    assert got.masked == 1
    assert np.argwhere(np.isnan(got["distance"])).tolist() == [[0, 1, 5]]
    assert np.argwhere(np.isnan(got["prefix_mass"])).tolist() == [[0, 1, 5]]


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize(
    ("rows", "cols", "prefix"), [(4, 16, 0), (8, 32, 0), (2, 128, 20), (14, 14, 1), (5, 37, 17), (1, 13, 9)]
)
def test_rows_of_any_spread(backend: str, rows: int, cols: int, prefix: int) -> None:
    """From rows that are almost constant on, also where their mean is a power of two, below which float32 is finer.

    Rows of less spread than 1/24 have their own way. Prefixes are shorter and longer than a register.
    """
    of = layout(rows, cols, prefix)
    noise = np.random.default_rng(3).standard_normal((of.num_tokens, of.num_tokens))
    attention = np.stack([np.abs(1 + spread * noise) for spread in (1e-5, 5e-4, 0.03, 0.041, 0.05, 0.5)])
    attention = (attention / attention.sum(axis=-1, keepdims=True)).astype(np.float32)
    names = ("distance", "entropy", "morans_i", "prefix_mass")
    expected = measure_attention(attention, of, names, "reference", reduce="none")
    got = measure_attention(attention, of, names, backend, reduce="none")
    assert_close(got, expected, TOLERANCE, backend)


@pytest.mark.parametrize("backend", FAST, indirect=True)
def test_torch_and_numpy_input_give_the_same_bits(backend: str) -> None:
    case = CASES[0]
    attention = rounded(case.attention(), "float16").astype(np.float16)
    names, regions = metrics_for(case.layout), case.regions()
    from_numpy = measure_attention(attention, case.layout, names, backend, regions=regions)
    from_torch = measure_attention(torch.from_numpy(attention), case.layout, names, backend, regions=regions)
    for name in names:
        assert isinstance(from_numpy[name], np.ndarray)
        assert isinstance(from_torch[name], torch.Tensor)
        if name in from_torch.from_reference:  # the mean of its rows is NumPy's or torch's, which add in other orders
            continue
        np.testing.assert_array_equal(from_torch[name].numpy(), from_numpy[name])


@pytest.mark.parametrize(
    ("backend", "dtype"), [*FAST_DTYPES, *(("sdpa", dtype) for dtype in DTYPES)], indirect=["backend"]
)
@pytest.mark.parametrize(
    ("rows", "cols", "prefix", "head_dim"), [(14, 14, 1, 64), (7, 11, 0, 6), (1, 13, 5, 33), (5, 4, 2, 1)]
)
def test_from_query_and_key(backend: str, dtype: str, rows: int, cols: int, prefix: int, head_dim: int) -> None:
    of = layout(rows, cols, prefix)
    query, key = vit_qk(of, head_dim, np.random.default_rng(3))
    q, k = (torch.from_numpy(a).to(getattr(torch, dtype)) for a in (query, key))
    regions = np.random.default_rng(4).uniform(size=(2, 2, of.num_patches))
    names = metrics_for(of)
    got = measure_qk(q, k, of, names, backend=backend, regions=regions)
    expected = measure_qk(q, k, of, names, backend="reference", regions=regions)
    assert_close(got, expected, FROM_QK, f"{backend}, {dtype}")


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize(
    "kind", ["head", "image and head", "query", "key", "boolean", "boolean key", "every patch hidden"]
)
def test_from_query_and_key_with_bias(backend: str, kind: str) -> None:
    of = layout(7, 6, 2)
    rng = np.random.default_rng(5)
    query, key = vit_qk(of, 16, rng)
    n = of.num_tokens
    shapes = {"head": (3, n, n), "image and head": (2, 3, n, n), "query": (n, 1), "key": (n,)}
    bias: np.ndarray
    if kind in shapes:
        bias = rng.normal(size=shapes[kind]).astype(np.float32)
    else:
        bias = rng.uniform(size=(1, n) if kind == "boolean key" else (2, 1, n, n)) < 0.6
        bias[..., 0] = True
        if kind == "every patch hidden":
            of.patches(bias)[:, :, 4] = False
    regions = rng.uniform(size=(2, 2, of.num_patches))
    got = measure_qk(query, key, of, metrics_for(of), 0.3, bias, backend, regions=regions)
    expected = measure_qk(query, key, of, metrics_for(of), 0.3, bias, "reference", regions=regions)
    assert_close(got, expected, FROM_QK, f"{backend}, {kind}")
    if kind == "every patch hidden":
        assert got.undefined["entropy"] == 6  # one query in each of 2 × 3 maps


def test_query_and_key_agree_with_the_map_they_make() -> None:
    of = layout(9, 8, 1)
    query, key = vit_qk(of, 32, np.random.default_rng(6))
    attention = softmax_rows(query.astype(np.float64), key.astype(np.float64), 32**-0.5, None)
    from_map = measure_attention(attention, of, backend="reference")
    from_qk = measure_qk(query, key, of, backend="reference")
    for name in from_map:
        np.testing.assert_allclose(from_qk[name], from_map[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", FAST, indirect=True)
@pytest.mark.parametrize("bias", [-90.0, 90.0])
def test_a_sink_on_the_prefix_costs_no_accuracy(backend: str, bias: float) -> None:
    """From query and key the prefix cancels: 1 − 1e-39 of the mass there leaves the metrics as they were."""
    of = layout(7, 6, 2)
    query, key = vit_qk(of, 16, np.random.default_rng(8))
    sink = np.zeros(of.num_tokens, np.float32)
    sink[: of.num_prefix_tokens] = bias
    names = ["distance", "entropy", "morans_i", "prefix_mass", "distance_px", "entropy_seed1"]
    got = measure_qk(query, key, of, names, bias=sink, backend=backend)
    expected = measure_qk(query, key, of, names, bias=sink, backend="reference")
    assert_close(got, expected, FROM_QK, backend)


def strided(attention: np.ndarray, how: str) -> np.ndarray:
    """The same values in another memory order."""
    if how == "heads last":
        return np.ascontiguousarray(attention.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if how == "every second image":
        return np.repeat(attention, 2, axis=0)[::2]
    if how == "keys first":
        return np.ascontiguousarray(attention.swapaxes(-1, -2)).swapaxes(-1, -2)
    if how == "backwards":
        return np.ascontiguousarray(attention[::-1, :, ::-1])[::-1, :, ::-1]
    if how == "part of a larger array":
        larger = np.full((*attention.shape[:-1], attention.shape[-1] + 3), np.nan, attention.dtype)
        larger[..., 1:-2] = attention
        return larger[..., 1:-2]
    raise ValueError(how)


@pytest.mark.parametrize(
    "how", ["heads last", "every second image", "keys first", "backwards", "part of a larger array"]
)
@pytest.mark.parametrize("backend", [*CPU_BACKENDS, *LESSER], indirect=True)
def test_strides_do_not_matter(backend: str, how: str) -> None:
    of = layout(7, 11, 1)
    attention = CASES[0].make(of, np.random.default_rng(2)).astype(np.float32)
    view = strided(attention, how)
    np.testing.assert_array_equal(view, attention)
    expected = measure_attention(attention, of, backend=backend)
    got = measure_attention(view, of, backend=backend)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


def test_query_and_key_are_read_in_place_from_a_fused_projection() -> None:
    """timm's q, k and v are views of one [image, token, 3, head, dim] product."""
    of = layout(4, 5, 1)
    fused = torch.randn(2, of.num_tokens, 3, 3, 16, generator=torch.Generator().manual_seed(0))
    query, key, _ = fused.permute(2, 0, 3, 1, 4).unbind(0)
    assert not query.is_contiguous()
    got, expected = measure_qk(query, key, of), measure_qk(query.contiguous(), key.contiguous(), of)
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name])


@pytest.mark.parametrize("backend", [*CPU_BACKENDS, *LESSER], indirect=True)
@pytest.mark.parametrize("leading", [(), (3,), (1, 2, 3), (0, 3)])
def test_any_leading_axes(backend: str, leading: tuple[int, ...]) -> None:
    of = layout(3, 4, 1)
    attention = np.full((*leading, of.num_tokens, of.num_tokens), 1 / of.num_tokens)
    coverage = np.full((*leading[:-1], 2, of.num_patches), 0.25)
    got = measure_attention(attention, of, ["entropy", "morans_i_received", "region_mass"], backend, regions=coverage)
    assert got["entropy"].shape == leading
    assert got["morans_i_received"].shape == leading
    assert got["region_mass"].shape == (*leading, 2)
    np.testing.assert_allclose(got["entropy"], np.log(12), rtol=0, atol=1e-6)
    np.testing.assert_allclose(got["region_mass"], 0.25, rtol=0, atol=1e-6)
    query = np.zeros((*leading, of.num_tokens, 4), np.float32)
    np.testing.assert_allclose(measure_qk(query, query, of, backend=backend)["entropy"], np.log(12), rtol=0, atol=1e-6)
