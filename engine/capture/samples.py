"""`samples.zarr`: whole attention maps of a few seeded images, so that a report can show real attention.

A study keeps one; the command `capture` keeps `maps.samples.zarr` beside `maps.zarr`.

samples.zarr/   attrs: schema, class_names, region_names
  images/{pixels [image, row, col, channel], id, label, boxes}
  <run>/layer_00 [image, head, query, key] float16, attrs site, layer, layout: each layer its own
  <run>/logits [image, class], none where a model has no head
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from kernels import TokenLayout
from store.disk import making, making_alone
from store.removal import holds_only, own_zarr, schema_of
from store.schema import MARK
from store.storage import Storage
from train.errors import InputError, brief

if TYPE_CHECKING:
    import torch

    from engine.capture.attention_call import AttentionSite, SiteAttention
    from train.data import ImageSet

SCHEMA = f"{MARK}-samples/1"

_CHUNKS = r"(?:zarr\.json|c(?:[./]\d+)*)"
FILES = rf"zarr\.json|[^/]+/(?:zarr\.json|[^/]+/{_CHUNKS})"
_RUN_FILES = rf"zarr\.json|(?:layer_\d+|logits)/{_CHUNKS}"

is_samples = own_zarr(SCHEMA, FILES)  # whether a folder is a samples store with nothing else in it


@dataclass(frozen=True, slots=True)
class SampleLayer:
    """The maps of one site; `attention` [image, head, query, key] is on disk."""

    layer: int
    site: str
    layout: TokenLayout
    attention: Any

    def read(self, image: int) -> np.ndarray:
        """One image's maps, float32 [head, query, key]; InputError: they cannot be read."""
        try:
            return np.asarray(self.attention[image], dtype=np.float32)
        except Exception as error:
            raise _unreadable(self.attention.store.root / self.attention.path, error) from error


