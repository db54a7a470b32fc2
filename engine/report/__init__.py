"""The report: summary.md, figures and report.html from a study's stored tables and samples alone."""

from __future__ import annotations

import os
from pathlib import Path

from train.errors import InputError

__all__ = ["write_report"]

FIGURES = Path("visualizations/figures")


def write_report(outputs: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Writes `summary.md`, `report.html` and the figures (SVG and PNG) of the study in a folder.

    Needs neither model nor images, takes seconds, and writes the same bytes for the same inputs. Every file is put in
    place whole, so a run that is killed leaves old or new files and never a torn one.

    Args:
        outputs: the outputs folder, with `metrics/attention_metrics.zarr` and `metrics/attention_comparison.json`;
            `metrics/training.json`, `samples.zarr`, `visualizations/gradcam_samples/`, `study.toml` and `run.jsonl`
            add their parts where they exist.
    Returns:
        The files written.
    Raises:
        InputError: an input is missing, cannot be read or does not fit the others, or the folder cannot be written.
    """
    # Lazy: the command line answers without xarray, matplotlib and jinja2.
    from engine.report.figures import render_figures
    from engine.report.inputs import load_results
    from engine.report.page import render_page
    from engine.report.summary import summary_markdown

    outputs = Path(outputs)
    results = load_results(outputs)
    written = []
    for name, content in render_figures(results):
        written.append(_replace(outputs / FIGURES / name, content))
    summary = summary_markdown(results)
    written.append(_replace(outputs / "summary.md", summary.encode("utf-8")))
    written.append(_replace(outputs / "report.html", render_page(results, summary).encode("utf-8")))
    return tuple(written)


def _replace(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another --outputs folder"
        ) from error
    return path
