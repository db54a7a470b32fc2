"""A disk that becomes full under a command, at many sizes; then space is made, and the same command must go on.

    python -m tests.full_disk COMMAND [--sizes N] [--size BYTES]

Each trial is a disk of its own, a tmpfs in a mount namespace of this process. Its sizes lie between what holds nothing
more than what is there already and what is a page too little. The command must end in exit code 1 or 2 and one sentence
that says which path could not be written, that there is no space, and what to do. What it had committed stays as it
is. With space, the same command ends as one that was never disturbed: every file is the same, times apart.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from store.local import LocalStorage
from tests.damage import alike, contents, is_lock
from tests.damage_steps import call, still_clock
from tests.fuzz import problem_of

SECONDS = 300  # a command that takes longer is stuck
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LARGE = 1 << 30
_NO_SPACE = re.compile(r"no space left", re.IGNORECASE)
# What is never written again once it is there: a commit.
_COMMITS = re.compile(r".*\.ledger/(?:.+/)?batch_\d+\.json|checkpoints/[^/]+\.json")


@dataclass(frozen=True)
class Disk:
    """A tmpfs.

    Args:
        path: where it is mounted.
    """

    path: Path

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        _mount("-t", "tmpfs", "-o", f"size={_LARGE}", "tmpfs", str(self.path))
        try:
            yield
        finally:
            subprocess.run(["umount", str(self.path)], check=True)

    def resize(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", str(self.path))

    def used(self) -> int:
        found = os.statvfs(self.path)
        return (found.f_blocks - found.f_bfree) * found.f_frsize


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let every write beyond `size` bytes of a file fail, as on a full disk (EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that comes with it; a library that an earlier test loaded may not.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@dataclass(frozen=True)
class Case:
    """A command on a disk that becomes full.

    Args:
        before: commands that must have run on the disk, with space.
        command: the one that is tried.
    """

    before: Sequence[Sequence[str]]
    command: Sequence[str]


def run(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command in a child of this process, which has imported what takes long.

    Returns:
        Exit code, −N for a signal; output.
    """
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 99
            try:
                signal.alarm(SECONDS)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                with still_clock(), _taken_meanwhile():
                    found, text = call(arguments)
                code = 98 if found is None else found
                print(text, end="", flush=True)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read().decode(errors="replace")


@contextlib.contextmanager
def _taken_meanwhile() -> Iterator[None]:
    """Estimates find space enough: another program takes it while the command runs."""
    with (
        mock.patch.object(LocalStorage, "free_bytes", return_value=None),
        mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=_LARGE)),
    ):
        yield


