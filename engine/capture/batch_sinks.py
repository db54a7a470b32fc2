"""What one batch's forward pass hands over: measured on the spot, passed on to the store's writer, or both."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from engine.capture.attention_call import attention_map
from engine.capture.tap import AttentionSite, AttentionTap, evaluating
from kernels import Measurement, MetricSpec, TokenLayout, measure_qk
from store import Factors, FactorSchema, LayerSchema, StoreSchema
from store.encodings import factor_schema
from train.transfer import HostCopies, HostCopy

_PRECISION = {"fp16": torch.float16, "bf16": torch.bfloat16}


class BatchSinks:
    """Takes what one batch's forward pass hands over: measures it on the spot, and passes it on to the writer.

    Nothing is waited for while the model runs. Metrics stay on the device until the batch ends; maps go to the host by
    `HostCopies`, and a layer is passed on to the writer when as many others as may be on their way have followed it.
    Rows that are no attention (NaN or infinite logits) are left out of every metric and counted.

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
        self._measured: list[Measurement] = []
        self._invalid: list[tuple[AttentionSite, torch.Tensor]] = []  # rows that are no attention [image, head, query]
        self._collected: list[HostCopy] = []

    def __call__(
        self, site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        invalid = None
        if self._metrics:
            measured = self._measure(site, query, key, scale, bias)
            self._measured.append(measured)
            invalid = ~measured.valid
        if self._encoding:
            factors = self._layers[site.layer].factors
            if factors is None:
                maps = attention_map(query, key, scale, bias)
                if invalid is None:
                    invalid = maps[..., 0].isnan()  # a softmax with a NaN in it is NaN throughout
                self._prefix_mass[site.layer] = site.layout.prefix(maps).sum(dim=-1).nanmean(dim=(0, 2))
                arriving: Callable[[], Any] = self._copies.start(maps, _PRECISION[self._encoding])
            else:
                precision = getattr(torch, factors.precision)
                arriving = self._start_factors(query, key, scale, bias, precision)
                if invalid is None:
                    invalid = unusable_rows(query.to(precision), key.to(precision))
            self._arriving.append((site.layer, arriving))
            self.pass_on(self._copies.depth)
        assert invalid is not None  # there is a sink
        self._invalid.append((site, invalid))

    def _measure(
        self, site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> Measurement:
        return measure_qk(
            query,
            key,
            site.layout,
            metrics=self._metrics,
            scale=scale,
            bias=bias,
            backend=self._backend,
            invalid="mask",
            regions=self._regions[site.layout],
        )

    def _start_factors(
        self, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None, precision: torch.dtype
    ) -> Callable[[], Factors]:
        start = self._copies.start
        parts = start(query, precision, shared=True), start(key, precision, shared=True)
        added = None if bias is None else start(bias, shared=True)
        return lambda: Factors(query=parts[0](), key=parts[1](), scale=scale, bias=None if added is None else added())

    def finish(self) -> None:
        """The forward pass is launched: start to bring the metrics to the host."""
        rows = [torch.stack([mask.sum(), torch.ones_like(mask).sum()]) for _, mask in self._invalid]
        self._collected = [self._copies.start(torch.stack(rows))]
        left_out = [mask[..., site.layout.num_prefix_tokens :].sum(dim=-1) for site, mask in self._invalid]
        for metric in self._metrics:
            values = stack_layers([layer[metric.name] for layer in self._measured], math.nan)
            missing = zip(self._measured, left_out, strict=True)
            counts = stack_layers([layer.undefined_rows[metric.name] + rest for layer, rest in missing], -1)
            self._collected += [self._copies.start(values), self._copies.start(counts)]

    def pass_on(self, leave: int = 0) -> None:
        """Hand the layers that have arrived to the writer, waiting for those beyond the last `leave`."""
        while len(self._arriving) > leave:
            layer, arrived = self._arriving.popleft()
            self._add_attention(layer, arrived())

    def prefix_mass(self) -> dict[tuple[int, int], float]:
        """(layer, head) -> the mean mass that it gives to prefix tokens, of the layers whose maps were kept."""
        if not self._prefix_mass:
            return {}
        names = [(layer, head) for layer, masses in self._prefix_mass.items() for head in range(len(masses))]
        return dict(zip(names, torch.cat(list(self._prefix_mass.values())).tolist(), strict=True))

    def masked_rows(self) -> list[tuple[int, int, int]]:
        """(layer, its rows that are no attention, all its rows) of each layer; waits for the metrics."""
        rows = self._collected[0]().tolist()
        return [(site.layer, masked, of) for (site, _), (masked, of) in zip(self._invalid, rows, strict=True)]

    def metric_values(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Values [image, layer, head(, region)], and how many rows have no part in each, [image, layer, head].

        Layers with fewer heads than the widest are filled with NaN and −1. Waits for them.
        """
        arrived = [wait().numpy() for wait in self._collected[1:]]
        names = [metric.name for metric in self._metrics]
        return (
            dict(zip(names, arrived[0::2], strict=True)),
            dict(zip(names, arrived[1::2], strict=True)),
        )


def unusable_rows(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Rows of softmax(query · keyᵀ) that NaN or infinite factors leave without a value, bool [image, head, query]."""
    return ~(query.isfinite().all(dim=-1) & key.isfinite().all(dim=-1).all(dim=-1, keepdim=True))


def stack_layers(layers: Sequence[torch.Tensor | np.ndarray], fill: float) -> torch.Tensor:
    """[image, head, ...] of several layers as one [image, layer, head, ...] on their device."""
    tensors = [torch.as_tensor(layer) for layer in layers]
    heads = max(tensor.shape[1] for tensor in tensors)
    padded = [functional.pad(t, (0, 0) * (t.ndim - 2) + (0, heads - t.shape[1]), value=fill) for t in tensors]
    return torch.stack(padded, dim=1)


def stored_layers(sites: Sequence[AttentionSite], factors: Mapping[int, FactorSchema]) -> tuple[LayerSchema, ...]:
    """What a store says of its layers: of each site, and of its query and key where they are kept."""
    return tuple(
        LayerSchema(
            layer=site.layer,
            site=site.name,
            heads=site.heads,
            layout=site.layout.to_dict(),
            factors=factors.get(site.layer),
        )
        for site in sites
    )


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
