"""What the HDF5 files of other programs say of their maps: the order of axes, names of images, labels.

Text comes as strings of any encoding, as MATLAB's characters (uint16), or as its cells (references to those); numbers
in any type, and from MATLAB as a row or a column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from store.hdf5_input import as_text, attribute, require_readable
from store.precisions import Array
from store.schema import StoreError

AXES = ("image", "layer", "head", "query", "key")
_LAYER_FIRST = ("layer", "image", "head", "query", "key")

_LABELS = {
    "image": ("image", "images", "sample", "samples", "batch"),
    "layer": ("layer", "layers", "block", "blocks"),
    "head": ("head", "heads"),
    "query": ("query", "queries", "q"),
    "key": ("key", "keys", "k"),
}
_AXIS_OF = {label: axis for axis, labels in _LABELS.items() for label in labels}
_NO_LABEL = re.compile(r"(?:(?:phony_)?dim_?\d+)?")  # what libraries write where nothing was said
_OF_A_LAYER = re.compile(r"(?:layer|block|stage|encoder|\bh)s?[ ._/-]?\d+", re.IGNORECASE)
_OF_AN_IMAGE = re.compile(r"image|img|picture|photo|sample|\.(?:jpe?g|png|tiff?|bmp|webp)\b", re.IGNORECASE)


def labelled_axes(dataset: Any) -> tuple[str, ...]:
    """The order of a dataset's axes by its dimension labels, or by the names of its scales; () if it has none.

    Raises StoreError for labels that name other things, or one of them twice.
    """
    labels = [_label(dim) for dim in dataset.dims]
    if all(_NO_LABEL.fullmatch(label) for label in labels):
        return ()
    axes = tuple(_AXIS_OF.get(label.lower(), "") for label in labels)
    if "" in axes or len(set(axes)) < len(axes) or not {"query", "key"} <= set(axes):
        raise StoreError(
            f"{dataset.file.filename}: the axes of {dataset.name.strip('/')} are labelled {', '.join(labels)}; "
            f"expected labels among {', '.join(AXES)}; say the order with --axes"
        )
    return axes


def _label(dim: Any) -> str:
    if dim.label or not len(dim):
        return str(dim.label)
    return str(dim[0].name or "").rpartition("/")[2]


def unstated_axes(shapes: dict[str, tuple[int, ...]], num_images: int | None) -> tuple[dict[str, tuple[str, ...]], str]:
    """The order of axes that nothing states (name -> axes), where one order alone fits, and why; StoreError if not.

    Args:
        shapes: name of a dataset -> its shape, of four or five axes.
        num_images: how many images the file names or labels; None: it does neither.
    """
    axes: dict[str, tuple[str, ...]] = {}
    stacked = {name: shape for name, shape in shapes.items() if len(shape) == 5}
    first, second = "[image, layer, head, query, key]", "[layer, image, head, query, key]"
    for name, shape in stacked.items():
        axes[name] = AXES if shape[1] != num_images else _LAYER_FIRST
        if (shape[0] == num_images) == (shape[1] == num_images) and shape[:2] != (1, 1):
            raise StoreError(
                f"{name} is {_text(shape)}, which may be {first} or {second}, and nothing in the file says which; "
                "say it with --axes image,layer,head,query,key or --axes layer,image,head,query,key"
            )
    flat = {name: shape for name, shape in shapes.items() if len(shape) == 4}
    named = len(flat) > 1 or all(_OF_A_LAYER.search(name) for name in flat)
    of_layers = named and not any(_OF_AN_IMAGE.search(name) for name in flat)
    fit = num_images is not None and all(shape[0] == num_images for shape in flat.values())
    if flat and not fit and (num_images is not None or not of_layers):
        name = next(iter(flat))
        raise StoreError(
            f"{name} is {_text(flat[name])}, which may be one layer [image, head, query, key] or one image [layer, "
            f"head, query, key], and {'neither fits the images it names' if num_images else 'nothing says which'}; "
            "say it with --axes image,head,query,key or --axes layer,head,query,key"
        )
    axes |= dict.fromkeys(flat, ("image", "head", "query", "key"))
    if num_images is None:
        return axes, "assumed, as nothing else is said: a dataset for each layer"
    return axes, f"for the file names or labels {num_images} images"


def _text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def read_names(dataset: Any) -> list[str]:
    """Names of images: text, or whole numbers; StoreError for anything else, or one name twice."""
    names = _texts(dataset)
    if names is None:
        names = [str(number) for number in _whole_numbers(dataset, "text or whole numbers")]
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if seen.setdefault(name, row) != row:
            raise StoreError(
                f"{_place(dataset)} names images {seen[name]} and {row} both {name!r}; expected a name for each"
            )
    return names


def read_labels(dataset: Any, class_names: Sequence[str]) -> tuple[Array, list[str]]:
    """Labels as int64, −1 where one is unknown, and the names of the classes.

    A dataset holds class indices, whose names may be known, or names of classes, which are numbered in alphabetical
    order. Raises StoreError for anything else, such as NaN or a fraction, or an index without a name.
    """
    texts = _texts(dataset)
    if texts is not None:
        classes = sorted({text for text in texts if text})
        return np.array([classes.index(text) if text else -1 for text in texts], np.int64), classes
    labels = np.array(_whole_numbers(dataset, "whole numbers or class names"), np.int64)
    highest = len(class_names) - 1 if class_names else np.iinfo(np.int64).max
    for row in np.flatnonzero((labels < -1) | (labels > highest))[:1]:
        expected = f"0 to {highest}" if class_names else "0 or more"
        raise StoreError(
            f"{_place(dataset)} holds {labels[row]} for image {row}; expected {expected}, or -1 for unknown"
        )
    return labels, list(class_names)


def _texts(dataset: Any) -> list[str] | None:
    """A dataset's texts; None if it holds numbers."""
    import h5py

    if h5py.check_string_dtype(dataset.dtype) is not None:
        return [_decoded(value) for value in np.ravel(dataset[...])]
    if h5py.check_ref_dtype(dataset.dtype) is not None:
        return [_cell(dataset, reference) for reference in np.ravel(dataset[...]) if reference]
    if dataset.dtype.kind != "u" or dataset.dtype.itemsize > 2 or dataset.ndim > 2:
        return None
    if attribute(dataset, "MATLAB_class") == "char":  # stored with its axes in reverse
        return [_characters(dataset, row) for row in np.atleast_2d(dataset[...].T)]
    if dataset.ndim == 2 and 1 not in dataset.shape:
        return [_characters(dataset, row) for row in dataset[...]]
    return None


