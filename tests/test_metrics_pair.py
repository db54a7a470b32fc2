"""`measure_pair`: closed forms, scipy as the oracle, agreement of the backends, and what is refused."""

from __future__ import annotations

import importlib
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from kernels import (
    METRICS,
    BackendUnavailableError,
    InvalidAttentionError,
    Measurement,
    MetricSpec,
    TokenLayout,
    measure_attention,
    measure_pair,
)
from tests.cases import CASES, CPU_BACKENDS, DTYPES, TOLERANCE, Case, layout, rounded

FAST = tuple(name for name in CPU_BACKENDS if name != "reference")
JS = "js_divergence"
OF = layout(3, 4, 1)
N = OF.num_tokens


def random_rows(*leading: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(N), size=(*leading, N))


def another(attention: np.ndarray) -> np.ndarray:
    """A second condition: other heads, a mixture with other heads, and in the last image nearly the same rows."""
    other = attention[:, ::-1].copy()
    other[:, 0] = (other[:, 0] + attention[:, 0]) / 2
    other[-1] = 0.999 * attention[-1] + 0.001 * other[-1]
    return other


def stored(attention: np.ndarray, dtype: str) -> Any:
    if dtype == "bfloat16":
        return torch.from_numpy(rounded(attention, dtype)).to(torch.bfloat16)
    return attention.astype(dtype)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestClosedForms:
    def rows(self, first: list[float], second: list[float]) -> tuple[TokenLayout, np.ndarray, np.ndarray]:
        of = layout(1, len(first), 0)
        one, two = (np.broadcast_to(row, (1, len(row), len(row))) for row in (first, second))
        return of, one, two

    def value(self, first: list[float], second: list[float], backend: str) -> float:
        of, one, two = self.rows(first, second)
        return float(measure_pair(one, two, of, backend=backend)[JS][0])

    def test_the_same_rows(self, backend: str) -> None:
        assert self.value([0.5, 0.2, 0.3], [0.5, 0.2, 0.3], backend) == 0.0

    def test_rows_without_a_common_patch(self, backend: str) -> None:
        assert self.value([0.6, 0.4, 0, 0], [0, 0, 0.1, 0.9], backend) == pytest.approx(math.log(2), abs=1e-15)

    def test_one_hot_and_uniform(self, backend: str) -> None:
        n = 5
        hot = (1 + 1 / n) / 2
        expected = (-math.log(hot) - math.log(n * hot) / n + (n - 1) / n * math.log(2)) / 2
        assert self.value([1.0, 0, 0, 0, 0], [0.2] * 5, backend) == pytest.approx(expected, abs=1e-15)

    def test_on_both_sides_of_where_the_series_ends(self, backend: str) -> None:
        """(½ ± a, ½ ∓ a) is ln 2 less the entropy of (½ + a, ½ − a); t = 2a."""
        for a in (0.001, 0.05, 0.1249, 0.125, 0.1251, 0.3, 0.499):
            expected = math.log(2) + (0.5 + a) * math.log(0.5 + a) + (0.5 - a) * math.log(0.5 - a)
            assert self.value([0.5 + a, 0.5 - a], [0.5 - a, 0.5 + a], backend) == pytest.approx(expected, abs=2e-16)

    def test_prefix_mass_changes_nothing(self, backend: str) -> None:
        one, two = random_rows(2, seed=1), random_rows(2, seed=2)
        shifted = 0.25 * two
        shifted[..., 0] += 0.75
        before, after = (measure_pair(one, other, OF, backend=backend)[JS] for other in (two, shifted))
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scipy_agrees(backend: str) -> None:
    distance = importlib.import_module("scipy.spatial.distance")
    case = CASES[1]
    heads = slice(None, None, 2)  # the middle head is the same in both, of which scipy's square root is NaN
    one = case.attention()
    one, two = one[:, heads], another(one)[:, heads]
    expected = distance.jensenshannon(case.layout.patches(one), case.layout.patches(two), axis=-1) ** 2
    got = measure_pair(one, two, case.layout, backend=backend, reduce="none")[JS]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


@cache
def expected_of(case: Case, dtype: str) -> Measurement:
    """The reference's answer, worked out once for all backends."""
    attention = case.attention()
    one, two = stored(attention, dtype), stored(another(attention), dtype)
    return measure_pair(one, two, case.layout, backend="reference", invalid="mask", reduce="none")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", FAST)
