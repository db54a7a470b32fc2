"""What a sweep leaves to look at: curves of each rank as PNG, its trials as a self-contained page, one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.report import text
from engine.report.document import Block, Content, Figure, Group, Section, Table, Text
from engine.report.downloads import csv_bytes
from engine.report.html import page
from engine.report.plots import Chart, FigureFile, Line

if TYPE_CHECKING:
    from train.sweep import RankResult, TrialRecord

GREY = "#777777"


def evaluation_csv(results: Sequence[RankResult], recipe: str, init: str) -> bytes:
    """One row per backbone and rank: accuracies as shares of the images, and the hyper-parameters that were chosen."""
    rows = []
    for result in results:
        states = [trial.state for trial in result.trials]
        row: dict[str, Any] = {"quant": result.base, "rank": result.rank, "recipe": recipe, "init": init}
        row |= {
            "test_accuracy": result.test_accuracy,
            "validation_accuracy": result.validation_accuracy,
            "test_accuracy_without_adapters": result.without_adapters,
            "trainable_parameters": result.trainable_parameters,
            "lr": f"{result.params['lr']:.6g}",
            "alpha": result.params["alpha_ratio"] * result.rank,
            "label_smoothing": f"{result.params['label_smoothing']:.4f}",
        }
        row |= {f"trials_{state}": states.count(state) for state in ("complete", "pruned", "diverged")}
        rows.append(row | {"checkpoint": result.checkpoint.name})
    return csv_bytes(rows)


def curves_png(history: Sequence[Mapping[str, Any]], what: str, title: str) -> bytes:
    """Train and validation by epoch; `what` is "accuracy" (%) or "loss" (nat). The same bytes each time."""
    train, scale, unit = ("train_accuracy", 100.0, "%") if what == "accuracy" else ("loss", 1.0, "nat")
    epochs = [entry["epoch"] + 1 for entry in history]
    lines = [
        Line(name, color, epochs, np.array([scale * entry[key] for entry in history]))
        for color, (name, key) in enumerate((("train", train), ("validation", f"validation_{what}")))
    ]
    chart = Chart(title=title, lines=lines, x_label="epoch", y_label=f"{what} ({unit})", x_ticks=epochs)
    return FigureFile(panels=[chart], title=title, legend=[("train", 0), ("validation", 1)]).png()


def history_html(result: RankResult, title: str) -> str:
    """The trials of one rank: their values with the best so far, their curves, and a table; nothing is fetched."""
    best = max(result.trials, key=lambda trial: -1.0 if trial.value is None else trial.value)
    names = sorted({name for trial in result.trials for name in trial.params})
    rows: list[list[Content]] = [
        [
            str(trial.number + 1),
            trial.state,
            "—" if trial.value is None else f"{100 * trial.value:.2f}",
            str(len(trial.curve)),
            *(f"{trial.params[name]:.4g}" if name in trial.params else "—" for name in names),
        ]
        for trial in result.trials
    ]
    validation, test, before = (
        f"{100 * share:.2f} %" for share in (result.validation_accuracy, result.test_accuracy, result.without_adapters)
    )
    said = (
        f"Best trial: validation {validation}, test {test} (the same backbone without adapters: {before}). Trials are "
        "compared on validation; test had no part in it."
    )
    header = ["trial", "state", "validation (%)", "epochs", *names]
    looks = ["best" if trial is best else "" for trial in result.trials]
    table = Table(header, rows, f"{text.count(len(rows), 'trial')}, the best in bold", looks=looks)
    blocks: list[Block] = [Text(said), Group("charts", [*map(Figure, _charts(result.trials))]), table]
    return page([Section("Trials", "Trials", "trials", blocks)], title=title, heading=title, facts="")


def _charts(trials: Sequence[TrialRecord]) -> tuple[Chart, Chart]:
    """The value of each trial with the best so far, and each trial's curve by epoch."""
    done = [trial for trial in trials if trial.value is not None]
    pruned = [trial for trial in trials if trial.state == "pruned" and trial.curve]
    numbers = [trial.number + 1 for trial in done]
    values = 100 * np.array([trial.value for trial in done], dtype=np.float64)
    last = 100 * np.array([trial.curve[-1] for trial in pruned], dtype=np.float64)
    lines = [
        Line("best so far", 1, numbers, np.maximum.accumulate(values), look="thin"),
        Line("complete", 0, numbers, values, look="points"),
        Line("pruned", GREY, [trial.number + 1 for trial in pruned], last, look="points"),
    ]
    curves = [
        Line(
            f"trial {trial.number + 1}, {trial.state}",
            GREY if trial.value is None else 0,
            range(1, len(trial.curve) + 1),
            100 * np.asarray(trial.curve),
            look="thin",
        )
        for trial in trials
    ]
    epochs = range(1, 1 + max((len(trial.curve) for trial in trials), default=1))
    places = [trial.number + 1 for trial in trials]
    accuracy = "accuracy (%)"
    title = "validation accuracy of each trial (line: best so far; grey: pruned)"
    return (
        Chart(title=title, lines=lines, x_label="trial", y_label=accuracy, x_ticks=places),
        Chart(title="by epoch (grey: pruned)", lines=curves, x_label="epoch", y_label=accuracy, x_ticks=epochs),
    )
