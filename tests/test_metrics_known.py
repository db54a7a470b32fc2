"""Known values: closed forms, published figures, and esda as the live oracle of Moran's I and Geary's C."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np
import pytest

from kernels import METRICS, TokenLayout, measure_attention
from kernels.reference import received_map
from tests.cases import CASES, CPU_BACKENDS, TOLERANCE, layout, metrics_for

VIT_B16 = layout(14, 14, 1)


def from_rows(of: TokenLayout, rows: np.ndarray, prefix_mass: float = 0.0) -> np.ndarray:
    """Attention [1, query, key] in which every query has these patch rows ([patch] or [patch query, patch])."""
    attention = np.zeros((1, of.num_tokens, of.num_tokens))
    rows = rows / rows.sum(axis=-1, keepdims=True)
    of.patches(attention)[...] = (1 - prefix_mass) * rows
    of.prefix(attention)[...] = prefix_mass / max(of.num_prefix_tokens, 1)
    attention[0, : of.num_prefix_tokens] = 1.0 / of.num_tokens
    return attention


def value(attention: np.ndarray, of: TokenLayout, metric: str, backend: str, **options: Any) -> float:
    return float(measure_attention(attention, of, metric, backend, **options)[metric].reshape(-1)[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestUniform:
    attention = np.full((1, 197, 197), 1 / 197)

    def test_distance(self, backend: str) -> None:
        got = value(self.attention, VIT_B16, "distance", backend)
        assert got == pytest.approx(0.3677, abs=5e-5)
        assert got * VIT_B16.diagonal_px == pytest.approx(116.49, abs=5e-3)
        walmer = got * VIT_B16.diagonal_px / 16 / 13  # grid side 1 apart, divided by g − 1
        assert walmer == pytest.approx(0.5601, abs=5e-5)

    def test_entropy(self, backend: str) -> None:
        assert value(self.attention, VIT_B16, "entropy", backend) == pytest.approx(math.log(196), abs=1e-6)
        assert value(self.attention, VIT_B16, "entropy_normalized", backend) == pytest.approx(1.0, abs=1e-6)
        assert value(self.attention, VIT_B16, "cls_entropy", backend) == pytest.approx(math.log(196), abs=1e-6)

    def test_gini_and_prefix_mass(self, backend: str) -> None:
        assert value(self.attention, VIT_B16, "gini", backend) == pytest.approx(0.0, abs=1e-6)
        assert value(self.attention, VIT_B16, "prefix_mass", backend) == pytest.approx(1 / 197, abs=1e-7)

    def test_no_moran_on_constant_rows(self, backend: str) -> None:
        names = ["morans_i", "gearys_c", "morans_i_received", "cls_morans_i"]
        got = measure_attention(self.attention, VIT_B16, names, backend)
        assert all(np.isnan(got[name]).all() for name in names)
        assert got.undefined == {"morans_i": 196, "gearys_c": 196, "morans_i_received": 1, "cls_morans_i": 1}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestOneHot:
    def test_on_the_query_itself(self, backend: str) -> None:
        attention = from_rows(VIT_B16, np.eye(196))
        assert value(attention, VIT_B16, "distance", backend) == 0.0
        assert value(attention, VIT_B16, "entropy", backend) == pytest.approx(0.0, abs=1e-7)
        assert value(attention, VIT_B16, "gini", backend) == pytest.approx(195 / 196, abs=1e-6)

    def test_on_a_corner_of_oblong_patches(self, backend: str) -> None:
        """Rows 20 px high, columns 10 px wide: the query in the last row and column is 2·20 and 3·10 px away."""
        of = layout(3, 4, 0, height=20, width=10)
        attention = from_rows(of, np.eye(12)[0])
        got = measure_attention(attention, of, "distance", backend, reduce="none")["distance"][0]
        assert got[-1] == pytest.approx(math.hypot(40, 30) / math.hypot(60, 40), abs=1e-6)
        assert got[3] == pytest.approx(30 / math.hypot(60, 40), abs=1e-6)
        assert got[8] == pytest.approx(40 / math.hypot(60, 40), abs=1e-6)

    def test_morans_i_of_an_inner_patch(self, backend: str) -> None:
        """z is −1/N but for the one patch: N/S0 · 2·(4·z_hot·z + (edges − 4)·z²) / (z_hot² + (N−1)·z²)."""
        n, edges, z = 196, VIT_B16.num_edges, -1 / 196
        hot = 1 + z
        expected = n / edges * (4 * hot * z + (edges - 4) * z * z) / (hot * hot + (n - 1) * z * z)
        attention = from_rows(VIT_B16, np.eye(196)[7 * 14 + 7])
        assert value(attention, VIT_B16, "morans_i", backend) == pytest.approx(expected, abs=TOLERANCE["morans_i"])

    def test_all_mass_on_the_prefix(self, backend: str) -> None:
        attention = np.zeros((1, 197, 197))
        attention[..., 0] = 1.0
        of_whole_rows = ["prefix_mass", "distance_px", "distance_seed1", "entropy_seed1", "morans_i_seed1"]
        names = [name for name in metrics_for(VIT_B16) if name not in of_whole_rows]
        regions = np.ones((1, 196))
        got = measure_attention(attention, VIT_B16, names, backend, regions=regions)
        assert all(np.isnan(got[name]).all() for name in names)
        assert got.undefined["entropy"] == got.undefined["distance"] == 196
        not_renormalised = measure_attention(attention, VIT_B16, of_whole_rows, backend)
        assert [float(not_renormalised[name][0]) for name in of_whole_rows] == [1, 0, 0, 0, 0]
        assert not any(not_renormalised.undefined.values())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestFields:
    def test_checkerboard(self, backend: str) -> None:
        board = 1.0 + np.indices((14, 14)).sum(axis=0).ravel() % 2
        attention = from_rows(VIT_B16, board)
        assert value(attention, VIT_B16, "morans_i", backend) == pytest.approx(-1.0, abs=1e-6)
        assert value(attention, VIT_B16, "morans_i_received", backend) == pytest.approx(-1.0, abs=1e-6)

    def test_sine_cosine_field(self, backend: str) -> None:
        i, j = np.indices((14, 14))
        field = np.sin(i / 2) * np.cos(j / 3) + 0.01 * ((7 * i + 13 * j) % 11)
        attention = from_rows(VIT_B16, (field - field.min() + 0.1).ravel())  # both are free of shift and scale
        assert value(attention, VIT_B16, "morans_i", backend) == pytest.approx(0.935882019404389, abs=1e-12)
        assert value(attention, VIT_B16, "morans_i_received", backend) == pytest.approx(0.935882019404389, abs=1e-12)
        assert value(attention, VIT_B16, "gearys_c", backend) == pytest.approx(0.0974042918170021, abs=1e-12)

    def test_row_gradient(self, backend: str) -> None:
        """z = r − mean: Σ over edges z z / Σ z² of a ramp down the rows, worked out row by row."""
        rows = np.indices((14, 14))[0].ravel().astype(np.float64)
        z = np.arange(14) - 6.5
        cross = 14 * (z[:-1] * z[1:]).sum() + 13 * (z * z).sum()
        expected = 196 / VIT_B16.num_edges * cross / (14 * (z * z).sum())
        attention = from_rows(VIT_B16, rows + 1)
        assert value(attention, VIT_B16, "morans_i", backend) == pytest.approx(expected, abs=1e-12)

    def test_transposed_grids_differ(self, backend: str) -> None:
        """Stripes one row high on 7×11 are no stripes on 11×7: rows and columns may not be exchanged."""
        stripes = 1.0 + np.indices((7, 11))[0].ravel() % 2
        upright, lying = layout(7, 11, 0), layout(11, 7, 0)
        assert value(from_rows(upright, stripes), upright, "morans_i", backend) == pytest.approx(
            77 / upright.num_edges * _stripe_ratio(), abs=1e-12
        )
        assert value(from_rows(lying, stripes), lying, "morans_i", backend) != pytest.approx(
            value(from_rows(upright, stripes), upright, "morans_i", backend), abs=0.1
        )


def _stripe_ratio() -> float:
    """Σ over edges z z / Σ z² of 7 stripes, 11 long, four of 1 and three of 2."""
    z = np.array([1, 2, 1, 2, 1, 2, 1]) - 10 / 7
    return float((11 * (z[:-1] * z[1:]).sum() + 10 * (z * z).sum()) / (11 * (z * z).sum()))


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[3]], ids=str)
def test_esda_agrees(case: Any) -> None:
    """Rook contiguity, binary weights, as esda computes them on libpysal's lattice."""
    esda = importlib.import_module("esda")
    libpysal = importlib.import_module("libpysal")
    weights = libpysal.weights.lat2W(case.layout.grid_rows, case.layout.grid_cols, rook=True)
    attention = case.attention()[:1, :2]
    patches = case.layout.patches(attention)
    names = ["morans_i", "gearys_c", "morans_i_received"]
    got = measure_attention(attention, case.layout, names, "reference", reduce="none")
    for head in range(2):
        for query in (0, case.layout.num_patches // 2, case.layout.num_patches - 1):
            row = patches[0, head, query]
            moran = esda.Moran(row, weights, transformation="B", permutations=0).I
            geary = esda.Geary(row, weights, transformation="B", permutations=0).C
            assert got["morans_i"][0, head, query] == pytest.approx(moran, abs=1e-12)
            assert got["gearys_c"][0, head, query] == pytest.approx(geary, abs=1e-12)
        received = received_map(attention[0, head : head + 1], case.layout)[0]
        moran = esda.Moran(received, weights, transformation="B", permutations=0).I
        assert got["morans_i_received"][0, head] == pytest.approx(moran, abs=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_entropy_agrees_with_scipy(backend: str) -> None:
    stats = importlib.import_module("scipy.stats")
    case = CASES[1]
    attention = case.attention()
    expected = stats.entropy(case.layout.patches(attention), axis=-1).mean(axis=-1)
    got = measure_attention(attention, case.layout, "entropy", backend)["entropy"]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestRegionMass:
    def test_class_token_row_is_renormalised(self, backend: str) -> None:
        """The class token gives itself .5 and patches 0 and 1 .3 and .2: .6 and .4 of the patches' share."""
        of = layout(2, 2, 1)
        attention = np.full((1, 1, 5, 5), 0.2)
        attention[0, 0, 0] = [0.5, 0.3, 0.2, 0.0, 0.0]
        regions = np.array([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 1]]])
        got = measure_attention(attention, of, "region_mass", backend, regions=regions)["region_mass"]
        np.testing.assert_allclose(got, [[[0.6, 0.5, 0.0]]], rtol=0, atol=1e-7)

    def test_without_class_token_it_is_the_mean_patch_query(self, backend: str) -> None:
        of = TokenLayout(
            grid_rows=1,
            grid_cols=2,
            num_prefix_tokens=1,
            patch_height_px=8,
            patch_width_px=8,
            class_token=False,
        )
        attention = np.array([[[[0.0, 0.5, 0.5], [0.5, 0.4, 0.1], [0.0, 0.3, 0.7]]]])
        got = measure_attention(attention, of, "region_mass", backend, regions=np.array([[[1.0, 0.0]]]))
        np.testing.assert_allclose(got["region_mass"], [[[(0.8 + 0.3) / 2]]], rtol=0, atol=1e-7)

    def test_each_image_has_its_own_regions(self, backend: str) -> None:
        of = layout(2, 2, 1)
        attention = np.full((2, 3, 5, 5), 0.2)
        attention[:, :, 0] = [0.2, 0.8, 0.0, 0.0, 0.0]
        regions = np.zeros((2, 1, 4))
        regions[0, 0, 0] = regions[1, 0, 3] = 1.0
        got = measure_attention(attention, of, "region_mass", backend, regions=regions)["region_mass"]
        np.testing.assert_allclose(got[..., 0], [[1, 1, 1], [0, 0, 0]], rtol=0, atol=1e-7)

    def test_a_region_an_image_lacks_has_no_value(self, backend: str) -> None:
        of = layout(2, 2, 1)
        attention = np.full((1, 2, 5, 5), 0.2)
        regions = np.array([[[1.0, 0, 0, 0], [np.nan] * 4]])
        got = measure_attention(attention, of, "region_mass", backend, regions=regions)
        assert got["region_mass"][..., 0] == pytest.approx(np.full((1, 2), 0.25), abs=1e-7)
        assert np.isnan(got["region_mass"][..., 1]).all()
        assert got.undefined["region_mass"] == 2


