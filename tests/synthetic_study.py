"""A small outputs folder like a study's, made of seeded noise in a second: what the report's tests read.

Maps are drawn, not measured, so the report is tested without a model or images; what it reads of inference is written
by `engine.statistics` with few resamples, as in a study.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import xarray as xr
import zarr
from PIL import Image

from engine.capture.samples import SCHEMA
from engine.report.inputs import Results, load_results
from engine.report.write import render_page, summary_markdown, write_report
from engine.statistics import Accuracy, Classifier, Control, Settings, analyse, write_comparison
from engine.study.journal import Journal

METRICS: Mapping[str, tuple[str, str, float, float]] = {
    # name: (units, title, level, spread)
    "distance": ("image diagonals", "Mean attention distance", 0.33, 0.02),
    "entropy": ("nat", "Entropy", 3.1, 0.2),
    "morans_i": ("1", "Moran's I", 0.42, 0.05),
    "prefix_mass": ("1", "Prefix mass", 0.08, 0.02),
    "region_mass": ("1", "Class token's attention on regions", 0.3, 0.05),
}


# What was built, by its options: a study of the same options is a copy.
_BUILT: dict[str, TemporaryDirectory[str]] = {}


def build_study(outputs: Path, **options: Any) -> Path:
    """Writes a whole study's tables below `outputs` and returns it; `_write_study` says which options there are.

    There is no `run.jsonl`, so that a test may change the files; `record_stages` adds one.
    """
    key = repr(sorted(options.items()))
    if key not in _BUILT:
        folder = TemporaryDirectory()
        _write_study(Path(folder.name), **options)
        _BUILT[key] = folder
    shutil.copytree(_BUILT[key].name, outputs, dirs_exist_ok=True)
    return outputs


def _write_study(
    outputs: Path,
    *,
    conditions: Sequence[str] = ("baseline", "finetuned", "dora"),
    seeds: Sequence[int] = (42,),
    regions: Sequence[str] = ("big digit", "small digit"),
    metrics: Sequence[str] = tuple(METRICS),
    classes: Sequence[str] = ("0", "1", "2", "3"),
    images: int = 40,
    layers: int = 4,
    heads: int = 4,
    grid: tuple[int, int] = (8, 8),
    patch_px: int = 6,
    sample_images: int = 3,
    effect: float = 1.0,
    training: bool = True,
    samples: bool = True,
    gradcam: bool = True,
    controls_hold: bool = True,
    permutations: int = 499,
    equivalence: Mapping[str, float] | None = None,
    measured_heads: Sequence[int] | None = None,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a whole study's tables below `outputs`. `effect` 0 is a study in which nothing differs."""
    random = np.random.default_rng(20)
    (outputs / "metrics").mkdir(parents=True)
    if not regions:
        metrics = [name for name in metrics if name != "region_mass"]
    ids = [f"class_{index % len(classes)}/image_{index:03d}.png" for index in range(images)]
    labels = [index % len(classes) for index in range(images)]
    table = _table(random, conditions, seeds, regions, metrics, classes, ids, labels, layers, heads, effect)
    if measured_heads is not None:
        table = table.isel(head=list(measured_heads))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's remark that string arrays have no specification yet
        table.to_zarr(outputs / "metrics/attention_metrics.zarr", mode="w", zarr_format=3, consolidated=False)
    settings = Settings(
        **{
            "against": conditions[0],
            "permutations": permutations,
            "equivalence": equivalence or {},
            **(statistics or {}),
        }
    )
    comparison = replace(
        analyse(table, settings),
        controls=tuple(_controls(controls_hold)),
        accuracy={
            name: {
                str(seed): Accuracy(validation=0.9 - 0.05 * c, test=0.89 - 0.05 * c, chance=0.25, images=images)
                for seed in seeds
            }
            for c, name in enumerate(reversed(list(conditions)))
        },
        classifiers=dict.fromkeys(conditions, Classifier(outputs=len(classes), classes=tuple(classes), note="")),
        data={
            "images": images,
            "classes": len(classes),
            "dropped": [{"id": "class_1/._broken.png", "status": "truncated"}],
            "same_file_in_several_splits": [["train/a.png", "test/b.png"]],
            "splits": {"train": 160, "validation": 40, "test": images},
            "sha256": "ab" * 32,
        },
        undefined={
            name: dict.fromkeys(conditions, 0) | ({conditions[0]: 7} if name == "morans_i" else {}) for name in metrics
        },
    )
    write_comparison(outputs / "metrics/attention_comparison.json", comparison)
    if training:
        _write_json(outputs / "metrics/training.json", _training(random, conditions, seeds))
    if samples:
        _samples(random, outputs, conditions, seeds, regions, classes, ids, labels, sample_images, layers, heads, grid)
    if gradcam:
        _gradcam(random, outputs, conditions, ids[:2], grid, patch_px)
    (outputs / "study.toml").write_text(
        'outputs = "outputs"\n\n[model]\nname = "digits_vit"\n\n[statistics]\nalpha = 0.05\nconfidence = 0.95\n'
        f"permutations = {permutations}\n\n[statistics.equivalence]\n"
        + "".join(f"{metric} = {bound}\n" for metric, bound in (equivalence or {}).items()),
        encoding="utf-8",
    )


