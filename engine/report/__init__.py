"""The report: summary.md, figures and report.html from a study's stored tables and samples alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.outputs import replace_files
from train.checkpoint import write_atomically
from train.errors import InputError

__all__ = ["write_report"]

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
            does not fit the others, or the folder cannot be written.
    """
    # Lazy: the command line answers without xarray, matplotlib and jinja2.
    from engine.report.figures import render_figures
    from engine.report.inputs import load_results
    from engine.report.page import render_page
    from engine.report.summary import summary_markdown

    outputs = Path(outputs)
    results = load_results(outputs)
    summary = summary_markdown(results)
    written = [
        _replace(outputs / "summary.md", summary.encode("utf-8")),
        _replace(outputs / "report.html", render_page(results, summary).encode("utf-8")),
    ]
    written += _replace_folder(outputs / FIGURES, render_figures(results))
    return tuple(written)


def _replace(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all."""
    with _writing(path):
        write_atomically(path, content)
    return path


def _replace_folder(folder: Path, files: Iterable[tuple[str, bytes]]) -> list[Path]:
    """Replaces a folder's files: figures of metrics that are no longer measured go."""
    with _writing(folder):
        return replace_files(folder, files)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another --outputs folder"
        ) from error
