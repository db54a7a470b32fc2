"""Attention as HDF5: a store exported on request, and a user's own maps read batch by batch.

file.h5     attrs: schema; model, dataset, preprocessing, class_names, ... as JSON
  attention/layer_00 [image, head, query, key]     attrs site, layer, layout (JSON), precision of the values
  images/{id, label}
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from store.hdf5 import DAMAGE, check_seal, is_sealed, new_hdf5
from store.hdf5_input import attribute, datasets, fatality, open_hdf5, require_readable
from store.hdf5_values import labelled_axes, read_class_names, read_labels, read_names, unstated_axes
from store.precisions import FLOATS, Array
from store.reader import AttentionStore
from store.schema import MARK, STORED_MAPS, LayerSchema, StoreError, StoreSchema, layer_path

SCHEMA = f"{MARK}-hdf5/1"

_AXES = ("image", "head", "query", "key")
_IDS, _LABELS = "images/id", "images/label"
_PATIENCE = 5.0  # seconds, for reading a little of each layer beforehand
_CELLS = "#refs#/"  # where MATLAB keeps what cells hold; they are read through what refers to them


def is_export(path: Path) -> bool:
    """Whether a file is one that `export_attention` wrote, sound or damaged."""
    return is_sealed(path, SCHEMA)


def export_attention(store: AttentionStore, path: str | os.PathLike[str], done: Callable[[int], None]) -> None:
    """Write a complete store's attention as one HDF5 file, float16 where the store has it and float32 otherwise.

    The file appears under its name only when it is whole, in place of an earlier export. Chunks of an image are gzipped
    and carry a Fletcher-32 checksum, which every reader checks; the sha256 of everything stands before it, which an
    import checks. `done` is called with the number of images after each batch.

    Raises:
        DiskError: the file cannot be written.
        StoreError: the store is incomplete, damaged or holds no attention, or something else lies there.
    """
    if not store.complete:
        missing = store.schema.num_images - int(store.committed_images.sum())
        damaged = "".join(f" ({sentence})" for sentence in store.damaged_batches)
        raise StoreError(f"{store.path} lacks {missing} images{damaged}; resume its capture before exporting it")
    if not store.schema.encoding:
        raise StoreError(
            f"{store.path} holds metrics only, and an export is of attention; capture again with capture.sinks store"
        )
    with new_hdf5(Path(path), SCHEMA, is_export) as (file, check):
        file.attrs["schema"] = SCHEMA
        for name in ("model", "dataset", "preprocessing", "precision", "encoding", "code_version"):
            file.attrs[name] = json.dumps(getattr(store.schema, name))
        file.attrs["class_names"] = json.dumps(store.class_names)
        file[_IDS] = list(store.image_ids)
        file[_LABELS] = store.labels
        datasets = {layer.layer: _create(file, store.schema, layer) for layer in store.schema.layers}
        read = store.read_stored if STORED_MAPS[store.schema.encoding] == "float16" else store.read
        for batch in store.committed_batches:
            rows = store.schema.batch_rows(batch)
            for layer, dataset in datasets.items():
                dataset[rows] = read(layer, rows)
                check()
            done(rows.stop - rows.start)


def _create(file: Any, schema: StoreSchema, layer: LayerSchema) -> Any:
    row = (layer.heads, layer.tokens, layer.tokens)
    rounded_to = STORED_MAPS[schema.encoding] or "float32"
    dataset = file.create_dataset(
        layer_path(layer.layer),
        shape=(schema.num_images, *row),
        dtype="float32" if rounded_to == "bfloat16" else rounded_to,  # HDF5 has no bfloat16
        chunks=(1, *row),
        compression="gzip",
        compression_opts=1,
        shuffle=True,
        fletcher32=True,
    )
    for axis, name in enumerate(_AXES):
        dataset.dims[axis].label = name
    dataset.attrs["site"] = layer.site
    dataset.attrs["layer"] = layer.layer
    dataset.attrs["layout"] = json.dumps(layer.layout)
    dataset.attrs["precision"] = rounded_to
    return dataset


def _contradiction(datasets: dict[str, Any], given: tuple[str, ...]) -> str:
    """What dimension labels say, where it is not the order that was given."""
    for name, dataset in datasets.items():
        with contextlib.suppress(StoreError):  # labels that are no axes' names
            stated = labelled_axes(dataset)
            if stated and stated != given:
                return f" (the dimension labels of {name} say [{', '.join(stated)}])"
    return ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One layer in a file."""

    name: str
    site: str  # the module's name, or the dataset's
    heads: int
    tokens: int
    layout: str  # the attribute, which ought to be `TokenLayout.to_dict()` as JSON; "" without one
    precision: str  # that the values were rounded to, see `store.precisions`, if the dataset says it; or ""
    read: Callable[[slice], Array]  # rows -> maps [image, head, query, key]


