"""Loads what a study left in its outputs folder and checks that it fits together.

Nothing here needs the model, the images or a deep-learning package: the report is a function of the stored files.
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from engine.config import StatisticsConfig
from kernels import METRICS
from train.errors import InputError

__all__ = ["GradcamSample", "LayerSamples", "PairedTest", "Results", "Samples", "load_results"]

METRICS_TABLE = Path("metrics/attention_metrics.zarr")
COMPARISON = Path("metrics/attention_comparison.json")
TRAINING = Path("metrics/training.json")
SAMPLES = Path("samples.zarr")
GRADCAM = Path("visualizations/gradcam_samples")
STUDY = Path("study.toml")
RUN_LOG = Path("run.jsonl")

TABLE_DIMS = ("condition", "seed", "image", "layer", "head")
LEVELS = ("head", "layer", "class", "seed", "layer_means")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """One paired comparison, `condition` − `against`, as `attention_comparison.json` holds it.

    `level` says what one test covers: "head" (a layer and head), "layer" (a layer, mean over its heads),
    "seed" (differences between training runs) or "layer_means" (the t-test over layer means, kept for
    comparison only). Numbers are in `unit`; None where the file holds null.
    """

    condition: str
    against: str
    metric: str
    unit: str
    level: str
    unit_of_inference: str
    family: str
    region: str | None = None
    layer: int | None = None
    site: str | None = None
    head: int | None = None
    n: int | None = None
    missing: int | None = None
    mean_against: float | None = None
    mean_condition: float | None = None
    difference: float | None = None
    dz: float | None = None
    gz: float | None = None
    ci: tuple[float | None, float | None] = (None, None)
    t: float | None = None
    p: float | None = None
    p_wilcoxon: float | None = None
    p_max_t: float | None = None
    p_holm: float | None = None
    p_bh: float | None = None
    ci_method: str = ""
    degenerate: str = ""


_REQUIRED = ("condition", "against", "metric", "unit", "level", "unit_of_inference", "family")
_COUNTS = ("layer", "head", "n", "missing")
_NUMBERS = (
    "mean_against",
    "mean_condition",
    "difference",
    "dz",
    "gz",
    "t",
    "p",
    "p_wilcoxon",
    "p_max_t",
    "p_holm",
    "p_bh",
)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A study's stored results.

    Args:
        outputs: the folder.
        table: dims (condition, seed, image, layer, head[, region]), one variable a metric.
        sites: layer -> module name, in depth order.
        tests: every paired comparison of the study.
        controls, accuracy, data, undefined: as in `attention_comparison.json`.
        prefix_mass_warning: what capture had to say about prefix mass, or "".
        training: `training.json`, or None where nothing was trained.
        samples: None where no maps were kept.
        gradcam: pictures, in the order of their table.
        study: `study.toml` parsed; study_text: as written ("" if there is none).
        stage_seconds: stage -> seconds of its last completed run, the report's own left out: a page that
            held it could not be rebuilt with the same bytes.
    """

    outputs: Path
    table: xr.Dataset
    sites: tuple[str, ...]
    tests: tuple[PairedTest, ...]
    controls: tuple[Mapping[str, Any], ...] = ()
    accuracy: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    undefined: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    prefix_mass_warning: str = ""
    training: Mapping[str, Any] | None = None
    samples: Samples | None = None
    gradcam: tuple[GradcamSample, ...] = ()
    study: Mapping[str, Any] = field(default_factory=dict)
    study_text: str = ""
    stage_seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def conditions(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.table["condition"].values)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.table.data_vars)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(int(seed) for seed in self.table["seed"].values)

    @property
    def layers(self) -> tuple[int, ...]:
        """The measured layers' numbers in depth order; a study may measure some layers only."""
        return tuple(int(layer) for layer in self.table["layer"].values)

    @property
    def regions(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.table["region"].values) if "region" in self.table.coords else ()

    @property
    def num_images(self) -> int:
        return int(self.table.sizes["image"])

    @property
    def alpha(self) -> float:
        """Level below which an adjusted p-value counts as surviving."""
        return float(self._statistics("alpha", StatisticsConfig().alpha))

    @property
    def confidence(self) -> float:
        """Coverage of the intervals."""
        return float(self._statistics("confidence", StatisticsConfig().confidence))

    def _statistics(self, key: str, default: Any) -> Any:
        return self.study.get("statistics", {}).get(key, default)

    def attribute(self, name: str) -> Mapping[str, Any]:
        """An attribute of the table that holds an object, kept as JSON text; a plain text is its `name`."""
        value = self.table.attrs.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                return {"name": value, "id": value}
        return value if isinstance(value, Mapping) else {}

    def seed_invariant(self, condition: str) -> bool:
        """Whether no seed can change this condition's attention (a frozen backbone)."""
        if "seed_invariant" not in self.table.coords:
            return False
        return bool(self.table["seed_invariant"].sel(condition=condition).item())

    def title(self, metric: str) -> str:
        """A heading: "mean distance" for `distance`, where the table gives one."""
        return str(self.table[metric].attrs.get("title") or metric.replace("_", " "))

    def unit(self, metric: str) -> str:
        """The unit in words; "" for a pure number."""
        unit = str(self.table[metric].attrs.get("units", ""))
        return "" if unit == "1" else unit

    def comparisons(self) -> tuple[tuple[str, str], ...]:
        """(condition, against) pairs that were tested, in the table's order of conditions."""
        pairs = {(test.condition, test.against) for test in self.tests}
        order = {name: index for index, name in enumerate(self.conditions)}
        return tuple(sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]])))

    def select(self, level: str, **where: Any) -> tuple[PairedTest, ...]:
        """Tests of a level whose fields equal `where`."""
        return tuple(
            test
            for test in self.tests
            if test.level == level and all(getattr(test, key) == value for key, value in where.items())
        )

    def series(self) -> Iterator[tuple[str, str | None]]:
        """(metric, region): one entry a metric, or one a region for metrics that have regions."""
        for metric in self.metrics:
            if "region" in self.table[metric].dims:
                for region in self.regions:
                    yield metric, region
            else:
                yield metric, None


