"""What is made of attention while the model runs: measured on the spot, or brought to the store's writer.

A sink serves one batch. Nothing is waited for while the model runs: metrics stay on the device until the batch ends;
maps, or query and key, go to the host, and a layer is handed to the writer when as many others as may be on their way
have followed it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from engine.capture.attention_call import SiteAttention
from engine.capture.discovery import Discovery, one_bias
from engine.capture.families import CaptureError
from kernels import Measurement, MetricSpec
from store import AttentionWriter, Factors
from store.encodings import resolve_encoding
from train.transfer import HostCopies, HostCopy


@dataclass(slots=True)
class BatchResults:
    """What a batch gives beside the attention that was written; layers with fewer heads than the widest are filled."""

    logits: np.ndarray | None  # [image, class]; None of a model that scores no classes
    # Metric -> [image, layer, head(, region)], filled with NaN.
    values: dict[str, np.ndarray] = field(default_factory=dict)
    # Metric -> rows that have no part in its value, [image, layer, head], filled with −1.
    undefined: dict[str, np.ndarray] = field(default_factory=dict)
    # (layer, head) -> the mean mass that it gives to prefix tokens, of the layers whose maps were kept.
    prefix_mass: dict[tuple[int, int], float] = field(default_factory=dict)
    # Of each layer: (layer, its rows that are no attention, all its rows).
    invalid_rows: list[tuple[int, int, int]] = field(default_factory=list)


class Sink(Protocol):
    """Takes one batch's attention, site by site."""

    def take(self, attention: SiteAttention) -> torch.Tensor:
        """Begin with a site, while the model runs; how many of its rows are no attention, int64 in as many parts."""
        ...

    def launched(self) -> Sequence[torch.Tensor]:
        """The forward pass is launched: what is still on the device, to be brought to the host."""
        ...

    def finish(self, results: BatchResults, arrived: Sequence[torch.Tensor]) -> None:
        """Wait for what was begun, and give it; `arrived` is what `launched` gave, on the host."""


class MetricsSink:
    """Measures each site as it is seen, without building its map in main memory.

    Rows that are no attention (NaN or infinite logits) are left out of every metric and counted. `regions` is, for each
    layer, the coverage of this batch's images, [image, region, patch] on the layer's grid, or None.
    """

    def __init__(self, metrics: Sequence[MetricSpec], backend: str, regions: Mapping[int, np.ndarray | None]) -> None:
        self._metrics, self._backend, self._regions = metrics, backend, regions
        self._measured: list[Measurement] = []

    def take(self, attention: SiteAttention) -> torch.Tensor:
        site = attention.site
        measured = attention.measure(self._metrics, self._backend, self._regions[site.layer])
        self._measured.append(measured)
        invalid: torch.Tensor = measured.invalid_rows
        return invalid

    def launched(self) -> list[torch.Tensor]:
        return [tensor for measured in self._measured for tensor in self._tensors(measured)]

    def _tensors(self, of: Measurement) -> Sequence[torch.Tensor]:
        """What a layer's measurement consists of."""
        if of.together is not None:
            return of.together
        names = [metric.name for metric in self._metrics]
        return [*(of[name] for name in names), *(of.undefined_rows[name] for name in names), of.invalid_patches]

    def finish(self, results: BatchResults, arrived: Sequence[torch.Tensor]) -> None:
        count, tensors = len(self._metrics), iter(arrived)
        layers = [list(itertools.islice(tensors, len(self._tensors(of)))) for of in self._measured]
        if all(of.together is not None for of in self._measured):  # all metrics at once
            values = list(stack_layers([means for means, _ in layers], math.nan, leading=1))
            undefined = list(stack_layers([counts[:count] + counts[-1] for _, counts in layers], -1, leading=1))
        else:
            values = [stack_layers([layer[i] for layer in layers], math.nan) for i in range(count)]
            undefined = [stack_layers([layer[count + i] + layer[-1] for layer in layers], -1) for i in range(count)]
        for i, metric in enumerate(self._metrics):
            results.values[metric.name], results.undefined[metric.name] = values[i].numpy(), undefined[i].numpy()


@dataclass(frozen=True, slots=True)
class ArrivingFactors:
    """Query, key and bias on their way to the host."""

    query: HostCopy
    key: HostCopy
    scale: float
    bias: HostCopy | None

    def wait(self) -> Factors:
        bias = None if self.bias is None else self.bias.wait()
        return Factors(query=self.query.wait(), key=self.key.wait(), scale=self.scale, bias=bias)


