"""report.html: one self-contained page, made from the stored results; no network, no framework."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from engine.report import wording
from engine.report.charts import Line, line_chart
from engine.report.figures import PALETTE
from engine.report.findings import (
    Comparison,
    comparisons,
    histories,
    layer_curve,
    mean,
    metric_relations,
    survives,
    training_runs,
)
from engine.report.inputs import COMPARISON, GradcamSample, PairedTest, Results
from engine.report.viewer import data_uri, viewer_payload

__all__ = ["render_page"]

TEMPLATES = Path(__file__).parent / "templates"
HISTOGRAM_BINS = 24
GRADCAM_BUDGET = 1_300_000
DOWNLOAD_LIMIT = 1_200_000
DROPPED_SHOWN = 50


def render_page(results: Results, summary: str) -> str:
    """The whole page. Names of images, classes and conditions are untrusted text and escaped wherever they go.

    Scripts run under a content security policy that names the one script by its hash and forbids every request.
    """
    import jinja2

    found = comparisons(results)
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    viewer = viewer_payload(results)
    payload = {
        "conditions": list(results.conditions),
        "alpha": results.alpha,
        "confidence": results.confidence,
        "layers": list(results.layers),
        "sites": list(results.sites),
        "heads": int(results.table.sizes["head"]),
        "maps": _maps(results, found),
        "viewer": viewer,
    }
    return environment.get_template("report.html").render(
        results=results,
        comparisons=found,
        wording=wording,
        headline=wording.headline(results, found),
        scope=wording.scope_sentences(results, found),
        colors={name: index % len(PALETTE) for index, name in enumerate(results.conditions)},
        accuracy=_accuracy(results),
        controls_held=sum(bool(control.get("held")) for control in results.controls),
        curves=_curves(results),
        training=_training(results),
        gradcam=_gradcam(results),
        gradcam_left_out=len(results.gradcam) - len(_gradcam_that_fit(results)),
        relations=[
            (comparison, metric_relations(results, comparison.condition, comparison.against)) for comparison in found
        ],
        runs={condition: training_runs(results, condition) for condition in results.conditions},
        dropped=list(results.data.get("dropped") or ())[:DROPPED_SHOWN],
        provenance=_provenance(results),
        downloads=_downloads(results, summary),
        viewer=viewer,
        data=_json(payload),
        style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
    )


def _json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no `<`, `>` or `&`, whatever the names in it hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _maps(results: Results, found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """One entry a metric (and region), with a grid of tests for every comparison."""
    entries = []
    for metric, region in results.series():
        grids = []
        for comparison in found:
            cells = _cells(results, comparison, metric, region)
            if any(cell for row in cells for cell in row):
                grids.append(
                    {
                        "condition": results.conditions.index(comparison.condition),
                        "against": results.conditions.index(comparison.against),
                        "cells": cells,
                    }
                )
        if grids:
            label = results.title(metric) + ("" if region is None else f": {region}")
            entries.append(
                {
                    "metric": metric,
                    "label": label,
                    "unit": results.unit(metric),
                    "regional": region is not None,
                    "grids": grids,
                }
            )
    return entries


def _cells(
    results: Results, comparison: Comparison, metric: str, region: str | None
) -> list[list[dict[str, Any] | None]]:
    """[layer][head] of the head-level tests, and behind the heads one column of the layer-level ones."""
    values = results.table[metric] if region is None else results.table[metric].sel(region=region)
    sides = [
        mean(values.sel(condition=name).transpose("seed", "image", "layer", "head").values.astype(np.float64), (0,))
        for name in (comparison.condition, comparison.against)
    ]
    over_heads = mean(sides[0], (2,)) - mean(sides[1], (2,))
    paired = np.concatenate([sides[0] - sides[1], over_heads[..., None]], axis=2)
    heads = int(results.table.sizes["head"])
    cells: list[list[dict[str, Any] | None]] = [[None] * (heads + 1) for _ in results.layers]
    where = {"condition": comparison.condition, "against": comparison.against, "metric": metric, "region": region}
    for test in (*results.select("head", **where), *results.select("layer", **where)):
        if test.layer is not None:
            row, column = results.layers.index(test.layer), heads if test.level == "layer" else test.head
            if column is not None:
                cells[row][column] = _cell(results, test, paired[:, row, column])
    return cells


def _cell(results: Results, test: PairedTest, differences: np.ndarray) -> dict[str, Any]:
    return {
        "d": _round(test.difference),
        "ci": [_round(edge) for edge in test.ci],
        "dz": _round(test.dz),
        "p": _round(test.p_max_t),
        "a": _round(test.mean_against),
        "b": _round(test.mean_condition),
        "n": test.n,
        "missing": test.missing,
        "sure": survives(test, results.alpha),
        "note": test.degenerate,
        "hist": _histogram(differences),
    }


def _histogram(differences: np.ndarray) -> dict[str, Any] | None:
    """Counts of the paired differences over images, over a range that includes 0; None where there is nothing."""
    known = differences[np.isfinite(differences)]
    if known.size == 0:
        return None
    low, high = min(0.0, float(known.min())), max(0.0, float(known.max()))
    if high <= low:
        return None
    counts, _ = np.histogram(known, bins=HISTOGRAM_BINS, range=(low, high))
    return {"low": _round(low), "high": _round(high), "counts": [int(count) for count in counts]}


def _round(value: float | None) -> float | None:
    """Six significant digits: more than a reader needs, fewer bytes."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _curves(results: Results) -> list[dict[str, Any]]:
    """A chart and its table for every metric and region; the regions of one metric share their scale."""
    charts = []
    for metric, region in results.series():
        curves = {condition: layer_curve(results, metric, condition, region) for condition in results.conditions}
        lines = []
        for index, (condition, curve) in enumerate(curves.items()):
            color = index % len(PALETTE)
            if len(curve.by_seed) > 1:
                lines += [Line(condition, color, results.layers, run, thin=True) for run in curve.by_seed.values()]
            lines.append(Line(condition, color, results.layers, curve.mean, curve.low, curve.high))
        unit = results.unit(metric)
        title = results.title(metric) if region is None else f"{results.title(metric)}: {region}"
        y_range = None
        if region is not None:
            every = [
                layer_curve(results, metric, condition, name).high
                for condition in results.conditions
                for name in results.regions
            ]
            top = np.concatenate(every)
            y_range = (0.0, float(top[np.isfinite(top)].max())) if np.isfinite(top).any() else None
        charts.append(
            {
                "metric": metric,
                "region": region,
                "title": title,
                "unit": unit,
                "svg": line_chart(
                    lines,
                    title=title,
                    x_label="layer",
                    y_label=unit or ("share" if region is not None else results.title(metric)),
                    x_ticks=results.layers,
                    y_range=y_range,
                ),
                "rows": [
                    (
                        layer,
                        [
                            (
                                wording.number(float(curve.mean[row])),
                                f"{wording.number(float(curve.low[row]))} to {wording.number(float(curve.high[row]))}",
                                int(curve.n[row]),
                            )
                            for curve in curves.values()
                        ],
                    )
                    for row, layer in enumerate(results.layers)
                ],
            }
        )
    return charts


