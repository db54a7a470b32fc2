"""What a sweep leaves to look at: curves a rank as PNG, the trials of a rank as a self-contained page, one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.report.figures import PALETTE
from train.sweep import RankResult, TrialRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "quant",
    "rank",
    "recipe",
    "init",
    "test_accuracy",
    "validation_accuracy",
    "test_accuracy_without_adapters",
    "trainable_parameters",
    "lr",
    "alpha",
    "label_smoothing",
    "trials_complete",
    "trials_pruned",
    "trials_diverged",
    "checkpoint",
)


def evaluation_csv(results: Sequence[RankResult], recipe: str, init: str) -> str:
    """One row a backbone and rank: accuracies as shares of the images, and the hyper-parameters that were chosen."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(COLUMNS)
    for result in results:
        states = [trial.state for trial in result.trials]
        table.writerow(
            [
                result.base,
                result.rank,
                recipe,
                init,
                result.test_accuracy,
                result.validation_accuracy,
                result.without_adapters,
                result.trainable_parameters,
                f"{result.params['lr']:.6g}",
                result.params["alpha_ratio"] * result.rank,
                f"{result.params['label_smoothing']:.4f}",
                *(states.count(state) for state in ("complete", "pruned", "diverged")),
                result.checkpoint.name,
            ]
        )
    return buffer.getvalue()


def curves_png(history: Sequence[Mapping[str, Any]], what: str, title: str) -> bytes:
    """Train and validation by epoch; `what` is "accuracy" (%) or "loss" (nat). The same bytes each time."""
    from matplotlib.ticker import MaxNLocator

    train, scale = ("train_accuracy", 100.0) if what == "accuracy" else ("loss", 1.0)
    figure = _figure(4.8, 3.2)
    axes = figure.subplots()
    epochs = [entry["epoch"] + 1 for entry in history]
    for key, name, color, marker in (
        (train, "train", PALETTE[0], "o"),
        (f"validation_{what}", "validation", PALETTE[1], "s"),
    ):
        axes.plot(epochs, [scale * entry[key] for entry in history], label=name, color=color, marker=marker, ms=3.5)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("epoch")
    axes.set_ylabel("accuracy (%)" if what == "accuracy" else "loss (nat)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def history_html(result: RankResult, title: str) -> str:
    """The trials of one rank: their values with the best so far, their curves, and a table; nothing is fetched."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    best = max(result.trials, key=lambda trial: -1.0 if trial.value is None else trial.value).number
    return environment.from_string(_PAGE).render(
        title=title,
        chart=Markup(_trials_svg(result.trials)),
        trials=result.trials,
        names=sorted({name for trial in result.trials for name in trial.params}),
        best=best,
        result=result,
    )


def _trials_svg(trials: Sequence[TrialRecord]) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "vit-attention-engine", "svg.fonttype": "path"}):
        figure = _figure(8.2, 3.4)
        values, curves = figure.subplots(1, 2)
        done = [trial for trial in trials if trial.value is not None]
        pruned = [trial for trial in trials if trial.state == "pruned" and trial.curve]
        values.plot(
            [t.number + 1 for t in done], [100 * (t.value or 0) for t in done], "o", color=PALETTE[0], label="complete"
        )
        if pruned:
            last = [100 * trial.curve[-1] for trial in pruned]
            values.plot([t.number + 1 for t in pruned], last, "x", color="#777777", label="pruned")
        best, steps = 0.0, []
        for trial in done:
            best = max(best, trial.value or 0)
            steps.append(100 * best)
        values.step([t.number + 1 for t in done], steps, where="post", color=PALETTE[1], label="best so far")
        values.set(title="validation accuracy of each trial", xlabel="trial", ylabel="accuracy (%)")
        for trial in trials:
            curves.plot(
                range(1, len(trial.curve) + 1),
                [100 * value for value in trial.curve],
                color=PALETTE[0] if trial.value is not None else "#999999",
                linestyle="-" if trial.value is not None else "--",
                marker=".",
                linewidth=1,
            )
        curves.set(title="by epoch (dashed: pruned)", xlabel="epoch", ylabel="accuracy (%)")
        for axes in (values, curves):
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        values.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    """A figure that no window or global state knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
svg { width: 100%; height: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #ddd } tr.best { font-weight: bold }
</style></head><body>
<h1>{{ title }}</h1>
<p>Best trial: validation {{ "%.2f" | format(100 * result.validation_accuracy) }} %, test
{{ "%.2f" | format(100 * result.test_accuracy) }} % (the same backbone without adapters:
{{ "%.2f" | format(100 * result.without_adapters) }} %). Trials are compared on validation; test had no part in it.</p>
{{ chart }}
<table><thead><tr><th>trial</th><th>state</th><th>validation (%)</th><th>epochs</th>
{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for trial in trials %}
<tr{% if trial.number == best %} class="best"{% endif %}><td>{{ trial.number + 1 }}</td><td>{{ trial.state }}</td>
<td>{% if trial.value is not none %}{{ "%.2f" | format(100 * trial.value) }}{% else %}—{% endif %}</td>
<td>{{ trial.curve | length }}</td>
{% for name in names %}<td>{{ "%.4g" | format(trial.params[name]) if name in trial.params else "—" }}</td>{% endfor %}
</tr>
{% endfor %}
</tbody></table></body></html>
"""
