"""The sweep: how much accuracy adapters of each rank bring to a plain, pruned or binarised backbone.

outputs/sweep/<recipe>_<init>/
    evaluation.csv                                       one row for each backbone and rank
    acc_quant=<base>_r=<rank>.png  loss_quant=….png      curves of the best trial
    quant=<base>_r=<rank>_eval_acc=<accuracy>.safetensors  its weights, adapters merged, with a .json beside
    quant=<base>_r=<rank>_optimization_history.html      all trials
    trials.jsonl                                         Optuna's log, checked: what is there is not done again
"""

from __future__ import annotations

import re
from pathlib import Path

from engine.capture import num_blocks
from engine.config import JOURNAL, ConditionConfig, StudyConfig, study_toml
from engine.progress import PROGRAM, say
from engine.report import curves_png, evaluation_csv, history_html
from engine.study.check import check_sweep, one_torch_thread
from engine.study.data import prepare_data
from engine.study.journal import Journal
from engine.study.model import model_source, named_head, trained_here, with_present_name
from engine.study.outputs import OutputsFolder, resolve_device
from engine.study.start import Start, image_kind
from train.choices import SWEEP_INITS
from train.data import DataSplits, folder_classes
from train.errors import InputError
from train.models import classifier_name, head_size
from train.processes import several_processes
from train.recipes import HEAD_RECIPE
from train.settings import TrainingRun
from train.sweep import SweepPlan, sweep_rank
from train.training import train_condition
from train.whole_files import write_atomically


def run_sweep(config: StudyConfig) -> Path:
    """Sweep every backbone and rank of `config.sweep`, doing only what is not done yet.

    Returns:
        The folder of the results.

    Raises:
        InputError: no pictures on disk are named, several processes, adapters that do not fit, a learning-rate range
            that is none.
    """
    image_kind(config)
    config = with_present_name(config)
    if several_processes():
        raise InputError(f"sweep runs in one process; start it with {PROGRAM} sweep, without torchrun")
    sweep = config.sweep
    if not sweep.lr_low < sweep.lr_high:
        raise InputError(f"sweep.lr_low {sweep.lr_low:g} must be below sweep.lr_high {sweep.lr_high:g}")
    outputs = Path(config.outputs)
    device = resolve_device(config.device)
    folder = outputs / "sweep" / f"{sweep.recipe}_{sweep.init}"
    journal = Journal(outputs / JOURNAL)
    with OutputsFolder(outputs, study_toml(config), journal) as place:
        with one_torch_thread():
            start = Start(config, outputs, journal)
            model = start.take_model()
            # Where there is no attention: the classifier, as in the study that the sweep comes from.
            usual = "attention" if num_blocks(model) else re.escape(classifier_name(model))
            targets = sweep.targets or usual
            check_sweep(start, model, targets)
        place.begin()
        data = prepare_data(start, device=device)
        splits = data.splits_of(config.train.seeds[0])
        plan = _plan(start, splits, targets, folder, device)
        results = []
        for base in sweep.bases:
            for rank in sweep.ranks:
                result = sweep_rank(plan, base, rank, splits)
                results.append(result)
                name = f"quant={base}_r={rank}"
                title = f"{config.model.name}, {base}, {sweep.recipe} rank {rank}, {sweep.init}"
                write_atomically(folder / f"acc_{name}.png", curves_png(result.history, "accuracy", title))
                write_atomically(folder / f"loss_{name}.png", curves_png(result.history, "loss", title))
                page = history_html(result, title)
                write_atomically(folder / f"{name}_optimization_history.html", page.encode())
                table = evaluation_csv(results, sweep.recipe, sweep.init)
                write_atomically(folder / "evaluation.csv", table)
                say(
                    f"{base} rank {rank}: test {result.test_accuracy:.1%} "
                    f"(without adapters {result.without_adapters:.1%}), validation {result.validation_accuracy:.1%}"
                )
    say(f"open {folder / 'evaluation.csv'}")
    return folder


def _head_is_of(class_names: tuple[str, ...], config: StudyConfig) -> bool:
    """Whether the head that comes with the pretrained weights is of these classes, in this order."""
    outputs = head_size(model_source(config))
    if not outputs:
        return False
    order = config.data.class_order
    head = named_head(config, outputs) or folder_classes(outputs, class_names, order, "model.classes")
    if not head.known:
        say(f"the head of the weights is replaced by a probe's, as its classes are not known: {head.source}")
    return head.names == class_names


def _plan(start: Start, splits: DataSplits, targets: str, folder: Path, device: str) -> SweepPlan:
    """What all trials share: the pretrained weights, whose head they begin with, and where adapters go."""
    config, sweep = start.config, start.config.sweep
    model = trained_here(config, start.pretrained_path)
    probe: Path | None = None
    if not _head_is_of(splits.class_names, config):
        probe = start.sweep_probe_path
        run = TrainingRun(condition=ConditionConfig(recipe=HEAD_RECIPE), shared=config.train)
        train_condition(run, model=model, data=splits, checkpoint=probe, device=device)
    init, seed = SWEEP_INITS[sweep.init], config.train.seeds[0]
    condition = ConditionConfig(recipe=sweep.recipe, epochs=sweep.epochs, targets=targets, init=init)
    return SweepPlan(
        model=model,
        probe=probe,
        run=TrainingRun(condition=condition, shared=config.train, seed=seed, sparsity=sweep.sparsity),
        lr_range=(sweep.lr_low, sweep.lr_high),
        trials=sweep.trials,
        device=device,
        folder=folder,
    )