@pytest.mark.parametrize("backend", CPU_BACKENDS)
class TestSinkShare:
    def test_uniform_attention_and_one_patch_are_its_bounds(self, backend: str) -> None:
        bounds = METRICS["sink_share"].bounds(VIT_B16)
        even, one = np.ones(196), np.eye(196)[17]
        assert value(from_rows(VIT_B16, even, 0.4), VIT_B16, "sink_share", backend) == pytest.approx(1 / 196, abs=1e-9)
        assert value(from_rows(VIT_B16, one, 0.4), VIT_B16, "sink_share", backend) == pytest.approx(1.0, abs=1e-9)
        assert bounds == (1 / 196, 1.0)

    def test_it_is_the_share_of_all_queries_that_one_patch_receives(self, backend: str) -> None:
        """Every query on itself: no row is even, but each patch receives 1/N."""
        attention = from_rows(VIT_B16, np.eye(196))
        assert value(attention, VIT_B16, "sink_share", backend) == pytest.approx(1 / 196, abs=1e-9)

    def test_it_is_of_rows_renormalised_and_leaves_undefined_ones_out(self, backend: str) -> None:
        """Patch 0 receives .6, .1, nothing that counts and .5 of four queries: the third has no mass on the patches."""
        of = layout(2, 2, 1)
        attention = np.full((2, 5, 5), 0.2)
        attention[0, 1] = [0.5, 0.3, 0.2, 0.0, 0.0]
        attention[0, 2] = [0.0, 0.1, 0.3, 0.3, 0.3]
        attention[0, 3] = [1.0, 0.0, 0.0, 0.0, 0.0]
        attention[0, 4] = [0.8, 0.1, 0.0, 0.0, 0.1]
        attention[1, 1:] = [1.0, 0.0, 0.0, 0.0, 0.0]
        got = measure_attention(attention, of, "sink_share", backend)
        assert got["sink_share"][0] == pytest.approx((0.6 + 0.1 + 0.5) / 3, abs=1e-9)
        assert np.isnan(got["sink_share"][1])
        assert got.undefined_rows["sink_share"].tolist() == [0, 1]

    def test_numpy_agrees(self, backend: str) -> None:
        of, attention = CASES[5].layout, CASES[5].attention()
        patches = attention[..., 5:, 5:]
        received = (patches / patches.sum(axis=-1, keepdims=True)).mean(axis=-2)
        got = measure_attention(attention, of, "sink_share", backend)["sink_share"]
        np.testing.assert_allclose(got, received.max(axis=-1), rtol=0, atol=1e-12)


