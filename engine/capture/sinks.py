"""What is made of attention while the model runs: measured on the spot, or brought to the store's writer.

A sink serves one batch. Nothing is waited for while the model runs: metrics stay on the device until the batch ends;
maps, or query and key, go to the host, and a layer is handed to the writer when as many others as may be on their way
have followed it.
"""

from __future__ import annotations

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
        """Begin with a site, while the model runs; its rows that are no attention, bool [image, head, query] there."""
        ...

    def launched(self) -> None:
        """The forward pass is launched: bring to the host what is still on the device, without waiting."""

    def finish(self, results: BatchResults) -> None:
        """Wait for what was begun, and give it."""


class MetricsSink:
    """Measures each site as it is seen, without building its map in main memory.

    Rows that are no attention (NaN or infinite logits) are left out of every metric and counted. `regions` is, for each
    layer, the coverage of this batch's images, [image, region, patch] on the layer's grid, or None.
    """

    def __init__(
        self, metrics: Sequence[MetricSpec], backend: str, regions: Mapping[int, np.ndarray | None], copies: HostCopies
    ) -> None:
        self._metrics, self._backend, self._regions, self._copies = metrics, backend, regions, copies
        self._measured: list[Measurement] = []
        self._invalid_patches: list[torch.Tensor] = []  # patch queries of each map that are no attention, [image, head]
        self._arriving: dict[str, tuple[HostCopy, HostCopy]] = {}

    def take(self, attention: SiteAttention) -> torch.Tensor:
        site = attention.site
        measured = attention.measure(self._metrics, self._backend, self._regions[site.layer])
        self._measured.append(measured)
        invalid: torch.Tensor = ~measured.valid
        self._invalid_patches.append(invalid[..., site.layout.num_prefix_tokens :].sum(dim=-1))
        return invalid

    def launched(self) -> None:
        for metric in self._metrics:
            values = stack_layers([layer[metric.name] for layer in self._measured], math.nan)
            undefined = [layer.undefined_rows[metric.name] for layer in self._measured]
            counts = [rows + invalid for rows, invalid in zip(undefined, self._invalid_patches, strict=True)]
            self._arriving[metric.name] = self._copies.start(values), self._copies.start(stack_layers(counts, -1))

    def finish(self, results: BatchResults) -> None:
        for name, (values, undefined) in self._arriving.items():
            results.values[name] = values.wait().numpy()
            results.undefined[name] = undefined.wait().numpy()


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

    def launched(self) -> None:
        """All is on its way already."""

    def finish(self, results: BatchResults) -> None:
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
        return maps[..., 0].isnan()  # a softmax with a NaN in it is NaN throughout

    def finish(self, results: BatchResults) -> None:
        super().finish(results)
        heads = [(layer, head) for layer, masses in self._prefix_mass.items() for head in range(len(masses))]
        masses = torch.cat(list(self._prefix_mass.values())).tolist()
        results.prefix_mass |= dict(zip(heads, masses, strict=True))


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
        return unusable_rows(attention.query.to(precision), attention.key.to(precision))

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


def stack_layers(layers: Sequence[torch.Tensor | np.ndarray], fill: float) -> torch.Tensor:
    """[image, head, ...] of several layers as one [image, layer, head, ...] on their device."""
    tensors = [torch.as_tensor(layer) for layer in layers]
    heads = max(tensor.shape[1] for tensor in tensors)
    padded = [functional.pad(t, (0, 0) * (t.ndim - 2) + (0, heads - t.shape[1]), value=fill) for t in tensors]
    return torch.stack(padded, dim=1)
