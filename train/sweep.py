"""How much of a backbone's accuracy low-rank adapters bring back, by rank, with hyper-parameters chosen for each rank.

For one backbone (plain, pruned or binarised) and one rank, Optuna proposes learning rate, alpha and label smoothing,
every proposal is a training run, and the one that is best on validation is kept. Trials lie in a storage file. The
sampler of the n-th trial is seeded by n, so an interrupted sweep goes on with the trials of one that was not.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from store.removal import named, remove
from train.adapters import whole_classifier
from train.checkpoint import read_checkpoint, read_metadata, save_checkpoint, sidecar_path
from train.compress import compress
from train.conditions import TrainResult, train_condition
from train.data import DataSplits
from train.errors import InputError, TrainingDivergedError
from train.evaluation import evaluate
from train.history import history_path
from train.model_source import ModelSource
from train.models import load_checkpoint
from train.settings import Compression, TrainingRun
from train.state import settings_key

if TYPE_CHECKING:
    import optuna

logger = logging.getLogger(__name__)

ALPHA_RATIOS = (0.5, 1.0, 2.0, 4.0)  # alpha / rank
MAX_LABEL_SMOOTHING = 0.2
PRUNING_STARTUP = 4  # trials before the first that may be pruned
_FAILED = "diverged"  # mark of a trial that ended in NaN or Inf; one without it was interrupted


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What is the same for every backbone and rank.

    Args:
        model: the pretrained one as saved here, its head of the data's classes.
        probe: a probe of it, whose head every trial begins with; None: the head that came with the weights.
        run: of every trial; lr, alpha, label_smoothing, rank and compression are the sweep's.
        lr_range: that learning rates are drawn from, on a log scale.
        trials: per backbone and rank.
        device: "cpu" or "cuda".
        folder: of all files.
    """

    model: ModelSource
    probe: Path | None
    run: TrainingRun
    lr_range: tuple[float, float]
    trials: int
    device: str
    folder: Path


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the report shows it; `value` is the validation accuracy, None where there is none."""

    number: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    curve: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class RankResult:
    """The best trial of a backbone and rank.

    Args:
        base: the compression of the backbone.
        rank: of the adapters.
        checkpoint: the model with its adapters merged; its name holds the test accuracy.
        params: chosen by Optuna.
        validation_accuracy, test_accuracy: of the best trial; test had no part in choosing it.
        without_adapters: test accuracy of the same backbone and head with no adapter and no training.
        trainable_parameters: of the best trial.
        history: of the best trial, one dict an epoch.
        trials: all of them, in order.
    """

    base: Compression
    rank: int
    checkpoint: Path
    params: Mapping[str, Any]
    validation_accuracy: float
    test_accuracy: float
    without_adapters: float
    trainable_parameters: int
    history: Sequence[Mapping[str, Any]]
    trials: Sequence[TrialRecord] = field(repr=False)


def sweep_rank(plan: SweepPlan, base: Compression, rank: int, data: DataSplits) -> RankResult:
    """Run the trials of one backbone and rank that are not done yet, and keep the best.

    Raises:
        InputError: adapters that do not fit the model, see `train.adapters.add_adapters`.
        TrainingDivergedError: every trial ended in NaN or Inf.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    key = settings_key(
        model=plan.model.name,
        img_size=plan.model.img_size,
        arguments=dict(plan.model.arguments),
        weights=read_metadata(Path(plan.model.weights))["sha256"],
        probe=None if plan.probe is None else read_metadata(plan.probe)["sha256"],
        data=data.manifest.sha256,
        preprocessing=data.train.preprocessing.to_dict(),
        hyperparameters=_trial_run(plan, base, rank, {}).used_values(),
        recipe=plan.run.condition.recipe,
        lr_range=plan.lr_range,
        seed=plan.run.seed,
        deterministic=plan.run.shared.deterministic,
        device=plan.device,
    )
    name = f"quant={base}_r={rank}"
    study = _study(plan, f"{name}_{key[:16]}")
    (plan.folder / "trials").mkdir(parents=True, exist_ok=True)
    while (position := len(_finished(study))) < plan.trials:
        _run_trial(study, position, plan, base, rank, data)
    completed = [trial for trial in _finished(study) if trial.state == optuna.trial.TrialState.COMPLETE]
    if not completed:
        raise TrainingDivergedError(
            f"all {plan.trials} trials of {name} ended in NaN or Inf; lower sweep.lr_high, now {plan.lr_range[1]:g}"
        )
    best = max(completed, key=lambda trial: trial.value or 0.0)  # the first of several
    place = _finished(study).index(best)
    path, metadata = _keep(plan, name, key, base, rank, best.params, _trial_path(plan, name, place), data)
    return RankResult(
        base=base,
        rank=rank,
        checkpoint=path,
        params=best.params,
        validation_accuracy=metadata["validation_accuracy"],
        test_accuracy=metadata["test_accuracy"],
        without_adapters=metadata["without_adapters"],
        trainable_parameters=metadata["trainable_parameters"],
        history=metadata["history"],
        trials=[_record(place, trial) for place, trial in enumerate(_finished(study))],
    )