def _accuracy(results: Results) -> list[dict[str, Any]]:
    rows = []
    for condition in results.conditions:
        runs = [run for run in (results.accuracy.get(condition) or {}).values() if run.get("test") is not None]
        if not runs:
            continue
        tests = [float(run["test"] or 0.0) for run in runs]
        validation = [float(run["validation"] or 0.0) for run in runs if run.get("validation") is not None]
        chance = next((run["chance"] for run in runs if run.get("chance") is not None), None)
        rows.append(
            {
                "condition": condition,
                "test": 100 * sum(tests) / len(tests),
                "validation": 100 * sum(validation) / len(validation) if validation else None,
                "chance": None if chance is None else 100 * chance,
                "runs": len(tests),
            }
        )
    return rows


def _training(results: Results) -> dict[str, Any] | None:
    """Charts by epoch and a table of recipes; None where nothing was trained here."""
    if not results.training:
        return None
    charts: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for key, label, scale in (
        ("loss", "training loss", 1.0),
        ("validation_accuracy", "validation accuracy (%)", 100.0),
    ):
        lines: list[Line] = []
        for condition, epochs, values in histories(results, key):
            color = results.conditions.index(condition) % len(PALETTE) if condition in results.conditions else 0
            again = any(line.name == condition for line in lines)
            lines.append(Line(condition, color, epochs.tolist(), scale * values, thin=again))
        if lines:
            marks = sorted({epoch for line in lines for epoch in line.x})
            chart = line_chart(lines, title=label, x_label="epoch", y_label=label, x_ticks=marks)
            charts.append({"title": label, "svg": chart})
    for condition, entry in results.training.items():
        for seed, run in (entry.get("seeds") or {}).items():
            rows.append(
                {
                    "condition": condition,
                    "recipe": entry.get("recipe", ""),
                    "seed": seed,
                    "parameters": run.get("trainable_parameters"),
                    "validation": run.get("validation_accuracy"),
                    "test": run.get("test_accuracy"),
                }
            )
    drawn = {condition for condition, _, _ in histories(results, "loss")}
    without = [condition for condition in results.training if condition not in drawn]
    return {"charts": charts, "rows": rows, "without": without}


