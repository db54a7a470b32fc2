"""What a store looks like on disk: names, attributes, versions. Nothing here does I/O.

run.zarr/            attrs: schema "vit-attention/1", model, preprocessing, layout, encoding, precision, …
  attention/layer_00 [image, head, query, key]      when the `store` sink ran
  images/{id, label, regions}   logits [image, class]
  metrics/<name>/<params hash>/value [image, layer, head(, region)]
run.ledger/          one record a committed batch, beside the store
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SCHEMA", "LayerSchema", "StoreError", "StoreSchema", "layer_path", "ledger_path"]

SCHEMA = "vit-attention/1"

ATTENTION_DIMS = ("image", "head", "query", "key")


class StoreError(RuntimeError):
    """A store that cannot be opened, read or written as asked; the message names the unit at fault."""


def layer_path(layer: int) -> str:
    """Path of a layer's array inside the store: attention/layer_00, …"""
    return f"attention/layer_{layer:02d}"


def ledger_path(store: Path) -> Path:
    """`run.ledger` beside `run.zarr`."""
    return store.with_name(store.name.removesuffix(".zarr") + ".ledger")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSchema:
    """One layer's array.

    Args:
        layer: index in depth order, from 0.
        site: the module's name, e.g. "blocks.0.attn".
        heads: number of heads.
        layout: `TokenLayout.to_dict()` of its maps (kept as plain numbers: this package imports nothing).
    """

    layer: int
    site: str
    heads: int
    layout: dict[str, int | bool]

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
        encoding: "fp16", or "" when no attention is stored (metrics only).
        metrics: metric name -> parameters (backend, code version, …) of the `metrics` sink.
        model: {name, weights_sha256, timm, torch, …}
        preprocessing: mean, std, input size, interpolation, crop of the model's own configuration.
        dataset: {id, split, sha256}
        precision: dtype of the forward pass, e.g. "float32".
        num_classes: length of the stored logits.
        regions: names of the regions, in order; empty if images have none.
        code_version: version of this project.
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
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def num_batches(self) -> int:
        return -(-self.num_images // self.batch_size)

    def batch_rows(self, batch: int) -> slice:
        """Rows of the store that capture batch `batch` fills."""
        return slice(batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_images))

    def to_attrs(self) -> dict[str, Any]:
        """The store's root attributes; image ids are left out (they are an array of their own)."""
        attrs = asdict(self)
        attrs.pop("image_ids")
        return {"schema": SCHEMA, **attrs}
