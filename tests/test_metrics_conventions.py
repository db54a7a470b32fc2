"""The conventions of published codes: closed forms, their conversions, and what sets them apart from the defaults."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kernels import METRICS, TokenLayout, measure_attention
from tests.cases import CASES, CPU_BACKENDS, TOLERANCE, layout, metrics_for

VIT_B16 = layout(14, 14, 1)
NO_PREFIX = layout(14, 14, 0)
CONVENTIONS = ("distance_px", "distance_walmer", "distance_seed1", "entropy_seed1", "morans_i_seed1")


def with_prefix_mass(of: TokenLayout, mass: np.ndarray) -> np.ndarray:
    """Attention [1, query, key]: each patch query puts `mass` on the first token, the rest evenly on the patches."""
    attention = np.full((1, of.num_tokens, of.num_tokens), 1 / of.num_tokens)
    of.patches(attention)[...] = (1 - mass[:, np.newaxis]) / of.num_patches
    of.prefix(attention)[...] = 0.0
    of.prefix(attention)[..., 0] = mass
    return attention


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestUniform:
    def test_without_a_prefix(self, backend: str) -> None:
        """The published figures of uniform attention on 14×14 patches of 16 px."""
        attention = np.full((1, 196, 196), 1 / 196)
        got = measure_attention(attention, NO_PREFIX, CONVENTIONS, backend)
        assert got["distance_px"][0] == pytest.approx(116.49, abs=5e-3)
        assert got["distance_walmer"][0] == pytest.approx(0.5601, abs=5e-5)
        assert got["distance_seed1"][0] == pytest.approx(0.3677, abs=5e-5)
        assert got["entropy_seed1"][0] == pytest.approx(-math.log(1 / 196 + 1e-12), abs=1e-9)
        assert got["morans_i_seed1"][0] == 0.0
        assert not any(got.undefined.values())

    @pytest.mark.parametrize("mass", [0.059, 0.75])
    def test_prefix_mass_shortens_what_is_not_renormalised(self, backend: str, mass: float) -> None:
        """Mass s on the patches: px and seed1 distance shrink by s, the entropy is s ln(N/s), Walmer's stays."""
        attention = with_prefix_mass(VIT_B16, np.full(196, mass))
        got = measure_attention(attention, VIT_B16, [*CONVENTIONS, "distance"], backend)
        share = 1 - mass
        assert got["distance_px"][0] == pytest.approx(share * 116.4914, abs=1e-3)
        assert got["distance_seed1"][0] == pytest.approx(share * got["distance"][0], abs=1e-12)
        assert got["distance_walmer"][0] == pytest.approx(0.5601, abs=5e-5)
        assert got["entropy_seed1"][0] == pytest.approx(share * math.log(196 / share), abs=1e-8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestConversions:
    def test_square_grids(self, backend: str) -> None:
        """px = 16·(g − 1)·Walmer without mass on the prefix, and seed1 is px over √2·g·16."""
        case = CASES[0]
        attention = case.attention().copy()
        case.layout.patches(attention)[...] /= case.layout.patches(attention).sum(axis=-1, keepdims=True)
        case.layout.prefix(attention)[...] = 0.0
        got = measure_attention(attention, case.layout, CONVENTIONS, backend)
        np.testing.assert_allclose(got["distance_px"], 16 * 13 * got["distance_walmer"], rtol=1e-12)
        np.testing.assert_allclose(got["distance_px"], 16 * 14 * math.sqrt(2) * got["distance_seed1"], rtol=1e-12)

    @pytest.mark.parametrize(
        ("of", "side"),
        [
            (layout(3, 5, 0), 4 * 16),  # the grid is 5 long: first and last column are 1 apart
            (layout(5, 3, 0), 4 * 16),
            (layout(3, 5, 0, height=40, width=10), 2 * 40),  # tall patches make the rows the longer side
            (layout(1, 13, 2), 12 * 16),
            (layout(2, 1, 1), 16),
        ],
        ids=str,
    )
    def test_walmers_side_is_the_longer_one(self, backend: str, of: TokenLayout, side: float) -> None:
        attention = np.zeros((1, of.num_tokens, of.num_tokens))
        attention[..., -1] = 1.0  # every query on the last patch
        got = measure_attention(attention, of, ["distance_walmer", "distance_px"], backend, reduce="none")
        np.testing.assert_allclose(got["distance_walmer"], got["distance_px"] / side, rtol=1e-12)
        down, across = of.grid_rows - 1, of.grid_cols - 1
        first = math.hypot(down * of.patch_height_px, across * of.patch_width_px)
        assert got["distance_px"][0, 0] == pytest.approx(first, abs=1e-9)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestSeed1:
    def test_morans_i_is_that_of_the_prefix_mass(self, backend: str) -> None:
        """A checkerboard of prefix mass gives −1 although every renormalised row is uniform."""
        board = np.indices((14, 14)).sum(axis=0).ravel() % 2
        attention = with_prefix_mass(VIT_B16, 0.2 + 0.1 * board)
        got = measure_attention(attention, VIT_B16, ["morans_i_seed1", "morans_i_received"], backend)
        assert got["morans_i_seed1"][0] == pytest.approx(-1.0, abs=1e-12)
        assert np.isnan(got["morans_i_received"][0])

    def test_morans_i_of_a_known_field(self, backend: str) -> None:
        i, j = np.indices((14, 14))
        field = (np.sin(i / 2) * np.cos(j / 3) + 0.01 * ((7 * i + 13 * j) % 11)).ravel()
        attention = with_prefix_mass(VIT_B16, 0.5 + 0.2 * field)
        got = measure_attention(attention, VIT_B16, "morans_i_seed1", backend)["morans_i_seed1"]
        assert got[0] == pytest.approx(0.935882019404389, abs=1e-12)

    @pytest.mark.parametrize(("sum_sq", "expected"), [(0.99e-8, 0.0), (1.01e-8, -1.0)])
    def test_morans_i_is_zero_below_its_threshold(self, backend: str, sum_sq: float, expected: float) -> None:
        """±a on a checkerboard: x = (1 − mass)/N, so Σ z² = a²/N."""
        sign = 2.0 * (np.indices((14, 14)).sum(axis=0).ravel() % 2) - 1.0
        attention = with_prefix_mass(VIT_B16, 0.3 + math.sqrt(196 * sum_sq) * sign)
        got = measure_attention(attention, VIT_B16, "morans_i_seed1", backend)["morans_i_seed1"]
        assert got[0] == pytest.approx(expected, abs=1e-9)

    def test_an_invalid_patch_query_leaves_no_map(self, backend: str) -> None:
        attention = np.stack([with_prefix_mass(VIT_B16, np.linspace(0.1, 0.4, 196))[0]] * 2)
        attention[0, 7] = np.nan
        got = measure_attention(attention, VIT_B16, "morans_i_seed1", backend, "mask")
        assert np.isnan(got["morans_i_seed1"]).tolist() == [True, False]
        assert got.undefined["morans_i_seed1"] == 1

    def test_one_hot_rows_have_no_entropy(self, backend: str) -> None:
        """−1·ln(1 + 1e-12): the offset takes it 1e-12 below 0, and the bounds say so."""
        attention = np.eye(196)[np.newaxis]
        got = measure_attention(attention, NO_PREFIX, "entropy_seed1", backend)["entropy_seed1"]
        assert got[0] == pytest.approx(-math.log1p(1e-12), abs=1e-15)
        assert METRICS["entropy_seed1"].bounds(NO_PREFIX)[0] == -math.log1p(1e-12)


def test_bounds_of_the_unnormalised_entropy_are_reached() -> None:
    """s ln(N/s) is greatest at s = 1, but on two patches at s = 2/e."""
    for of, mass in ((layout(1, 2, 1), 1 - 2 / math.e), (layout(1, 3, 1), 0.0)):
        attention = with_prefix_mass(of, np.full(of.num_patches, mass))
        got = measure_attention(attention, of, "entropy_seed1", "reference")["entropy_seed1"]
        assert got[0] == pytest.approx(METRICS["entropy_seed1"].bounds(of)[1], abs=1e-9)


def test_nothing_built_in_is_computed_from_the_reference() -> None:
    for backend in ("numba", "torch"):
        case = CASES[0]
        got = measure_attention(
            case.attention()[:1, :1], case.layout, metrics_for(case.layout), backend, regions=case.regions()[:1]
        )
        assert got.from_reference == ()


def test_every_metric_has_a_tolerance() -> None:
    assert list(TOLERANCE) == list(METRICS)