def _cell(dataset: Any, reference: Any) -> str:
    """Text of a cell of MATLAB's."""
    import h5py

    try:
        cell = dataset.file[reference] if type(reference) is h5py.Reference else None
    except (ValueError, KeyError, RuntimeError):  # what it led to was removed
        cell = None
    if not isinstance(cell, h5py.Dataset) or cell.dtype.kind != "u":
        raise StoreError(f"{_place(dataset)} holds a reference that leads to no text; expected text in each cell")
    require_readable(dataset.file, cell.name or "a cell", cell)
    return _characters(cell, np.ravel(cell[...]))


def _characters(dataset: Any, codes: Array) -> str:
    """Text of character codes: UTF-16 in uint16, UTF-8 or Latin-1 in uint8."""
    if codes.dtype.kind != "u" or codes.dtype.itemsize > 2:
        raise StoreError(f"{_place(dataset)} is {dataset.dtype} {dataset.shape}; expected text")
    if codes.dtype.itemsize == 1:
        return _decoded(codes.tobytes())
    return codes.astype("<u2").tobytes().decode("utf-16-le", errors="replace").rstrip("\0 ")


def _decoded(value: Any) -> str:
    return (value if isinstance(value, str) else as_text(bytes(value))).rstrip("\0 ")


def _whole_numbers(dataset: Any, expected: str) -> list[int]:
    if dataset.dtype.kind not in "iuf" or sum(length != 1 for length in dataset.shape) > 1:
        raise StoreError(
            f"{_place(dataset)} is {dataset.dtype} {_text(dataset.shape)}; expected {expected}, one for each image"
        )
    values = np.ravel(dataset[...])
    for row in np.flatnonzero(~np.isfinite(values) | (values != np.trunc(values)) | (np.abs(values) >= 2.0**63))[:1]:
        raise StoreError(
            f"{_place(dataset)} holds {values[row]} for image {row}; expected {expected}, one for each image"
        )
    return [int(value) for value in values]


def _place(dataset: Any) -> str:
    return f"{dataset.file.filename}: {dataset.name.strip('/')}"


def read_class_names(file: Any) -> list[str]:
    """Names of the classes, as an export keeps them; none if the attribute is missing or something else."""
    try:
        names = json.loads(attribute(file, "class_names") or "[]")
    except (ValueError, RecursionError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def shown_precision(maps: Array) -> str:
    """What values were rounded to: bfloat16's and float16's numbers are often kept in longer formats."""
    single = maps.astype(np.float32)
    if maps.dtype == np.float16 or not np.array_equal(single, maps, equal_nan=True):
        return maps.dtype.name
    if not (single.view(np.uint32) & 0xFFFF).any():
        return "bfloat16"
    with np.errstate(over="ignore"):
        return "float16" if np.array_equal(single.astype(np.float16), single, equal_nan=True) else maps.dtype.name
