"""What a study kept to be looked at: sample maps of the runs in its table, and Grad-CAM pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from engine.capture import SampleMaps
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


def load_samples(path: Path, table: xr.Dataset, usable: Callable[[Path], bool]) -> SampleMaps | None:
    """The kept maps of the table's runs; `usable` says of a file or folder whether it may be read."""
    # Not of the whole store: of seeds that the study had once, maps are recorded that are gone since.
    if not (usable(path / "zarr.json") and usable(path / "images")):
        return None
    names = [f"{condition}_seed{seed}" for condition in table["condition"].values for seed in table["seed"].values]
    runs = [name for name in names if usable(path / name)]
    return SampleMaps.open(path, runs) if runs else None  # none: images of a study that keeps no maps any more


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
