"""A study.toml and flags: files changed by bytes and by values, and arguments as people mistype and paste them.

The command is read and its configuration checked; what it would do then is left out. What is accepted is written as a
study.toml, and that gives the same configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from engine.config.study import EMBEDDED_STUDY, StudyConfig, config_keys, load_study, study_toml
from engine.run.commands import COMMANDS
from tests.fuzz import Trial, changed, command, random_of

SHARE = 120

KEYS = [key for key, _ in config_keys(["baseline", "finetuned"])]
SHORT = sorted({flag for command in COMMANDS.values() for flag in command.flags})

USUAL = dataclasses.asdict(StudyConfig())

TEXTS = [
    *("", " ", "0", "1", "-1", "3", "8.0", "1_000", "1e3", "0,1", "[0, 1]", "0,,1", "1,1", "a,b", "a=1,b=2", "a=1,a=2"),
    *("1e400", "-1e400", "nan", "inf", "-inf", "0.5", "1e-400", "99999999999999999999", "9" * 5000, "1" + "0" * 18),
    *("true", "True", "yes", "on", "None", "null", "auto", "all", "cpu", "cuda", "folder", "digits", "full", "fp16"),
    *("distance", "distance,entropy", "no_metric", "my_module:my_metric", ":", "=", ",", "{}", "[]", "image,layer"),
    *("C:\\Users\\me\\photos", "photos", "../photos", "/", ".", "~", "~/photos", "s3://bucket/a.zarr", "a/b" * 2000),
    *(
        "a\0b",
        "a\nb",
        "a\tb",
        "caf\udce9",
        "café",
        "写真",
        "\u202eabc",
        "\u2028",
        "\ufeff",
        "𝓥",
        "−1",
        "–x",
        "x" * 100_000,
    ),
    *("--", "-", "--help-me", "-x", "'quoted'", '"quoted"', "%s", "%", "{0}", "$HOME", "`id`", "*"),
]
LITERALS = [
    *('""', '"0,1"', '"3"', '"text"', "'C:\\Users\\me'", '"C:\\Users\\me"', '"C:\\new\\temp"', '"a\\u0000b"', '"~/a"'),
    *("0", "1", "-1", "3", "8.0", "1_000", "0x10", "0xffffffffffffffffffff", "9" * 30, "9" * 5000, "1e400", "-0.0"),
    *("nan", "inf", "-inf", "1e-400", "true", "false", "True", "yes", "None", "1979-05-27", "07:32:00", "1.5"),
    *("[]", "[0, 1]", "[1, 1]", "[-1]", "[true]", '["a"]', '["a", 1]', "[[0]]", "[{}]", "[" * 50, "{}", "{a = 1}"),
    *('"distance"', '["distance"]', '["gini", "gini"]', '["metrics"]', '[""]', "{distance = 0}", "“text”", "0,1", ""),
    *('"""\na\nb"""', '"\\U0001F600"', "[0, 1", '"abc', '{"a": 1}', "[14]", "[14, 14, 14]", "[" * 3000, "{a=" * 1000),
]


def trials(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """Trials of all kinds in turn; what commands do is left out while they run."""
    kinds = (_bytes, _value, _encoding, _flags, _flags, _mistyped)

    def check(config: StudyConfig, arguments: argparse.Namespace) -> int:
        path = folder / "written.toml"
        path.write_text(study_toml(config), encoding="utf-8")
        assert load_study(path, {}) == config
        return 0

    checked = {name: replace(known, run=check) for name, known in COMMANDS.items()}
    (folder / "photos").mkdir()
    os.mkfifo(folder / "pipe")
    with mock.patch.dict(COMMANDS, checked):
        for number in range(count):
            random = random_of(seed, number)
            name, arguments = kinds[number % len(kinds)](folder, random)
            yield Trial(name, lambda arguments=arguments: command(*arguments))  # type: ignore[misc]


def _sound(random: np.random.Generator) -> str:
    """A configuration as a study writes it, or as a person does."""
    if random.random() < 0.5:
        return study_toml(load_study(None, {"data.kind": "folder", "data.root": "photos"}))
    return str(EMBEDDED_STUDY.read_text(encoding="utf-8"))


def _of_file(folder: Path, content: bytes, random: np.random.Generator, name: str = "study.toml") -> list[str]:
    (folder / name).write_bytes(content)
    given = _pick(random, ["study", "train", "compare", "capture", "measure", "sweep", "report"])
    return [given, "--config", str(folder / name)]


def _bytes(folder: Path, random: np.random.Generator) -> tuple[str, list[str]]:
    content = changed(_sound(random).encode(), random, (b"[conditions.", b'= "', b"[[", b"\xff\xfe", b"\\"))
    return "bytes", _of_file(folder, content, random)


def _value(folder: Path, random: np.random.Generator) -> tuple[str, list[str]]:
    """One key of a file has another value, or stands elsewhere."""
    key, literal = _pick(random, KEYS), _pick(random, LITERALS)
    if random.random() < 0.3:
        literal = _usual(key)
    table, _, name = key.rpartition(".")
    if random.random() < 0.2:
        table = _pick(random, ["", "train", "trian", "conditions", "conditions.a.b", "data", '"a b"'])
    if random.random() < 0.1:
        name = _pick(random, ["epoch", "batchsize", "a.b.c", '"a\\nb"', "x" * 3000, "a." * 3000 + "a"])
    text = f"[{table}]\n{name} = {literal}\n" if table else f"{name} = {literal}\n"
    if random.random() < 0.2:
        text += text
    return f"{key} = {literal[:40]}", _of_file(folder, text.encode(), random)


def _encoding(folder: Path, random: np.random.Generator) -> tuple[str, list[str]]:
    """Something else than TOML in UTF-8, or than a file."""
    text = _sound(random) + '\n# café\n[data]\nroot = "café"\n'
    encoding = _pick(random, ["utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "json", "yaml", "ini"])
    if random.random() < 0.3:
        place = _pick(
            random, [str(folder), str(folder / "pipe"), "/dev/zero", "/dev/null", "", "none.toml", "a\0b", "~/a"]
        )
        return f"file {place}", ["study", "--config", place]
    if encoding == "json":
        content = json.dumps({"train": {"seeds": [0, 1]}, "data": {"root": "café"}}).encode()
    elif encoding == "yaml":
        content = b"train:\n  seeds: [0, 1]\n  epochs: 3\n"
    elif encoding == "ini":
        content = b"[train]\nepochs: 3\nprecision = auto\n; a comment\n"
    else:
        content = text.encode(encoding)
    name = f"study.{_pick(random, ['toml', 'json', 'yaml', 'txt'])}"
    return f"{encoding} in {name}", _of_file(folder, content, random, name)


def _flags(folder: Path, random: np.random.Generator) -> tuple[str, list[str]]:
    """Flags of a command with any text behind them; of those that read no other study.toml."""
    name = _pick(random, [name for name in COMMANDS if name not in ("stats", "relevance")])
    known = COMMANDS[name]
    arguments = [name, *(_pick(random, TEXTS) for _ in known.positional[:1])]
    for flag in known.required if random.random() < 0.8 else ():
        arguments += [flag, _pick(random, ["photos", "a.zarr", "vit_tiny_patch16_224", *TEXTS[:4]])]
    for _ in range(random.integers(1, 4)):
        keys = [key for key in KEYS if known.reads(key)] or KEYS
        flag = _pick(random, [*(f"--{key}" for key in keys), *known.flags, *SHORT[:1]])
        text = _pick(random, TEXTS)
        if random.random() < 0.7:
            text = _usual(known.flags.get(flag, flag.removeprefix("--"))).strip("[]").replace('"', "")
        arguments += [f"{flag}={text}"] if random.random() < 0.4 else [flag, text]
    return f"flags {[argument[:40] for argument in arguments]}", arguments


def _mistyped(folder: Path, random: np.random.Generator) -> tuple[str, list[str]]:
    """Arguments that are changed themselves: dropped, doubled, swapped, cut, with other dashes."""
    _, arguments = _flags(folder, random)
    for _ in range(random.integers(1, 4)):
        at = int(random.integers(0, len(arguments)))
        text = arguments[at]
        arguments[at : at + 1] = _pick(
            random,
            [
                [],
                [text, text],
                [text[: int(random.integers(0, len(text) + 1))]],
                [text.replace("--", "–")],
                [text.replace("--", "-")],
                [text.replace("-", "_"), _pick(random, TEXTS)],
                [text.upper()],
                [_pick(random, TEXTS), text],
                [f"--{_pick(random, KEYS)}"],
                ["--config", str(folder / "photos")],
            ],
        )
        if not arguments:
            break
    return f"mistyped {[argument[:40] for argument in arguments]}", arguments or ["stduy"]


def _usual(key: str) -> str:
    """A key's default, in TOML; text where that is empty."""
    value: Any = USUAL
    for part in key.split(".") if key in KEYS else ():
        value = value[part]
    return json.dumps(list(value) if isinstance(value, tuple) else value) if value and value != USUAL else '"a.zarr"'


def _pick(random: np.random.Generator, items: list[Any]) -> Any:
    return items[int(random.integers(0, len(items)))]
