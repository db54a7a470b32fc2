"""The report: summary.md, figures and report.html from a study's stored tables and samples alone."""

from __future__ import annotations

import os
from pathlib import Path

from train.whole_files import replace_files, write_atomically

FIGURES = Path("visualizations/figures")


def write_report(outputs: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes `summary.md`, `report.html` and the figures (SVG and PNG) of the study in a folder.

    Needs neither model nor images, takes seconds, and writes the same bytes for the same inputs. Every file is put in
    place whole, so a run that is killed leaves no torn one; of the figures, those
    that it wrote before and does not now are removed.

    Args:
        outputs: the outputs folder, with `metrics/attention_metrics.zarr` and `metrics/attention_comparison.json`;
            `metrics/training.json`, `samples.zarr`, `visualizations/gradcam_samples/`, `study.toml` and `run.jsonl`
            add their parts where they exist.
    Returns:
        The files written.
    Raises:
        InputError: an input is missing, cannot be read, is not what its stage wrote (where there is a `run.jsonl`) or
            does not fit the others.
        DiskError: a file cannot be written.
    """
    # Lazy: the command line answers without xarray, matplotlib and jinja2.
    from engine.report.figures import render_figures
    from engine.report.inputs import load_results
    from engine.report.page import render_page
    from engine.report.summary import summary_markdown

    outputs = Path(outputs)
    results = load_results(outputs)
    summary = summary_markdown(results)
    files = {"summary.md": summary.encode("utf-8"), "report.html": render_page(results, summary).encode("utf-8")}
    for name, content in files.items():
        write_atomically(outputs / name, content)
    return (*(outputs / name for name in files), *replace_files(outputs / FIGURES, render_figures(results)))
