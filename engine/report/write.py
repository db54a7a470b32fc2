"""The report of a study, from its stored tables and samples alone: summary, page and figures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import engine.report.sections  # noqa: F401  (importing them declares them)
from engine.report import text
from engine.report.charts import figures
from engine.report.document import ReportedStudy, sections
from engine.report.html import page
from engine.report.inputs import Record, Results, load_results
from engine.report.maps import MARKS, scatter_images
from engine.report.markdown import markdown
from engine.report.marks import DIVERGING
from train.whole_files import replace_files, write_atomically

FIGURES = Path("visualizations/figures")


def write_report(outputs: str | os.PathLike[str], record: Record) -> tuple[Path, ...]:
    """Writes `summary.md`, `report.html` and the figures (SVG and PNG) of the study in a folder.

    Needs neither model nor images, takes seconds, and writes the same bytes for the same inputs. Every file is put in
    place whole, so a run that is killed leaves no torn one; of the figures, those
    that it wrote before and does not now are removed.

    Args:
        outputs: the outputs folder, with `metrics/attention_metrics.zarr` and `metrics/attention_comparison.json`;
            `metrics/training.json`, `samples.zarr`, `visualizations/gradcam_samples/`, `study.toml` and `run.jsonl`
            add their parts where they exist.
        record: what is known of how its files were made: the journal of the study.
    Returns:
        The files written.
    Raises:
        InputError: an input is missing, cannot be read, is not what its stage wrote (where there is a `run.jsonl`) or
            does not fit the others.
        DiskError: a file cannot be written.
    """
    outputs = Path(outputs)
    results = load_results(outputs, record)
    summary = summary_markdown(results)
    files = {"summary.md": summary.encode("utf-8"), "report.html": render_page(results, summary).encode("utf-8")}
    for name, content in files.items():
        write_atomically(outputs / name, content)
    return (*(outputs / name for name in files), *replace_files(outputs / FIGURES, render_figures(results)))


def summary_markdown(results: Results) -> str:
    """The whole of `summary.md`; no date and no path in it, so the same results give the same bytes."""
    return markdown(sections(ReportedStudy(results), "summary"))


def render_page(results: Results, summary: str) -> str:
    """The whole of `report.html`; `summary` is the summary's text, which it offers as a file."""
    images = [str(name) for name in results.table["image"].values]
    payload = {
        "conditions": list(results.conditions),
        "alpha": results.alpha,
        "confidence": results.confidence,
        "power": results.power,
        "layers": list(results.layers),
        "sites": list(results.document.layers),
        "heads": list(results.heads),
        "images": [images[index] for index in scatter_images(results)],
        "allImages": len(images),
        "diverging": DIVERGING.tolist(),
        "marks": MARKS,
        "maps": [],
        "viewer": None,
    }
    facts = [
        results.attribute("model").get("name", "model not recorded"),
        results.attribute("dataset").get("id", "data not recorded"),
        text.count(len(images), "image"),
        f"{text.count(len(results.layers), 'layer')} × {text.count(len(results.heads), 'head')}",
        *([f"{len(results.seeds)} seeds"] if len(results.seeds) > 1 else []),
    ]
    return page(
        sections(ReportedStudy(results, summary), "page"),
        title=f"Attention structure: {', '.join(results.conditions)}",
        heading=f"How attention differs between {text.listing(results.conditions)}",
        facts=" · ".join(facts),
        payload=payload,
    )


def render_figures(results: Results) -> Iterator[tuple[str, bytes]]:
    """(file name, bytes) of every figure that these results have something for, SVG and PNG."""
    for stem, figure in figures(results):
        yield f"{stem}.svg", figure.svg()
        yield f"{stem}.png", figure.png()
