"""Loads what a study left in its outputs folder and checks that it fits together.

Nothing here needs the model, the images or a deep-learning package: the report is a function of the stored files.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import xarray as xr

from engine.capture import SampleMaps
from engine.config import COMPARISON, METRICS_TABLE, SAMPLES, STUDY, TRAINING, chosen_metrics, run_name
from engine.measure import read_table
from engine.report.marks import PALETTE
from engine.statistics import Cluster, Comparison, PairedTest, parse_comparison
from kernels import METRICS
from train.errors import InputError, brief

GRADCAM = Path("visualizations/gradcam_samples")


class Record(Protocol):
    """What is known of how a folder's files were made: whether anything `exists`, whether a file is `usable` or at
    least `require`d (both raise InputError where it is not as its stage left it), which stages `failed` and why, and
    how many seconds each took.
    """

    def exists(self) -> bool: ...
    def usable(self, path: Path) -> bool: ...
    def require(self, path: Path) -> None: ...
    def failed(self) -> dict[str, str]: ...
    def stage_seconds(self) -> dict[str, float]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GradcamSample:
    """One Grad-CAM picture; `role` says what the target class is to the image: "true", "other" or "predicted"."""

    file: Path
    image: str
    condition: str
    target: str
    role: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A study's stored results: the table [condition, seed, image, layer, head(, region)], what was made of it and
    what was kept to be looked at.
    """

    outputs: Path
    table: xr.Dataset  # one variable per metric
    conditions: tuple[str, ...]
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    layers: tuple[int, ...]  # numbers of those measured, as `heads`; a layer with fewer heads holds no value there
    heads: tuple[int, ...]
    regions: tuple[str, ...]
    num_images: int
    document: Comparison  # its `layers` are the module names of the layers
    against: str  # the condition that the others are compared with
    alpha: float  # as the results were made with, like `power` and `confidence`
    power: float
    confidence: float
    record: Record
    training: Mapping[str, Any] | None  # None where nothing was trained
    samples: SampleMaps | None  # None where no maps were kept
    gradcam: tuple[GradcamSample, ...]
    study: Mapping[str, Any]  # `study.toml` parsed, to be shown
    study_text: str  # as written, "" if there is none
    failed: Mapping[str, str]  # stage -> reason, of the stages that failed and left nothing
    stage_seconds: Mapping[str, float]  # without the report's own, or the page could not be built with the same bytes

    @property
    def later_settings(self) -> Mapping[str, tuple[Any, Any]]:
        """What `study.toml` says of the statistics now, and what the results were made with, where that differs."""
        now = self.study.get("statistics", {})
        made_with = asdict(self.document.settings)
        return {key: (now[key], value) for key, value in made_with.items() if key in now and now[key] != value}

    def attribute(self, name: str) -> Mapping[str, Any]:
        """An attribute of the table that holds an object, kept as JSON text; a plain text is its `name`."""
        value = self.table.attrs.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                return {"name": value, "id": value}
        return value if isinstance(value, Mapping) else {}

    @property
    def primary(self) -> tuple[str, ...]:
        """The metrics whose layer means are the primary family."""
        tested = {test.metric for test in self.document.tests if test.role == "primary"}
        return tuple(metric for metric in self.metrics if metric in tested)

    def seed_invariant(self, condition: str) -> bool:
        """Whether no seed can change this condition's attention (a frozen backbone)."""
        if "seed_invariant" not in self.table.coords:
            return False
        return bool(self.table["seed_invariant"].sel(condition=condition).item())

    def title(self, metric: str) -> str:
        """A heading: "mean distance" for `distance`, where the table gives one."""
        return str(self.table[metric].attrs.get("title") or metric.replace("_", " "))

    def heading(self, metric: str, region: str | None) -> str:
        """A metric's title, with the region that it is of."""
        return self.title(metric) if region is None else f"{self.title(metric)}: {region}"

    def unit(self, metric: str) -> str:
        """The unit in words; "" for a pure number."""
        unit = str(self.table[metric].attrs.get("units", ""))
        return "" if unit == "1" else unit

    def region_area(self, region: str) -> float | None:
        """A region's share of the area, mean over images; None in a table that does not say."""
        if "region_area" not in self.table.coords:
            return None
        return float(self.table["region_area"].sel(region=region).mean())

    def comparisons(self) -> tuple[tuple[str, str], ...]:
        """(condition, against) pairs that were tested, in the table's order of conditions."""
        pairs = {(test.condition, test.against) for test in self.document.tests}
        order = {name: index for index, name in enumerate(self.conditions)}
        return tuple(sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]])))

    def select(self, level: str, **where: Any) -> tuple[PairedTest, ...]:
        """Tests of a level whose fields equal `where`."""
        return tuple(test for test in self.document.tests if test.level == level and matches(test, where))

    def clusters(self, **where: Any) -> tuple[Cluster, ...]:
        """Clusters that survive, whose fields equal `where`."""
        return tuple(c for c in self.document.clusters if c.survives(self.alpha) and matches(c, where))

    def color(self, condition: str) -> int:
        """A condition's colour: the same in every chart."""
        return self.conditions.index(condition) % len(PALETTE) if condition in self.conditions else 0

    def has_regions(self, metric: str) -> bool:
        return "region" in self.table[metric].dims

    def unpaired_note(self, condition: str) -> str:
        """Why heads of one number do not belong together in a condition and `against`; "" where they do."""
        pairing = self.document.head_pairing.get(condition)
        return pairing.note if pairing else ""

    def regions_of(self, metric: str) -> tuple[str | None, ...]:
        """The regions that a metric was taken in; (None,) of one without regions."""
        return self.regions if self.has_regions(metric) else (None,)

    def series(self) -> Iterator[tuple[str, str | None]]:
        """(metric, region): one entry per metric, or one per region for metrics that have regions."""
        return ((metric, region) for metric in self.metrics for region in self.regions_of(metric))


