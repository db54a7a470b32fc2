"""What commands left behind, a file or a folder of it changed, and the next command on it.

One small capture with metrics computed later, and one small comparison, are made once a process; after each trial
they are put back.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.damage import contents
from tests.damage_subjects import photographs, weights
from tests.fuzz import Trial, changed, command, random_of

SHARE = 15

# Files that are read first, or by every command, are changed more often than the others.
_OFTEN = (r".*run\.jsonl", r".*\.ledger/.*\.json", r".*\.json", r".*zarr\.json")


_MODEL = ("--model.name", "test_vit", "--model.img_size", "64", "--capture.samples", "1", "--capture.batch_size", "4")
_SMALL = ("--statistics.permutations", "19", "--relevance.measured", "2")
_EXPLAINED = ("--relevance.images", "1", "--relevance.methods", "generic", "--relevance.steps", "2")


@functools.cache
def _home() -> tuple[Path, tuple[str, ...]]:
    """A folder for what commands leave, and what all of them are given."""
    folder = Path(tempfile.mkdtemp())
    root, home = photographs(folder), folder / "home"
    home.mkdir()
    for seed, name in enumerate(("first", "second")):
        weights(folder, name, seed)
    return home, (*_MODEL, "--data.root", str(root), "--measure.metrics", "distance", "--capture.layers", "0")


def _captures() -> tuple[list[list[str]], list[list[str]]]:
    """Commands that make two captures and metrics computed later; commands that look at them."""
    home, given = _home()
    store, other = str(home / "a/a.zarr"), str(home / "a/b.zarr")
    first, second = (str(home.with_name(f"{name}.safetensors")) for name in ("first", "second"))
    made = [
        ["capture", "--store", store, "--model.weights", first, *given],
        ["capture", "--store", other, "--model.weights", second, *given],
        ["measure", "--store", store, "--metrics", "prefix_mass"],
        ["measure", "--store", store, "--metrics", "js_divergence", "--against", other],
    ]
    return made, [["verify", store], ["info", store], ["export", "--store", store, "--hdf5", str(home / "a/a.h5")]]


def _comparison() -> tuple[list[list[str]], list[list[str]]]:
    """A command that makes a comparison; commands that go on with it."""
    home, given = _home()
    first, second = (str(home.with_name(f"{name}.safetensors")) for name in ("first", "second"))
    outputs = ["--outputs", str(home / "out")]
    made = ["compare", "--baseline", first, "--finetuned", second, *outputs, *given, *_SMALL, *_EXPLAINED]
    return [made], [["report", *outputs], ["stats", *outputs], ["relevance", *outputs]]


@functools.cache
def _made(part: str) -> tuple[Path, Mapping[str, bytes], list[list[str]]]:
    """The folder, the files of a part of it, and the commands that are run on that."""
    made, looks = {"a": _captures, "out": _comparison}[part]()
    for arguments in made:
        assert command(*arguments) == 0, arguments
    home = _home()[0]
    return home, {f"{part}/{name}": content for name, content in contents(home / part).items()}, [*made, *looks]


def trials(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    parts = ("a",) if count <= SHARE else ("a", "out")  # a comparison takes seconds to make
    for number in range(count):
        random = random_of(seed, number)
        part = str(random.choice(parts))
        home, sound, commands = _made(part)
        _restore(home / part, {name.removeprefix(f"{part}/"): content for name, content in sound.items()})
        what = _change(home, sound, random)
        arguments = commands[int(random.integers(len(commands)))]
        yield Trial(f"{what}; {arguments[0]}", functools.partial(command, *arguments))


def _restore(home: Path, sound: Mapping[str, bytes]) -> None:
    """Every file as the commands left it, and nothing else."""
    for path in sorted(home.rglob("*"), reverse=True):
        name = path.relative_to(home).as_posix()
        if path.is_symlink() or not path.is_dir():
            if name not in sound or path.is_symlink() or not path.is_file():
                path.unlink()
        elif name in sound or not any(path.iterdir()):
            shutil.rmtree(path)
    for name, content in sound.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != content:
            path.write_bytes(content)


def _change(home: Path, sound: Mapping[str, bytes], random: np.random.Generator) -> str:
    """Change one or two things of a part of the folder; returns what."""
    said = []
    if (home / "out/run.jsonl").is_file() and random.random() < 0.1 and "out/run.jsonl" in sound:
        (home / "out/run.jsonl").unlink()  # as when results were copied without it
        said.append("without out/run.jsonl")
    for _ in range(int(random.choice([1, 1, 1, 2]))):
        pattern = str(random.choice(_OFTEN)) if random.random() < 0.7 else r".*"
        names = [name for name in sound if re.fullmatch(pattern, name)]
        name = str(random.choice(names or list(sound)))
        kind = str(random.choice(sorted(_KINDS)))
        if not (home / name).is_file() or (home / name).is_symlink():  # it was taken away in the same trial
            continue
        _KINDS[kind](home / name, random, sound)
        said.append(f"{kind} {name}")
    return ", ".join(said)


def _bytes(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    others = [content for content in sound.values() if len(content) < 1 << 16]
    path.write_bytes(changed(path.read_bytes(), random, (others[int(random.integers(len(others)))],)))


def _flipped(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[int(random.integers(len(content)))] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def _written(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    """Other content: none, half, twice, in another encoding, another file's, something that is none of ours."""
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    other = sound[str(random.choice(sorted(sound)))]
    new = [b"", content[: len(content) // 2], content * 2, content + lines[-1] if lines else b"", random.bytes(300)]
    new += [b"\xef\xbb\xbf" + content, content.decode("latin-1").encode("utf-16"), b"\x89HDF\r\n\x1a\n", other]
    new += [b"".join(lines[1:]), b"".join(reversed(lines)), content.replace(b"\n", b"\r\n"), b"\0" * len(content)]
    path.write_bytes(new[int(random.integers(len(new)))])


def _json(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    """JSON of another shape, in a line of it or in all of it."""
    content = path.read_bytes()
    lines = content.splitlines() if path.suffix == ".jsonl" else [content]
    at = int(random.integers(len(lines))) if lines else 0
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError):
        value = {}
    new = _odd(random) if random.random() < 0.2 else json.dumps(_reshaped(value, random)).encode()
    path.write_bytes(b"\n".join([*lines[:at], new, *lines[at + 1 :]]) + b"\n")


def _odd(random: np.random.Generator) -> bytes:
    deep = 100_000
    all_of_it = [b"[]", b"null", b"{}", b'"text"', b"1", b"NaN", b"1e400", b"9" * 5000, b'"\\ud800"', b"{}{}", b"tru"]
    all_of_it += [b"[" * deep, b"[" * deep + b"]" * deep, b'{"a":' * deep + b"1" + b"}" * deep, b'{"a": 1, "a": 2}']
    return all_of_it[int(random.integers(len(all_of_it)))]


_ODD = (None, [], {}, "", "text", True, -1, 0, 1.5, 2**63, 10**30, float("nan"), float("inf"), [[]], {"a": None}, "é\0")


def _reshaped(value: Any, random: np.random.Generator) -> Any:
    """A JSON value with one node of it replaced, taken away or renamed."""
    if isinstance(value, dict) and value and random.random() < 0.9:
        key = str(random.choice(list(value)))
        way = random.random()
        if way < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        if way < 0.25:
            return {f"{name}x" if name == key else name: inner for name, inner in value.items()}
        return {**value, key: _reshaped(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.9:
        at = int(random.integers(len(value)))
        return [*value[:at], *([] if random.random() < 0.1 else [_reshaped(value[at], random)]), *value[at + 1 :]]
    if isinstance(value, int | float) and random.random() < 0.3:
        return str(value)
    return _ODD[int(random.integers(len(_ODD)))]


def _gone(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    path.unlink()


def _folder_gone(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    if path.parent.name != "out":  # no study is there then, and `stats` trains one
        shutil.rmtree(path.parent)


def _folder_instead(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    path.unlink()
    path.mkdir()
    if random.random() < 0.5:
        (path / "notes.txt").write_text("mine", encoding="utf-8")


def _file_instead(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    folder = path.parent
    if folder.name != "out":
        shutil.rmtree(folder)
        folder.write_text("mine", encoding="utf-8")


def _link_instead(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    path.unlink()
    path.symlink_to(path.name if random.random() < 0.5 else "nowhere")


def _pipe_instead(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    path.unlink()
    os.mkfifo(path)


def _added(path: Path, random: np.random.Generator, sound: Mapping[str, bytes]) -> None:
    name = str(random.choice(["notes.txt", ".DS_Store", f"{path.name}~", f"{path.name}.partial"]))
    path.with_name(name).write_text("x", encoding="utf-8")


_KINDS: dict[str, Callable[[Path, np.random.Generator, Mapping[str, bytes]], None]] = {
    "bytes of": _bytes,
    "a bit of": _flipped,
    "other content in": _written,
    "other JSON in": _json,
    "without": _gone,
    "without the folder of": _folder_gone,
    "a folder instead of": _folder_instead,
    "a file instead of the folder of": _file_instead,
    "a link instead of": _link_instead,
    "a pipe instead of": _pipe_instead,
    "something beside": _added,
}
