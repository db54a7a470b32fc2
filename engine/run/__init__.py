"""The command line: `python -m engine.run [command] [--config study.toml] [--section.key value]`.

Every key of the configuration is a flag; a handful of commands have short flags that stand for a key. Nothing heavy
is imported before the arguments are known to be sound.
"""

from __future__ import annotations

import sys

from engine.run.process import find_modules_here, foreign_package, open_streams, reader_left

if _sentence := foreign_package():
    print(f"error: {_sentence}", file=sys.stderr)
    sys.exit(2)
try:
    import argparse
    import logging
    import re
    from collections.abc import Callable, Sequence
    from dataclasses import dataclass, field
    from operator import attrgetter
    from pathlib import Path
    from typing import TYPE_CHECKING, Any

    from engine.config import StudyConfig, config_keys, load_study, parse_value, shortened
    from engine.errors import exit_code, foreseen
    from engine.progress import PROGRAM
    from engine.run.flags import DASHES, FlagParser
    from train.errors import InputError, nearest
    from train.files import printable
    from train.processes import first_process, speaks
except KeyboardInterrupt:
    sys.exit(130)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["main"]


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        help: what it does.
        run: does it, and returns the exit code.
        uses: sections and keys of the configuration that it reads; a flag of another is refused, not ignored.
        flags: short flag -> configuration key.
        positional: the file it may name.
        shared: torchrun's processes divide its work; otherwise the first one does it.
        defaults: configuration key -> value, where no file is given.
        required: flags that must be given then.
    """

    help: str
    run: Callable[[StudyConfig, argparse.Namespace], int]
    uses: tuple[str, ...] = ()
    flags: Mapping[str, str] = field(default_factory=dict)
    positional: str = ""
    shared: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    def reads(self, key: str) -> bool:
        """Whether a key of the configuration changes anything that it does; where outputs go, and on which device, does
        everywhere.
        """
        named = (*self.uses, *self.flags.values(), "outputs", "device")
        return key in named or (key not in _OF_ONE_STORE and key.partition(".")[0] in named)


# Keys that only a command with a flag of its own for them reads.
_OF_ONE_STORE = ("capture.store", "measure.store", "measure.against")
# Commands that write the study.toml of their outputs folder.
_WRITE_STUDY = ("study", "train", "compare", "stats", "relevance")
# Keys that name what a command writes from pictures.
_WRITTEN = {
    **dict.fromkeys((*_WRITE_STUDY, "sweep"), ("outputs", "data.cache_folder")),
    "capture": ("capture.store",),
}


def _stages(last: str) -> Callable[[StudyConfig, argparse.Namespace], int]:
    def run(config: StudyConfig, arguments: argparse.Namespace) -> int:
        from engine.study import run_study

        run_study(config, last=last)
        return 0

    return run


def _report(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from engine.report import write_report
    from engine.study import Journal

    for path in write_report(config.outputs, Journal(Path(config.outputs) / "run.jsonl")):
        print(path)
    return 0


def _capture(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from engine.study import capture_folder

    capture_folder(config)
    if first_process():
        from store.verify import info

        held = info(config.capture.store)
        layers, attention = held["layers"], held["attention"]["bytes"]
        kept = f"{attention / 1e6:,.1f} MB of attention" if attention else "metrics, and no attention"
        print(f"{held['path']}: {held['images']:,} images, {len(layers)} layers, {kept}")
    return 0


def _measure(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from engine.measure import measure_store
    from store import AttentionStore

    keys = config.measure
    store = AttentionStore.open(keys.store)
    against = AttentionStore.open(keys.against) if keys.against else None
    measured = measure_store(store, keys.metrics, keys.backend, against, keys.scheduler)
    if measured:
        print(f"{store.path}: measured {', '.join(measured)}")
    else:
        print(f"{store.path} holds {', '.join(keys.metrics)} already")
    return 0


def _sweep(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from engine.study import run_sweep

    run_sweep(config)
    return 0


def _export(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from engine.study import export_hdf5

    print(export_hdf5(config))
    return 0


def _import(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from engine.study import import_hdf5

    store = import_hdf5(config)
    print(f"{store.path}: {len(store.image_ids)} images, {len(store.layers)} layers")
    return 0


def _verify(config: StudyConfig, arguments: argparse.Namespace) -> int:
    from store.storage import location_of
    from store.verify import verify

    damages = verify(arguments.store)
    for damage in damages:
        print(damage)
    if not damages:
        print(f"{location_of(arguments.store)} is sound")
    return 1 if damages else 0


def _info(config: StudyConfig, arguments: argparse.Namespace) -> int:
    import codecs
    import json

    from store.verify import info

    unicode = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    print(json.dumps(info(arguments.store), indent=2, ensure_ascii=not unicode))
    return 0


_TRAINING = ("model", "data", "pretrain", "train", "conditions")
_STATISTICS = ("capture", "measure", "statistics")
_COMPARE_CONDITIONS = {name: {"recipe": "checkpoint", "checkpoint": ""} for name in ("baseline", "finetuned")}
_ALL_IMAGES = {"data.kind": "folder", "data.split": "all"}

COMMANDS: dict[str, Command] = {
    "study": Command(
        "train the conditions, capture, measure, test and report (the default)",
        _stages("report"),
        (*_TRAINING, *_STATISTICS, "relevance"),
        shared=True,
    ),
    "train": Command("the study up to the trained checkpoints", _stages("train"), _TRAINING, shared=True),
    "compare": Command(
        "two checkpoints of one model on a folder of images, through the same stages",
        _stages("report"),
        ("model", "data", "train.seeds", "conditions", *_STATISTICS, "relevance"),
        shared=True,
        flags={
            "--baseline": "conditions.baseline.checkpoint",
            "--finetuned": "conditions.finetuned.checkpoint",
            "--classes": "model.classes",
            "--baseline-classes": "conditions.baseline.classes",
            "--finetuned-classes": "conditions.finetuned.classes",
        },
        defaults={**_ALL_IMAGES, "conditions": _COMPARE_CONDITIONS, "train.seeds": ["0"]},
        required=("--baseline", "--finetuned", "--model.name", "--data.root"),
    ),
    "capture": Command(
        "one model's attention on a folder of images, into a store",
        _capture,
        ("model", "data", "capture", "measure.metrics", "measure.backend"),
        shared=True,
        flags={
            "--store": "capture.store",
            "--encoding": "capture.encoding",
            "--batch-size": "capture.batch_size",
            "--classes": "model.classes",
        },
        defaults={**_ALL_IMAGES, "capture.sinks": ["store", "metrics"]},
        required=("--store", "--model.name", "--data.root"),
    ),
    "measure": Command(
        "metrics of a stored capture; needs neither model nor images",
        _measure,
        ("measure",),
        flags={
            "--store": "measure.store",
            "--metrics": "measure.metrics",
            "--against": "measure.against",
            "--scheduler": "measure.scheduler",
        },
        defaults={"data.kind": "folder"},  # the metrics of any study, not those of the embedded one
        required=("--store",),
    ),
    "export": Command(
        "a store's attention as one HDF5 file",
        _export,
        flags={"--store": "measure.store", "--hdf5": "hdf5.file"},
        defaults={"data.kind": "folder"},
        required=("--store", "--hdf5"),
    ),
    "import": Command(
        "a store of the attention in an HDF5 file of your own: a dataset [image, head, query, key] for each layer, …",
        _import,
        ("hdf5",),
        flags={
            "--hdf5": "hdf5.file",
            "--store": "capture.store",
            "--axes": "hdf5.axes",
            "--grid": "hdf5.grid",
            "--encoding": "capture.encoding",
            "--batch-size": "capture.batch_size",
        },
        defaults={"data.kind": "folder"},
        required=("--hdf5", "--store"),
    ),
    "stats": Command(
        "the study up to the paired comparisons", _stages("statistics"), (*_TRAINING, *_STATISTICS), shared=True
    ),
    "relevance": Command(
        "the study up to the relevance samples",
        _stages("relevance"),
        (*_TRAINING, *_STATISTICS, "relevance"),
        shared=True,
    ),
    "report": Command("figures, summary and page once more, from the tables and samples of an outputs folder", _report),
    "sweep": Command(
        "adapters of several ranks on a plain, a pruned and a binarised backbone, their hyper-parameters by Optuna",
        _sweep,
        ("model", "data", "train", "sweep"),
        shared=True,  # it refuses several processes itself
        flags={"--init": "sweep.init"},
        defaults={"data.kind": "folder", "model.name": "resnet18", "train.epochs": "10"},
        required=("--data.root",),
    ),
    "verify": Command(
        "check a store: exit code 0 when sound, 1 with a line for each damaged unit", _verify, positional="store"
    ),
    "info": Command("what a store holds", _info, positional="store"),
}

_LONGEST = 1000 - len("error: ")  # characters of a sentence
_CONDITION_FLAG = re.compile(r"--conditions\.(.+)\.[a-z_]+(?:=.*)?")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 for failure, 2 for bad input, 130 when interrupted, 141 when the program that reads what is
        printed has ended (the two as a shell gives them).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    _show_log()
    try:
        return _answered(arguments)
    except BrokenPipeError:
        if not reader_left():
            raise
        return 141


def _answered(arguments: list[str]) -> int:
    name = arguments[0] if arguments else ""
    try:
        done = _run(arguments)
        sys.stdout.flush()
        return done
    except KeyboardInterrupt:
        if first_process():
            print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as raised:
        error = foreseen(raised, _batch_keys(name))
        code = exit_code(error)
        if speaks():  # one of several processes, if torchrun started them
            if code is None:
                raise
            for note in getattr(raised, "__notes__", ()):
                print(printable(note), file=sys.stderr)
            print(f"error: {_sentence_of(error)}", file=sys.stderr)
        return 1 if code is None else code


def _sentence_of(error: Exception) -> str:
    """An error's message on one line of the terminal, whatever names are in it."""
    text = printable(error)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[3 - _LONGEST // 2 :]}"


def _batch_keys(name: str) -> list[str]:
    """Keys of a command (the study's, without a name) that say how many images it takes at once."""
    command = COMMANDS.get(name, COMMANDS["study"])
    return [key for key, _ in config_keys({}) if key.endswith(".batch_size") and command.reads(key)]


def _show_log() -> None:
    """What the packages log goes to stderr as plain sentences; other libraries' logs stay as they are."""
    for name in ("engine", "kernels", "store", "train"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO if first_process() else logging.ERROR)
        if not logger.handlers:
            handler = _StderrHandler()
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)