def _gradcam_that_fit(results: Results) -> list[tuple[GradcamSample, bytes]]:
    """Pictures of as many images as fit the budget whole: half an image's conditions compare with nothing."""
    fitting: list[tuple[GradcamSample, bytes]] = []
    used = 0
    for image in dict.fromkeys(sample.image for sample in results.gradcam):
        pictures = [(sample, sample.file.read_bytes()) for sample in results.gradcam if sample.image == image]
        used += sum(len(content) for _, content in pictures)
        if used > GRADCAM_BUDGET:
            break
        order = {name: index for index, name in enumerate(results.conditions)}
        roles = list(dict.fromkeys(sample.role for sample, _ in pictures))
        pictures.sort(key=lambda pair: (roles.index(pair[0].role), order.get(pair[0].condition, len(order))))
        fitting += pictures
    return fitting


def _gradcam(results: Results) -> list[dict[str, Any]]:
    """Pictures as data URIs, grouped by image and then by what the target class is to it."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample, content in _gradcam_that_fit(results):
        groups.setdefault(sample.image, []).append(
            {
                "src": data_uri("image/png", content),
                "condition": sample.condition,
                "target": sample.target,
                "role": sample.role,
                "probability": sample.probability,
            }
        )
    return [
        {
            "image": image,
            "rows": [
                [picture for picture in pictures if picture["role"] == role]
                for role in dict.fromkeys(picture["role"] for picture in pictures)
            ],
        }
        for image, pictures in groups.items()
    ]


def _provenance(results: Results) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name in ("model", "dataset", "preprocessing"):
        rows += [(f"{name}: {key}", _plain(value)) for key, value in results.attribute(name).items()]
    named = ("model", "dataset", "preprocessing", "undefined")  # undefined rows are among the data's problems
    rows += [(str(key), _plain(value)) for key, value in sorted(results.table.attrs.items()) if key not in named]
    backends = {str(values.attrs.get("backend", "")) for values in results.table.data_vars.values()} - {""}
    if backends:
        rows.append(("metrics computed by", ", ".join(sorted(backends))))
    if results.data.get("sha256"):
        rows.append(("images sha256", _plain(results.data["sha256"])))
    rows += [(f"stage {name}", f"{seconds:.1f} s") for name, seconds in results.stage_seconds.items()]
    return rows


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _downloads(results: Results, summary: str) -> list[dict[str, str]]:
    """Tables as data URIs; what is too large for a page stays in the outputs folder and is named there."""
    names = [field.name for field in fields(PairedTest) if field.name != "ci"]
    tests = [[*(getattr(test, name) for name in names), *test.ci] for test in results.tests]
    curves = []
    for metric, region in results.series():
        for condition in results.conditions:
            curve = layer_curve(results, metric, condition, region)
            for row, layer in enumerate(results.layers):
                curves.append(
                    [metric, results.unit(metric), region, condition, layer, results.sites[row]]
                    + [float(values[row]) for values in (curve.mean, curve.low, curve.high)]
                    + [int(curve.n[row])]
                )
    offered = [
        ("summary.md", "text/markdown", summary.encode("utf-8")),
        ("tests.csv", "text/csv", _csv([*names, "ci_low", "ci_high"], tests)),
        (
            "layer_curves.csv",
            "text/csv",
            _csv(["metric", "unit", "region", "condition", "layer", "site", "mean", "low", "high", "n"], curves),
        ),
        ("attention_comparison.json", "application/json", (results.outputs / COMPARISON).read_bytes()),
    ]
    if results.training:
        columns = ("epoch", "penalty", "loss", "train_accuracy", "validation_accuracy")
        history = [
            [condition, seed, *(step.get(name) for name in columns)]
            for condition, entry in results.training.items()
            for seed, run in (entry.get("seeds") or {}).items()
            for step in run.get("history") or ()
        ]
        offered.append(("training.csv", "text/csv", _csv(["condition", "seed", *columns], history)))
    if results.study_text:
        offered.append(("study.toml", "application/toml", results.study_text.encode("utf-8")))
    return [
        {"name": name, "href": data_uri(kind, content), "size": _size(len(content))}
        for name, kind, content in offered
        if len(content) <= DOWNLOAD_LIMIT
    ]


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode("utf-8")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(1, round(count / 1e3))} kB"