def test_bounds_of_morans_i_are_not_minus_one_and_one() -> None:
    least, greatest = METRICS["morans_i"].bounds(VIT_B16)
    assert least == pytest.approx(-1.053, abs=5e-4)
    assert greatest == pytest.approx(1.019, abs=5e-4)
    assert METRICS["morans_i"].bounds(layout(1, 2, 0)) == pytest.approx((-1.0, -1.0))  # two patches: z = ±a


@pytest.mark.parametrize("of", [VIT_B16, layout(7, 11, 0), layout(1, 13, 2)], ids=str)
@pytest.mark.parametrize("metric", ["morans_i", "gearys_c"])
def test_bounds_are_reached(of: TokenLayout, metric: str) -> None:
    """A row along the extreme eigenvector takes the extreme value."""
    n = of.num_patches
    index = np.arange(n).reshape(of.grid_rows, of.grid_cols)
    weights = np.zeros((n, n))
    for a, b in ((index[:-1], index[1:]), (index[:, :-1], index[:, 1:])):
        weights[a.ravel(), b.ravel()] = weights[b.ravel(), a.ravel()] = 1.0
    matrix = weights if metric == "morans_i" else np.diag(weights.sum(axis=1)) - weights
    centre = np.eye(n) - 1 / n
    vectors = np.linalg.eigh(centre @ matrix @ centre)[1]
    varying = vectors[:, np.ptp(vectors, axis=0) > 1e-6]
    got = [value(from_rows(of, 1 + v / np.abs(v).max() / 2), of, metric, "reference") for v in varying.T]
    assert (min(got), max(got)) == pytest.approx(METRICS[metric].bounds(of), abs=1e-9)