def load_results(outputs: Path) -> Results:
    """Everything the report needs, from the outputs folder alone.

    Raises:
        InputError: a needed file is missing, cannot be read, or does not fit the others; one sentence says which.
    """
    if not outputs.is_dir():
        raise InputError(f"{outputs}: no such folder; expected the outputs folder of a study")
    table = _load_table(outputs / METRICS_TABLE)
    comparison = _load_json(outputs / COMPARISON, "written by the comparison stage; run the study first")
    if comparison.get("schema") != 1:
        raise InputError(
            f"{outputs / COMPARISON}: schema is {comparison.get('schema')!r}; this version reads schema 1; "
            "run the comparison stage again"
        )
    # Zarr lists arrays in whatever order the file system does: metrics stand as in METRICS, a user's own after them.
    names = sorted(str(name) for name in table.data_vars)
    table = table[[name for name in METRICS if name in names] + [name for name in names if name not in METRICS]]
    sites = tuple(str(site) for site in comparison.get("layers", ()))
    if len(sites) != table.sizes["layer"]:
        raise InputError(
            f"{outputs / COMPARISON}: lists {len(sites)} layers but {METRICS_TABLE} has {table.sizes['layer']}; "
            "they come from different runs, so run the comparison stage again"
        )
    tests = tuple(_load_tests(comparison.get("tests", ()), outputs / COMPARISON))
    _check_names(tests, table, outputs / COMPARISON)
    training = None
    if (outputs / TRAINING).exists():
        training = _load_json(outputs / TRAINING, "written by the train stage")
    study, study_text = _load_study(outputs / STUDY)
    return Results(
        outputs=outputs,
        table=table,
        sites=sites,
        tests=tests,
        controls=tuple(comparison.get("controls", ())),
        accuracy=comparison.get("accuracy") or {},
        data=comparison.get("data") or {},
        undefined=comparison.get("undefined") or {},
        prefix_mass_warning=_sentence(comparison.get("prefix_mass_warning")),
        training=training,
        samples=_load_samples(outputs / SAMPLES, table),
        gradcam=tuple(_load_gradcam(outputs / GRADCAM)),
        study=study,
        study_text=study_text,
        stage_seconds=_load_stage_seconds(outputs / RUN_LOG),
    )


def _load_table(path: Path) -> xr.Dataset:
    if not path.exists():
        raise InputError(f"{path}: not found; expected the table that the measure stage writes, so run the study first")
    try:
        # consolidated=False: works whether or not the writer consolidated, without xarray's warning.
        table: xr.Dataset = xr.open_zarr(path, consolidated=False).load()
    except Exception as error:  # zarr, xarray and the codecs share no base class
        raise InputError(f"{path}: cannot be read as an xarray table in Zarr ({_brief(error)})") from error
    missing = [name for name in TABLE_DIMS if name not in table.dims]
    if missing or not table.data_vars:
        what = f"no dimension {', '.join(missing)}" if missing else "no metric"
        raise InputError(f"{path}: has {what}; expected one variable a metric over {', '.join(TABLE_DIMS)}")
    for name, values in table.data_vars.items():
        expected = (*TABLE_DIMS, "region") if "region" in values.dims else TABLE_DIMS
        if tuple(values.dims) != expected:
            raise InputError(f"{path}: {name} has dimensions {tuple(values.dims)}; expected {expected}")
    for coordinate in TABLE_DIMS:
        if coordinate not in table.coords:
            raise InputError(f"{path}: has no coordinate {coordinate}; expected one value a {coordinate}")
    if any("region" in values.dims for values in table.data_vars.values()) and "region" not in table.coords:
        raise InputError(f"{path}: has no coordinate region; expected the names of the regions")
    return table