def test_agrees_with_the_reference(backend: str, case: Case, dtype: str) -> None:
    attention = case.attention()
    one, two = stored(attention, dtype), stored(another(attention), dtype)
    expected = expected_of(case, dtype)
    got = measure_pair(one, two, case.layout, backend=backend, invalid="mask", reduce="none")
    assert got.backend == backend
    assert got.from_reference == ()
    assert got.masked == expected.masked
    np.testing.assert_array_equal(np.asarray(got.undefined_rows[JS]), np.asarray(expected.undefined_rows[JS]))
    ours, theirs = np.asarray(got[JS]), np.asarray(expected[JS])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE[JS])
    least, greatest = METRICS[JS].bounds(case.layout)
    defined = ours[~np.isnan(ours)]
    assert ((defined >= least) & (defined <= greatest + TOLERANCE[JS])).all()


@pytest.mark.parametrize("backend", FAST)
def test_nearly_equal_rows_keep_their_digits(backend: str) -> None:
    """A relative change of 1e-3 gives about 1e-7 nat, which the entropies' difference would lose in float32."""
    one = CASES[0].attention().astype(np.float32)
    change = 1 + 1e-3 * np.random.default_rng(1).normal(size=one.shape)
    two = (one * change / (one * change).sum(axis=-1, keepdims=True)).astype(np.float32)
    got = measure_pair(one, two, CASES[0].layout, backend=backend)[JS]
    expected = measure_pair(one, two, CASES[0].layout, backend="reference")[JS]
    assert 1e-8 < expected.min() < expected.max() < 1e-6
    np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestUndefinedAndInvalid:
    def test_a_row_undefined_in_either_is_undefined(self, backend: str) -> None:
        one, two = random_rows(2, seed=1), random_rows(2, seed=2)
        for array, query in ((one, 3), (two, 5), (one, 8), (two, 8)):
            array[1, query] = np.eye(N)[0]  # wholly on the prefix
        got = measure_pair(one, two, OF, backend=backend)
        rows = measure_pair(one, two, OF, backend=backend, reduce="none")[JS]
        assert got.undefined == {JS: 3}
        assert got.undefined_rows[JS].tolist() == [0, 3]
        assert np.flatnonzero(np.isnan(rows[1])).tolist() == [2, 4, 7]
        assert got[JS][1] == pytest.approx(np.nanmean(rows[1]), abs=1e-15)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -0.25, 0.9])
    @pytest.mark.parametrize("place", ["attention", "other"])
    def test_the_message_says_which(self, backend: str, bad: float, place: str) -> None:
        one, two = random_rows(2, 3, seed=1), random_rows(2, 3, seed=2)
        (one if place == "attention" else two)[1, 2, 5, 3] = bad
        with pytest.raises(InvalidAttentionError, match=rf"^1 of 78 .* row {place}\[1, 2, 5, :\]"):
            measure_pair(one, two, OF, backend=backend)
        got = measure_pair(one, two, OF, backend=backend, invalid="mask", reduce="none")
        assert got.masked == 1
        assert got.undefined == {JS: 0}
        assert np.argwhere(np.isnan(got[JS])).tolist() == [[1, 2, 4]]

    def test_the_input_stays_as_it_was(self, backend: str) -> None:
        one, two = random_rows(seed=1), random_rows(seed=2)
        one[4] = 0.5
        copies = one.copy(), two.copy()
        assert measure_pair(one, two, OF, backend=backend, invalid="mask").masked == 1
        np.testing.assert_array_equal((one, two), copies)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("leading", [(), (3,), (1, 2, 3), (0, 3)])
def test_any_leading_axes_and_strides(backend: str, leading: tuple[int, ...]) -> None:
    one, two = random_rows(*leading, seed=1), random_rows(*leading, seed=2)
    expected = measure_pair(one, two, OF, backend=backend)[JS]
    assert expected.shape == leading
    turned = np.ascontiguousarray(two.swapaxes(-1, -2)).swapaxes(-1, -2)
    np.testing.assert_array_equal(measure_pair(one, turned, OF, backend=backend)[JS], expected)
    swapped = measure_pair(two, one, OF, backend=backend)[JS]
    np.testing.assert_allclose(swapped, expected, rtol=0, atol=1e-15)


def test_torch_in_torch_out() -> None:
    one, two = (torch.from_numpy(random_rows(2, 3, seed=seed)).half() for seed in (1, 2))
    for backend in CPU_BACKENDS:
        got = measure_pair(one, two, OF, backend=backend)[JS]
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got, measure_pair(one.numpy(), two.numpy(), OF, backend=backend)[JS])
    assert measure_pair(one, two, OF).backend == "numba"


