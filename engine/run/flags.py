"""Flags: each is written in full, takes one value, and is given once."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from engine.config import described, unusual
from engine.progress import PROGRAM
from engine.run.commands import COMMANDS
from train.errors import InputError

# What word processors and web pages make of - and --, and what looks like them.
DASHES = "‐‑‒–—―−"
_NO_VALUE = re.compile(r"--|-h$")


class FlagParser(argparse.ArgumentParser):
    """argparse's parser of a command, whose mistakes are sentences like all others.

    The flags are `--config`, the command's own and, of the configuration keys in `keys`, those that it reads; the
    attribute `keys` holds the configuration key of each.
    """

    def __init__(self, name: str, keys: Mapping[str, dataclasses.Field[Any]]) -> None:
        command = COMMANDS[name]
        usage = f"{PROGRAM} {name}" + (f" {command.positional.upper()}" if command.positional else "")
        usage += "".join(f" {flag} {flag.rpartition('.')[2].lstrip('-').upper()}" for flag in command.required)
        commands = "".join(f"  {other:<10} {c.help}\n" for other, c in COMMANDS.items())
        super().__init__(
            prog=f"{PROGRAM} {name}",
            usage=f"{usage} [--config study.toml] [--section.key value ...]",
            description=f"{name}: {command.help}",
            epilog=f"commands:\n{commands}\nLists are written a,b,c. Every key is also a key of study.toml.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.keys: dict[str, str] = {}
        self._name = name
        self._positional = command.positional
        self.add_argument(
            "--config", action=_Once, metavar="study.toml", help="the configuration; a flag wins over its key"
        )
        if command.positional:
            self.add_argument(command.positional, nargs="?", default="")
        for flag, key in command.flags.items():
            metavar = key.rpartition(".")[2].upper()
            self.add_argument(flag, action=_Once, dest=key, metavar=metavar, help=f"the key {key}")
            self.keys[flag] = key
        groups: dict[str, argparse._ArgumentGroup] = {}
        for key, declared in keys.items():
            if not command.reads(key):
                continue
            section = key.rpartition(".")[0] or "study"
            group = groups[section] = groups.get(section) or self.add_argument_group(section)
            text = declared.metadata.get("help", "")
            text = (text() if callable(text) else text).replace("%", "%%")
            group.add_argument(f"--{key}", action=_Once, dest=key, metavar=declared.name.upper(), help=text)
            self.keys[f"--{key}"] = key

    def read(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The flags' values by configuration key, and `config` and the positional; what is no flag of the command."""
        parsed, unknown = self.parse_known_args(self._joined(arguments))
        for key, text in vars(parsed).items():
            if text is not None and (found := unusual(text)):
                flag = "" if key == self._positional else "--"
                hint = " (of a file or folder, give a link to it that has a plain name)" if "UTF-8" in found else ""
                raise InputError(f"{flag}{key} is {described(text)}; it holds {found}; expected text of one line{hint}")
        if self._positional and not getattr(parsed, self._positional) and not unknown:
            raise InputError(f"{self._name} needs {self._positional.upper()}: {self.format_usage().strip()}")
        return parsed, unknown

    def _joined(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with each flag and its value as one, `--flag=value`, so that a value may begin with -."""
        known = {*self.keys, "--config"}
        joined: list[str] = []
        for argument in arguments:
            if joined and joined[-1] in known and not _NO_VALUE.match(argument):
                joined[-1] += f"={argument}"
            elif argument and argument[0] in DASHES:
                raise InputError(f"{described(argument)} begins with a dash that is not -; flags begin with --")
            else:
                joined.append(argument)
        # argparse takes -- out of values, and gives a list for it.
        if bare := next((flag for flag in (argument.removesuffix("=--") for argument in joined) if flag in known), ""):
            raise InputError(f"{bare} needs a value; write {bare} VALUE, or {bare}=VALUE if that begins with --")
        return joined

    def error(self, message: str) -> NoReturn:
        """What argparse finds, as an error like all others."""
        raise InputError(f"{message}; {self.prog} --help lists what it takes")


class _Once(argparse.Action):
    """Takes a value the first time; of two it cannot be known which is meant."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if getattr(namespace, self.dest) is not None:
            raise InputError(f"{option_string} gives {self.dest} a second value; give it once")
        setattr(namespace, self.dest, values)
