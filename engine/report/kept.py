"""What a study kept to be looked at: sample images with their whole attention maps, and Grad-CAM pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from engine.report.reading import brief
from train.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class GradcamSample:
    """One Grad-CAM picture; `role` says what the target class is to the image: "true", "other" or "predicted"."""

    file: Path
    image: str
    condition: str
    target: str
    role: str
    probability: float | None


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """The kept maps of one layer in one run: `attention` [image, head, query, key], read on demand."""

    layer: int
    site: str
    layout: Mapping[str, Any]
    attention: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """The sample images and the whole attention maps kept for them.

    Args:
        pixels: uint8 [image, row, col, channel].
        ids, labels: of the images.
        boxes: float [image, region, 4], (row0, col0, row1, col1) in pixels, or None.
        regions: names of the boxes.
        classes: class names, or empty.
        runs: (condition, seed) -> layers in depth order.
        logits: (condition, seed) -> [image, class].
    """

    pixels: np.ndarray
    ids: tuple[str, ...]
    labels: tuple[int, ...]
    boxes: np.ndarray | None
    regions: tuple[str, ...]
    classes: tuple[str, ...]
    runs: Mapping[tuple[str, int], tuple[LayerSamples, ...]]
    logits: Mapping[tuple[str, int], np.ndarray]


def load_samples(path: Path, table: xr.Dataset, usable: Callable[[Path], bool]) -> Samples | None:
    """The kept maps of the table's runs; `usable` says of a file or folder whether it may be read."""
    # Not of the whole store: of seeds that the study had once, maps are recorded that are gone since.
    if not (usable(path / "zarr.json") and usable(path / "images")):
        return None
    try:
        root = zarr.open_group(path, mode="r")
        images = root["images"]
        assert isinstance(images, zarr.Group)
        runs: dict[tuple[str, int], tuple[LayerSamples, ...]] = {}
        logits = {}
        for condition in (str(name) for name in table["condition"].values):
            for seed in (int(value) for value in table["seed"].values):
                name = f"{condition}_seed{seed}"
                if not usable(path / name):
                    continue
                group = root[name]
                assert isinstance(group, zarr.Group)
                runs[condition, seed] = tuple(
                    LayerSamples(
                        int(key.removeprefix("layer_")),
                        str(array.attrs["site"]),
                        _mapping(array.attrs["layout"]),
                        array,
                    )
                    for key, array in sorted(group.arrays())
                    if key.startswith("layer_")
                )
                if "logits" in group:
                    logits[condition, seed] = np.asarray(_array(group, "logits"))
        if not runs:  # images of a study that keeps no maps any more
            return None
        return Samples(
            pixels=np.asarray(_array(images, "pixels")),
            ids=tuple(str(value) for value in np.asarray(_array(images, "id"))),
            labels=tuple(int(value) for value in np.asarray(_array(images, "label"))),
            boxes=np.asarray(_array(images, "boxes"), dtype=np.float64) if "boxes" in images else None,
            regions=tuple(str(name) for name in _sequence(root.attrs.get("region_names"))),
            classes=tuple(str(name) for name in _sequence(root.attrs.get("class_names"))),
            runs=runs,
            logits=logits,
        )
    except InputError:
        raise
    except Exception as error:  # zarr and the codecs share no base class
        raise InputError(
            f"{path}: cannot be read as the sample maps that capture keeps ({brief(error)}); run capture again"
        ) from error


def load_gradcam(folder: Path) -> Iterator[GradcamSample]:
    table = folder / "gradcam_samples.csv"
    if not table.exists():
        return
    try:
        rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"), newline=""), restval="", strict=True)
        missing = {"file", "image", "condition", "target"} - set(rows.fieldnames or ())
        entries = [(row, _number(row.get("probability") or None)) for row in rows]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({brief(error)}); run the relevance stage again") from error
    if missing:
        raise InputError(f"{table}: has no column {sorted(missing)[0]}; run the relevance stage again")
    for row, probability in entries:
        file = folder / row["file"]
        if file.resolve().parent != folder.resolve():
            raise InputError(f"{table}: names {row['file']!r}, which does not lie beside it")
        if not file.is_file():
            raise InputError(f"{file}: not found, though {table.name} lists it; run the relevance stage again")
        yield GradcamSample(
            file=file,
            image=row["image"],
            condition=row["condition"],
            target=row["target"],
            role=row.get("role") or "",
            probability=probability,
        )


def _number(value: Any) -> float | None:
    """None for null and NaN; "inf" and "-inf" are numbers."""
    if value is None:
        return None
    number = float(value)
    return None if np.isnan(number) else number


def _array(group: zarr.Group, name: str) -> Any:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise TypeError(f"{name} is a group; expected an array")
    return array[...]


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"layout is a {type(value).__name__}; expected an object")
    return value


def _sequence(value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise TypeError(f"names are a {type(value).__name__}; expected a list")
    return value
