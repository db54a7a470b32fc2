"""report.html: one self-contained page, made from the stored results; no network, no framework."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from engine.report import cautions, text, wording
from engine.report.charts import Bar, Line, line_chart
from engine.report.downloads import downloads
from engine.report.figures import PALETTE
from engine.report.findings import Comparison, cell_relations, comparisons, histories, layer_curve, training_runs
from engine.report.inputs import Results
from engine.report.maps import maps_payload, scatter_images
from engine.report.relevance import relevance_section
from engine.report.sections import environment, gradcam
from engine.report.verdicts import verdicts
from engine.report.viewer import viewer_payload

# Sections that stand on files of their own, in the page's order between the attention viewer and the training.
SECTIONS = (relevance_section, gradcam)

TEMPLATES = Path(__file__).parent / "templates"
DROPPED_SHOWN = 50


def render_page(results: Results, summary: str) -> str:
    """The whole page. Names of images, classes and conditions are untrusted text and escaped wherever they go.

    Scripts run under a content security policy that names the one script by its hash and forbids every request.
    """
    found = comparisons(results)
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.js", "viewer.js", "maps.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    viewer = viewer_payload(results)
    images = [str(name) for name in results.table["image"].values]
    shown = scatter_images(results)
    payload = {
        "conditions": list(results.conditions),
        "alpha": results.alpha,
        "confidence": results.confidence,
        "power": results.power,
        "layers": list(results.layers),
        "sites": list(results.sites),
        "heads": list(results.heads),
        "images": [images[index] for index in shown],
        "allImages": len(images),
        "maps": maps_payload(results, found),
        "viewer": viewer,
    }
    return (
        environment(results)
        .get_template("report.html")
        .render(
            comparisons=found,
            wording=wording,
            cautions=cautions,
            verdicts=lambda comparison: verdicts(results, comparison),
            details=[_details(results, comparison) for comparison in found],
            bounded=any(test.tost_bound is not None for test in results.analyses.tests),
            nested=next((test.nested_levels for test in results.analyses.tests if test.nested_levels), ""),
            seeds=_seeds(results, found),
            headline=wording.headline(results, found),
            scope=wording.scope_sentences(results, found),
            accuracy=_accuracy(results),
            controls_held=sum(bool(control.get("held")) for control in results.controls),
            curves=_curves(results, found),
            training=_training(results),
            sections=[section for make in SECTIONS if (section := make(results)) is not None],
            runs={condition: training_runs(results, condition) for condition in results.conditions},
            dropped=list(results.data.get("dropped") or ())[:DROPPED_SHOWN],
            provenance=_provenance(results),
            downloads=downloads(results, summary),
            viewer=viewer,
            data=_json(payload),
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup(script),
            digest=digest,
        )
    )


def _json(value: Any) -> Markup:
    """JSON that may stand inside a script element: no `<`, `>` or `&`, whatever the names in it hold."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _curves(results: Results, found: Sequence[Comparison]) -> list[dict[str, Any]]:
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
                "bars": (bars := _bars(results, found, metric, region)),
                "note": _association(results, metric),
                "svg": line_chart(
                    lines,
                    bars=bars,
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
                                text.number(
                                    float(curve.mean[row]),
                                    decimals=text.decimals(float(curve.high[row] - curve.low[row])),
                                ),
                                text.interval((float(curve.low[row]), float(curve.high[row]))),
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


def _details(results: Results, comparison: Comparison) -> list[tuple[str, str, list[str]]]:
    """(title, note, sentences) of what a comparison has to say beyond its cells and layers."""
    changes = comparison.changes
    offered = (
        (
            "Runs of neighbouring layers",
            "Cluster permutation over images, heads averaged; a p speaks of the whole run, not of any one layer in it.",
            [wording.cluster_sentence(change) for change in changes],
        ),
        (
            "Lower and upper half of the layers",
            "Paired over images, max-T over the metrics.",
            [wording.trend_sentence(results, change) for change in changes],
        ),
        (
            "When every class of images counts alike",
            "Does a finding hang on a few large classes? Here a class is one unit.",
            [wording.class_sentence(results, change) for change in changes],
        ),
        (
            "How the metrics' differences go together",
            "Cells of one model are not independent: descriptive, without p-values.",
            [wording.relation_sentence(*pair) for pair in cell_relations(comparison)],
        ),
    )
    return [(title, note, said) for title, note, sentences in offered if (said := [s for s in sentences if s])]


def _seeds(results: Results, found: Sequence[Comparison]) -> list[dict[str, Any]]:
    """A chart a metric and region: every training run's difference by layer; none with a single run."""
    if len(results.seeds) < 2:
        return []
    charts = []
    for metric, region in results.series():
        lines = []
        for comparison in found:
            color = results.conditions.index(comparison.condition) % len(PALETTE)
            runs = layer_curve(results, metric, comparison.condition, region).by_seed
            base = layer_curve(results, metric, comparison.against, region).by_seed
            for seed, means in runs.items():
                other = base.get(seed, next(iter(base.values())))  # a seed-invariant condition has one run
                name = f"{comparison.condition}, seed {seed}"
                lines.append(Line(name, color, results.layers, means - other, thin=True))
        title = results.title(metric) if region is None else f"{results.title(metric)}: {region}"
        chart = line_chart(
            lines,
            title=f"{title}, difference by training run",
            x_label="layer",
            y_label="difference",
            x_ticks=results.layers,
            zero=True,
        )
        charts.append({"title": title, "unit": results.unit(metric), "svg": chart})
    return charts


def _bars(results: Results, found: Sequence[Comparison], metric: str, region: str | None) -> list[Bar]:
    """The surviving clusters of one chart."""
    return [
        Bar(
            f"{cluster.direction} than {cluster.against} in {text.span(cluster.layers)}, p {text.p_value(cluster.p)}",
            results.conditions.index(cluster.condition) % len(PALETTE),
            cluster.layers[0],
            cluster.layers[-1],
        )
        for comparison in found
        for cluster in results.clusters(
            condition=comparison.condition, against=comparison.against, metric=metric, region=region
        )
    ]


def _association(results: Results, metric: str) -> str:
    """What Moran's I is without association, where the grid is known; "" for other metrics."""
    if metric not in ("morans_i", "morans_i_received", "cls_morans_i") or results.samples is None:
        return ""
    sizes = {layer.layout.num_patches for run in results.samples.runs.values() for layer in run.layers}
    return f"No association: {text.number(-1 / (sizes.pop() - 1))}, not 0." if len(sizes) == 1 else ""


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
    if not results.journal.path.is_file():
        rows.append(("record of the files", "none: no run.jsonl vouches that they are as they were written"))
    # By name: a page does not depend on which stage was done again last.
    rows += [(f"stage {name}", f"{seconds:.1f} s") for name, seconds in sorted(results.stage_seconds.items())]
    return rows


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
