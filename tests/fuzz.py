"""Changed input at each door of the program, and what may come of it: an answer, or one sentence.

    python -m tests.fuzz DOOR [--count N] [--seed N] [--only K]

A door is a module of `tests.doors`. It makes sound input, changes it, and calls the program on it. A trial fails that
ends in any other error than one whose message is all that a user is shown, that hangs, that ends the process, or that
takes more than 4 GB.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import pkgutil
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import tests.doors
from engine.progress import exit_code
from engine.run import main

DOORS = tuple(sorted(module.name for module in pkgutil.iter_modules(tests.doors.__path__)))
SECONDS = 60
MEMORY_GB = 4.0
_LONGEST_SENTENCE = 1000


@dataclass(frozen=True)
class Trial:
    """One changed input.

    Args:
        name: what was changed, so that a reader of the failure knows.
        call: runs the program on it, in this process.
    """

    name: str
    call: Callable[[], Any]


@dataclass
class Endings:
    """How trials ended.

    Args:
        answered: number that gave an answer.
        refused: first words of the sentence -> number.
        failed: a trial's number and name, and what it ended in.
    """

    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.answered} answered, {self.refused.total()} refused, {len(self.failed)} failed"]
        lines += [f"  {number:5d} {words}" for words, number in self.refused.most_common(40)]
        return "\n".join([*lines, *self.failed])


def run(door: str, folder: Path, *, count: int, seed: int, only: int | None = None) -> Endings:
    """Run `count` trials of a door, each before the next one's input is made.

    Args:
        folder: an empty one, for the door's files.
        only: the number of the one trial to run.
    """
    module = importlib.import_module(f"tests.doors.{door}")
    endings = Endings()
    trials: Iterator[Trial] = module.trials(folder, count, seed)
    for number, trial in enumerate(trials):
        if only is None or number == only:
            _try(trial, f"{door} {number} of seed {seed}: {trial.name}", endings)
    return endings


def _try(trial: Trial, name: str, endings: Endings) -> None:
    try:
        with _limit(SECONDS):
            answer = trial.call()
    except Exception as error:
        sentence = str(error)
        if exit_code(error) is None:
            endings.failed.append(f"{name}\n{traceback.format_exc(limit=-4)}")
        elif problem := problem_of(sentence):
            endings.failed.append(f"{name}: the sentence {problem}: {sentence[:2000]!r}")
        else:
            endings.refused[_first_words(sentence)] += 1
    except BaseException as error:
        if not isinstance(error, SystemExit | _TooLongError):
            raise
        endings.failed.append(f"{name}: {type(error).__name__} {error}")
    else:
        if answer == 2:  # of a command whose sentence is as it should be
            endings.refused["exit code 2"] += 1
        else:
            endings.answered += 1


def problem_of(sentence: str) -> str:
    """What keeps a message from being one sentence that a terminal can show; "" for nothing."""
    if not sentence.strip():
        return "is empty"
    if len(sentence.splitlines()) > 1:
        return "has several lines"
    if len(sentence) > _LONGEST_SENTENCE:
        return f"has {len(sentence)} characters"
    if not sentence.isprintable():
        return "holds characters that cannot be shown"
    return ""


def command(*arguments: str) -> int:
    """Run a command of the program in this process; 0, or 1 for damage that `verify` names.

    Raises:
        AssertionError: another exit code than 0, 1 and 2, or a failure without one `error:` line at the end.
    """
    said, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(printed):
        code = main(list(arguments))
    lines = said.getvalue().splitlines()
    if code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}: {lines[-3:]}")
    if code and arguments[0] != "verify":
        sentence = lines[-1] if lines else ""
        problem = problem_of(sentence)
        if not sentence.startswith("error: ") or problem:
            raise AssertionError(f"exit code {code} and the last line {problem or 'is no error line'}: {lines[-3:]}")
    return code


def changed(content: bytes, random: np.random.Generator, others: tuple[bytes, ...] = ()) -> bytes:
    """`content` with one to four changes: bits, runs of bytes, numbers at limits, cuts, copies, parts of others."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 5))):
        _change(data, random, others)
    return bytes(data)


def _change(data: bytearray, random: np.random.Generator, others: tuple[bytes, ...]) -> None:
    if not data:
        data += random.bytes(int(random.integers(1, 64)))
        return
    # Headers are short and decide most, so half of the changes fall into the first bytes.
    end = len(data) if random.random() < 0.5 else min(len(data), 256)
    at = int(random.integers(0, end))
    length = int(2 ** random.uniform(0, np.log2(len(data) + 1)))
    kind = random.integers(0, 8)
    if kind == 0:
        data[at] ^= 1 << int(random.integers(0, 8))
    elif kind == 1:
        data[at] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x30, 0x41]))
    elif kind == 2:
        size = int(random.choice([2, 4, 8]))
        value = int(random.choice([0, 1, 2**15, 2**16 - 1, 2**31 - 1])) % 2 ** (8 * size)
        data[at : at + size] = value.to_bytes(size, "little" if random.random() < 0.5 else "big")
    elif kind == 3:
        data[at : at + min(length, 64)] = random.bytes(min(length, 64))
    elif kind == 4:
        del data[at:]
    elif kind == 5:
        del data[at : at + length]
    elif kind == 6:
        data[at:at] = data[at : at + min(length, 4096)]
    elif others:
        other = others[int(random.integers(0, len(others)))]
        start = int(random.integers(0, len(other) + 1))
        data[at : at + length] = other[start : start + length]


def random_of(seed: int, number: int) -> np.random.Generator:
    """The generator of a trial: the same input for the same number, whatever ran before."""
    return np.random.default_rng([seed, number])


class _TooLongError(BaseException):
    """Not an Exception, so that no handler on the way takes it for bad input."""


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _TooLongError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _first_words(sentence: str) -> str:
    """What a sentence says without what it names, so that sentences of one kind are counted together."""
    words = ["…" if any(mark in word for mark in "/0123456789'\"") else word for word in sentence.split()]
    return " ".join(words[:14])


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        endings = run(given.door, Path(folder), count=given.count, seed=given.seed, only=given.only)
    print(endings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"at most {peak:.2f} GB")
    return 1 if endings.failed or peak > MEMORY_GB else 0


if __name__ == "__main__":
    sys.exit(_main())