class Trials:
    """Trials of one case.

    Args:
        disk: where it is mounted; the case's commands write there.
        case: the command.
    """

    def __init__(self, disk: Path, case: Case) -> None:
        self.disk = Disk(disk)
        self.case = case

    @contextlib.contextmanager
    def _prepared(self) -> Iterator[None]:
        """A large disk with what has to be there."""
        with self.disk.mounted():
            for name, content in self._material.items():
                path = self.disk.path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield

    @cached_property
    def _material(self) -> dict[str, bytes]:
        with self.disk.mounted():
            for arguments in self.case.before:
                self._must_end_well(arguments)
            return contents(self.disk.path)

    @cached_property
    def undisturbed(self) -> tuple[int, int, dict[str, bytes]]:
        """Bytes used before the command and at most while it runs, and the files that it leaves."""
        with self._prepared():
            before = most = self.disk.used()
            ended = threading.Event()

            def watch() -> None:
                nonlocal most
                while not ended.wait(0.001):
                    most = max(most, self.disk.used())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                self._must_end_well(self.case.command)
            finally:
                ended.set()
                watcher.join()
            return before, most, contents(self.disk.path)

    def _must_end_well(self, arguments: Sequence[str]) -> None:
        code, said = run(arguments)
        if code:
            raise AssertionError(f"with space, {arguments[0]} ends with {code}: {said[-3000:]}")

    def sizes(self, count: int) -> list[int]:
        """From a page of space to a page too little."""
        before, most, _ = self.undisturbed
        first, last = before + _PAGE, max(most - _PAGE, before + _PAGE)
        return sorted({first + (last - first) * i // max(count - 1, 1) // _PAGE * _PAGE for i in range(count)})

    def trial(self, size: int) -> tuple[str, str]:
        """What is wrong with a disk of that size, "" if nothing; what the command said there."""
        with self._prepared():
            self.disk.resize(size)
            code, said = run(self.case.command)
            sentence = said.splitlines()[-1] if said.strip() else ""
            if wrong := self._wrong_ending(code, said, sentence):
                return wrong, sentence
            commits = self._commits()
            self.disk.resize(_LARGE)
            code, said = run(self.case.command)
            if code:
                return f"with space again it ends with {code}: {said[-3000:]}", sentence
            if wrong := self._changed(commits):
                return wrong, sentence
            for store in sorted(self.disk.path.rglob("*.zarr")):
                if store.with_suffix(".ledger").is_dir():
                    code, said = run(["verify", str(store)])
                    if code:
                        return f"{store.name} is not sound: {said}", sentence
            return "", sentence

    def _wrong_ending(self, code: int, said: str, sentence: str) -> str:
        if code == 0:
            return ""  # the file that was too large by a page became smaller by one
        if code not in (1, 2):
            return f"exit code {code}: {said[-3000:]}"
        if "Traceback" in said or not sentence.startswith("error: ") or problem_of(sentence):
            return f"no sentence: {said[-3000:]}"
        if str(self.disk.path) not in sentence or not _NO_SPACE.search(sentence) or "free some space" not in sentence:
            return f"not the sentence: {sentence}"
        return ""

    def _commits(self) -> dict[str, int]:
        """File → its inode."""
        files = {p.relative_to(self.disk.path).as_posix(): p for p in self.disk.path.rglob("*") if p.is_file()}
        return {name: path.stat().st_ino for name, path in files.items() if _COMMITS.fullmatch(name)}

    def _changed(self, commits: Mapping[str, int]) -> str:
        found, (_, _, right) = contents(self.disk.path), self.undisturbed
        names = sorted(name for name in {*found, *right} if not is_lock(name))
        wrong = [name for name in names if not alike(name, found.get(name), right.get(name))]
        if wrong:
            return f"with space again {len(wrong)} files are not those of an undisturbed run: {wrong[:8]}"
        now = self._commits()
        again = [name for name, inode in commits.items() if now.get(name) != inode]
        return f"what was committed was written again: {again[:8]}" if again else ""


# --- the commands -----------------------------------------------------------------------------------------------------


def _cases(folder: Path, disk: Path) -> dict[str, Callable[[], Case]]:
    from tests.damage_subjects import CONDITIONS, DIGITS, TRAINED, photographs, weights

    config = folder / "conditions.toml"
    config.write_text(CONDITIONS, encoding="utf-8")
    own = ("--config", str(config), "--outputs", str(disk / "out"), "--train.epochs", "1")

    def study() -> Case:
        return Case([], ["study", *own, *DIGITS, "--statistics.permutations", "19"])

    def train() -> Case:
        return Case([], ["train", *own, *TRAINED])

    def compare() -> Case:
        models = [str(weights(folder, name, seed)) for seed, name in enumerate("ab")]
        return Case(
            [],
            [
                *("compare", "--baseline", models[0], "--finetuned", models[1], "--model.name", "test_vit"),
                *("--model.img_size", "64", "--data.root", str(photographs(folder)), "--outputs", str(disk / "out")),
                *("--capture.batch_size", "8", "--capture.samples", "2"),
                *("--measure.metrics", "distance", "--relevance.measured", "2", "--relevance.images", "1"),
                *("--relevance.methods", "generic", "--relevance.steps", "2", "--data.cache", "true"),
                *("--statistics.permutations", "19"),
            ],
        )

    def captured(encoding: str = "fp16") -> list[str]:
        return [
            *("capture", "--store", str(disk / "a.zarr"), "--model.name", "test_vit", "--encoding", encoding),
            *("--model.weights", str(weights(folder, "a", 0)), "--model.img_size", "64"),
            *("--data.root", str(photographs(folder)), "--batch-size", "4", "--measure.metrics", "distance"),
            *("--capture.samples", "2"),
        ]

    store, exported = str(disk / "a.zarr"), str(disk / "a.h5")
    export = ["export", "--store", store, "--hdf5", exported]
    report = ["report", "--outputs", str(disk / "out")]
    return {
        "study": study,
        "compare": compare,
        "capture": lambda: Case([], captured()),
        "measure": lambda: Case([captured()], ["measure", "--store", store, "--metrics", "entropy,morans_i_received"]),
        "export": lambda: Case([captured()], export),
        "train": train,
        "sweep": lambda: Case(
            [],
            [
                *("sweep", "--data.root", str(photographs(folder)), "--outputs", str(disk / "out")),
                *("--model.name", "test_vit", "--model.weights", str(weights(folder, "a", 0, 32))),
                *("--model.img_size", "32", "--sweep.ranks", "1", "--sweep.trials", "2", "--sweep.bases", "plain,int1"),
                *("--train.batch_size", "8", "--train.precision", "fp32", "--sweep.epochs", "1"),
            ],
        ),
        "import": lambda: Case(
            [captured(), export], ["import", "--hdf5", exported, "--store", str(disk / "b.zarr"), "--batch-size", "4"]
        ),
        "report": lambda: Case([study().command], report),
    }


COMMANDS = ("study", "compare", "capture", "measure", "export", "train", "sweep", "import", "report")


def namespace() -> list[str] | None:
    """What a command line begins with to have mounts of its own; None where that is not allowed."""
    for options in (["-m"], ["-Urm"]):
        words = ["unshare", *options, "--"]
        with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={_PAGE}", "tmpfs", folder]
            if subprocess.run([*words, *mount], capture_output=True, check=False).returncode == 0:
                return words
    return None


def _try(command: str, count: int, only: int | None) -> int:
    import engine.study
    import engine.study.sweep  # noqa: F401

    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name) / "material", Path(name) / "disk"
        folder.mkdir()
        disk.mkdir()
        trials = Trials(disk, _cases(folder, disk)[command]())
        before, most, _ = trials.undisturbed
        print(f"{command}: {before:,} bytes before it, {most:,} at most", flush=True)
        for size in [only] if only else trials.sizes(count):
            began = time.perf_counter()
            wrong, sentence = trials.trial(size)
            failed += bool(wrong)
            print(f"{size:,}: {time.perf_counter() - began:.0f} s: {sentence or 'done at once'}", flush=True)
            if wrong:
                print(f"  WRONG: {wrong}", flush=True)
    print(f"{command}: {failed} failed", flush=True)
    return 1 if failed else 0


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.full_disk", description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--sizes", type=int, default=20)
    parser.add_argument("--size", type=int)
    parser.add_argument("--mounts", action="store_true", help="this process has mounts of its own")
    given = parser.parse_args()
    if given.mounts:
        return _try(given.command, given.sizes, given.size)
    words = namespace()
    if words is None:
        print("no file system can be mounted here: unshare and mount are needed, and the right to use them")
        return 2
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.call(
        [*words, sys.executable, "-m", "tests.full_disk", *sys.argv[1:], "--mounts"], env=environment
    )


if __name__ == "__main__":
    sys.exit(_main())
