"""Attention as HDF5: a store exported on request, and a user's own maps read batch by batch.

file.h5     attrs: model, dataset, preprocessing, ... as JSON
  attention/layer_00 [image, head, query, key]     attrs site, layer, layout (JSON)
  images/{id, label}
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from store.local import sync_directory
from store.precisions import Array
from store.reader import AttentionStore
from store.schema import StoreError, layer_path
from store.storage import PARTIAL

__all__ = ["AttentionFile", "Dataset", "export_attention"]

_AXES = ("image", "head", "query", "key")


def export_attention(store: AttentionStore, path: str | os.PathLike[str], done: Callable[[int], None]) -> None:
    """Write a store's attention as one HDF5 file, float16 where the store has it and float32 otherwise.

    The file appears under its name only when it is whole. Chunks of an image are gzipped and carry a Fletcher-32
    checksum.

    Args:
        store: a complete one.
        path: the file; replaced if it exists.
        done: called with the number of images after each batch.

    Raises:
        StoreError: the store is incomplete, damaged or holds no attention, or the file cannot be written.
    """
    import h5py

    if not store.complete:
        missing = store.schema.num_images - int(store.committed_images.sum())
        raise StoreError(f"{store.path} lacks {missing} images; resume its capture before exporting it")
    target = Path(path)
    partial = target.with_name(target.name + PARTIAL)
    try:
        with h5py.File(partial, "w") as file:
            for name in ("model", "dataset", "preprocessing", "precision", "encoding", "code_version"):
                file.attrs[name] = json.dumps(getattr(store.schema, name))
            file["images/id"] = list(store.image_ids)
            file["images/label"] = store.labels
            datasets = [(layer.layer, _create(file, store, layer.layer)) for layer in store.schema.layers]
            for batch in store.committed_batches:
                rows = store.schema.batch_rows(batch)
                for layer, dataset in datasets:
                    narrow = dataset.dtype == np.float16
                    dataset[rows] = store.read_stored(layer, rows) if narrow else store.read(layer, rows)
                done(rows.stop - rows.start)
            file.flush()
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, target)
        sync_directory(target.absolute().parent)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _create(file: Any, store: AttentionStore, layer: int) -> Any:
    described = store.schema.layers[store.layers.index(layer)]
    row = (described.heads, described.tokens, described.tokens)
    dataset = file.create_dataset(
        layer_path(layer),
        shape=(store.schema.num_images, *row),
        dtype="float16" if store.schema.encoding == "fp16" else "float32",
        chunks=(1, *row),
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        fletcher32=True,
    )
    for axis, name in enumerate(_AXES):
        dataset.dims[axis].label = name
    dataset.attrs["site"] = described.site
    dataset.attrs["layer"] = layer
    dataset.attrs["layout"] = json.dumps(described.layout)
    return dataset


@dataclass(frozen=True, slots=True)
class Dataset:
    """One layer in a file.

    Args:
        name: of the dataset, and the site unless it says another.
        heads, tokens: of its maps.
        layout: `TokenLayout.to_dict()`, if the dataset has it as an attribute.
        read: rows -> maps [image, head, query, key].
    """

    name: str
    site: str
    heads: int
    tokens: int
    layout: dict[str, int | bool] | None
    read: Callable[[slice], Array]


class AttentionFile(contextlib.AbstractContextManager["AttentionFile"]):
    """A user's HDF5 file of attention: a dataset [image, head, query, key] a layer, or one with `layer` behind `image`.

    Datasets are taken in the order of their names, numbers in them counted as numbers.

    Attributes:
        path: the file.
        image_ids: `images/id`, or image_000000, …
        labels: `images/label`, or −1.
        layers: what was found, in depth order.

    Raises:
        StoreError: no such file, not HDF5, no maps in it, or maps of other shapes than these (named).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import h5py

        self.path = Path(path)
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be read as HDF5: {error}") from error
        try:
            self.layers = tuple(self._layers())
            self.image_ids, self.labels = self._images()
        except BaseException:
            self._file.close()
            raise

    def _layers(self) -> Iterator[Dataset]:
        import h5py

        found: dict[str, Any] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset) and item.ndim in (4, 5):
                found[name] = item

        self._file.visititems(visit)
        if not found:
            raise StoreError(
                f"{self.path} holds no attention; expected a dataset [image, head, query, key] for each layer, or one "
                "[image, layer, head, query, key]"
            )
        self.num_images = next(iter(found.values())).shape[0]
        for name in sorted(found, key=_natural):
            dataset = found[name]
            shape, kind = dataset.shape, dataset.dtype.kind
            if kind != "f" or shape[-1] != shape[-2] or shape[0] != self.num_images or 0 in shape:
                raise StoreError(
                    f"{self.path}: {name} is {dataset.dtype} {shape}; expected post-softmax attention, floating point "
                    f"[image, head, query, key] with {self.num_images} images and as many queries as keys"
                )
            if dataset.ndim == 4:
                yield self._dataset(name, dataset, ())
            else:
                for layer in range(shape[1]):
                    yield self._dataset(f"{name}[{layer}]", dataset, (layer,))

    def _dataset(self, name: str, dataset: Any, layer: tuple[int, ...]) -> Dataset:
        layout = json.loads(dataset.attrs["layout"]) if "layout" in dataset.attrs else None
        site = str(dataset.attrs.get("site", name))
        heads, tokens = dataset.shape[-3:-1]

        def checked(rows: slice) -> Array:
            try:
                maps = np.asarray(dataset[rows, *layer])
            except OSError as error:
                raise StoreError(f"{self.path}: {name} is damaged: {error}") from error
            sums = maps.sum(axis=-1, dtype=np.float32)
            wrong = np.argwhere(~(np.abs(sums - 1) <= ROW_SUM_TOLERANCE) | (maps < 0).any(axis=-1))
            if wrong.size:
                image, head, query = (int(number) for number in wrong[0])
                raise StoreError(
                    f"{self.path}: {name} is no post-softmax attention: the row of image {rows.start + image}, head "
                    f"{head}, query {query} sums to {sums[image, head, query]:.4g}; expected non-negative values that "
                    f"sum to 1 within {ROW_SUM_TOLERANCE}"
                )
            return maps

        return Dataset(name, site, int(heads), int(tokens), layout, checked)

    def _images(self) -> tuple[tuple[str, ...], Array]:
        ids = tuple(f"image_{row:06d}" for row in range(self.num_images))
        labels = np.full(self.num_images, -1, np.int64)
        if "images/id" in self._file:
            ids = tuple(str(name) for name in self._file["images/id"].asstr()[...])
        if "images/label" in self._file:
            labels = np.asarray(self._file["images/label"][...], dtype=np.int64)
        for what, length in (("images/id", len(ids)), ("images/label", len(labels))):
            if length != self.num_images:
                raise StoreError(f"{self.path}: {what} has {length} entries for {self.num_images} images")
        return ids, labels

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


# Of bfloat16 maps, the coarsest that come in practice.
ROW_SUM_TOLERANCE = 1e-2


def _natural(name: str) -> list[tuple[int, str]]:
    """layer_2 before layer_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
