"""The study in order: check → images → conditions → capture → store → table → statistics → report.

Each stage is one call, says what it needs and what it leaves, and is skipped when its inputs, by content hash, are
those of the last time and its outputs are as it left them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine import __version__
from engine.capture import SampleMaps, capture_to_store, choose_samples, definitions
from engine.config import COMPARISON, STUDY, StudyConfig, all_metrics, chosen_metrics, conventions
from engine.measure import build_table, measure_store, prefix_mass_warning, read_table, write_table
from engine.progress import reason_of, say
from engine.relevance import (
    PredictionLink,
    RelevanceResults,
    choose_classes,
    explain_study,
    prediction_link,
    samples_folder,
)
from engine.report import write_report
from engine.statistics import Comparison, Control, analyse, declaration, write_comparison
from engine.study.check import check_study, one_torch_thread
from engine.study.controls import CONTROLS, Lockstep, negative_controls
from engine.study.data import dataset_info, manifest_dict, prepare_data
from engine.study.journal import digest_path
from engine.study.model import capture_settings, checkpoint_of, given_conditions, model_info, model_source
from engine.study.start import Start
from engine.study.study import Study
from engine.study.training import Run, train_runs
from store import AttentionStore
from train.parallel import Workers, joined
from train.processes import first_process
from train.training import versions
from train.whole_files import write_json


def run_study(config: StudyConfig, last: str = "report") -> Path:
    """Run the study through the stage `last`, one of `STAGES`, doing only what is not done yet.

    Returns:
        The outputs folder.

    Raises:
        InputError: whatever the configuration asks for that cannot be had, with what to do.
        Exception: what a stage ended in; of `SEPARATE_STAGES` the first, after the other stages.
    """
    study = Study(config)
    stages = STAGES[: STAGES.index(last) + 1]
    errors = []
    with study.opened() as folder:
        with joined(study.device) as workers:
            check(study, stages, workers)
            if folder is not None:
                folder.begin()
                study.name_primary()
            for stage in stages:
                if stage in SHARED_STAGES:
                    SHARED_STAGES[stage](study, workers)
        for stage in stages if first_process() else ():
            if stage in FIRST_STAGES and (error := attempt(study, stage)) is not None:
                errors.append(error)
    if errors:
        if "report" in stages:
            errors[0].add_note(f"the report, without what failed: {study.outputs / 'report.html'}")
        raise errors[0]
    return study.outputs


def attempt(study: Study, stage: str) -> Exception | None:
    """Run a stage; one that the others can do without may fail, and what it ended in is returned."""
    try:
        FIRST_STAGES[stage](study)
    except Exception as error:
        # A broken pipe is no fault of the stage: the reader of what is said has left.
        if stage not in SEPARATE_STAGES or isinstance(error, BrokenPipeError):
            raise
        reason = reason_of(error)
        study.journal.fail(stage, reason)
        say(f"{stage} failed and is left out: {reason}")
        return error
    return None


def check(study: Study, stages: Sequence[str], workers: Workers) -> None:
    """Needs: models or checkpoints, the data set's files. Leaves: nothing; says what cannot be had, of `stages`."""
    config = study.config
    with one_torch_thread():
        study.start = Start(config, study.outputs, study.journal, workers)
        model = study.start.take_model()
        given = [checkpoint_of(config, name) for name in given_conditions(config)]
        files = [file for source in given or [model_source(config)] for file in source.files]
        inputs = {
            "study": dataclasses.asdict(config),
            "stages": stages,
            "weights": [digest_path(file) for file in files],
            "data": study.start.data_inputs if study.start.listed is not None else {},
            "definitions": definitions(config.measure.metrics),
            "device": study.device,
        }
        work = partial(check_study, study.start, model, study.device, stages)
        study.journal.stage("check", inputs, [], work, workers=workers)


def train(study: Study, workers: Workers) -> None:
    """Needs: images. Leaves: checkpoints/<condition>_seed<k>.safetensors, metrics/training.json."""
    study.data = prepare_data(study.start, device=study.device)
    study.trained = train_runs(study.start, study.data, device=study.device)


def capture(study: Study, workers: Workers) -> None:
    """Needs: checkpoints, test images. Leaves: captures/<condition>_seed<k>.zarr, samples.zarr if any are kept."""
    config, data = study.config, study.data
    if study.sample_rows:
        study.journal.stage(
            "samples",
            {"data": data.digest, "rows": study.sample_rows},
            [study.samples / "zarr.json", study.samples / "images"],
            partial(_begin_samples, study),
            workers=workers,
        )
    metrics = all_metrics(config.measure) if "metrics" in config.capture.sinks else ()
    for run in study.runs:
        inputs = {
            "checkpoint": run.digest,
            "data": data.digest,
            "preprocessing": data.preprocessing.to_dict(),
            "capture": dataclasses.asdict(config.capture),
            "metrics": metrics,
            "definitions": definitions(metrics),
            "backend": config.measure.backend,
            "img_size": config.model.img_size,
            "samples": study.sample_rows,
            "device": study.device,
        }
        study.captures[run] = study.journal.stage(
            f"capture {run.name}",
            inputs,
            [study.store(run), *([study.samples / run.name] if study.sample_rows else [])],
            partial(_capture_run, study, run, workers),
            reads=[run.checkpoint],
            workers=workers,
            shared=True,
        )


