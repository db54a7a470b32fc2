"""Every table of the page as a file to download, held by the page itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from engine.report.findings import layer_curve
from engine.report.inputs import COMPARISON, Results
from engine.report.viewer import data_uri

BUDGET = 1_200_000
"""Bytes of all files; what does not fit stays in the outputs folder, and the page says where."""


def downloads(results: Results, summary: str) -> list[dict[str, str]]:
    """Name, data URI ("" where it is too large for a page), size and place in the outputs folder of every file."""
    offered = [("summary.md", "text/markdown", summary.encode("utf-8"), "summary.md")]
    comparison = str(COMPARISON)
    for part in ("tests", "trends", "clusters", "relations"):
        entries = getattr(results.analyses, part)
        if entries:
            offered.append((f"{part}.csv", "text/csv", _entries(entries), comparison))
    offered.append(("layer_curves.csv", "text/csv", _csv(_CURVES, _curves(results)), comparison))
    offered.append((COMPARISON.name, "application/json", (results.outputs / COMPARISON).read_bytes(), comparison))
    if results.training:
        header = ("condition", "seed", *_HISTORY)
        offered.append(("training.csv", "text/csv", _csv(header, _history(results)), "metrics/training.json"))
    if results.study_text:
        offered.append(("study.toml", "application/toml", results.study_text.encode("utf-8"), "study.toml"))
    files, left = [], BUDGET
    for name, kind, content, place in offered:
        fits = len(content) <= left
        left -= len(content) if fits else 0
        href = data_uri(kind, content) if fits else ""
        files.append({"name": name, "href": href, "size": _size(len(content)), "place": place})
    return files


_CURVES = ("metric", "unit", "region", "condition", "layer", "site", "mean", "low", "high", "n")
_HISTORY = ("epoch", "penalty", "loss", "train_accuracy", "validation_accuracy")


def _entries(entries: Sequence[Any]) -> bytes:
    """Entries of one kind, a column a field; an interval is two columns, layers are joined by spaces."""
    names = [field.name for field in fields(entries[0])]
    pairs = [name for name in names if isinstance(getattr(entries[0], name), tuple) and name.startswith("ci")]
    header = [column for name in names for column in ([f"{name}_low", f"{name}_high"] if name in pairs else [name])]
    rows = []
    for entry in entries:
        row: list[Any] = []
        for name in names:
            value = getattr(entry, name)
            row += value if name in pairs else [" ".join(map(str, value)) if isinstance(value, tuple) else value]
        rows.append(row)
    return _csv(header, rows)


def _curves(results: Results) -> Iterator[list[Any]]:
    for metric, region in results.series():
        for condition in results.conditions:
            curve = layer_curve(results, metric, condition, region)
            for row, layer in enumerate(results.layers):
                yield [
                    *(metric, results.unit(metric), region, condition, layer, results.sites[row]),
                    *(float(values[row]) for values in (curve.mean, curve.low, curve.high)),
                    int(curve.n[row]),
                ]


def _history(results: Results) -> Iterator[list[Any]]:
    for condition, entry in (results.training or {}).items():
        for seed, run in (entry.get("seeds") or {}).items():
            for step in run.get("history") or ():
                yield [condition, seed, *(step.get(name) for name in _HISTORY)]


def _csv(header: Sequence[str], rows: Any) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode("utf-8")


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{max(1, round(count / 1e3))} kB"