class TestGradients:
    def test_of_either_condition(self) -> None:
        one, two = (torch.from_numpy(random_rows(1, seed=seed)) for seed in (1, 2))
        direction = torch.from_numpy(random_rows(1, seed=6) - random_rows(1, seed=7))
        for place in (0, 1):
            pair = [one.clone(), two.clone()]
            pair[place].requires_grad_()
            got = measure_pair(pair[0], pair[1], OF)
            assert got.backend == "torch"
            got[JS].sum().backward()
            gradient = pair[place].grad
            assert gradient is not None
            sides = []
            for step in (1e-6, -1e-6):
                moved = [one, two]
                moved[place] = moved[place] + step * direction
                sides.append(float(measure_pair(moved[0], moved[1], OF, backend="torch")[JS].sum()))
            assert float((gradient * direction).sum()) == pytest.approx((sides[0] - sides[1]) / 2e-6, rel=1e-4)

    def test_stays_finite_on_empty_patches(self) -> None:
        one = torch.from_numpy(random_rows(1))
        one[0, 3], one[0, 4] = torch.eye(N).double()[5], torch.eye(N).double()[0]
        one.requires_grad_()
        two = torch.from_numpy(random_rows(1, seed=2))
        two[0, 3] = torch.eye(N).double()[6]
        measure_pair(one, two, OF)[JS].sum().backward()
        assert one.grad is not None
        assert torch.isfinite(one.grad).all()

    @pytest.mark.parametrize("backend", ["numba", "reference"])
    def test_a_backend_without_gradient_refuses(self, backend: str) -> None:
        one = torch.from_numpy(random_rows(1))
        with pytest.raises(BackendUnavailableError, match="has no gradient"):
            measure_pair(one, one.clone().requires_grad_(), OF, backend=backend)


class TestRefusals:
    rows = random_rows(2, 3)

    def test_metrics(self) -> None:
        with pytest.raises(ValueError, match="'entropy' is of one attention, not of a pair; use measure_attention"):
            measure_pair(self.rows, self.rows, OF, ["entropy"])
        with pytest.raises(ValueError, match=r"'js_divergence' compares two conditions.* use measure_pair"):
            measure_attention(self.rows, OF, JS)
        with pytest.raises(ValueError, match="metrics is empty"):
            measure_pair(self.rows, self.rows, OF, [])

    def test_arrays(self) -> None:
        with pytest.raises(ValueError, match=r"attention has shape \(2, 3, 13, 13\) and other \(2, 2, 13, 13\)"):
            measure_pair(self.rows, self.rows[:, :2], OF)
        with pytest.raises(ValueError, match=r"other has shape \(2, 3, 12, 13\); expected \[..., 13, 13\]"):
            measure_pair(self.rows, self.rows[..., 1:, :], OF)
        with pytest.raises(TypeError, match="attention is NumPy float64 and other is NumPy float32"):
            measure_pair(self.rows, self.rows.astype(np.float32), OF)
        with pytest.raises(TypeError, match="attention is NumPy float64 and other is torch float64"):
            measure_pair(self.rows, torch.from_numpy(self.rows), OF)
        with pytest.raises(TypeError, match="other is a list"):
            measure_pair(self.rows, self.rows.tolist(), OF)
        with pytest.raises(ValueError, match="reduce is 'sum'"):
            measure_pair(self.rows, self.rows, OF, reduce="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_users_pair_metric_needs_a_reference_alone(backend: str) -> None:
    def total_variation(p: np.ndarray, other: np.ndarray, of: TokenLayout) -> np.ndarray:
        return np.asarray(np.abs(of.patches(p) - of.patches(other)).sum(axis=-1) / 2)

    spec = MetricSpec(name="total_variation", unit="1", inputs="pair", reference=total_variation)
    one, two = random_rows(2, 3, seed=1), random_rows(2, 3, seed=2)
    got = measure_pair(one, two, OF, [JS, spec], backend)
    expected = np.abs(OF.patches(one) - OF.patches(two)).sum(axis=-1).mean(axis=-1) / 2
    np.testing.assert_allclose(got["total_variation"], expected, rtol=0, atol=1e-15)
    assert got.from_reference == (() if backend == "reference" else ("total_variation",))