@dataclass(frozen=True, slots=True)
class SampleRun:
    """What one model made of the sample images: its layers in depth order, and logits [image, class] if it has any."""

    layers: tuple[SampleLayer, ...]
    logits: np.ndarray | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleMaps:
    """The sample images and the whole attention maps that are kept for them."""

    path: Path  # the `samples.zarr`
    pixels: np.ndarray  # uint8 [image, row, col, channel]
    ids: tuple[str, ...]  # of the images
    labels: tuple[int, ...]
    boxes: np.ndarray | None  # float32 [image, region, 4], (row0, col0, row1, col1) in pixels, or None
    regions: tuple[str, ...]  # names of the boxes
    classes: tuple[str, ...]  # class names
    runs: Mapping[str, SampleRun] = field(default_factory=dict)  # those that were asked for when it was opened, by name

    @classmethod
    def create(cls, path: Path, images: ImageSet, rows: Sequence[int]) -> Self:
        """Begin a store with these rows of the data set, the images themselves; one that is there is replaced.

        Raises:
            DiskError: it cannot be written.
            StoreError: something else lies there.
        """
        samples = cls(
            path=path,
            pixels=np.stack([images.picture(row) for row in rows]),
            ids=tuple(images.ids[row] for row in rows),
            labels=tuple(int(images.labels[row]) for row in rows),
            boxes=None if images.boxes is None else images.boxes[list(rows)].astype(np.float32),
            regions=tuple(images.region_names),
            classes=tuple(images.class_names),
        )
        with making_alone(path), making(path, is_samples) as partial:
            samples._write_images(partial)
        return samples

    @classmethod
    def open(cls, path: Path, runs: Collection[str] = ()) -> Self:
        """Read the images, and where the maps of these runs lie.

        Raises:
            InputError: it is no store of sample maps, or cannot be read.
        """
        try:
            root: Any = zarr.open_group(path, mode="r")
            if root.attrs.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {root.attrs.get('schema')!r}, expected {SCHEMA!r}")
            images = root["images"]
            return cls(
                path=path,
                pixels=np.asarray(images["pixels"][...]),
                ids=tuple(str(name) for name in np.asarray(images["id"][...])),
                labels=tuple(int(label) for label in np.asarray(images["label"][...])),
                boxes=np.asarray(images["boxes"][...]) if "boxes" in images else None,
                regions=tuple(root.attrs["region_names"]),
                classes=tuple(root.attrs["class_names"]),
                runs={name: _read_run(root[name]) for name in runs},
            )
        except Exception as error:  # zarr and the codecs share no base class
            raise _unreadable(path, error) from error

    def add(
        self, name: str, model: torch.nn.Module, images: ImageSet, rows: Sequence[int], *, device: str = "cpu"
    ) -> None:
        """Add one model's maps of the sample images as the group `name`; one that is there is replaced whole.

        Args:
            name: of the run, in a study `<condition>_seed<k>`.
            model: see `AttentionTap`.
            images, rows: as given to `create`.
            device: where the model runs.

        Raises:
            DiskError: it cannot be written.
            StoreError: a group of that name holds something else.
        """
        from engine.capture.tap import has_classes, logits_of, observe

        maps: list[tuple[AttentionSite, np.ndarray]] = []

        def keep(attention: SiteAttention) -> None:
            maps.append((attention.site, attention.maps().half().cpu().numpy()))

        output, _ = observe(model, images.batch(rows).to(device), keep)
        with making_alone(self.path / name), making(self.path / name, holds_only(_RUN_FILES)) as partial:
            group = zarr.open_group(partial, mode="w-", zarr_format=3)
            for site, values in maps:
                attributes = {"site": site.name, "layer": site.layer, "layout": site.layout.to_dict()}
                _write(group, f"layer_{site.layer:02d}", values, ("image", "head", "query", "key"), attributes)
            if has_classes(model, output):
                _write(group, "logits", logits_of(output).float().cpu().numpy(), ("image", "class"))

    def _write_images(self, partial: Path) -> None:
        root = zarr.open_group(partial, mode="w-", zarr_format=3)
        root.attrs.put({"schema": SCHEMA, "class_names": list(self.classes), "region_names": list(self.regions)})
        group = root.create_group("images")
        _write(group, "pixels", self.pixels, ("image", "row", "col", "channel"))
        _write(group, "label", np.array(self.labels, dtype=np.int64), ("image",))
        if self.boxes is not None:
            _write(group, "boxes", self.boxes, ("image", "region", "edge"))
        ids = group.create_array(
            "id",
            shape=(len(self.ids),),
            dtype=str,
            chunks=(max(len(self.ids), 1),),
            dimension_names=["image"],
            compressors=[Crc32cCodec()],
        )
        ids[:] = np.array(self.ids, dtype=object)


def choose_samples(count: int, num_images: int, seed: int) -> list[int]:
    """Rows of the sample images: `count` of them without repetition, in order, the same for a seed."""
    generator = np.random.default_rng(seed)
    return sorted(int(row) for row in generator.choice(num_images, size=min(count, num_images), replace=False))


def require_samples_place(place: Storage) -> None:
    """Check that a samples store may be put somewhere: nothing lies there, or one that is replaced.

    Raises:
        InputError: something else lies there.
    """
    if (place.is_there() or place.sizes()) and schema_of(place.fetch(["zarr.json"])[0]) != SCHEMA:
        raise InputError(
            f"{place} is in the way: sample maps go there, and it is something else; move it away, or give the store "
            "another name"
        )
    place.own_files(FILES)


def _unreadable(place: Any, error: Exception) -> InputError:
    return InputError(
        f"{place}: cannot be read as the sample maps that capture keeps ({brief(error)}); run capture again"
    )


def _read_run(group: Any) -> SampleRun:
    layers = tuple(
        SampleLayer(
            int(key.removeprefix("layer_")), array.attrs["site"], TokenLayout.from_dict(array.attrs["layout"]), array
        )
        for key, array in sorted(group.arrays())
        if key.startswith("layer_")
    )
    return SampleRun(layers, np.asarray(group["logits"][...]) if "logits" in group else None)


def _write(
    group: zarr.Group,
    name: str,
    values: np.ndarray,
    dimensions: Sequence[str],
    attributes: dict[str, Any] | None = None,
) -> None:
    """One array, one chunk per image, checksummed."""
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
