"""A study.toml as people write it, read; or what it is instead, in one sentence."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from train.errors import InputError, printable
from train.files import require_file

_LARGEST = 2**20  # bytes; a study.toml has a few thousand

_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")
_WINDOWS_PATH = re.compile(r'"[^"]*\\')
_YAML = re.compile(r"(?:---|- |[\w.-]+:(?:\s|$))")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_toml(path: Path) -> dict[str, Any]:
    """The keys and tables of a TOML file in UTF-8; a byte order mark before them is passed over.

    Raises InputError: no such file, or it is no TOML; the line is shown, and what is mistaken in it.
    """
    require_file(path, "configuration file", "give the path of a study.toml")
    with open(path, "rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise InputError(f"{path} is larger than 1 MB, and no study.toml is; give the path of one")
    text = _text(path, content)
    try:
        return tomllib.loads(f"{text}\n")  # a mistake in the last line has a line then
    except RecursionError as error:
        raise InputError(f"{path} cannot be read as TOML: it nests tables or lists too deep") from error
    except ValueError as error:  # TOMLDecodeError is one, and so is a number of too many digits
        raise InputError(f"{path} cannot be read as TOML: {_mistake(path, text, str(error))}") from error


def _text(path: Path, content: bytes) -> str:
    if content.startswith(_UTF_16) or content[1::2].count(0) > len(content) // 4:
        raise InputError(f"{path} is text in UTF-16, as Notepad's “Unicode”; save it as UTF-8")
    if b"\0" in content:
        raise InputError(f"{path} is no text; give the path of a study.toml")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = content.splitlines()[line - 1].decode("latin-1").strip()
        raise InputError(
            f"{path} is not UTF-8 (in line {line}, in Latin-1 {_shown(found)}); save it as UTF-8"
        ) from error


def _mistake(path: Path, text: str, reason: str) -> str:
    """What keeps a text from being TOML, and what to do."""
    if path.suffix.lower() == ".json" or _is_json(text):
        return 'it is JSON; write [train] before the keys of a table, and seeds = [0, 1] for "seeds": [0, 1]'
    lines = text.splitlines()
    first = next((line for line in lines if line.strip() and not line.lstrip().startswith("#")), "")
    if path.suffix.lower() in (".yaml", ".yml") or _YAML.match(first):
        return "it is YAML; write [train] before the keys of a table, and seeds = [0, 1] for seeds: [0, 1]"
    found = _PLACE.search(reason)
    reason = _PLACE.sub("", reason)
    if not found or not found[1]:
        return ("at its end: " if found else "") + _reason("", reason)
    number = int(found[1])
    # tomllib counts lines by \n alone; a mistake may also be the end of the line before.
    line = text.split("\n")[number - 1].strip() if number <= text.count("\n") + 1 else ""
    return f"line {number} ({_shown(line)}): {_reason(line, reason)}"


def _reason(line: str, reason: str) -> str:
    if reason.startswith(("Cannot overwrite", "Duplicate")):
        return "the key is there already; give each key once"
    if reason.startswith("Cannot"):
        return "the table is there already; write all keys of a table under one [table]"
    if _WINDOWS_PATH.search(line) and any(word in reason for word in ("\\", "hex", "Unterminated", "scalar")):
        return "\\ in double quotes begins an escape; if it is a Windows path, write it in single quotes"
    if any(mark in line for mark in "“”„«»‘’"):
        return 'text is written in straight quotes, as in "text"'
    if reason == "Illegal character '\\n'":
        return "the line ends inside text in quotes; close it on the line"
    if "digits" in reason:
        return "a number has too many digits"
    if reason == "Invalid value":
        return 'expected a number, true, false, a list as in [0, 1], or text in quotes as in "text"'
    if reason.startswith(("Invalid statement", "Expected '=' after a key", "Expected newline")):
        return "expected one key = value, or [table]"
    return reason[:1].lower() + reason[1:]


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return text.lstrip().startswith("{")


def _shown(line: str) -> str:
    return printable(line if len(line) <= 80 else f"{line[:60]}…")