class StoreSink:
    """Brings each site's attention to the writer, in depth order; a layer is waited for when `copies.depth` follow."""

    def __init__(self, writer: AttentionWriter, batch: int, copies: HostCopies) -> None:
        self._writer, self._batch, self._copies = writer, batch, copies
        self._arriving: deque[tuple[int, HostCopy | ArrivingFactors]] = deque()

    def put(self, layer: int, arriving: HostCopy | ArrivingFactors) -> None:
        """Add a layer that is on its way, and hand over those that have been for long."""
        self._arriving.append((layer, arriving))
        self._hand_over(self._copies.depth)

    def launched(self) -> list[torch.Tensor]:
        """Attention is on its way already."""
        return []

    def finish(self, results: BatchResults, arrived: Sequence[torch.Tensor]) -> None:
        self._hand_over(0)

    def check(self, layer: int, attention: Any) -> None:
        """Look at a layer that has arrived."""

    def _hand_over(self, leave: int) -> None:
        while len(self._arriving) > leave:
            layer, arriving = self._arriving.popleft()
            attention = arriving.wait()
            self.check(layer, attention)
            self._writer.add_attention(self._batch, layer, attention)


class MapsSink(StoreSink):
    """Brings maps in 16 bits, and notes how much of each head's mass goes to prefix tokens."""

    def __init__(self, writer: AttentionWriter, batch: int, copies: HostCopies, encoding: str) -> None:
        super().__init__(writer, batch, copies)
        self._precision = getattr(torch, resolve_encoding(encoding).precision)
        self._prefix_mass: dict[int, torch.Tensor] = {}

    def take(self, attention: SiteAttention) -> torch.Tensor:
        site, maps = attention.site, attention.maps()
        self._prefix_mass[site.layer] = site.layout.prefix(maps).sum(dim=-1).nanmean(dim=(0, 2))
        self.put(site.layer, self._copies.start(maps, self._precision))
        return maps[..., 0].isnan().sum()  # a softmax with a NaN in it is NaN throughout

    def launched(self) -> list[torch.Tensor]:
        return list(self._prefix_mass.values())

    def finish(self, results: BatchResults, arrived: Sequence[torch.Tensor]) -> None:
        super().finish(results, arrived)
        for layer, masses in zip(self._prefix_mass, arrived, strict=True):
            results.prefix_mass |= {(layer, head): mass for head, mass in enumerate(masses.tolist())}


class FactorsSink(StoreSink):
    """Brings query, key and bias; a bias that all images shared when the capture began must stay the same."""

    def __init__(self, writer: AttentionWriter, batch: int, copies: HostCopies, found: Discovery) -> None:
        super().__init__(writer, batch, copies)
        self._precision = {layer: getattr(torch, factor.precision) for layer, factor in found.factors.items()}
        self._biases = found.biases

    def take(self, attention: SiteAttention) -> torch.Tensor:
        layer, start, bias = attention.site.layer, self._copies.start, attention.bias
        precision = self._precision[layer]
        arriving = ArrivingFactors(
            query=start(attention.query, precision, shared=True),
            key=start(attention.key, precision, shared=True),
            scale=attention.scale,
            bias=None if bias is None else start(bias, shared=True),
        )
        self.put(layer, arriving)
        return unusable_rows(attention.query.to(precision), attention.key.to(precision)).sum()

    def check(self, layer: int, attention: Any) -> None:
        if layer in self._biases and not torch.equal(one_bias(attention.bias), self._biases[layer]):
            raise CaptureError(
                f"the bias of layer {layer} changes from batch to batch though not from image to image, which the "
                "encoding qk cannot keep; use fp16 or bf16"
            )


def unusable_rows(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Rows of softmax(query · keyᵀ) that NaN or infinite factors leave without a value, bool [image, head, query].

    A sum is finite where all its terms are (below 1e30), and takes a tenth of the time of looking at each.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    queries, keys = query.sum(dim=-1, dtype=wide), key.sum(dim=(-2, -1), dtype=wide)
    return ~(queries.isfinite() & keys.isfinite().unsqueeze(-1))


def stack_layers(layers: Sequence[torch.Tensor | np.ndarray], fill: float, leading: int = 0) -> torch.Tensor:
    """[image, head, ...] of several layers as one [image, layer, head, ...] on their device, behind `leading` axes."""
    tensors, axis = [torch.as_tensor(layer) for layer in layers], leading + 1
    heads = max(tensor.shape[axis] for tensor in tensors)
    for i, t in enumerate(tensors):
        if missing := heads - t.shape[axis]:
            tensors[i] = functional.pad(t, (0, 0) * (t.ndim - axis - 1) + (0, missing), value=fill)
    return torch.stack(tensors, dim=axis)