def matches(entry: Any, where: Mapping[str, Any]) -> bool:
    """Whether an entry's fields equal `where`."""
    return all(getattr(entry, key) == value for key, value in where.items())


def load_results(outputs: Path, record: Record) -> Results:
    """Everything the report needs, from the outputs folder alone; `record` says which of its files may be read.

    Raises:
        InputError: a needed file is missing, cannot be read, or does not fit the others; one sentence says which.
    """
    if not outputs.is_dir():
        raise InputError(f"{outputs}: no such folder; expected the outputs folder of a study")
    for needed in (METRICS_TABLE, COMPARISON):
        record.require(outputs / needed)
    table = chosen_metrics(read_table(outputs / METRICS_TABLE))
    document = load_json(outputs / COMPARISON, "written by the statistics stage; run the study first")
    comparison = parse_comparison(document, outputs / COMPARISON)
    # Metrics stand as in METRICS, a user's own after them.
    names = sorted(str(name) for name in table.data_vars)
    table = table[[name for name in METRICS if name in names] + [name for name in names if name not in METRICS]]
    if len(comparison.layers) != table.sizes["layer"]:
        raise InputError(
            f"{outputs / COMPARISON}: lists {len(comparison.layers)} layers but {METRICS_TABLE} has "
            f"{table.sizes['layer']}; they come from different runs, so run the statistics stage again"
        )
    _check_names(comparison, table, outputs / COMPARISON)
    training = None
    if record.usable(outputs / TRAINING):
        training = load_json(outputs / TRAINING, "written by the train stage")
    study, study_text = _load_study(outputs / STUDY) if record.usable(outputs / STUDY) else ({}, "")
    stages = record.stage_seconds()
    stages.pop("report", None)
    return Results(
        outputs=outputs,
        table=table,
        conditions=tuple(map(str, table["condition"].values)),
        metrics=tuple(map(str, table.data_vars)),
        seeds=tuple(table["seed"].values.tolist()),
        layers=tuple(table["layer"].values.tolist()),
        heads=tuple(table["head"].values.tolist()),
        regions=tuple(map(str, table["region"].values)) if "region" in table.coords else (),
        num_images=table.sizes["image"],
        document=comparison,
        against=comparison.settings.against,
        alpha=comparison.settings.alpha,
        power=comparison.settings.power,
        confidence=comparison.settings.confidence,
        record=record,
        training=training,
        samples=_load_samples(outputs / SAMPLES, table, record),
        gradcam=tuple(_load_gradcam(outputs / GRADCAM)) if record.usable(outputs / GRADCAM) else (),
        study=study,
        study_text=study_text,
        failed=record.failed(),
        stage_seconds=stages,
    )


def _check_names(analyses: Comparison, table: xr.Dataset, path: Path) -> None:
    conditions = {str(name) for name in table["condition"].values}
    known = {axis: [int(value) for value in table[axis].values] for axis in ("layer", "head")}
    for part in ("tests", "trends", "clusters", "relations"):
        for index, entry in enumerate(getattr(analyses, part)):
            where = f"{path}: {part}[{index}]"
            for name in (entry.condition, entry.against):
                if name not in conditions:
                    raise InputError(f"{where} names condition {name!r}, which {METRICS_TABLE} has not")
            if entry.metric not in table.data_vars:
                raise InputError(f"{where} names metric {entry.metric!r}, which {METRICS_TABLE} has not")
            for axis, values in known.items():
                value = getattr(entry, axis, None)
                if value is not None and value not in values:
                    raise InputError(f"{where}.{axis} is {value}, which {METRICS_TABLE} has not")


def _load_study(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({brief(error)})") from error


def _load_samples(path: Path, table: xr.Dataset, record: Record) -> SampleMaps | None:
    """The kept maps of the table's runs; maps are recorded, too, of seeds that the study had once."""
    if not (record.usable(path / "zarr.json") and record.usable(path / "images")):
        return None
    names = [run_name(condition, seed) for condition in table["condition"].values for seed in table["seed"].values]
    runs = [name for name in names if record.usable(path / name)]
    return SampleMaps.open(path, runs) if runs else None  # none: images of a study that keeps no maps any more


def _load_gradcam(folder: Path) -> Iterator[GradcamSample]:
    table = folder / "gradcam_samples.csv"
    if not table.exists():
        return
    columns = ("image", "condition", "target", "role")
    try:
        rows = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"), newline=""), restval="", strict=True)
        missing = {"file", "probability", *columns} - set(rows.fieldnames or ())
        entries = [] if missing else [(row, float(row["probability"])) for row in rows]
    except (ValueError, csv.Error) as error:
        raise InputError(f"{table}: cannot be read ({brief(error)}); run the relevance stage again") from error
    if missing:
        raise InputError(f"{table}: has no column {min(missing)}; run the relevance stage again")
    for row, probability in entries:
        file = folder / row["file"]
        if file.resolve().parent != folder.resolve():
            raise InputError(f"{table}: names {row['file']!r}, which does not lie beside it")
        if not file.is_file():
            raise InputError(f"{file}: not found, though {table.name} lists it; run the relevance stage again")
        yield GradcamSample(file=file, probability=probability, **{name: row[name] for name in columns})


def load_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON object; `hint` says in the error of a file that is missing or torn where it comes from."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; it is {hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({brief(error)}); it is {hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value
