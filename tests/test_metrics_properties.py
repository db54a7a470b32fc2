"""What must hold of every metric on any attention: bounds, symmetries, and no wrong number on hostile input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import METRICS, InvalidAttentionError, TokenLayout, measure_attention, measure_pair
from tests.cases import CASES, CPU_BACKENDS, TOLERANCE, Case, layout, metrics_for, rounded

UNLIMITED = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_values_lie_within_the_declared_bounds(backend: str, case: Case) -> None:
    attention, regions = case.attention(), case.regions()
    got = measure_attention(attention, case.layout, metrics_for(case.layout), backend, "raise", "none", regions)
    for name, values in got.items():
        least, greatest = METRICS[name].bounds(case.layout)
        defined = values[~np.isnan(values)]
        assert defined.size, name
        assert defined.min() >= least - TOLERANCE[name], name
        assert defined.max() <= greatest + TOLERANCE[name], name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_prefix_mass_changes_nothing_else(backend: str) -> None:
    """Renormalised metrics see patches alone: more mass on the prefix must not pass for shorter distance."""
    of = layout(7, 11, 1)
    attention = CASES[0].make(of, np.random.default_rng(0))
    shifted = 0.25 * attention
    shifted[..., 0] += 0.75
    names = ["distance", "entropy", "morans_i", "gearys_c", "gini", "cls_entropy", "cls_morans_i"]
    names += ["morans_i_received", "sink_share"]
    before = measure_attention(attention, of, [*names, "prefix_mass"], backend)
    after = measure_attention(shifted, of, [*names, "prefix_mass"], backend)
    for name in names:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(after["prefix_mass"], 0.75 + 0.25 * before["prefix_mass"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("flip", ["rows", "cols"])
def test_mirrored_images_measure_alike(backend: str, flip: str) -> None:
    of = layout(5, 8, 2)
    attention = CASES[0].make(of, np.random.default_rng(1))
    order = np.arange(of.num_patches).reshape(5, 8)
    order = (order[::-1] if flip == "rows" else order[:, ::-1]).ravel()
    tokens = np.concatenate((np.arange(2), 2 + order))
    mirrored = attention[..., tokens, :][..., tokens]
    names = [name for name in metrics_for(of) if name != "region_mass"]
    here, there = (measure_attention(a, of, names, backend) for a in (attention, mirrored))
    for name in names:
        np.testing.assert_allclose(there[name], here[name], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equal_rows_are_their_own_received_map(backend: str) -> None:
    of = layout(6, 7, 1)
    row = np.random.default_rng(2).dirichlet(np.ones(of.num_tokens))
    attention = np.broadcast_to(row, (1, of.num_tokens, of.num_tokens))
    got = measure_attention(attention, of, ["morans_i", "morans_i_received", "cls_morans_i"], backend)
    assert got["morans_i_received"] == pytest.approx(got["morans_i"], abs=1e-12)
    assert got["cls_morans_i"] == pytest.approx(got["morans_i"], abs=1e-12)


def test_morans_i_of_noise_has_its_expectation() -> None:
    """Under no association E[I] = −1/(N−1), not 0; the mean of 2 × 10⁴ rows tells the two apart by 12 errors."""
    of = layout(14, 14, 0)
    rows = np.random.default_rng(3).dirichlet(np.ones(196), size=(102, 196))
    got = measure_attention(rows, of, "morans_i", reduce="none")["morans_i"]
    error = got.std() / np.sqrt(got.size)
    assert abs(got.mean() + 1 / 195) < 4 * error
    assert 10 * error < 1 / 195


@st.composite
def hostile(draw: st.DrawFn) -> tuple[TokenLayout, str, np.ndarray]:
    """A small map in some dtype, some of whose rows have been tampered with."""
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    if rows * cols < 2:
        cols = 2
    of = layout(rows, cols, draw(st.sampled_from([0, 1, 2, 5])), draw(st.integers(1, 32)), draw(st.integers(1, 32)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    maps = draw(st.integers(0, 3))
    spread = draw(st.sampled_from([0.0, 1e-6, 5e-4, 0.1, 3.0, 40.0, 200.0]))
    logits = spread * rng.normal(size=(maps, of.num_tokens, of.num_tokens))
    attention = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=0.0))
    attention /= attention.sum(axis=-1, keepdims=True) + (attention.sum(axis=-1, keepdims=True) == 0)
    hostile_values = [np.nan, np.inf, -np.inf, -1e-3, -1e-30, 2.0, 1e-30, 0.0, -0.0, 1e-42]
    for _ in range(draw(st.integers(0, 4)) if maps else 0):
        where = tuple(draw(st.integers(0, size - 1)) for size in attention.shape)
        attention[where] = draw(st.sampled_from(hostile_values))
    return of, draw(st.sampled_from(["float16", "float32", "float64"])), attention


@UNLIMITED
@given(hostile(), st.sampled_from([name for name in CPU_BACKENDS if name != "reference"]))
def test_an_error_or_the_references_answer(made: tuple[TokenLayout, str, np.ndarray], backend: str) -> None:
    of, dtype, attention = made
    with np.errstate(over="ignore"):
        stored: Any = rounded(attention, dtype).astype(dtype)
    names = [name for name in metrics_for(of) if name != "region_mass"]
    expected = measure_attention(stored, of, names, "reference", "mask")
    got = measure_attention(stored, of, names, backend, "mask")
    assert got.masked == expected.masked
    assert got.undefined == expected.undefined
    for name in names:
        np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(expected[name]), err_msg=name)
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=TOLERANCE[name], err_msg=name)
    if expected.masked:
        with pytest.raises(InvalidAttentionError, match="attention rows are invalid"):
            measure_attention(stored, of, names, backend)
    else:
        raised = measure_attention(stored, of, names, backend)
        for name in names:
            np.testing.assert_array_equal(raised[name], got[name])


@UNLIMITED
@given(hostile(), st.integers(0, 2**32 - 1), st.sampled_from([name for name in CPU_BACKENDS if name != "reference"]))
def test_a_pair_gives_an_error_or_the_references_answer(
    made: tuple[TokenLayout, str, np.ndarray], seed: int, backend: str
) -> None:
    of, dtype, attention = made
    noise = np.random.default_rng(seed).uniform(0.5, 2.0, size=attention.shape)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        changed = attention * noise
        changed /= changed.sum(axis=-1, keepdims=True)
        one: Any = rounded(attention, dtype).astype(dtype)
        two: Any = rounded(changed, dtype).astype(dtype)
    expected = measure_pair(one, two, of, backend="reference", invalid="mask", reduce="none")
    got = measure_pair(one, two, of, backend=backend, invalid="mask", reduce="none")
    assert got.masked == expected.masked
    assert got.undefined == expected.undefined
    np.testing.assert_allclose(
        got["js_divergence"], expected["js_divergence"], rtol=0, atol=TOLERANCE["js_divergence"], equal_nan=True
    )
    if expected.masked:
        with pytest.raises(InvalidAttentionError, match="attention rows are invalid"):
            measure_pair(one, two, of, backend=backend)
