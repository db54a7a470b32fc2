"""The arrays of a store: their paths, shapes, chunks and codecs, from its schema.

Every array written during a capture has exactly one file per batch, so that a file has one writer, is written
once and whole, and is named by one ledger record. Chunk keys are flat ("c.3.0.0.0"), so that one directory per
layer has to be fsynced, not four per shard.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from store.encodings import resolve_encoding
from store.places import storage_at
from store.precisions import FILL, Array, storage_dtype
from store.schema import LayerSchema, StoreError, StoreSchema, layer_path, metric_path
from store.storage import Storage

CHUNK_IMAGES = 4  # images per chunk: 1-4 serve reading single images, more serve nothing
CHUNK_BYTES = 2**31 - 17  # most that Blosc takes


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One array whose first axis is `image` and which gets one file per capture batch."""

    path: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    precision: str  # see `store.precisions`
    batch: int  # rows per file
    chunk: int  # rows per chunk
    sharded: bool = False  # a file is a shard of chunks (with an index), not a single chunk
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.chunk * self.row_bytes > CHUNK_BYTES:
            advice = (
                "capture fewer heads, smaller images, or with the encoding qk"
                if self.sharded
                else "give a smaller batch size"
            )
            raise StoreError(
                f"{self.path} would need {self.chunk * self.row_bytes:,} bytes for {self.chunk} image(s) in one piece; "
                f"at most {CHUNK_BYTES:,} can be compressed together: {advice}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored values."""
        return storage_dtype(self.precision)

    @property
    def fill(self) -> float:
        """Value of what was never written."""
        return FILL[self.precision]

    @property
    def shard_chunks(self) -> int:
        """Chunks per file; 0 if it is a single one, without an index."""
        return self.batch // self.chunk if self.sharded else 0

    def file(self, batch: int) -> str:
        """The file, inside the store, that a batch fills."""
        return ".".join([f"{self.path}/c", str(batch), *("0" for _ in self.shape[1:])])

    @property
    def row_bytes(self) -> int:
        """Bytes per image before compression."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize


def batch_arrays(schema: StoreSchema) -> list[ArraySpec]:
    """Every array that a capture batch fills: attention, logits, metrics."""
    arrays = [*attention_arrays(schema)]
    if schema.num_classes:
        arrays.append(_per_batch(schema, "logits", {"class": schema.num_classes}, "float32"))
    for name, params in schema.metrics.items():
        arrays += metric_arrays(schema, name, params, regions=name in schema.region_metrics)
    return arrays


def attention_arrays(schema: StoreSchema) -> list[ArraySpec]:
    """attention/layer_00, …, or their query and key; none when only metrics are kept."""
    if not schema.encoding:
        return []
    return [array for layer in schema.layers for array in layer_arrays(schema, layer).values()]


def layer_arrays(schema: StoreSchema, layer: LayerSchema) -> dict[str, ArraySpec]:
    """The arrays that keep one layer, by the name of the part."""
    parts = resolve_encoding(schema.encoding).parts(layer)
    most = CHUNK_BYTES // max(math.prod(part.shape) * storage_dtype(part.precision).itemsize for part in parts)
    chunk = max(rows for rows in range(1, CHUNK_IMAGES + 1) if schema.batch_size % rows == 0 and rows <= max(most, 1))
    return {
        part.name: ArraySpec(
            path=f"{layer_path(layer.layer)}/{part.name}".rstrip("/"),
            shape=(schema.num_images, *part.shape),
            dims=("image", *part.dims),
            precision=part.precision,
            batch=schema.batch_size,
            chunk=chunk,
            sharded=True,
            attributes={} if part.name else layer_attributes(layer),
        )
        for part in parts
    }


def shared_biases(schema: StoreSchema) -> dict[int, tuple[int, ...]]:
    """(head, query, key) of the layers whose bias is one for all images."""
    return {
        layer.layer: layer.factors.bias_shape
        for layer in schema.layers
        if layer.factors is not None and layer.factors.bias == "shared"
    }


def layer_attributes(layer: LayerSchema) -> dict[str, Any]:
    """What a layer's array, or the group of its query and key, says about itself."""
    factors = {"factors": asdict(layer.factors)} if layer.factors is not None else {}
    return {"site": layer.site, "layer": layer.layer, "layout": layer.layout, **factors}


def metric_arrays(schema: StoreSchema, name: str, params: Mapping[str, Any], *, regions: bool) -> list[ArraySpec]:
    """A metric's value [image, layer, head(, region)] and its counts of undefined rows [image, layer, head]."""
    group = metric_path(name, params)
    axes = {"layer": len(schema.layers), "head": schema.max_heads}
    region = {"region": len(schema.regions)} if regions else {}
    return [
        _per_batch(schema, f"{group}/value", axes | region, "float32"),
        _per_batch(schema, f"{group}/undefined", axes, "int32"),
    ]


def _per_batch(schema: StoreSchema, path: str, axes: dict[str, int], precision: str) -> ArraySpec:
    return ArraySpec(
        path=path,
        shape=(schema.num_images, *axes.values()),
        dims=("image", *axes),
        precision=precision,
        batch=schema.batch_size,
        chunk=schema.batch_size,
    )


def _compressors(dtype: np.dtype[Any]) -> list[Any]:
    """The codecs behind the bytes; `store.shards` writes the same."""
    if dtype.kind in "OTU":
        return [ZstdCodec(level=3), Crc32cCodec()]
    return [
        BloscCodec(typesize=dtype.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle"),
        Crc32cCodec(),
    ]


def create_group(root: Path, path: str, attributes: dict[str, Any] | None = None) -> None:
    """Write a group's metadata; its parents' too where they are missing."""
    zarr.create_group(LocalStore(root), path=path, attributes=attributes)


def create_metric_group(root: Path, name: str, params: Mapping[str, Any], *, regions: bool) -> None:
    """metrics/<name>/<params hash>, with the parameters as attributes, and whether values have a region axis."""
    create_group(root, metric_path(name, params), {"name": name, "params": dict(params), "regions": regions})


def create_arrays(root: Path, arrays: Iterable[ArraySpec]) -> None:
    """Write the metadata of arrays; no data."""
    for array in arrays:
        row = array.shape[1:]
        zarr.create_array(
            LocalStore(root),
            name=array.path,
            shape=array.shape,
            chunks=(array.chunk, *row),
            shards=(array.batch, *row) if array.sharded else None,
            dtype=array.dtype.newbyteorder("="),
            fill_value=bool(array.fill) if array.precision == "bool" else array.fill,
            compressors=_compressors(array.dtype),
            dimension_names=array.dims,
            attributes=array.attributes,
            chunk_key_encoding={"name": "default", "separator": "."},
        )


def create_constant(root: Path, path: str, dims: tuple[str, ...], values: Array, attributes: dict[str, Any]) -> None:
    """Write a whole small array that never changes: an image's id, label, regions."""
    rows = min(4096, values.shape[0], CHUNK_BYTES * len(values) // max(values.nbytes, 1))
    array = zarr.create_array(
        LocalStore(root),
        name=path,
        shape=values.shape,
        chunks=(rows, *values.shape[1:]),
        dtype=str if values.dtype.kind in "OTU" else values.dtype,
        compressors=_compressors(values.dtype),
        dimension_names=dims,
        attributes=attributes,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[...] = values


def read_constant(root: Storage, path: str) -> Array:
    """A whole small array that never changes."""
    return np.asarray(zarr.open_array(root.zarr(), path=path, mode="r")[...])


def estimate_bytes(schema: StoreSchema, batches: int | None = None) -> int:
    """Most bytes that a capture can take on disk: compression, to 0.75-0.81 of trained maps, is not counted on.

    Args:
        batches: how many batches are still to be written; all if None.
    """
    images = schema.num_images if batches is None else min(schema.num_images, batches * schema.batch_size)
    total = 1 << 20  # metadata and ledger
    for array in batch_arrays(schema):
        chunks = -(-images // array.chunk)
        total += images * array.row_bytes + 64 * chunks  # Blosc header, checksum and index entry per chunk
    return total + sum(4 * math.prod(shape) for shape in shared_biases(schema).values())


def require_free_disk(store: str | os.PathLike[str] | Storage, schema: StoreSchema, batches: int | None = None) -> None:
    """Refuse a capture that the disk cannot hold; StoreError with the bytes needed and free, where a limit is known."""
    needed = estimate_bytes(schema, batches)
    free = storage_at(store).free_bytes()
    if free is not None and needed > free:
        raise StoreError(
            f"{store} may need {_size(needed)}, but its disk has {_size(free)} free; "
            "free some space, store fewer layers or images, or keep metrics only"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def read_attributes(root: Storage, path: str = "") -> dict[str, Any]:
    """A group's attributes; StoreError if there is no group."""
    try:
        return dict(zarr.open_group(root.zarr(), path=path, mode="r").attrs)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{root.where(path).rstrip('/')} is not a Zarr group: {error}") from error
