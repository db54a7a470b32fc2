"""The torch backend under torch.compile: one graph, the same values, the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kernels import METRICS, measure_attention
from kernels.inputs import Factors, Maps
from kernels.torch_ops import BACKEND
from tests.cases import TOLERANCE, layout, metrics_for, trained, vit_qk

OF = layout(5, 6, 2)
NAMES = [name for name in metrics_for(OF) if METRICS[name].inputs == "rows"]
SPECS = [METRICS[name] for name in NAMES]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Any) -> Any:
    """Traced and differentiated as by the default backend, but with no C++ to wait for; a break would be an error."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)


def test_stored_maps() -> None:
    attention = torch.from_numpy(trained(OF, np.random.default_rng(0))).half()

    def measure(maps: torch.Tensor) -> tuple[dict[str, Any], Any]:
        result = BACKEND.measure_attention(Maps(maps, OF, None, "float16"), SPECS)
        return result.values, result.valid

    got, valid = compiled(measure)(attention)
    expected, _ = measure(attention)
    assert bool(valid.all())
    for name in NAMES:
        worst = (got[name] - expected[name]).abs().max().item()
        assert worst <= TOLERANCE[name], name


def test_query_and_key() -> None:
    query, key = (torch.from_numpy(factor) for factor in vit_qk(OF, 16, np.random.default_rng(1)))

    def measure(q: torch.Tensor, k: torch.Tensor) -> dict[str, Any]:
        return BACKEND.measure_qk(Factors(q, k, OF, None, 0.25, None), SPECS).values

    got, expected = compiled(measure)(query, key), measure(query, key)
    for name in NAMES:
        assert (got[name] - expected[name]).abs().max().item() <= TOLERANCE[name], name


def test_gradients() -> None:
    attention = torch.from_numpy(trained(OF, np.random.default_rng(2)))[:1]
    core = [METRICS[name] for name in ("distance", "entropy", "morans_i")]

    def loss(maps: torch.Tensor) -> torch.Tensor:
        values = BACKEND.measure_attention(Maps(maps, OF, None, "float32"), core).values
        return torch.stack([values[spec.name].mean() for spec in core]).sum()

    gradients = []
    for function in (loss, compiled(loss)):
        maps = attention.clone().requires_grad_()
        function(maps).backward()
        gradients.append(maps.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)


def test_the_public_function_may_be_compiled_too() -> None:
    """With breaks where it checks its input: what is wrong with it is still said."""
    attention = torch.from_numpy(trained(OF, np.random.default_rng(3))).float()
    names = ["distance", "entropy"]
    measure = torch.compile(lambda maps: dict(measure_attention(maps, OF, names, "torch")), backend="aot_eager")
    got, expected = measure(attention), measure_attention(attention, OF, names, "torch")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=TOLERANCE[name])
    with pytest.raises(ValueError, match="attention rows are invalid"):
        measure(2 * attention)


def test_nothing_comes_from_the_host_in_a_compiled_graph() -> None:
    """On a GPU it would wait for that in every call, and could not be recorded as a CUDA graph."""
    made: list[str] = []

    def backend(graph: torch.fx.GraphModule, given: Any) -> Any:
        for node in graph.graph.nodes:
            made.append(str(getattr(node.target, "__name__", node.target)))
        return graph.forward

    def measure(maps: torch.Tensor) -> dict[str, Any]:
        return BACKEND.measure_attention(Maps(maps, OF, None, "float16"), [METRICS["distance"]]).values

    attention = torch.from_numpy(trained(OF, np.random.default_rng(0))).half()
    got = torch.compile(measure, backend=backend, fullgraph=True)(attention)
    assert torch.equal(got["distance"], measure(attention)["distance"])
    assert "mul" in made
    assert not {"as_tensor", "tensor", "from_numpy", "to", "cuda", "wrapped_hypot"} & set(made), made