class _StderrHandler(logging.Handler):
    """Writes to what `sys.stderr` is at the time, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(printable(self.format(record)), file=sys.stderr)


def _run(arguments: list[str]) -> int:
    name = "study"
    if arguments and not arguments[0].startswith(("-", *DASHES)):
        name = arguments.pop(0)
    if name not in COMMANDS:
        raise InputError(
            f"{shortened(name)} is not a command{nearest(name, COMMANDS)} (there are {', '.join(COMMANDS)})"
        )
    command = COMMANDS[name]
    try:
        find_modules_here()
    except FileNotFoundError as error:
        raise InputError("the folder that this was started in is gone; change to one that is there") from error
    conditions = dict.fromkeys(
        ["baseline", "finetuned", *(m[1] for a in arguments if (m := _CONDITION_FLAG.fullmatch(a)))]
    )
    if name != "compare":
        conditions["dora"] = None
    all_keys = dict(config_keys(conditions))
    parser = FlagParser(
        name,
        PROGRAM,
        command.help,
        "".join(f"  {other:<10} {c.help}\n" for other, c in COMMANDS.items()),
        command.positional,
        command.flags,
        [(key, declared) for key, declared in all_keys.items() if command.reads(key)],
        command.required,
    )
    parsed, unknown = parser.read(arguments)
    if unknown:
        flag = unknown[0].split("=")[0]
        key = flag.removeprefix("--")
        if users := [other for other, c in COMMANDS.items() if key in all_keys and c.reads(key)]:
            raise InputError(f"{name} makes no use of {flag}; give it to {', '.join(users)}")
        hint = "; it stands behind no flag"
        if flag.startswith("-"):
            of_section = [required for required in command.required if required.startswith(f"{flag}.")]
            hint = nearest(flag, of_section or [*parser.keys, "--config"])
        elif flag.endswith(".toml"):
            hint = f"; did you mean --config {shortened(flag)}?"
        raise InputError(f"{shortened(flag)} is not a flag of {name}{hint}")
    keys = dict.fromkeys(parser.keys.values())
    given = {key: getattr(parsed, key) for key in keys if getattr(parsed, key) is not None}
    config_path = Path(parsed.config) if parsed.config is not None else _own_study(name, given)
    if config_path is None:
        _require(name, [flag for flag in command.required if parser.keys[flag] not in given], parser)
    overrides: dict[str, Any] = dict(command.defaults) if parsed.config is None else {}
    overrides |= {key: parse_value(key, text) for key, text in given.items()}
    config = load_study(config_path, overrides)
    _require(name, [flag for flag in ("--store", "--hdf5") if _is_empty(config, command.flags.get(flag))], parser)
    if name in _WRITE_STUDY and first_process():
        _keep_edited(Path(config.outputs), config_path)
    if writes := _WRITTEN.get(name):
        from engine.study import require_apart

        require_apart(config, writes)
    return command.run(config, parsed) if command.shared or first_process() else 0


def _require(name: str, missing: Sequence[str], parser: FlagParser) -> None:
    if missing:
        raise InputError(f"{name} needs {missing[0]}: {parser.format_usage().strip()}")


def _is_empty(config: StudyConfig, key: str | None) -> bool:
    return key is not None and not attrgetter(key)(config)


def _own_study(name: str, given: Mapping[str, str]) -> Path | None:
    """The study.toml an outputs folder was made with, for the commands that go on with a study that is there.

    Raises:
        InputError: it is not the one that the study wrote (an edited one is given with --config), or a folder is
            given that holds none, and nothing that another study could be of.
    """
    if name not in ("stats", "relevance"):
        return None
    from engine.study import Journal

    outputs = Path(given.get("outputs", StudyConfig.outputs))
    own = outputs / "study.toml"
    Journal(outputs / "run.jsonl").require(own)
    if own.is_file():
        return own
    if "outputs" in given and not any(key.partition(".")[0] in _TRAINING for key in given):
        raise InputError(
            f"{outputs} holds no study to go on with; give the folder of one with --outputs, or what to study with "
            "--config study.toml"
        )
    return None


def _keep_edited(outputs: Path, given: Path | None) -> None:
    """A study.toml that was edited since a study wrote it is not written over by a command that does not read it.

    Raises:
        InputError: the folder holds such a file, and it is not the configuration `given`.
    """
    from engine.study import Journal

    own = outputs / "study.toml"
    if own.is_file() and not (given is not None and given.is_file() and own.samefile(given)):
        try:
            Journal(outputs / "run.jsonl").usable(own)
        except InputError as error:
            raise InputError(f"{error}; to go on without it, delete it") from error
