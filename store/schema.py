"""What a store looks like on disk: names, attributes, versions. Nothing here does I/O.

run.zarr/            attrs: schema "vit-attention/1", model, preprocessing, layout, encoding, precision, …
  attention/layer_00 [image, head, query, key]      when the `store` sink ran (fp16, bf16)
  attention/layer_00/{query, key} [image, head, token, dim], bias                 (qk)
  images/{id, label, regions}   logits [image, class]
  metrics/<name>/<params hash>/value [image, layer, head(, region)]
run.ledger/          one record a committed batch, beside the store
run.samples.zarr/    whole maps of a few images, beside the store of a capture
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MARK = "vit-attention"  # the attribute `schema` of whatever this program writes begins with it
SCHEMA = f"{MARK}/1"

# Encoding -> number format in which it keeps maps; "" where it keeps query and key instead. See `store.encodings`.
STORED_MAPS = {"fp16": "float16", "bf16": "bfloat16", "qk": ""}

# Names of the files of a store and of its ledger; what has another name there is not ours.
STORE_FILES = (
    r"zarr\.json(?:\.partial)?|(?:attention|images|metrics|logits)/(?:.+/)?(?:zarr\.json|c(?:\.\d+)*)(?:\.partial)?"
)
LEDGER_FILES = (
    r"lock|(?:(?:metadata|manifest|complete|batch_\d{6,})|metrics/[^/]+/[0-9a-f]{16}/(?:metadata|batch_\d{6,}))"
    r"\.json(?:\.partial)?"
)
RECORD_BEGINS = (b'{"checksum": "', b'{"capture": "')  # with the metadata's record and with any other

_METRIC_NAME = re.compile(r"[A-Za-z0-9._-]+")


class StoreError(RuntimeError):
    """A store that cannot be opened, read or written as asked; the message names the unit at fault."""

    exit_code = 1


class NetworkError(OSError):
    """What an object store or the network on the way to it answers; the message is a sentence that names the URL."""

    exit_code = 1


class MissingStoreError(StoreError):
    """There is no store at the place that was named."""

    exit_code = 2


class OtherRunError(StoreError):
    """A store that is sound and of another run; the message names the first thing that differs."""


class UnfinishedStoreError(StoreError):
    """A store that counts only when it is whole, and is not."""


class DamagedStoreError(StoreError):
    """A store of ours whose metadata are damaged and cannot be rebuilt."""


def layer_path(layer: int) -> str:
    """Path of a layer's array inside the store: attention/layer_00, …"""
    return f"attention/layer_{layer:02d}"