def _load_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: not found; it is {hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({_brief(error)}); it is {hint}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a {type(value).__name__}; expected a JSON object")
    return value


def _load_tests(entries: Any, path: Path) -> Iterator[PairedTest]:
    if not isinstance(entries, list):
        raise InputError(f"{path}: tests is a {type(entries).__name__}; expected a list")
    known = {f.name for f in fields(PairedTest)}
    for index, entry in enumerate(entries):
        absent = [key for key in _REQUIRED if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
        if absent:
            raise InputError(f"{path}: tests[{index}] has no {absent[0]}; expected a string")
        if entry["level"] not in LEVELS:
            raise InputError(f"{path}: tests[{index}].level is {entry['level']!r}; expected one of {', '.join(LEVELS)}")
        values = {key: value for key, value in entry.items() if key in known}
        try:
            for key in _NUMBERS:
                values[key] = _number(entry.get(key))
            for key in _COUNTS:
                values[key] = None if entry.get(key) is None else int(entry[key])
            low, high = entry.get("ci") or (None, None)
            values["ci"] = (_number(low), _number(high))
            for key in ("ci_method", "degenerate"):
                values[key] = str(entry.get(key) or "")
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: tests[{index}] holds something that is not a number ({error})") from error
        yield PairedTest(**values)


def _check_names(tests: tuple[PairedTest, ...], table: xr.Dataset, path: Path) -> None:
    conditions = {str(name) for name in table["condition"].values}
    metrics = {str(name) for name in table.data_vars}
    known = {axis: [int(value) for value in table[axis].values] for axis in ("layer", "head")}
    for index, test in enumerate(tests):
        for name in (test.condition, test.against):
            if name not in conditions:
                raise InputError(f"{path}: tests[{index}] names condition {name!r}, which {METRICS_TABLE} has not")
        if test.metric not in metrics:
            raise InputError(f"{path}: tests[{index}] names metric {test.metric!r}, which {METRICS_TABLE} has not")
        for axis, values in known.items():
            value = getattr(test, axis)
            if value is not None and value not in values:
                raise InputError(f"{path}: tests[{index}].{axis} is {value}, which {METRICS_TABLE} has not")


def _load_samples(path: Path, table: xr.Dataset) -> Samples | None:
    if not path.exists():
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
                if name not in root:
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
    except Exception as error:  # zarr and the codecs share no base class
        raise InputError(
            f"{path}: cannot be read as the sample maps that capture keeps ({_brief(error)}); run capture again"
        ) from error


def _load_gradcam(folder: Path) -> Iterator[GradcamSample]:
    table = folder / "gradcam_samples.csv"
    if not table.exists():
        return
    with table.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines)
        missing = {"file", "image", "condition", "target"} - set(rows.fieldnames or ())
        if missing:
            raise InputError(f"{table}: has no column {sorted(missing)[0]}; run the relevance stage again")
        for row in rows:
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
                probability=_number(row.get("probability") or None),
            )


def _load_study(path: Path) -> tuple[dict[str, Any], str]:
    if not path.exists():
        return {}, ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({_brief(error)})") from error


def _load_stage_seconds(path: Path) -> dict[str, float]:
    """Seconds of each stage's last completed run; a line torn by a kill ends the log."""
    seconds: dict[str, float] = {}
    if not path.exists():
        return seconds
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # a killed run may leave half a line; times are for information only
        if not isinstance(entry, dict) or entry.get("event") == "skipped" or entry.get("stage") in (None, "report"):
            continue
        if isinstance(entry.get("seconds"), int | float):
            seconds[str(entry["stage"])] = float(entry["seconds"])
    return seconds


def _number(value: Any) -> float | None:
    """None for null and NaN; "inf" and "-inf" are numbers."""
    if value is None:
        return None
    number = float(value)
    return None if np.isnan(number) else number


def _sentence(value: Any) -> str:
    if not value:
        return ""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


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


def _brief(error: Exception) -> str:
    """The first line of an error's text, short enough for one sentence."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
