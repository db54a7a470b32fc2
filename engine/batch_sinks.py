"""What one batch's forward pass hands over: measured on the spot, passed on to the store's writer, or both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine.capture import AttentionSite, AttentionTap, attention_map, evaluating
from engine.transfer import HostCopies, HostCopy
from kernels import MetricSpec, TokenLayout, measure_qk
from store import Factors, FactorSchema, StoreSchema
from store.encodings import factor_schema

__all__ = ["BatchSinks", "discover_factors", "one_bias", "stack_layers"]

_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


class BatchSinks:
    """Takes what one batch's forward pass hands over: measures it on the spot, and passes it on to the writer.

    Nothing is waited for while the model runs: values go to the host by `HostCopies`, and a layer is passed on to the
    writer when as many others as may be on their way have followed it.

    Args:
        schema: of the store; without an encoding no attention is passed on.
        metrics: to measure; none when maps are only stored.
        backend: that measures.
        regions: layout -> coverage [image, region, patch] of this batch's images, or None.
        add_attention: called with each layer and its maps or `Factors`.
        copies: to the host, from the device the model runs on.
    """

    def __init__(
        self,
        schema: StoreSchema,
        metrics: Sequence[MetricSpec],
        backend: str,
        regions: Mapping[TokenLayout, np.ndarray | None],
        add_attention: Callable[[int, Any], None],
        copies: HostCopies,
    ) -> None:
        self._encoding = schema.encoding
        self._metrics = metrics
        self._backend = backend
        self._regions = regions
        self._layers = {layer.layer: layer for layer in schema.layers}
        self._add_attention = add_attention
        self._copies = copies
        self._arriving: deque[tuple[int, Callable[[], Any]]] = deque()
        self._prefix_mass: dict[int, torch.Tensor] = {}
        self._measured: list[dict[str, tuple[HostCopy, HostCopy]]] = []  # a layer: name -> values, undefined rows

    def __call__(
        self, site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        if self._metrics:
            regions = self._regions[site.layout]
            measured = measure_qk(
                query,
                key,
                site.layout,
                metrics=self._metrics,
                scale=scale,
                bias=bias,
                backend=self._backend,
                regions=None if regions is None else torch.from_numpy(regions).to(query.device),
            )
            start = self._copies.start
            self._measured.append(
                {name: (start(values), start(measured.undefined_rows[name])) for name, values in measured.items()}
            )
        if self._encoding:
            factors = self._layers[site.layer].factors
            if factors is None:
                maps = attention_map(query, key, scale, bias)
                self._prefix_mass[site.layer] = site.layout.prefix(maps).sum(dim=-1).mean()
                arriving: Callable[[], Any] = self._copies.start(maps, _PRECISION[self._encoding])
            else:
                arriving = self._start_factors(query, key, scale, bias, getattr(torch, factors.precision))
            self._arriving.append((site.layer, arriving))
            self._pass_on(self._copies.depth)

    def _start_factors(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None, precision: torch.dtype
    ) -> Callable[[], Factors]:
        start = self._copies.start
        parts = start(query, precision, shared=True), start(key, precision, shared=True)
        added = None if bias is None else start(bias, shared=True)
        return lambda: Factors(query=parts[0](), key=parts[1](), scale=scale, bias=None if added is None else added())

    def finish(self) -> None:
        """Pass on the last layers."""
        self._pass_on(0)

    def _pass_on(self, leave: int) -> None:
        """Hand the layers that have arrived to the writer, waiting for those beyond the last `leave`."""
        while len(self._arriving) > leave:
            layer, arrived = self._arriving.popleft()
            self._add_attention(layer, arrived())

    def prefix_mass(self) -> dict[int, float]:
        """Mean mass that each layer whose maps were kept gives to its prefix tokens."""
        return {layer: float(mass) for layer, mass in self._prefix_mass.items()}

    def metric_values(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Values [image, layer, head(, region)] and undefined-row counts [image, layer, head] of the batch.

        Layers with fewer heads than the widest are filled with NaN and −1.
        """
        names = list(self._measured[0]) if self._measured else []
        values = {name: stack_layers([layer[name][0]() for layer in self._measured], np.nan) for name in names}
        counts = {name: stack_layers([layer[name][1]() for layer in self._measured], -1) for name in names}
        return values, counts


def stack_layers(layers: Sequence[Any], fill: float) -> np.ndarray:
    """Arrays [image, head, ...] of several layers as one [image, layer, head, ...]."""
    arrays = [torch.as_tensor(layer).cpu().numpy() for layer in layers]
    heads = max(array.shape[1] for array in arrays)
    padded = [
        np.pad(array, [(0, 0), (0, heads - array.shape[1])] + [(0, 0)] * (array.ndim - 2), constant_values=fill)
        for array in arrays
    ]
    return np.stack(padded, axis=1)


def discover_factors(
    model: torch.nn.Module, images: torch.Tensor, layers: Sequence[int], heads: Sequence[int] = ()
) -> tuple[dict[int, FactorSchema], dict[int, torch.Tensor]]:
    """What is fixed about each layer's query and key, and the biases that all images share, [1, head, query, key].

    Args:
        model: see `AttentionTap`.
        images: two: from one alone, a bias of each image cannot be told from one for all.
        layers, heads: to look at; empty: all.
    """
    schemas: dict[int, FactorSchema] = {}
    biases: dict[int, torch.Tensor] = {}

    def describe(
        site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        bias = None if bias is None else bias.cpu()
        schema = factor_schema(Factors(query=query.cpu(), key=key.cpu(), scale=scale, bias=bias), site.heads)
        schemas[site.layer] = schema
        if bias is not None and schema.bias == "shared":
            biases[site.layer] = one_bias(bias).clone()

    with (
        evaluating(model),
        torch.inference_mode(),
        AttentionTap(model, describe, layers=layers or None, heads=heads or None),
    ):
        model(images)
    return schemas, biases


def one_bias(bias: torch.Tensor) -> torch.Tensor:
    """[1, head, query, key] of a bias that all images share."""
    return bias[(None,) * (4 - bias.ndim)][:1]
