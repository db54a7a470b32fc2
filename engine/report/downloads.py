"""Every table of the page as a file to download, held by the page itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from engine.config import COMPARISON
from engine.report.findings import layer_curve
from engine.report.inputs import Results
from engine.report.viewer import data_uri

BUDGET = 1_200_000
"""Bytes of all files; what does not fit stays in the outputs folder, and the page says where."""

COLUMNS = {
    "tests": (
        "condition against metric unit level role unit_of_inference family family_size region layer site head n "
        "missing mean_against mean_condition difference sd skewness dz gz d_av ci ci_method ci_simultaneous "
        "ci_nested nested_levels test t p p_wilcoxon p_max_t p_gated p_holm p_bh p_floor tost_bound p_tost p_tost_holm "
        "mde_dz mde degenerate"
    ),
    "trends": (
        "condition against metric unit unit_of_inference family region shallow_layers deep_layers n shallow deep "
        "difference dz ci p p_max_t depth_rho"
    ),
    "clusters": "condition against metric unit unit_of_inference family direction region layers mass n p",
    "crossed": (
        "condition against metric unit level unit_of_inference family family_size region layer site head runs images "
        "missing difference ci ci_df ci_method sd_run sd_image sd_residual share_run share_image share_residual d_run "
        "t df p p_holm runs_needed images_needed degenerate"
    ),
    "run_controls": "condition seeds unit_of_inference n cells cells_differ layers layers_differ",
    "run_spreads": "condition against seeds cells ratio cells_wider cells_opposite",
    "relations": "condition against metric with_metric over region with_region layer rho ci n",
}
"""Fields of the results that stand in the tables, in their order; an interval is two columns."""

Row = Mapping[str, Any]


def downloads(results: Results, summary: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, data URI ("" where it is too large for a page), size and place in the outputs folder of every file."""
    offered = [("summary.md", "text/markdown", summary.encode("utf-8"), "summary.md")]
    comparison = str(COMPARISON)
    for part, columns in COLUMNS.items():
        if rows := [_entry(entry, columns.split()) for entry in getattr(results.document, part)]:
            offered.append((f"{part}.csv", "text/csv", csv_bytes(rows), comparison))
    offered.append(("layer_curves.csv", "text/csv", csv_bytes(_curves(results)), comparison))
    offered.append((COMPARISON.name, "application/json", (results.outputs / COMPARISON).read_bytes(), comparison))
    if results.training:
        offered.append(("training.csv", "text/csv", csv_bytes(_history(results)), "metrics/training.json"))
    if results.study_text:
        offered.append(("study.toml", "application/toml", results.study_text.encode("utf-8"), "study.toml"))
    remaining = BUDGET
    for name, kind, content, place in offered:
        size = len(content)
        fits = size <= remaining
        remaining -= size if fits else 0
        shown = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"
        yield name, data_uri(kind, content) if fits else "", shown, place


def _entry(entry: Any, columns: Sequence[str]) -> Row:
    """A column per field; an interval is two columns, layers are joined by spaces."""
    row: dict[str, Any] = {}
    for name in columns:
        value = getattr(entry, name)
        if name in ("ci", "ci_simultaneous", "ci_nested"):
            row[f"{name}_low"], row[f"{name}_high"] = value or (None, None)
        else:
            row[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return row


def _curves(results: Results) -> Iterator[Row]:
    for metric, region in results.series():
        start = {"metric": metric, "unit": results.unit(metric), "region": region}
        for condition in results.conditions:
            curve = layer_curve(results, metric, condition, region)
            for row, layer in enumerate(results.layers):
                values = {"mean": curve.mean[row], "low": curve.low[row], "high": curve.high[row], "n": curve.n[row]}
                yield start | {"condition": condition, "layer": layer, "site": results.document.layers[row]} | values


def _history(results: Results) -> Iterator[Row]:
    for condition, entry in (results.training or {}).items():
        for seed, run in (entry.get("seeds") or {}).items():
            for step in run.get("history") or ():
                names = ("epoch", "penalty", "loss", "train_accuracy", "validation_accuracy")
                yield {"condition": condition, "seed": seed} | {name: step.get(name) for name in names}


def csv_bytes(rows: Iterable[Row]) -> bytes:
    """A table with the columns of the first row."""
    buffer = io.StringIO()
    listed = list(rows)
    writer = csv.DictWriter(buffer, listed[0] if listed else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return buffer.getvalue().encode("utf-8")
