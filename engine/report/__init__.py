"""The report: summary.md, figures and report.html from the stored tables and samples of a study alone."""

from engine.report.sweep import curves_png, evaluation_csv, history_html
from engine.report.write import write_report

__all__ = ["curves_png", "evaluation_csv", "history_html", "write_report"]