class AttentionFile(contextlib.AbstractContextManager["AttentionFile"]):
    """A user's HDF5 file of attention, one or several datasets of four or five axes.

    A dataset without the axis `layer` is a layer, one without `image` is an image, and one without `head` has a single
    head. Datasets are taken in the order of their names, numbers in them counted as numbers.

    Args:
        axes: their order in all datasets, of `AXES`; (): as dimension labels or scales say, or as alone fits.

    Attributes:
        image_ids: `images/id`, or the names of datasets that are images, or image_000000, …
        labels: `images/label`, or −1.
        layers: what was found, in depth order.
        order: how the axes were taken and why, a sentence.
        unused: names of datasets that are neither maps nor `images/id` nor `images/label`, in order.

    Raises:
        StoreError: no such file, not HDF5, no maps in it, maps of unknown order or of shapes that do not fit, names or
            labels that are none (each named).
    """

    def __init__(self, path: str | os.PathLike[str], axes: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self._file = open_hdf5(self.path)
        try:
            self._maps = self._datasets()
            ids = self._numbered(_IDS, read_names)
            labels = self._numbered(_LABELS, lambda dataset: read_labels(dataset, read_class_names(self._file)))
            self._axes, self.order = self._ordered(tuple(axes), ids, None if labels is None else labels[0])
            self._check_shapes()
            whole_images = "image" not in next(iter(self._axes.values()))
            names = list(self._maps) if whole_images else None
            self.num_images = len(self._maps) if whole_images else self._length(next(iter(self._maps)), "image")
            if whole_images and (ids is not None or labels is not None):
                raise StoreError(
                    f"{self.path}: each dataset is an image, so {_IDS if ids else _LABELS} cannot be "
                    "matched with them; name the datasets as the images and leave it out"
                )
            self.image_ids = tuple(ids or names or (f"image_{row:06d}" for row in range(self.num_images)))
            known: tuple[Array, list[str]] = labels or (np.full(self.num_images, -1, np.int64), [])
            self.labels, self.class_names = known
            for what, length in ((_IDS, len(self.image_ids)), (_LABELS, len(self.labels))):
                if length != self.num_images:
                    raise StoreError(
                        f"{self.path}: {what} has {length} entries for {self.num_images} images; expected one for "
                        "each, or another order of axes (--axes)"
                    )
            self.layers = tuple(self._layers(whole_images))
        except BaseException as error:
            self._file.close()
            if isinstance(error, DAMAGE) and not isinstance(error, StoreError):
                raise StoreError(f"{self.path} is damaged: {error}") from error
            raise

    def _datasets(self) -> dict[str, Any]:
        """The datasets of four or five axes, in order."""
        maps: dict[str, Any] = {}
        unused: list[str] = []
        for name, dataset in datasets(self._file):
            if dataset.ndim in (4, 5):
                require_readable(self._file, name, dataset)
                maps[name] = dataset
            elif not (dataset.is_scale or name in (_IDS, _LABELS) or name.startswith(_CELLS)):
                unused.append(name)
        self.unused = tuple(sorted(unused, key=_natural))
        if not maps:
            raise StoreError(
                f"{self.path} holds no attention; expected a dataset [image, head, query, key] for each layer, or one "
                "[image, layer, head, query, key]"
            )
        return {name: maps[name] for name in sorted(maps, key=_natural)}

    def _numbered(self, name: str, read: Callable[[Any], Any]) -> Any:
        """What a dataset says of each image; None if there is no such dataset."""
        import h5py

        dataset = self._file.get(name)
        if dataset is None:
            return None
        if not isinstance(dataset, h5py.Dataset):
            raise StoreError(f"{self.path}: {name} is a group; expected a dataset with an entry for each image")
        require_readable(self._file, name, dataset)
        return read(dataset)

    def _ordered(self, given: tuple[str, ...], ids: Any, labels: Any) -> tuple[dict[str, tuple[str, ...]], str]:
        """Each dataset's axes, and a sentence on them."""
        axes = {name: given or labelled_axes(dataset) for name, dataset in self._maps.items()}
        reason = f"as --axes says{_contradiction(self._maps, given)}" if given else "by its dimension labels"
        unstated = {name: self._maps[name].shape for name, order in axes.items() if not order}
        if unstated:
            stated = next((len(entries) for entries in (ids, labels) if entries is not None), None)
            try:
                fitting, reason = unstated_axes(unstated, stated)
            except StoreError as error:
                raise StoreError(f"{self.path}: {error}") from None
            axes |= fitting
        name, order = next(iter(axes.items()))
        for other, theirs in axes.items():
            if ("image" in theirs) != ("image" in order):
                raise StoreError(
                    f"{self.path}: {name} has the axes {', '.join(order)}, and {other} {', '.join(theirs)}"
                )
        return axes, f"{name} is taken as [{', '.join(order)}], {reason}"

    def _check_shapes(self) -> None:
        first = next(iter(self._maps))
        for name, dataset in self._maps.items():
            axes, kind = self._axes[name], dataset.dtype.name
            if len(axes) != dataset.ndim:
                raise StoreError(
                    f"{self.path}: {name} has {dataset.ndim} axes, {dataset.shape}; --axes names {len(axes)}: "
                    f"{','.join(axes)}"
                )
            same = ("image",) if "image" in axes else ("layer", "head", "query")
            if (
                kind not in ("float16", "float32", "float64")
                or 0 in dataset.shape
                or self._length(name, "query") != self._length(name, "key")
                or any(self._length(name, axis) != self._length(first, axis) for axis in same)
            ):
                expected = ", ".join(f"{axis} {self._length(first, axis)}" for axis in same)
                raise StoreError(
                    f"{self.path}: {name} is {dataset.dtype} {dataset.shape}, taken as [{', '.join(axes)}]; expected "
                    f"post-softmax attention, floats with as many queries as keys, and as in {first}: {expected}"
                )

    def _length(self, name: str, axis: str) -> int:
        axes = self._axes[name]
        return int(self._maps[name].shape[axes.index(axis)]) if axis in axes else 1

    def _layers(self, whole_images: bool) -> Iterator[Dataset]:
        """Each layer, of one dataset that holds it for all images, or of a dataset per image."""
        names = list(self._maps)
        for sources in [names] if whole_images else [[name] for name in names]:
            first = sources[0]
            dataset = self._maps[first]
            precision = attribute(dataset, "precision")
            for number in range(self._length(first, "layer")):
                name = f"{first}[{number}]" if "layer" in self._axes[first] else first
                if whole_images:  # layer `number` of every dataset
                    name = f"layer_{number}"
                yield Dataset(
                    name=name,
                    site=attribute(dataset, "site") or name,
                    heads=self._length(first, "head"),
                    tokens=self._length(first, "query"),
                    layout=attribute(dataset, "layout"),
                    precision=precision if precision in FLOATS else "",
                    read=partial(self._read, sources, number),
                )

    def _read(self, sources: list[str], layer: int, rows: slice) -> Array:
        if "image" in self._axes[sources[0]]:
            return self._read_maps(sources[0], layer, rows)
        return np.concatenate([self._read_maps(name, layer, slice(None)) for name in sources[rows]])

    def _read_maps(self, name: str, layer: int, rows: slice) -> Array:
        """[image, head, query, key] of one layer, in the machine's byte order."""
        axes = self._axes[name]
        selected = {"image": rows, "layer": layer}
        try:
            values = np.asarray(self._maps[name][tuple(selected.get(axis, slice(None)) for axis in axes)])
        except DAMAGE as error:
            raise StoreError(f"{self.path}: {name} is damaged: {error}") from error
        kept = [axis for axis in axes if axis != "layer"]
        values = values.transpose([kept.index(axis) for axis in _AXES if axis in kept])
        missing = tuple(place for place, axis in enumerate(_AXES) if axis not in kept)
        return np.ascontiguousarray(np.expand_dims(values, missing), dtype=values.dtype.newbyteorder("="))

    def __exit__(self, *_: object) -> None:
        self._file.close()


def rehearse(path: Path, axes: Sequence[str]) -> None:
    """Read a little of each layer of a file in a copy of this process, for HDF5's library can end it on a damaged one.

    An export of ours is compared with its seal instead. Raises StoreError if either finds damage.
    """

    def read() -> None:
        began = time.monotonic()
        with AttentionFile(path, axes) as file:
            for layer in file.layers:
                for image in {0, file.num_images - 1}:
                    if time.monotonic() - began < _PATIENCE:  # large chunks of sound files take theirs
                        layer.read(slice(image, image + 1))

    if path.is_file() and not check_seal(path, SCHEMA) and (what := fatality(read)):
        raise StoreError(f"{path} is damaged: {what}; copy it again, or write it again")


def _natural(name: str) -> list[tuple[int, str]]:
    """layer_2 before layer_10."""
    return [(len(part.lstrip("0")), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