def controls(study: Study) -> None:
    """Needs: checkpoints, test images. Leaves: metrics/controls.json, comparisons whose true answer is zero."""
    path = study.outputs / CONTROLS
    inputs = {
        "checkpoints": [[run.name, run.digest] for run in study.runs],
        "pretrained": study.data.pretrained_digest,
        "data": study.data.digest,
        "rows": study.control_rows,
        "against": study.against,
        "metrics": study.row_metrics(),
        "definitions": definitions(study.row_metrics()),
        "batch_size": study.config.capture.batch_size,
        "device": study.device,
    }
    reads = [run.checkpoint for run in study.runs]
    study.journal.stage("controls", inputs, [path], partial(_make_controls, study, path), reads=reads)
    for control in json.loads(path.read_bytes()):
        if not control["held"]:
            say(f"CONTROL DID NOT HOLD: {control['title']}: {control['detail']}")


def measure(study: Study) -> None:
    """Needs: captures. Leaves: metrics/attention_metrics.zarr, .h5 and .csv, one row per map."""
    config = study.config.measure
    inputs = {
        "captures": [[run.name, study.captures[run]] for run in study.runs],
        "metrics": config.metrics,
        "conventions": conventions(config),
        "definitions": definitions(config.metrics),
        "backend": config.backend,
    }
    outputs = [study.table.with_suffix(suffix) for suffix in (".zarr", ".h5", ".csv")]
    reads = list(map(study.store, study.runs))
    study.journal.stage("measure", inputs, outputs, partial(_make_table, study), reads=reads)


def statistics(study: Study) -> None:
    """Needs: the table, captures, controls. Leaves: metrics/attention_comparison.json."""
    path, controls = study.outputs / COMPARISON, study.outputs / CONTROLS
    controlled = study.journal.usable(controls)
    facts = {
        "accuracy": study.accuracy(),
        "classifiers": study.classifiers(),
        "data": study.data.summary(),
        "head_pairing": study.head_pairing(),
        "primary": study.primary_family(),
    }
    inputs = {
        "table": digest_path(study.table),
        "controls": digest_path(controls) if controlled else "",
        "document": declaration(Comparison),
        "settings": dataclasses.asdict(study.settings),
        **facts,
    }
    work = partial(_compare, study, path, controls if controlled else None, facts)
    reads = [study.table, controls, study.primary, *map(study.store, study.runs)]
    study.journal.stage("statistics", inputs, [path], work, reads=reads)


def relevance(study: Study) -> None:
    """Needs: checkpoints, captures, the table, test images. Leaves: metrics/relevance.json and .csv, pictures.

    The pictures are visualizations/gradcam_samples/ and visualizations/relevance/<method>/.
    """
    config, seed = study.config.relevance, study.config.data.seed
    heads = {name: study.data.head(name) for name in study.config.conditions}
    choice = choose_classes(heads, study.data.test, study.against)
    drawn = [row for row in study.sample_rows if row in choice.rows][: config.images]
    measured = [choice.rows[position] for position in choose_samples(config.measured, len(choice.rows), seed)]
    inputs = {
        "checkpoints": [[run.name, run.digest, study.captures[run]] for run in study.runs],
        "table": digest_path(study.table),
        "data": study.data.digest,
        "rows": [drawn, measured],
        "relevance": dataclasses.asdict(config),
        "document": declaration(RelevanceResults),
        "settings": study.settings.resampling(),
        "against": study.against,
        "classifiers": study.classifiers(),
        "seed": seed,
        "device": study.device,
    }
    outputs = [study.metrics / "relevance.json", study.metrics / "relevance.csv"]
    outputs += [samples_folder(study.outputs, method) for method in config.methods]

    def work() -> None:
        explain_study(
            study.outputs,
            {name: partial(study.model, run) for name, run in study.first_runs.items()},
            study.data.test,
            drawn,
            measured,
            config,
            heads=heads,
            choice=choice,
            settings=study.settings,
            link=_prediction_link(study),
            seed=seed,
            batch_size=study.config.capture.batch_size,
        )

    reads = [study.table, *(run.checkpoint for run in study.runs), *map(study.store, study.runs)]
    study.journal.stage("relevance", inputs, outputs, work, reads=reads)


