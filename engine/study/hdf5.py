"""Attention to and from HDF5: `export` writes a store's maps for other programs, `import` makes a store of theirs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from engine import __version__
from engine.config import StudyConfig
from engine.progress import ImageProgress, say
from engine.study.journal import digest_path
from kernels import TokenLayout
from kernels.inputs import ROW_SUM_TOLERANCE, valid_rows
from store import AttentionStore, AttentionWriter, LayerSchema, StoreError, StoreSchema
from store.arrays import attention_arrays
from store.encodings import ENCODINGS, resolve_encoding
from store.hdf5_attention import AttentionFile, Dataset, export_attention, is_export, rehearse
from store.hdf5_values import shown_precision
from store.places import containing_store, require_place, storage_at
from store.schema import OtherRunError, UnfinishedStoreError
from train.errors import InputError
from train.files import require_file


def export_hdf5(config: StudyConfig) -> Path:
    """Write the attention of `measure.store` as the HDF5 file `hdf5.file`, to which a link may lead.

    Raises:
        InputError: something else than an earlier export lies there, or it is in a store.
        StoreError: the store is not there, incomplete, damaged or without maps, or the file cannot be written.
    """
    path = Path(os.path.realpath(config.hdf5.file))
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is a folder or a device; give the file that the export is to be")
    if path.exists() and not is_export(path):
        raise InputError(f"{path} is there and no export of this program, so it is kept; give another file with --hdf5")
    if around := containing_store(path):
        raise InputError(f"{path} lies inside {around}, which is a store or its ledger; give another file with --hdf5")
    store = AttentionStore.open(config.measure.store)
    image_bytes = sum(array.row_bytes for array in attention_arrays(store.schema))
    with ImageProgress(f"export {path.name}", store.schema.num_images, 0, image_bytes) as progress:
        export_attention(store, path, progress.update)
    return path


def import_hdf5(config: StudyConfig) -> AttentionStore:
    """Make the store `capture.store` of the maps in the HDF5 file `hdf5.file`; `measure` takes it like any other.

    It counts only when all of the file is in it: what a failed import leaves cannot be read, and the next one, of this
    file or another, goes on from it or replaces it.

    Raises:
        InputError: no such file, the encoding keeps query and key, the axes are none, the tokens of a map
            are no grid with prefix tokens, or something else lies where the store would.
        StoreError: the file holds no post-softmax attention or does not say what it holds, or the store cannot be
            written.
    """
    encoding, axes = config.capture.encoding, config.hdf5.axes
    if resolve_encoding(encoding).keeps_factors:
        maps = " or ".join(name for name, known in ENCODINGS.items() if not known.keeps_factors)
        raise InputError(f"encoding {encoding} keeps query and key, and a file of maps has none; use {maps}")
    if axes and (len(axes) not in (4, 5) or len(set(axes)) < len(axes) or not {"query", "key"} <= set(axes)):
        raise InputError(
            f"--axes is {','.join(axes)}; expected four or five of image, layer, head, query, key, query and key among "
            "them, each once"
        )
    path = Path(config.hdf5.file)
    require_file(path, "file", "expected an HDF5 file of attention")
    with _as_bad_input():
        rehearse(path, axes)
        opened = AttentionFile(path, axes)
    with opened as file:
        say(f"import {path.name}: {file.order}: {file.num_images} images, {len(file.layers)} layers")
        if file.unused:
            more = f" and {len(file.unused) - 5} more" if len(file.unused) > 5 else ""
            say(
                f"import {path.name}: not used: {', '.join(file.unused[:5])}{more} (names of images are read from "
                "images/id, their labels from images/label)"
            )
        layouts = [_layout(path, layer, config).to_dict() for layer in file.layers]
        schema = StoreSchema(
            layers=tuple(
                LayerSchema(layer=number, site=layer.site, heads=layer.heads, layout=layouts[number])
                for number, layer in enumerate(file.layers)
            ),
            image_ids=file.image_ids,
            batch_size=config.capture.batch_size,
            encoding=encoding,
            metrics={},
            model={"name": "imported"},
            preprocessing={},
            dataset={"id": path.name, "sha256": digest_path(path)},
            precision="unknown",
            num_classes=0,
            code_version=__version__,
            extra={"whole": True},
        )
        writer = _writer(config.capture.store, schema, file)
        try:
            with writer:
                _copy(path, file, writer)
        except InputError:  # it holds something else than attention; after any other failure an import goes on from it
            AttentionWriter.discard(writer.path)
            raise
    return AttentionStore.open(config.capture.store)


def _copy(path: Path, file: AttentionFile, writer: AttentionWriter) -> None:
    """Write every batch that is not in the store yet, and say which rows of the file hold NaN."""
    schema = writer.schema
    empty = np.zeros(len(file.layers), np.int64)  # rows that hold NaN, [layer]
    image_bytes = sum(array.row_bytes for array in attention_arrays(schema))
    missing = set(writer.missing)
    with ImageProgress(f"import {path.name}", schema.num_images, 0, image_bytes) as progress:
        for batch in range(schema.num_batches):
            part = schema.batch_rows(batch)
            for number, layer in enumerate(file.layers):
                with _as_bad_input():
                    maps = layer.read(part)
                empty[number] += _checked(path, layer, maps, part.start, schema.encoding)
                if batch in missing:
                    writer.add_attention(batch, number, maps)
            if batch in missing:
                writer.commit(batch)
            progress.update(part.stop - part.start)
    for layer, count in zip(file.layers, empty, strict=True):
        if count == schema.num_images * layer.heads * layer.tokens:
            raise InputError(f"{path}: every row of {layer.name} holds NaN; expected post-softmax attention")
        if count:
            say(f"import {path.name}: {count:,} rows of {layer.name} hold NaN; they are left out and counted")
    writer.finish()


def _writer(place: str, schema: StoreSchema, file: AttentionFile) -> AttentionWriter:
    """The writer of the new store; what an unfinished import of another file left is removed first."""
    with _as_bad_input():
        require_place(storage_at(place))
    try:
        return AttentionWriter.open(place, schema, labels=file.labels, class_names=file.class_names)
    except OtherRunError:
        try:
            AttentionStore.open(place)
        except UnfinishedStoreError:
            AttentionWriter.discard(place)
            return AttentionWriter.open(place, schema, labels=file.labels, class_names=file.class_names)
        raise


@contextlib.contextmanager
def _as_bad_input() -> Iterator[None]:
    """What is wrong with a file or place that the user named is bad input."""
    try:
        yield
    except StoreError as error:
        raise InputError(str(error)) from error


def _checked(path: Path, layer: Dataset, maps: np.ndarray, first: int, encoding: str) -> int:
    """How many rows of maps, [image, head, query, key], hold NaN; all others must be post-softmax attention, and stay
    so in the store. `first` is the number of the first image.
    """
    precision = layer.precision or shown_precision(maps)
    tolerance, kept = (ROW_SUM_TOLERANCE[name] for name in (precision, resolve_encoding(encoding).precision))
    wide = maps.astype(np.float64 if maps.dtype == np.float64 else np.float32, copy=False)
    empty = np.isnan(wide).any(axis=-1)
    wrong = np.argwhere(~valid_rows(wide, min(tolerance, kept)) & ~empty)
    if not wrong.size:
        return int(empty.sum())
    image, head, query = map(int, wrong[0])
    row = f"{path}: {layer.name}: the row of image {first + image}, head {head}, query {query}"
    total = wide[image, head, query].sum()
    if valid_rows(wide[image, head, query], tolerance):
        raise InputError(
            f"{row} sums to {total:.6g}, as rows of {precision} do, and {encoding} is read as attention within "
            f"{kept:g} only; import it with --encoding bf16"
        )
    columns = valid_rows(wide[image, head].T, tolerance).all()
    hint = "; its columns do, so if keys come before queries, say so with --axes" if columns else ""
    raise InputError(
        f"{row} sums to {total:.6g} and is no post-softmax attention; expected non-negative values that sum to 1 "
        f"within {tolerance:g} ({precision}){hint}"
    )


def _layout(path: Path, layer: Dataset, config: StudyConfig) -> TokenLayout:
    """Where a dataset's tokens lie: as its attribute says, else as the configuration does."""
    keys = config.hdf5
    layout = _own_layout(layer.layout)
    if layout is not None:
        if keys.grid and keys.grid != (layout.grid_rows, layout.grid_cols):
            raise InputError(
                f"{path}: {layer.name} says that its grid is {layout.grid_rows}×{layout.grid_cols}, and --grid is "
                f"{','.join(map(str, keys.grid))}; leave --grid out, or correct the attribute layout"
            )
    elif keys.grid:
        if layer.layout:
            say(f"import {path.name}: {layer.name}'s attribute layout is not ours; --grid is taken instead")
        layout = TokenLayout(
            grid_rows=keys.grid[0],
            grid_cols=keys.grid[1],
            num_prefix_tokens=keys.prefix_tokens,
            patch_height_px=keys.patch_px[0],
            patch_width_px=keys.patch_px[1],
            class_token=keys.class_token and keys.prefix_tokens > 0,
        )
    else:
        found = f"its attribute layout is {layer.layout!r}, which is none of this program's; " if layer.layout else ""
        raise InputError(
            f"{path}: {layer.name} does not say how its {layer.tokens} tokens lie; {found}give --grid ROWS,COLS "
            "(and --hdf5.prefix_tokens, --hdf5.patch_px if they are not 1 and 16,16)"
        )
    if layout.num_tokens != layer.tokens:
        raise InputError(
            f"{path}: {layer.name} has {layer.tokens} tokens, and a grid of {layout.grid_rows}×{layout.grid_cols} "
            f"with {layout.num_prefix_tokens} prefix tokens has {layout.num_tokens}; give another --grid or "
            "--hdf5.prefix_tokens"
        )
    return layout


def _own_layout(text: str) -> TokenLayout | None:
    """The attribute `layout` as an export writes it; None for anything else."""
    try:
        return TokenLayout.from_dict(json.loads(text))
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError, RecursionError):
        return None