def record_stages(outputs: Path) -> Path:
    """Writes the `run.jsonl` of a study whose stages left what lies in the folder."""
    journal = Journal(outputs / "run.jsonl")
    journal.write(outputs / "study.toml", (outputs / "study.toml").read_bytes())
    journal.write(outputs / "metrics/training.json", (outputs / "metrics/training.json").read_bytes())
    samples = outputs / "samples.zarr"
    stages = {"samples": [samples / "zarr.json", samples / "images"]}
    stages |= {f"capture {run.name}": [run] for run in sorted(samples.glob("*_seed*"))}
    stages |= {
        "measure": [outputs / "metrics/attention_metrics.zarr"],
        "statistics": [outputs / "metrics/attention_comparison.json"],
        "relevance": [outputs / "visualizations/gradcam_samples"],
    }
    for name, left in stages.items():
        journal.stage(name, {}, left, lambda: None)
    return outputs


def small(tmp_path: Path, **options: Any) -> Path:
    """A study of two metrics: quick to draw."""
    return build_study(tmp_path / "outputs", **{"metrics": ("distance", "region_mass"), "images": 24, **options})


def results_of(outputs: Path) -> Results:
    return load_results(outputs, Journal(outputs / "run.jsonl"))


def report_on(outputs: Path) -> tuple[Path, ...]:
    return write_report(outputs, Journal(outputs / "run.jsonl"))


def texts(outputs: Path) -> tuple[str, str]:
    """Summary and page; drawing the figures as well would be most of the time."""
    results = results_of(outputs)
    summary = summary_markdown(results)
    return summary, render_page(results, summary)


