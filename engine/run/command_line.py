"""From the arguments to a command's exit code.

Every key of the configuration is a flag; a handful of commands have short flags that stand for a key. Nothing heavy
is imported before the arguments are known to be sound.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.config import (
    GONE,
    StatisticsConfig,
    StudyConfig,
    config_keys,
    load_metrics,
    load_study,
    metrics_of_one_capture,
    parse_value,
    shortened,
)
from engine.progress import exit_code, foreseen
from engine.run.commands import COMMANDS, TRAINING, Command
from engine.run.flags import DASHES, FlagParser
from engine.run.process import find_modules_here, open_streams, reader_left
from train.errors import InputError, nearest, printable
from train.files import what_lies_at
from train.processes import first_process, speaks

_LONGEST = 1000 - len("error: ")  # characters of a sentence
_CONDITION_FLAG = re.compile(r"--conditions\.(.+)\.[a-z_]+(?:=.*)?")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, 1 for failure, 2 for bad input, 130 when interrupted, 141 when the program that reads what is
        printed has ended (the last two as a shell gives them).
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
    """The exit code of a command; what it ended in is said in one sentence."""
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
        tqdm.write(printable(self.format(record)), file=sys.stderr)


def _run(arguments: list[str]) -> int:
    """Run the command that the arguments name, with the configuration that they give."""
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
    _leave_out(arguments)
    keys = dict(config_keys(_conditions(name, arguments)))
    parser = FlagParser(name, keys)
    parsed, unknown = parser.read(arguments)
    if unknown:
        raise InputError(_unknown(name, unknown[0].split("=")[0], parser, keys))
    config = _configuration(name, command, parser, parsed)
    if command.shared or first_process():
        return command.run(config, parsed) or 0
    return 0


def _leave_out(arguments: list[str]) -> None:
    """Take the flags of keys that are gone out of the arguments, and say so."""
    for key, reason in GONE.items():
        flag = f"--{key}"
        for place in reversed(range(len(arguments))):
            if arguments[place] == flag or arguments[place].startswith(f"{flag}="):
                values = [] if "=" in arguments[place] else arguments[place + 1 : place + 2]
                del arguments[place : place + 1 + any(not value.startswith("--") for value in values)]
                logging.getLogger(__name__).info("%s is left out: %s", flag, reason)


def _conditions(name: str, arguments: Sequence[str]) -> list[str]:
    """Names of the conditions whose keys are flags: the usual ones, and those that flags name."""
    flags = (_CONDITION_FLAG.fullmatch(argument) for argument in arguments)
    usual = [*COMMANDS[name].defaults.get("conditions", StudyConfig().conditions)]
    return list(dict.fromkeys([*usual[:2], *(flag[1] for flag in flags if flag), *usual[2:]]))


def _unknown(name: str, flag: str, parser: FlagParser, keys: dict[str, Any]) -> str:
    """The sentence on an argument that the command does not take."""
    key = flag.removeprefix("--")
    if users := [other for other, c in COMMANDS.items() if key in keys and c.reads(key)]:
        return f"{name} makes no use of {flag}; give it to {', '.join(users)}"
    hint = "; no flag comes before it"
    if flag.startswith("-"):
        of_section = [required for required in COMMANDS[name].required if required.startswith(f"{flag}.")]
        hint = nearest(flag, of_section or [*parser.keys, "--config"])
    elif flag.endswith(".toml"):
        hint = f"; did you mean --config {shortened(flag)}?"
    return f"{shortened(flag)} is not a flag of {name}{hint}"


def _configuration(name: str, command: Command, parser: FlagParser, parsed: argparse.Namespace) -> StudyConfig:
    """The configuration of a command: its file, its flags, and what it has where there is no file."""
    given = {key: value for key in parser.keys.values() if (value := getattr(parsed, key)) is not None}
    path = Path(parsed.config) if parsed.config is not None else None
    if path is None and command.continues:
        from engine.study import written_study

        path = written_study(Path(given.get("outputs", StudyConfig.outputs)))
        if path is None and "outputs" in given and not any(key.partition(".")[0] in TRAINING for key in given):
            raise InputError(
                f"{given['outputs']} holds no study to go on with; give the folder of one with --outputs, or what to "
                "study with --config study.toml"
            )
    if path is None:
        _require(name, [flag for flag in command.required if parser.keys[flag] not in given], parser)
    overrides = dict(command.defaults) if parsed.config is None else {}
    overrides |= {key: parse_value(key, text) for key, text in given.items()}
    config = load_study(path, overrides)
    needed = {flag: command.flags[flag] for flag in ("--store", "--hdf5") if flag in command.flags}
    _require(name, [flag for flag, key in needed.items() if not attrgetter(key)(config)], parser)
    from engine.study import keep_edited, require_apart

    if "outputs" in command.writes and first_process():
        keep_edited(Path(config.outputs), path)
    require_apart(config, command.writes)
    _check_named(config, command)
    return config


def _check_named(config: StudyConfig, command: Command) -> None:
    """Check the names of metrics, and that the files and folders that the command reads are there."""
    if command.reads("measure.against"):
        load_metrics(config.measure.metrics)
    elif command.reads("measure.metrics"):
        names = [spec.name for spec in metrics_of_one_capture(config.measure.metrics)]
        statistics = config.statistics
        if command.reads("statistics.primary") and statistics != StatisticsConfig():
            from engine.statistics import check_bounds, check_primary

            check_primary(statistics.primary, names)
            check_bounds(statistics.equivalence, names)
    places = {}
    for name, condition in config.conditions.items():
        places[f"conditions.{name}.checkpoint"] = condition.checkpoint
        places[f"conditions.{name}.classes"] = condition.classes
    places["model.weights"] = config.model.weights
    places["model.adapter"] = config.model.adapter
    places["model.classes"] = config.model.classes
    if config.data.kind == "folder":  # of the others it is said where to get them
        places["data.root"] = config.data.root
    for key, place in places.items():
        if place and command.reads(key) and not Path(place).exists():
            raise InputError(f"{key} is {place}, which {what_lies_at(Path(place))}; give a path that is there")


def _require(name: str, missing: Sequence[str], parser: FlagParser) -> None:
    if missing:
        raise InputError(f"{name} needs {missing[0]}: {parser.format_usage().strip()}")
