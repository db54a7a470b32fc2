"""`samples.zarr`: whole attention maps of a few seeded images, so that a report can show real attention.

A study keeps one; the command `capture` keeps `maps.samples.zarr` beside `maps.zarr`.

samples.zarr/   attrs: schema, class_names, region_names
  images/{pixels [image, row, col, channel], id, label, boxes}
  <condition>_seed<k>/layer_00 [image, head, query, key] float16, attrs site, layout;  logits [image, class]
                                                                                       (none where a model has no head)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from engine.capture.attention_call import attention_map
from engine.capture.tap import AttentionSite, AttentionTap, evaluating, has_classes
from store.disk import making
from store.removal import holds_only, own_zarr, schema_of
from store.schema import MARK, StoreError
from store.storage import Storage
from train.data import ImageSet
from train.errors import InputError

SCHEMA = f"{MARK}-samples/1"

_CHUNKS = r"(?:zarr\.json|c(?:[./]\d+)*)"
FILES = rf"zarr\.json|[^/]+/(?:zarr\.json|[^/]+/{_CHUNKS})"
_RUN_FILES = rf"zarr\.json|(?:layer_\d+|logits)/{_CHUNKS}"


def choose_samples(count: int, num_images: int, seed: int) -> list[int]:
    """Rows of the sample images: `count` of them without repetition, in order, the same for a seed."""
    generator = np.random.default_rng(seed)
    return sorted(int(row) for row in generator.choice(num_images, size=min(count, num_images), replace=False))


def start_samples(path: Path, images: ImageSet, rows: Sequence[int]) -> None:
    """Begin a samples store with the images themselves; one that is there is replaced.

    Args:
        path: the `samples.zarr`.
        images: the data set.
        rows: rows of the samples.

    Raises:
        DiskError: it cannot be written.
        StoreError: something else lies there.
    """
    pixels = np.stack([images.picture(row) for row in rows])
    with making(path, is_samples) as partial:
        _write_images(partial, pixels, images, rows)


def _write_images(partial: Path, pixels: np.ndarray, images: ImageSet, rows: Sequence[int]) -> None:
    root = zarr.open_group(
        partial,
        mode="w-",
        zarr_format=3,
        attributes={
            "schema": SCHEMA,
            "class_names": list(images.class_names),
            "region_names": list(images.region_names),
        },
    )
    group = root.create_group("images")
    _write(group, "pixels", pixels, ("image", "row", "col", "channel"))
    _write(group, "label", np.asarray(images.labels)[list(rows)], ("image",))
    if images.boxes is not None:
        _write(group, "boxes", images.boxes[list(rows)].astype(np.float32), ("image", "region", "edge"))
    names = group.create_array(
        "id",
        shape=(len(rows),),
        dtype=str,
        chunks=(max(len(rows), 1),),
        dimension_names=["image"],
        compressors=[Crc32cCodec()],
    )
    names[:] = np.array([images.ids[row] for row in rows], dtype=object)


def is_samples(path: Path) -> bool:
    """Whether a folder is a samples store with nothing else in it."""
    return own_zarr(SCHEMA, FILES)(path)


def require_samples_place(there: Storage) -> None:
    """Check that a samples store may be put somewhere: nothing lies there, or one that is replaced.

    Raises:
        InputError: something else lies there.
    """
    if (there.is_there() or there.sizes()) and schema_of(there.fetch(["zarr.json"])[0]) != SCHEMA:
        raise InputError(
            f"{there} is in the way: sample maps go there, and it is something else; move it away, or give the store "
            "another name"
        )
    there.own_files(FILES)


def add_sample_maps(
    path: Path, name: str, model: torch.nn.Module, images: ImageSet, rows: Sequence[int], *, device: str = "cpu"
) -> None:
    """Add one model's maps of the sample images as the group `name`; one that is there is replaced whole.

    Args:
        path: a store begun by `start_samples`.
        name: of the group, `<condition>_seed<k>`.
        model: see `AttentionTap`.
        images, rows: as given to `start_samples`.
        device: where the model runs.

    Raises:
        DiskError: it cannot be written.
        StoreError: it is not, or a group of that name holds something else.
    """
    maps: list[tuple[AttentionSite, np.ndarray]] = []

    def keep(
        site: AttentionSite, query: torch.Tensor, key: torch.Tensor, scale: float, bias: torch.Tensor | None
    ) -> None:
        maps.append((site, attention_map(query, key, scale, bias).to(torch.float16).cpu().numpy()))

    with evaluating(model), torch.inference_mode(), AttentionTap(model, keep):
        logits = model(images.batch(rows).to(device))
    if schema_of((path / "zarr.json").read_bytes()) != SCHEMA:
        raise StoreError(f"{path} is no store of sample maps, so none are put into it")
    with making(path / name, holds_only(_RUN_FILES)) as partial:  # a group of the samples store
        group = zarr.open_group(partial, mode="w-", zarr_format=3)
        for site, values in maps:
            _write(
                group,
                f"layer_{site.layer:02d}",
                values,
                ("image", "head", "query", "key"),
                {"site": site.name, "layer": site.layer, "layout": site.layout.to_dict()},
            )
        if has_classes(model):
            _write(group, "logits", logits.float().cpu().numpy(), ("image", "class"))


def _write(
    group: zarr.Group,
    name: str,
    values: np.ndarray,
    dimensions: Sequence[str],
    attributes: dict[str, Any] | None = None,
) -> None:
    """One array, one chunk an image, checksummed."""
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, *values.shape[1:]),
        dimension_names=list(dimensions),
        serializer=BytesCodec(),
        compressors=[
            BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=values.dtype.itemsize),
            Crc32cCodec(),
        ],
        attributes=attributes or {},
    )
    array[...] = values