def payload(page: str) -> dict[str, Any]:
    """The data that the page holds for its scripts."""
    found = re.search(r'<script type="application/json" id="payload">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    loaded: dict[str, Any] = json.loads(found.group(1))
    return loaded


def _table(
    random: np.random.Generator,
    conditions: Sequence[str],
    seeds: Sequence[int],
    regions: Sequence[str],
    metrics: Sequence[str],
    classes: Sequence[str],
    ids: Sequence[str],
    labels: Sequence[int],
    layers: int,
    heads: int,
    effect: float,
) -> xr.Dataset:
    dims = ("condition", "seed", "image", "layer", "head")
    shape = (len(conditions), len(seeds), len(ids), layers, heads)
    variables: dict[str, Any] = {}
    for index, name in enumerate(metrics):
        unit, title, level, spread = METRICS[name]
        by_region = name == "region_mass"
        full = (*shape, len(regions)) if by_region else shape
        # An image and a head are alike in every condition: that is what makes the pairs worth pairing.
        own = random.normal(0.0, spread, size=(1, 1, *full[2:]))
        noise = random.normal(0.0, 0.5 * spread, size=full)
        if effect == 0.0:
            noise -= noise.mean(axis=2, keepdims=True)
        depth = np.linspace(-0.5, 0.5, layers)[None, None, None, :, None]
        values = own + noise + level + (0.0 if by_region else spread * depth)
        for c in range(1, len(conditions)):
            push = effect * spread * 0.8 * c * np.sin(np.arange(layers) + index)[None, None, :, None]
            if by_region:
                sign = np.where(np.arange(len(regions)) % 2, 6.0, -3.0)
                values[c] += push[..., None] * sign
            else:
                values[c] += push
        if by_region or unit == "1":
            values = np.clip(values, 0.0, 1.0)
        values[0, 1:] = values[0, :1]  # the baseline's backbone is frozen: every seed's maps are the same
        variables[name] = (
            (*dims, "region") if by_region else dims,
            values.astype(np.float32),
            {"units": unit, "title": title, "undefined": "", "backend": "numba"},
        )
    coords: dict[str, Any] = {
        "condition": list(conditions),
        "seed": np.asarray(seeds, dtype=np.int64),
        "image": list(ids),
        "layer": np.arange(layers),
        "head": np.arange(heads),
        "site": ("layer", [f"blocks.{layer}.attn" for layer in range(layers)]),
        "label": ("image", np.asarray(labels)),
        "class_name": ("image", [classes[label] for label in labels]),
        "seed_invariant": ("condition", np.arange(len(conditions)) == 0),
    }
    if "region_mass" in metrics:
        coords["region"] = list(regions)
        coords["region_area"] = (("image", "region"), np.tile(np.linspace(0.3, 0.1, len(regions)), (len(ids), 1)))
    attrs = {
        "model": json.dumps({"name": "digits_vit", "weights_sha256": "cd" * 32, "timm": "1.0.31", "torch": "2.15.0"}),
        "dataset": json.dumps({"id": "digits", "split": "test", "sha256": "ab" * 32}),
        "precision": "float32",
        "preprocessing": json.dumps({"mean": [0.5], "std": [0.5], "input_size": [48, 48]}),
        "metrics": json.dumps(list(variables)),
    }
    return xr.Dataset(variables, coords, attrs)


def _controls(held: bool) -> list[Control]:
    frozen = "The frozen baseline's attention equals the pretrained model's"
    greatest = "greatest absolute difference"
    return [
        Control("frozen_baseline", frozen, "0 everywhere", 0.0, True, "bit for bit in 4 layers"),
        Control("self", "A condition against itself", "0 everywhere", 0.0 if held else 0.125, held, greatest),
    ]


def _training(random: np.random.Generator, conditions: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    training = {}
    for c, condition in enumerate(conditions):
        runs = {}
        for seed in seeds:
            loss = 1.4 * np.exp(-0.5 * np.arange(5)) + 0.1 + 0.02 * random.random(5)
            runs[str(seed)] = {
                "history": [
                    {
                        "epoch": epoch,
                        "loss": float(loss[epoch]),
                        "validation_accuracy": float(0.9 - loss[epoch] / 2),
                    }
                    for epoch in range(5)
                ],
                "validation_accuracy": 0.8,
                "test_accuracy": 0.79,
                "trainable_parameters": 1000 * (c + 1),
                "seconds": 10.0,
            }
        if c == 0:  # a probe is fitted once a penalty and has no epochs
            for run in runs.values():
                run["history"] = [{"penalty": 0.1, "loss": 1.2, "validation_accuracy": 0.5}]
        training[condition] = {"recipe": ("probe", "full", "dora", "lora")[c % 4], "seeds": runs}
    return training


def _samples(
    random: np.random.Generator,
    outputs: Path,
    conditions: Sequence[str],
    seeds: Sequence[int],
    regions: Sequence[str],
    classes: Sequence[str],
    ids: Sequence[str],
    labels: Sequence[int],
    count: int,
    layers: int,
    heads: int,
    grid: tuple[int, int],
    patch_px: int = 6,
) -> None:
    rows, cols = grid
    height, width = rows * patch_px, cols * patch_px
    attributes = {"schema": SCHEMA, "region_names": list(regions), "class_names": list(classes)}
    root = zarr.open_group(outputs / "samples.zarr", mode="w", zarr_format=3, attributes=attributes)
    images = root.create_group("images")
    pixels = random.integers(0, 90, size=(count, height, width, 1), dtype=np.uint8)
    boxes = np.zeros((count, len(regions), 4))
    for image in range(count):
        for region in range(len(regions)):
            size = height // 3
            row0, col0 = random.integers(0, height - size), random.integers(0, width - size)
            pixels[image, row0 : row0 + size, col0 : col0 + size] += np.uint8(140 - 40 * region)
            boxes[image, region] = row0, col0, row0 + size, col0 + size
    images["pixels"] = pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = images.create_array("id", shape=(count,), dtype=str)
        names[...] = np.asarray(ids[:count], dtype=object)
    images["label"] = np.asarray(labels[:count])
    if regions:
        images["boxes"] = boxes
    layout = {
        "grid_rows": rows,
        "grid_cols": cols,
        "num_prefix_tokens": 1,
        "patch_height_px": patch_px,
        "patch_width_px": patch_px,
        "class_token": True,
    }
    tokens = 1 + rows * cols
    for c, condition in enumerate(conditions):
        for seed in seeds if c else seeds[:1]:
            group = root.create_group(f"{condition}_seed{seed}")
            for layer in range(layers):
                logits = random.normal(0, 1.0, size=(count, heads, tokens, tokens))
                if regions:
                    centre = boxes[:, c % len(regions)].reshape(count, 2, 2).mean(1) / patch_px
                    near = -(
                        (np.arange(rows)[None, :, None] + 0.5 - centre[:, 0, None, None]) ** 2
                        + (np.arange(cols)[None, None, :] + 0.5 - centre[:, 1, None, None]) ** 2
                    )
                    logits[..., 1:] += 0.3 * layer * near.reshape(count, 1, 1, rows * cols)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                array = group.create_array(
                    f"layer_{layer:02d}",
                    shape=weights.shape,
                    dtype="float16",
                    dimension_names=["image", "head", "query", "key"],
                )
                array[...] = (weights / weights.sum(-1, keepdims=True)).astype(np.float16)
                array.attrs["site"] = f"blocks.{layer}.attn"
                array.attrs["layout"] = layout
            group["logits"] = random.normal(0, 2, size=(count, len(classes))).astype(np.float32)


def _gradcam(
    random: np.random.Generator,
    outputs: Path,
    conditions: Sequence[str],
    ids: Sequence[str],
    grid: tuple[int, int],
    patch_px: int,
) -> None:
    folder = outputs / "visualizations/gradcam_samples"
    folder.mkdir(parents=True)
    with (folder / "gradcam_samples.csv").open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file", "image", "condition", "role", "target", "probability"])
        for i, image in enumerate(ids):
            for c, condition in enumerate(conditions):
                name = f"sample_{i}_{c}.png"
                pixels = random.integers(0, 255, size=(grid[0] * patch_px, grid[1] * patch_px, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / name)
                rows.writerow([name, image, condition, "true", "3", "0.75"])


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