def metric_path(name: str, params: Mapping[str, Any]) -> str:
    """Path of a metric's group inside the store: metrics/<name>/<params hash>.

    The hash is 16 hex digits of BLAKE2b over the parameters as canonical JSON, so that values computed with
    other parameters, another backend or another code version never share an array. Raises StoreError for a name that
    cannot be a folder on every file system, or parameters that JSON cannot hold.
    """
    if not _METRIC_NAME.fullmatch(name) or name in (".", ".."):
        raise StoreError(f"metric name {name!r} cannot be stored; expected letters, digits and . _ - only")
    try:
        text = json.dumps(params, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(f"parameters of metric {name!r} cannot be written as JSON: {error}") from error
    return f"metrics/{name}/{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def ledger_name(store: str) -> str:
    """`run.ledger`, which lies beside `run.zarr`."""
    return store.removesuffix(".zarr") + ".ledger"


def samples_name(store: str) -> str:
    """`run.samples.zarr`, which lies beside `run.zarr`."""
    return store.removesuffix(".zarr") + ".samples.zarr"


@dataclass(frozen=True, slots=True, kw_only=True)
class FactorSchema:
    """What is fixed about a layer whose query and key are kept.

    Args:
        head_dim: length of a query.
        precision: of the stored query and key, "float16" or "bfloat16".
        scale: factor of q·k in the logits.
        bias: "": none; "shared": one for all images; "image": one for each.
        bias_shape: (head, query, key) of an image's bias, 1 where it is constant along an axis; () without one.
        bias_precision: "float32" (additive) or "bool" (True = attend).
    """

    head_dim: int
    precision: str
    scale: float
    bias: str = ""
    bias_shape: tuple[int, ...] = ()
    bias_precision: str = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSchema:
    """One layer's attention.

    Args:
        layer: index in depth order, from 0.
        site: the module's name, e.g. "blocks.0.attn".
        heads: number of heads.
        layout: `TokenLayout.to_dict()` of its maps (kept as plain numbers: this package imports nothing).
        factors: what is fixed about its query and key, with the encoding "qk" alone.
    """

    layer: int
    site: str
    heads: int
    layout: dict[str, int | bool]
    factors: FactorSchema | None = None

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any]) -> LayerSchema:
        """Back from JSON."""
        values = dict(attrs)
        if values.get("factors") is not None:
            factors = dict(values["factors"])
            values["factors"] = FactorSchema(**factors | {"bias_shape": tuple(factors["bias_shape"])})
        return cls(**values)

    @property
    def tokens(self) -> int:
        rows, cols = int(self.layout["grid_rows"]), int(self.layout["grid_cols"])
        return int(self.layout["num_prefix_tokens"]) + rows * cols


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSchema:
    """Everything that fixes a store's shapes and says where its numbers come from.

    Two runs may share a store (resume) only if their schemas are equal in every field.

    Args:
        layers: the captured layers in depth order.
        image_ids: readable images of the manifest, in row order.
        batch_size: images a capture batch; also the length of a shard.
        encoding: of `STORED_MAPS`, or "" when no attention is stored (metrics only).
        metrics: metric name -> parameters (backend, code version, …) of the `metrics` sink.
        model: {name, weights_sha256, timm, torch, …}
        preprocessing: mean, std, input size, interpolation, crop of the model's own configuration.
        dataset: {id, split, sha256}
        precision: dtype of the forward pass, e.g. "float32".
        num_classes: length of the stored logits; 0: none, as of a model without a head.
        code_version: version of this project.
        regions: names of the regions, in order; empty if images have none.
        region_metrics: those of `metrics` whose values have a region axis.
        head_ids: numbers of the captured heads in the model, where some were chosen; () for all.
        extra: anything else that two captures must share to be one; see `whole`.
    """

    layers: tuple[LayerSchema, ...]
    image_ids: tuple[str, ...]
    batch_size: int
    encoding: str
    metrics: dict[str, dict[str, Any]]
    model: dict[str, Any]
    preprocessing: dict[str, Any]
    dataset: dict[str, Any]
    precision: str
    num_classes: int
    code_version: str
    regions: tuple[str, ...] = ()
    region_metrics: tuple[str, ...] = ()
    head_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers or not self.image_ids or self.batch_size < 1:
            raise StoreError(
                f"a store needs layers, images and a batch size ≥ 1; found {len(self.layers)} layers, "
                f"{len(self.image_ids)} images, batch size {self.batch_size}"
            )
        numbers = [layer.layer for layer in self.layers]
        if numbers != sorted(set(numbers)):
            raise StoreError(f"layers are {numbers}; expected different numbers in depth order")
        if any((layer.factors is None) == (STORED_MAPS.get(self.encoding) == "") for layer in self.layers):
            raise StoreError(f"encoding is {self.encoding!r}; qk's layers, and no others, describe query and key")
        if self.head_ids and len(self.head_ids) != self.max_heads:
            raise StoreError(f"head_ids name {len(self.head_ids)} heads; its layers have {self.max_heads}")
        unknown = [name for name in self.region_metrics if name not in self.metrics]
        if unknown or (self.region_metrics and not self.regions):
            raise StoreError(
                f"region metrics {list(self.region_metrics)} need to be among the metrics {list(self.metrics)} "
                f"and the images to have regions (found {list(self.regions)})"
            )

    @property
    def whole(self) -> bool:
        """Whether it can be read only when it is complete: so is an import, but a capture is read while it grows."""
        return bool(self.extra.get("whole"))

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self.batch_size)

    @property
    def max_heads(self) -> int:
        """Length of the metrics' head axis; layers with fewer heads are padded (NaN, and -1 for counts)."""
        return max(layer.heads for layer in self.layers)

    def batch_rows(self, batch: int) -> slice:
        """Rows of the store that capture batch `batch` fills."""
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    def to_attrs(self) -> dict[str, Any]:
        """The store's root attributes; image ids are left out (they are an array of their own)."""
        attrs = asdict(self)
        attrs.pop("image_ids")
        try:
            plain: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, **attrs}, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise StoreError(f"the store's attributes cannot be written as JSON: {error}") from error
        return plain

    @classmethod
    def from_attrs(cls, attrs: Mapping[str, Any], image_ids: Sequence[str]) -> StoreSchema:
        """The schema back from a store's root attributes and its `images/id`; StoreError if they describe none."""
        values = {key: attrs[key] for key in cls.__dataclass_fields__ if key in attrs}
        try:
            values["layers"] = tuple(LayerSchema.from_attrs(layer) for layer in values["layers"])
            for key in ("regions", "region_metrics", "head_ids"):
                values[key] = tuple(values[key])
            return cls(**values, image_ids=tuple(image_ids))
        except (KeyError, TypeError) as error:
            raise StoreError(f"the store's root attributes do not describe a {SCHEMA!r} store: {error}") from error
