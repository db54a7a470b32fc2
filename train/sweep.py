"""How much of a backbone's accuracy low-rank adapters bring back, by rank, with hyper-parameters chosen for each rank.

For one backbone (plain, pruned or binarised) and one rank, Optuna proposes learning rate, alpha and label smoothing,
every proposal is a training run, and the one that is best on validation is kept. Trials lie in a storage file. The
sampler of the n-th trial is seeded by n, so an interrupted sweep goes on with the trials of one that was not, and the
first trials are the same whatever their number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.trial import FrozenTrial, TrialState

from store.disk import writing
from store.removal import named, remove
from train.adapters import compress, whole_classifier
from train.checkpoint import history_path, read_checkpoint, read_metadata, save_checkpoint, sidecar_path
from train.choices import Compression
from train.data import DataSplits
from train.errors import InputError, TrainingDivergedError
from train.evaluation import evaluate
from train.model_source import ModelSource
from train.models import load_checkpoint
from train.settings import TrainingRun
from train.state import settings_key
from train.training import OnEpoch, TrainResult, train_condition
from train.whole_files import write_atomically

logger = logging.getLogger(__name__)


class TrialsFile(BaseJournalBackend):
    """The trials of one backbone and rank in a file that several share: Optuna's log, one process writing at a time.

    One JSON object per line: `study` (a backbone and rank), `log` (Optuna's own entry), `previous` (the checksum of the
    study's line before, "" for its first) and `checksum`. A study's log is the chain of lines that follow one another:
    a line that is damaged, lost or out of place ends the chain, so that trials from there on are run again, with the
    same outcome, and those of other studies stay. Damaged lines are named and taken out.
    """

    def __init__(self, path: Path, study: str) -> None:
        self.path, self.study = path, study
        self._logs: list[dict[str, Any]] = []
        self._last = ""
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        entries = [_parse(line) for line in lines]
        if damaged := [number for number, entry in enumerate(entries, 1) if entry is None]:
            numbers = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
            logger.warning("%s: line %s damaged; the trials that need what it said are run again", path, numbers)
            write_atomically(path, b"".join(line for line, e in zip(lines, entries, strict=True) if e is not None))
        for entry in entries:
            if entry is not None and (entry["study"], entry["previous"]) == (study, self._last):
                self._logs.append(entry["log"])
                self._last = entry["checksum"]

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with writing(self.path), open(self.path, "ab") as file:
            for log in logs:
                line = _line(self.study, self._last, log)
                file.write(line)
                entry = json.loads(line)  # as a later process will read it
                self._logs.append(entry["log"])
                self._last = entry["checksum"]
            file.flush()
            os.fsync(file.fileno())


def _line(study: str, previous: str, log: dict[str, Any]) -> bytes:
    body = {"study": study, "previous": previous, "log": log}
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({"checksum": checksum, **body}, sort_keys=True) + "\n").encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, if it is byte for byte what was written."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return entry if _line(entry["study"], entry["previous"], entry["log"]) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


ALPHA_RATIOS = (0.5, 1.0, 2.0, 4.0)  # alpha / rank
MAX_LABEL_SMOOTHING = 0.2
RANDOM_TRIALS = 6  # drawn at random before Optuna learns from those there are
PRUNING_STARTUP = 4  # trials before the first that may be pruned
_FAILED = "diverged"  # mark of a trial that ended in NaN or Inf; one without it was interrupted


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What is the same for every backbone and rank."""

    model: ModelSource  # the pretrained one as saved here, its head of the data's classes
    probe: Path | None  # a probe of it, whose head every trial begins with; None: the head that came with the weights
    run: TrainingRun  # of every trial; lr, alpha, label_smoothing, rank and compression are the sweep's
    lr_range: tuple[float, float]  # that learning rates are drawn from, on a log scale
    trials: int  # per backbone and rank
    device: str
    folder: Path  # of all files


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
    """The best trial of a backbone and rank."""

    base: Compression
    rank: int
    checkpoint: Path  # the model with its adapters merged; its name holds the test accuracy
    params: Mapping[str, Any]  # chosen by Optuna
    validation_accuracy: float
    test_accuracy: float  # had no part in choosing the trial
    without_adapters: float  # test accuracy of the same backbone and head with no adapter and no training
    trainable_parameters: int
    history: Sequence[Mapping[str, Any]]  # one dict per epoch
    trials: Sequence[TrialRecord] = field(repr=False)  # all of them, in order


def sweep_rank(plan: SweepPlan, base: Compression, rank: int, data: DataSplits) -> RankResult:
    """Run the trials of one backbone and rank that are not done yet, and keep the best.

    Raises InputError as `train.adapters.add_adapters`; TrainingDivergedError: every trial ended in NaN or Inf.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _RankSweep(plan, base, rank, data).result()


class _RankSweep:
    def __init__(self, plan: SweepPlan, base: Compression, rank: int, data: DataSplits) -> None:
        self.plan, self.base, self.rank, self.data = plan, base, rank, data
        self.name = f"quant={base}_r={rank}"
        run = plan.run
        self.key = settings_key(
            model=plan.model.name,
            img_size=plan.model.img_size,
            arguments=dict(plan.model.arguments),
            weights=read_metadata(Path(plan.model.weights))["sha256"],
            probe=None if plan.probe is None else read_metadata(plan.probe)["sha256"],
            data=data.manifest.sha256,
            preprocessing=data.train.preprocessing.to_dict(),
            hyperparameters=self._run_of({}).used_values(),
            recipe=run.condition.recipe,
            lr_range=plan.lr_range,
            seed=run.seed,
            deterministic=run.shared.deterministic,
            device=plan.device,
        )
        (plan.folder / "trials").mkdir(parents=True, exist_ok=True)
        study = f"{self.name}_{self.key[:16]}"
        self.study = optuna.create_study(
            storage=JournalStorage(TrialsFile(plan.folder / "trials.jsonl", study)),
            study_name=study,
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNING_STARTUP, n_warmup_steps=run.epochs // 3),
        )

    def result(self) -> RankResult:
        while (position := len(self._finished())) < self.plan.trials:
            self._run_trial(position)
        finished = self._finished()
        best = self._best(finished)
        if best is None:
            raise TrainingDivergedError(
                f"all {self.plan.trials} trials of {self.name} ended in NaN or Inf; lower sweep.lr_high, now "
                f"{self.plan.lr_range[1]:g}"
            )
        params = finished[best].params
        path, metadata = self._keep(params, best)
        trials = [_record(place, trial) for place, trial in enumerate(finished)]
        kept = ("validation_accuracy", "test_accuracy", "without_adapters", "trainable_parameters", "history")
        return RankResult(
            base=self.base,
            rank=self.rank,
            checkpoint=path,
            params=params,
            trials=trials,
            **{name: metadata[name] for name in kept},
        )

    def _finished(self) -> list[FrozenTrial]:
        """The plan's first trials with an outcome, in order; one that was interrupted has none and is run again."""
        done = (TrialState.COMPLETE, TrialState.PRUNED)
        finished = [trial for trial in self.study.trials if trial.state in done or trial.user_attrs.get(_FAILED)]
        return finished[: self.plan.trials]

    def _best(self, finished: Sequence[FrozenTrial]) -> int | None:
        """The place of the best trial that was trained to its end, the first of several; None where there is none."""
        values = {n: trial.value or 0.0 for n, trial in enumerate(finished) if trial.state == TrialState.COMPLETE}
        return max(values, key=lambda place: values[place], default=None)

    def _run_trial(self, position: int) -> None:
        for interrupted in self.study.get_trials(states=(TrialState.RUNNING,)):
            # Its process is gone: the outputs folder is locked.
            self.study.tell(interrupted.number, state=TrialState.FAIL)
        seed = zlib.crc32(f"{self.plan.run.seed} {self.name} {position}".encode())
        self.study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
        trial = self.study.ask()
        params = {
            "lr": trial.suggest_float("lr", *self.plan.lr_range, log=True),
            "alpha_ratio": trial.suggest_categorical("alpha_ratio", ALPHA_RATIOS),
            "label_smoothing": trial.suggest_float("label_smoothing", 0.0, MAX_LABEL_SMOOTHING),
        }

        def each_epoch(history: Sequence[Mapping[str, Any]]) -> None:
            for entry in history[len(self.study.trials[trial.number].intermediate_values) :]:
                trial.report(entry["validation_accuracy"], entry["epoch"])
            if len(history) < self.plan.run.epochs and trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = self._train(params, position, each_epoch)
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except TrainingDivergedError as error:
            logger.warning("%s", error)
            trial.set_user_attr(_FAILED, True)
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, result.validation_accuracy)
        # The best so far is kept; another is trained again from its numbers if need be.
        finished = self._finished()
        for place in {*range(len(finished))} - {self._best(finished)}:
            _remove(self._trial_path(place))

    def _train(self, params: Mapping[str, Any], position: int, on_epoch: OnEpoch | None = None) -> TrainResult:
        return train_condition(
            self._run_of(params),
            model=self.plan.model,
            data=self.data,
            checkpoint=self._trial_path(position),
            probe_checkpoint=self.plan.probe,
            device=self.plan.device,
            on_epoch=on_epoch,
            name=f"{self.base} rank {self.rank} trial {position + 1} of {self.plan.trials}",
        )

    def _run_of(self, params: Mapping[str, Any]) -> TrainingRun:
        run, rank = self.plan.run, self.rank
        alpha = params.get("alpha_ratio", 1.0) * rank
        return replace(
            run,
            condition=replace(run.condition, lr=params.get("lr", 0.0), alpha=alpha, rank=rank),
            shared=replace(run.shared, label_smoothing=params.get("label_smoothing", 0.0)),
            compression=self.base,
            own_head=self.plan.probe is None,
        )

    def _trial_path(self, position: int) -> Path:
        return self.plan.folder / "trials" / f"{self.name}_trial{position:03d}.safetensors"

    def _keep(self, params: Mapping[str, Any], position: int) -> tuple[Path, dict[str, Any]]:
        """The best trial's weights under the name that holds their test accuracy; others of the name are removed."""
        folder, name = self.plan.folder, self.name
        wanted = {"sweep": self.key, "params": dict(params)}
        for path in sorted(folder.glob(f"{name}_eval_acc=*.safetensors")):
            try:
                metadata = read_checkpoint(path).metadata
            except InputError as error:  # damaged, or without its sidecar
                logger.warning("%s; its trial is trained again", error)
                continue
            if {key: metadata.get(key) for key in wanted} == wanted:
                _remove(self._trial_path(position))
                return path, metadata
        result = self._train(params, position)
        checkpoint = read_checkpoint(result.checkpoint)
        metadata = {key: value for key, value in checkpoint.metadata.items() if key not in ("schema", "file", "sha256")}
        metadata |= wanted | {"without_adapters": self._without_adapters()}
        earlier = named(rf"{re.escape(name)}_eval_acc=\d\.\d{{4}}\.(safetensors|json)")
        for path in filter(earlier, folder.glob(f"{name}_eval_acc=*")):
            remove(path, earlier)
        path = folder / f"{name}_eval_acc={result.test_accuracy:.4f}.safetensors"
        save_checkpoint(path, checkpoint.tensors, metadata)
        _remove(result.checkpoint)
        return path, metadata

    def _without_adapters(self) -> float:
        plan = self.plan
        model = load_checkpoint(plan.model, plan.probe or plan.model.weights)
        whole = whole_classifier(model, plan.run.condition.targets)
        compress(model, self.base, sparsity=plan.run.sparsity, keep=whole)
        device = torch.device(plan.device)
        return evaluate(model.to(device), self.data.test, device).accuracy


def _remove(path: Path) -> None:
    states = [path.with_suffix(f".state{part}.safetensors") for part in ("", ".previous")]
    for file in (path, sidecar_path(path), history_path(path), *states):
        remove(file, named(rf"{re.escape(path.stem)}\.[a-z.]+"))  # a trial's, in the folder of trials


def _record(number: int, trial: FrozenTrial) -> TrialRecord:
    state = "diverged" if trial.user_attrs.get(_FAILED) else trial.state.name.lower()
    curve = [value for _, value in sorted(trial.intermediate_values.items())]
    return TrialRecord(number, state, trial.value if state == "complete" else None, trial.params, curve)
