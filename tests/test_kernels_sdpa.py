"""The `sdpa` backend on the CPU: refusals, shapes, prefix mass at both ends. See also test_gpu_backends.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import BackendUnavailableError, measure_attention, measure_qk, resolve
from tests.cases import FROM_QK, layout, vit_qk

OF = layout(3, 4, 1)
N = OF.num_tokens
NAMES = ("entropy", "entropy_normalized", "prefix_mass", "cls_entropy")


def test_it_is_never_chosen() -> None:
    chosen = {resolve("auto", device, gradient).name for device in ("cpu", "cuda") for gradient in (False, True)}
    assert chosen <= {"numba", "torch", "triton"}


def test_what_it_does_not_measure() -> None:
    attention = np.full((1, N, N), 1 / N)
    query = np.zeros((1, N, 4), np.float32)
    with pytest.raises(BackendUnavailableError, match="'sdpa' measures query and key, not stored attention"):
        measure_attention(attention, OF, "entropy", "sdpa")
    with pytest.raises(BackendUnavailableError, match="'sdpa' measures query and key without a bias"):
        measure_qk(query, query, OF, "entropy", bias=np.zeros((N, N), np.float32), backend="sdpa")
    with pytest.raises(BackendUnavailableError, match="'sdpa' has no gradient"):
        measure_qk(torch.zeros(1, N, 4, requires_grad=True), torch.zeros(1, N, 4), OF, "entropy", backend="sdpa")


def test_other_metrics_come_from_the_reference_and_are_named() -> None:
    query, key = vit_qk(OF, 8, np.random.default_rng(0))
    got = measure_qk(query, key, OF, ["distance", "entropy"], backend="sdpa")
    assert isinstance(got["entropy"], np.ndarray)
    assert got.from_reference == ("distance",)


@pytest.mark.parametrize("leading", [(), (3,), (1, 2, 3), (0, 3), (3, 0), (2, 0, 3)])
def test_any_leading_axes(leading: tuple[int, ...]) -> None:
    query = np.zeros((*leading, N, 4), np.float32)
    query.flags.writeable = False
    got = measure_qk(query, query, OF, NAMES, backend="sdpa")
    for name, value in {"entropy": np.log(12), "prefix_mass": 1 / 13, "cls_entropy": np.log(12)}.items():
        assert got[name].shape == leading
        np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sink", [-60.0, -12.0, 12.0, 60.0])
def test_prefix_mass_next_to_nothing_and_next_to_all(sink: float) -> None:
    """To a relative error of 1e-4, logits of that size being rounded; the entropy is what it is without the sink."""
    of = layout(7, 6, 2)
    query, key = vit_qk(of, 16, np.random.default_rng(8))
    query[..., 0], key[..., 0] = 4.0, 0.0
    key[:, :, : of.num_prefix_tokens, 0] = sink
    got = measure_qk(query, key, of, NAMES, backend="sdpa", reduce="none")
    expected = measure_qk(query, key, of, NAMES, backend="reference", reduce="none")
    np.testing.assert_allclose(got["prefix_mass"], expected["prefix_mass"], rtol=1e-4, atol=0)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=FROM_QK[name])