def _study(plan: SweepPlan, name: str) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage

    from train.trials import TrialsFile

    plan.folder.mkdir(parents=True, exist_ok=True)
    return optuna.create_study(
        storage=JournalStorage(TrialsFile(plan.folder / "trials.jsonl", name)),
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNING_STARTUP, n_warmup_steps=plan.run.epochs // 3),
    )


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Trials with an outcome, in order; one that was interrupted has none and is run again."""
    from optuna.trial import TrialState

    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return [trial for trial in study.trials if trial.state in done or trial.user_attrs.get(_FAILED)]


def _run_trial(
    study: optuna.Study, position: int, plan: SweepPlan, base: Compression, rank: int, data: DataSplits
) -> None:
    import optuna
    from optuna.trial import TrialState

    for interrupted in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(interrupted.number, state=TrialState.FAIL)  # its process is gone: the outputs folder is locked
    name = f"quant={base}_r={rank}"
    seed = zlib.crc32(f"{plan.run.seed} {name} {position}".encode())
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, plan.trials // 3))
    trial = study.ask()
    params = {
        "lr": trial.suggest_float("lr", *plan.lr_range, log=True),
        "alpha_ratio": trial.suggest_categorical("alpha_ratio", ALPHA_RATIOS),
        "label_smoothing": trial.suggest_float("label_smoothing", 0.0, MAX_LABEL_SMOOTHING),
    }
    path = _trial_path(plan, name, position)

    def each_epoch(history: Sequence[Mapping[str, Any]]) -> None:
        for entry in history[len(study.trials[trial.number].intermediate_values) :]:
            trial.report(entry["validation_accuracy"], entry["epoch"])
        if len(history) < plan.run.epochs and trial.should_prune():
            raise optuna.TrialPruned

    try:
        result = _train(plan, base, rank, params, path, data, position, each_epoch)
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
    except TrainingDivergedError as error:
        logger.warning("%s", error)
        trial.set_user_attr(_FAILED, True)
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, result.validation_accuracy)
    _remove_worse(study, plan, name)


def _train(
    plan: SweepPlan,
    base: Compression,
    rank: int,
    params: Mapping[str, Any],
    path: Path,
    data: DataSplits,
    position: int,
    each_epoch: Any = None,
) -> TrainResult:
    return train_condition(
        _trial_run(plan, base, rank, params),
        model=plan.model,
        data=data,
        checkpoint=path,
        probe_checkpoint=plan.probe,
        device=plan.device,
        on_epoch=each_epoch,
        name=f"{base} rank {rank} trial {position + 1} of {plan.trials}",
    )


def _trial_run(plan: SweepPlan, base: Compression, rank: int, params: Mapping[str, Any]) -> TrainingRun:
    run = plan.run
    alpha = params.get("alpha_ratio", 1.0) * rank
    return replace(
        run,
        condition=replace(run.condition, lr=params.get("lr", 0.0), alpha=alpha, rank=rank),
        shared=replace(run.shared, label_smoothing=params.get("label_smoothing", 0.0)),
        compression=base,
        own_head=plan.probe is None,
    )


def _trial_path(plan: SweepPlan, name: str, position: int) -> Path:
    return plan.folder / "trials" / f"{name}_trial{position:03d}.safetensors"


def _remove_worse(study: optuna.Study, plan: SweepPlan, name: str) -> None:
    """The files of every trial but the best so far; a trial is trained again from its numbers if need be."""
    from optuna.trial import TrialState

    finished = _finished(study)
    values = [trial.value if trial.state == TrialState.COMPLETE else None for trial in finished]
    best = max((value for value in values if value is not None), default=None)
    keep = values.index(best) if best is not None else -1
    for position in range(len(finished)):
        if position != keep:
            _remove(_trial_path(plan, name, position))


def _remove(path: Path) -> None:
    states = [path.with_suffix(f".state{part}.safetensors") for part in ("", ".previous")]
    for file in (path, sidecar_path(path), history_path(path), *states):
        remove(file, named(rf"{re.escape(path.stem)}\.[a-z.]+"))  # a trial's, in the folder of trials


def _keep(
    plan: SweepPlan,
    name: str,
    key: str,
    base: Compression,
    rank: int,
    params: Mapping[str, Any],
    trial_path: Path,
    data: DataSplits,
) -> tuple[Path, dict[str, Any]]:
    """The best trial's weights under the name that holds their test accuracy; others of the name are removed."""
    wanted = {"sweep": key, "params": dict(params)}
    for path in sorted(plan.folder.glob(f"{name}_eval_acc=*.safetensors")):
        try:
            metadata = read_checkpoint(path).metadata
        except InputError as error:  # damaged, or without its sidecar
            logger.warning("%s; its trial is trained again", error)
            continue
        if {name: metadata.get(name) for name in wanted} == wanted:
            _remove(trial_path)
            return path, metadata
    position = int(trial_path.stem[-3:])
    result = _train(plan, base, rank, params, trial_path, data, position)
    checkpoint = read_checkpoint(result.checkpoint)
    metadata = {name: value for name, value in checkpoint.metadata.items() if name not in ("schema", "file", "sha256")}
    metadata |= wanted | {"without_adapters": _without_adapters(plan, base, data)}
    earlier = named(rf"{re.escape(name)}_eval_acc=\d\.\d{{4}}\.(safetensors|json)")
    for path in filter(earlier, plan.folder.glob(f"{name}_eval_acc=*")):
        remove(path, earlier)
    path = plan.folder / f"{name}_eval_acc={result.test_accuracy:.4f}.safetensors"
    save_checkpoint(path, checkpoint.tensors, metadata)
    _remove(trial_path)
    return path, metadata


def _without_adapters(plan: SweepPlan, base: Compression, data: DataSplits) -> float:
    model = load_checkpoint(plan.model, plan.probe or plan.model.weights)
    whole = whole_classifier(model, plan.run.condition.targets)
    compress(model, base, sparsity=plan.run.sparsity, keep=whole)
    device = torch.device(plan.device)
    return evaluate(model.to(device), data.test, device).accuracy


def _record(number: int, trial: optuna.trial.FrozenTrial) -> TrialRecord:
    state = "diverged" if trial.user_attrs.get(_FAILED) else trial.state.name.lower()
    curve = [value for _, value in sorted(trial.intermediate_values.items())]
    return TrialRecord(number, state, trial.value if state == "complete" else None, trial.params, curve)