def report(study: Study) -> None:
    """Needs: every file above. Leaves: visualizations/figures/, summary.md, report.html."""
    outputs = study.outputs
    inputs = {
        "metrics": digest_path(study.metrics),
        "samples": digest_path(study.samples),
        "gradcam": digest_path(samples_folder(outputs, "gradcam")),
        "relevance": digest_path(outputs / "visualizations" / "relevance"),
        "study": digest_path(outputs / STUDY),
        "failed": study.journal.failed(),
    }
    page, summary = outputs / "report.html", outputs / "summary.md"
    files = [page, summary, outputs / "visualizations" / "figures"]
    study.journal.stage("report", inputs, files, partial(_write_report, study))
    say(f"open {page}; the same in words: {summary}")


# What all processes of torchrun do together.
SHARED_STAGES: dict[str, Callable[[Study, Workers], None]] = {"train": train, "capture": capture}
# What the first one does alone.
FIRST_STAGES: dict[str, Callable[[Study], None]] = {
    "controls": controls,
    "measure": measure,
    "statistics": statistics,
    "relevance": relevance,
    "report": report,
}
STAGES = (*SHARED_STAGES, *FIRST_STAGES)
# What the report can do without: where one of these fails, the others go on, and the report says what it lacks.
SEPARATE_STAGES = ("controls", "relevance")


# ------------------------------------------------------------------------------------------ the work of the stages


def _begin_samples(study: Study) -> None:
    SampleMaps.create(study.samples, study.data.test, study.sample_rows)


def _capture_run(study: Study, run: Run, workers: Workers) -> dict[str, Any]:
    model = study.model(run)
    store = capture_to_store(
        model,
        study.data.test,
        study.store(run),
        capture_settings(study.config, study.device),
        model_info=model_info(run.model),
        dataset_info=dataset_info(study.data.splits.manifest),
        preprocessing=study.data.preprocessing.to_dict(),
        manifest=manifest_dict(study.data.splits.manifest),
        label=f"capture {run.name}",
        replace=True,
        workers=workers,
    )
    if study.sample_rows and workers.first:
        samples = SampleMaps.open(study.samples)
        samples.add(run.name, model, study.data.test, study.sample_rows, device=study.device)
    return {"images": len(store.image_ids), "layers": len(store.layers)}


def _make_controls(study: Study, path: Path) -> None:
    """The frozen backbone, a condition against itself, and a hybrid of two conditions."""
    runs = study.first_runs
    made = negative_controls(
        {name: partial(study.model, run) for name, run in runs.items()},
        [name for name, run in runs.items() if run.seed_invariant],
        study.against,
        study.pretrained_model,
        Lockstep(
            study.data.test, study.control_rows, study.row_metrics(), study.config.capture.batch_size, study.device
        ),
    )
    write_json(path, [dataclasses.asdict(control) for control in made])


def _make_table(study: Study) -> None:
    config, model = study.config.measure, study.config.model
    stores = {}
    for run in study.runs:
        store = stores[run.condition, run.seed] = AttentionStore.open(study.store(run))
        measure_store(store, all_metrics(config), config.backend, scheduler=config.scheduler)
    arguments = {"arguments": model.arguments} if model.arguments else {}
    attributes = {
        "model": {"name": model.name, "img_size": model.img_size, **arguments},
        "dataset": dataset_info(study.data.splits.manifest),
        "preprocessing": study.data.preprocessing.to_dict(),
        "versions": versions(),
        "code_version": __version__,
    }
    invariant = [run.condition for run in study.runs if run.seed_invariant]
    table = build_table(
        stores,
        config.metrics,
        conventions=conventions(config),
        seed_invariant=invariant,
        attributes=attributes,
    )
    write_table(table, study.metrics)


def _compare(study: Study, path: Path, controls: Path | None, facts: Mapping[str, Any]) -> None:
    """The tests and what belongs to them: `controls`, the file of those that were made, and `facts` of the models."""
    table = read_table(study.table)
    tested = chosen_metrics(table)
    comparison = dataclasses.replace(
        analyse(table, study.settings),
        **facts,
        controls=tuple(Control(**made) for made in json.loads(controls.read_bytes())) if controls else (),
        undefined={name: of for name, of in json.loads(table.attrs["undefined"]).items() if name in tested},
        prefix_mass_warning=prefix_mass_warning(table),
    )
    write_comparison(path, comparison)


def _prediction_link(study: Study) -> list[PredictionLink]:
    """Do heads' changes go with changes of the prediction? Of the conditions whose classes are known."""
    logits: dict[str, list[np.ndarray]] = {}
    for run in study.runs:
        if study.data.head(run.condition).known:
            logits.setdefault(run.condition, []).append(study.logits(run))
    return prediction_link(
        chosen_metrics(read_table(study.table)),
        {condition: np.mean(of_runs, axis=0) for condition, of_runs in logits.items()},
        {condition: study.outputs_of_labels(condition) for condition in logits},
        against=study.against,
        permutations=study.config.statistics.permutations,
        seed=study.config.statistics.seed,
    )


def _write_report(study: Study) -> None:
    write_report(study.outputs, study.journal)
